"""Background saves: stall, time until durable, memory, interference; side by side with the peers.

    python benchmarks/bench_async.py [--rounds 5] [--size-mib 2048] [--folder DIR] [--no-peers]

Peers: torch's experimental async checkpointer, torch.distributed.checkpoint.async_save with a thread and
with a process, and torch_checkpointing 0.1.1 if it is installed (direct I/O off: with it on it fails).
"""

from __future__ import annotations

import argparse
import compileall
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from harness import MIB, _status, direct_write, drop_cache, fresh, machine, run_parts, verdict

import milepost
from milepost import syscalls


@dataclass
class Candidate:
    """Something that saves beside: `save` returns what waits until staged, and what waits until durable."""

    name: str
    save: Callable[[str, dict], tuple[Callable[[], object], Callable[[], object]]]
    close: Callable[[], object]
    stall: list[float] = field(default_factory=list)
    durable: list[float] = field(default_factory=list)
    first: tuple[float, float] | None = None
    error: str = ""


def ours() -> Candidate:
    checkpointer = milepost.make_async_checkpointer()

    def save(path: str, state: dict) -> tuple:
        staged, written = checkpointer.save(path, state)
        return staged.result, written.result

    candidate = Candidate("milepost", save, checkpointer.close)
    candidate.checkpointer = checkpointer
    return candidate


def torch_experimental() -> Candidate:
    from torch.distributed.checkpoint._experimental.builder import make_async_checkpointer
    from torch.distributed.checkpoint._experimental.config import CheckpointerConfig
    from torch.distributed.checkpoint._experimental.staging import CheckpointStagerConfig
    from torch.distributed.checkpoint._experimental.types import RankInfo

    config = CheckpointerConfig(
        staging_config=CheckpointStagerConfig(
            use_pinned_memory=False,
            use_shared_memory=True,
            use_async_staging=False,
            use_non_blocking_copy=False,
        )
    )
    checkpointer = make_async_checkpointer(config=config, rank_info=RankInfo(0, 1))

    def save(path: str, state: dict) -> tuple:
        staged, written = checkpointer.save(path, state)
        return staged.result, written.result

    return Candidate("torch _experimental", save, checkpointer.close)


def dcp(kind: str) -> Candidate:
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

    mode = AsyncCheckpointerType.PROCESS if kind == "process" else AsyncCheckpointerType.THREAD

    def save(path: str, state: dict) -> tuple:
        future = checkpoint.async_save(state, checkpoint_id=path, async_checkpointer_type=mode)
        return (lambda: None), future.result

    return Candidate(f"DCP async_save, {kind}", save, lambda: None)


def torch_checkpointing() -> Candidate:
    from torch_checkpointing import CheckpointManager
    from torch_checkpointing.config import AsyncCheckpointSaverConfig
    from torch_checkpointing.staging import CheckpointStagerConfig
    from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

    manager = CheckpointManager(
        CheckpointManager.Config(
            save=AsyncCheckpointSaverConfig(
                staging_config=CheckpointStagerConfig(
                    use_pinned_memory=False,
                    use_shared_memory=True,
                    use_async_staging=False,
                    use_non_blocking_copy=False,
                )
            ),
            storage_config=LocalFileSystemStorageConfig(use_direct_io=False),
        )
    )

    def save(path: str, state: dict) -> tuple:
        future = manager.save(path, {"model": state})
        return (lambda: None), future.result

    return Candidate("torch_checkpointing 0.1.1", save, manager.close)


def measure(candidates: list[Candidate], state: dict, folder: str, rounds: int) -> dict[str, list[float]]:
    """Let the candidates take turns, and plain copies and writes between them."""
    size = sum(value.nbytes for value in state.values())
    sources = list(state.values())
    targets = [torch.empty_like(value).copy_(value) for value in sources]
    plain = os.path.join(folder, "plain")
    base: dict[str, list[float]] = {"copy": [], "loop": [], "write": []}
    for turn in range(rounds + 1):
        for name, work in (
            ("copy", lambda: torch._foreach_copy_(targets, sources)),
            ("loop", lambda: [target.copy_(source) for target, source in zip(targets, sources, strict=True)]),
            ("write", lambda: direct_write(plain, size, 16 * MIB)),
        ):
            fresh(plain)()
            start = time.perf_counter()
            work()
            base[name].append(time.perf_counter() - start)
        for candidate in candidates:
            if candidate.error:
                continue
            path = os.path.join(folder, f"{candidate.name.replace(' ', '-')}-{turn}")
            try:
                start = time.perf_counter()
                staged, durable = candidate.save(path, state)
                staged()
                stall = time.perf_counter() - start
                durable()
                sync_files(path)
                total = time.perf_counter() - start
            except Exception as error:  # noqa: BLE001 - a peer that fails is a result
                candidate.error = (
                    f"{type(error).__name__}: {str(error).splitlines()[0][:90] if str(error) else ''}"
                )
                continue
            finally:
                fresh(path)()
            if turn:
                candidate.stall.append(stall)
                candidate.durable.append(total)
            else:
                candidate.first = (stall, total)
    fresh(plain)()
    return {name: seconds[1:] for name, seconds in base.items()}


def sync_files(path: str) -> None:
    """Peers do not fsync: what they wrote counts when it is durable, as ours does."""
    for folder, _, names in os.walk(path):
        for name in names:
            drop_cache(os.path.join(folder, name))


def report(title: str, candidates: list[Candidate], base: dict[str, list[float]]) -> None:
    median = statistics.median
    print(f"\n{title}")
    for name, seconds in base.items():
        print(f"  plain {name:34} {median(seconds):7.3f} s  ({min(seconds):.3f}-{max(seconds):.3f})")
    print(f"  {'':40}   first save          later: stall    durable   stall/copy  durable/(copy+write)")
    for candidate in candidates:
        if candidate.error or candidate.first is None:
            print(f"  {candidate.name:40} FAILED {candidate.error}")
            continue
        copies = [stall / copy for stall, copy in zip(candidate.stall, base["copy"], strict=True)]
        writes = [
            total / (copy + write)
            for total, copy, write in zip(candidate.durable, base["copy"], base["write"], strict=True)
        ]
        print(
            f"  {candidate.name:40} {candidate.first[0]:6.3f} / {candidate.first[1]:6.3f} s "
            f"  {median(candidate.stall):8.3f} s {median(candidate.durable):8.3f} s"
            f" {median(copies):10.2f} {median(writes):12.2f}"
        )


PEERS: dict[str, Callable[[], Candidate]] = {
    "torch _experimental": torch_experimental,
    "DCP async_save, thread": lambda: dcp("thread"),
    "DCP async_save, process": lambda: dcp("process"),
    "torch_checkpointing 0.1.1": torch_checkpointing,
}


def peer_with_many(name: str, folder: str) -> None:
    """In a process of its own: how a peer does with 20,000 tensors."""
    many = {f"k{i}": torch.randn(4096) for i in range(20_000)}
    candidate = PEERS[name]()
    path = os.path.join(folder, "peer-many")
    try:
        start = time.perf_counter()
        staged, durable = candidate.save(path, many)
        staged()
        stall = time.perf_counter() - start
        durable()
        print(f"  {name:40} first save {stall:.3f} / {time.perf_counter() - start:.3f} s", flush=True)
    except BaseException as error:  # noqa: BLE001 - a peer that fails is a result
        reason = str(error).strip().splitlines()
        print(f"  {name:40} FAILED {type(error).__name__}: {reason[-1][:90] if reason else ''}", flush=True)
    os._exit(0)


def bench_peers(folder: str, size: int, rounds: int, peers: list[str]) -> bool:
    state = {f"layer.{i}.weight": torch.randn(size // 500 // 4) for i in range(500)}
    candidates = [ours(), *(PEERS[name]() for name in peers)]
    base = measure(candidates, state, folder, rounds)
    report(f"{size // MIB} MiB in 500 tensors", candidates, base)
    mine = candidates[0]
    pairs = zip(mine.stall, base["copy"], strict=True)
    met = verdict(
        "stall, later saves, against a plain copy", statistics.median(a / b for a, b in pairs), 1.15
    )
    triples = zip(mine.durable, base["copy"], base["write"], strict=True)
    met &= verdict(
        "durable, against copy + direct write", statistics.median(t / (c + w) for t, c, w in triples), 1.15
    )
    for candidate in candidates:
        candidate.close()

    many = {f"k{i}": torch.randn(4096) for i in range(20_000)}
    candidates = [ours()]
    before = len(os.listdir("/proc/self/fd"))
    base = measure(candidates, many, folder, rounds)
    opened = len(os.listdir("/proc/self/fd")) - before
    report("20,000 tensors of 16 KiB", candidates, base)
    for name in peers:  # each in a process of its own: some leave no descriptor for anybody else
        done = subprocess.run(
            [sys.executable, "-W", "ignore", __file__, "--many", name, "--folder", folder],
            check=False, capture_output=True, text=True,
        )  # fmt: skip
        lines = done.stdout.strip().splitlines() or [f"  {name}: FAILED"]
        print(lines[-1])
    pairs = zip(candidates[0].stall, base["loop"], strict=True)
    met &= verdict(
        "stall, 20,000 tensors, against a plain copy loop", statistics.median(a / b for a, b in pairs), 2.0
    )
    print(f"  descriptors after {rounds + 1} saves of 20,000 tensors: {opened} more than before")
    for candidate in candidates:
        candidate.close()
    return met


def bench_first(folder: str, size: int, rounds: int) -> bool:
    """First saves: after `prepare`, and without it."""
    state = {f"layer.{i}.weight": torch.randn(size // 500 // 4) for i in range(500)}
    sources = list(state.values())
    targets = [torch.empty_like(value).copy_(value) for value in sources]
    prepared, unprepared = [], []
    for turn in range(rounds):
        start = time.perf_counter()
        torch._foreach_copy_(targets, sources)
        copy = time.perf_counter() - start
        start = time.perf_counter()
        descriptor = syscalls.anonymous_file("bench")
        touch(descriptor, size)
        os.close(descriptor)
        touching = time.perf_counter() - start
        for prepare in (True, False):
            with milepost.make_async_checkpointer() as checkpointer:
                checkpointer._process.process_creation_future.result()
                if prepare:
                    checkpointer.prepare(state)
                    checkpointer._stager.wait_prepared()
                start = time.perf_counter()
                _, written = checkpointer.save(os.path.join(folder, f"first-{turn}-{prepare}"), state)
                stall = time.perf_counter() - start
                written.result()
            fresh(os.path.join(folder, f"first-{turn}-{prepare}"))()
            (prepared if prepare else unprepared).append(stall / (copy if prepare else copy + touching))
    print("\nFirst save")
    met = verdict("stall after prepare, against a plain copy", statistics.median(prepared), 1.5)
    return met & verdict("stall without, against first touch + copy", statistics.median(unprepared), 1.2)


def touch(descriptor: int, size: int) -> None:
    """The first touch of as many fresh shared bytes, by a copy."""
    import mmap

    os.ftruncate(descriptor, size)
    memory = mmap.mmap(descriptor, size)
    target = torch.frombuffer(memory, dtype=torch.uint8)
    target.zero_()


def bench_memory(folder: str, size: int) -> bool:
    """What a save costs in memory, in this process and in the writer."""
    state = {f"layer.{i}.weight": torch.randn(size // 500 // 4) for i in range(500)}
    with milepost.make_async_checkpointer() as checkpointer:
        before = _status("RssAnon")
        for turn in range(3):
            _, written = checkpointer.save(os.path.join(folder, f"memory-{turn}"), state)
            written.result()
            fresh(os.path.join(folder, f"memory-{turn}"))()
        grown = _status("RssAnon") - before
        pid = checkpointer._process.process.pid
        writer = _status("RssAnon", pid) + _status("RssFile", pid)
        arena = sum(slot.arena.size for slot in checkpointer._stager._slots)
    print("\nMemory")
    met = verdict("arena, against the tensors' bytes", arena / size, 1.02)
    met &= verdict("private memory of the trainer grew by (MiB)", grown / MIB, 64)
    return met & verdict("lean writer beyond the arena, RssAnon + RssFile (MiB)", writer / MIB, 48)


def bench_start(rounds: int) -> bool:
    """How fast a writer is ready, against a bare interpreter."""
    compileall.compile_dir(os.path.dirname(milepost.__file__), quiet=2)  # as an installed package is
    bare, ready = [], []
    for _ in range(max(rounds, 9)):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", "pass"], check=True)
        bare.append(time.perf_counter() - start)
        start = time.perf_counter()
        checkpointer = milepost.make_async_checkpointer()
        checkpointer._process.process_creation_future.result()
        ready.append(time.perf_counter() - start)
        checkpointer.close()
    print("\nStart of the lean writer")
    return verdict(
        "ready, against a bare interpreter's start and end",
        statistics.median(ready) / statistics.median(bare),
        4.0,
    )


def bench_interference(folder: str, size: int, windows: int) -> bool:
    """How much a compute-bound loop slows down while a save is written."""
    state = {f"layer.{i}.weight": torch.randn(size // 500 // 4) for i in range(500)}
    matrix = torch.randn(512, 512)
    cores, met = os.cpu_count() or 1, True
    print("\nInterference with a compute-bound loop (matmul 512)")
    with milepost.make_async_checkpointer() as checkpointer:
        for threads in sorted({max(cores - 1, 1), cores}):
            torch.set_num_threads(threads)
            slower, lost = [], []
            for turn in range(windows):
                path = os.path.join(folder, f"busy-{turn}")
                _, written = checkpointer.save(path, state)
                with_save, elapsed = iterations(matrix, lambda w=written: w.done())
                written.result()
                fresh(path)()
                end = time.perf_counter() + elapsed
                alone, elapsed_alone = iterations(matrix, lambda e=end: time.perf_counter() >= e)
                slower.append(1 - (with_save / elapsed) / (alone / elapsed_alone))
                lost.append(slower[-1] * elapsed / (size / (1 << 30)))
            slower.sort()
            spread = f"{slower[0] * 100:.1f} to {slower[-1] * 100:.1f} %"
            if threads < cores:
                met &= verdict(
                    f"slowdown with an idle core, % (median of {windows}, {spread})",
                    statistics.median(slower) * 100,
                    5,
                )
            else:
                met &= verdict(
                    f"lost compute, every core busy, s per GiB (slowdown {spread})",
                    statistics.median(lost),
                    0.25,
                )
    torch.set_num_threads(cores)
    return met


def iterations(matrix: torch.Tensor, done: Callable[[], bool]) -> tuple[int, float]:
    count = 0
    start = time.perf_counter()
    while not done():
        matrix @ matrix
        count += 1
    return count, time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size-mib", type=int, default=2048)
    parser.add_argument("--folder", default=None, help="where to write; its disk is what is measured")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--only", default="", help="one of peers, first, memory, start, interference")
    parser.add_argument("--many", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = options.size_mib * MIB
    peers: list[str] = []
    if not options.no_peers:
        import torch.distributed as dist

        store = tempfile.NamedTemporaryFile()  # noqa: SIM115 - must outlive the group
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
        dist.init_process_group("cpu:gloo", init_method=f"file://{store.name}", rank=0, world_size=1)
        peers = [
            name for name in PEERS if "0.1.1" not in name or importlib.util.find_spec("torch_checkpointing")
        ]
    if options.many:
        peer_with_many(options.many, options.folder)
    print(f"{machine()}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory(dir=options.folder or os.getcwd(), prefix="bench-") as folder:
        parts = {
            "peers": lambda: bench_peers(folder, size, options.rounds, peers),
            "first": lambda: bench_first(folder, size, options.rounds),
            "memory": lambda: bench_memory(folder, size),
            "start": lambda: bench_start(options.rounds),
            "interference": lambda: bench_interference(folder, size // 2, max(15, options.rounds)),
        }
        return 0 if run_parts(parts, options.only) else 1


if __name__ == "__main__":
    sys.exit(main())
