"""Several ranks: threads and processes that save together, with and without a barrier."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from ports import free_port
from states import assert_same, manifest_of

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
def ranks(monkeypatch):
    """Makes the writers of all ranks, with hooks; they are closed at the end."""
    made = []

    def make(barrier=None, timeout=60):
        for rank in range(WORLD):
            config, log = CheckpointWriterConfig(write_barrier_timeout_secs=timeout), Log()
            made.append(CheckpointWriter(config, RankInfo(rank, WORLD), barrier, log))
            made[-1].log = log
        return made

    yield make
    for writer in made:
        writer.close()


def load(path, rank):
    return CheckpointReader(RankInfo(rank, WORLD)).read(str(path))[0]


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
    writers = ranks()
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
    hooks = [writer.log.calls for writer in writers]
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
    writers = ranks()
    for step in range(5):
        assert all_at_once(writers, tmp_path / "c", step) == [None] * WORLD
        for rank in range(WORLD):
            assert_same(state_of(rank, step), load(tmp_path / "c", rank))
    posts = sum(writer.log.calls.count("post") for writer in writers)
    assert posts == 5
    assert all("post too early" not in writer.log.calls for writer in writers)


def test_with_a_barrier_all_see_the_commit(tmp_path, ranks):
    """With a barrier every rank returns when it is committed, and runs post_commit after that."""
    barrier = Meeting()
    writers = ranks(barrier)
    for step in range(3):
        assert all_at_once(writers, tmp_path / "c", step) == [None] * WORLD
        for rank in range(WORLD):
            assert_same(state_of(rank, step), load(tmp_path / "c", rank))
    assert [writer.log.calls for writer in writers] == [["pre", "post"] * 3] * WORLD
    assert barrier.calls == 3 * WORLD


def test_a_rank_that_fails_stops_the_others(tmp_path, ranks):
    """When one rank fails the others stop at once with its error, and the old checkpoint still loads."""
    writers = ranks(Meeting())
    assert all_at_once(writers, tmp_path / "c", 0) == [None] * WORLD
    writers[1].log.fail = True
    errors = all_at_once(writers, tmp_path / "c", 1)
    assert type(errors[1]) is OSError
    for error in (errors[0], errors[2]):
        assert isinstance(error, AbortedError)
        assert "this rank is broken" in str(error)
        assert "rank 1" in str(error)
    for rank in range(WORLD):
        assert_same(state_of(rank, 0), load(tmp_path / "c", rank))
    writers[1].log.fail = False
    assert all_at_once(writers, tmp_path / "c", 2) == [None] * WORLD
    assert_same(state_of(1, 2), load(tmp_path / "c", 1))


def test_ranks_that_do_not_come_are_named(tmp_path, ranks):
    """A rank that waits longer than write_barrier_timeout_secs is told which ranks are missing."""
    writers = ranks(Meeting(), timeout=0.3)
    with pytest.raises(CommitTimeoutError, match="1, 2"):
        writers[0].write(str(tmp_path / "c"), state_of(0))
    assert not (tmp_path / "c").exists()


PROGRAM = textwrap.dedent(
    """
    import sys, torch
    from milepost import CheckpointerConfig, RankInfo, make_sync_checkpointer
    from milepost.barriers import BarrierConfig

    rank, world, port, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
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
    print("done", flush=True)
    sys.stdin.read()  # rank 0 serves the store until the others are done
    """
)


def start(rank, world, port, path, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(rank), str(world), str(port), str(path)],
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(processes):
    try:
        return [(process.communicate(timeout=90), process.returncode) for process in reversed(processes)]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("way", ["tcp_store", "start id", "both"])
def test_processes_save_together(tmp_path, way):
    """Processes with a TCP store's barrier, or with nothing but a common start id, commit together."""
    port = 0 if way == "start id" else free_port()
    environment = {} if way == "tcp_store" else {"MILEPOST_START_ID": f"test-{os.getpid()}"}
    processes = [start(rank, 2, port, tmp_path / "c", **environment) for rank in range(2)]
    for (out, err), code in outcome(processes):
        assert (out, code) == ("done\n", 0), err
    for rank in range(2):
        loaded = CheckpointReader(RankInfo(rank, 2)).read(str(tmp_path / "c"))[0]
        assert loaded["rank"] == rank
        assert loaded["step"] == (0 if way == "start id" else 1)
    assert os.listdir(tmp_path) == ["c"]


def test_a_rank_may_be_saves_ahead_and_end(tmp_path):
    """A rank that has done its part of several saves and ended loses none of them to a slower rank's."""
    code = textwrap.dedent(
        """
        import sys
        from milepost import RankInfo, make_sync_checkpointer
        with make_sync_checkpointer(rank_info=RankInfo(int(sys.argv[1]), 2)) as checkpointer:
            for step in range(3):
                checkpointer.save(sys.argv[2], {"rank": sys.argv[1], "step": step}, step=step)
        """
    )
    environment = {**os.environ, "MILEPOST_START_ID": "ahead"}
    for rank in "10":
        subprocess.run([sys.executable, "-c", code, rank, str(tmp_path / "c")], env=environment, check=True)
    for rank in range(2):
        loaded = CheckpointReader(RankInfo(rank, 2)).read(str(tmp_path / "c"))[0]
        assert loaded == {"rank": str(rank), "step": 2}
    assert os.listdir(tmp_path) == ["c"]


GROUP = textwrap.dedent(
    """
    import sys, torch, torch.distributed as dist
    from milepost import CheckpointerConfig, make_sync_checkpointer
    from milepost.barriers import BarrierConfig

    rank, rendezvous, path, kind = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
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
def test_the_ranks_of_a_process_group_need_nothing_else(tmp_path, kind):
    """Ranks of the default process group find each other without a start id, with its barrier or none."""
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                GROUP,
                str(rank),
                str(tmp_path / "meet"),
                str(tmp_path / "run" / "c"),
                kind,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for (out, err), code in outcome(processes):
        assert (out, code) == ("done\n", 0), err
    assert os.listdir(tmp_path / "run") == ["c"]


def test_the_stores_barrier_times_out_by_name(tmp_path):
    """A real TCP store's barrier gives up after timeout_secs, and names the rank that never came."""
    code = textwrap.dedent(
        """
        import sys, threading
        from milepost.barriers import TCPStoreBarrier
        from milepost.errors import CommitTimeoutError
        made = {}
        def make(rank):
            made[rank] = TCPStoreBarrier(rank, 2, "p", 60, True, int(sys.argv[1]), "127.0.0.1", 1)
        threads = [threading.Thread(target=make, args=(rank,)) for rank in range(2)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        try:
            made[0].execute_barrier()
        except CommitTimeoutError as error:
            print(error)
        """
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(free_port())],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert "ranks [1] did not reach the barrier within 1 seconds" in run.stdout, run.stderr


def test_the_stores_barrier_works_again_after_one_that_failed(tmp_path):
    """A rank that did not come to a barrier, or came too late, meets the others at the next."""
    code = textwrap.dedent(
        """
        import sys, threading
        from milepost.barriers import TCPStoreBarrier
        from milepost.errors import CommitTimeoutError
        made, errors = {}, []
        def make(rank):
            made[rank] = TCPStoreBarrier(rank, 2, "p", 60, True, int(sys.argv[1]), "127.0.0.1", 1)
        def execute(rank):
            try:
                made[rank].execute_barrier()
            except CommitTimeoutError as error:
                errors.append(error)
        def both(work):
            threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
            [thread.start() for thread in threads]
            [thread.join() for thread in threads]
        both(make)
        both(execute)
        for late in (True, False):
            execute(0)
            if late:
                execute(1)
            print(len(errors), [type(error).__name__ for error in errors])
            errors.clear()
            both(execute)
            both(execute)
            assert not errors, errors
        print("in step")
        """
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(free_port())],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert "2 ['CommitTimeoutError', 'CommitTimeoutError']" in run.stdout, run.stderr
    assert "in step" in run.stdout, run.stderr
