"""Saves in the background that fail, saves that meet, and checkpointers that are not closed."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import warnings

import pytest
from background import (
    ONE,
    Diary,
    Gate,
    arenas,
    close,
    error_of,
    is_running,
    make,
    parts,
    result,
    state_of,
    step_at,
    wait_until,
    writer_pid,
)
from scenarios import in_child

from milepost.checkpoint_process import CheckpointProcess, LeanWriter
from milepost.checkpoint_writer import CheckpointWriter, CheckpointWriterConfig
from milepost.config import CheckpointProcessConfig
from milepost.errors import (
    AbortedError,
    ClosedError,
    ConfigError,
    LowMemoryError,
    PostCommitError,
    StorageError,
    TargetError,
)
from milepost.staging import DefaultStager
from milepost.state.encode import StateEncoder
from milepost.storage import default_storage
from milepost.testing import FaultyStorage
from milepost.types import RankInfo


@pytest.mark.parametrize("operation", ["create", "write", "finish", "make_folder"])
def test_a_full_disk_fails_that_save(tmp_path, operation):
    """ENOSPC in the writer is the future's error, with type, errno, path and the writer's traceback."""
    storage = FaultyStorage(default_storage(), counts={operation})
    lean = LeanWriter(storage=storage.fail_at(1, OSError(errno.ENOSPC, "No space left on device")))
    with parts(lean) as checkpointer:
        pid = writer_pid(checkpointer)
        error = error_of(checkpointer.save(str(tmp_path / "c"), state_of(1))[1])
        assert isinstance(error, StorageError)
        assert isinstance(error, OSError)
        assert error.errno == errno.ENOSPC
        assert "free space" in str(error)
        assert "Traceback" in "".join(error.__notes__)
        assert step_at(tmp_path / "c") is None
        result(checkpointer.save(str(tmp_path / "c"), state_of(2))[1])
        assert writer_pid(checkpointer) == pid, "a full disk is no reason for a fresh writer"
    assert step_at(tmp_path / "c") == 2
    assert os.listdir(tmp_path) == ["c"]


def test_a_folder_that_vanishes_fails_that_save(tmp_path):
    """If the folder goes away under a save, the save fails and the next one makes it anew."""
    (tmp_path / "gate").mkdir()
    gate, path = Gate(tmp_path / "gate"), str(tmp_path / "run" / "c")
    with make(gate) as checkpointer:
        written = checkpointer.save(path, state_of(1))[1]
        gate.wait_for_save()
        shutil.rmtree(tmp_path / "run")
        gate.open()
        assert isinstance(error_of(written), OSError | RuntimeError)
        written = checkpointer.save(path, state_of(2))[1]
        gate.wait_for_save()
        gate.open()
        result(written)
    assert step_at(path) == 2


@pytest.mark.parametrize("kind", ["pre", "post"])
def test_a_hook_that_raises(tmp_path, kind):
    """A hook's error is the save's; after post_commit the checkpoint is there all the same."""
    hook = Diary(tmp_path / "diary", fail=kind)
    with make(hook) as checkpointer:
        error = error_of(checkpointer.save(str(tmp_path / "c"), state_of(1), step=1)[1])
        assert "the hook is broken" in str(error)
        assert "background.py" in "".join(error.__notes__)
        assert isinstance(error, ValueError if kind == "pre" else PostCommitError)
        assert step_at(tmp_path / "c") == (None if kind == "pre" else 1)
    assert hook.lines() == (["pre c 1"] if kind == "pre" else ["pre c 1", "post c 1"])


def test_hooks_get_the_path_as_given_and_every_keyword(tmp_path, monkeypatch):
    """Relative paths and keyword arguments reach the hooks in the writer process."""
    monkeypatch.chdir(tmp_path)
    hook = Diary(tmp_path / "diary")
    with make(hook) as checkpointer:
        result(checkpointer.save("rel/c", state_of(1), step=5, more={"x": 1})[1])
    assert hook.lines() == ["pre c 5", "post c 5"]
    assert step_at(tmp_path / "rel" / "c") == 1


def test_a_failure_that_nobody_has_looked_at_is_raised_once(tmp_path):
    """The next save raises it and stages nothing; calling it again saves. A failure that was seen is not."""
    with make(Diary(tmp_path / "diary", fail="pre")) as checkpointer:
        written = checkpointer.save(str(tmp_path / "c"), state_of(1), step=1)[1]
        wait_until(written.done)
        slots = list(checkpointer._stager._slots)
        with pytest.raises(ValueError, match="the hook is broken") as caught:
            checkpointer.save(str(tmp_path / "d"), state_of(2))
        text, first, second = str(caught.value), str(tmp_path / "c"), str(tmp_path / "d")
        assert f"the save of step 1 to {first} has failed, and this save to {second} was not made" in text
        assert "call save again" in caught.value.hint
        assert caught.value.__cause__ is written.exception()
        assert not (tmp_path / "d").exists()
        assert checkpointer._stager._slots == slots
        assert error_of(checkpointer.save(str(tmp_path / "c"), state_of(2))[1]) is not None
        assert error_of(checkpointer.save(str(tmp_path / "c"), state_of(3))[1]) is not None


def test_a_save_that_fails_while_another_waits_is_raised_by_that(tmp_path):
    """A save that had to wait for one that fails raises that failure, before it stages anything."""
    (tmp_path / "gate").mkdir()
    gate = Gate(tmp_path / "gate")
    with make(gate) as checkpointer:
        checkpointer.save(str(tmp_path / "run" / "c"), state_of(1))
        gate.wait_for_save()
        shutil.rmtree(tmp_path / "run")
        threading.Timer(0.1, gate.open).start()
        with pytest.raises((OSError, RuntimeError)):
            checkpointer.save(str(tmp_path / "run" / "c"), state_of(2))


@pytest.mark.parametrize("error", [ValueError("nan loss"), KeyboardInterrupt(), SystemExit(3)])
def test_a_failed_save_never_hides_what_a_block_raises(tmp_path, error, caplog):
    """What the block raises comes out of `with`; the save that failed too is a note on it, and in the log."""
    with pytest.raises(type(error)) as caught, make(Diary(tmp_path / "diary", fail="pre")) as checkpointer:
        wait_until(checkpointer.save(str(tmp_path / "c"), state_of(1))[1].done)
        raise error
    assert caught.value is error
    assert "the hook is broken" in error.__notes__[0]
    assert "the hook is broken" in caplog.text
    del error.__notes__


def test_a_failed_save_fails_a_block_that_ends_well(tmp_path):
    """A block that ends, or calls sys.exit() for success, raises the failure of its save."""
    for end in (lambda: None, sys.exit):
        with (
            pytest.raises(ValueError, match="the hook is broken"),
            make(Diary(tmp_path / "diary", fail="pre")) as checkpointer,
        ):
            checkpointer.save(str(tmp_path / "c"), state_of(1))
            end()


def test_close_raises_what_nobody_has_looked_at_and_frees_everything(tmp_path):
    """`close` raises the failure, once; process, arenas and threads are gone all the same."""
    before = arenas()
    checkpointer = make(Diary(tmp_path / "diary", fail="pre"))
    pid = writer_pid(checkpointer)
    checkpointer.save(str(tmp_path / "c"), state_of(1))
    with pytest.raises(ValueError, match="the hook is broken"):
        checkpointer.close()
    assert not is_running(pid)
    assert arenas() == before
    checkpointer.close()
    for call in (checkpointer.save, checkpointer.load):
        with pytest.raises(ClosedError):
            call(str(tmp_path / "c"), state_of(1))


def test_close_frees_everything_though_its_parts_fail(tmp_path):
    """If closing the stager fails, the process is ended, and the error is raised."""
    checkpointer = make()
    pid = writer_pid(checkpointer)
    real = checkpointer._stager.close

    def broken():
        real()
        raise OSError("cannot be closed")

    checkpointer._stager.close = broken
    with pytest.raises(OSError, match="cannot be closed"):
        checkpointer.close()
    assert not is_running(pid)
    del checkpointer._stager.close


def test_an_impossible_target_is_refused_at_once(tmp_path):
    """A path that may not be replaced raises in `save` itself, and the next save works."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("x")
    with make() as checkpointer:
        with pytest.raises(TargetError):
            checkpointer.save(str(tmp_path / "mine"), state_of(1))
        result(checkpointer.save(str(tmp_path / "c"), state_of(1))[1])


# -- in flight -------------------------------------------------------------------------------------


def test_saves_commit_in_their_order_one_at_a_time(tmp_path):
    """With max_in_flight=1 a save waits until the one before is committed."""
    diary, gate_folder = Diary(tmp_path / "diary"), tmp_path / "gate"
    gate_folder.mkdir()
    with make(diary) as checkpointer:
        futures = [checkpointer.save(str(tmp_path / f"c{n}"), state_of(n), step=n)[1] for n in range(4)]
        assert all(future.done() or future is futures[-1] for future in futures)
        result(futures[-1])
        assert len(checkpointer._stager._slots) == 1
    assert diary.lines() == [f"{kind} c{n} {n}" for n in range(4) for kind in ("pre", "post")]


def test_several_saves_may_be_under_way(tmp_path):
    """With max_in_flight=3 three saves are accepted at once, each in an arena; they commit in order."""
    (tmp_path / "gate").mkdir()
    gate = Gate(tmp_path / "gate")
    with make(gate, max_in_flight=3) as checkpointer:
        futures = [checkpointer.save(str(tmp_path / "c"), state_of(n), step=n)[1] for n in range(3)]
        gate.wait_for_save()
        assert not any(future.done() for future in futures)
        assert len(checkpointer._stager._slots) == 3
        for number in range(3):
            if number:
                gate.wait_for_save()
            gate.open()
            result(futures[number])
            assert step_at(tmp_path / "c") == number
            assert [future.done() for future in futures] == [n <= number for n in range(3)]
    assert not any(future.skipped for future in futures)


def test_a_busy_checkpointer_may_skip(tmp_path):
    """With when_busy="skip" both futures of a save too many are done at once, with `skipped` True."""
    (tmp_path / "gate").mkdir()
    gate = Gate(tmp_path / "gate")
    with make(gate, when_busy="skip") as checkpointer:
        first = checkpointer.save(str(tmp_path / "c"), state_of(1))[1]
        gate.wait_for_save()
        for future in checkpointer.save(str(tmp_path / "d"), state_of(2)):
            assert future.done()
            assert future.skipped
            assert future.result() is None
            assert future.finished_at is not None
        gate.open()
        result(first)
        assert not first.skipped
    assert not (tmp_path / "d").exists()


def test_a_rank_without_memory_to_stage_tells_the_others(tmp_path):
    """With on_low_memory="raise" the other ranks hear of it at once, and the next save commits."""
    path, config = str(tmp_path / "c"), CheckpointWriterConfig(start_id="start")
    left = [0]
    process = CheckpointProcess(RankInfo(0, 2), CheckpointProcessConfig(), lean=LeanWriter(config))
    stager = DefaultStager(available=lambda: left[0], encoder=StateEncoder(RankInfo(0, 2)))
    other = CheckpointWriter(config, RankInfo(1, 2))
    with parts(stager=stager, process=process, on_low_memory="raise") as checkpointer:
        with pytest.raises(LowMemoryError):
            checkpointer.save(path, state_of(1))
        with pytest.raises(AbortedError, match=r"rank 0 .*LowMemoryError"):
            other.write(path, state_of(1))
        left[0] = 1 << 40
        assert error_of(checkpointer.save(path, state_of(2))[1]) is None
        other.write(path, state_of(2))
        assert step_at(path) == 2
    other.close()


def test_a_target_that_one_rank_may_not_write_to_is_told_to_the_others(tmp_path):
    """The check of a target is part of the save: it counts, and the other ranks need not wait."""

    class Refused(FaultyStorage):
        refuse = True

        def stat(self, path):
            if self.refuse and path == str(tmp_path / "c"):
                raise StorageError("stat failed: permission denied")
            return super().stat(path)

    path, config = str(tmp_path / "c"), CheckpointWriterConfig(start_id="start")
    storage = Refused(default_storage())
    first, other = (
        CheckpointWriter(config, RankInfo(0, 2), storage=storage),
        CheckpointWriter(config, RankInfo(1, 2)),
    )
    with pytest.raises(TargetError, match="permission denied"):
        first.write(path, state_of(1))
    with pytest.raises(AbortedError, match=r"rank 0 .*TargetError"):
        other.write(path, state_of(1))
    storage.refuse = False
    for writer in (first, other):
        writer.write(path, state_of(2))
        writer.close()
    assert step_at(path) == 2


def test_ranks_may_not_skip():
    """Several ranks would skip different saves: a ConfigError when the checkpointer is built."""
    with pytest.raises(ConfigError, match="skip"):
        make(when_busy="skip", rank_info=RankInfo(0, 2))


def test_load_waits_for_a_save_to_its_path(tmp_path):
    """`load` of a path that is being saved returns what is being saved."""
    with make(max_in_flight=2) as checkpointer:
        checkpointer.save(str(tmp_path / "c"), state_of(1, 3_000_000))
        checkpointer.save(str(tmp_path / "c"), state_of(2, 3_000_000))
        assert checkpointer.load(str(tmp_path / "c"))["step"] == 2


def test_futures_cannot_be_cancelled(tmp_path):
    """`cancel` says no, and the save goes on."""
    with make() as checkpointer:
        futures = checkpointer.save(str(tmp_path / "c"), state_of(1))
        assert [future.cancel() for future in futures] == [False, False]
        result(futures[1])
    assert step_at(tmp_path / "c") == 1


# -- not closed, and forked ------------------------------------------------------------------------


def test_an_unclosed_checkpointer_that_is_collected_warns_and_loses_nothing(tmp_path):
    """Dropping a checkpointer is a ResourceWarning; its saves commit, and its process and memory go."""
    before, paths = arenas(), [str(tmp_path / f"c{n}") for n in range(2)]
    checkpointer = make(max_in_flight=2)
    pid = writer_pid(checkpointer)
    for number, path in enumerate(paths):
        checkpointer.save(path, state_of(number))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del checkpointer
        gc.collect()
        wait_until(lambda: not is_running(pid), "the end of the writer")
        gc.collect()
    assert any(
        issubclass(item.category, ResourceWarning) and "not closed" in str(item.message) for item in caught
    )
    assert [step_at(path) for path in paths] == [0, 1]
    wait_until(lambda: gc.collect() >= 0 and arenas() == before, "the end of the arenas")


def test_a_forked_process_disturbs_nothing(tmp_path):
    """A forked child that saves is refused; one that closes, or exits, leaves the save under way alone."""
    (tmp_path / "gate").mkdir()
    gate = Gate(tmp_path / "gate")

    def use_it():
        for call in (checkpointer.save, checkpointer.load):
            with pytest.raises(ClosedError, match="forked"):
                call(str(tmp_path / "d"), state_of(9))
        checkpointer.close()
        checkpointer._finalizer()

    with make(gate) as checkpointer:
        written = checkpointer.save(str(tmp_path / "c"), state_of(1))[1]
        gate.wait_for_save()
        assert in_child(use_it) == 0
        gate.open()
        result(written)
    assert step_at(tmp_path / "c") == 1


def run(tmp_path, code):
    """Run a program that must end by itself, with exit code 0."""
    code = "import torch, milepost\ncheckpointer = milepost.make_async_checkpointer()\n" + textwrap.dedent(
        code
    )
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code, str(tmp_path)],
        capture_output=True, text=True, timeout=120, check=True, cwd=tmp_path,
    )  # fmt: skip


def test_an_interpreter_that_exits_without_close_waits(tmp_path):
    """At the end of the program the save that is under way is finished, with a ResourceWarning."""
    done = run(tmp_path, 'checkpointer.save("c", {"w": torch.ones(5_000_000), "step": 1}, step=1)')
    assert step_at(tmp_path / "c") == 1
    assert "ResourceWarning: an AsyncCheckpointer was not closed" in done.stderr


FAILS_AT_EXIT = """
import atexit, sys
import milepost, torch

class Hook(milepost.WriterHook):
    def pre_commit(self, path, **kwargs):
        if kwargs["fail"]:
            raise OSError("the disk is gone")
    def post_commit(self, path, **kwargs):
        pass

if __name__ == "__main__":
    atexit.register(print, "the last handler")
    checkpointer = milepost.make_async_checkpointer(commit_hook=Hook())
    for step, fail in enumerate(sys.argv[1:]):
        written = checkpointer.save(f"c{step}", {"w": torch.ones(3)}, fail=fail == "bad")[1]
        if fail == "seen":
            written.exception()
    print("the end")
"""


@pytest.mark.parametrize(("saves", "code"), [(["bad"], 1), (["good", "good"], 0), (["good", "bad"], 1)])
def test_a_save_that_fails_at_exit_fails_the_program(tmp_path, saves, code):
    """If the last save fails while the interpreter ends, the exit code is 1, after all else at exit."""
    (tmp_path / "train.py").write_text(FAILS_AT_EXIT)
    done = subprocess.run(
        [sys.executable, "train.py", *saves],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (code, "the end\nthe last handler\n"), done.stderr
    assert ("was not saved, and nobody has looked: the disk is gone" in done.stderr) == bool(code)


def test_replicas_are_still_staged_while_the_interpreter_ends(tmp_path):
    """What is staged in the background at the end of a program is compared with its replicas as well."""
    done = run(
        tmp_path,
        """
        import threading, time
        import concurrent.futures.thread as pools
        from milepost.staging import DefaultStager
        from milepost.state.encode import StateEncoder

        def stage_late():
            while not pools._shutdown:
                time.sleep(0.001)
            stager = DefaultStager(encoder=StateEncoder(milepost.RankInfo(0, 2), ["w"]))
            print("staged", len(stager.stage({"w": torch.ones(5_000_000)})["w"]))
            stager.close()

        checkpointer.close()
        threading.Thread(target=stage_late).start()
        """,
    )
    assert done.stdout == "staged 2500000\n"


def test_a_checkpointer_by_hand_needs_no_more_than_its_parts(tmp_path):
    """A stager and a process without `prepare`, `plan` or figures make a checkpointer."""
    from concurrent.futures import Future

    class Stager:
        def stage(self, state_dict, **kwargs):
            return dict(state_dict)

        def close(self):
            pass

    class Process:
        def write(self, state_dict, path, **kwargs):
            writer = CheckpointWriter(CheckpointWriterConfig(), ONE)
            writer.write(path, state_dict, **kwargs)
            writer.close()
            future = Future()
            future.set_result(None)
            return future

        def close(self):
            pass

    with parts(stager=Stager(), process=Process()) as checkpointer:
        checkpointer.prepare(state_of(1))
        with pytest.raises(ConfigError, match="no plan"):
            checkpointer.plan(state_of(1))
        result(checkpointer.save(str(tmp_path / "c"), state_of(1), step=1)[1])
        close(checkpointer)
    assert step_at(tmp_path / "c") == 1
