"""The reader in docs/ is short, uses what it says, reads every kind that it should, and verifies."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.saves import data_file, index_of, save
from support.states import (
    array_values,
    assert_same,
    bytes_tensor,
    differences,
    native_values,
    object_values,
    raw_bytes,
    savable_dtypes,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning")

SOURCE = Path(__file__).resolve().parents[2] / "docs" / "read_checkpoint.py"


@pytest.fixture(scope="module")
def read():
    spec = importlib.util.spec_from_file_location("read_checkpoint", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.read


def test_it_is_short_and_needs_only_numpy():
    """It has at most 60 lines, and imports nothing but numpy and six modules of the standard library."""
    text = SOURCE.read_text()
    assert len(text.splitlines()) <= 60
    assert max(map(len, text.splitlines())) <= 110
    names = {
        alias.name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert names == {"base64", "hashlib", "json", "struct", "sys", "zlib", "numpy"}


def plain(value):
    """What the reader is to show of a value that is no tensor."""
    if isinstance(value, torch.Size):
        return tuple(value)
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(item) for item in value)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return str(value) if isinstance(value, torch.device) else value


def test_it_reads_every_native_value(tmp_path, read):
    """Every native kind is read as it was saved; dtypes and devices as their names."""
    state = native_values()
    del state["scalars"][-1]  # structured scalars are left as bytes
    assert_same(plain(state), read(save(tmp_path / "c", state)))


def test_it_reads_every_array(tmp_path, read):
    """Every numpy array but structured ones is read with its dtype and shape."""
    state = array_values()
    loaded = read(save(tmp_path / "c", state))
    assert loaded.pop("structured") == state.pop("structured").tobytes()
    for name in state:
        assert differences(state[name], loaded[name]) == [], name


def test_it_reads_every_dtype_and_view(tmp_path, read):
    """Tensors of each dtype, transposed, expanded, empty and of no dimensions, are read by their bits."""
    for number, dtype in enumerate(savable_dtypes()):
        base = bytes_tensor(dtype, (4, 3), number)
        state = {
            "t": base.t(),
            "e": base[:1].expand(5, 3),
            "0": base[1, 1],
            "none": base[:0],
            "gaps": base[::2, ::2],
        }
        loaded = read(save(tmp_path / str(number), state))
        for name, tensor in state.items():
            assert loaded[name].shape == tuple(tensor.shape)
            assert loaded[name].tobytes() == raw_bytes(tensor), (dtype, name)


def test_it_resolves_conjugates_and_negatives(tmp_path, read):
    """Conjugate and negative views are read as their values."""
    values = torch.tensor([1 + 2j, 3 - 4j])
    state = {"conj": values.conj(), "neg": values.conj().imag}
    loaded = read(save(tmp_path / "c", state))
    assert loaded["conj"].tolist() == [1 - 2j, 3 + 4j]
    assert loaded["neg"].tolist() == [-2, 4]


def test_it_leaves_objects_as_their_pickles(tmp_path, read):
    """Objects do not stop it: they are the bytes of their pickles, all else is read."""
    loaded = read(save(tmp_path / "c", {"objects": object_values(), "w": torch.ones(2)}))
    assert loaded["objects"]["coo"][:2] == b"\x80\x02"
    assert loaded["objects"]["scheduler"]["base_lrs"] == [np.float64(0.1)]
    assert loaded["w"].tolist() == [1, 1]


def run(path):
    return subprocess.run([sys.executable, str(SOURCE), path], capture_output=True, text=True, check=False)


def test_it_finds_a_damaged_chunk(tmp_path):
    """A flipped byte in any of the three files ends it with a message that names the place."""
    path = save(tmp_path / "c", {"a": torch.zeros(100_000), "b": 5})
    good = run(path)
    assert (good.returncode, "'b': 5" in good.stdout) == (0, True)
    start = index_of(path).records.offset[0]
    for file, offset, words in (
        (data_file(path), start + 300_000, f"checkpoint_0.pt at byte {start + 262_144}"),
        (f"{path}/index_0.json", 50, "index_0.json"),
        (f"{path}/manifest.json", 120, "manifest.json"),
    ):
        data = bytearray(Path(file).read_bytes())
        data[offset] ^= 4
        Path(file).write_bytes(data)
        bad = run(path)
        assert bad.returncode == 1
        assert bad.stderr.strip() == f"damaged: {words}"
        data[offset] ^= 4
        Path(file).write_bytes(data)
