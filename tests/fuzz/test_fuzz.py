"""Random and structured changes to index, manifest and data file: a value or an error, nothing else."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz_checkpoint import TARGETS, Fuzzed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.forge import dump

pytestmark = pytest.mark.filterwarnings("ignore")

JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**65), 2**65),
    st.integers(-2, 20),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
    st.sampled_from(
        [
            "float32",
            "complex64",
            "raw",
            "tensor",
            "parameter",
            "ndarray",
            "dict",
            "object",
            "array",
            "cpu",
            "meta",
            "checkpoint_0.pt",
            "index_0.json",
            "..",
            "<f4",
            "<M8[ns/0]",
            "|S0",
            "[('a', '<f4', (2,))]",
            "_inductor",
            "hpu:128",
            "privateuseone",
            hex(2**61 - 1),
            hex(2**63 - 4),
            "|O",
            "ff",
            "0x1",
            2**63 - 1,
            2**63,
            2**62,
            2**31,
        ]
    ),
    st.lists(st.integers(-1, 5), max_size=3),
    st.sampled_from(
        [{}, [], ["none"], ["tensor", 0], ["dict", []], ["object", 5, "x"], [["str", "a"], ["none"]]]
    ),
)


@pytest.fixture(scope="module", params=TARGETS)
def fuzzed(request):
    """A checkpoint to change."""
    target = Fuzzed(request.param)
    yield target
    shutil.rmtree(Path(target.path).parent)


@pytest.fixture(scope="module")
def opcodes():
    """A checkpoint with an object to change."""
    target = Fuzzed("object")
    yield target
    shutil.rmtree(Path(target.path).parent)


@pytest.fixture(scope="module", params=["index", "manifest"])
def structured(request):
    """A checkpoint whose JSON is to be changed."""
    target = Fuzzed(request.param)
    target.forge.sign()
    yield target
    shutil.rmtree(Path(target.path).parent)


def places(value, path=()):
    """The paths of all values in a JSON value."""
    yield path
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, child in children:
        yield from places(child, (*path, key))


def change(data, value):
    """Change a JSON value at one place."""
    path = data.draw(st.sampled_from(list(places(value))[1:]))
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    kind = data.draw(st.sampled_from(["replace", "remove", "repeat", "move", "nudge"]))
    old = parent[path[-1]]
    if kind == "remove":
        del parent[path[-1]]
    elif kind == "repeat" and isinstance(parent, list):
        parent.insert(path[-1], copy.deepcopy(old))
    elif kind == "nudge" and type(old) is int:
        parent[path[-1]] = old + data.draw(st.sampled_from([-64, -4, -1, 1, 4, 64]))
    elif kind == "move":
        source = value
        for key in data.draw(st.sampled_from(list(places(value))[1:])):
            source = source[key]
        parent[path[-1]] = copy.deepcopy(source)
    else:
        parent[path[-1]] = copy.deepcopy(data.draw(JUNK))  # what is drawn must not be changed later


def examples(quick):
    return settings(
        max_examples=quick,
        suppress_health_check=[
            HealthCheck.function_scoped_fixture,
            HealthCheck.too_slow,
            HealthCheck.data_too_large,
        ],
        deadline=None,
    )


def mutate_structure(structured, data):
    forge = structured.forge
    value = copy.deepcopy(forge.index if structured.target == "index" else forge.body)
    for _ in range(data.draw(st.integers(1, 3))):
        change(data, value)
    structured.check(dump(value))


def mutate_bytes(fuzzed, data):
    content = bytearray(data.draw(st.sampled_from(fuzzed.seeds())))
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position : position + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=8))
        content = content or bytearray(1)
    fuzzed.check(bytes(content))


@examples(300)
@given(data=st.data())
def test_a_changed_index_or_manifest_is_a_value_or_an_error(structured, data):
    """Values replaced, removed, repeated, moved or off by a little, and signed: no crash, no other error."""
    mutate_structure(structured, data)


OPCODES = [
    *[bytes([code]) for code in b"N]}()tRbQaesu.0" + b"\x81\x85\x86\x87\x88\x89\x8f"],
    *[bytes((*b"q", n)) for n in range(3)],
    *[bytes((*b"h", n)) for n in range(3)],
    *[f"c{name}\n".encode() for name in (
        "__builtin__\nset", "builtins\nbytearray", "__builtin__\ncomplex", "collections\nCounter",
        "collections\nOrderedDict", "_codecs\nencode", "torch\nSize", "torch\nFloatStorage", "torch\nfloat32",
        "torch._utils\n_rebuild_tensor_v2", "torch._tensor\n_rebuild_from_type_v2", "torch\nTensor",
        "torch.nn.parameter\nParameter", "torch\ndevice",
    )],
    *[pickle.dumps(value, 2)[2:-1] for value in (
        1 << 33, (1 << 61) - 1, -1.0, "latin1", "storage", (2,), ("storage", "0"), {}, [(1, 2)], (1 << 62, 0)
    )],
    b")" + b"\x85" * 2000, b"q\0" + b"h\0h\0\x86q\0" * 40,
]  # fmt: skip


@examples(300)
@given(pieces=st.lists(st.sampled_from(OPCODES), max_size=12))
def test_any_opcodes_are_a_value_or_an_error(opcodes, pieces):
    """Opcodes of pickle in any order, and signed: no crash, no hang, no other error."""
    opcodes.check(b"\x80\x02" + b"".join(pieces) + b".")


@examples(150)
@given(data=st.data())
def test_changed_bytes_are_a_value_or_an_error(fuzzed, data):
    """Bytes replaced, removed or inserted, and signed: no crash, no other error."""
    mutate_bytes(fuzzed, data)


@pytest.mark.slow
@examples(20_000)
@given(data=st.data())
def test_a_changed_index_or_manifest_for_long(structured, data):
    """As above, many times."""
    mutate_structure(structured, data)


@pytest.mark.slow
@examples(10_000)
@given(data=st.data())
def test_changed_bytes_for_long(fuzzed, data):
    """As above, many times."""
    mutate_bytes(fuzzed, data)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
@pytest.mark.parametrize("target", TARGETS)
def test_the_fuzz_target_finds_nothing_in_a_while(tmp_path, target):
    """Half a minute of coverage-guided fuzzing of each target ends without a finding."""
    script = str(Path(__file__).with_name("fuzz_checkpoint.py"))
    done = subprocess.run(
        [sys.executable, script, target, "-max_total_time=30", "-rss_limit_mb=4096"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
