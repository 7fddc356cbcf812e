"""Synchronous save, load and verify, side by side with plain I/O and with torch.

python benchmarks/bench_sync.py [--rounds 7] [--size-mib 2048] [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile

import torch
from harness import (
    MIB,
    Bench,
    direct_read,
    direct_write,
    drop_cache,
    fresh,
    machine,
    peak_private_bytes,
    run_parts,
    verdict,
    warm_cache,
)
from isal import isal_zlib

import milepost
from milepost import syscalls
from milepost.storage import default_storage
from milepost.verify import verify


def state_of(size: int, count: int) -> dict[str, torch.Tensor]:
    return {f"layer.{i}.weight": torch.randn(size // count // 4) for i in range(count)}


def bench_save(folder: str, size: int, rounds: int, checkpointer: object) -> bool:
    state = state_of(size, 500)
    bench = Bench("Durable save, 500 tensors", size)
    plain = os.path.join(folder, "plain")
    for block in (8, 16, 32):
        bench.case(
            f"plain O_DIRECT, {block} MiB writes",
            lambda b=block: direct_write(plain, size, b * MIB),
            fresh(plain),
        )
    path = os.path.join(folder, "ours")
    bench.case("milepost save", lambda: checkpointer.save(path, state), fresh(path))
    torch_path = os.path.join(folder, "torch.pt")
    bench.case("torch.save + fsync", lambda: torch_save(state, torch_path), fresh(torch_path))
    bench.at_least("milepost save", "plain O_DIRECT, 16 MiB writes", 0.9)
    for block in (8, 32):
        bench.at_least("milepost save", f"plain O_DIRECT, {block} MiB writes", 0.85)
    bench.at_least("milepost save", "torch.save + fsync", 2.0)
    return bench.run(rounds)


def torch_save(state: object, path: str) -> None:
    with open(path, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def bench_load(folder: str, size: int, rounds: int, checkpointer: object) -> bool:
    state = state_of(size, 500)
    path, torch_path = os.path.join(folder, "ours"), os.path.join(folder, "torch.pt")
    fresh(path)()
    checkpointer.save(path, state)
    torch_save(state, torch_path)
    data = os.path.join(path, "checkpoint_0.pt")
    target = {key: torch.zeros_like(value) for key, value in state.items()}

    def copy() -> None:
        for key, value in target.items():
            value.copy_(state[key])

    def torch_load() -> None:
        loaded = torch.load(torch_path, mmap=True)
        for key, value in target.items():
            value.copy_(loaded[key])

    warm = Bench(f"Load into a model, warm, {torch.get_num_threads()} threads", size)
    warm.case("copy of the same tensors", copy)
    warm.case("milepost load", lambda: checkpointer.load(path, target), lambda: warm_cache(data))
    warm.case(
        "milepost load, verify=False",
        lambda: checkpointer.load(path, target, verify=False),
        lambda: warm_cache(data),
    )
    warm.case("torch.load(mmap=True) + copy", torch_load, lambda: warm_cache(torch_path))
    warm.at_least("milepost load", "copy of the same tensors", 0.7)
    warm.at_least("milepost load, verify=False", "copy of the same tensors", 0.8)
    warm.at_least("milepost load", "torch.load(mmap=True) + copy", 2.0)
    met = warm.run(rounds)
    assert all(torch.equal(state[key], target[key]) for key in state)

    cold = Bench("Load into a model and verify, cold", size)
    cold.case("plain O_DIRECT reads, 16 MiB", lambda: direct_read(data), lambda: drop_cache(data))
    cold.case("milepost load", lambda: checkpointer.load(path, target), lambda: drop_cache(data))
    cold.case("milepost verify", lambda: verify(default_storage(), path), lambda: drop_cache(data))
    cold.case("torch.load(mmap=True) + copy", torch_load, lambda: drop_cache(torch_path))
    cold.at_least("milepost load", "plain O_DIRECT reads, 16 MiB", 0.85)
    cold.at_least("milepost verify", "plain O_DIRECT reads, 16 MiB", 0.85)
    met &= cold.run(rounds)

    def crc_pass() -> None:
        descriptor = os.open(data, os.O_RDONLY)
        view = syscalls.map_file_private(descriptor, os.path.getsize(data))
        os.close(descriptor)
        for start in range(0, len(view), MIB):
            isal_zlib.crc32(view[start : start + MIB])

    mapped = Bench("Load without a template", size)
    mapped.case("one CRC pass over the mapped bytes", crc_pass, lambda: warm_cache(data))
    mapped.case("milepost load", lambda: checkpointer.load(path), lambda: warm_cache(data))
    mapped.case(
        "milepost load, verify=False", lambda: checkpointer.load(path, verify=False), lambda: warm_cache(data)
    )
    mapped.at_most("milepost load", "one CRC pass over the mapped bytes", 1.2)
    mapped.at_most("milepost load, verify=False", "one CRC pass over the mapped bytes", 0.2)
    return met & mapped.run(rounds)


def bench_many(folder: str, rounds: int, checkpointer: object) -> bool:
    count, each = 20_000, 16 * 1024
    state = {f"k{i}": torch.randn(each // 4) for i in range(count)}
    target = {key: torch.zeros_like(value) for key, value in state.items()}
    path, plain = os.path.join(folder, "many"), os.path.join(folder, "plain")
    size = count * each
    save = Bench("Durable save, 20,000 tensors of 16 KiB", size)
    save.case("plain O_DIRECT, 16 MiB writes", lambda: direct_write(plain, size, 16 * MIB), fresh(plain))
    save.case("milepost save", lambda: checkpointer.save(path, state), fresh(path))
    save.at_most("milepost save", "plain O_DIRECT, 16 MiB writes", 3.0)
    met = save.run(rounds)

    def read_plainly() -> None:
        with open(plain, "rb", buffering=0) as file:
            for value in target.values():
                file.readinto(memoryview(value.numpy()))

    load = Bench("Load into a model, warm, 20,000 tensors of 16 KiB", size)
    load.case("plain read of the same bytes into them", read_plainly, lambda: warm_cache(plain))
    load.case("copy of the same tensors", lambda: [target[k].copy_(state[k]) for k in state])
    load.case(
        "milepost load",
        lambda: checkpointer.load(path, target),
        lambda: warm_cache(f"{path}/checkpoint_0.pt"),
    )
    load.at_most("milepost load", "plain read of the same bytes into them", 3.0)
    return met & load.run(rounds)


def bench_small(folder: str, rounds: int, checkpointer: object) -> bool:
    state = {"model": {"weight": torch.randn(256 * 1024)}, "step": 1}
    path, plain = os.path.join(folder, "small"), os.path.join(folder, "plain-small")
    checkpointer.save(path, state)
    sizes = {name: os.path.getsize(os.path.join(path, name)) for name in os.listdir(path)}

    def write_plainly() -> None:
        os.mkdir(plain)
        for name, length in sizes.items():
            with open(os.path.join(plain, name), "wb", buffering=0) as file:
                file.write(bytes(length))
                os.fsync(file.fileno())

    print(
        f"\nA state of 1 MiB: milepost makes 5 fsyncs (3 files, 2 folders), "
        f"the plain baseline {len(sizes)} (files)"
    )
    bench = Bench("Durable save of a state of 1 MiB", sum(sizes.values()))
    bench.case("the same files, written and fsynced", write_plainly, fresh(plain))
    bench.case("milepost save", lambda: checkpointer.save(path, state), fresh(path))
    bench.at_most("milepost save", "the same files, written and fsynced", 2.0)
    return bench.run(max(rounds, 15))


PEAKS = {
    "save": lambda checkpointer, path, state, target: checkpointer.save(path, state),
    "load": lambda checkpointer, path, state, target: checkpointer.load(path, target),
    "cold load": lambda checkpointer, path, state, target: checkpointer.load(path, target),
    "verify": lambda checkpointer, path, state, target: verify(default_storage(), path),
}


def measure_peak(name: str, folder: str, size: int) -> None:
    """In a process of its own: print the peak of one operation as JSON."""
    checkpointer = milepost.make_sync_checkpointer()
    path = os.path.join(folder, "peak")
    state = state_of(size, 500)
    target = {key: torch.zeros_like(value) for key, value in state.items()} if "load" in name else {}
    if name != "save":
        checkpointer.save(path, state)
        state = {}
        (drop_cache if name == "cold load" else warm_cache)(os.path.join(path, "checkpoint_0.pt"))
    print(json.dumps(peak_private_bytes(lambda: PEAKS[name](checkpointer, path, state, target))))


def bench_memory(folder: str, size: int) -> bool:
    print("\nPeak memory beyond the state or the targets")
    met = True
    for name in PEAKS:
        for part in (size // 4, size):
            fresh(os.path.join(folder, "peak"))()
            command = [
                sys.executable,
                __file__,
                "--peak",
                name,
                "--folder",
                folder,
                "--size-mib",
                str(part // MIB),
            ]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            met &= verdict(f"{name} of {part // MIB} MiB, in MiB", found / MIB, 128)
    return met


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--size-mib", type=int, default=2048)
    parser.add_argument("--folder", default=None, help="where to write; its disk is what is measured")
    parser.add_argument("--only", default="", help="one of save, load, many, small, memory")
    parser.add_argument("--peak", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = options.size_mib * MIB
    if options.peak:
        measure_peak(options.peak, options.folder, size)
        return 0
    print(f"{machine()}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory(dir=options.folder or os.getcwd(), prefix="bench-") as folder:
        checkpointer = milepost.make_sync_checkpointer()
        parts = {
            "save": lambda: bench_save(folder, size, options.rounds, checkpointer),
            "load": lambda: bench_load(folder, size, options.rounds, checkpointer),
            "many": lambda: bench_many(folder, options.rounds, checkpointer),
            "small": lambda: bench_small(folder, options.rounds, checkpointer),
            "memory": lambda: bench_memory(folder, size),
        }
        return 0 if run_parts(parts, options.only) else 1


if __name__ == "__main__":
    sys.exit(main())
