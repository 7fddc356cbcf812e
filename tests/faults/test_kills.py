"""SIGKILL in the middle of a save, at every operation on the storage."""

from __future__ import annotations

import os
import random

import pytest
from support.processes import KILLED, descriptors, in_child
from support.saves import SCENARIOS, check_recovery, killed_saves

from milepost.storage import default_storage
from milepost.testing import MUTATIONS, FaultyStorage


@pytest.mark.parametrize("scenario", SCENARIOS, ids=repr)
def test_a_save_that_is_killed_at_any_operation_loses_nothing(quick_path, scenario):
    """Killed before any operation: the old state loads, from the commit on the new; a save tidies up."""
    before = descriptors()
    seen = []
    for number, path in killed_saves(scenario, quick_path):
        found = scenario.found(path)
        assert found in (scenario.old, 2), f"killed at operation {number}"
        seen.append(found)
        check_recovery(scenario, path, number)
    assert set(seen) == {scenario.old, 2}, "some kills came before the commit, and some after it"
    assert seen == sorted(seen, key=lambda state: state == 2), "what was committed has disappeared again"
    assert descriptors() == before


@pytest.mark.parametrize("scenario", SCENARIOS, ids=repr)
def test_a_save_that_is_killed_within_any_write_loses_nothing(quick_path, scenario):
    """Killed when half of a write is done: no half-written file counts, and the next save tidies up."""
    for number, path in killed_saves(scenario, quick_path, "torn", {"write"}):
        assert scenario.found(path) in (scenario.old, 2), f"killed in write {number}"
        check_recovery(scenario, path, number)


@pytest.mark.parametrize("scenario", SCENARIOS[1::3], ids=repr)
def test_recovery_may_be_killed_as_well(quick_path, scenario):
    """A save that is killed while it clears up after a killed one leaves nothing that a third cannot."""
    choose = random.Random(scenario.name)
    for number, path in killed_saves(scenario, quick_path, counts=MUTATIONS):
        newest = scenario.found(path)
        second = choose.randint(1, 50)
        storage = FaultyStorage(default_storage(), counts=MUTATIONS).fail_at(second, "kill")
        code = in_child(lambda path=path, storage=storage: scenario.save(path, 3, storage))
        assert code in (0, KILLED)
        found = scenario.found(path)
        assert found in ((newest, 3) if code else (3,)), f"killed at {number}, then at {second}"
        scenario.save(path, 4)
        assert scenario.found(path) == 4, f"killed at {number}, then at {second}"
        scenario.check_tidy(path)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS, ids=repr)
def test_recovery_may_be_killed_at_any_operation(quick_path, scenario):
    """For every operation that a first save is killed at, and every one of the second: a third is as new."""
    for first in range(1, 200):
        for second in range(1, 200):
            folder = f"{quick_path}/{first}-{second}"
            os.mkdir(folder)
            path = scenario.prepare(folder)
            codes = []
            for state, number in ((2, first), (3, second)):
                storage = FaultyStorage(default_storage(), counts=MUTATIONS).fail_at(number, "kill")
                codes.append(in_child(lambda p=path, n=state, s=storage: scenario.save(p, n, s)))
                assert scenario.found(path) in (scenario.old, 2, 3)
            check_recovery(scenario, path, (first, second))
            if codes[1] == 0:
                break
        if codes[0] == 0:
            return
