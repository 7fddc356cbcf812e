"""Ranks that save in the background, of which one fails in a way of its own: they stay in step."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import Future

import pytest
import torch
from support.background import close, error_of, make, parts, writer_pid
from support.hooks import Full
from support.processes import PATIENCE, wait_until

from milepost.checkpoint_process import CheckpointProcess, LeanWriter
from milepost.checkpoint_reader import CheckpointReader
from milepost.checkpoint_writer import CheckpointWriter
from milepost.config import CheckpointProcessConfig, CheckpointWriterConfig
from milepost.errors import (
    AbortedError,
    LostWriterError,
    StateError,
    StorageError,
    TargetError,
    UnsupportedTypeError,
)
from milepost.staging import CheckpointStager
from milepost.types import RankInfo

CONFIG = CheckpointWriterConfig(start_id="start", write_barrier_timeout_secs=60)


def process(rank, **lean):
    return CheckpointProcess(RankInfo(rank, 2), CheckpointProcessConfig(), lean=LeanWriter(CONFIG, **lean))


def state(number):
    return {"v": torch.full((4,), float(number))}


def saved_at(path):
    """What each of the two ranks saved; None if nothing is committed."""
    if not os.path.exists(f"{path}/manifest.json"):
        return None
    readers = [CheckpointReader(RankInfo(rank, 2)) for rank in (0, 1)]
    return tuple(float(reader.read(path, together=False)[0]["v"][0]) for reader in readers)


def both_save(checkpointer, other, path, number):
    """A save of both ranks: one in the background, one at once; it commits."""
    written = checkpointer.save(path, state(number))[1]
    other.write(path, state(number))
    assert error_of(written) is None


@pytest.mark.parametrize("with_step", [False, True])
def test_a_rank_whose_save_raises_an_earlier_failure_stays_in_step(tmp_path, with_step):
    """What raises counts: later saves of a loop that logs what `save` raises are each of one step."""
    path = str(tmp_path / "latest")
    ranks = [make(Full(), rank_info=RankInfo(rank, 2), writer=CONFIG) for rank in (0, 1)]
    raised = []

    def save(rank, number, **kwargs):
        if with_step:
            kwargs["step"] = number
        try:
            written = ranks[rank].save(path, state(number), **kwargs)[1]
        except OSError:
            raised.append((rank, number))
            return
        wait_until(written.done)

    save(0, 1)  # has done its part when the other one fails
    save(1, 1, full=True)
    for number in range(2, 6):
        save(1, number)
        save(0, number)
        found = saved_at(path)
        assert found == (None if number == 2 else (number, number))
    assert raised == [(1, 2)]
    close(ranks[1])
    with pytest.raises(AbortedError, match="No space left"):
        ranks[0].close()


def test_writes_are_counted_when_they_are_called(tmp_path):
    """States that are staged in another order on one rank go with those of the same call on the others."""
    path = str(tmp_path / "latest")
    for rank, order in ((0, (1, 2)), (1, (2, 1))):
        writer = process(rank)
        states = {number: Future() for number in (1, 2)}
        written = {number: writer.write(states[number], path) for number in states}
        for number in order:
            states[number].set_result(state(number))
            assert error_of(written[number]) is None
        writer.close()
    assert saved_at(path) in ((1, 1), (2, 2))


def test_writes_of_processes_of_ones_own_stay_in_step_as_well(tmp_path):
    """Without a checkpointer or a look at any future, two ranks do not go on aborting each other."""
    path = str(tmp_path / "latest")
    writers = [process(rank, commit_hook=Full()) for rank in (0, 1)]
    raised = []

    def write(rank, number, **kwargs):
        try:
            written = writers[rank].write(state(number), path, **kwargs)
        except OSError:
            raised.append((rank, number))
            return
        wait_until(written.done)

    write(1, 1, full=True)
    write(0, 1)
    for number in range(2, 5):
        write(1, number)
        write(0, number)
        assert saved_at(path) == (None if number == 2 else (number, number))
    assert raised == [(1, 2)]
    writers[1].close()
    with pytest.raises(AbortedError):
        writers[0].close()


class Later(CheckpointStager):
    """Stages when the test says so, and refuses what is to be refused at once."""

    def __init__(self):
        self.staged = []

    def stage(self, state_dict, **_):
        if "refused" in state_dict:
            raise StateError("this cannot be saved")
        self.staged.append((Future(), state_dict))
        return self.staged[-1][0]

    def finish(self):
        for future, state_dict in self.staged:
            future.set_result({key: value.clone() for key, value in state_dict.items()})

    def close(self):
        pass


def test_a_save_that_is_refused_while_another_is_staged_is_not_taken_for_it(tmp_path):
    """The abort of the second save is the second's; the first one commits."""
    path, stager = str(tmp_path / "latest"), Later()
    other = CheckpointWriter(CONFIG, RankInfo(0, 2))
    with parts(stager=stager, process=process(1), max_in_flight=2) as checkpointer:
        written = checkpointer.save(path, state(1))[1]
        with pytest.raises(StateError):
            checkpointer.save(path, {"refused": 1})
        stager.finish()
        other.write(path, state(1))
        assert error_of(written) is None
        assert saved_at(path) == (1, 1)
        with pytest.raises(AbortedError, match="this cannot be saved"):
            other.write(path, state(2))
    other.close()


def test_a_retry_that_fails_before_it_is_handed_over_is_told(tmp_path, monkeypatch):
    """It is still the same save: the other rank hears of it, and the next save commits."""
    path = str(tmp_path / "latest")
    other = CheckpointWriter(CONFIG, RankInfo(0, 2))
    with parts(process=process(1)) as checkpointer:
        pid = writer_pid(checkpointer)
        os.kill(pid, signal.SIGSTOP)
        written = checkpointer.save(path, state(1))[1]

        def refuse(*_):
            monkeypatch.undo()
            raise StorageError("the share is gone")

        monkeypatch.setattr("milepost.checkpoint_process.check_target", refuse)
        os.kill(pid, signal.SIGKILL)
        assert isinstance(error_of(written), StorageError)
        with pytest.raises(AbortedError, match="the share is gone"):
            other.write(path, state(1))
        both_save(checkpointer, other, path, 2)
    other.close()
    assert saved_at(path) == (2, 2)


@pytest.mark.parametrize("on_failure", ["raise", "warn"])
def test_the_others_hear_of_a_writer_that_is_lost_for_good(tmp_path, on_failure):
    """They need not wait for its part until the time is over; the next save commits."""
    path = str(tmp_path / "latest")
    other = CheckpointWriter(CONFIG, RankInfo(0, 2))
    with parts(process=process(1), on_failure=on_failure) as checkpointer:
        pid = writer_pid(checkpointer)
        os.kill(pid, signal.SIGSTOP)
        written = checkpointer.save(path, state(1))[1]
        os.kill(pid, signal.SIGKILL)
        assert isinstance(error_of(written), LostWriterError)
        with pytest.raises(AbortedError, match="terminated unexpectedly"):
            other.write(path, state(1))
        both_save(checkpointer, other, path, 2)
    other.close()
    assert saved_at(path) == (2, 2)


def test_the_others_hear_of_a_write_that_cannot_be_handed_over(tmp_path, monkeypatch):
    """Whatever fails on the way to the writer is told."""
    path = str(tmp_path / "latest")
    other = CheckpointWriter(CONFIG, RankInfo(0, 2))
    with parts(process=process(1)) as checkpointer:
        writer_pid(checkpointer)

        def fail(*_):
            monkeypatch.undo()
            raise OSError(24, "Too many open files")

        monkeypatch.setattr("milepost.background.child.write_blob", fail)
        with pytest.raises(OSError, match="Too many open files"):
            checkpointer.save(path, state(1))
        with pytest.raises(AbortedError, match="Too many open files"):
            other.write(path, state(1))
    other.close()


# -- threads ---------------------------------------------------------------------------------------


def test_a_save_that_fails_does_not_stop_one_that_is_called_meanwhile(tmp_path):
    """While observers hear of a failure nobody can look at it yet, and another save need not wait for it."""
    ended = []

    class Observer:
        def on_event(self, event):
            if event.kind == "failed":
                self.save()

        def save(self):
            other = threading.Thread(target=lambda: checkpointer.save(str(tmp_path / "d"), state(2)))
            other.start()
            other.join(PATIENCE / 2)
            ended.append(not other.is_alive())

    with make(Full(), max_in_flight=2, observers=[Observer()]) as checkpointer:
        written = checkpointer.save(str(tmp_path / "c"), state(1), full=True)[1]
        assert isinstance(error_of(written), OSError)
        wait_until(lambda: ended)
        assert ended == [True]


def test_two_saves_without_memory_to_stage_do_not_wait_for_each_other(tmp_path, monkeypatch):
    """Each waits for those before it only."""
    with make(max_in_flight=2) as checkpointer:
        checkpointer._stager._available = lambda: 0
        both, really = threading.Barrier(2), checkpointer._save_without_staging

        def together(*arguments):
            both.wait(PATIENCE)
            really(*arguments)

        monkeypatch.setattr(checkpointer, "_save_without_staging", together)
        threads = [
            threading.Thread(target=checkpointer.save, args=(str(tmp_path / name), state(1)), daemon=True)
            for name in "ab"
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE / 2)
        assert not any(thread.is_alive() for thread in threads)
    assert {*os.listdir(tmp_path)} == {"a", "b"}


def test_a_path_that_is_refused_leaves_nothing_anywhere(tmp_path, monkeypatch):
    """Where a path is refused on a rank of several, no mark for the other ranks is made at what it is not."""
    monkeypatch.chdir(tmp_path)
    with parts(process=process(0)) as checkpointer:
        for path in ("s3://bucket/c", "~/c"):
            with pytest.raises(TargetError):
                checkpointer.save(path, state(1))
            with pytest.raises(UnsupportedTypeError):  # of which a save would tell the others at its path
                checkpointer.save(path, [])
    assert os.listdir(tmp_path) == []


def test_a_warning_of_the_writer_process_is_in_the_trainers_log(tmp_path, caplog):
    """What all ranks saved alike is told where somebody reads it, before the write future is done."""
    same = {"v": torch.arange(100_000)}
    with parts(process=process(0)) as first, parts(process=process(1)) as second:
        written = [each.save(str(tmp_path / "c"), same)[1] for each in (first, second)]
        assert [error_of(future) for future in written] == [None, None]
        told = [record for record in caplog.records if "are the same on all 2 ranks" in record.message]
        # Once for each rank that saw the last mark come: they may be both.
        assert {record.name for record in told} == {"milepost.commit.copies"}
