"""The agreement on a start's id, and a save's meeting; ranks are threads at one store."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
from datetime import timedelta
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from support.processes import together, wait_until

from milepost import CheckpointerConfig, RankInfo, make_async_checkpointer, make_sync_checkpointer
from milepost.barriers import BarrierConfig, TCPStoreBarrier, create_barrier_from_config
from milepost.checkpoint_reader import CheckpointReader
from milepost.checkpoint_writer import CheckpointWriter, CheckpointWriterConfig
from milepost.commit import Outcome, expect
from milepost.commit import locate as locate_now
from milepost.commit.locate import _expected
from milepost.commit.save import SaveOptions
from milepost.errors import (
    AbortedError,
    CheckpointNotFoundError,
    CommitError,
    CommitTimeoutError,
    ConfigError,
    CorruptCheckpointError,
    PeerLoadError,
)
from milepost.format.manifest import identity_of
from milepost.ranks.load_meeting import Report, default_meeting
from milepost.ranks.save_meeting import Ranks, SaveMeeting
from milepost.ranks.start import Start, start_at
from milepost.storage import default_storage


def new_store():
    """A store whose connections are objects of their own, so that nothing keeps it alive."""
    return dist.PrefixStore("test", dist.HashStore())


def all_ranks(work, world=2):
    """Do some work as each of the ranks at once; what each returned or raised."""
    return together(*(partial(work, rank) for rank in range(world)))


def test_what_dead_ranks_have_left_at_a_store_is_not_taken_for_new():
    """Every life agrees on a new id, though the tokens, answers and ids of the last one are still there."""
    store, ids = new_store(), set()
    for _ in range(5):
        starts = [Start(store, rank, 3) for rank in (2, 0, 1)]
        assert all(start.wait(60) for start in starts)
        (found,) = {start.id for start in starts}
        ids.add(found)
    assert len(ids) == 5


def test_a_rank_trusts_the_rank_0_that_lives_until_all_have_come():
    """An answer of a rank 0 that dies is replaced by that of the next one, before anybody uses it."""
    store = new_store()
    one = Start(store, 1, 3)
    token = one.token
    store.set(f"milepost/answer/{token}", "old")  # by a rank 0 that answers, and then is gone
    wait_until(lambda: store.check([f"milepost/old/joined/{token}"]))
    assert not one.wait(0)
    others = [Start(store, rank, 3) for rank in (0, 2)]
    assert one.wait(60)
    assert one.id == others[0].id != "old"


def test_a_process_has_one_start_at_a_store_and_another_where_it_does_not_work():
    """The checkpointers of one process share a start; a store that raises at every call counts as none."""
    store = new_store()
    assert start_at(store, 0, 2) is start_at(store, 0, 2)
    again = new_store()
    assert start_at(again, 0, 2) is not start_at(store, 0, 2)
    assert start_at(dist.Store(), 0, 2) is None


@pytest.fixture(scope="module")
def _served_before():
    """The first store that a process serves leaves a pipe of libuv's."""
    dist.TCPStore("127.0.0.1", 0, is_master=True)


@pytest.fixture
def dead_store(_served_before):
    """Makes a client of a TCP store whose server has died; a new connection takes `seconds` to fail."""

    def make(seconds):
        server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = server.port
        client = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=seconds))
        return dist.PrefixStore("group", client), port

    yield make
    start_at(dist.Store(), 0, 2)  # forgets the starts whose stores are gone


@pytest.mark.parametrize("rank", [0, 1])
def test_no_checkpointer_waits_for_a_store_whose_server_has_died(tmp_path, dead_store, rank, monkeypatch):
    """Making one returns at once; a save says that the store does not answer, a load too."""
    monkeypatch.setattr("milepost.ranks.load_meeting.GRACE_SECONDS", 0)
    store, port = dead_store(60)
    (writer,) = writers(store, ranks=[rank], seconds=0.5)
    start = start_at(store, rank, 2)
    assert start.trouble
    assert not start.lost  # so it is still connecting
    with pytest.raises(CommitTimeoutError, match=r"the store at which they agree .* has not answered yet"):
        writer.write(str(tmp_path / "c"), {"a": 1})
    with pytest.raises(PeerLoadError, match="it has not answered yet"):
        default_meeting(rank, 2, store, 0.5).hold(Report("c"))
    server = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    wait_until(lambda: not start.trouble)
    del server, store


@pytest.mark.parametrize("rank", [0, 1])
def test_a_save_says_that_the_store_has_gone(tmp_path, dead_store, rank):
    """When a new connection has failed, every save raises at once, and names the server."""
    store, port = dead_store(1)
    (writer,) = writers(store, ranks=[rank])
    for _ in range(2):
        with pytest.raises(CommitError, match=f"the process group ended .*{port}"):
            writer.write(str(tmp_path / "c"), {"a": 1})
    assert os.listdir(tmp_path) == []


def write(made, path, states, rank):
    made[rank].write(path, states[rank])


def writers(store, world=2, seconds=60, ranks=None):
    """Writers of threads that meet at a store."""
    made = []
    for rank in range(world) if ranks is None else ranks:
        info = RankInfo(rank, world)
        writer = CheckpointWriter(CheckpointWriterConfig(write_barrier_timeout_secs=seconds), info)
        options = SaveOptions(default_storage(), rank, world, seconds)
        writer._ranks = Ranks(options, None, store=store, meets=True)
        made.append(writer)
    return made


def test_threads_meet_at_a_store_of_their_process(tmp_path):
    """Ranks that are threads with a HashStore commit together, again and again; the store does not grow."""
    store = new_store()
    made = writers(store)
    sizes = []
    for step in range(70):
        path = str(tmp_path / str(step % 2))
        states = [{"step": step, "rank": rank} for rank in range(2)]
        assert all_ranks(partial(write, made, path, states)) == [None, None]
        for rank in range(2):
            loaded, _ = CheckpointReader(RankInfo(rank, 2)).read(path, together=False)
            assert loaded == states[rank]
        sizes.append(store.num_keys())
    assert sizes[-1] <= sizes[-4]


def test_a_copy_of_a_checkpoint_is_replaced_by_the_first_save_to_its_path(tmp_path):
    """A checkpoint that was copied elsewhere is not taken for what the ranks save there."""
    made = writers(new_store())
    path, copied = str(tmp_path / "last"), str(tmp_path / "best")
    assert all_ranks(partial(write, made, path, [{"step": 1}] * 2)) == [None, None]
    shutil.copytree(path, copied)
    assert all_ranks(partial(write, made, copied, [{"step": 2}] * 2)) == [None, None]
    assert CheckpointReader(RankInfo(0, 2)).read(copied, together=False)[0] == {"step": 2}


def test_a_path_that_differs_on_one_rank_is_told(tmp_path, monkeypatch, caplog):
    """Ranks that save to different paths do not meet, and the log names who has not called save for which."""
    monkeypatch.setattr("milepost.ranks.save_meeting._PATIENCE_SECONDS", 0.1)
    store = new_store()
    made = writers(store, seconds=1)
    errors = all_ranks(lambda rank: made[rank].write(str(tmp_path / f"step{rank}"), {"a": 1}))
    assert [type(error).__name__ for error in errors] == ["CommitTimeoutError"] * 2
    assert f"{tmp_path}/step0 waits for ranks [1], which have not called save for it" in caplog.text
    assert f"{tmp_path}/step1 waits for ranks [0], which have not called save for it" in caplog.text


def test_what_this_host_does_not_show_yet_is_waited_for(tmp_path, monkeypatch):
    """After others have committed, a load waits until the folder shows that; it raises when it never does."""
    module = sys.modules["milepost.commit.locate"]
    monkeypatch.setattr(module, "VISIBLE_SECONDS", 0.2)
    monkeypatch.setattr(module, "_LOOK_SECONDS", 0.01)
    path, storage = str(tmp_path / "c"), default_storage()
    writer = CheckpointWriter(CheckpointWriterConfig(), RankInfo(0, 1))
    writer.write(path, {"a": 1})
    found = locate_now(storage, path)
    found.folder.close()
    expect(path, f"{found.manifest.sequence}:{'0' * 64}")
    with pytest.raises(CheckpointNotFoundError, match="has not seen it within"):
        locate_now(storage, path)
    writer.write(path, {"a": 2})
    found = locate_now(storage, path)
    found.folder.close()
    writer.close()


def test_files_that_this_host_does_not_show_yet_are_waited_for(tmp_path, monkeypatch):
    """Where the manifest shows before the data file, a load waits, and does not call that damage."""
    path, data = str(tmp_path / "c"), tmp_path / "c" / "checkpoint_0.pt"
    CheckpointWriter(CheckpointWriterConfig(), RankInfo(0, 1)).write(path, {"a": 1})
    found = locate_now(default_storage(), path)
    found.folder.close()
    data.rename(tmp_path / "late")
    with pytest.raises(CorruptCheckpointError):
        locate_now(default_storage(), path)
    expect(path, f"{found.manifest.sequence}:{identity_of(found.manifest)}")
    show = SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: (tmp_path / "late").rename(data))
    monkeypatch.setattr(sys.modules["milepost.commit.locate"], "time", show)
    locate_now(default_storage(), path).folder.close()


@pytest.fixture
def group(monkeypatch):
    """A default process group of two ranks, of which this is the first."""
    store = new_store()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    return store


@pytest.mark.usefixtures("group")
def test_ranks_that_are_not_those_of_the_group_are_refused():
    """Where RankInfo says something else than the group, the error names the ways out."""
    for make in (make_sync_checkpointer, make_async_checkpointer):
        with pytest.raises(ConfigError) as caught:
            make(rank_info=RankInfo(1, 4))
        for way in ("RankInfo(0, 1)", "barrier_config", 'meeting="none"'):
            assert way in str(caught.value)
    with make_sync_checkpointer(rank_info=RankInfo(0, 1)) as checkpointer:  # one rank alone never meets
        assert checkpointer._writer._ranks.meets is False


@pytest.mark.parametrize("way", ["none", "fake", "no group"])
def test_without_a_meeting_nothing_is_said_to_be_committed(tmp_path, monkeypatch, caplog, request, way):
    """One warning when it is made; then each save says that it is written, not known to be committed."""
    if way != "no group":
        request.getfixturevalue("group")
    if way == "fake":
        monkeypatch.setattr(dist, "get_backend", lambda: "fake")
    events = []
    config = CheckpointerConfig(meeting="none" if way == "none" else "auto")
    config.writer_config.start_id = f"start-{way.replace(' ', '-')}"
    config.async_config.observers = [type("Log", (), {"on_event": lambda _, event: events.append(event)})()]
    caplog.set_level(logging.INFO)
    with make_sync_checkpointer(config, RankInfo(0, 2)) as checkpointer:
        assert caplog.text.count("do not meet when they save") == 1
        checkpointer.save(str(tmp_path / "a"), {"w": torch.ones(3)}, step=7)
        assert f"{tmp_path / 'a'}: this rank's part is written, not known to be committed" in caplog.text
    assert [(event.kind, event.step) for event in events] == [("written", 7)]
    events.clear()
    with make_async_checkpointer(config, RankInfo(0, 2)) as checkpointer:
        written = checkpointer.save(str(tmp_path / "b"), {"w": torch.ones(3)})[1]
        written.result()
        assert written.committed is None
    assert events[-1].kind == "written"


def test_what_has_failed_since_is_told_at_the_next_call(tmp_path):
    """A rank that wrote its part, and did not wait, hears at its next save that another rank has failed."""
    config = CheckpointWriterConfig(start_id="later")
    path, ranks = str(tmp_path / "c"), [CheckpointWriter(config, RankInfo(rank, 2)) for rank in range(2)]
    for rank in (1, 0):
        ranks[rank].write(path, {"step": 1})
    ranks[0].write(path, {"step": 2})
    with pytest.raises(Exception, match="could not be read back"):
        ranks[1].write(path, {"step": object()})
    with pytest.raises(AbortedError, match="rank 1 failed") as caught:
        ranks[0].write(path, {"step": 3})
    assert "an earlier save" in caught.value.__notes__[0]
    ranks[1].write(path, {"step": 3})
    loaded, _ = CheckpointReader(RankInfo(0, 2)).read(path, together=False)
    assert loaded == {"step": 3}  # what raised was written all the same
    for writer in ranks:
        writer.close()


def test_a_verdict_ends_the_wait_and_is_remembered_where_it_is_not_seen(tmp_path):
    """A rank hears at the store that all is committed; if its host does not show that, a load will wait."""
    store, path, identity = new_store(), str(tmp_path / "c"), f"1:{'0' * 64}"
    starts = [Start(store, rank, 2) for rank in range(2)]
    assert all(start.wait(60) for start in starts)
    meetings = [SaveMeeting(start, default_storage(), path, "a-1", 1) for start in starts]
    meetings[0].end(Outcome(identity=identity))
    wait_until(lambda: meetings[1].poll().identity)
    meetings[1].close(Outcome(identity=identity, hidden=True), None)

    assert _expected.pop(path) == identity


@pytest.mark.usefixtures("_served_before", "group")
def test_a_barrier_of_the_group_needs_no_arguments():
    """`BarrierConfig("tcp_store")` takes ranks and address from the default group; without one it says so."""

    def make(rank):
        if rank == 0:
            return create_barrier_from_config(BarrierConfig("tcp_store"))
        host, port = start_at(dist.distributed_c10d._get_default_store(), 1, 2).tell_address(60)
        return TCPStoreBarrier(1, 2, "milepost", 60, True, port, host, 60)

    barriers = all_ranks(make)
    assert all_ranks(lambda rank: barriers[rank].execute_barrier()) == [None, None]


def test_a_barrier_of_the_group_needs_a_group():
    """Without one the error says what to do."""
    with pytest.raises(ConfigError, match="init_process_group"):
        create_barrier_from_config(BarrierConfig("tcp_store"))
