"""Many jobs of several ranks over one checkpoint, each killed somewhere."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from dataclasses import dataclass

import pytest
from support.ranks import KILLED, WORLD, join
from test_rank_kills import Save, listed, state_of

from milepost import RankInfo
from milepost.errors import CheckpointNotFoundError, MilepostError
from milepost.storage import default_storage
from milepost.testing import MUTATIONS, FaultyStorage


@dataclass
class Try(Save):
    """A save in which ranks die at the n-th operation that changes something.

    Attributes:
        dies: When, by rank.
        torn: The operation is done by half, if it is a write.
        loads: What the job finds first: one of these steps.
    """

    deaths: dict[int, int] | None = None
    torn: bool = False
    loads: tuple[int | None, ...] = ()


def go_on(how):
    """One rank of a job: load what is there, then save the next step, or die; the step that was loaded."""
    from milepost.checkpoint_reader import CheckpointReader
    from milepost.checkpoint_writer import CheckpointWriter, CheckpointWriterConfig

    rank, world = join()
    reader = CheckpointReader(RankInfo(rank, world), timeout_seconds=60)
    found = None
    template = state_of(0)
    with contextlib.suppress(CheckpointNotFoundError):
        found = reader.read(how.path, template, strict=True)[0]["facts"]["step"]
    storage = default_storage()
    if rank in how.deaths:
        storage = FaultyStorage(storage, counts=MUTATIONS)
        storage.fail_at(how.deaths[rank], "torn" if how.torn else "kill")
    config = CheckpointWriterConfig(write_barrier_timeout_secs=60, replicated=["model.plain"])
    writer = CheckpointWriter(config, RankInfo(rank, world), storage=storage)
    try:
        writer.write(how.path, state_of(how.step), step=how.step)
    finally:
        writer.close()
    return found


def soak(launcher, folder, commits, seed):
    """Start jobs until so many have committed; after each, what is listed is whole and was saved."""
    choose = random.Random(seed)
    path = f"{folder}/run/c"
    os.mkdir(f"{folder}/run")
    there, committed, killed, step = None, 0, 0, 0
    while committed < commits:
        step += 1
        victims = choose.sample(range(WORLD), choose.choice([0, 1, 1, 1, 2, 3]))
        deaths = {rank: choose.randint(1, 60) for rank in victims}
        how = Try(path, step, deaths=deaths, torn=choose.random() < 0.3)
        told = f"seed {seed}, step {step}: {how}"
        outcomes = launcher.run(folder, go_on, how)
        assert not [e for e in outcomes if isinstance(e, Exception) and not isinstance(e, MilepostError)], (
            told
        )
        assert {found for found in outcomes if found != KILLED} <= {there}, (told, outcomes)
        found = listed(path, {there, step} - {None})
        assert found in {there, step}, told
        if KILLED not in outcomes:
            assert found == step, told
        committed += found == step
        killed += KILLED in outcomes
        there = found
        for name in os.listdir(folder):
            if name.startswith("job-"):
                shutil.rmtree(f"{folder}/{name}")
    how = Try(path, step + 1, deaths={})
    assert launcher.run(folder, go_on, how) == [there] * WORLD
    assert listed(path, {step + 1}) == step + 1
    assert os.listdir(f"{folder}/run") == ["c"]
    return killed


def test_some_commits_under_random_kills(launcher, quick_path):
    """Eight commits by jobs whose ranks die anywhere: what is listed is whole, and what was saved."""
    assert soak(launcher, quick_path, 8, seed=20) > 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1])
def test_a_hundred_commits_under_random_kills(launcher, quick_path, seed):
    """A hundred commits by jobs whose ranks die anywhere: what is listed is whole, and what was saved."""
    assert soak(launcher, quick_path, 100, seed) > 30
