"""Whatever can be saved comes back: values, tensors and templates that hypothesis makes up."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter, OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support.disks import MemoryStorage
from support.states import assert_same, sharing, tensors_in

from milepost.checkpoint_reader import CheckpointReader
from milepost.checkpoint_writer import CheckpointWriter
from milepost.config import CheckpointWriterConfig
from milepost.errors import StateError
from milepost.format.nodes import check_tree
from milepost.format.tree import TreeDecoder, TreeEncoder
from milepost.types import RankInfo

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning")

ONE = RankInfo(0, 1)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64]

texts = st.text(st.characters(exclude_categories=()), max_size=12)
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(2**70), 2**70), st.floats(), texts,
    st.complex_numbers(), st.binary(max_size=20),
)  # fmt: skip
keys = st.one_of(
    texts, st.integers(), st.none(), st.booleans(), st.floats(allow_nan=False), st.binary(max_size=4),
    st.tuples(texts, st.integers()),
)  # fmt: skip
numpy_scalars = st.one_of(
    st.floats(width=32).map(np.float32), st.integers(0, 255).map(np.uint8), st.booleans().map(np.bool_)
)


@st.composite
def tensors(draw):
    """A view of a small base: any shape, strides, offset and dtype, perhaps a parameter."""
    dtype = draw(st.sampled_from(DTYPES))
    size = draw(st.integers(1, 40))
    base = torch.tensor(draw(st.lists(st.integers(0, 1), min_size=size, max_size=size))).to(dtype)
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    strides = draw(st.lists(st.integers(0, 5), min_size=len(shape), max_size=len(shape)))
    reach = 1 + sum(max(n - 1, 0) * step for n, step in zip(shape, strides, strict=True))
    if reach > size:
        return base
    tensor = base.as_strided(shape, strides, draw(st.integers(0, size - reach)))
    if dtype.is_floating_point and draw(st.booleans()):
        return torch.nn.Parameter(tensor, requires_grad=draw(st.booleans()))
    return tensor


@st.composite
def families(draw):
    """Views of one base, which alias each other in any way."""
    base = torch.arange(draw(st.integers(1, 30)), dtype=draw(st.sampled_from([torch.uint8, torch.int64])))
    views = []
    for _ in range(draw(st.integers(1, 5))):
        start = draw(st.integers(0, len(base)))
        views.append(base[start : draw(st.integers(start, len(base))) : draw(st.integers(1, 3))])
    return views


def containers(children):
    return st.one_of(
        st.lists(children, max_size=4),
        st.lists(children, max_size=4).map(tuple),
        st.dictionaries(keys, children, max_size=4),
        st.dictionaries(keys, children, max_size=4).map(OrderedDict),
        st.dictionaries(keys, children, max_size=3).map(lambda items: defaultdict(list, items)),
        st.sets(st.one_of(texts, st.integers()), max_size=4),
    )


leaves = st.one_of(scalars, numpy_scalars, tensors(), families())
states = st.dictionaries(keys, st.recursive(leaves, containers, max_leaves=12), max_size=5)


@pytest.fixture(scope="module")
def saved():
    """Saves to memory with one writer for all examples, and returns the reader."""
    storage = MemoryStorage()
    storage.make_folder("/run")
    writer = CheckpointWriter(CheckpointWriterConfig(), ONE, storage=storage)
    reader = CheckpointReader(ONE, storage=storage)

    def save(state):
        writer.write("/run/c", state)
        return reader

    yield save
    writer.close()


slow_ok = settings(suppress_health_check=[*HealthCheck], max_examples=80)


@slow_ok
@given(states)
def test_any_state_comes_back(saved, state):
    """Any state dict of native kinds loads bit for bit, with its aliases."""
    loaded, missing = saved(state).read("/run/c")
    assert missing == []
    assert_same(state, loaded)
    assert sharing(loaded) == sharing(state)


@slow_ok
@given(states)
def test_any_state_is_its_own_template(saved, state):
    """A checkpoint loads into the very state that was saved, and into a loaded copy that was zeroed."""
    reader = saved(state)
    assert_same(reader.read("/run/c", state)[0], state)
    copy = reader.read("/run/c")[0]
    kept = tensors_in(copy)
    for tensor in kept:
        if isinstance(tensor, torch.Tensor):
            tensor.detach().zero_() if tensor.numel() else None
    again, missing = reader.read("/run/c", copy)
    assert again is copy
    assert missing == []
    assert_same(state, copy)


@settings(suppress_health_check=[*HealthCheck], max_examples=25)
@given(states)
def test_plain_torch_opens_any_state(state):
    """torch.load opens the file of any state, and finds the same keys and tensors."""
    from milepost import make_sync_checkpointer

    folder = tempfile.mkdtemp()
    try:
        with make_sync_checkpointer() as checkpointer:
            checkpointer.save(f"{folder}/c", state)
        plain = torch.load(f"{folder}/c/checkpoint_0.pt")
        assert_same(tensors_in(state), tensors_in(plain))
        assert len(plain) == len(state)
    finally:
        shutil.rmtree(folder)


PRIME = (1 << 61) - 1
HASHED = st.one_of(
    keys, st.complex_numbers(allow_nan=False), st.integers(-3, 3).map(lambda n: n * PRIME),
    st.just(torch.Size([1])),
    hnp.scalar_dtypes().flatmap(lambda kind: hnp.from_dtype(kind, allow_nan=False)),
    st.sampled_from([torch.float32, torch.device("cuda:127"), torch.device("cuda:128"), torch.device("hpu")]),
)  # fmt: skip


def deep(depth, make, leaf):
    """A value in so many containers."""
    for _ in range(depth):
        leaf = make(leaf)
    return leaf


odd = st.one_of(
    st.sampled_from([99, 100, 101, 150]).map(lambda n: {i * PRIME: 1 for i in range(n)}),
    st.sampled_from([99, 101]).map(lambda n: {(i * PRIME, "a") for i in range(n)}),
    st.sampled_from([100, 101]).map(lambda n: Counter({complex(1_000_003 * i, -i): 1 for i in range(n)})),
    st.dictionaries(HASHED, st.integers(), max_size=4),
    st.dictionaries(st.one_of(keys, st.complex_numbers(allow_nan=False)), scalars, max_size=4).map(Counter),
    st.tuples(
        st.sampled_from([1, 30, 150, 190, 197, 198, 199, 200, 400]), st.sampled_from([tuple, list])
    ).map(lambda pair: deep(pair[0], lambda inner: pair[1]([inner]), 1)),
    st.sampled_from([1, 197, 198, 199, 300, 600]).map(
        lambda n: Counter({deep(n, lambda inner: (inner,), 1): 1})
    ),
    st.sampled_from([1, 197, 198, 199]).map(lambda n: {deep(n, lambda inner: (inner,), 1): 1}),
    hnp.arrays(hnp.nested_dtypes(), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)),
    hnp.array_dtypes(allow_subarrays=True).map(lambda kind: np.zeros((2, 0), kind)),
    st.sampled_from([32, 64]).map(lambda n: np.zeros((1,) * n, "<M8[25s]")),
    st.binary(max_size=9).map(bytearray),
    st.lists(st.integers(0, 1), min_size=4, max_size=4).map(
        lambda n: torch.tensor(n).reshape(2, 2).to_sparse()
    ),
    st.sampled_from(
        [np.zeros(2, "S0"), np.zeros((0, 1 << 40), "S2"), np.zeros(0, "S100000"), np.void(b"ab")]
    ),
)


@settings(suppress_health_check=[*HealthCheck], max_examples=150)
@given(st.dictionaries(keys, st.one_of(odd, st.lists(odd, max_size=2)), max_size=2))
def test_what_save_accepts_loads(saved, state):
    """A state near the limits of the format is refused by name when it is saved, or it loads as it was."""
    try:
        reader = saved(state)
    except StateError as error:
        assert error.key or "" in state  # noqa: PT017 - it may also be saved
        return
    assert_same(state, reader.read("/run/c")[0])
    assert_same(state, reader.read("/run/c", dict.fromkeys(state))[0])


@pytest.mark.parametrize(
    "count", [1_000_000, pytest.param(10_000_000, marks=[pytest.mark.slow, pytest.mark.timeout(600)])]
)
def test_very_many_integers_load(saved, count):
    """An honest list of millions of integers saves and loads."""
    state = {"ids": list(range(count))}
    assert saved(state).read("/run/c")[0] == state


plain_values = st.recursive(scalars, containers, max_leaves=20)


def refuse(value, path):
    raise AssertionError(f"{value!r} at {path} is no native value")


@given(plain_values)
def test_any_value_is_written_down_and_read_back(value):
    """The tree of any plain value survives JSON, passes its check, and gives the same value."""
    import msgspec

    node = msgspec.json.decode(msgspec.json.encode(TreeEncoder(refuse).encode(value)))
    check_tree(node)
    assert_same(value, TreeDecoder().decode(node))


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-9, 9), st.floats(allow_nan=False), texts),
    lambda children: st.lists(children, max_size=4),
    max_leaves=10,
)
tags = st.sampled_from(
    ["none", "bool", "int", "float", "complex", "str", "bytes", "list", "tuple", "set", "dict", "ordered",
     "default", "size", "dtype", "device", "tensor", "scalar", "array", "blob", "object", "x"]
)  # fmt: skip


@settings(max_examples=300)
@given(st.tuples(tags, json_values, json_values).map(list) | st.tuples(tags, json_values).map(list))
def test_no_malformed_tree_gets_past_the_check(node):
    """Whatever stands for a node is refused by the check with ValueError, or decodes without a crash."""
    try:
        check_tree(node, tensors=2, records=[4, 4])
    except ValueError:
        return
    leaves_ = dict.fromkeys(("size", "dtype", "device", "tensor", "scalar", "array", "blob", "object"), tuple)
    TreeDecoder({**leaves_, "size": lambda node: tuple(node[1])}).decode(node)


def test_an_object_in_place_of_a_key_is_malformed():
    """A JSON object where a key node belongs is a ValueError, and no TypeError from hashing it."""
    with pytest.raises(ValueError, match="malformed"):
        check_tree(["dict", [[{}, ["none"]]]])
