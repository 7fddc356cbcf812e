"""What `verify` says of damage (tests/faults shows that it finds all of it)."""

from __future__ import annotations

import os
import shutil
import zipfile

import pytest
import torch

import milepost
from milepost.checkpoint_writer import WriterHook, partial_directory
from milepost.format.index import CHUNK_BYTES
from milepost.health.verify import verify
from milepost.storage import default_storage

STORAGE = default_storage()
MIDDLE = torch.arange(7 * CHUNK_BYTES // 8, dtype=torch.float32)


class AttachNotes(WriterHook):
    """Adds a file to each checkpoint."""

    def pre_commit(self, path, **kwargs):
        with open(os.path.join(partial_directory(), "notes.txt"), "w") as file:
            file.write("all is well")

    def post_commit(self, path, **kwargs):
        pass


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small checkpoint: a few tensors, an object, an attachment."""
    path = tmp_path_factory.mktemp("small") / "ckpt"
    state = {
        "weight": torch.arange(12.0).reshape(3, 4),
        "nested": [torch.tensor([1, 2, 3]), {"bias": torch.ones(2, dtype=torch.bfloat16)}],
        "text": "x",
        "sparse": torch.eye(2).to_sparse(),
    }
    checkpointer = milepost.make_sync_checkpointer(commit_hook=AttachNotes())
    checkpointer.save(str(path), state, step=7)
    checkpointer.close()
    return path


@pytest.fixture
def copy(small, tmp_path):
    """A copy of the small checkpoint that may be damaged."""
    return shutil.copytree(small, tmp_path / "ckpt")


@pytest.fixture(scope="module")
def chunked(tmp_path_factory):
    """A checkpoint with a tensor of three and a half chunks, between two small ones."""
    path = tmp_path_factory.mktemp("chunked") / "ckpt"
    checkpointer = milepost.make_sync_checkpointer()
    checkpointer.save(str(path), {"first": torch.ones(5), "middle": MIDDLE, "last": {0: torch.zeros(5)}})
    checkpointer.close()
    return path


def flip(path, offset):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0xFF]))


def offset_of(path, tensor):
    """Where a tensor's bytes are in a data file."""
    data = path.read_bytes()
    offset = data.find(tensor.contiguous().numpy().tobytes())
    assert offset > 0
    return offset


def test_a_whole_checkpoint_has_no_problem(small):
    """Of an undamaged checkpoint each listed byte is compared, and nothing is reported."""
    report = verify(STORAGE, str(small))
    sizes = [file.stat().st_size for file in small.iterdir() if file.name != "manifest.json"]
    assert not report.problems
    assert not report.warnings
    assert (report.files, report.bytes, report.step) == (len(sizes) + 1, sum(sizes), 7)
    assert "notes.txt" in os.listdir(small)


def test_progress_ends_at_the_total(chunked):
    """The progress that is told never falls and ends when all bytes were read."""
    seen = []
    verify(STORAGE, str(chunked), lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len({total for _, total in seen}) == 1
    assert seen[-1][0] == seen[-1][1] > 3 * CHUNK_BYTES


def test_damage_is_attributed_to_the_tensor(copy):
    """A flipped byte of a tensor is reported with its file, its key and where it is; others are not named."""
    data = copy / "checkpoint_0.pt"
    offset = offset_of(data, torch.tensor([1, 2, 3]))
    flip(data, offset + 9)
    (problem,) = verify(STORAGE, str(copy)).problems
    assert (problem.file, problem.keys) == ("checkpoint_0.pt", ("nested[0]",))
    assert problem.offset == offset
    assert problem.length == 24
    assert "damaged" in problem.message


def test_adjacent_chunks_are_one_problem_and_others_their_own(chunked, tmp_path):
    """Damage is told chunk by chunk: neighbours together, the rest apart, whole tensors left out."""
    copy = shutil.copytree(chunked, tmp_path / "ckpt")
    data = copy / "checkpoint_0.pt"
    start = offset_of(data, MIDDLE)
    for chunk in (0, 1, 3):
        flip(data, start + chunk * CHUNK_BYTES + 5)
    problems = verify(STORAGE, str(copy)).problems
    assert [(p.offset - start, p.length, p.keys) for p in problems] == [
        (0, 2 * CHUNK_BYTES, ("middle",)),
        (3 * CHUNK_BYTES, CHUNK_BYTES // 2, ("middle",)),
    ]


def test_damage_between_tensors_is_told_apart(copy):
    """A flipped byte of a zip header is damage outside of the tensors, also beside a damaged tensor."""
    data = copy / "checkpoint_0.pt"
    flip(data, 10)
    (problem,) = verify(STORAGE, str(copy)).problems
    assert "outside of the tensors" in problem.message
    assert problem.keys == ()
    flip(data, offset_of(data, torch.tensor([1, 2, 3])))
    problems = verify(STORAGE, str(copy)).problems
    assert [problem.keys for problem in problems] == [(), ("nested[0]",)]


def test_a_truncated_file_names_the_tensors_it_lost(chunked, tmp_path):
    """When a data file ends early, the tensors that lie beyond its end are named as missing."""
    copy = shutil.copytree(chunked, tmp_path / "ckpt")
    data = copy / "checkpoint_0.pt"
    whole = data.read_bytes()
    start = offset_of(data, MIDDLE)
    os.truncate(data, start + 3 * CHUNK_BYTES)
    first, *rest = verify(STORAGE, str(copy)).problems
    assert f"{len(whole)} bytes expected, {start + 3 * CHUNK_BYTES} found" in first.message
    missing = {key for problem in rest for key in problem.keys}
    assert missing == {"middle", "last.0"}
    assert all("missing" in problem.message for problem in rest)


def test_without_its_index_a_data_file_is_still_checked(copy):
    """With a damaged index the data file is compared with the manifest's CRC."""
    flip(copy / "index_0.json", 40)
    (problem,) = verify(STORAGE, str(copy)).problems
    assert problem.file == "index_0.json"
    flip(copy / "checkpoint_0.pt", 10)
    problems = verify(STORAGE, str(copy)).problems
    assert [problem.file for problem in problems] == ["index_0.json", "checkpoint_0.pt"]
    assert "CRC-32" in problems[1].message


def test_tied_tensors_are_named_together(tmp_path):
    """Damage to bytes that several keys share names all of them."""
    shared = torch.arange(100.0)
    checkpointer = milepost.make_sync_checkpointer()
    checkpointer.save(str(tmp_path / "ckpt"), {"a": shared, "b": shared, "tail": shared[90:]})
    checkpointer.close()
    data = tmp_path / "ckpt" / "checkpoint_0.pt"
    flip(data, offset_of(data, shared))
    (problem,) = verify(STORAGE, str(tmp_path / "ckpt")).problems
    assert problem.keys == ("a", "b", "tail")


def test_several_ranks_are_all_read(tmp_path):
    """A checkpoint of two ranks is verified whole, and damage names the rank's file."""
    from milepost.checkpoint_writer import CheckpointWriter, CheckpointWriterConfig

    for rank in range(2):
        config = CheckpointWriterConfig(start_id="start")
        writer = CheckpointWriter(config, milepost.RankInfo(rank, 2))
        writer.write(str(tmp_path / "ckpt"), {"mine": torch.full((50,), float(rank + 1))})
        writer.close()
    report = verify(STORAGE, str(tmp_path / "ckpt"))
    assert (report.problems, report.files) == ([], 5)
    data = tmp_path / "ckpt" / "checkpoint_1.pt"
    flip(data, offset_of(data, torch.full((50,), 2.0)))
    (problem,) = verify(STORAGE, str(tmp_path / "ckpt")).problems
    assert (problem.file, problem.keys) == ("checkpoint_1.pt", ("mine",))


def test_an_index_of_another_checkpoint_is_refused(small, chunked, tmp_path):
    """An index that was exchanged for a valid one of another save is found."""
    copy = shutil.copytree(small, tmp_path / "ckpt")
    shutil.copy(chunked / "index_0.json", copy / "index_0.json")
    assert {problem.file for problem in verify(STORAGE, str(copy)).problems} == {"index_0.json"}


# ---------------------------------------------------------------------------- plain torch.save files


@pytest.fixture
def plain(tmp_path):
    """A folder with a file of plain torch.save."""
    torch.save({"w": torch.arange(1000.0)}, tmp_path / "checkpoint_0.pt")
    return tmp_path


def test_plain_files_are_read(plain):
    """A file of plain torch.save is read whole, without a problem."""
    report = verify(STORAGE, str(plain))
    assert (report.kind, report.files) == ("torch", 1)
    assert report.bytes == (plain / "checkpoint_0.pt").stat().st_size
    assert not report.problems
    assert not report.warnings


def test_a_wrong_crc_in_a_plain_file_is_a_warning(plain):
    """The CRCs of plain torch.save files can be off in whole files, so a mismatch is only a warning."""
    data = plain / "checkpoint_0.pt"
    flip(data, offset_of(data, torch.arange(1000.0)) + 100)
    report = verify(STORAGE, str(plain))
    assert not report.problems
    (warning,) = report.warnings
    assert "data/0" in warning.message


def test_a_broken_plain_archive_is_a_problem(plain):
    """A plain file that is no zip archive any more is damaged, and so is one with compressed entries."""
    data = plain / "checkpoint_0.pt"
    os.truncate(data, 2000)
    assert len(verify(STORAGE, str(plain)).problems) == 1
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"0" * 1000)
    (problem,) = verify(STORAGE, str(plain)).problems
    assert "compressed" in problem.message


# ---------------------------------------------------------------------------- no checkpoint


def test_where_there_is_no_checkpoint_it_is_an_error(tmp_path):
    """An absent path, an empty folder and a save that never committed are errors of their own."""
    with pytest.raises(milepost.CheckpointNotFoundError):
        verify(STORAGE, str(tmp_path / "nothing"))
    with pytest.raises(milepost.CheckpointNotFoundError):
        verify(STORAGE, str(tmp_path))
    checkpointer = milepost.make_sync_checkpointer()
    checkpointer.save(str(tmp_path / "ckpt"), {"a": torch.ones(3)})
    checkpointer.close()
    (tmp_path / "ckpt" / "manifest.json").unlink()
    with pytest.raises(milepost.IncompleteCheckpointError):
        verify(STORAGE, str(tmp_path / "ckpt"))
