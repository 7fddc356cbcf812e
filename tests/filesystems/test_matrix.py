"""Saves on every kind of file system that this machine can mount: what a save says is true on each.

Each case has a file system of its own in namespaces of its own, which end with it, and a time limit.
"""

from __future__ import annotations

import errno
import os

import pytest
import torch
from support.background import close, error_of, make, result, state_of, step_at
from support.file_systems import FILE_SYSTEMS, fill, overlay_over, run_on
from support.hooks import KillOnce
from support.saves import ONE, SCENARIOS, check_recovery, killed_saves, make_old, save, which
from support.states import make_state

from milepost.checkpoint_writer import CheckpointWriter, CheckpointWriterConfig, WriterHook
from milepost.errors import MilepostError
from milepost.storage import default_storage

FRESH, ALL = SCENARIOS[0], SCENARIOS[4]
SECONDS = 60.0
FULL = {errno.ENOSPC, errno.EDQUOT}
LARGE = {"numbers": [2], "large": torch.arange(1 << 20)}
"""More than a full file system or a quota has room for."""


@pytest.fixture(params=FILE_SYSTEMS, ids=repr)
def run(request):
    """Runs a case in a child on one of the file systems; skips where it cannot be mounted, and says why."""

    def run_case(case, seconds=SECONDS):
        reason = run_on(request.param, case, seconds=seconds)
        if reason:
            pytest.skip(f"{request.param}: {reason}")

    return run_case


class Broken(WriterHook):
    def pre_commit(self, path, **kwargs):
        raise LookupError("this hook is broken")

    def post_commit(self, path, **kwargs):
        pass


def each(scenarios, folder):
    """Prepare each scenario in a folder of its own; yields it with the checkpoint's path."""
    for scenario in scenarios:
        inner = f"{folder}/{scenario}"
        os.mkdir(inner)
        yield scenario, scenario.prepare(inner)


def failed_save(path, state, hook=None):
    """The error of a save that must fail."""
    writer = CheckpointWriter(CheckpointWriterConfig(), ONE, commit_hook=hook)
    try:
        with pytest.raises((MilepostError, LookupError)) as caught:
            writer.write(path, state)
    finally:
        writer.close()
    return caught.value


def test_saves_and_replaces(run):
    """What was saved, new or over what was there, loads bit for bit, and nothing else is left."""

    def case(folder):
        for scenario, path in each(SCENARIOS, folder):
            for number in (2, 3):
                scenario.save(path, number)
                assert scenario.found(path) == number
                scenario.check_tidy(path)

    run(case)


@pytest.mark.parametrize(
    "leave", [0, pytest.param(1 << 20, marks=pytest.mark.filesystems)], ids=["at-once", "on-the-way"]
)
def test_a_full_file_system(run, leave):
    """A save that finds no room says so; the old checkpoint loads, and the next save finds room again."""

    def case(folder):
        for scenario, path in each((FRESH, ALL), folder):
            filler = fill(folder, leave)
            error = failed_save(path, LARGE)
            assert error.errno in FULL, error
            assert scenario.found(path) == scenario.old
            os.unlink(filler)
            scenario.save(path, 3)
            assert scenario.found(path) == 3
            scenario.check_tidy(path)

    run(case)


def test_a_failing_hook(run):
    """A hook that fails ends the save with its error; the old one loads, and nothing of ours is left."""

    def case(folder):
        for scenario, path in each((FRESH, ALL), folder):
            error = failed_save(path, make_state(2), Broken())
            assert "this hook is broken" in str(error)
            assert scenario.found(path) == scenario.old
            assert os.listdir(os.path.dirname(path)) == ([] if scenario.old is None else ["step"])
            scenario.save(path, 3)
            assert scenario.found(path) == 3
            scenario.check_tidy(path)

    run(case)


@pytest.mark.parametrize(
    ("scenario", "stride"),
    [(ALL, 37), *(pytest.param(each, 1, marks=pytest.mark.filesystems) for each in (FRESH, ALL))],
    ids=repr,
)
@pytest.mark.timeout(600)
def test_a_save_that_is_killed_at_any_operation(run, scenario, stride):
    """Killed before any operation: old or new loads, never neither, and the next save tidies up."""

    def case(folder):
        seen = []
        for number, path in killed_saves(scenario, folder, stride=stride):
            seen.append(scenario.found(path))
            check_recovery(scenario, path, number)
        assert seen == sorted(seen, key=lambda state: state == 2), "what was committed has disappeared again"
        assert set(seen) <= {scenario.old, 2}
        assert stride > 1 or len(set(seen)) == 2

    run(case, 500)


@pytest.mark.filesystems
def test_saves_in_the_background(run):
    """New, over the old, with a writer that is killed, without room: a future that is done is true."""

    def case(folder):
        path = f"{folder}/run/step"
        os.mkdir(f"{folder}/run")
        checkpointer = make(KillOnce(f"{folder}/hooks", "pre"))
        try:
            for number in (1, 2, 3):  # the first writer is killed
                result(checkpointer.save(path, state_of(number))[1])
                assert step_at(path) == number
            filler = fill(folder, 0)
            error = error_of(checkpointer.save(path, state_of(4, 1 << 20))[1])
            assert error.errno in FULL, error
            assert step_at(path) == 3
            os.unlink(filler)
            result(checkpointer.save(path, state_of(5))[1])
        finally:
            close(checkpointer)
        if default_storage().is_network(path):
            make_old(f"{folder}/run")
            with make() as checkpointer:
                result(checkpointer.save(path, state_of(5))[1])
        assert step_at(path) == 5
        assert os.listdir(f"{folder}/run") == ["step"]

    run(case)


def test_a_checkpoint_of_a_container_image():
    """What lies in a lower layer cannot be replaced: the save says so, and the new one loads."""

    def case(folder):
        path = f"{folder}/step"
        assert which(path) == 1
        error = failed_save(path, make_state(2))
        assert error.errno == errno.EXDEV
        assert "save to another path" in error.hint
        assert which(path) == 2

    reason = run_on(overlay_over(lambda lower: save(f"{lower}/step", 1)), case, seconds=SECONDS)
    if reason:
        pytest.skip(reason)
