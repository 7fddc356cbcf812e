"""Trainers and writers that are killed at any moment of a save in the background."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
from support.background import (
    close,
    error_of,
    kill_writer,
    make,
    parts,
    result,
    state_of,
    step_at,
    writer_pid,
)
from support.hooks import Diary, Gate, KillOnce, KillsWriter
from support.processes import PATIENCE, in_child, is_running, wait_until
from support.saves import load

from milepost.checkpoint_process import CheckpointProcess, LeanWriter
from milepost.checkpoint_writer import CheckpointWriter
from milepost.config import BarrierConfig, CheckpointProcessConfig, CheckpointWriterConfig
from milepost.errors import CommitError, LostWriterError
from milepost.staging import CheckpointStager
from milepost.types import RankInfo


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def pid_of(tmp_path):
    return int((tmp_path / "pid").read_text())


def trainer(tmp_path, work, hook=None):
    """Run a trainer in a process of its own that saves and is killed; the writer's pid is in a file."""

    def train():
        torch.set_num_threads(1)
        checkpointer = make(hook)
        (tmp_path / "pid").write_text(str(checkpointer._process.process.pid))
        work(checkpointer)
        die()

    assert in_child(train) == -signal.SIGKILL


def check_committed(tmp_path, step):
    """The writer ends by itself, and the checkpoint is committed, verified, and alone."""
    wait_until(lambda: not is_running(pid_of(tmp_path)), "the end of the writer")
    assert step_at(tmp_path / "run" / "c") == step
    assert os.listdir(tmp_path / "run") == ["c"]


def test_a_trainer_that_is_killed_after_staging(tmp_path):
    """SIGKILL to the trainer right after `save` has returned: the checkpoint commits."""

    def work(checkpointer):
        writer_pid(checkpointer)
        checkpointer.save(str(tmp_path / "run" / "c"), state_of(1, 2_000_000))

    trainer(tmp_path, work)
    check_committed(tmp_path, 1)


def test_a_trainer_that_is_killed_while_the_writer_starts(tmp_path):
    """The same while the writer process is still starting."""
    trainer(tmp_path, lambda checkpointer: checkpointer.save(str(tmp_path / "run" / "c"), state_of(2)))
    check_committed(tmp_path, 2)


def test_a_trainer_that_is_killed_while_its_save_is_written(tmp_path):
    """The same in the middle of the save, with a hook that is still to run; it runs."""
    (tmp_path / "gate").mkdir()
    gate = Gate(tmp_path / "gate")

    def work(checkpointer):
        checkpointer.save(str(tmp_path / "run" / "c"), state_of(3))
        gate.wait_for_save()

    trainer(tmp_path, work, gate)
    assert is_running(pid_of(tmp_path))
    assert step_at(tmp_path / "run" / "c") is None
    gate.open()
    check_committed(tmp_path, 3)


def test_a_trainer_that_is_killed_with_replies_unread(tmp_path):
    """Replies that the trainer has not read hide no request: each save that was accepted commits."""
    paths = [str(tmp_path / "run" / f"c{n}") for n in range(3)]

    def work(checkpointer):
        process = checkpointer._process
        process.process_creation_future.result(PATIENCE)
        process._child._pass_on = lambda _: time.sleep(1000)  # from now on nothing is read
        for number, path in enumerate(paths):
            process.write(state_of(number), path)
        wait_until(lambda: os.path.exists(f"{paths[0]}/manifest.json"))

    trainer(tmp_path, work)
    wait_until(lambda: not is_running(pid_of(tmp_path)), "the end of the writer")
    assert [step_at(path) for path in paths] == [0, 1, 2]


def test_a_trainer_whose_data_loader_lives_on(tmp_path):
    """A forked process that holds the trainer's end of the line does not keep the writer from ending."""

    def work(checkpointer):
        writer_pid(checkpointer)
        worker = os.fork()
        if worker == 0:
            signal.pause()
        (tmp_path / "worker").write_text(str(worker))
        checkpointer.save(str(tmp_path / "run" / "c"), state_of(4))

    trainer(tmp_path, work)
    check_committed(tmp_path, 4)
    os.kill(int((tmp_path / "worker").read_text()), signal.SIGKILL)


def test_a_trainer_that_dies_without_a_save(tmp_path):
    """A writer whose trainer is gone ends, though it was never asked for anything."""
    trainer(tmp_path, writer_pid)
    wait_until(lambda: not is_running(pid_of(tmp_path)), "the end of the writer")


def test_a_trainer_that_is_killed_leaves_the_checkpoint_of_before(tmp_path):
    """When trainer and writer are both killed, the old checkpoint loads, and the next save tidies up."""
    (tmp_path / "gate").mkdir()
    path, gate = str(tmp_path / "run" / "c"), Gate(tmp_path / "gate")
    with make() as checkpointer:
        result(checkpointer.save(path, state_of(1))[1])

    def work(checkpointer):
        checkpointer.save(path, state_of(2))
        gate.wait_for_save()
        kill_writer(checkpointer)

    trainer(tmp_path, work, gate)
    wait_until(lambda: not is_running(pid_of(tmp_path)))
    assert step_at(path) == 1
    assert len(os.listdir(tmp_path / "run")) == 2
    with make() as checkpointer:
        result(checkpointer.save(path, state_of(3))[1])
    check_committed(tmp_path, 3)


# -- lost writers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("replace", [False, True], ids=["new", "replacing"])
@pytest.mark.parametrize("stride", [15, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.timeout(900)
def test_a_writer_that_is_killed_at_any_operation_is_replaced(tmp_path, replace, stride):
    """Killed before any change to the disk, the save goes on with a fresh writer and commits once, whole."""
    number = 1 - stride
    while True:
        number += stride
        folder = tmp_path / str(number)
        folder.mkdir()
        path, diary = str(folder / "run" / "c"), Diary(folder / "diary")
        if replace:
            with make() as checkpointer:
                result(checkpointer.save(path, state_of(1))[1])
        lean = LeanWriter(commit_hook=diary, storage=KillsWriter(number, str(folder / "killed")))
        with parts(lean) as checkpointer:
            pid = writer_pid(checkpointer)
            assert error_of(checkpointer.save(path, state_of(2), step=2)[1]) is None
            survived = writer_pid(checkpointer) == pid
        assert step_at(path) == 2
        if os.listdir(folder / "run") != ["c"]:  # the old one was being removed: the next save does it
            with make() as checkpointer:
                result(checkpointer.save(path, state_of(3))[1])
        assert os.listdir(folder / "run") == ["c"], f"killed at operation {number}"
        posts = diary.lines().count("post c 2")
        assert posts == 1 or (posts == 0 and not survived), "never twice"
        if survived:
            assert number > 10
            return


@pytest.mark.parametrize("kind", ["pre", "post"])
def test_a_writer_that_is_killed_in_a_hook(tmp_path, kind):
    """pre_commit may be called again by a fresh writer, post_commit is not; the checkpoint is whole."""
    hook = KillOnce(tmp_path / "calls", kind)
    with make(hook) as checkpointer:
        assert error_of(checkpointer.save(str(tmp_path / "c"), state_of(1))[1]) is None
    assert hook.lines() == (["pre", "pre", "post"] if kind == "pre" else ["pre", "post"])
    assert step_at(tmp_path / "c") == 1


def stopped(checkpointer):
    """The pid of the writer, which is stopped: what is sent to it waits."""
    pid = writer_pid(checkpointer)
    os.kill(pid, signal.SIGSTOP)
    return pid


def test_each_loss_is_retried_as_often_as_told(tmp_path):
    """With retries=2 a save survives two lost writers, with one lost more it fails."""
    for losses, survives in ((2, True), (3, False)):
        path = str(tmp_path / str(losses))
        checkpointer = make(retries=2)
        pid = stopped(checkpointer)
        written = checkpointer.save(path, state_of(losses))[1]
        for loss in range(losses):
            if loss < losses - 1:
                stop_next(checkpointer, pid)
            os.kill(pid, signal.SIGKILL)
            if loss < losses - 1:
                wait_until(lambda old=pid, made=checkpointer: made._process.process.pid != old)
                pid = checkpointer._process.process.pid
        assert (error_of(written) is None) is survives
        close(checkpointer)
        assert step_at(path) == (losses if survives else None)


def stop_next(checkpointer, pid):
    """Have the next writer be stopped as soon as it is started."""
    import milepost.checkpoint_process as module

    real = module.Child

    def child(orders):
        made = real(orders)
        os.kill(made.handle.pid, signal.SIGSTOP)
        module.Child = real
        return made

    module.Child = child


def test_a_writer_whose_end_is_not_known_yet_is_lost_once(tmp_path, monkeypatch):
    """Its line is closed a moment before its end can be seen: what it cannot take a fresh one gets."""
    with make(retries=1) as checkpointer:
        pid = writer_pid(checkpointer)
        monkeypatch.setattr(checkpointer._process._child.channel, "send", lambda *_: False)
        os.kill(pid, signal.SIGSTOP)  # so that nothing else tells
        assert error_of(checkpointer.save(str(tmp_path / "c"), state_of(1))[1]) is None
        assert writer_pid(checkpointer) != pid
    assert step_at(tmp_path / "c") == 1


class Copies(CheckpointStager):
    """A stager of the user's own, which knows nothing of arenas."""

    def stage(self, state_dict, **_):
        return {key: value.clone() for key, value in state_dict.items()}

    def close(self):
        pass


def test_a_rank_of_several_with_a_stager_of_its_own_retries_as_the_same_attempt(tmp_path):
    """What a fresh writer writes belongs to what the other ranks write, whoever has staged it."""
    path, config = str(tmp_path / "c"), CheckpointWriterConfig(start_id="start")
    other = CheckpointWriter(config, RankInfo(1, 2))
    process = CheckpointProcess(RankInfo(0, 2), CheckpointProcessConfig(), lean=LeanWriter(config))
    with parts(stager=Copies(), process=process) as checkpointer:
        for step in (1, 2):  # the second time as well: the ranks count alike
            state = {"w": torch.full((10,), float(step))}
            pid = stopped(checkpointer)
            written = checkpointer.save(path, state, step=step)[1]
            os.kill(pid, signal.SIGKILL)
            assert error_of(written) is None
            other.write(path, state, step=step)
            assert float(load(path)["w"][0]) == step
    other.close()


@pytest.mark.parametrize("on_failure", ["raise", "warn"])
def test_a_lost_writer_may_be_left_lost(tmp_path, on_failure, caplog):
    """With "raise" the save fails and is raised by the next; with "warn" it is a warning. The next works."""
    with make(on_failure=on_failure) as checkpointer:
        pid = stopped(checkpointer)
        written = checkpointer.save(str(tmp_path / "c"), state_of(1))[1]
        os.kill(pid, signal.SIGKILL)
        wait_until(written.done)
        if on_failure == "raise":
            with pytest.raises(LostWriterError, match="terminated unexpectedly"):
                checkpointer.save(str(tmp_path / "c"), state_of(2))
        else:
            assert "was not saved" in caplog.text
        result(checkpointer.save(str(tmp_path / "c"), state_of(2))[1])
        if on_failure == "warn":
            assert isinstance(written.exception(), LostWriterError)
    assert step_at(tmp_path / "c") == 2
    caplog.clear()


@pytest.mark.parametrize("then", ["retry", "raise", "warn", "retry in vain"])
def test_a_lost_writer_leaves_no_memory_taken(tmp_path, then):
    """The next save finds the memory that the lost one was staged into, though it is all there is."""
    on_failure, retries = then.split()[0], 0 if then == "retry in vain" else 1
    with make(on_failure=on_failure, retries=retries, on_low_memory="raise") as checkpointer:
        pid = stopped(checkpointer)
        written = checkpointer.save(str(tmp_path / "c"), state_of(1))[1]
        checkpointer._stager._available = lambda: 0
        os.kill(pid, signal.SIGKILL)
        wait_until(written.done)
        assert isinstance(error_of(written), type(None) if then == "retry" else LostWriterError)
        result(checkpointer.save(str(tmp_path / "c"), state_of(2))[1])
    assert step_at(tmp_path / "c") == 2


def test_several_saves_in_flight_survive_their_writer(tmp_path):
    """All saves that a lost writer had accepted are written by the next one."""
    with make(max_in_flight=3) as checkpointer:
        pid = stopped(checkpointer)
        futures = [checkpointer.save(str(tmp_path / f"c{n}"), state_of(n))[1] for n in range(3)]
        os.kill(pid, signal.SIGKILL)
        assert [error_of(future) for future in futures] == [None] * 3
    assert [step_at(tmp_path / f"c{n}") for n in range(3)] == [0, 1, 2]


def test_a_writer_is_lost_while_the_checkpointer_closes(tmp_path):
    """`close` waits for the retry as well."""
    checkpointer = make()
    pid = stopped(checkpointer)
    written = checkpointer.save(str(tmp_path / "c"), state_of(1))[1]
    if os.fork() == 0:
        time.sleep(0.2)  # about when close waits; before it, the test shows less, not something else
        os.kill(pid, signal.SIGKILL)
        os._exit(0)
    checkpointer.close()
    assert written.exception(0) is None
    os.wait()
    assert step_at(tmp_path / "c") == 1


class Meeting:
    """A barrier of one that counts, and can be made to kill the writer."""

    def __init__(self):
        self.calls, self.kill = 0, None

    def execute_barrier(self):
        self.calls += 1
        if self.kill is not None:
            os.kill(self.kill, signal.SIGKILL)


def test_the_barrier_is_met_once_however_often_the_writer_is_lost(tmp_path):
    """A writer that is lost while its trainer is at the barrier is replaced without meeting again."""
    barrier = Meeting()
    with parts(LeanWriter(barrier=barrier)) as checkpointer:
        barrier.kill = writer_pid(checkpointer)
        assert error_of(checkpointer.save(str(tmp_path / "c"), state_of(1))[1]) is None
        assert barrier.calls == 1
        barrier.kill = None
        result(checkpointer.save(str(tmp_path / "c"), state_of(2))[1])
        assert barrier.calls == 2
    assert step_at(tmp_path / "c") == 2


def test_a_barrier_that_fails_fails_the_save(tmp_path):
    """What the barrier raises in the trainer is in the save's CommitError; the next save works."""

    class Broken(Meeting):
        def execute_barrier(self):
            super().execute_barrier()
            if self.calls == 1:
                raise ConnectionError("the others are gone")

    with parts(LeanWriter(barrier=Broken())) as checkpointer:
        error = error_of(checkpointer.save(str(tmp_path / "c"), state_of(1))[1])
        assert isinstance(error, CommitError)
        assert "the barrier failed: ConnectionError: the others are gone" in str(error)
        assert (error.path, error.rank, error.phase) == (str(tmp_path / "c"), 0, "barrier")
        result(checkpointer.save(str(tmp_path / "c"), state_of(2))[1])
    assert step_at(tmp_path / "c") == 2


def test_a_barrier_that_never_returns_fails_the_save(tmp_path):
    """The writer waits for the barrier no longer than write_barrier_timeout_secs."""
    import threading

    class Endless(Meeting):
        over = threading.Event()

        def execute_barrier(self):
            self.over.wait(PATIENCE)

    barrier = Endless()
    with parts(LeanWriter(CheckpointWriterConfig(write_barrier_timeout_secs=1), barrier)) as checkpointer:
        error = error_of(checkpointer.save(str(tmp_path / "c"), state_of(1))[1])
        assert isinstance(error, TimeoutError)
        assert "has not passed the barrier" in str(error)
        barrier.over.set()


def test_a_rank_that_waits_for_another_gives_up_in_time(tmp_path):
    """With a barrier configured and a rank that never comes, the save fails naming it, within its time."""
    config = CheckpointWriterConfig(write_barrier_timeout_secs=1, start_id="t")
    lean = LeanWriter(config, Meeting())
    from milepost.checkpoint_process import CheckpointProcess
    from milepost.config import CheckpointProcessConfig

    process = CheckpointProcess(RankInfo(0, 2), CheckpointProcessConfig(), lean=lean)
    with parts(process=process) as checkpointer:
        error = error_of(checkpointer.save(str(tmp_path / "c"), state_of(1))[1])
    assert isinstance(error, TimeoutError)
    assert "1" in str(error)
    assert not (tmp_path / "c").exists()


def test_no_barrier_of_the_training_group():
    """dist_barrier is refused when an async checkpointer is built."""
    with pytest.raises(ValueError, match="dist_barrier"):
        make(barrier=BarrierConfig("dist_barrier"))


def test_a_lost_writer_leaves_the_staged_state_intact(tmp_path):
    """What the fresh writer writes is what was staged, though the training has gone on meanwhile."""
    state = state_of(1)
    with make() as checkpointer:
        pid = stopped(checkpointer)
        written = checkpointer.save(str(tmp_path / "c"), state)[1]
        state["w"].fill_(99)
        os.kill(pid, signal.SIGKILL)
        result(written)
    assert load(tmp_path / "c")["w"].tolist() == [1.0] * 1000
