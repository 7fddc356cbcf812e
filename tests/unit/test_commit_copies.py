"""Plain tensors that every rank saves alike are in the log once, with the way out."""

from __future__ import annotations

import pytest
import torch

from milepost.checkpoint_writer import CheckpointWriter
from milepost.commit import copies
from milepost.config import CheckpointWriterConfig
from milepost.types import RankInfo

MIB = 1 << 20
SAME = {"model": {"w": torch.arange(MIB // 4, dtype=torch.float32), "b": torch.ones(MIB // 8)}}


@pytest.fixture
def told(monkeypatch, caplog):
    """What tells the messages of the log, in a process that has not told of anything yet."""
    monkeypatch.setattr(copies, "_told", False)
    return lambda: caplog.messages


def save(path, states, replicated=()):
    """Save as each rank in turn, without a barrier; the last one commits."""
    config = CheckpointWriterConfig(start_id="start", replicated=list(replicated))
    for rank, state in enumerate(states):
        writer = CheckpointWriter(config, RankInfo(rank, len(states)))
        writer.write(str(path), state)
        writer.close()


def test_what_all_ranks_save_alike_is_told_once(tmp_path, told):
    """The first save that all ranks save alike names the bytes and the way out; the next one says nothing."""
    states = [SAME | {"random": torch.full((5000,), rank, dtype=torch.uint8)} for rank in range(3)]
    save(tmp_path / "a", states)
    save(tmp_path / "b", states)
    (message,) = told()
    assert message.startswith("1.5 MiB of plain tensors (2 of them) are the same on all 3 ranks")
    assert "CheckpointWriterConfig.replicated" in message


@pytest.mark.parametrize(
    ("states", "replicated"),
    [
        ([SAME, SAME], ["model.*"]),
        ([SAME], []),
        ([{"w": torch.full((MIB,), float(rank))} for rank in range(2)], []),
        ([{"random": torch.zeros(5056, dtype=torch.uint8)}] * 2, []),
        ([SAME, SAME, {"none": 0}], []),
    ],
    ids=["declared", "one rank", "other values", "a generator's state", "not on all ranks"],
)
def test_what_is_no_copy_is_not_told(tmp_path, told, states, replicated):
    """Declared replicas, one rank, other values, small ones, and those of some ranks are not told of."""
    save(tmp_path / "c", states, replicated)
    assert told() == []


def test_a_part_that_is_declared_leaves_the_rest(tmp_path, told):
    """Of a state of which some tensors are declared, the others alone count."""
    save(tmp_path / "c", [SAME, SAME], ["model.w"])
    assert told()[0].startswith("0.5 MiB of plain tensors (1 of them) are the same on all 2 ranks")
