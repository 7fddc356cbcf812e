"""Ranks in processes of their own that are killed, stall, disagree or come twice while they save.

This module is torch-free until a rank calls for it: the writers of background saves import it as well.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from typing import Any

import pytest
from support.processes import free_port
from support.ranks import KILLED, PATIENCE, WORLD, Gate, join

from milepost.errors import (
    AbortedError,
    CheckpointNotFoundError,
    CommitError,
    CommitTimeoutError,
    MilepostError,
    StateError,
)
from milepost.health.listing import scan
from milepost.health.verify import verify
from milepost.storage import default_storage
from milepost.testing import FaultyStorage

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the launcher adopts orphans as Linux can")


# -- what the ranks save, and how ----------------------------------------------------------------------


def full_state(step, rank=0, world=WORLD):
    """What a single process loads of step `step` of a job of `world` ranks, as rank `rank`."""
    import torch

    base = torch.arange(35, dtype=torch.float32).reshape(7, 5)
    return {
        "model": {"sharded": base + 1000 * step, "same": base.T.contiguous() - step, "plain": base[1] * step},
        "own": torch.full((3 + rank,), float(10 * step + rank)),
        "facts": {"step": step, "rank": rank, "world": world},
    }


def state_of(step, odd=""):
    """What this rank holds of it: shards and replicas as DTensors, a declared replica, values of its own.

    With `odd`, something is wrong on this rank alone.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    rank, world = dist.get_rank(), dist.get_world_size()
    state = full_state(step, rank, world)
    mesh = DeviceMesh("cpu", range(world))
    for key, placement in (("sharded", Shard(0)), ("same", Replicate())):
        full = state["model"][key]
        local = full.chunk(world)[rank].clone() if placement == Shard(0) else full.clone()
        state["model"][key] = DTensor.from_local(
            local, mesh, [placement], run_check=False, shape=full.shape, stride=full.stride()
        )
    model = state["model"]
    if odd == "bit":
        model["plain"].view(torch.int32)[2] ^= 1
    elif odd == "bit of a DTensor":
        model["same"]._local_tensor.view(torch.int32)[2, 3] ^= 1
    elif odd == "more":
        model["extra"] = model["same"]
        model["later"] = model["plain"].clone()
    elif odd == "shape":
        model["plain"] = model["plain"][:4].clone()
    elif odd == "dtype":
        model["plain"] = model["plain"].double()
    elif odd == "partial":
        model["same"] = DTensor.from_local(model["plain"], mesh, [Partial()], run_check=False)
    elif odd == "type":
        state["facts"]["lock"] = threading.Lock()
    return state


@dataclass
class Die:
    """Kills the process before an operation on the storage (or at the first one after it).

    ``trainer`` is for writers of background saves: the pid of their trainer, which dies first. ``tell`` is
    called before that.
    """

    operation: str
    name: str
    after: bool = False
    trainer: int = 0
    armed: bool = False
    tell: Any = None

    def __call__(self, operation, path):
        if self.armed or not self.operation:
            self.now()
        if operation == self.operation and os.path.basename(path) == self.name:
            if not self.after:
                self.now()
            self.armed = True

    def now(self):
        if self.tell:
            self.tell()
        if self.trainer not in (0, os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.trainer, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class Stop:
    """Stops at a gate before an operation on the storage, once."""

    operation: str
    name: str
    gate: Gate | None

    def __call__(self, operation, path):
        if self.gate is not None and operation == self.operation and os.path.basename(path) == self.name:
            gate, self.gate = self.gate, None
            gate.stop()


@dataclass
class Slow:
    """Takes its time for each operation on the storage."""

    seconds: float

    def __call__(self, operation, path):
        time.sleep(random.random() * 2 * self.seconds)


@dataclass
class Hook:
    """A commit hook that dies, or stops at a gate, in pre_commit."""

    die: Die | None = None
    gate: Gate | None = None

    def pre_commit(self, path, **_):
        if self.gate is not None:
            self.gate.stop()
        if self.die is not None:
            self.die.now()

    def post_commit(self, path, **_):
        pass


class AgentBarrier:
    """A barrier at the agent's store, which outlives every rank."""

    def __init__(self, rank, world):
        import torch.distributed as dist

        self.store, self.rank, self.world = dist.distributed_c10d._get_default_store(), rank, world

    def execute_barrier(self):
        self.store.set(f"here/{self.rank}", b"")
        self.store.wait([f"here/{rank}" for rank in range(self.world)])


@dataclass
class DyingBarrier:
    """A barrier in which a rank dies, or before which it stops at a gate."""

    inner: Any
    die: Die | None = None
    gate: Gate | None = None

    @property
    def store(self):
        return self.inner.store

    def execute_barrier(self):
        if self.gate is not None:
            self.gate.stop()
        if self.die is not None:
            self.die.now()
        self.inner.execute_barrier()


@dataclass
class Fault:
    """What happens to one process in a save.

    Attributes:
        phase: In which phase it is killed: one of PHASES; none if empty.
        stop: In which phase it stops at the gate: "write", "pre_commit" or "barrier".
        gate: The gate; a process that has not come there passes it at its end.
        after: A gate where it stops before its save.
        last: It begins to save when all others have returned.
        odd: What is wrong with its state; or "step", or "own", see `save`.
    """

    phase: str = ""
    stop: str = ""
    gate: Gate | None = None
    after: Gate | None = None
    last: bool = False
    odd: str = ""


PHASES = {
    "begin": ("", "", False),
    "write": ("finish", "checkpoint_{rank}.pt", False),
    "before its mark": ("rename", "index_{rank}.json", False),
    "after its mark": ("rename", "index_{rank}.json", True),
    "shard map": ("rename", "shards.json", False),
    "manifest": ("rename", "manifest.json", False),
    "publish": ("rename", "c", False),
    "clearing": ("rename", "c", True),
}


class Hurry:
    """The clock of a rank whose time limit is over as soon as all ranks wait, or have died or stopped."""

    def __init__(self, store, rank, world, limit):
        self.store, self.limit, self.skipped = store, limit, 0.0
        self.mine, self.all = f"waits/{rank}", [f"waits/{other}" for other in range(world)]

    def tell(self):
        self.store.set(self.mine, b"")

    def monotonic(self):
        return time.monotonic() + self.skipped

    def sleep(self, seconds):
        self.tell()
        if self.store.check(self.all):
            self.skipped += self.limit
        else:
            time.sleep(seconds)


SHORT = 1
"""How long ranks really wait in a barrier for one that never comes, in seconds."""


@dataclass
class Save:
    """How all ranks save.

    Attributes:
        path: Where.
        step: What.
        port: That of the TCP store's barrier; 0 for one at the agent's store, None for no barrier.
        background: With a writer process.
        timeout: For the others.
        faults: By the number of the process, which is its rank.
        stall: After how many seconds rank 0 is taken to stand still.
        dies: The trainer dies when it has staged.
        done: Where a process tells that it has returned.
        slow: Seconds that each operation on the storage takes longer.
        group: With a process group, and DTensors.
        hurry: With the clock `Hurry`. One rank must have a fault that keeps it from its mark.
    """

    path: str
    step: int
    port: int | None = None
    background: bool = False
    timeout: float = 60
    faults: dict[int, Fault] = field(default_factory=dict)
    stall: float | None = None
    dies: bool = False
    done: Gate | None = None
    slow: float = 0
    group: bool = True
    hurry: bool = False


def save(how):
    """One rank's save; what it raised, if it did."""
    import torch.distributed as dist

    number = int(os.environ["PROCESS"])
    fault = how.faults.get(number, Fault())
    if how.group:
        rank, world = join()
        state = state_of(how.step, fault.odd)
        store = dist.distributed_c10d._get_default_store()
    else:
        rank, world = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
        state = full_state(how.step, rank, world)
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    if fault.odd == "own":
        state["own"] += 0.5
    if fault.odd == "step":
        how.step += 1
    hurry = Hurry(store, rank, world, how.timeout) if how.hurry else None
    parts = parts_of(how, rank, world, fault, hurry)
    if fault.last:
        store.wait([f"done/{other}" for other in range(world) if other != rank])
    if fault.after is not None:
        fault.after.stop()

    def meet():
        if how.timeout < 60:  # only what a rank meets on purpose may keep it from being in time
            store.set(f"ready/{rank}", b"")
            store.wait([f"ready/{other}" for other in range(world)])

    error = (in_background if how.background else at_once)(how, rank, world, state, meet, *parts)
    store.set(f"done/{rank}", b"")
    for gate in (fault.gate, how.done):
        if gate is not None:
            gate.leave()
    return error


def parts_of(how, rank, world, fault, hurry):
    """The storage, the hook and the barrier of a rank with this fault."""
    from milepost.barriers import TCPStoreBarrier
    from milepost.commit import Clock, waiting
    from milepost.commit.by_rename import place

    if hurry is not None:
        clock = Clock(monotonic=hurry.monotonic, sleep=hurry.sleep)
        place.Clock = lambda: clock
        if fault.gate is not None:
            fault.gate.tell = hurry.tell
    if how.stall is not None:
        waiting.STALL_SECONDS, waiting.HEARTBEAT_SECONDS = how.stall, how.stall / 5
    die = None
    if fault.phase in PHASES:
        operation, name, after = PHASES[fault.phase]
        die = Die(operation, name.format(rank=rank), after)
    elif fault.phase:
        die = Die("", "")
    if die is not None:
        die.trainer = os.getpid()
        die.tell = hurry and hurry.tell
    storage = default_storage()
    if fault.phase in PHASES:
        storage = FaultyStorage(storage, before=die)
    elif fault.stop == "write":
        storage = FaultyStorage(storage, before=Stop("finish", f"checkpoint_{rank}.pt", fault.gate))
    elif how.slow:
        storage = FaultyStorage(storage, before=Slow(how.slow))
    hook = Hook(
        die=die if fault.phase == "pre_commit" else None,
        gate=fault.gate if fault.stop == "pre_commit" else None,
    )
    barrier = None
    if how.port is not None:
        inner = AgentBarrier(rank, world)
        if how.port:
            inner = TCPStoreBarrier(rank, world, "b", 60, True, how.port, "127.0.0.1", how.timeout)
        trainer = Die("", "") if fault.phase == "barrier" else None
        barrier = DyingBarrier(inner, trainer, fault.gate if fault.stop == "barrier" else None)
    return storage, hook, barrier


def writer_config(how):
    from milepost.config import CheckpointWriterConfig

    return CheckpointWriterConfig(write_barrier_timeout_secs=how.timeout, replicated=replicated(how))


def replicated(how):
    return ["model.plain" if how.group else "model.*"]


def at_once(how, rank, world, state, meet, storage, hook, barrier):
    from milepost import RankInfo
    from milepost.checkpoint_writer import CheckpointWriter

    writer = CheckpointWriter(writer_config(how), RankInfo(rank, world), barrier, hook, storage=storage)
    meet()
    try:
        writer.write(how.path, state, step=how.step)
    except Exception as error:
        traceback.print_exc()
        return error
    finally:
        writer.close()


def in_background(how, rank, world, state, meet, storage, hook, barrier):
    from milepost import RankInfo
    from milepost.checkpoint_process import CheckpointProcess, LeanWriter
    from milepost.checkpoint_reader import CheckpointReader
    from milepost.checkpointer import AsyncCheckpointer
    from milepost.config import AsyncConfig, CheckpointProcessConfig
    from milepost.staging import DefaultStager
    from milepost.state.encode import StateEncoder

    info = RankInfo(rank, world)

    def encoder():
        return StateEncoder(info, replicated(how))

    lean = LeanWriter(writer_config(how), barrier, hook, storage)
    process = CheckpointProcess(info, CheckpointProcessConfig(), lean=lean, encoder=encoder)
    checkpointer = AsyncCheckpointer(
        DefaultStager(encoder=encoder()),
        process,
        CheckpointReader(info),
        config=AsyncConfig(on_failure="raise"),
    )
    process.process_creation_future.result(PATIENCE)
    meet()
    error = None
    try:
        _, written = checkpointer.save(how.path, state, step=how.step)
        if how.dies:
            os.kill(os.getpid(), signal.SIGKILL)
        error = written.exception(PATIENCE)
    except Exception as raised:
        error = raised
    with contextlib.suppress(Exception):
        checkpointer.close()
    return error


def resume(path, expected, step):
    """One rank of another job: load what is expected into a template, then save, and load that."""
    import torch
    import torch.distributed as dist
    from support.states import differences

    from milepost import CheckpointerConfig, make_sync_checkpointer

    config = CheckpointerConfig()
    config.writer_config.replicated = ["model.plain"]
    config.writer_config.write_barrier_timeout_secs = 60
    config.barrier_config.barrier_type = "dist_barrier"
    with make_sync_checkpointer(config) as checkpointer:
        for number in (expected, step):
            template = state_of(0)
            with torch.no_grad():
                if number is None:
                    with pytest.raises(CheckpointNotFoundError):
                        checkpointer.load(path, template)
                else:
                    checkpointer.load(path, template, strict=True)
                    found = differences(template, state_of(number))
                    if found:
                        return found
            if number is not step:
                dist.barrier()
                checkpointer.save(path, state_of(step), step=step)
    return []


# -- judgement -------------------------------------------------------------------------------------------


def listed(path, saved, world=WORLD):
    """The step that loads at a path, and that `milepost ls` calls committed; None if there is none.

    Everything that it calls committed is whole, verified, and one of the states that were saved.
    """
    from support.states import differences

    from milepost import RankInfo
    from milepost.checkpoint_reader import CheckpointReader

    folder, name = os.path.split(path)
    entries = [entry for entry in scan(default_storage(), folder) if entry.name == name]
    assert all(entry.state != "damaged" for entry in entries), entries
    steps = {entry.step for entry in entries if entry.state == "committed"}
    assert steps <= set(saved), f"{steps} are listed, {saved} were saved"
    reader = CheckpointReader(RankInfo(0, 1))
    if not steps:
        with pytest.raises(CheckpointNotFoundError):
            reader.read(path)
        return None
    report = verify(default_storage(), path)
    assert not report.problems, report.problems
    loaded, _ = reader.read(path)
    step = loaded["facts"]["step"]
    assert step in steps, f"{step} is loaded, {steps} are listed"
    assert differences(loaded, full_state(step, world=world)) == []
    return step


def check_recovery(launcher, path, expected, step):
    """Another job of the same size loads what is expected and saves; nothing else is left."""
    assert launcher.ask(resume, path, expected, step) == [[]] * WORLD
    assert listed(path, {step}) == step
    parent, name = os.path.split(path)
    assert os.listdir(parent) == [name]


@pytest.fixture
def path(quick_path):
    """Where checkpoints are saved, in a folder of its own."""
    os.mkdir(f"{quick_path}/run")
    return f"{quick_path}/run/c"


@pytest.fixture(scope="module")
def first(launcher, tmp_path_factory):
    """A checkpoint of step 1."""
    folder = str(tmp_path_factory.mktemp("first"))
    # From now on there are ranks that resume, for all tests.
    assert launcher.ask(resume, f"{folder}/resumed/c", None, 1) == [[]] * WORLD
    os.mkdir(f"{folder}/run")
    assert launcher.run(folder, save, Save(f"{folder}/run/c", 1)) == [None] * WORLD
    assert listed(f"{folder}/run/c", {1}) == 1
    return f"{folder}/run/c"


@pytest.fixture
def before(first, path):
    """There is a checkpoint of step 1 already."""
    shutil.copytree(first, path)


RANKS = [0, 1, 2]


@pytest.mark.parametrize("victim", RANKS)
@pytest.mark.parametrize("phase", ["begin", "write", "pre_commit", "before its mark"])
def test_a_rank_killed_before_its_mark_leaves_the_old_checkpoint(
    launcher, quick_path, path, before, phase, victim
):
    """Without a barrier, a rank that dies before its mark keeps the new one away; the old one loads."""
    outcomes = launcher.run(quick_path, save, Save(path, 2, faults={victim: Fault(phase)}))
    assert outcomes == [KILLED if rank == victim else None for rank in RANKS]
    assert listed(path, {1, 2}) == 1
    check_recovery(launcher, path, 1, 3)


@pytest.mark.parametrize("victim", RANKS)
@pytest.mark.parametrize("phase", ["after its mark", "shard map", "manifest", "publish", "clearing"])
def test_the_last_rank_killed_after_its_mark_leaves_the_new_one(
    launcher, quick_path, path, before, phase, victim
):
    """Without a barrier, when the rank that completes the marks dies after its own, the new one loads."""
    outcomes = launcher.run(quick_path, save, Save(path, 2, faults={victim: Fault(phase, last=True)}))
    assert outcomes == [KILLED if rank == victim else None for rank in RANKS]
    assert listed(path, {1, 2}) == 2
    check_recovery(launcher, path, 2, 3)


def is_told(outcome):
    """Whether a rank that waited for a dead one was told so, or saw the commit all the same.

    Rank 0 serves the barrier's store: when it has gone, the others hear that from torch.
    """
    return outcome is None or isinstance(outcome, MilepostError | RuntimeError)


@pytest.mark.parametrize("victim", RANKS)
@pytest.mark.parametrize("phase", ["begin", "write", "pre_commit", "before its mark"])
def test_with_a_barrier_a_rank_killed_before_its_mark_is_named(
    launcher, quick_path, path, before, phase, victim
):
    """With a barrier, the ranks that wait for one that died before its mark name it and its last phase."""
    how = Save(path, 2, port=free_port(), hurry=True, faults={victim: Fault(phase)})
    outcomes = launcher.run(quick_path, save, how)
    assert outcomes[victim] == KILLED
    last = {"begin": "never began", "before its mark": "commit"}.get(phase, phase)
    for rank in RANKS:
        if rank != victim:
            assert isinstance(outcomes[rank], CommitTimeoutError | AbortedError), outcomes[rank]
            assert f"rank {victim}: {last}" in str(outcomes[rank])
    assert listed(path, {1, 2}) == 1
    check_recovery(launcher, path, 1, 3)


@pytest.mark.parametrize("victim", RANKS)
@pytest.mark.parametrize("phase", ["after its mark", "barrier"])
def test_with_a_barrier_a_rank_killed_after_its_mark_leaves_one_of_both(
    launcher, quick_path, path, before, phase, victim
):
    """With a barrier, when a rank dies after its mark, the new one loads if a rank returned, else the old."""
    how = Save(path, 2, port=free_port(), timeout=SHORT, faults={victim: Fault(phase)})
    outcomes = launcher.run(quick_path, save, how)
    assert outcomes[victim] == KILLED
    others = [outcome for outcome in outcomes if outcome != KILLED]
    assert all(map(is_told, others)), others
    found = listed(path, {1, 2})
    assert found == (2 if None in others else 1)
    check_recovery(launcher, path, found, 3)


@pytest.mark.parametrize("phase", ["shard map", "manifest", "publish"])
def test_when_rank_0_dies_as_it_commits_the_others_commit(launcher, quick_path, path, before, phase):
    """With a barrier, when rank 0 dies behind it, the others see it stand still, and commit themselves."""
    how = Save(path, 2, port=0, faults={0: Fault(phase)}, stall=0.3)
    outcomes = launcher.run(quick_path, save, how)
    assert listed(path, {1, 2}) == 2
    assert outcomes == [KILLED, None, None]
    check_recovery(launcher, path, 2, 3)


@pytest.mark.parametrize("victim", RANKS)
def test_a_rank_killed_while_it_waits_in_the_barrier(launcher, quick_path, path, before, victim):
    """A rank that is killed in the barrier, where it waits for another, has arrived: one of both loads."""
    late = (victim + 1) % WORLD
    with Gate(quick_path) as gate:
        faults = {late: Fault(stop="barrier", gate=gate)}
        # Longer than a busy machine takes to bring all ranks there, as the victim waits already.
        how = Save(path, 2, port=free_port(), timeout=3 * SHORT, faults=faults, stall=0.3)
        job = launcher.start(quick_path, save, how)
        gate.wait()
        job.kill(victim)
        gate.open()
        outcomes = job.wait()
    assert outcomes[victim] == KILLED
    others = [outcome for outcome in outcomes if outcome != KILLED]
    assert all(map(is_told, others)), others
    found = listed(path, {1, 2})
    assert found == (2 if None in others else 1)
    check_recovery(launcher, path, found, 3)


# -- background saves ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phase", "victim", "barrier"),
    [
        ("begin", 1, False),
        ("write", 0, False),
        ("before its mark", 2, False),
        ("write", 2, True),
        ("pre_commit", 0, True),
        ("before its mark", 1, True),
    ],
)
def test_a_trainer_killed_with_its_writer_before_the_mark(
    launcher, quick_path, path, before, barrier, phase, victim
):
    """A background save whose trainer and writer die on a rank before its mark leaves the old checkpoint."""
    port = free_port() if barrier else None
    how = Save(path, 2, port, background=True, timeout=SHORT, faults={victim: Fault(phase)})
    outcomes = launcher.run(quick_path, save, how)
    assert outcomes[victim] == KILLED
    others = [outcome for outcome in outcomes if outcome != KILLED]
    if barrier:
        assert all(isinstance(outcome, MilepostError) for outcome in others), others
    else:
        assert others == [None, None]
    assert listed(path, {1, 2}) == 1
    check_recovery(launcher, path, 1, 3)


@pytest.mark.parametrize("phase", ["after its mark", "shard map", "manifest", "publish"])
def test_the_last_trainer_killed_with_its_writer_after_its_mark(launcher, quick_path, path, before, phase):
    """When the writer that completes the marks of a background save dies after its own, the new one loads."""
    how = Save(path, 2, background=True, faults={1: Fault(phase, last=True)})
    assert launcher.run(quick_path, save, how) == [None, KILLED, None]
    assert listed(path, {1, 2}) == 2
    check_recovery(launcher, path, 2, 3)


def test_writers_whose_trainers_die_in_the_barrier_commit(launcher, quick_path, path, before):
    """All trainers die while their writers, which have all arrived, wait for them: the marks alone decide."""
    faults = {rank: Fault("barrier") for rank in RANKS}
    how = Save(path, 2, free_port(), background=True, timeout=15, faults=faults)
    assert launcher.run(quick_path, save, how) == [KILLED] * WORLD
    assert listed(path, {1, 2}) == 2
    check_recovery(launcher, path, 2, 3)


@pytest.mark.parametrize("barrier", [False, True], ids=["marks", "barrier"])
def test_writers_finish_without_trainers(launcher, quick_path, path, before, barrier):
    """All trainers die when their saves are staged, before any mark: the writers commit, and end at once."""
    with Gate(quick_path) as gate:
        faults = {rank: Fault(stop="pre_commit", gate=gate) for rank in RANKS}
        port = free_port() if barrier else None
        how = Save(path, 2, port, background=True, timeout=15, faults=faults, dies=True)
        job = launcher.start(quick_path, save, how)
        gate.wait(WORLD)
        gate.open(WORLD)
        opened = time.monotonic()
        assert job.wait() == [KILLED] * WORLD
        seconds = time.monotonic() - opened
    assert listed(path, {1, 2}) == 2
    check_recovery(launcher, path, 2, 3)
    assert seconds < 10, "a writer has waited for what had happened already"


# -- ranks that disagree ---------------------------------------------------------------------------------


def check_refused(launcher, folder, path, how, told):
    """The save fails on every rank that waits, with an error that tells all this; the next one works."""
    outcomes = launcher.run(folder, save, how)
    waited = [outcome for outcome in outcomes if outcome is not None]
    assert len(waited) == (WORLD if how.port is not None else 1), outcomes
    for outcome in waited:
        assert isinstance(outcome, CommitError), outcome
        for text in told:
            assert text in str(outcome)
    assert sum(not isinstance(outcome, AbortedError) for outcome in waited) == 1
    assert listed(path, {1}) == 1
    check_recovery(launcher, path, 1, 3)


ODD = {
    "step": ["step", "rank 1 has 3", "expected 2"],
    "more": ["model.extra", "rank 1 has", "rank 0 has not"],
    "shape": ["model.plain", "[5]", "[4]", "rank 0", "rank 1"],
    "dtype": ["model.plain", "float32", "float64", "rank 0", "rank 1"],
    "bit": ["tensors differ", "model.plain (ranks 0, 2 vs. rank 1)"],
    "bit of a DTensor": ["tensors differ", "model.same (ranks 0, 2 vs. rank 1)"],
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("port", [None, 0], ids=["marks", "barrier"])
def test_ranks_that_disagree_do_not_commit(launcher, quick_path, path, before, odd, port):
    """Ranks that differ in step, structure or one bit of a replica are told so, with key and ranks."""
    faults = {1: Fault(odd=odd), 2: Fault(last=port is None)}
    check_refused(launcher, quick_path, path, Save(path, 2, port, faults=faults), ODD[odd])


@pytest.mark.parametrize("odd", ["more", "bit"])
def test_ranks_that_disagree_in_the_background_do_not_commit(launcher, quick_path, path, before, odd):
    """Background saves with a barrier tell ranks that disagree on every rank's future."""
    how = Save(path, 2, free_port(), background=True, faults={1: Fault(odd=odd)})
    check_refused(launcher, quick_path, path, how, ODD[odd])


@pytest.mark.parametrize("odd", ["partial", "type"])
@pytest.mark.parametrize("background", [False, True], ids=["sync", "async"])
def test_a_state_that_cannot_be_saved_stops_all_ranks_at_once(
    launcher, quick_path, path, before, odd, background
):
    """With a barrier, a rank whose state cannot be saved tells the others, who do not wait for it."""
    how = Save(path, 2, free_port(), background=background, timeout=60, faults={1: Fault(odd=odd)})
    key = {"partial": "model.same", "type": "facts.lock"}[odd]
    started = time.monotonic()
    outcomes = launcher.run(quick_path, save, how)
    assert time.monotonic() - started < 40
    assert isinstance(outcomes[1], StateError)
    assert outcomes[1].key == key
    for rank in (0, 2):
        assert isinstance(outcomes[rank], AbortedError), outcomes[rank]
        assert "rank 1 failed" in str(outcomes[rank])
        assert type(outcomes[1]).__name__ in str(outcomes[rank])
        assert f"(key {key})" in str(outcomes[rank])
    assert listed(path, {1}) == 1
    check_recovery(launcher, path, 1, 3)


def test_a_state_that_cannot_be_saved_is_never_committed(launcher, quick_path, path, before):
    """Without a barrier, ranks that are through before one fails return, and nothing is committed."""
    how = Save(path, 2, faults={1: Fault(odd="partial", last=True)})
    outcomes = launcher.run(quick_path, save, how)
    assert [type(outcome) for outcome in outcomes] == [type(None), StateError, type(None)]
    assert listed(path, {1}) == 1
    check_recovery(launcher, path, 1, 3)


# -- attempts that meet ------------------------------------------------------------------------------------


def test_marks_of_former_starts_are_never_mixed_in(launcher, quick_path, path, before):
    """Marks of two starts that would make a full set together never commit; the next start's do."""
    for victim, step in ((2, 2), (0, 3)):
        how = Save(path, step, faults={victim: Fault("begin")})
        outcomes = launcher.run(quick_path, save, how)
        assert outcomes == [KILLED if rank == victim else None for rank in RANKS]
        assert listed(path, {1}) == 1
    check_recovery(launcher, path, 1, 4)


def test_a_start_id_that_is_not_new_is_refused(launcher, quick_path, path, before):
    """Ranks that find their marks of a former start under the same id say so, and nothing is committed."""
    same = {"TORCHELASTIC_RESTART_COUNT": "same"}
    killed = launcher.run(quick_path, save, Save(path, 2, faults={2: Fault("begin")}), **same)
    assert killed == [None, None, KILLED]
    again = launcher.run(quick_path, save, Save(path, 2, faults={2: Fault(last=True)}), **same)
    for rank in (0, 1):
        assert isinstance(again[rank], CommitError)
    assert "start id of this job is not new" in f"{again[0]} {again[1]}"
    assert isinstance(again[2], AbortedError)
    assert listed(path, {1}) == 1
    check_recovery(launcher, path, 1, 3)


def test_a_rank_that_is_started_twice_never_makes_a_mixed_checkpoint(launcher, quick_path, path, before):
    """Two processes of one rank: one is refused, and what is committed is whole, of one of them."""
    with Gate(quick_path, "a") as first, Gate(quick_path, "b") as start, Gate(quick_path, "c") as second:
        faults = {
            1: Fault(stop="pre_commit", gate=first),
            3: Fault(stop="pre_commit", gate=second, after=start, odd="own"),
        }
        how = Save(path, 2, faults=faults, group=False)
        job = launcher.start(quick_path, save, how, ranks=[0, 1, 2, 1])
        first.wait()  # it has written its data
        start.wait()
        start.open()
        second.wait()  # the other one has written its own as well, or was refused
        first.open()
        second.open()
        outcomes = job.wait()
    assert any(isinstance(outcome, CommitError) for outcome in (outcomes[1], outcomes[3])), outcomes
    assert listed(path, {1, 2}) in {1, 2}
    check_recovery(launcher, path, listed(path, {1, 2}), 3)


# -- ranks that are slow -------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", RANKS)
@pytest.mark.parametrize("phase", ["write", "pre_commit"])
def test_a_rank_that_stalls_is_named(launcher, quick_path, path, before, victim, phase):
    """The others do not hang: their CommitTimeoutError names the rank that stalls and its last phase."""
    with Gate(quick_path) as gate, Gate(quick_path, "done") as done:
        faults = {victim: Fault(stop=phase, gate=gate)}
        how = Save(path, 2, 0, hurry=True, faults=faults, done=done)
        job = launcher.start(quick_path, save, how)
        gate.wait()
        done.wait(WORLD - 1)
        gate.open()
        outcomes = job.wait()
    for rank in RANKS:
        if rank == victim:
            assert isinstance(outcomes[rank], AbortedError), outcomes[rank]
        else:
            assert isinstance(outcomes[rank], CommitTimeoutError | AbortedError), outcomes[rank]
            assert f"ranks {victim} did not arrive" in str(outcomes[rank])
            assert f"rank {victim}: {phase}" in str(outcomes[rank])
    assert listed(path, {1}) == 1
    check_recovery(launcher, path, 1, 3)


@pytest.mark.parametrize("port", [None, 0], ids=["marks", "barrier"])
def test_a_slow_shared_folder_only_takes_longer(launcher, quick_path, path, before, port):
    """Where every operation on the storage takes its time, a save commits all the same."""
    assert launcher.run(quick_path, save, Save(path, 2, port, slow=0.01)) == [None] * WORLD
    check_recovery(launcher, path, 2, 3)
