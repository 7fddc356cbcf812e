"""Several ranks: threads and processes that save together, with and without a barrier."""

from __future__ import annotations

import os
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.processes import free_port, in_child, together
from support.saves import manifest_of
from support.states import assert_same

from milepost import make_sync_checkpointer
from milepost.barriers import TCPStoreBarrier
from milepost.checkpoint_reader import CheckpointReader
from milepost.checkpoint_writer import CheckpointWriter, CheckpointWriterConfig, WriterHook
from milepost.errors import AbortedError, CheckpointNotFoundError, CommitTimeoutError
from milepost.types import RankInfo

WORLD = 3


def state_of(rank, step=0):
    return {"w": torch.full((1000,), float(rank + 10 * step)), "rank": rank, "step": step}


class Log(WriterHook):
    def __init__(self, fail=False):
        self.calls, self.fail = [], fail

    def pre_commit(self, path, **kwargs):
        self.calls.append("pre")
        if self.fail:
            raise OSError("this rank is broken")

    def post_commit(self, path, **kwargs):
        loaded = CheckpointReader(RankInfo(0, WORLD)).read(path)[0]
        self.calls.append("post" if loaded["step"] == kwargs["step"] else "post too early")


class Meeting:
    """A barrier for threads."""

    def __init__(self):
        self.barrier, self.calls = threading.Barrier(WORLD, timeout=60), 0

    def execute_barrier(self):
        self.calls += 1
        self.barrier.wait()


@pytest.fixture
def ranks():
    """Makes the writers of all ranks, and their hooks; they are closed at the end."""
    made = []

    def make(barrier=None, timeout=60):
        config = CheckpointWriterConfig(write_barrier_timeout_secs=timeout)
        logs = [Log() for _ in range(WORLD)]
        made.extend(
            CheckpointWriter(config, RankInfo(rank, WORLD), barrier, log) for rank, log in enumerate(logs)
        )
        return made, logs

    yield make
    for writer in made:
        writer.close()


def load(path, rank, world=WORLD):
    return CheckpointReader(RankInfo(rank, world)).read(str(path))[0]


def all_at_once(writers, path, step=0):
    """Each rank writes in a thread of its own; returns their errors."""

    def work(rank):
        try:
            writers[rank].write(str(path), state_of(rank, step), step=step)
        except Exception as error:
            return error

    with ThreadPoolExecutor(WORLD) as pool:
        return [*pool.map(work, range(WORLD))]


def test_without_a_barrier_the_last_rank_commits(tmp_path, ranks):
    """Without a barrier each rank does its part and returns; the one that completes the set commits it."""
    writers, logs = ranks()
    path = tmp_path / "c"
    for rank in (2, 0):
        writers[rank].write(str(path), state_of(rank), step=0)
        assert not path.exists()
        with pytest.raises(CheckpointNotFoundError):
            load(path, rank)
    writers[1].write(str(path), state_of(1), step=0)
    for rank in range(WORLD):
        assert_same(state_of(rank), load(path, rank))
        assert_same(state_of(rank), torch.load(path / f"checkpoint_{rank}.pt"))
    hooks = [log.calls for log in logs]
    assert hooks == [["pre"], ["pre", "post"], ["pre"]]
    assert manifest_of(path).world_size == WORLD
    assert sorted(os.listdir(path)) == sorted(
        [
            "manifest.json",
            *(f"{name}" for r in range(WORLD) for name in (f"checkpoint_{r}.pt", f"index_{r}.json")),
        ]
    )


def test_without_a_barrier_in_threads(tmp_path, ranks):
    """Ranks that save at once, again and again, commit each one whole; exactly one runs post_commit."""
    writers, logs = ranks()
    for step in range(5):
        assert all_at_once(writers, tmp_path / "c", step) == [None] * WORLD
        for rank in range(WORLD):
            assert_same(state_of(rank, step), load(tmp_path / "c", rank))
    posts = sum(log.calls.count("post") for log in logs)
    assert posts == 5
    assert all("post too early" not in log.calls for log in logs)


def test_with_a_barrier_all_see_the_commit(tmp_path, ranks):
    """With a barrier every rank returns when it is committed, and runs post_commit after that."""
    barrier = Meeting()
    writers, logs = ranks(barrier)
    for step in range(3):
        assert all_at_once(writers, tmp_path / "c", step) == [None] * WORLD
        for rank in range(WORLD):
            assert_same(state_of(rank, step), load(tmp_path / "c", rank))
    assert [log.calls for log in logs] == [["pre", "post"] * 3] * WORLD
    assert barrier.calls == 3 * WORLD


def test_a_rank_that_fails_stops_the_others(tmp_path, ranks):
    """When one rank fails the others stop at once with its error, and the old checkpoint still loads."""
    writers, logs = ranks(Meeting())
    assert all_at_once(writers, tmp_path / "c", 0) == [None] * WORLD
    logs[1].fail = True
    errors = all_at_once(writers, tmp_path / "c", 1)
    assert type(errors[1]) is OSError
    for error in (errors[0], errors[2]):
        assert isinstance(error, AbortedError)
        assert "this rank is broken" in str(error)
        assert "rank 1" in str(error)
    for rank in range(WORLD):
        assert_same(state_of(rank, 0), load(tmp_path / "c", rank))
    logs[1].fail = False
    assert all_at_once(writers, tmp_path / "c", 2) == [None] * WORLD
    assert_same(state_of(1, 2), load(tmp_path / "c", 1))


def test_ranks_that_do_not_come_are_named(tmp_path, ranks):
    """A rank that waits longer than write_barrier_timeout_secs is told which ranks are missing."""
    writers, _ = ranks(Meeting(), timeout=0.3)
    with pytest.raises(CommitTimeoutError, match="1, 2"):
        writers[0].write(str(tmp_path / "c"), state_of(0))
    assert not (tmp_path / "c").exists()


PROGRAM = textwrap.dedent(
    """
    import os, sys, time, torch
    from milepost import CheckpointerConfig, RankInfo, make_sync_checkpointer
    from milepost.barriers import BarrierConfig

    rank, world, port, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    path = f"{folder}/run/c"
    config = CheckpointerConfig()
    config.writer_config.write_barrier_timeout_secs = 60
    if port != "0":
        config.barrier_config = BarrierConfig("tcp_store", dict(
            global_rank=rank, global_world_size=world, barrier_prefix="milepost",
            timeout_barrier_init_secs=60, use_checkpoint_barrier_tcpstore_libuv=True,
            tcpstore_port=int(port), master_address="127.0.0.1", timeout_secs=60))
    with make_sync_checkpointer(config, RankInfo(rank, world)) as checkpointer:
        for step in range(2 if port != "0" else 1):
            state = {"rank": rank, "step": step, "w": torch.full((5,), float(rank))}
            checkpointer.save(path, state, step=step)
            if port != "0":
                assert checkpointer.load(path)["step"] == step
        open(f"{folder}/done{rank}", "x").close()
        while port != "0" and not os.path.exists(f"{folder}/done{1 - rank}"):
            time.sleep(0.01)  # rank 0 serves the store until the other is done
    print("done")
    """
)


def assert_done(ends):
    for output, code in ends:
        assert (code, output.splitlines()[-1:]) == (0, ["done"]), output


@pytest.mark.parametrize("way", ["tcp_store", "start id", "both"])
def test_processes_save_together(launcher, tmp_path, way):
    """Processes with a TCP store's barrier, or with nothing but a common start id, commit together."""
    port = 0 if way == "start id" else free_port()
    environment = {} if way == "tcp_store" else {"MILEPOST_START_ID": f"test-{os.getpid()}"}
    assert_done(launcher.programs(tmp_path, PROGRAM, port, tmp_path, **environment))
    for rank in range(2):
        loaded = load(tmp_path / "run" / "c", rank, 2)
        assert loaded["rank"] == rank
        assert loaded["step"] == (0 if way == "start id" else 1)
    assert os.listdir(tmp_path / "run") == ["c"]


def test_a_rank_may_be_saves_ahead_and_end(tmp_path):
    """A rank that has done its part of several saves and ended loses none of them to a slower rank's."""

    def saves(rank):
        os.environ["MILEPOST_START_ID"] = "ahead"
        with make_sync_checkpointer(rank_info=RankInfo(rank, 2)) as checkpointer:
            for step in range(3):
                checkpointer.save(tmp_path / "c", {"rank": rank, "step": step}, step=step)

    for rank in (1, 0):
        assert in_child(lambda rank=rank: saves(rank)) == 0
    for rank in range(2):
        assert load(tmp_path / "c", rank, 2) == {"rank": rank, "step": 2}
    assert os.listdir(tmp_path) == ["c"]


GROUP = textwrap.dedent(
    """
    import sys, torch, torch.distributed as dist
    from milepost import CheckpointerConfig, make_sync_checkpointer
    from milepost.barriers import BarrierConfig

    rank, rendezvous, path, kind = int(sys.argv[1]), sys.argv[3], sys.argv[4], sys.argv[5]
    dist.init_process_group("gloo", init_method="file://" + rendezvous, rank=rank, world_size=2)
    config = CheckpointerConfig(barrier_config=BarrierConfig("dist_barrier" if kind == "barrier" else None))
    config.writer_config.write_barrier_timeout_secs = 60
    with make_sync_checkpointer(config) as checkpointer:
        for step in range(2):
            checkpointer.save(path, {"rank": rank, "step": step}, step=step)
            dist.barrier()
            assert checkpointer.load(path) == {"rank": rank, "step": step}
            dist.barrier()
    dist.destroy_process_group()
    print("done")
    """
)


@pytest.mark.parametrize("kind", ["barrier", "no barrier"])
def test_the_ranks_of_a_process_group_need_nothing_else(launcher, tmp_path, kind):
    """Ranks of the default process group find each other without a start id, with its barrier or none."""
    run = tmp_path / "run"
    assert_done(launcher.programs(tmp_path, GROUP, tmp_path / "meet", run / "c", kind))
    assert os.listdir(run) == ["c"]


def make_barriers():
    """A real TCP store's barriers of two ranks, that wait a second."""
    port = free_port()
    return together(
        *(lambda rank=rank: TCPStoreBarrier(rank, 2, "p", 60, True, port, "127.0.0.1", 1) for rank in (0, 1))
    )


def test_the_stores_barrier_times_out_by_name():
    """A real TCP store's barrier gives up after timeout_secs, and names the rank that never came."""
    with pytest.raises(CommitTimeoutError, match=r"ranks \[1\] did not reach the barrier within 1 seconds"):
        make_barriers()[0].execute_barrier()


def test_the_stores_barrier_works_again_after_one_that_failed():
    """A rank that did not come to a barrier, or came too late, meets the others at the next."""
    barriers = make_barriers()
    assert together(*(barrier.execute_barrier for barrier in barriers)) == [None, None]
    for late in (True, False):
        for barrier in barriers[: 2 if late else 1]:
            with pytest.raises(CommitTimeoutError):
                barrier.execute_barrier()
        for _ in range(2):
            assert together(*(barrier.execute_barrier for barrier in barriers)) == [None, None]
