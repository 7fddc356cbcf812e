"""What cannot be saved is refused with words, before anything is written."""

from __future__ import annotations

import enum
import os
from collections import Counter, OrderedDict, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from states import assert_same, load, round_trip, save, torch_load

import milepost
from milepost.errors import CheckpointNotFoundError, StateError, TargetError, UnsupportedTypeError

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning")


class Colour(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    HIGH = 3


class MyDict(dict):
    pass


class MyTensor(torch.Tensor):
    pass


@dataclass
class Settings:
    lr: float


class Pair(NamedTuple):
    a: int
    b: int


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("/tmp/milepost-test-must-not-exist",))


def freed():
    tensor = torch.ones(1000)
    tensor.untyped_storage().resize_(0)
    return tensor


def shrunk():
    tensor = torch.ones(1000)
    tensor.untyped_storage().resize_(8)
    return tensor


VALUES = {
    "meta tensor": lambda: torch.empty(2, device="meta"),
    "meta parameter": lambda: torch.nn.Parameter(torch.empty(2, device="meta")),
    "released memory": freed,
    "shrunk memory": shrunk,
    "opaque tensor": lambda: torch.ones(2, 2).to_mkldnn(),
    "dtype that torch cannot save": lambda: torch.empty(3, dtype=torch.uint4),
    "sparse indices out of range": lambda: torch.sparse_coo_tensor(
        torch.tensor([[0, 9]]), torch.ones(2), (3,), check_invariants=False
    ),
    "dict subclass": lambda: MyDict(a=1),
    "tensor subclass": lambda: torch.ones(2).as_subclass(MyTensor),
    "lambda": lambda: lambda: 1,
    "function": lambda: freed,
    "class": lambda: Settings,
    "dataclass": lambda: Settings(0.1),
    "named tuple": lambda: Pair(1, 2),
    "enum": lambda: Colour.RED,
    "int enum": lambda: Level.HIGH,
    "object array": lambda: np.array([1, None], dtype=object),
    "object field": lambda: np.zeros(1, dtype=[("a", "O")]),
    "numpy dtype": lambda: np.dtype("f4"),
    "array subclass": lambda: np.ma.array([1, 2]),
    "frozenset": lambda: frozenset([1]),
    "range": lambda: range(3),
    "path": lambda: Path("a"),
    "generator": torch.Generator,
    "module": lambda: torch.nn.Linear(1, 1),
    "code": Evil,
    "factory": lambda: defaultdict(lambda: 1),
    "factory of a class": lambda: defaultdict(Settings),
    "set of tensors": lambda: {torch.ones(1)},
    "set of frozensets": lambda: {frozenset([1])},
}


def compressed(ends, indices, shape, layout=torch.sparse_csr):
    values = torch.ones(len(indices))
    parts = torch.tensor(ends), torch.tensor(indices), values, shape
    return torch.sparse_compressed_tensor(*parts, layout=layout, check_invariants=False)


VALUES |= {
    f"sparse {name}": lambda parts=parts: compressed(*parts)
    for name, parts in {
        "column out of range": ([0, 1, 2, 3], [0, 1, 3], (3, 3)),
        "negative column": ([0, 1, 2, 3], [0, -1, 2], (3, 3)),
        "rows beyond the values": ([0, 1, 2, 4], [0, 1, 2], (3, 3)),
        "rows that go back": ([0, 5, 2, 3], [0, 1, 2], (3, 3)),
        "rows that begin late": ([1, 1, 2, 3], [0, 1, 2], (3, 3)),
        "rows that are too few": ([0, 1, 2], [0, 1], (3, 3)),
        "row out of range": ([0, 1, 2, 3], [0, 1, 2], (2, 3), torch.sparse_csc),
    }.items()
}


@pytest.mark.parametrize("name", VALUES)
def test_values_that_could_not_be_read_back_are_refused(tmp_path, name):
    """A value that could not be read back safely is an error that names its key; nothing is written."""
    state = {"first": torch.ones(3), "model": {"layers": [1, VALUES[name]()]}}
    with pytest.raises(StateError) as caught:
        save(tmp_path / "c", state)
    assert (caught.value.key or "").startswith("model.layers[1]")
    assert "model.layers[1]" in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert os.listdir(tmp_path) == []
    assert not os.path.exists("/tmp/milepost-test-must-not-exist")


@pytest.mark.parametrize(
    "key",
    [
        Colour.RED,
        Level.HIGH,
        frozenset([1]),
        Pair(1, 2),
        (1, (Colour.RED,)),
        Settings,
        np.dtype("f4"),
        torch.ones(1),
    ],
    ids=lambda key: type(key).__name__,
)
def test_unsupported_keys_are_refused_by_name(tmp_path, key):
    """A key of an unsupported type is an error that shows the key, where it is, and the way out."""
    with pytest.raises(UnsupportedTypeError) as caught:
        save(tmp_path / "c", {"model": {"a": {key: 1}}})
    text = str(caught.value)
    part = repr(Colour.RED if isinstance(key, tuple) and not isinstance(key, Pair) else key)
    assert part[:10] in text
    assert "convert it" in text
    assert caught.value.key == "model.a"
    assert isinstance(caught.value, TypeError)
    assert os.listdir(tmp_path) == []


def test_one_letter_keys_are_named_too():
    """An error names its key even if the message happens to contain the same letters."""
    assert "key a" in str(StateError("a tensor has no data", key="a"))


@pytest.mark.parametrize("state", [[1], None, torch.ones(1), "text", MyDict(a=1), Pair(1, 2)], ids=repr)
def test_a_state_dict_must_be_a_dict(tmp_path, state):
    """A state that is no dict (nor an OrderedDict or defaultdict) is refused."""
    with pytest.raises(UnsupportedTypeError):
        save(tmp_path / "c", state)
    assert os.listdir(tmp_path) == []


def nested(depth, make):
    state = {}
    for _ in range(depth - 1):
        state = make(state)
    return {"deep": state}


MAKERS = {
    "dict": lambda inner: {"x": inner},
    "list": lambda inner: [inner],
    "tuple": lambda inner: (inner,),
    "ordered": lambda inner: OrderedDict(x=inner),
    "default": lambda inner: defaultdict(None, x=inner),
}


@pytest.mark.parametrize("name", MAKERS)
def test_nesting_is_limited_to_200(tmp_path, name):
    """200 nested containers of any kind load, also with plain torch; 201 are refused with words."""
    state = nested(199, MAKERS[name])
    assert_same(state, round_trip(tmp_path, state))
    assert_same({**state}, {**torch_load(tmp_path / "checkpoint")} if name != "default" else state)
    with pytest.raises(StateError, match="200 deep"):
        save(tmp_path / "deeper", nested(200, MAKERS[name]))
    assert os.listdir(tmp_path) == ["checkpoint"]


PRIME = (1 << 61) - 1

LIMITED = {
    "keys of one hash": lambda: {n * PRIME: n for n in range(200)},
    "complex keys of one hash": lambda: {complex(1_000_003 * n, -n): n for n in range(200)},
    "items of one hash": lambda: {(n * PRIME,) for n in range(200)},
    "keys of one hash in an object": lambda: Counter({n * PRIME: n for n in range(200)}),
    "a device beyond torch's own": lambda: torch.device("cuda:128"),
    "an array without bytes": lambda: np.zeros(3, [("a", "S0")])["a"],
    "fields that overlap": lambda: np.zeros(2, np.dtype({"names": ["a", "b"], "formats": ["i4", "i4"],
                                                         "offsets": [0, 2]})),
}  # fmt: skip


@pytest.mark.parametrize("name", LIMITED)
def test_what_a_load_would_refuse_is_refused(tmp_path, name):
    """A value beyond a limit of the format is an error that names its key, and nothing is written."""
    with pytest.raises(StateError) as caught:
        save(tmp_path / "c", {"model": [LIMITED[name]()]})
    assert caught.value.key.startswith("model[0]")
    assert os.listdir(tmp_path) == []


def test_too_many_values_are_refused(tmp_path, monkeypatch):
    """A state with more values than a load reads is an error that names the largest key; so are metadata."""
    state = {"small": [1], "[text]": "[" * 2000, "ids": list(range(1000))}
    monkeypatch.setattr("milepost.format.limits.MAX_NODES", 1100)
    assert_same(state, round_trip(tmp_path, state))
    for name, value, key in (
        ("milepost.format.limits.MAX_NODES", 1000, "ids"),
        ("milepost.format.limits.MAX_INDEX_BYTES", 1000, "ids"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(name, value)
            with pytest.raises(StateError, match="tensors or numpy arrays") as caught:
                save(tmp_path / "c", state)
            assert caught.value.key == key
    monkeypatch.setattr("milepost.format.snapshot.MAX_METADATA_BYTES", 100)
    with pytest.raises(StateError, match="too many"), milepost.make_sync_checkpointer() as checkpointer:
        checkpointer.save(str(tmp_path / "c"), {}, metadata={"log": "x" * 100})
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_recursion_is_refused(tmp_path):
    """A container that holds itself is refused with words, and so is a key that is nested too deep."""
    state = {"a": []}
    state["a"].append(state)
    with pytest.raises(StateError, match="holds itself"):
        save(tmp_path / "c", state)
    key = 1
    for _ in range(250):
        key = (key,)
    with pytest.raises(StateError, match="200 deep"):
        save(tmp_path / "c", {"a": {key: 1}})
    assert os.listdir(tmp_path) == []


def test_keys_and_items_of_sets_of_every_supported_kind(tmp_path):
    """Everything hashable that can be saved can be a key and an item of a set, long bytes included."""
    hashable = [
        "a", 1, 2.5, 1j, b"x" * 100_000, None, True, (1, ("b", None)), np.int64(7), np.float32(0.1),
        np.str_("text"), torch.Size([1]), torch.float16, torch.device("cpu"),
    ]  # fmt: skip
    hashable.remove(True)  # equal to 1
    state = {"dict": dict.fromkeys(hashable, "value"), "set": {*hashable}, "sets": [{True}, {(np.int8(1),)}]}
    loaded = round_trip(tmp_path, state)
    assert_same(state["dict"], loaded["dict"])
    assert {(type(item), item) for item in loaded["set"]} == {(type(item), item) for item in hashable}
    assert loaded["sets"] == state["sets"]
    torch_load(tmp_path / "checkpoint")


def test_a_refused_state_leaves_the_old_checkpoint(tmp_path):
    """When a save is refused, the checkpoint that was at the path still loads."""
    path = save(tmp_path / "c", {"a": torch.ones(2)})
    with pytest.raises(StateError):
        save(path, {"a": torch.empty(2, device="meta")})
    assert_same({"a": torch.ones(2)}, load(path))
    assert sorted(os.listdir(path)) == ["checkpoint_0.pt", "index_0.json", "manifest.json"]


def test_memory_released_between_saves_is_noticed(tmp_path):
    """A tensor whose memory was released after an earlier save is refused, not read."""
    from milepost import make_sync_checkpointer

    tensor = torch.ones(50_000)
    with make_sync_checkpointer() as checkpointer:
        checkpointer.save(str(tmp_path / "c"), {"t": tensor})
        tensor.untyped_storage().resize_(0)
        with pytest.raises(StateError, match="storage of 0"):
            checkpointer.save(str(tmp_path / "c"), {"t": tensor})
        tensor.untyped_storage().resize_(200_000)
        tensor.fill_(2)
        checkpointer.save(str(tmp_path / "c"), {"t": tensor})
    assert_same({"t": torch.full((50_000,), 2.0)}, load(tmp_path / "c"))


def test_an_object_that_would_come_back_as_another_type_is_refused(tmp_path):
    """Torch reads a bare storage back as a typed one: that is told before anything is written."""
    checkpointer = milepost.make_sync_checkpointer()
    with pytest.raises(UnsupportedTypeError, match="would come back as a TypedStorage"):
        checkpointer.save(str(tmp_path / "c"), {"s": torch.ones(3).untyped_storage()})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("path", [None, 5, b"run", ""])
def test_what_is_no_path_is_refused_with_words(path, tmp_path, monkeypatch):
    """A path that is no text is an error of ours for save and load, not a TypeError from the depths."""
    monkeypatch.chdir(tmp_path)
    checkpointer = milepost.make_sync_checkpointer()
    with pytest.raises(TargetError, match="no path of a checkpoint"):
        checkpointer.save(path, {})
    with pytest.raises(CheckpointNotFoundError, match="no path of a checkpoint"):
        checkpointer.load(path)
    assert os.listdir(tmp_path) == []


REFUSED = ("s3://bucket/step-1", "file:///tmp/x", "GS://b", "git+ssh://h/x", "~/run", "~", "~nobody-here/x")


@pytest.fixture(params=[milepost.make_sync_checkpointer, milepost.make_async_checkpointer])
def either(request, tmp_path, monkeypatch):
    """A checkpointer of either kind, in an empty working directory that is the home folder as well."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with request.param() as checkpointer:
        yield checkpointer


def test_addresses_and_unexpanded_homes_are_refused(either, tmp_path):
    """What would silently become a local folder of that name is refused with a way out; nothing is made."""
    for path in REFUSED:
        with pytest.raises(TargetError, match="a folder with a local path, and this is") as caught:
            either.save(path, {"x": 1})
        assert caught.value.path == path
        assert f"for a folder that really has this name, give {tmp_path}/" in caught.value.hint
        with pytest.raises(CheckpointNotFoundError, match="a folder with a local path, and this is"):
            either.load(path)
    assert os.listdir(tmp_path) == []


def test_the_way_out_of_a_refused_path_is_named(either, tmp_path):
    """The hint names the expanded path, the path of a file address, or a folder of a mounted storage."""
    ways_out = {"~/run": f"give {tmp_path}/run;", "file:///a/b": "give /a/b;", "s3://b": "is mounted;"}
    for path, way_out in ways_out.items():
        with pytest.raises(TargetError) as caught:
            either.save(path, {})
        assert way_out in caught.value.hint


def test_names_with_a_tilde_or_a_colon_are_names(either, tmp_path):
    """./~x, a~b, x:y and the absolute path of any name are saved to and loaded from."""
    for path in ("./~x", "a~b", "x:y", "x:/y", f"{tmp_path}/s3:/b", f"{tmp_path}/~"):
        either.save(path, {"x": path})
        assert either.load(path) == {"x": path}


def test_an_address_as_a_pathlib_path_is_refused(tmp_path, monkeypatch):
    """Pathlib makes one slash of two, but s3:/bucket is no less an address for that."""
    monkeypatch.chdir(tmp_path)
    with milepost.make_sync_checkpointer() as checkpointer:
        with pytest.raises(TargetError, match="this is an address: s3://bucket/step"):
            checkpointer.save(Path("s3://bucket/step"), {})
        checkpointer.save(tmp_path / "s3:" / "bucket", {"x": 1})
