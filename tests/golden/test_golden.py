"""A checkpoint of each version of the format is kept, and read by every later version of the library."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from make_v1 import ATTEMPT, METADATA, STEP, plain_state, state, write
from support.saves import data_file, load, manifest_of, raw_index_of, torch_load
from support.states import assert_same, sharing

from milepost.format.tree import TreeDecoder

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning")

HERE = Path(__file__).parent
CASES = {"v1": state, "v1_plain": plain_state}


@pytest.fixture(params=CASES)
def golden(request, tmp_path):
    """A copy of a golden checkpoint, and what it holds."""
    return str(shutil.copytree(HERE / request.param, tmp_path / "c")), CASES[request.param]()


@pytest.mark.parametrize("verify", [True, False, "first"])
def test_version_1_is_read(golden, verify):
    """The golden checkpoints load bit for bit, with and without a template, and with their aliases."""
    path, expected = golden
    loaded = load(path, verify=verify)
    assert_same(expected, loaded)
    assert sharing(loaded) == sharing(expected)
    template = dict.fromkeys(expected)
    template["model"] = {
        "weight": torch.zeros(4, 6),
        "tied": torch.zeros(2, 6),
        "transposed": torch.zeros(6, 4),
    }
    load(path, template, verify=verify)
    assert torch.equal(template["model"]["transposed"], expected["model"]["transposed"])


def test_plain_torch_reads_version_1(golden):
    """The golden files open with plain torch.load."""
    path, expected = golden
    for options in ({}, {"mmap": True}, {"weights_only": False}):
        assert_same(expected["model"], torch_load(path, **options)["model"])


def test_the_labels_of_version_1_are_read(golden):
    """The golden manifests tell attempt, step, metadata and sizes."""
    manifest = manifest_of(golden[0])
    assert (manifest.attempt, manifest.step, manifest.version) == (ATTEMPT, STEP, (1, 0))
    assert TreeDecoder().decode(manifest.metadata) == METADATA
    assert manifest.size_bytes == sum(
        Path(golden[0], name).stat().st_size for name in ("index_0.json", "checkpoint_0.pt")
    )


def test_the_same_values_still_give_the_golden_bytes(tmp_path):
    """Saving the golden values today gives the same data file, byte for byte, and the same index."""
    write(str(tmp_path / "c"), plain_state())
    kept = HERE / "v1_plain"
    assert Path(data_file(tmp_path / "c")).read_bytes() == (kept / "checkpoint_0.pt").read_bytes()
    now, then = raw_index_of(tmp_path / "c"), raw_index_of(kept)
    for index in (now, then):
        for name in ("time", "process", "writer"):
            del index[name]
    assert now.pop("sequence") == 1  # which is younger than the format, and may be absent
    assert now == then


def test_the_golden_checkpoints_are_small():
    """All golden files together stay below 64 KiB."""
    files = [file for name in CASES for file in (HERE / name).iterdir()]
    assert sum(file.stat().st_size for file in files) < 64 << 10
