"""Runs the benchmarks of this folder, all or those that are named, after naming the machine."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from pathlib import Path


def main() -> int:
    """Run them one after the other; return 1 if one of them failed or missed a bar, else 0."""
    scripts = {
        script.stem.removeprefix("bench_"): script
        for script in sorted(Path(__file__).parent.glob("bench_*.py"))
    }
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="Each takes options of its own: python benchmarks/bench_sync.py --help"
    )
    parser.add_argument("names", nargs="*", choices=[[], *scripts], metavar="name", help=", ".join(scripts))
    wanted = parser.parse_args().names
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    print(
        f"{platform.system()} {platform.release()} {platform.machine()}, {os.cpu_count()} cores, "
        f"{memory / 2**30:.0f} GiB, Python {platform.python_version()}, torch {torch.__version__}",
        flush=True,
    )
    failed = 0
    for name in wanted or scripts:
        print(f"\n== {name}", flush=True)
        failed |= subprocess.run([sys.executable, str(scripts[name])], check=False).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
