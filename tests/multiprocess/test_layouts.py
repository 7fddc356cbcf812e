"""Training under real parallelism that is saved in one layout and goes on in others, bit for bit.

Each job is a process for each rank, with gloo, see `support.ranks`. A saving rank also keeps, in
a file of its own, the full tensors of what it saved; loading ranks compare with that.
"""

from __future__ import annotations

import sys
import traceback
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import pytest
import torch
import torch.distributed as dist
from support.processes import free_port
from support.saves import data_file
from support.states import differences
from torch import nn

from milepost.config import BarrierConfig, CheckpointerConfig, CheckpointWriterConfig

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the launcher adopts orphans as Linux can")


# -- what is trained ---------------------------------------------------------------------------------------


class Net(nn.Module):
    """A little of everything: `head` leaves most ranks without a shard, and `batch` counts on each rank."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 10)
        self.up = nn.Linear(10, 14)
        self.down = nn.Linear(14, 10)
        self.norm = nn.LayerNorm(10)
        self.batch = nn.BatchNorm1d(10)
        self.head = nn.Linear(10, 1)
        self.frozen = nn.Linear(10, 3).requires_grad_(False)

    def forward(self, tokens):
        hidden = self.embed(tokens)
        hidden = self.norm(hidden + self.down(torch.relu(self.up(hidden))))
        hidden = self.batch(hidden)
        return (self.head(hidden) ** 2).sum() + self.frozen(hidden).sin().sum()


class Training:
    """The net in a layout, and its optimizer.

    Attributes:
        lane: Which of the batches are this rank's: ranks that share one by tensor parallelism have the same.
    """

    def __init__(self, layout, seed):
        torch.manual_seed(seed)
        net = Net()
        rank, world = place(layout)
        self.lane, self.wrapped = rank, net
        if layout == "fsdp":
            self._shard(net, mesh_of(world))
        elif layout == "hsdp":
            self._shard(net, mesh_of(2, world // 2, names=("copies", "shards")))
        elif layout == "fsdp on tp":
            mesh = mesh_of(world // 2, 2, names=("data", "tensor"))
            self._divide(net, mesh["tensor"], rows=True)
            self._shard(net, mesh["data"])
            self.lane = mesh["data"].get_local_rank()
        elif layout == "tp":
            self._divide(net, mesh_of(world, names=("tensor",)), rows=False)
            self.lane = 0
        elif layout == "ddp":
            self.wrapped = nn.parallel.DistributedDataParallel(net)
        else:
            assert layout == "plain"
        self.net = net
        first = {name for name, _ in net.named_parameters() if name.startswith(("up", "head"))}
        groups = [
            {"params": [p for name, p in net.named_parameters() if name in first], "lr": 1e-2},
            {
                "params": [p for name, p in net.named_parameters() if name not in first and p.requires_grad],
                "lr": 3e-3,
                "weight_decay": 0.1,
            },
        ]
        self.optimizer = torch.optim.Adam(groups)

    @staticmethod
    def _shard(net, mesh):
        from torch.distributed.fsdp import fully_shard

        for module in (net.embed, net.up, net.down):
            fully_shard(module, mesh=mesh)
        fully_shard(net, mesh=mesh)

    @staticmethod
    def _divide(net, mesh, *, rows):
        """Tensor parallelism; with `rows`, also of the embedding, whose rows are an odd number."""
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        if rows:
            plan["embed"] = RowwiseParallel()
        parallelize_module(net, mesh, plan)

    def step(self, number):
        """Train on this rank's batch of this number."""
        generator = torch.Generator().manual_seed(100 * number + self.lane)
        loss = self.wrapped(torch.randint(0, 11, (6,), generator=generator))
        assert loss.isfinite()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self, flavour, step):
        """The state dict of all, of torch.distributed.checkpoint ("dcp") or the modules' own ("native")."""
        from torch.distributed.checkpoint.state_dict import get_state_dict

        if flavour == "dcp":
            model, optimizer = get_state_dict(self.wrapped, self.optimizer)
        else:
            model, optimizer = self.net.state_dict(), self.optimizer.state_dict()
        return {"model": model, "optimizer": optimizer, "step": step}

    def restore(self, flavour, state):
        """Put a state dict into the net and the optimizer."""
        from torch.distributed.checkpoint.state_dict import set_state_dict

        model, optimizer = state["model"], state["optimizer"]
        if flavour == "dcp":
            set_state_dict(self.wrapped, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)
        else:
            self.net.load_state_dict(model)
            self.optimizer.load_state_dict(optimizer)


def mesh_of(*shape, names=None):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def whole(value):
    """A copy of a state dict with full tensors and plain dicts. All ranks have to call it."""
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(whole(item) for item in value)
    if isinstance(value, torch.Tensor):
        return (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
    return value


# -- what the ranks do -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Saved:
    """A checkpoint and how it is made.

    Attributes:
        layout: How the net is distributed; "plain" is one process without torch.distributed.
        world: Over how many ranks.
        flavour: What the state dict is made of, see `Training.state`.
        background: With an async checkpointer.
        barrier: Type of the barrier.
        replicated: What is declared; "module" stands for the DDP module.
        path: Where it is.
        port: That of the barrier's store.
    """

    layout: str
    world: int
    flavour: str
    background: bool = False
    barrier: str | None = None
    replicated: tuple[str, ...] = ()
    path: str = ""
    port: int = 0

    def kept(self, rank, when):
        """Where a rank keeps the full tensors of what it had when it saved, or a step later."""
        return f"{self.path}.{when}.{rank}"


LAST = 2
"""The number of the step that is saved."""


def work(save, loads):
    """One rank of a job: make a checkpoint, then load some, each into some layout; returns what is wrong."""
    try:
        if save is not None:
            save_one(save)
        found = [f"into {layout}: {text}" for saved, layout in loads for text in load_one(saved, layout)]
        if dist.is_initialized():
            dist.barrier()  # no rank may end while others need it
            dist.destroy_process_group()
    except Exception:
        return [traceback.format_exc()]
    return found


def place(layout):
    """This rank and how many there are, in the default process group if the layout needs one."""
    if layout == "plain":
        assert not dist.is_initialized(), "what needs no process group comes first in a job"
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()


def save_one(how):
    """Train, save, and train on, with the save in the background under way if there is one."""
    import milepost

    rank, world = place(how.layout)
    training = Training(how.layout, seed=0)
    torch.manual_seed(0)
    fresh = whole(Net().state_dict())
    assert not differences(whole(training.net.state_dict()), fresh), "this torch's full tensors are not right"
    for number in range(1, LAST + 1):
        training.step(number)
    for group in training.optimizer.param_groups:
        group["lr"] /= 4
    replicated = [training.wrapped if item == "module" else item for item in how.replicated]
    config = CheckpointerConfig(
        writer_config=CheckpointWriterConfig(replicated=replicated, write_barrier_timeout_secs=60)
    )
    if how.barrier == "tcp_store":
        arguments = {
            "global_rank": rank,
            "global_world_size": world,
            "barrier_prefix": "b",
            "timeout_barrier_init_secs": 60,
            "use_checkpoint_barrier_tcpstore_libuv": True,
            "tcpstore_port": how.port,
            "master_address": "127.0.0.1",
            "timeout_secs": 60,
        }
        config.barrier_config = BarrierConfig("tcp_store", arguments)
    elif how.barrier is not None:
        config.barrier_config = BarrierConfig(how.barrier)
    make = milepost.make_async_checkpointer if how.background else milepost.make_sync_checkpointer
    state = training.state(how.flavour, LAST)
    torch.save(whole(state), how.kept(rank, "saved"))
    with make(config) as checkpointer:
        futures = checkpointer.save(how.path, state, step=LAST) or ()
        training.step(LAST + 1)
        for future in futures:
            future.result()
    torch.save(whole(training.state(how.flavour, LAST + 1)), how.kept(rank, "next"))
    if dist.is_initialized():
        dist.barrier()  # without a barrier of its own, a save returns before others have committed


def load_one(saved, layout):
    """Load into a net that has other values, and train on; returns the differences."""
    import milepost

    rank, world = place(layout)
    training = Training(layout, seed=7)
    if saved.flavour == "native":  # an optimizer has no state of its own before its first step
        training.step(7)
    kept = torch.load(saved.kept(rank % saved.world, "saved"))
    state = training.state(saved.flavour, 0)
    with milepost.make_sync_checkpointer() as checkpointer:
        loaded = checkpointer.load(saved.path, state, strict=True)
        found = differences(whole(loaded), kept, "template")
        if saved.flavour == "native":
            found += differences(whole(training.net.state_dict()), kept["model"], "in place")
        if layout == "plain":
            found += differences(whole(checkpointer.load(saved.path)), kept, "no template")
    training.restore(saved.flavour, loaded)
    found += differences(whole(training.state(saved.flavour, LAST)), kept, "restored")
    training.step(LAST + 1)
    if (layout, world) == (saved.layout, saved.world):
        after = whole(training.state(saved.flavour, LAST + 1))
        found += differences(after, torch.load(saved.kept(rank, "next")), "a step later")
    elif torch.equal(whole(training.net.up.weight), kept["model"]["up.weight"]):
        found.append("the next step changed nothing")
    return found


# -- tests ---------------------------------------------------------------------------------------------------


def leaves(value, path=""):
    """The tensors of a state dict by key."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {key: tensor for name, item in items for key, tensor in leaves(item, f"{path}/{name}").items()}


def check_copies(saved, times):
    """Each tensor is in the files of all ranks together as often as the first pattern says that fits its key.

    Without one, it is there once, in parts or not.
    """
    files = [leaves(torch.load(data_file(saved.path, rank))) for rank in range(saved.world)]
    for key, tensor in leaves(torch.load(saved.kept(0, "saved"))).items():
        expected = next((count for pattern, count in times.items() if fnmatchcase(key, pattern)), 1)
        found = sum(file[key].numel() for file in files)
        assert found == expected * tensor.numel(), f"{key}: {found} elements"


PARAMETERS = ("model.*.weight", "model.*.bias")
STEPS = "/optimizer/*/step"
COUNTS = "/model/batch.[rn]*"
"""The buffers, which differ between ranks that train on different batches."""

UNABLE = ("FSDP+TP sharding does not support uneven sharding", "Cannot use ReduceOp.AVG with Gloo")
"""What torch 2.7 says of layouts that later versions have."""

CASES = [
    (
        Saved("fsdp", 4, "dcp", barrier="tcp_store"),
        {4: ["fsdp", "hsdp"], 2: ["fsdp on tp"], 1: ["plain"]},
        {COUNTS: 4, STEPS: 4},
    ),
    (
        Saved("hsdp", 4, "native", background=True, replicated=("optimizer.state*.step",)),
        {4: ["hsdp", "fsdp on tp"], 2: ["ddp"], 1: ["plain"]},
        {COUNTS: 4},
    ),
    (  # what only the data dimension divides, each of its slices saves
        Saved("fsdp on tp", 4, "dcp", background=True, barrier="tcp_store"),
        {4: ["fsdp on tp"], 2: ["fsdp"], 1: ["plain", "fsdp"]},
        {COUNTS: 4, STEPS: 4, "*/embed.*": 1, "*/up.*": 1, "*/down.*": 1, "*": 2},
    ),
    (
        Saved("fsdp on tp", 4, "native", replicated=(*PARAMETERS, "optimizer.*")),
        {4: ["fsdp on tp"], 2: ["tp"]},
        {COUNTS: 4},
    ),
    (
        Saved("tp", 2, "dcp", barrier="dist_barrier", replicated=("model.*", "optimizer.*")),
        {2: ["tp", "ddp"], 4: ["hsdp"], 1: ["plain"]},
        {},
    ),
    (
        Saved("ddp", 4, "native", barrier="dist_barrier", replicated=("module", "optimizer.*")),
        {4: ["ddp"], 2: ["fsdp"], 1: ["plain"]},
        {COUNTS: 4},
    ),
    (
        Saved("ddp", 2, "dcp", background=True, barrier="tcp_store", replicated=(*PARAMETERS, "optimizer.*")),
        {2: ["ddp"], 4: ["fsdp on tp"]},
        {COUNTS: 2},
    ),
    (
        Saved("plain", 1, "dcp", background=True),
        {1: ["plain", "fsdp"], 2: ["tp"], 3: ["fsdp"]},
        {},
    ),
]


@pytest.mark.parametrize(
    ("saved", "layouts", "times"),
    CASES,
    ids=[f"{saved.layout} {saved.world} {saved.flavour}" for saved, _, _ in CASES],
)
def test_what_is_saved_in_one_layout_goes_on_in_others(launcher, tmp_path, saved, layouts, times):
    """Each layout, on as many ranks or not, loads the very bits that another one saved, and trains on."""
    saved = replace(saved, path=f"{tmp_path}/c", port=free_port())
    for world, names in layouts.items():
        save = saved if world == saved.world else None
        outcomes = launcher.run(tmp_path, work, save, [(saved, layout) for layout in names], world=world)
        told = [f"rank {rank} of {world}: {text}" for rank, texts in enumerate(outcomes) for text in texts]
        unable = [
            line for text in told for line in text.splitlines() if any(words in line for words in UNABLE)
        ]
        if unable:
            pytest.skip(f"torch {torch.__version__} cannot train in this layout: {unable[0]}")
        assert outcomes == [[]] * world, "\n".join(told[:20])
    check_copies(saved, times)
    if COUNTS in times:
        first, last = (torch.load(saved.kept(rank, "saved"))["model"] for rank in (0, saved.world - 1))
        assert not torch.equal(first["batch.running_mean"], last["batch.running_mean"])
