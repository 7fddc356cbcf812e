"""How long a build takes, against parsing and against reading the same files.

    python benchmarks/speed.py TREE [--rounds N]

In one run, rounds interleaved, medians: every file of the tree parsed once by the same parsers in
one process; a cold build; every file read and hashed; a build with nothing changed. Then cold
builds of growing parts of the tree, for the curve.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gazetteer.read import grammars
from gazetteer.read.analyze import read_text
from gazetteer.read.collect import digest_all
from gazetteer.read.scan import Found, scan

COLD_BAR = 4.0
UNCHANGED_BAR = 2.0
MEMORY_BAR_MIB = 1024


def parse_all(files: list[Found]) -> float:
    """Parse every file that a build parses, once, in this process; return the seconds."""
    sources = []
    for file in files:
        text = read_text(file).encode("utf-8", "replace")
        language = grammars.detect(file.path.rpartition("/")[2], text[:256])
        if language and text:
            sources.append((grammars.grammar(language).parser, text))
    began = time.perf_counter()
    for parser, text in sources:
        parser.parse(text)
    return time.perf_counter() - began


def hash_all(root: Path) -> float:
    """List the tree, read and hash every file; return the seconds."""
    began = time.perf_counter()
    digest_all({file.path: file for file in scan(root).files})
    return time.perf_counter() - began


def run_build(root: Path, out: Path) -> tuple[float, float]:
    """Build in a process of its own; return the seconds and the peak memory of all processes in MiB."""
    program = (
        "import sys, time, resource\n"
        "import gazetteer\n"
        "def main():\n"
        "    began = time.perf_counter()\n"
        "    gazetteer.build(sys.argv[1], sys.argv[2])\n"
        "    seconds = time.perf_counter() - began\n"
        "    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss\n"
        "    print(seconds, own / 1024, child / 1024)\n"
        "if __name__ == '__main__':\n"
        "    main()\n"
    )
    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
        script.write(program)
        script.flush()
        done = subprocess.run(
            [sys.executable, script.name, str(root), str(out)], check=True, capture_output=True, text=True
        )
    seconds, own, child = map(float, done.stdout.split())
    jobs = len(os.sched_getaffinity(0))
    return seconds, own + child * jobs  # the largest child, as many times as there are children


def part_of(folder: Path, files: list[Found], share: int, of: int) -> Path:
    """Copy every n-th file of a tree."""
    target = folder / f"part{share}"
    for file in files[:: of // share]:
        if not file.link and not file.special and file.size < 1 << 20:
            (target / file.path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file.real, target / file.path)
    return target


def main() -> int:
    """Print the tables; return 1 when a bar is missed."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("tree", type=Path)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--no-curve", action="store_true")
    options = arguments.parse_args()
    root: Path = options.tree.resolve()
    files = scan(root).files
    print(
        f"{root.name}: {len(files):,} files, {sum(f.size for f in files) / 2**20:,.0f} MiB; {len(os.sched_getaffinity(0))} processors, Python {sys.version.split()[0]}, load {os.getloadavg()[0]:.1f}"
    )
    rows: dict[str, list[float]] = {"parse once": [], "cold build": [], "read and hash": [], "unchanged build": []}
    memory = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            out = Path(folder, f"out{number}")
            rows["parse once"].append(parse_all(files))
            seconds, used = run_build(root, out)
            rows["cold build"].append(seconds)
            memory = max(memory, used)
            rows["read and hash"].append(hash_all(root))
            rows["unchanged build"].append(run_build(root, out)[0])
            shutil.rmtree(out)
        middle = {name: statistics.median(values) for name, values in rows.items()}
        cold = middle["cold build"] / middle["parse once"]
        unchanged = middle["unchanged build"] / middle["read and hash"]
        print(f"{'':<18}{'median s':>10}{'all rounds':>30}")
        for name, values in rows.items():
            print(f"{name:<18}{middle[name]:>10.2f}{' '.join(f'{v:.2f}' for v in values):>30}")
        print(f"cold build / parse once        {cold:5.2f}  (bar {COLD_BAR})")
        print(f"unchanged build / read + hash  {unchanged:5.2f}  (bar {UNCHANGED_BAR})")
        print(f"peak memory, all processes     {memory:5.0f} MiB  (bar {MEMORY_BAR_MIB})")
        if not options.no_curve:
            print(f"\n{'files':>8}{'seconds':>10}{'ms/file':>10}")
            for share in (1, 2, 4, 8):
                part = part_of(Path(folder), files, share, 8)
                seconds, _ = run_build(part, Path(folder, f"curve{share}"))
                count = len(scan(part).files)
                print(f"{count:>8,}{seconds:>10.2f}{1000 * seconds / count:>10.2f}")
    missed = cold > COLD_BAR or unchanged > UNCHANGED_BAR or memory > MEMORY_BAR_MIB
    print("missed" if missed else "met")
    return int(missed)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    raise SystemExit(main())
