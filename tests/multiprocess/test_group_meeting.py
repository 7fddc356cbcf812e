"""Ranks that meet at the default process group's store in each save, with nothing configured."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap

import pytest
from support.processes import free_port
from support.saves import manifest_of

PROLOGUE = """
import logging, os, signal, sys, threading, time
from datetime import timedelta
import torch, torch.distributed as dist
from milepost import CheckpointerConfig, RankInfo, make_async_checkpointer, make_sync_checkpointer
from milepost.ranks import save_meeting as meeting

logging.basicConfig(level=logging.INFO, format="LOG %(message)s")
rank, world, address, kind, run = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5]
config = CheckpointerConfig()
config.writer_config.write_barrier_timeout_secs = 60

def join():
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)

def make():
    return (make_sync_checkpointer if kind == "sync" else make_async_checkpointer)(config)

def state(step):
    return {"rank": rank, "step": step, "w": torch.full((1000,), float(step))}

def save(checkpointer, step, name="latest", wait=True):
    futures = checkpointer.save(os.path.join(run, name), state(step), step=step)
    if futures and wait:
        futures[1].result()
        assert futures[1].committed is True
    if wait:
        assert os.path.exists(os.path.join(run, name, "manifest.json"))
    return futures

def store():
    return dist.distributed_c10d._get_default_store()

def agree(word):  # the ranks' own use of the store, to order what they do
    store().set(f"{word}/{rank}", b"")
    store().wait([f"{word}/{other}" for other in range(world)])
"""


@pytest.fixture
def job(launcher, tmp_path):
    """Runs a program on each rank; what each has printed, and its exit code."""

    def run(program, run, kind="sync", join="join()"):
        code = f"{PROLOGUE}\n{join}\n{textwrap.dedent(program)}"
        return launcher.programs(tmp_path, code, f"tcp://127.0.0.1:{free_port()}", kind, run)

    return run


def assert_done(ends):
    for output, code in ends:
        assert (code, output.splitlines()[-1:]) == (0, ["done"]), output


KINDS = [pytest.param("sync", marks=pytest.mark.slow), "async"]
STORES = {
    "tcp": "join()",
    "file": "address = f'file://{run}.store'; join()",
    "nested": """
store = dist.TCPStore("127.0.0.1", int(address.rpartition(":")[2]), is_master=rank == 0)
store = dist.PrefixStore("outer", dist.PrefixStore("inner", store))
dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
""",
}


@pytest.mark.parametrize(("kind", "store"), [("sync", "tcp"), ("async", "file"), ("async", "nested")])
def test_a_save_that_is_over_is_committed_on_every_rank(job, tmp_path, kind, store):
    """With nothing configured, each rank finds at once, and loads, what it has saved; also when replaced."""
    program = """
    with make() as checkpointer:
        for step in range(4):
            save(checkpointer, step, f"s{step % 2}")
            assert checkpointer.load(os.path.join(run, f"s{step % 2}"))["step"] == step
    dist.destroy_process_group()
    print("done")
    """
    run = tmp_path / "run"
    assert_done(job(program, run, kind=kind, join=STORES[store]))
    assert sorted(os.listdir(run)) == ["s0", "s1"]
    assert [manifest_of(run / name).step for name in ("s0", "s1")] == [2, 3]


def test_the_training_uses_the_store_and_the_group_meanwhile(job, tmp_path):
    """Neither waits for the other: the training's store and groups, two checkpointers, their order."""
    program = """
    with make() as one, make() as other:
        # The ranks use the store while rank 0's save waits for rank 1, which saves after that.
        written = save(one, 1, wait=False)[1] if rank == 0 else None
        for number in range(20):
            agree(f"meanwhile{number}")
        assert written is None or not written.done()
        written = written or save(one, 1, wait=False)[1]
        # Rank 1 waits inside of the store for what rank 0 sets when the save of both is committed.
        if rank == 0:
            written.result()
            store().set("committed", b"")
        else:
            store().wait(["committed"])
        written.result()
        # Two checkpointers save at once, to two paths, in another order on each rank.
        saves = [(one, "a"), (other, "b")][:: 1 if rank == 0 else -1]
        for _, written in [save(checkpointer, 2, name, wait=False) for checkpointer, name in saves]:
            written.result()
        # The group is made again between saves.
        dist.destroy_process_group()
        address = address.replace("store", "again")
        join()
        save(one, 3)
        # The group ends before the save does.
        written = save(other, 4, wait=False)[1]
        dist.destroy_process_group()
    assert written.committed is True
    print("done")
    """
    run = tmp_path / "run"
    assert_done(job(program, run, kind="async", join=STORES["file"]))
    steps = {name: manifest_of(run / name).step for name in os.listdir(run)}
    assert steps == {"latest": 4, "a": 2, "b": 2}


def test_a_failure_is_told_on_every_rank_and_the_next_save_commits(job, tmp_path):
    """A rank whose save fails raises; the others raise that at once with its name; then all save again."""
    program = """
    with make() as checkpointer:
        for step in range(3):
            bad = {"bad": object()} if rank == 1 and step == 1 else state(step)
            try:
                futures = checkpointer.save(os.path.join(run, "latest"), bad, step=step)
                if futures:
                    futures[1].result()
            except Exception as error:
                print(step, type(error).__name__, "object" in str(error), "rank 1" in str(error))
    print("done")
    """
    for kind in ("sync", "async"):
        run = tmp_path / kind
        ends = job(program, run, kind=kind)
        assert_done(ends)
        assert "1 AbortedError True True" in ends[0][0]
        assert "1 UnsupportedTypeError True True" in ends[1][0]
        assert manifest_of(run / "latest").step == 2
        assert "latest" in os.listdir(run)


def test_rank_0_hosts_the_store_and_ends_while_another_still_waits(job, tmp_path):
    """A store that is gone is no verdict: the manifest in the folder tells the other rank."""
    program = """
    import socket
    from milepost.commit import Attempt
    waiting = Attempt.wait_for_commit

    def late(self, *arguments, **options):
        while rank == 1:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", int(address.rpartition(":")[2]))):
                    break  # rank 0, which hosts the store, has ended
                time.sleep(0.01)
        return waiting(self, *arguments, **options)

    Attempt.wait_for_commit = late
    if rank == 1:
        meeting.SaveMeeting.poll = lambda self: meeting.News()  # it hears nothing from the store in time
    with make() as checkpointer:
        save(checkpointer, 1)
    print("done")
    """
    assert_done(job(program, tmp_path / "run"))


def test_a_rank_that_leaves_without_close_still_meets_those_that_come_later(tmp_path):
    """An interpreter that ends finishes its saves first: until then it answers the other ranks."""
    program = """
    import atexit
    if rank == 0:
        checkpointer = make()
        save(checkpointer, 1, wait=False)
        atexit.register(store().set, "leaving", b"")
    else:
        store().wait(["leaving"])
        with make() as checkpointer:
            save(checkpointer, 1)
    print("done")
    """
    code = f"{PROLOGUE}\njoin()\n{textwrap.dedent(program)}"
    arguments = ["2", f"tcp://127.0.0.1:{free_port()}", "async", str(tmp_path / "run")]
    ranks = [subprocess.Popen([sys.executable, "-c", code, rank, *arguments]) for rank in "01"]
    assert [rank.wait(150) for rank in ranks] == [0, 0]
    assert manifest_of(tmp_path / "run" / "latest").step == 1


def test_a_group_that_goes_before_its_ranks_know_each_other_is_told_at_once(job, tmp_path):
    """Without a group there is no start id any more: the save raises, and waits for nobody."""
    program = """
    checkpointer = make() if rank == 0 else None
    dist.destroy_process_group()
    try:
        save(checkpointer, 1) if rank == 0 else None
    except Exception as error:
        print("RAISED", type(error).__name__, str(error).replace("\\n", " "))
    print("done")
    """
    ends = job(program, tmp_path / "run")
    assert_done(ends)
    assert "RAISED CommitError the process group ended before all its ranks" in ends[0][0], ends[0][0]


def test_ranks_that_do_not_save_are_named(job, tmp_path):
    """`if rank == 0: save` says soon whom it waits for and what to do, and raises when the time is over."""
    program = """
    meeting._PATIENCE_SECONDS = 0.2
    config.writer_config.write_barrier_timeout_secs = 2
    checkpointer = make()
    if rank == 0:
        try:
            save(checkpointer, 1)
        except Exception as error:
            print("RAISED", type(error).__name__, str(error).replace("\\n", " "))
        store().set("end", b"")
    else:
        store().wait(["end"])
    print("done")
    """
    ends = job(program, tmp_path / "run")
    assert "waits for ranks [1], which have not called save for it" in ends[0][0], ends[0][0]
    assert "pass RankInfo(0, 1)" in ends[0][0]
    assert "RAISED CommitTimeoutError ranks 1 did not arrive within 2 s" in ends[0][0], ends[0][0]
    assert "hint: call save on every rank, or pass RankInfo(0, 1)" in ends[0][0]
    assert os.listdir(tmp_path / "run") != ["latest"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_that_is_killed_while_the_others_meet_is_named(job, tmp_path, kind):
    """The others raise when the time is over, with its name; the old checkpoint stays."""
    program = """
    config.writer_config.write_barrier_timeout_secs = 3
    checkpointer = make()
    save(checkpointer, 1)
    if rank == 1:
        # It has called save, and dies before its part is written.
        from milepost.ranks.save_meeting import SaveMeeting
        begin = SaveMeeting.__init__

        def die(self, *arguments):
            begin(self, *arguments)
            while "called" not in self._told:
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGKILL)

        SaveMeeting.__init__ = die
    try:
        save(checkpointer, 2)
    except Exception as error:
        print("RAISED", type(error).__name__, str(error).splitlines()[0])
    checkpointer.close()
    print("done")
    """
    run = tmp_path / "run"
    ends = job(program, run, kind=kind)
    assert_done(ends[:1])
    assert "RAISED CommitTimeoutError ranks 1 did not arrive within 3 s" in ends[0][0], ends[0][0]
    assert ends[1][1] == -signal.SIGKILL
    assert manifest_of(run / "latest").step == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="another view of a folder needs root, for a mount namespace")
@pytest.mark.skipif(shutil.which("unshare") is None, reason="there is no unshare command")
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_is_not_shared_is_told_on_all_ranks(job, tmp_path, kind):
    """Where a rank does not see what rank 0 writes, the save fails on all, with the hosts and ways out."""
    program = """
    if rank == 1:
        hide(run)
    meeting._VISIBLE_SECONDS = 1
    with make() as checkpointer:
        try:
            save(checkpointer, 1)
        except Exception as error:
            print("RAISED", type(error).__name__, str(error).replace("\\n", " "))
    print("done")
    """
    run = tmp_path / "run"
    run.mkdir()
    if subprocess.run(["unshare", "-m", "true"], check=False).returncode:
        pytest.skip("no mount namespaces here")
    ends = job(program, run, kind=kind, join="from support.file_systems import hide\njoin()")
    assert_done(ends)
    for output, _ in ends:
        assert "the folder is not shared between the ranks" in output
        assert socket.gethostname() in output
        assert "RankInfo(0, 1)" in output
