"""What the benchmarks share: interleaved rounds, medians, plain baselines, tables.

Machines are noisy: every figure is a median over rounds in which all candidates take turns, and what
counts is the ratio to a baseline of the same run.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from milepost import syscalls

MIB = 1 << 20


@dataclass
class Case:
    name: str
    run: Callable[[], object]
    before: Callable[[], object] = lambda: None
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass
class Bar:
    """A ratio that is asked for: `case` against `baseline`, by speed (at least) or by time (at most)."""

    case: str
    baseline: str
    limit: float
    at_least: bool = True


class Bench:
    """Cases that take turns."""

    def __init__(self, title: str, size_bytes: int) -> None:
        self.title = title
        self.size_bytes = size_bytes
        self.cases: list[Case] = []
        self.bars: list[Bar] = []

    def case(self, name: str, run: Callable[[], object], before: Callable[[], object] = lambda: None) -> None:
        self.cases.append(Case(name, run, before))

    def at_least(self, case: str, baseline: str, ratio: float) -> None:
        """`case` is to be at least `ratio` times as fast as `baseline`."""
        self.bars.append(Bar(case, baseline, ratio))

    def at_most(self, case: str, baseline: str, ratio: float) -> None:
        """`case` is to take at most `ratio` times as long as `baseline`."""
        self.bars.append(Bar(case, baseline, ratio, at_least=False))

    def run(self, rounds: int) -> bool:
        """Run a round to warm up and `rounds` that count; print the table; whether every bar is met."""
        for turn in range(rounds + 1):
            order = self.cases if turn % 2 else list(reversed(self.cases))
            for case in order:
                case.before()
                gc.collect()
                start = time.perf_counter()
                case.run()
                if turn:
                    case.seconds.append(time.perf_counter() - start)
        print(f"\n{self.title} ({self.size_bytes / MIB:,.0f} MiB; medians of {rounds} rounds)")
        for case in self.cases:
            rate = self.size_bytes / case.median / (1 << 30)
            spread = f"{min(case.seconds):.3f}-{max(case.seconds):.3f}"
            print(f"  {case.name:42} {case.median:8.3f} s  {rate:6.2f} GiB/s  ({spread})")
        verdicts = [self._judge(bar) for bar in self.bars]  # all of them, as each prints
        return all(verdicts)

    def _judge(self, bar: Bar) -> bool:
        found = {case.name: case for case in self.cases}
        one, other = found[bar.case], found[bar.baseline]
        # A ratio for every round, then their median: what disturbs a round disturbs both alike.
        ratios = [a / b for a, b in zip(one.seconds, other.seconds, strict=True)]
        ratio = statistics.median(1 / r if bar.at_least else r for r in ratios)
        met = ratio >= bar.limit if bar.at_least else ratio <= bar.limit
        what = "x the speed of" if bar.at_least else "x the time of"
        sign = ">=" if bar.at_least else "<="
        verdict = "ok    " if met else "MISSED"
        print(f"  {verdict} {bar.case}: {ratio:.2f} {what} {bar.baseline} (asked: {sign} {bar.limit})")
        return met


def verdict(what: str, value: float, limit: float) -> bool:
    """Print whether a value is at most what is asked for, and return that."""
    met = value <= limit
    print(f"  {'ok    ' if met else 'MISSED'} {what}: {value:.4g} (asked: <= {limit})", flush=True)
    return met


def run_parts(parts: dict[str, Callable[[], bool]], only: str) -> bool:
    """Run all parts of a benchmark, or the one that is asked for; tell whether every bar was met."""
    if only and only not in parts:
        raise SystemExit(f"--only must be one of {', '.join(parts)}, not {only!r}")
    results = {name: run() for name, run in parts.items() if only in ("", name)}
    missed = [name for name, met in results.items() if not met]
    print(f"\n{'every bar met' if not missed else 'bars missed in: ' + ', '.join(missed)}")
    return not missed


def direct_write(path: str, size: int, block_bytes: int) -> None:
    """The disk's own rate: plain O_DIRECT writes of one warm buffer, one thread, then fsync."""
    view = _buffer(block_bytes)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | syscalls.O_DIRECT, 0o600)
    try:
        for offset in range(0, size - size % 4096, block_bytes):
            os.pwrite(descriptor, view[: min(block_bytes, size - size % 4096 - offset)], offset)
        os.ftruncate(descriptor, size)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def direct_read(path: str, block_bytes: int = 16 * MIB) -> None:
    """The disk's own rate of reading: plain O_DIRECT reads into one warm buffer, one thread."""
    view = _buffer(block_bytes)
    size = os.path.getsize(path)
    descriptor = os.open(path, os.O_RDONLY | syscalls.O_DIRECT)
    try:
        for offset in range(0, size, block_bytes):
            os.preadv(descriptor, [view], offset)
    finally:
        os.close(descriptor)


_buffers: dict[int, memoryview] = {}


def _buffer(size: int) -> memoryview:
    if size not in _buffers:
        _buffers[size] = syscalls.private_memory(size)
        ctypes.memset(syscalls.address_of(_buffers[size]), 1, size)
    return _buffers[size]


def drop_cache(*paths: str) -> None:
    """Push files out of the page cache (the host of a virtual machine may still hold them)."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def warm_cache(*paths: str) -> None:
    """Read files into the page cache."""
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.read(16 * MIB):
                pass


def fresh(path: str) -> Callable[[], None]:
    """A function that makes sure nothing is at `path`."""

    def remove() -> None:
        if os.path.isdir(path):
            shutil.rmtree(path)
        elif os.path.exists(path):
            os.remove(path)

    return remove


def peak_private_bytes(work: Callable[[], object]) -> int:
    """How far `work` raises this process's resident memory at its highest, over what it was before."""
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = _status("VmHWM") - _status("RssFile")
    work()
    return _status("VmHWM") - _status("RssFile") - before


def _status(name: str, pid: int | str = "self") -> int:
    with open(f"/proc/{pid}/status") as file:
        for line in file:
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    return 0


def machine() -> str:
    """The machine in a line."""
    with open("/proc/meminfo") as file:
        memory = int(file.readline().split()[1]) / (1 << 20)
    cores, kernel, python = os.cpu_count(), platform.release(), platform.python_version()
    return f"{platform.machine()}, {cores} cores, {memory:.0f} GiB, Linux {kernel}, Python {python}"
