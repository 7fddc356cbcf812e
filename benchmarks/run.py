"""Runs every benchmark of this folder (bench_*.py), or those whose names are given, after naming the machine.

python benchmarks/run.py [name ...]
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path


def main() -> int:
    """Run them one after the other; return the exit code."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    print(
        f"{platform.system()} {platform.release()} {platform.machine()}, {os.cpu_count()} cores, "
        f"{memory / 2**30:.0f} GiB, Python {platform.python_version()}, torch {torch.__version__}",
        flush=True,
    )
    wanted = set(sys.argv[1:])
    failed = 0
    for script in sorted(Path(__file__).parent.glob("bench_*.py")):
        name = script.stem.removeprefix("bench_")
        if wanted and name not in wanted:
            continue
        print(f"\n== {name}", flush=True)
        failed |= subprocess.run([sys.executable, str(script)], check=False).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
