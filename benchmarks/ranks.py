"""Several ranks on one machine, each a process of its own with one thread, as torchrun starts them.

The life of a checkpoint is that of `cycle`; a time is the whole job's, from the moment that all ranks begin
until the last one has returned. 4 or 8 ranks share the cores of this machine.
"""

from __future__ import annotations

import os
import shutil
import socket
from dataclasses import dataclass
from typing import Any, Self

import peers
import torch
from cycle import Cycle, Trainer
from harness import MIB, Bar, Group, Row, Worker
from limits import direct_write
from workloads import Workload, tensors_of

SUMS = {"read"}
"""Figures of a job that are its ranks' sums; of all others the largest counts."""


@dataclass(frozen=True)
class Layers(Workload):
    """Linear layers with a bias, sharded by FSDP2 over all ranks, or the same on each rank."""

    width: int = 2048
    sharded: bool = True

    def build(self) -> dict[str, Any]:
        import torch.distributed as dist
        from torch import nn
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        torch.manual_seed(1)
        model = nn.Sequential(*(nn.Linear(self.width, self.width) for _ in range(self.count)))
        if self.sharded:
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            for layer in model:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        return {"model": {name: value.detach() for name, value in model.state_dict().items()}}

    @property
    def size(self) -> int:
        return self.count * 4 * (self.width * self.width + self.width)


class RanksMilepost(peers.MilepostSync):
    """Saves that return when all ranks' parts are committed."""

    loads_as = ""

    def open_to_load(self) -> None:
        self.open()

    config = "make_sync_checkpointer, dist_barrier; under DDP replicated=['model.*']"

    def open(self) -> None:
        import milepost
        from milepost.config import BarrierConfig, CheckpointWriterConfig

        config = milepost.CheckpointerConfig(
            writer_config=CheckpointWriterConfig(replicated=["model.*"]),
            barrier_config=BarrierConfig(barrier_type="dist_barrier"),
        )
        self.checkpointer = milepost.make_sync_checkpointer(config)

    def more_loads(self, state: Any) -> dict[str, Any]:
        return {"unverified": lambda: self.checkpointer.load(self.path(), state, verify=False)}

    verify = None  # type: ignore[assignment]


class RanksAsync(RanksMilepost, peers.Milepost):
    name, background, prepares, loads_as = "milepost", True, True, "milepost sync"
    config = "make_async_checkpointer, no barrier: the last rank commits; under DDP replicated=['model.*']"
    prepare = peers.Milepost.prepare
    write = peers.Milepost.write

    def open(self) -> None:
        import milepost
        from milepost.config import CheckpointWriterConfig

        writer = CheckpointWriterConfig(replicated=["model.*"])
        self.checkpointer = milepost.make_async_checkpointer(
            milepost.CheckpointerConfig(writer_config=writer)
        )
        self.checkpointer._process.process_creation_future.result()


RANK_PEERS = {
    peer.name: peer
    for peer in (RanksMilepost, RanksAsync, peers.DCP, peers.DCPAsync, peers.TorchCheckpointing)
}


class Rank(Trainer):
    """A rank of a job."""

    peers = RANK_PEERS

    def __init__(self, *args: Any) -> None:
        import torch.distributed as dist

        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        super().__init__(*args)

    def meet(self) -> None:
        import torch.distributed as dist

        dist.barrier()

    def step(self) -> None:
        self.workload.step(self.state)

    def plain(self, folder: str) -> dict[str, float]:
        """This rank's share of the bytes, copied, and as fast as the disk takes them."""
        import time

        values = tensors_of(self.state)
        targets = [torch.empty_like(value).copy_(value) for value in values]
        size = sum(value.nbytes for value in values)
        if not getattr(self.workload, "sharded", True):
            size //= self.world
        found = {}
        for name, work in (
            ("copy", lambda: torch._foreach_copy_(targets, values)),
            ("direct write", lambda: direct_write(os.path.join(folder, str(self.rank)), size, 16 * MIB)),
        ):
            self.meet()
            start = time.perf_counter()
            work()
            found[name] = time.perf_counter() - start
        return found


class Job:
    """Rank processes, with the methods of a Worker."""

    def __init__(self, world: int, *args: Any) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        common |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        self._ranks = [
            Worker(Rank, *args, environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(world)
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self._ranks:
            rank.kill()

    def call(self, name: str, *args: Any, limit: float = 900, watch: bool = False) -> Any:
        self.begin(name, *args)
        return self.end(limit=limit)

    def begin(self, name: str, *args: Any) -> None:
        for rank in self._ranks:
            rank.begin(name, *args)

    def end(self, *, limit: float = 900) -> Any:
        results = [rank.end(limit=limit) for rank in self._ranks]
        if not isinstance(results[0], dict):
            return results[0]
        keys = {key for result in results for key in result}
        values = {key: [result[key] for result in results if key in result] for key in keys}
        return {key: (sum if key in SUMS else max)(values[key]) for key in keys}


class RankCycle(Cycle):
    """A row: a library on several ranks."""

    def __init__(self, name: str, workload: Workload, folder: str, *, full: bool, world: int, other: int = 0):
        super().__init__(name, workload, folder, full=full, known=RANK_PEERS)
        self.world, self.other = world, other
        self.watched = True  # memory is measured with one rank

    def _build(self, world: int = 0) -> Any:
        job = Job(world or self.world, self.peer.name, self.workload)
        job.begin("built")
        return job

    def _loads(self, found: dict[str, float], saved: dict[int, int]) -> str:
        path = super()._loads(found, saved)
        if not self.other:
            return path
        with self._trainer(path, world=self.other) as job:
            for _ in range(3 if self.full else 2):  # saves, each after a step
                job.call("step")
            wanted = job.call("sample")
            found["warm, resharded"] = job.call("load", wanted, limit=self._left())["seconds"]
        return path


def plain_row(workload: Layers, folder: str, world: int) -> Row:
    def turn(limit: float) -> dict[str, float]:
        path = os.path.join(folder, "plain")
        shutil.rmtree(path, ignore_errors=True)
        os.mkdir(path)
        with Job(world, "DCP", workload) as job:
            found = job.call("plain", path, limit=limit)
        shutil.rmtree(path)
        return found

    return Row(
        "limits", turn, "a copy by each rank; O_DIRECT writes of 16 MiB by each rank into its own file"
    )


def group(kind: str, folder: str, *, world: int, small: bool) -> Group:
    """A table of 4 or 8 ranks, sharded (FSDP2) or alike (DDP)."""
    sharded = kind == "FSDP2"
    world = world // 2 if small else world
    names = [name for name in RANK_PEERS if not small or name.startswith("milepost") or name == "DCP"]
    layers = Layers(
        f"{kind}, {world} ranks", 2 if small else 32, 0, width=64 if small else 2048, sharded=sharded
    )
    reshard = world // 2 if sharded else 0

    def row(name: str, ranks: int = world, label: str = "") -> Row:
        other = reshard if "milepost" in name else 0
        made = RankCycle(name, layers, folder, full=not small, world=ranks, other=other).row()
        made.name = label or made.name
        return made

    rows = [plain_row(layers, folder, world), *(row(name) for name in names)]
    bars = []
    if sharded:
        bars.append(Bar("milepost sync", "warm, resharded", 1 / 0.7, "milepost sync", "warm"))
    else:
        rows = [one for one in rows if one.name != "torch_checkpointing"]
        rows.append(row("milepost sync", 1, "milepost sync, one process saves all"))
        bars.append(Bar("milepost sync", "bytes", 1.02 * layers.size))
    notes = f"{layers.count} linear layers of {layers.width:,}; gloo on loopback, one thread in each rank."
    if sharded:
        notes += " torch_checkpointing runs without its resharder, which needs CUDA."
    return Group(
        f"{kind}, {world} ranks on one machine", rows, notes, bars, layers.size, 180, "milepost sync"
    )
