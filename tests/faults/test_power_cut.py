"""A power cut at every point of a save: what was not fsynced may be lost, in any combination."""

from __future__ import annotations

from functools import cache

import pytest
from support.disks import MemoryStorage, tree
from support.power import RecordingStorage, disk_states
from support.saves import SCENARIOS

from milepost.errors import MilepostError

TEARABLE = {"write", "size"}


@cache
def recorded(scenario):
    """A save on a recorded disk: the log, how many events of it came before the save, and the path."""
    storage = RecordingStorage(MemoryStorage())
    storage.make_folder("/data")
    path = scenario.prepare("/data", storage)
    settled = len(storage.log)
    scenario.save(path, 2, storage)
    return storage.log, settled, path


def problem(check, *arguments):
    """What a check finds; "" if nothing."""
    try:
        check(*arguments)
    except (AssertionError, MilepostError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def judge(scenario, disk, path):
    """What loads from a disk, what is wrong with the user's files, and what with a new save."""
    found = []

    def save():
        scenario.save(path, 3, disk)
        assert scenario.found(path, disk) == 3
        scenario.check_mine(path, disk)

    wrong = problem(lambda: found.append(scenario.found(path, disk, verified=False)))
    return wrong or found[0], problem(scenario.check_mine, path, disk), problem(save)


verdicts = {}
"""Of each scenario and disk: the same disk comes out of many cuts, and is judged once."""


def check(scenario, disk, path, allowed, *, ended=False):
    """The disk holds one of the allowed states, whole, and all of the user's files; a new save tidies up."""
    key = scenario.name, frozenset(tree(disk, "/data").items())
    if key not in verdicts:
        verdicts[key] = judge(scenario, disk, path)
    found, mine, after = verdicts[key]
    assert found in allowed
    assert not (ended and mine), mine
    assert not after, after


def points(log, settled):
    """The points at which a cut may leave something new: after each event, but for the parts of one file."""
    return [n for n in range(settled, len(log) + 1) if n == len(log) or log[n].kind not in TEARABLE]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=repr)
def test_a_power_cut_at_any_point_loses_nothing(scenario):
    """Whatever of the unsynced was lost: the old state loads or the new one, whole; the next save works."""
    log, settled, path = recorded(scenario)
    seen = set()
    for number in points(log, settled):
        disks = disk_states(log, number, settled=settled, seed=number, limit=24, seen=seen)
        for seed, disk in enumerate(disks):
            try:
                check(scenario, disk, path, (scenario.old, 2))
            except (AssertionError, MilepostError) as error:
                raise AssertionError(f"cut after {number} events, disk {seed}") from error


@pytest.mark.parametrize("scenario", SCENARIOS, ids=repr)
def test_what_save_has_returned_from_survives_a_power_cut(scenario):
    """After `save` has returned the new state is there, and the user's files are, whatever was lost."""
    log, settled, path = recorded(scenario)
    count = 0
    for disk in disk_states(log, settled=settled, limit=200, seen=set()):
        check(scenario, disk, path, (2,), ended=True)
        count += 1
    assert count > 3


@pytest.mark.parametrize("scenario", SCENARIOS, ids=repr)
def test_every_fsync_is_needed(scenario):
    """With any one fsync of a file or folder taken out, some power cut would break a promise."""
    log, settled, path = recorded(scenario)
    syncs = [n for n in range(settled, len(log)) if log[n].kind in ("fsync", "sync_folder")]
    assert len(syncs) >= 5
    needless = [log[n] for n in syncs if not violated(scenario, log[:n] + log[n + 1 :], settled, path)]
    assert not needless


def violated(scenario, log, settled, path):
    """Whether a power cut in this log breaks a promise."""
    ended, under_way = set(), set()
    for number in reversed(points(log, settled)):
        allowed, seen = ((2,), ended) if number == len(log) else ((scenario.old, 2), under_way)
        for disk in disk_states(log, number, settled=settled, seed=number, limit=16, seen=seen):
            try:
                check(scenario, disk, path, allowed, ended=number == len(log))
            except (AssertionError, MilepostError):
                return True
    return False
