"""Several ranks on one machine, each a process of its own, side by side with other libraries.

python benchmarks/bench_ranks.py [--rounds 5] [--size-mib 512] [--folder DIR]

The ranks are started as torchrun does (gloo on loopback, one OpenMP thread each). A time is the whole job's:
from the moment that all ranks are told to start until the last one has returned. torch_checkpointing is
measured where it can be imported: pip install --no-deps --target DIR torch_checkpointing safetensors, then
PYTHONPATH=DIR.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, Self

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from harness import MIB, Bench, direct_write, fresh, machine, run_parts, verdict, warm_cache
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import milepost
from milepost.config import BarrierConfig, CheckpointerConfig, CheckpointWriterConfig

WIDTH = 2048
LAYER_BYTES = 4 * (WIDTH * WIDTH + WIDTH)
PEER = "torch_checkpointing"

# -- one rank ----------------------------------------------------------------------------------------


class Rank:
    """What a rank's process has, and what it can be told to do: the public methods, with a path."""

    def __init__(self, kind: str, layers: int) -> None:
        dist.init_process_group("gloo")
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        torch.manual_seed(1)
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))
        if kind == "sharded":
            mesh = init_device_mesh("cpu", (self.world,))
            for layer in model:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        self.state = {"model": {k: v.detach() for k, v in model.state_dict().items()}}
        self.target = {"model": {k: torch.zeros_like(v) for k, v in self.state["model"].items()}}
        config = CheckpointerConfig(
            writer_config=CheckpointWriterConfig(replicated=["model.*"] if kind == "replicated" else []),
            barrier_config=BarrierConfig(barrier_type="dist_barrier"),
        )
        self.checkpointer = milepost.make_sync_checkpointer(config)
        self.own = [getattr(v, "_local_tensor", v) for v in self.state["model"].values()]
        self.other: Any = None

    def save(self, path: str) -> None:
        self.checkpointer.save(path, self.state)

    def load(self, path: str) -> None:
        self.checkpointer.load(path, self.target)

    def load_unverified(self, path: str) -> None:
        self.checkpointer.load(path, self.target, verify=False)

    def plain_save(self, path: str) -> None:
        """This rank's share of the bytes, as fast as the disk takes them."""
        os.makedirs(path, exist_ok=True)
        size = sum(tensor.nbytes for tensor in self.own)
        direct_write(os.path.join(path, str(self.rank)), size, 16 * MIB)

    def copy(self, path: str) -> None:
        for key, value in self.target["model"].items():
            value.copy_(self.state["model"][key])

    def dcp_save(self, path: str) -> None:
        dcp.save(self.state, checkpoint_id=path)

    def dcp_load(self, path: str) -> None:
        dcp.load(self.target, checkpoint_id=path)

    def peer_save(self, path: str) -> None:
        self._peer().save(path, self.state)

    def peer_save_synced(self, path: str) -> None:
        """The same, and then what makes its files durable, divided over the ranks."""
        self._peer().save(path, self.state)
        dist.barrier()
        for file in files_in(path)[self.rank :: self.world]:
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        dist.barrier()

    def peer_load(self, path: str) -> None:
        self._peer().load(path, into=self.target)

    def _peer(self) -> Any:
        if self.other is None:
            from torch_checkpointing import CheckpointManager, ItemSpec
            from torch_checkpointing.config import SyncCheckpointSaverConfig
            from torch_checkpointing.default_resharder import DefaultResharder
            from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

            # Its resharder gathers metadata on CUDA devices; without one it can load the same layout alone.
            item = ItemSpec(resharder=DefaultResharder() if torch.cuda.is_available() else None)
            # Its direct writes do not align their ends, which file systems such as ext4 refuse.
            self.other = CheckpointManager(
                CheckpointManager.Config(
                    items={"model": item},
                    save=SyncCheckpointSaverConfig(),
                    storage_config=LocalFileSystemStorageConfig(use_direct_io=False),
                )
            )
        return self.other

    def blank(self, path: str) -> None:
        for value in self.target["model"].values():
            value.zero_()

    def check(self, path: str) -> None:
        """What was loaded is what was saved."""
        for key, value in self.target["model"].items():
            a, b = (getattr(v, "_local_tensor", v) for v in (value, self.state["model"][key]))
            assert torch.equal(a, b), f"{key} was not loaded from {path}"


def be_rank(kind: str, layers: int) -> None:
    """Do as the lines of stdin say; answer with the seconds that each took."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    rank = Rank(kind, layers)
    answers.write("ready\n")
    for line in sys.stdin:
        name, path = json.loads(line)
        dist.barrier()
        start = time.perf_counter()
        getattr(rank, name)(path)
        answers.write(f"{time.perf_counter() - start}\n")
    dist.destroy_process_group()


# -- a job -------------------------------------------------------------------------------------------


class Job:
    """Rank processes that wait for work."""

    def __init__(self, world: int, kind: str, layers: int) -> None:
        self.world = world
        self.seconds: dict[str, list[list[float]]] = {}
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by __exit__
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        common |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        command = [sys.executable, __file__, "--rank-of", kind, "--layers", str(layers)]
        self._ranks = [
            subprocess.Popen(
                command,
                env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
            )
            for rank in range(world)
        ]
        self._answers()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self._ranks:
            rank.stdin.close()
        for rank in self._ranks:
            rank.wait(timeout=60)
            rank.stdout.close()
        self._errors.close()

    def do(self, name: str, path: str = "") -> None:
        """Have all ranks do it at once, and wait for them."""
        for rank in self._ranks:
            rank.stdin.write(json.dumps([name, path]) + "\n")
            rank.stdin.flush()
        self.seconds.setdefault(name, []).append([float(answer) for answer in self._answers()])

    def _answers(self) -> list[str]:
        answers = [rank.stdout.readline() for rank in self._ranks]
        if not all(answers):
            for rank in self._ranks:
                rank.kill()
            self._errors.seek(0)
            raise SystemExit(f"a rank has failed:\n{self._errors.read()[-5000:]}")
        return answers

    def show_rates(self, name: str, size: int) -> None:
        """Each rank's own rate, the median of its rounds."""
        rounds = self.seconds[name][1:]
        rates = [size / statistics.median(times) / (1 << 30) for times in zip(*rounds, strict=True)]
        shown = ", ".join(f"{rate:.2f}" for rate in rates)
        print(f"  each of {self.world} ranks, {name}: {shown} GiB/s of its own")


def show_ratio(bench: Bench, case: str, baseline: str) -> None:
    """Print how fast one case is to another; nothing is asked of it."""
    found = {case.name: case.seconds for case in bench.cases}
    ratio = statistics.median(b / a for a, b in zip(found[case], found[baseline], strict=True))
    print(f"         {case}: {ratio:.2f} x the speed of {baseline}")


def files_in(path: str) -> list[str]:
    return sorted(os.path.join(above, name) for above, _, names in os.walk(path) for name in names)


def bytes_in(path: str) -> int:
    return sum(map(os.path.getsize, files_in(path)))


def clean(*paths: str) -> Callable[[], None]:
    """Nothing at these paths, and nothing on its way to the disk that would disturb the next case."""

    def work() -> None:
        for path in paths:
            fresh(path)()
        os.sync()

    return work


# -- what is measured --------------------------------------------------------------------------------


def bench_replicas(folder: str, layers: int, rounds: int) -> bool:
    """4 ranks that hold the same, declared so, against one process that saves all of it."""
    size = layers * LAYER_BYTES
    four, one = os.path.join(folder, "four"), os.path.join(folder, "one")
    with Job(4, "replicated", layers) as ranks, Job(1, "own", layers) as single:
        bench = Bench("Durable save of what 4 ranks hold alike", size)
        bench.case("one process saves all", lambda: single.do("save", one), clean(one, four))
        bench.case("4 ranks, declared replicated", lambda: ranks.do("save", four), clean(one, four))
        met = bench.run(rounds)
        show_ratio(bench, "4 ranks, declared replicated", "one process saves all")
        clean(one, four)()
        ranks.do("save", four)
        ratio = bytes_in(four) / size
    return met & verdict("bytes written, against the state", ratio, 1.02)


def bench_reshard(folder: str, layers: int, rounds: int) -> bool:
    """What 4 ranks saved, loaded by 2 ranks and by 4; as many bytes for the whole job."""
    size = layers * LAYER_BYTES
    path = os.path.join(folder, "resharded")
    with Job(4, "sharded", layers) as four, Job(2, "sharded", layers) as two:
        four.do("save", path)

        def warm() -> None:
            warm_cache(*files_in(path))

        bench = Bench("Load a sharded state that 4 ranks saved, warm, verified", size)
        bench.case("copy of the same tensors, 4 ranks", lambda: four.do("copy"))
        bench.case("4 ranks, the same layout", lambda: four.do("load", path), warm)
        bench.case("2 ranks, resharded", lambda: two.do("load", path), warm)
        bench.case("2 ranks, resharded, verify=False", lambda: two.do("load_unverified", path), warm)
        bench.at_least("2 ranks, resharded", "4 ranks, the same layout", 0.7)
        for job in (four, two):
            job.do("blank")
        met = bench.run(rounds)
        for job in (four, two):
            job.show_rates("load", size // job.world)
            job.do("blank")
            job.do("load", path)
            job.do("check", path)
    return met


def bench_peers(folder: str, layers: int, rounds: int, world: int) -> bool:
    """The same sharded state, saved and loaded by Milepost and by other libraries."""
    size = layers * LAYER_BYTES
    cases = {"save": "milepost", "dcp_save": "torch.distributed.checkpoint"}
    durable = {
        "save": "durable: files and folders are synced, committed at once, checksums",
        "dcp_save": "its files are synced (sync_files, the default), its folder is not; no checksums",
    }
    if importlib.util.find_spec(PEER) is None:
        print(f"\n{PEER} is not installed: skipped")
    else:
        version = importlib.metadata.version(PEER)
        cases |= {"peer_save": PEER, "peer_save_synced": f"{PEER} + fsync"}
        durable["peer_save"] = (
            f"version {version}, no resharder, no direct I/O: not durable (no fsync), "
            "renamed at the end; no checksums"
        )
        durable["peer_save_synced"] = "the same, and then its files are synced by this benchmark"
    paths = {name: os.path.join(folder, name) for name in cases}
    plain = os.path.join(folder, "plain")
    tidy = clean(plain, *paths.values())
    with Job(world, "sharded", layers) as job:
        saves = Bench(f"Save a sharded state, {world} ranks", size)
        saves.case("plain O_DIRECT, a file for each rank", lambda: job.do("plain_save", plain), tidy)
        for name, title in cases.items():
            saves.case(title, lambda n=name: job.do(n, paths[n]), tidy)
        met = saves.run(rounds)
        for title in ("plain O_DIRECT, a file for each rank", *[*cases.values()][1:]):
            show_ratio(saves, "milepost", title)
        tidy()
        for name, title in cases.items():
            job.do(name, paths[name])
            print(f"  {title}: {bytes_in(paths[name]) / size:.4f} x the state; {durable[name]}")
        loads = Bench(f"Load it on the same {world} ranks, warm", size)
        loads.case("copy of the same tensors", lambda: job.do("copy"))
        names = {name.replace("save", "load"): name for name in cases if "synced" not in name}
        titles = {}
        for name, saved in names.items():
            titles[name] = cases[saved] + (" (verified)" if name == "load" else "")
            loads.case(
                titles[name],
                lambda n=name, s=saved: job.do(n, paths[s]),
                lambda s=saved: warm_cache(*files_in(paths[s])),
            )
        loads.case(
            "milepost, verify=False",
            lambda: job.do("load_unverified", paths["save"]),
            lambda: warm_cache(*files_in(paths["save"])),
        )
        met &= loads.run(rounds)
        for title in ("copy of the same tensors", *[*titles.values()][1:]):
            show_ratio(loads, titles["load"], title)
        for name, saved in names.items():
            job.do("blank")
            job.do(name, paths[saved])
            job.do("check", paths[saved])
        tidy()
    return met


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size-mib", type=int, default=512)
    parser.add_argument("--folder", default=None, help="where to write; its disk is what is measured")
    parser.add_argument("--only", default="", help="one of replicas, reshard, peers4, peers8")
    parser.add_argument("--rank-of", default="", help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        be_rank(options.rank_of, options.layers)
        return 0
    print(f"{machine()}, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}")
    layers = max(options.size_mib * MIB // LAYER_BYTES, 1)
    with tempfile.TemporaryDirectory(dir=options.folder or os.getcwd(), prefix="bench-") as folder:
        parts = {
            "replicas": lambda: bench_replicas(folder, layers, options.rounds),
            "reshard": lambda: bench_reshard(folder, layers, options.rounds),
            "peers4": lambda: bench_peers(folder, layers, options.rounds, 4),
            "peers8": lambda: bench_peers(folder, layers, options.rounds, 8),
        }
        return 0 if run_parts(parts, options.only) else 1


if __name__ == "__main__":
    sys.exit(main())
