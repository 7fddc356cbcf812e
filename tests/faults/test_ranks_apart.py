"""Ranks that save without meeting, one of them far ahead of the others."""

from __future__ import annotations

import os
from contextlib import nullcontext

import pytest
from support.processes import in_child
from support.states import same

from milepost.checkpoint_reader import CheckpointReader
from milepost.checkpoint_writer import CheckpointWriter, CheckpointWriterConfig, WriterHook
from milepost.errors import AbortedError
from milepost.types import RankInfo

STEPS = 3


class FailsAt(WriterHook):
    """A hook that ends the saves of some steps."""

    def __init__(self, steps):
        self.steps = steps

    def pre_commit(self, path, **kwargs):
        if kwargs["step"] in self.steps:
            raise ValueError("no")

    def post_commit(self, path, **kwargs):
        pass


def state_of(rank, step):
    return {"rank": rank, "step": step, "values": list(range(step))}


def all_steps(path, rank, world_size, fails=(), told=()):
    config = CheckpointWriterConfig(start_id="job")
    writer = CheckpointWriter(config, RankInfo(rank, world_size), commit_hook=FailsAt(fails))
    for step in range(1, STEPS + 1):
        expected = pytest.raises(ValueError, match="no") if step in fails else nullcontext()
        expected = pytest.raises(AbortedError, match="rank 0 failed") if step in told else expected
        with expected:
            writer.write(path, state_of(rank, step), step=step)
    writer.close()


def assert_loads(path, world_size, step):
    for rank in range(world_size):
        loaded = CheckpointReader(RankInfo(rank, world_size)).read(path)[0]
        assert same(loaded, state_of(rank, step))


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (0, 2, 1), (2, 1, 0)])
def test_a_rank_that_is_saves_ahead_loses_nothing(tmp_path, order):
    """Each rank's process does all its saves to one path before the next begins: the last step is there."""
    path = str(tmp_path / "step")
    for rank in order:
        assert in_child(lambda rank=rank: all_steps(path, rank, len(order))) == 0
    assert_loads(path, len(order), STEPS)
    assert os.listdir(tmp_path) == ["step"]


def test_a_rank_that_comes_late_hears_of_the_failure(tmp_path):
    """That a rank failed is kept for slower ranks, without its data, and goes with the next commit."""
    path = str(tmp_path / "step")
    assert in_child(lambda: all_steps(path, 0, 2, fails=(1, 2))) == 0
    for number in (1, 2):
        (kept,) = tmp_path.glob(f".step.job-*-{number}.partial")
        assert sorted(os.listdir(kept)) == ["abort_0.json", "aborted.json", "attempt.json"]
    assert in_child(lambda: all_steps(path, 1, 2, told=(1, 2))) == 0
    assert_loads(path, 2, STEPS)
    assert os.listdir(tmp_path) == ["step"]
