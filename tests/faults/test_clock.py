"""The clock is wrong: what a save, a replacement, a recovery and a load decide does not depend on it."""

from __future__ import annotations

import os
import signal
import time

from support.processes import in_child
from support.saves import save, which

from milepost.commit import clean_up, roll_forward
from milepost.storage.local import LocalStorage
from milepost.testing import FaultyStorage


def days_back(days, work):
    """Run `work` in a process whose clock is some days behind; its exit code."""

    def run():
        real = time.time
        time.time = lambda: real() - days * 86400
        work()

    return in_child(run)


def save_that_dies(path, number):
    """A save that is killed when it is committed and not published."""

    def kill(operation, place):
        if operation == "rename" and place == path:
            os.kill(os.getpid(), signal.SIGKILL)

    save(path, number, FaultyStorage(LocalStorage(), before=kill))


def test_a_clock_that_is_set_back_changes_nothing(tmp_path):
    """Each of these saves and recoveries has an earlier clock than the one before: the last save loads."""
    path, storage = str(tmp_path / "step"), LocalStorage()
    save(path, 1)
    assert days_back(1, lambda: save(path, 2)) == 0
    assert which(path) == 2
    assert days_back(2, lambda: save_that_dies(path, 3)) == -signal.SIGKILL
    assert which(path) == 3
    assert days_back(3, lambda: roll_forward(storage, path)) == 0
    assert which(path) == 3
    assert days_back(4, lambda: save_that_dies(path, 4)) == -signal.SIGKILL
    assert days_back(5, lambda: save(path, 5)) == 0
    assert days_back(6, lambda: clean_up(storage, path)) == 0
    assert which(path) == 5
    assert os.listdir(tmp_path) == ["step"]
