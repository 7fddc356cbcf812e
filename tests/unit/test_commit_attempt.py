"""One rank's part in an attempt: ids, marks, waiting, aborting, attachments."""

from __future__ import annotations

import os

import msgspec
import pytest
from support.commits import StepClock, arrive, assert_clean, content, index_of, let_die, loaded_step, save
from support.disks import MemoryStorage, Wrapper, hidden, make_folders, put, tree
from support.processes import in_child

from milepost.commit import (
    attempt_id,
    begin,
    check_target,
    clean_up,
    environment_start_id,
    locate,
    new_attempt_id,
    process_id,
    roll_forward,
)
from milepost.commit.contents import read_beacons
from milepost.errors import AbortedError, CommitError, CommitTimeoutError, StorageError
from milepost.format.index import DataFile, encode_index
from milepost.storage.local import LocalStorage
from milepost.testing import FaultyStorage

PATH = "/run/step"


@pytest.fixture
def storage():
    """An empty storage with a folder for runs."""
    storage = MemoryStorage()
    make_folders(storage, "/run")
    return storage


def rank_of(storage, rank, *, world_size=2, attempt="job-1", step=2, **kwargs):
    return arrive(storage, PATH, step, attempt=attempt, rank=rank, world_size=world_size, **kwargs)


def touch(path):
    os.close(os.open(path, os.O_CREAT))


# ---------------------------------------------------------------------------- ids


def test_a_single_rank_always_has_a_random_attempt_id(monkeypatch):
    """With world size 1 no start id is used, and no two saves have the same id."""
    monkeypatch.setenv("MILEPOST_START_ID", "job")
    assert attempt_id("a", 0, 1) != attempt_id("a", 0, 1)
    assert new_attempt_id() != new_attempt_id()


def test_attempt_ids_count_the_saves_of_each_rank_and_path(tmp_path):
    """All ranks get the same id for the n-th save of a path, however the path is written."""
    os.chdir(tmp_path)
    ids = [attempt_id("ids/step", rank, 4, "job") for rank in range(4)]
    assert set(ids) == {"job-3e64cc-1"}
    assert attempt_id(str(tmp_path / "ids/x/../step"), 0, 4, "job") == "job-3e64cc-2"
    assert attempt_id("ids/other", 0, 4, "job") == "job-d9298a-1"


def test_the_start_id_comes_from_the_caller_or_the_environment_with_its_restart_counts(monkeypatch):
    """The caller's start id goes first; the environment's has the launchers' restart counts appended."""
    monkeypatch.delenv("MILEPOST_START_ID", raising=False)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert environment_start_id() is None
    monkeypatch.setenv("MILEPOST_START_ID", "run7")
    assert environment_start_id() == "run7-2"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert attempt_id("/ids/env", 0, 2).startswith("run7-2-1-")
    assert attempt_id("/ids/env2", 0, 2, "mine").startswith("mine-")


def test_without_any_start_id_the_process_has_one_of_its_own(monkeypatch):
    """Ranks of one process still find each other; another process has another id."""
    monkeypatch.delenv("MILEPOST_START_ID", raising=False)
    assert attempt_id("/ids/own", 0, 2) == attempt_id("/ids/own", 1, 2)


@pytest.mark.parametrize("start", ["a/b", "x" * 100, "späte", "a.b", " "])
def test_any_start_id_gives_a_usable_name(storage, start):
    """A start id that is no file name, or too long for one, still gives one id for all ranks."""
    first, second = attempt_id(f"/ids/{start}", 0, 2, start), attempt_id(f"/ids/{start}", 1, 2, start)
    assert first == second
    save(storage, PATH, 1, attempt=first, rank=1, world_size=2)
    assert save(storage, PATH, 1, attempt=second, rank=0, world_size=2)


def test_a_forked_child_is_another_process():
    """A forked child has a process id and a start id of its own."""
    reader, writer = os.pipe()
    own = (process_id(), attempt_id("/ids/fork", 0, 2))
    in_child(lambda: os.write(writer, f"{process_id()} {attempt_id('/ids/fork', 1, 2)}".encode()))
    child = os.read(reader, 1000).decode().split()
    os.close(reader)
    os.close(writer)
    assert len(child) == 2
    assert not set(child) & set(own)


# ---------------------------------------------------------------------------- one rank


def test_nothing_is_left_of_a_save_that_fails(storage):
    """The only rank removes its folder when it aborts, and when it is closed before its part is whole."""
    for end in ("abort", "close"):
        if end == "abort":
            attempt = arrive(storage, PATH, 1)
            attempt.abort(ValueError("no"))
        else:
            attempt = begin(storage, PATH, attempt="one", rank=0, world_size=1)
            put(storage, attempt.data_path, b"half")
            assert hidden(storage, PATH)
        attempt.close()
        attempt.close()
        assert hidden(storage, PATH) == []
    assert loaded_step(storage, PATH) is None


def test_the_beacon_tells_phase_and_bytes_a_few_times_a_second(storage):
    """Progress rewrites the beacon at a change of phase, and within one phase at most every 0.25 s."""
    clock = StepClock()
    attempt = begin(storage, PATH, attempt="job-1", rank=3, world_size=4, clock=clock.clock)
    told = []
    for tick in range(20):
        attempt.progress("write", tick)
        folder = storage.open_folder(attempt.folder)
        told.append(read_beacons(folder, folder.names())[3])
        clock.now += 0.1
    assert {beacon.phase for beacon in told} == {"write"}
    assert sorted({beacon.bytes_done for beacon in told}) == [0, 3, 6, 9, 12, 15, 18]
    attempt.close()


def test_progress_never_raises(storage):
    """A beacon that cannot be written does not end a save."""
    faulty = FaultyStorage(storage)
    attempt = begin(faulty, PATH, attempt="job-1", rank=0, world_size=1)
    faulty.fail_at(len(faulty.operations) + 1, OSError(28, "full"), times=None)
    attempt.progress("write", 5)
    faulty.faults.clear()
    attempt.close()


def test_attachments_are_hashed_at_any_depth_and_listed_in_the_manifest(storage):
    """What a hook adds is part of the checkpoint: verified with it, and removed when it is replaced."""

    def hook(folder):
        put(storage, f"{folder}/tokenizer.json", b"tokens")
        make_folders(storage, f"{folder}/a/b/empty")
        put(storage, f"{folder}/a/b/words", b"w" * 3_000_000)

    save(storage, PATH, 1, hook=hook)
    found = locate(storage, PATH)
    assert [file.name for file in found.manifest.attachments] == ["a/b/words", "tokenizer.json"]
    found.folder.close()
    save(storage, PATH, 2)
    assert tree(storage, PATH).keys() == {
        "a/b/empty/",
        "checkpoint_0.pt",
        "index_0.json",
        "manifest.json",
    }


@pytest.mark.parametrize(
    ("add", "message"),
    [
        (lambda folder: os.symlink("/etc/passwd", f"{folder}/link"), "symbolic link"),
        (lambda folder: os.mkfifo(f"{folder}/pipe"), "device"),
        (lambda folder: touch(f"{folder}/checkpoint_1.pt"), "own files"),
        (lambda folder: touch(f"{folder}/index_1.json"), "own files"),
        (lambda folder: touch(f"{folder}/back\\slash"), "no valid name"),
        (lambda folder: touch(os.fsencode(folder) + b"/\xff"), "no valid name"),
    ],
    ids=["link", "pipe", "data", "index", "backslash", "bytes"],
)
def test_what_a_checkpoint_cannot_hold_is_refused_from_hooks(tmp_path, add, message):
    """Links, devices, our own names and names that JSON cannot hold end the save, with a hint."""
    path = str(tmp_path / "step")
    with pytest.raises(CommitError, match=message) as caught:
        save(LocalStorage(), path, 1, hook=add)
    assert caught.value.phase == "pre_commit"
    assert caught.value.hint
    assert os.listdir(tmp_path) == []


def test_a_lost_writers_data_is_written_again(storage):
    """A retry with the same attempt finds the half-written data file of the lost writer gone."""
    first = begin(storage, PATH, attempt="retry", rank=0, world_size=1)
    put(storage, first.data_path, b"half")
    let_die(first)
    assert save(storage, PATH, 1, attempt="retry")
    assert loaded_step(storage, PATH) == 1


def test_a_lost_writers_mark_is_taken_up(storage):
    """When the lost writer had marked, a retry has nothing to write, and its completion commits."""
    first = rank_of(storage, 0)
    let_die(first)
    again = begin(storage, PATH, attempt="job-1", rank=0, world_size=2)
    assert again.marked
    assert not again.committed
    other = rank_of(storage, 1)
    assert again.complete()
    assert not other.complete()
    assert other.committed
    for attempt in (again, other):
        attempt.close()
    assert_clean(storage, PATH)


def test_a_lost_writers_commit_is_taken_up(storage):
    """When the lost writer had published, a retry with the same attempt is committed from the start."""
    save(storage, PATH, 1, attempt="retry")
    again = begin(storage, PATH, attempt="retry", rank=0, world_size=1)
    assert again.committed
    assert again.marked
    assert not again.complete()
    again.wait_for_commit(0)
    again.close()
    assert loaded_step(storage, PATH) == 1
    assert_clean(storage, PATH)


# ---------------------------------------------------------------------------- several ranks


def test_the_last_rank_to_arrive_commits(storage):
    """Without a barrier each rank marks and returns, and the last one commits all."""
    results = []
    for rank in (2, 0, 1):
        results.append(save(storage, PATH, 2, attempt="job-1", rank=rank, world_size=3))
        assert loaded_step(storage, PATH) == (2 if len(results) == 3 else None)
    assert results == [False, False, True]
    assert_clean(storage, PATH)


def test_a_mark_of_another_process_is_an_abort(storage):
    """A start id that was used before is found out by its marks: all ranks stop, and nothing commits."""
    rank_of(storage, 1, process="before").close()
    with pytest.raises(
        CommitError, match="in another process: it was started twice, or the start id of this job is not new"
    ) as caught:
        rank_of(storage, 1)
    assert "MILEPOST_START_ID" in caught.value.hint
    with pytest.raises(
        AbortedError, match="rank 1 failed in begin with CommitError: rank 1 has already saved"
    ):
        rank_of(storage, 0)
    assert loaded_step(storage, PATH) is None


def test_a_mark_that_another_process_puts_meanwhile_is_an_abort(storage):
    """Also a mark that appears between begin and mark is found out (if the beacon was lost)."""
    ours = begin(storage, PATH, attempt="job-1", rank=1, world_size=2)
    storage.remove(f"{ours.folder}/state_1.json")
    theirs = begin(storage, PATH, attempt="job-1", rank=1, world_size=2, process="other")
    put(storage, theirs.data_path, content(2, 1))
    theirs.mark(encode_index(index_of(theirs, 2)))
    with pytest.raises(CommitError, match="in another process"):
        ours.mark(encode_index(index_of(ours, 2)))
    with pytest.raises(AbortedError):
        theirs.complete()
    ours.close()
    theirs.close()


def test_a_second_process_of_one_rank_is_refused_before_it_touches_anything(storage):
    """Of two processes that are the same rank the second stops the attempt; the first one's data stay."""
    ours = begin(storage, PATH, attempt="job-1", rank=1, world_size=2)
    put(storage, ours.data_path, content(2, 1))
    with pytest.raises(CommitError, match="in another process"):
        begin(storage, PATH, attempt="job-1", rank=1, world_size=2, process="other")
    assert storage.stat(ours.data_path) is not None
    with pytest.raises(AbortedError, match="rank 1 failed in begin"):
        ours.mark(encode_index(index_of(ours, 2)))
    ours.close()


def test_a_complete_attempt_is_not_aborted_by_a_reused_start_id(storage):
    """Committed work of an earlier start is never spoilt by the refusal of a later one."""
    for rank in (1, 0):
        save(storage, PATH, 1, attempt="job-1", rank=rank, world_size=2, process="before")
    with pytest.raises(CommitError, match="start id of this job is not new"):
        rank_of(storage, 0)
    assert loaded_step(storage, PATH) == 1
    assert_clean(storage, PATH)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"step": 3}, "disagree on the step: expected 2, rank 1 has 3"),
        ({"agreement": "x"}, "disagree on the state they share"),
        ({"world_size": 3}, "disagree on the world size"),
        ({"attempt": "other"}, "disagree on the attempt"),
        ({"rank": 0}, "says it is rank 0's"),
        ({"files": [DataFile("checkpoint_0.pt", 1, 1)]}, "two ranks wrote a data file of the same name"),
    ],
)
def test_ranks_that_disagree_do_not_commit(storage, fields, message):
    """Marks that contradict each other are an error that names the rank, for all ranks."""
    other = rank_of(storage, 1, fields=fields)
    with pytest.raises(CommitError, match=message) as caught:
        save(storage, PATH, 2, attempt="job-1", rank=0, world_size=2)
    assert caught.value.path == PATH
    with pytest.raises(AbortedError, match="rank 0 failed"):
        other.complete()
    other.close()
    assert loaded_step(storage, PATH) is None


def test_a_file_that_vanishes_stops_the_commit(storage):
    """If somebody removes a data file before the commit, the save fails and says so."""
    attempt = arrive(storage, PATH, 2)
    storage.remove(attempt.data_path)
    with pytest.raises(CommitError, match="disappeared while it was saved"):
        attempt.complete()
    attempt.close()
    assert hidden(storage, PATH) == []


def test_the_manifest_is_the_same_whoever_writes_it():
    """Two committers write the same bytes: the time is the latest mark's, the rest rank 0's."""
    found = set()
    for committer in (0, 1):
        storage = MemoryStorage()
        make_folders(storage, "/run")
        for rank in (1 - committer, committer):
            fields = {"time": 100.0 + rank, "metadata": ("int", rank), "process": "p", "requires": []}
            save(storage, PATH, 2, attempt="job-1", rank=rank, world_size=2, fields=fields)
        found.add(tree(storage, PATH)["manifest.json"])
    assert len(found) == 1
    manifest = locate(storage, PATH).manifest
    assert manifest.time == 101.0
    assert manifest.metadata == ["int", 0]


def test_an_attachment_that_several_ranks_saw_is_listed_once(storage):
    """Each rank lists what it finds; a passing file that is gone at the commit is not part of it."""

    def hook(folder):
        put(storage, f"{folder}/shared.txt", b"one")
        put(storage, f"{folder}/passing.tmp", b"two")

    first = rank_of(storage, 1, hook=hook)
    storage.remove(f"{first.folder}/passing.tmp")
    storage.remove(f"{first.folder}/shared.txt")
    put(storage, f"{first.folder}/shared.txt", b"final")
    second = rank_of(storage, 0)
    assert second.complete()
    for attempt in (first, second):
        attempt.close()
    found = locate(storage, PATH)
    assert [(file.name, file.size) for file in found.manifest.attachments] == [("shared.txt", 5)]
    found.folder.close()
    assert loaded_step(storage, PATH) == 2


def test_an_attachment_changed_after_the_hooks_stops_the_commit(storage):
    """An attachment that is like none of the ranks saw it is not committed."""

    def hook(folder):
        put(storage, f"{folder}/shared.txt", b"one")

    first = rank_of(storage, 1, hook=hook)
    storage.remove(f"{first.folder}/shared.txt")
    put(storage, f"{first.folder}/shared.txt", b"two")
    second = rank_of(storage, 0)
    storage.remove(f"{first.folder}/shared.txt")
    put(storage, f"{first.folder}/shared.txt", b"three")
    with pytest.raises(CommitError, match=r"'shared.txt' was changed after pre_commit"):
        second.complete()
    for attempt in (first, second):
        attempt.close()


def test_ranks_of_other_processes_without_a_start_id_are_refused(storage):
    """Processes with private start ids would never come together: the second to begin says how they can."""
    first = begin(storage, PATH, attempt="p1-1", rank=0, world_size=2, process="p1", private=True)
    with pytest.raises(CommitError, match="does not share a start id") as caught:
        begin(storage, PATH, attempt="p2-1", rank=1, world_size=2, process="p2", private=True)
    assert "MILEPOST_START_ID" in caught.value.hint
    begin(storage, PATH, attempt="p1-1", rank=1, world_size=2, process="p1", private=True).close()
    first.close()
    begin(storage, PATH, attempt="p2-1", rank=1, world_size=2, process="p2", private=True).close()


# ---------------------------------------------------------------------------- waiting


def test_rank_0_says_that_all_have_arrived(storage):
    """Rank 0 waits for the marks and puts its word; the others see that alone."""
    late = []
    clock = StepClock(lambda: late or late.append(rank_of(storage, 1)))
    zero = rank_of(storage, 0, clock=clock.clock)
    zero.wait_for_marks(60)
    watched = FaultyStorage(storage)
    other = begin(watched, PATH, attempt="job-1", rank=1, world_size=2)
    before = len(watched.operations)
    other.wait_for_marks(60)
    assert [line.rpartition("/")[2] for line in watched.operations[before:]] == ["arrived.json"]
    for attempt in (zero, other, *late):
        attempt.close()


def test_a_rank_that_does_not_arrive_is_named_with_its_last_words(storage):
    """At the deadline the error names the missing ranks and what they were doing."""
    clock = StepClock()
    zero = rank_of(storage, 0, world_size=4, clock=clock.clock)
    slow = begin(storage, PATH, attempt="job-1", rank=2, world_size=4)
    slow.progress("write", 77)
    with pytest.raises(CommitTimeoutError) as caught:
        zero.wait_for_marks(600)
    message = str(caught.value)
    assert "ranks 1, 2, 3 did not arrive within 600 s" in message
    assert "rank 1: never began" in message
    assert "rank 2: write, 77 bytes" in message
    assert clock.now == pytest.approx(1600.0)
    zero.close()
    slow.close()


def test_a_rank_waits_for_itself_when_rank_0_stands_still(storage):
    """When rank 0's beacon has not changed for half a minute the others count for themselves."""
    zero = rank_of(storage, 0)
    zero.close()
    clock = StepClock()
    one = rank_of(storage, 1, clock=clock.clock)
    one.wait_for_marks(600)
    assert 1030 <= clock.now < 1040
    one.wait_for_commit(600)
    assert one.committed
    assert 1060 <= clock.now < 1080
    one.close()
    assert loaded_step(storage, PATH) == 2


def test_a_rank_trusts_rank_0_while_its_beacon_moves(storage):
    """While rank 0 gives signs of life the others keep waiting for its word."""
    clock = StepClock(lambda: zero.progress("commit", int(clock.now)))
    zero = rank_of(storage, 0, clock=clock.clock)
    one = rank_of(storage, 1, clock=clock.clock)
    with pytest.raises(CommitTimeoutError, match="all ranks arrived, but none committed within 300 s"):
        one.wait_for_commit(300)
    zero.close()
    one.close()


def test_waiting_for_the_commit_ends_with_it_and_makes_sure_of_it(storage):
    """The others return when rank 0 has committed, also when its checkpoint was replaced meanwhile."""
    zero, one, two = (rank_of(storage, rank, world_size=3) for rank in range(3))
    zero.wait_for_marks(60)
    assert zero.complete()
    one.wait_for_commit(60)
    assert one.committed
    save(storage, PATH, 5)
    two.wait_for_commit(60)
    assert two.committed
    for attempt in (zero, one, two):
        attempt.close()
    assert loaded_step(storage, PATH) == 5


def test_an_abort_stops_all_waiting_at_once(storage):
    """Whoever waits, or begins, or marks, or completes gets the error of the rank that failed."""
    zero, one, two = (rank_of(storage, rank, world_size=4) for rank in range(3))
    late = begin(storage, PATH, attempt="job-1", rank=3, world_size=4)
    two.abort(StorageError("write failed: no space left", phase="write"))
    for act in (
        lambda: zero.wait_for_marks(60),
        lambda: one.wait_for_marks(60),
        lambda: one.wait_for_commit(60),
        zero.complete,
        lambda: late.mark(encode_index(index_of(late, 2))),
        lambda: begin(storage, PATH, attempt="job-1", rank=3, world_size=4),
    ):
        with pytest.raises(
            AbortedError, match="rank 2 failed in write with StorageError: write failed"
        ) as caught:
            act()
        assert caught.value.rank == 2
    for attempt in (zero, one, two, late):
        attempt.close()
    assert loaded_step(storage, PATH) is None
    assert roll_forward(storage, PATH) == []
    assert clean_up(storage, PATH) != []


def test_an_abort_after_the_commit_does_nothing(storage):
    """A rank that fails after the commit cannot take it back."""
    zero, one = rank_of(storage, 0), rank_of(storage, 1)
    assert zero.complete()
    one.abort(ValueError("too late"))
    zero.abort(ValueError("too late"))
    for attempt in (zero, one):
        attempt.close()
    assert loaded_step(storage, PATH) == 2
    assert_clean(storage, PATH)


def test_an_abort_that_cannot_be_written_does_not_hide_the_error(storage):
    """`abort` and `close` never raise."""
    faulty = FaultyStorage(storage)
    attempts = [
        begin(faulty, PATH, attempt="one", rank=0, world_size=1),
        begin(faulty, PATH, attempt="job-1", rank=1, world_size=2),
    ]
    faulty.fail_at(len(faulty.operations) + 1, OSError(5, "broken"), times=None)
    for attempt in attempts:
        attempt.abort(ValueError("why"))
        attempt.close()


def test_the_last_rank_publishes_what_a_dead_one_committed(storage):
    """When the committer dies between commit and publishing, the last rank to leave publishes."""
    zero, one = rank_of(storage, 0), rank_of(storage, 1, clock=StepClock().clock)
    faulty = FaultyStorage(storage)
    zero._place._storage = faulty
    faulty.fail_at(1000, OSError(5, "never"))
    names = []

    def stop(operation, path):
        names.append(operation)
        if operation == "rename" and path == PATH:
            raise KeyboardInterrupt

    faulty.before = stop
    with pytest.raises(KeyboardInterrupt):
        zero.complete()
    let_die(zero)
    one.wait_for_commit(60)
    assert one.committed
    assert storage.stat(PATH) is None
    one.close()
    assert loaded_step(storage, PATH) == 2
    assert_clean(storage, PATH)


def test_an_attempt_belongs_to_the_process_that_began_it(tmp_path):
    """In a forked child close and abort do nothing."""
    storage = LocalStorage()
    path = str(tmp_path / "step")
    attempt = arrive(storage, check_target(storage, path).path, 1)

    def ends_it():
        attempt.abort(ValueError("child"))
        attempt.close()

    assert in_child(ends_it) == 0
    assert attempt.complete()
    attempt.close()
    assert loaded_step(storage, path) == 1


def test_the_note_says_who_began(storage):
    """attempt.json names the checkpoint, the attempt, and the process behind it."""
    attempt = begin(storage, PATH, attempt="job-1", rank=1, world_size=2)
    note = msgspec.json.decode(tree(storage, attempt.folder)["attempt.json"])
    assert (note["name"], note["attempt"], note["world_size"]) == ("step", "job-1", 2)
    assert (note["process"], note["pid"]) == (process_id(), os.getpid())
    attempt.close()


def test_a_rank_that_waits_for_the_commit_sees_it_at_its_path(tmp_path):
    """What rank 0 has committed and not yet put in its place is waited for, until it is there."""
    path, pauses = str(tmp_path / "step"), []

    def pause():
        pauses.append(None)
        if len(pauses) == 3:
            os.rename(waiter.folder, path)

    storage = LocalStorage()
    first = arrive(storage, path, 2, attempt="job-1", rank=0, world_size=2)
    waiter = arrive(storage, path, 2, attempt="job-1", rank=1, world_size=2, clock=StepClock(pause).clock)
    assert first.complete()
    os.rename(path, waiter.folder)  # as if it had not come so far
    waiter.wait_for_commit(60)
    assert len(pauses) == 3
    assert (tmp_path / "step" / "manifest.json").exists()
    for attempt in (waiter, first):
        attempt.close()


def test_a_save_that_another_rank_publishes_meanwhile_is_no_reason_to_warn(tmp_path, caplog):
    """A rank that finds its attempt unpublished at the end, and gone when it takes it over, says nothing."""
    path = str(tmp_path / "step")

    class Raced(LocalStorage):
        """Another rank publishes the attempt when this one is about to."""

        def is_network(self, folder):
            os.rename(folder, path)
            return super().is_network(folder)

    first, last = (
        arrive(storage, path, 2, attempt="job-1", rank=rank, world_size=2)
        for rank, storage in enumerate((Raced(), LocalStorage()))
    )
    assert last.complete()
    last.close()
    os.rename(path, first.folder)  # as if it had died before it could publish
    assert first.sees_commit()
    first.close()
    assert os.listdir(tmp_path) == ["step"]
    assert caplog.text == ""


# ---------------------------------------------------------------------------- what is not seen


class Stale(Wrapper):
    """Shows through an open folder only what was there when that was opened."""

    def open_folder(self, path):
        folder = Wrapper(self.inner.open_folder(path))
        names = folder.inner.names()
        folder.names = lambda: names
        return folder


class Fogged(Wrapper):
    """Shows in the folders of attempts only what `names` passes, once `on` is set."""

    on = True

    def open_folder(self, path):
        folder = Wrapper(self.inner.open_folder(path))
        if os.path.basename(path).startswith("."):
            folder.names = lambda: [] if self.on else folder.inner.names()
            folder.stat = lambda name: None if self.on else folder.inner.stat(name)
        return folder


def test_a_save_whose_mark_is_not_seen_raises_and_keeps_its_files(storage):
    """Where a listing hides what this rank wrote, the save raises, and what is whole is left and loads."""
    attempt = arrive(Stale(storage), PATH, 2)
    with pytest.raises(CommitError, match="does not show this rank's file") as caught:
        attempt.complete()
    assert "doctor" in caught.value.hint
    attempt.abort(caught.value)
    attempt.close()
    assert loaded_step(storage, PATH) == 2
    assert roll_forward(storage, PATH) == [attempt.folder]
    assert_clean(storage, PATH)


def test_a_rank_that_leaves_without_a_commit_keeps_what_is_whole(storage):
    """The only rank that is closed after its mark leaves a checkpoint that loads."""
    arrive(storage, PATH, 2).close()
    assert loaded_step(storage, PATH) == 2


@pytest.mark.parametrize("wait", ["wait_for_marks", "wait_for_commit", "complete"])
def test_an_empty_listing_is_no_commit(storage, wait):
    """A rank whose folder seems empty waits, and then raises: the checkpoint need not be committed."""
    fogged = Fogged(storage)
    fogged.on = False
    attempt = arrive(fogged, PATH, 2, attempt="job-1", rank=1, world_size=2, clock=StepClock().clock)
    fogged.on = True
    with pytest.raises(CommitError, match="does not show this rank's file"):
        attempt.complete() if wait == "complete" else getattr(attempt, wait)(60)
    assert not attempt.committed
    attempt.close()
    fogged.on = False
    assert rank_of(storage, 0).complete()
    assert loaded_step(storage, PATH) == 2


def test_what_is_cleared_counts_as_committed_only_when_a_later_checkpoint_is_there(storage):
    """A rank whose folder a later save has replaced and cleared knows it by what lies at the path."""
    first, waiter = (rank_of(storage, rank) for rank in range(2))
    assert first.complete()
    first.close()
    save(storage, PATH, 3)
    waiter.wait_for_marks(60)
    waiter.wait_for_commit(60)
    assert waiter.committed
    waiter.close()
    assert loaded_step(storage, PATH) == 3


def test_a_commit_that_is_not_seen_is_never_told_as_published(storage):
    """When a committed folder can be seen nowhere, the save raises; it does not return."""

    class Hides(Wrapper):
        def open_folder(self, path):
            if path == attempt.folder and storage.stat(f"{path}/manifest.json"):
                raise StorageError.wrap(FileNotFoundError(2, "No such file"), "open", path)
            return self.inner.open_folder(path)

    save(storage, PATH, 1)
    attempt = arrive(storage, PATH, 2)
    attempt._place._storage = Hides(storage)
    with pytest.raises(StorageError, match="committed, but its path does not show it"):
        attempt.complete()
    attempt.close()
    assert roll_forward(storage, PATH) == [attempt.folder]
    assert loaded_step(storage, PATH) == 2


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_save_that_comes_to_commit_after_a_later_one_replaces_nothing(storage, world_size):
    """Writers of a dead start that commit at last do not put their older step over a newer one."""
    slow = [
        arrive(storage, PATH, 1, attempt="dead-1", rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    save(storage, PATH, 2)
    for attempt in slow:
        attempt.complete()
        assert attempt.committed
        assert loaded_step(storage, PATH) == 2
        attempt.close()
    clean_up(storage, PATH)
    assert loaded_step(storage, PATH) == 2
    assert_clean(storage, PATH)
