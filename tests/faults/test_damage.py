"""Damage to a checkpoint: any byte changed, any length cut off, files gone, added to, or exchanged."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from support.saves import load, save
from support.states import make_state, same

from milepost.barriers import Barrier
from milepost.checkpoint_reader import CheckpointReader
from milepost.checkpoint_writer import CheckpointWriter, CheckpointWriterConfig
from milepost.errors import CorruptCheckpointError, LoadError, MilepostError
from milepost.health.verify import verify
from milepost.storage import default_storage
from milepost.types import RankInfo

FILES = ["manifest.json", "index_0.json", "checkpoint_0.pt", "vocabulary.txt", "logs/loss.csv"]
NOT_LOADED = {"vocabulary.txt", "logs/loss.csv"}


@pytest.fixture
def checkpoint(quick_path):
    """A checkpoint of a few kilobytes, of every kind of record, with attachments."""
    path = f"{quick_path}/step"
    save(path, 1, attach=True)
    assert sum(os.path.getsize(f"{path}/{name}") for name in FILES) < 12_000
    return path


def detected(path):
    """Whether `verify` finds something wrong."""
    try:
        return bool(verify(default_storage(), path).problems)
    except LoadError:
        return True


def loads(path, templates=True):
    """Whether it loads, bit for bit, both anew and into a template; else both say that it is damaged."""
    results = []
    for target in (None, make_state(2))[: 1 + templates]:
        try:
            found = load(path, target)
        except LoadError as error:
            results.append("step" not in str(error))  # an error must name the file
        else:
            assert same(found, make_state(1)), "a wrong value was loaded"
            results.append(True)
    assert len(set(results)) == 1
    return results[0]


def record_bytes(path):
    """The positions in the data file that `load` uses."""
    records = json.loads(Path(f"{path}/index_0.json").read_bytes())["records"]
    spans = zip(records["offset"], records["length"], strict=True)
    return {position for offset, length in spans for position in range(offset, offset + length)}


def flips(path, name, bits):
    """Check the checkpoint with each byte of a file changed, in each of these bits."""
    used = record_bytes(path) if name == "checkpoint_0.pt" else {}
    passed = []
    with open(f"{path}/{name}", "r+b", buffering=0) as file:
        content = file.read()
        for position, byte in enumerate(content):
            for bit in bits(position):
                os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), position)
                assert detected(path), f"verify passed with bit {bit} of byte {position} of {name} flipped"
                if loads(path, templates=not used or position in used or position % 16 == 0):
                    assert position not in used
                    passed.append(position)
            os.pwrite(file.fileno(), bytes([byte]), position)
    assert not detected(path)
    return passed, len(content)


@pytest.mark.parametrize("name", FILES)
def test_a_flip_of_any_byte_is_detected(checkpoint, name):
    """In any byte of any file: `verify` finds it, and what `load` returns is right or an error."""
    passed, size = flips(checkpoint, name, lambda position: [position % 8])
    if name in NOT_LOADED:
        assert len(passed) == size
    elif name != "checkpoint_0.pt":
        assert not passed
    else:
        assert 0 < len(passed) < size


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_flip_of_any_bit_is_detected(checkpoint, name):
    """As above, for all bits of every byte."""
    flips(checkpoint, name, lambda _: range(8))


@pytest.mark.parametrize("name", FILES)
def test_any_truncation_is_detected(checkpoint, name):
    """At any length of any file: `verify` finds it, and `load` raises."""
    content = Path(f"{checkpoint}/{name}").read_bytes()
    for length in range(len(content) - 1, -1, -1):
        os.truncate(f"{checkpoint}/{name}", length)
        assert detected(checkpoint), f"verify passed with {name} cut to {length} bytes"
        assert not loads(checkpoint, templates=length % 16 == 0)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("extra", [b"\0", b"}", b"\n", b"PK\5\6" + bytes(18), bytes(5000)])
def test_appended_bytes_are_detected(checkpoint, name, extra):
    """Bytes added to any file are found by `verify` and by `load`."""
    with open(f"{checkpoint}/{name}", "ab") as file:
        file.write(extra)
    assert detected(checkpoint)
    assert not loads(checkpoint)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_detected(checkpoint, name):
    """A file that is gone is an error of `verify` and of `load` that names it."""
    os.remove(f"{checkpoint}/{name}")
    with pytest.raises(LoadError, match=name if name != "manifest.json" else "no manifest"):
        load(checkpoint)
    assert detected(checkpoint)
    assert not loads(checkpoint)


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_checkpoint_is_detected(checkpoint, quick_path, name):
    """A file of one checkpoint in the folder of another is found, though it is whole in itself."""
    other = f"{quick_path}/other"
    save(other, 2, attach=True)
    assert os.path.getsize(f"{other}/checkpoint_0.pt") == os.path.getsize(f"{checkpoint}/checkpoint_0.pt")
    shutil.copyfile(f"{other}/{name}", f"{checkpoint}/{name}")
    assert detected(checkpoint)
    assert loads(checkpoint) == (name in NOT_LOADED)


@pytest.mark.parametrize("first", FILES)
@pytest.mark.parametrize("second", FILES)
def test_files_that_changed_places_are_detected(checkpoint, first, second):
    """Two files of a checkpoint under each other's names are found."""
    if first >= second:
        return
    os.rename(f"{checkpoint}/{first}", f"{checkpoint}/aside")
    os.rename(f"{checkpoint}/{second}", f"{checkpoint}/{first}")
    os.rename(f"{checkpoint}/aside", f"{checkpoint}/{second}")
    assert detected(checkpoint)
    assert loads(checkpoint) == ({first, second} <= NOT_LOADED and not _sizes_differ(checkpoint))


def _sizes_differ(checkpoint):
    return os.path.getsize(f"{checkpoint}/vocabulary.txt") != os.path.getsize(f"{checkpoint}/logs/loss.csv")


# ---------------------------------------------------------------------------- several ranks


class _NoBarrier(Barrier):
    barrier_type = "none"

    def __init__(self):
        pass

    def execute_barrier(self):
        pass


@pytest.fixture
def two_ranks(quick_path, monkeypatch):
    """A checkpoint of two ranks."""
    monkeypatch.setenv("MILEPOST_START_ID", "start")
    path = f"{quick_path}/step"
    for rank in range(2):
        writer = CheckpointWriter(CheckpointWriterConfig(), RankInfo(rank, 2))
        writer.write(path, {"x": torch.full((4,), rank)})
        writer.close()
    return path


def test_the_files_of_two_ranks_may_not_change_places(two_ranks):
    """One rank's index or data under another rank's name is found by `verify`, and by that rank's `load`."""
    assert not detected(two_ranks)
    for names in (["index_{}.json"], ["checkpoint_{}.pt"], ["index_{}.json", "checkpoint_{}.pt"]):
        for name in names:
            _swap(two_ranks, name)
        assert detected(two_ranks)
        for rank in range(2):
            with pytest.raises(CorruptCheckpointError):
                CheckpointReader(RankInfo(rank, 2)).read(two_ranks)
        for name in names:
            _swap(two_ranks, name)
    assert not detected(two_ranks)


def _swap(path, name):
    first, second = (f"{path}/{name.format(rank)}" for rank in range(2))
    os.rename(first, f"{path}/aside")
    os.rename(second, first)
    os.rename(f"{path}/aside", second)


def test_damage_to_one_rank_leaves_the_other_loadable(two_ranks):
    """A flip in rank 1's tensors is named by `verify` and an error of rank 1's load; rank 0 still loads."""
    content = Path(f"{two_ranks}/checkpoint_1.pt").read_bytes()
    position = content.index(torch.full((4,), 1).numpy().tobytes())
    with open(f"{two_ranks}/checkpoint_1.pt", "r+b") as file:
        file.seek(position)
        file.write(b"\7")
    (problem,) = verify(default_storage(), two_ranks).problems
    assert (problem.file, problem.keys) == ("checkpoint_1.pt", ("x",))
    assert CheckpointReader(RankInfo(0, 2)).read(two_ranks)[0]["x"].tolist() == [0] * 4
    with pytest.raises(CorruptCheckpointError, match="x"):
        CheckpointReader(RankInfo(1, 2)).read(two_ranks)


def test_damage_found_while_filling_says_that_targets_were_modified(checkpoint):
    """Damage in a tensor's bytes: the error says if the template was touched; with "first" it is not."""
    content = Path(f"{checkpoint}/checkpoint_0.pt").read_bytes()
    position = content.index(make_state(1)["weight"].numpy().tobytes())
    with open(f"{checkpoint}/checkpoint_0.pt", "r+b") as file:
        file.seek(position)
        file.write(b"\7")
    template = make_state(2)
    with pytest.raises(CorruptCheckpointError) as caught:
        load(checkpoint, template, verify="first")
    assert not caught.value.targets_modified
    assert same(template, make_state(2))
    with pytest.raises(MilepostError) as caught:
        load(checkpoint, template)
    assert caught.value.targets_modified
