"""How long `milepost --help` takes, against `python -c 'import typer, rich'`; rounds interleaved."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

ROUNDS = 15
COMMANDS = {
    "import typer, rich": [sys.executable, "-c", "import typer, rich"],
    "milepost --help": [str(Path(sys.executable).with_name("milepost")), "--help"],
    "milepost ls --help": [str(Path(sys.executable).with_name("milepost")), "ls", "--help"],
}


def main() -> None:
    """Print the medians and their ratio to the first command."""
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(ROUNDS):
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            times[name].append(time.perf_counter() - start)
    base = statistics.median(times["import typer, rich"])
    print(f"{'command':22}{'median':>10}{'ratio':>8}   ({ROUNDS} rounds)")
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(f"{name:22}{median * 1000:7.0f} ms{median / base:8.2f}")


if __name__ == "__main__":
    main()
