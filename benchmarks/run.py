"""The benchmarks: Milepost, its peers and the machine's limits, in turns.

    python benchmarks/run.py                     # GPT-2, 500 x 4 MiB, 20,000 x 16 KiB (make bench)
    python benchmarks/run.py --full              # everything (make bench-full)
    python benchmarks/run.py gpt2 'size-*'       # groups by name or pattern; --list names them

Results are written after every turn and merged by group: runs of single groups add up, and --resume goes on
where a run was interrupted. No verdict is given on figures that were taken on a busy machine.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Collection
from typing import Any

warnings.simplefilter("ignore")

import extras  # noqa: E402 - after the warnings are off
import peers  # noqa: E402
import ranks  # noqa: E402
import report  # noqa: E402
import scale  # noqa: E402
import workloads  # noqa: E402
from cycle import Cycle  # noqa: E402
from harness import MIB, Bar, Control, Group, Results, Row, Worker, adopt_orphans, scratch  # noqa: E402
from limits import Limits  # noqa: E402
from workloads import Workload  # noqa: E402

QUICK = ["gpt2", "500x4MiB", "20000x16KiB"]
BASIC = ["milepost", "milepost sync", "torch.save + fsync", "safetensors + fsync", "DCP async, thread"]
MOST = [*BASIC, "moonclip", "moonclip, no compression"]
WIDE = [*MOST, "torch _experimental"]
CURVE = ["milepost", "torch.save + fsync", "safetensors + fsync", "DCP async, thread"]
SIZES = (10, 100, 1000, 8000)
COUNTS = (10, 100, 1000, 10_000)
ROUNDS = {"gpt2": 5, "starts": 9, "size-10": 5, "size-100": 5, "size-8000": 1, "small": 15, "scale*": 1}
FEW_ROUNDS, QUICK_ROUNDS = 3, 5
FEW = ("limits", "DCP async, thread")
"""The rows of `make bench` that take few turns: theirs take the longest."""
NOT_IN_FULL = ("scale*", "*-8")


def cycle_group(
    workload: Workload,
    folder: str,
    names: list[str],
    *,
    full: bool = False,
    asked: str = "",
    few: Collection[str] = (),
    **options: Any,
) -> Group:
    """A table of the life of a checkpoint.

    `asked` names the bars, `full` adds figures and processes, and rows in `few` take few turns.
    """
    state = workload.shape()
    size = sum(value.nbytes for value in workloads.unique(state))

    def limits(limit: float) -> dict[str, float]:
        with Worker(Limits, workload, folder) as worker:
            return worker.call("take", limit=limit)

    def row(name: str) -> Row:
        loads = True if name == "DCP async, thread" and "DCP" not in names else None
        rounds = FEW_ROUNDS if name in few or (full and peers.ALL[name].slow) else 0
        return Cycle(name, workload, folder, full=full, loads=loads, rounds=rounds).row()

    bars = bars_of(asked, size) if asked else []
    notes = f"{len(workloads.tensors_of(state)):,} float32 tensors."
    first = Row("limits", limits, rounds=FEW_ROUNDS if "limits" in few else 0)
    return Group(workload.name, [first, *map(row, names)], notes, bars, size, **options)


def bars_of(name: str, size: int) -> list[Bar]:
    """What is asked of ours, apart from being faster than the peers."""
    found = [
        Bar("milepost sync", "durable", 1 / 0.85, "limits", "direct write"),
        Bar("milepost", "durable", 1.15, "limits", "copy and direct write"),
        Bar("milepost", "cold", 1 / 0.85, "limits", "direct read, 1 threads"),
        Bar("milepost", "verify", 1 / 0.85, "limits", "direct read, 1 threads"),
        Bar("milepost", "prepared stall", 1.5, "limits", "copy"),
        Bar("milepost", "first stall", 1.2, "limits", "first touch and copy"),
        Bar("milepost", "save: trainer private", 64 * MIB),
        Bar("milepost", "save: writer private", 48 * MIB),
        Bar("milepost", "save: trainer shared", 1.02 * size),
        Bar("milepost", "load: trainer private", 128 * MIB),
        Bar("milepost sync", "save: trainer private", 128 * MIB),
    ]
    if name == "20000x16KiB":
        return [
            Bar("milepost", "stall", 2.0, "limits", "copy loop"),
            Bar("milepost sync", "durable", 3.0, "limits", "direct write, 16 MiB"),
            Bar("milepost", "warm", 3.0, "limits", "cached read"),
        ]
    return [
        *found,
        Bar("milepost", "stall", 1.15, "limits", "copy"),
        Bar("milepost sync", "durable", 0.5, "torch.save + fsync", "durable"),
        Bar("milepost", "warm", 1 / 0.7, "limits", "copy"),
        Bar("milepost", "warm, unverified", 1 / 0.8, "limits", "copy"),
        Bar("milepost", "warm", 0.5, "torch.save + fsync", "warm"),
        Bar("milepost", "warm, no template", 1.2, "limits", "checksum"),
        Bar("milepost", "warm, no template, unverified", 0.2, "limits", "checksum"),
    ]


def all_groups(folder: str, *, small: bool, full: bool) -> dict[str, Callable[[], Group]]:
    """Every group by name; making one costs something, so they are made when they are run."""
    everyone, wide, most = ([*peers.ALL], WIDE, MOST) if full else (BASIC, BASIC, BASIC)
    if small:  # without those whose writers import torch, which takes seconds
        scale.TENSORS, scale.ARRIVALS = 32, 3
        everyone = [name for name in everyone if name in (*BASIC, "DCP", "moonclip", "ravex")]
    few = () if full else FEW
    gpt2 = workloads.gpt2(small=small)
    groups: dict[str, Callable[[], Group]] = {
        "gpt2": lambda: cycle_group(gpt2, folder, everyone, full=full, asked="gpt2", few=few)
    }

    def add(
        name: str, title: str, count: int, each: int, names: list[str], changing: float = 1.0, **options: Any
    ) -> None:
        count, each = (min(count, 10), 4096) if small else (count, each)
        load = Workload(title, count, each, changing)
        groups[name] = lambda: cycle_group(load, folder, names, **options)

    kib = 16 << 10
    add("500x4MiB", "500 tensors of 4 MiB", 500, 4 * MIB, wide, asked="500x4MiB", few=few)
    x: tuple[str, float] = ("count", 20_000)
    add("20000x16KiB", "20,000 tensors of 16 KiB", 20_000, kib, wide, asked="20000x16KiB", few=few, x=x)
    x = ("count", 100_000)
    add("100000x16KiB", "100,000 tensors of 16 KiB", 100_000, kib, most, x=x, limit=90)
    add("lora", "250 tensors of 4 MiB, of which a step changes 10 %", 250, 4 * MIB, most, 0.1)
    add("small", "A state of 1 MiB", 1, MIB, BASIC)
    for size in SIZES:
        each = min(4_000_000, size * 100_000)
        title = f"{size:,} MB in tensors of {each / 1e6:.0f} MB"
        add(f"size-{size}", title, size * 1_000_000 // each, each, CURVE, x=("size", size), limit=400)
    for count in COUNTS:
        add(f"count-{count}", f"{count:,} tensors of 16 KiB", count, kib, CURVE, x=("count", count))
    for kind in ("FSDP2", "DDP"):
        for world in (4, 8):
            name = f"{kind}-{world}"
            groups[name] = lambda k=kind, w=world: ranks.group(k, folder, world=w, small=small)
    return groups | extras.all_groups(folder, small=small) | scale.all_groups(folder, small=small)


def rounds_of(name: str, options: argparse.Namespace) -> int:
    if options.rounds or options.small:
        return options.rounds or 1
    for pattern, rounds in ROUNDS.items():
        if fnmatch.fnmatch(name, pattern):
            return rounds
    return FEW_ROUNDS if options.full else QUICK_ROUNDS


def wait_for_quiet(seconds: float) -> None:
    """Give the load of what ran before time to die down."""
    end = time.monotonic() + seconds
    while os.getloadavg()[0] > report.MAX_LOAD and time.monotonic() < end:
        print(f"load average {os.getloadavg()[0]:.1f}: waiting until it is {report.MAX_LOAD}", flush=True)
        time.sleep(min(5, max(0.0, end - time.monotonic())))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="name", help="groups to run, or patterns of their names")
    add("--full", action="store_true", help="all peers and figures; without names: all groups")
    add("--small", action="store_true", help="so small that nothing is measured: does it run?")
    add("--rounds", type=int, default=0, help="instead of each group's own number")
    add(
        "--json",
        default="",
        help="the results file (build/bench.json; with --full docs/benchmarks/results.json)",
    )
    add("--resume", action="store_true", help="go on with what this commit has measured so far")
    add("--folder", default=None, help="where to write checkpoints; its disk is what is measured")
    add("--list", action="store_true", help="name the groups")
    add("--compare", metavar="OLD.json", help="then print what changed against these results")
    add("--check", nargs="?", const=report.STORED, metavar="STORED.json",
        help="then fail unless the ratios of these results hold (docs/benchmarks/results.json)")  # fmt: skip
    options = parser.parse_args()
    for path in filter(None, (options.compare, options.check)):
        if not os.path.exists(path):
            parser.error(f"{path} is not there; `make bench-full` makes docs/benchmarks/results.json")
    options.json = options.json or (report.STORED if options.full else os.path.join("build", "bench.json"))
    known = [*all_groups("", small=options.small, full=options.full)]
    if options.list:
        print("\n".join(known))
        sys.exit(0)
    wanted = [name for name in known if any(fnmatch.fnmatch(name, pattern) for pattern in options.names)]
    for pattern in options.names:
        if not fnmatch.filter(known, pattern):
            parser.error(f"no group is named {pattern}; there are {', '.join(known)}")
    if not options.names:
        wanted = (
            [n for n in known if not any(fnmatch.fnmatch(n, p) for p in NOT_IN_FULL)]
            if options.full
            else QUICK
        )
    options.wanted = wanted
    return options


def main() -> int:
    options = arguments()
    adopt_orphans()
    workloads.load_all()
    if not options.small:
        wait_for_quiet(180 if options.full else 60)
    results = Results(options.json, resume=options.resume)
    with scratch(options.folder) as folder:
        groups = all_groups(folder, small=options.small, full=options.full)
        control = Control(folder, small=options.small)
        for name in options.wanted:
            start = time.monotonic()
            results.run(name, groups[name](), rounds_of(name, options), control)
            print(f"{name}: {time.monotonic() - start:.0f} s\n", flush=True)
    done = {"groups": {name: results.content["groups"][name] for name in options.wanted}}
    for name, entry in done["groups"].items():
        print(report.group_text(name, entry))
    code = 0
    if options.compare:
        with open(options.compare, encoding="utf-8") as file:
            print("\n".join(report.compare(json.load(file), done)))
    if options.check:
        with open(options.check, encoding="utf-8") as file:
            code, lines = report.check(json.load(file), done)
        print("\n".join(lines))
    return code


if __name__ == "__main__":
    sys.exit(main())
