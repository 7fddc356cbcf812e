"""Every I/O operation failing in turn: a clear error, nothing half-made, nothing leaked."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from unittest.mock import Mock

import pytest
from support.processes import descriptors
from support.saves import ONE, SCENARIOS, load, save
from support.states import make_state, same

from milepost import syscalls
from milepost.checkpoint_reader import CheckpointReader
from milepost.checkpoint_writer import CheckpointWriter, CheckpointWriterConfig
from milepost.errors import MilepostError, StorageError, TargetError
from milepost.health.verify import verify
from milepost.storage import default_storage
from milepost.testing import FaultyStorage, short_writes, signal_storm


def failing_saves(scenario, root, error, times):
    """Let operation 1, 2, … of a save fail until one is reached that is never made; yields the error."""
    number = 0
    while True:
        number += 1
        folder = f"{root}/{number}"
        os.mkdir(folder)
        path = scenario.prepare(folder)
        storage = FaultyStorage(default_storage()).fail_at(number, error, times=times)
        before, threads = descriptors(), threading.active_count()
        raised = None
        try:
            scenario.save(path, 2, storage)
        except MilepostError as failure:
            raised = failure
        assert descriptors() == before, f"a descriptor was leaked at operation {number}"
        assert threading.active_count() == threads
        if len(storage.operations) < number:
            assert raised is None
            return
        yield number, path, storage.operations, raised


@pytest.mark.parametrize("times", [1, None], ids=["once", "for-good"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("scenario", [SCENARIOS[0], SCENARIOS[4]], ids=repr)
def test_whatever_operation_of_a_save_fails_nothing_is_lost(quick_path, scenario, number, times):
    """The error names operation and path; old or new loads, whole; nothing leaks; the next save tidies up."""
    failed = 0
    for at, path, operations, raised in failing_saves(
        scenario, quick_path, OSError(number, os.strerror(number)), times
    ):
        found = scenario.found(path)
        if raised is None:
            assert found == 2, f"no error, but the state is not there: {operations[at - 1]}"
        else:
            failed += 1
            assert found in (scenario.old, 2)
            assert isinstance(raised, StorageError | TargetError), repr(raised)
            assert os.path.dirname(path) in str(raised), (operations[at - 1], raised)
            assert os.strerror(number) in str(raised)
            if isinstance(raised, StorageError):
                assert raised.errno == number
                assert raised.operation
                assert raised.phase or raised.path
        scenario.save(path, 3)
        assert scenario.found(path) == 3
        scenario.check_tidy(path)
    assert failed > 15


@pytest.mark.parametrize("scenario", [SCENARIOS[2]], ids=repr)
def test_one_writer_goes_on_after_every_failure(quick_path, scenario):
    """The same writer, whose save has failed at any operation, saves the next time."""
    path = scenario.prepare(quick_path)
    storage = FaultyStorage(default_storage())
    writer = CheckpointWriter(CheckpointWriterConfig(), ONE, storage=storage)
    for number in range(1, 200):
        storage.operations.clear()
        storage.faults = []
        storage.fail_at(number, OSError(errno.EIO, "broken"))
        with contextlib.suppress(MilepostError):
            writer.write(path, make_state(2))
        if len(storage.operations) < number:
            break
        storage.faults = []
        writer.write(path, make_state(3))
        assert scenario.found(path) == 3
        scenario.check_tidy(path)
    assert number > 40
    writer.close()


@pytest.mark.parametrize("limit", [1, 100, 4096, 6000])
def test_short_writes_are_completed(tmp_path, limit):
    """A system that writes less than it was asked to makes no difference."""
    path = f"{tmp_path}/step"
    with short_writes(limit):
        save(path, 1)
    assert same(load(path), make_state(1))
    assert not verify(default_storage(), path).problems


def test_interrupted_calls_are_repeated(tmp_path):
    """Signals that interrupt system calls all the time make no difference."""
    path = f"{tmp_path}/step"
    with signal_storm():
        for number in range(1, 10):
            save(path, number)
            assert same(load(path), make_state(number))
            load(path, make_state(0))
    assert not verify(default_storage(), path).problems


CALLS = [
    "pwrite",
    "fsync",
    "ftruncate",
    "open",
    "mkdir",
    "unlink",
    "chmod",
    "listdir",
    "stat",
    "fstat",
    "rmdir",
]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EMFILE], ids=errno.errorcode.get)
def test_whatever_system_call_fails_nothing_is_lost(quick_path, monkeypatch, name, number):
    """The first, second, … call of each function of `os` fails: as above, below the storage's interface."""
    fail_each_call(quick_path, monkeypatch, name, number)


@pytest.mark.parametrize("name", ["link", "mkdir", "rename", "unlink"])
def test_no_rename_that_ends_halfway_is_in_the_way(quick_path, monkeypatch, name):
    """As above, where one rename is two calls, as no flags of a rename are known."""
    for function in ("rename_exchange", "rename_noreplace"):
        monkeypatch.setattr(syscalls, function, Mock(side_effect=OSError(errno.EINVAL, "no flags")))
    fail_each_call(quick_path, monkeypatch, name, errno.EIO)


def fail_each_call(quick_path, monkeypatch, name, number):
    scenario = SCENARIOS[4]
    real = getattr(os, name)
    for at in range(1, 100):
        folder = f"{quick_path}/{at}"
        os.mkdir(folder)
        path = scenario.prepare(folder)
        calls = 0

        def failing(*arguments, at=at, **options):
            nonlocal calls
            calls += 1
            if calls == at:
                raise OSError(number, os.strerror(number))
            return real(*arguments, **options)

        before, raised = descriptors(), None
        with monkeypatch.context() as patch:
            patch.setattr(os, name, failing)
            try:
                scenario.save(path, 2)
            except MilepostError as error:
                raised = error
        assert descriptors() == before
        assert raised is None or os.strerror(number) in str(raised), repr(raised)
        assert scenario.found(path) in ((2,) if raised is None else (scenario.old, 2))
        if calls < at:
            assert raised is None
            break
        scenario.save(path, 3)
        assert scenario.found(path) == 3
        scenario.check_tidy(path)
    assert at > 1, f"os.{name} is not used any more"


# ---------------------------------------------------------------------------- loading


@pytest.mark.parametrize("verify_", [True, False, "first"])
@pytest.mark.parametrize("into", ["anew", "template"])
@pytest.mark.parametrize("times", [1, None], ids=["once", "for-good"])
def test_whatever_operation_of_a_load_fails_the_error_says_so(quick_path, into, verify_, times):
    """The error names the path, and says whether the template was touched; nothing leaks; then it loads."""
    path = f"{quick_path}/step"
    save(path, 1)
    failed = 0
    for number in range(1, 200):
        storage = FaultyStorage(default_storage()).fail_at(number, OSError(errno.EIO, "broken"), times=times)
        template = make_state(2) if into == "template" else None
        before, threads = descriptors(), threading.active_count()
        try:
            found = CheckpointReader(ONE, storage=storage).read(path, template, verify=verify_)[0]
        except MilepostError as error:
            failed += 1
            assert quick_path in str(error)  # noqa: PT017 - it may also work
            assert "broken" in str(error)  # noqa: PT017 - it may also work
            if template is not None and not same(template, make_state(2)):
                assert error.targets_modified  # noqa: PT017 - it may also work
        else:
            assert same(found, make_state(1))
        del template
        found = None
        assert descriptors() == before
        assert threading.active_count() == threads
        if len(storage.operations) < number:
            break
    assert failed >= 4
    assert same(load(path), make_state(1))


@pytest.mark.parametrize("times", [1, None], ids=["once", "for-good"])
def test_whatever_operation_of_verify_fails_the_checkpoint_does_not_pass(quick_path, times):
    """`verify` reports what it could not read, or raises; it never calls it whole."""
    path = f"{quick_path}/step"
    save(path, 1, attach=True)
    for number in range(1, 200):
        storage = FaultyStorage(default_storage()).fail_at(number, OSError(errno.EIO, "broken"), times=times)
        before = descriptors()
        try:
            report = verify(storage, path)
        except MilepostError as error:
            assert "broken" in str(error)  # noqa: PT017 - it may also work
        else:
            if len(storage.operations) < number:
                assert not report.problems
                break
            assert report.problems or report.files == 6
        assert descriptors() == before
