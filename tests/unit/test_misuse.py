"""What callers get wrong: each mistake is an error of its type, with the words that lead out of it."""

from __future__ import annotations

import argparse
import datetime as dt
import enum
import os
from collections import deque
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from states import save

import milepost
from milepost import errors
from milepost.builder import make_async_checkpointer

STATE = {"w": torch.ones(2, 3), "opt": {"lr": 0.1}}


class Point(NamedTuple):
    x: int
    y: int


class Colour(enum.Enum):
    RED = 1


class Config:
    def __init__(self):
        self.lr = 0.1


class Stateful:
    def state_dict(self):
        return {}


SAVES = {
    "save(state, path)": (
        lambda c, p: c.save(STATE, p),
        errors.TargetError,
        "type dict|the first argument|PathLike",
    ),
    "save(5, state)": (lambda c, p: c.save(5, STATE), errors.TargetError, "type int"),
    "save of no path": (lambda c, p: c.save("", STATE), errors.TargetError, "no path of a checkpoint: ''"),
    "an address": (lambda c, p: c.save("s3://b/step", STATE), errors.TargetError, "an address|s3://b/step"),
    "a Path of an address": (
        lambda c, p: c.save(Path("s3://b/step"), STATE),
        errors.TargetError,
        "an address|s3://b/step",
    ),
    "a ~": (lambda c, p: c.save("~/run", STATE), errors.TargetError, "a ~ that was not expanded"),
    "a misspelt step": (
        lambda c, p: c.save(p, STATE, stpe=5),
        TypeError,
        "no argument 'stpe'|did you mean step?",
    ),
    "a misspelt metadata": (
        lambda c, p: c.save(p, STATE, metdata={}),
        errors.UnknownArgumentError,
        "did you mean metadata?",
    ),
    "an argument of others": (
        lambda c, p: c.save(p, STATE, planner=1),
        errors.ConfigError,
        "'planner'|it takes step, metadata",
    ),
    "a step that is a text": (
        lambda c, p: c.save(p, STATE, step="5"),
        errors.StateError,
        "step must be an integer, not a str",
    ),
    "a tensor in the metadata": (
        lambda c, p: c.save(p, STATE, metadata={"loss": torch.tensor(1.5)}),
        errors.StateError,
        "metadata at loss|Tensor|save value.item()",
    ),
    "an object in the metadata": (
        lambda c, p: c.save(p, STATE, metadata=Config()),
        errors.StateError,
        "Config|plain values",
    ),
    "a module": (lambda c, p: c.save(p, torch.nn.Linear(1, 1)), TypeError, "must be a dict, not torch.nn"),
    "a tensor": (
        lambda c, p: c.save(p, torch.ones(2)),
        TypeError,
        'must be a dict, not torch.Tensor|{"state": ...}',
    ),
    "a meta tensor": (
        lambda c, p: c.save(p, {"w": torch.ones(2, device="meta")}),
        errors.StateError,
        "meta tensor|key w",
    ),
}

VALUES = {
    "deque": (deque([1]), "list(value)"),
    "frozenset": (frozenset([1]), "set(value)"),
    "range": (range(3), "list(value)"),
    "namedtuple": (Point(1, 2), "value._asdict()"),
    "Enum": (Colour.RED, "value.value"),
    "date": (dt.date(2024, 1, 1), "value.isoformat()"),
    "Path": (Path("x"), "str(value)"),
    "Namespace": (argparse.Namespace(lr=1), "vars(value)"),
    "own": (Config(), "vars(value)"),
    "stateful": (Stateful(), "value.state_dict()"),
}
SAVES |= {
    f"a value that is a {name}": (
        lambda c, p, value=value: c.save(p, {"deep": [value]}),
        errors.UnsupportedTypeError,
        f"{type(value).__qualname__}|key deep[0]|hint: |{way}",
    )
    for name, (value, way) in VALUES.items()
}

LOADS = {
    "load(state, path)": (
        lambda c, p: c.load(STATE, p),
        errors.CheckpointNotFoundError,
        "type dict|first argument",
    ),
    "a path that is not there": (
        lambda c, p: c.load(f"{p}x"),
        FileNotFoundError,
        "existing checkpoints|good",
    ),
    "a misspelt verify": (
        lambda c, p: c.load(p, verfy=False),
        TypeError,
        "no argument 'verfy'|did you mean verify?",
    ),
    "allow_unexpected": (
        lambda c, p: c.load(p, allow_unexpected=[]),
        errors.UnknownArgumentError,
        "'allow_unexpected'|allow_missing",
    ),
    "two locations": (
        lambda c, p: c.load(p, map_location="cpu", default_map_location="cpu"),
        errors.ConfigError,
        "map_location and default_map_location are one option",
    ),
    "a location that is not here": (
        lambda c, p: c.load(p, map_location="mtia"),
        errors.ConfigError,
        'map_location is mtia, which is not available|map_location="cpu"',
    ),
    "a location that is none": (
        lambda c, p: c.load(p, map_location="gpu0"),
        errors.ConfigError,
        "map_location",
    ),
    "a template on meta": (
        lambda c, p: c.load(p, {"w": torch.ones(2, 3, device="meta")}),
        errors.MismatchError,
        "w: |a meta tensor in the template|to_empty|assign=True",
    ),
    "a template of another dtype": (
        lambda c, p: c.load(p, {"w": torch.ones(2, 3, dtype=torch.bfloat16)}),
        errors.MismatchError,
        "w: |bfloat16|float32|cast=True",
    ),
    "a template of another shape": (
        lambda c, p: c.load(p, {"w": torch.ones(3, 2)}),
        RuntimeError,
        "w: expected|(3, 2)|(2, 3)",
    ),
    "a module as template": (
        lambda c, p: c.load(p, torch.nn.Linear(1, 1)),
        errors.MismatchError,
        "template must be a dict, not Linear",
    ),
    "keys that were not saved, strict": (
        lambda c, p: c.load(p, {"ww": torch.ones(1)}, strict=True),
        RuntimeError,
        "missing keys (1): ww",
    ),
    "rename without a template": (
        lambda c, p: c.load(p, rename={"a": "b"}),
        errors.ConfigError,
        "rename needs a template",
    ),
    "a pattern that is no list": (
        lambda c, p: c.load(p, {}, allow_missing="w"),
        errors.ConfigError,
        "must be a list of patterns",
    ),
    "verify=1.5": (lambda c, p: c.load(p, verify=1.5), errors.ConfigError, 'True, False or "first", not 1.5'),
}

MAKES = {
    "a rank that is a tuple": (
        lambda c, p: milepost.make_sync_checkpointer(rank_info=(0, 1)),
        errors.ConfigError,
        "must be a RankInfo, not a tuple: (0, 1)|RankInfo(0, 1)",
    ),
    "a rank beyond the size": (
        lambda c, p: milepost.make_sync_checkpointer(rank_info=milepost.RankInfo(1, 1)),
        ValueError,
        "0 <= global_rank < global_world_size",
    ),
    "a choice that is none": (
        lambda c, p: make_async_checkpointer(
            milepost.CheckpointerConfig(async_config=milepost.AsyncConfig(when_busy="skp"))
        ),
        errors.ConfigError,
        "async_config.when_busy must be one of 'wait', 'skip', not 'skp'",
    ),
    "a barrier type that is none": (
        lambda c, p: milepost.make_sync_checkpointer(
            milepost.CheckpointerConfig(barrier_config=milepost.BarrierConfig("tcpstore"))
        ),
        ValueError,
        "Unknown barrier type: tcpstore|tcp_store",
    ),
    "a hook that is none": (
        lambda c, p: milepost.make_sync_checkpointer(commit_hook=print),
        errors.ConfigError,
        "pre_commit|WriterHook",
    ),
    "a closed checkpointer": (
        lambda c, p: [other := milepost.make_sync_checkpointer(), other.close(), other.save(p, STATE)],
        errors.ClosedError,
        "is closed|make a new one",
    ),
}

MISUSES = SAVES | LOADS | MAKES


MAKERS = {"sync": milepost.make_sync_checkpointer, "async": milepost.make_async_checkpointer}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("misuse", MISUSES)
def test_each_mistake_is_an_error_with_a_way_out(tmp_path, monkeypatch, kind, misuse):
    """A mistake raises its type, says these words, shows no values and no rank, and changes no file."""
    monkeypatch.chdir(tmp_path)
    call, error, words = MISUSES[misuse]
    save("good", STATE, step=1)
    before = (tmp_path / "good" / "manifest.json").read_bytes()
    path = str(tmp_path / ("bad" if misuse in SAVES else "good"))
    with MAKERS[kind]() as checkpointer, pytest.raises(error) as caught:
        call(checkpointer, path)
    text = str(caught.value)
    assert isinstance(caught.value, milepost.MilepostError)
    assert [word for word in words.split("|") if word not in text] == [], text
    assert "tensor([" not in text
    assert "rank 0" not in text
    assert os.listdir(tmp_path) == ["good"]
    assert (tmp_path / "good" / "manifest.json").read_bytes() == before
