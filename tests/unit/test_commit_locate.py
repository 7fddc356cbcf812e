"""What a load of a path opens, what it says when there is nothing, and what a listing shows."""

from __future__ import annotations

import errno
import os
import zipfile

import pytest
from commit_steps import Wrapper, arrive, content, loaded_step, make_folders, put, save, tree
from memory_storage import MemoryStorage

from milepost.commit import begin, locate
from milepost.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    IncompleteCheckpointError,
    StorageError,
    UnsupportedFormatError,
)
from milepost.format.manifest import encode_manifest
from milepost.health.listing import explain, scan
from milepost.storage.local import LocalStorage
from milepost.testing import FaultyStorage

PATH = "/run/step-100"


@pytest.fixture
def storage():
    """An empty storage with a folder for runs."""
    storage = MemoryStorage()
    make_folders(storage, "/run")
    return storage


def rewrite(storage, path, data):
    storage.remove(path)
    put(storage, path, data)


def put_folder(storage, path):
    storage.remove(path)
    storage.make_folder(path)


def located(storage, path=PATH):
    found = locate(storage, path)
    found.folder.close()
    return found


def test_a_published_checkpoint_is_found_with_its_manifest(storage):
    """`locate` gives the open folder, the manifest and the real path."""
    save(storage, PATH, 1)
    found = located(storage)
    assert (found.path, found.in_place, found.manifest.step) == (PATH, False, 1)


def test_a_checkpoint_is_found_through_a_link(tmp_path):
    """A link such as ``latest`` leads to the checkpoint, and to its unpublished successor."""
    storage = LocalStorage()
    save(storage, str(tmp_path / "step"), 1)
    os.symlink("step", tmp_path / "latest")
    assert located(storage, str(tmp_path / "latest")).path == str(tmp_path / "step")
    attempt = arrive(storage, str(tmp_path / "step"), 2)
    assert loaded_step(storage, str(tmp_path / "latest")) == 2
    attempt.close()


def test_the_newer_of_published_and_waiting_is_found(storage):
    """An unpublished complete attempt is read in place if it is newer than what is published."""
    older = arrive(storage, PATH, 1)
    assert located(storage).in_place
    save(storage, PATH, 2)
    assert not located(storage).in_place
    newer = arrive(storage, PATH, 3)
    found = located(storage)
    assert (found.in_place, found.path, found.manifest.step) == (True, newer.folder, 3)
    for attempt in (older, newer):
        attempt.abort(ValueError("no"))
        attempt.close()
    assert loaded_step(storage, PATH) == 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda storage: storage.remove(f"{PATH}/checkpoint_0.pt"), "checkpoint_0.pt is missing"),
        (lambda storage: rewrite(storage, f"{PATH}/checkpoint_0.pt", b"x"), "has 1 bytes instead of 9600"),
        (lambda storage: storage.remove(f"{PATH}/index_0.json"), "index_0.json is missing"),
        (lambda storage: rewrite(storage, f"{PATH}/manifest.json", b"{}"), "not a manifest"),
        (
            lambda storage: (
                storage.remove(f"{PATH}/index_0.json"),
                make_folders(storage, f"{PATH}/index_0.json"),
            ),
            "index_0.json is a folder, not a file",
        ),
    ],
    ids=["no data", "short data", "no index", "bad manifest", "folder"],
)
def test_a_checkpoint_that_is_not_what_its_manifest_says_is_corrupt(storage, damage, message):
    """Missing files, other sizes and a damaged manifest are found before anything is loaded."""
    save(storage, PATH, 1)
    damage(storage)
    with pytest.raises(CorruptCheckpointError, match=message) as caught:
        locate(storage, PATH)
    assert caught.value.path.startswith(PATH)
    assert [entry.state for entry in scan(storage, "/run")] == ["damaged"]


def test_a_checkpoint_of_a_later_format_is_refused(storage):
    """A manifest of a later format version says that Milepost must be updated."""
    save(storage, PATH, 1)
    manifest = located(storage).manifest
    manifest.version = (2, 0)
    rewrite(storage, f"{PATH}/manifest.json", encode_manifest(manifest))
    with pytest.raises(UnsupportedFormatError):
        locate(storage, PATH)


def test_a_folder_of_plain_files_has_no_manifest(storage):
    """Files of plain ``torch.save`` are found as they are."""
    make_folders(storage, PATH)
    put(storage, f"{PATH}/checkpoint_0.pt", content(0))
    found = located(storage)
    assert found.manifest is None
    assert [(entry.state, entry.world_size) for entry in scan(storage, "/run")] == [("committed", 1)]


def test_parts_of_a_save_are_never_taken_for_plain_files(tmp_path):
    """A folder with our record, an index or an attempt.json, but no manifest, is an incomplete checkpoint."""
    storage = LocalStorage()
    ours = tmp_path / "ours"
    ours.mkdir()
    with zipfile.ZipFile(ours / "checkpoint_0.pt", "w") as archive:
        archive.writestr("archive/data/0", bytes(200_000))
        archive.writestr("archive/.milepost", b"{}")
        archive.writestr("archive/version", b"3")
    save(storage, str(tmp_path / "indexed"), 1)
    os.remove(tmp_path / "indexed" / "manifest.json")
    for name in ("ours", "indexed"):
        with pytest.raises(IncompleteCheckpointError, match="no manifest"):
            locate(storage, str(tmp_path / name))
    assert {entry.state for entry in scan(storage, str(tmp_path))} == {"damaged"}


def test_nothing_there_names_the_nearest_checkpoints(storage):
    """Where there is no checkpoint, up to five that exist beside it are named, the nearest first."""
    for step in (100, 200, 300, 400, 500, 600, 101):
        save(storage, f"/run/step-{step}", step)
    make_folders(storage, "/run/step-1O0")
    with pytest.raises(CheckpointNotFoundError) as caught:
        locate(storage, "/run/step-10")
    named = caught.value.hint.rpartition(": ")[2].split(", ")
    assert set(named[:2]) == {"step-100", "step-101"}
    assert len(named) == 5
    assert isinstance(caught.value, FileNotFoundError)


def test_the_folder_above_checkpoints_names_those_in_it(storage):
    """Where the path is that of a whole run, the checkpoints in it are named, and none beside it."""
    for path in ("/other", "/run/step-1", "/run/step-2"):
        save(storage, path, 1)
    with pytest.raises(CheckpointNotFoundError) as caught:
        locate(storage, "/run")
    assert caught.value.hint == "existing checkpoints in /run: step-1, step-2"


@pytest.mark.parametrize("path", ["/run/file", "/run/empty", "/nowhere/at/all", "/run/strangers"])
def test_what_is_no_checkpoint_is_not_found(storage, path):
    """A file, an empty folder, a stranger's folder and a missing one are no checkpoints."""
    put(storage, "/run/file", b"")
    make_folders(storage, "/run/empty")
    make_folders(storage, "/run/strangers")
    put(storage, "/run/strangers/a.txt", b"")
    with pytest.raises(CheckpointNotFoundError) as caught:
        locate(storage, path)
    assert caught.value.path == path


def test_a_save_under_way_is_mentioned(storage):
    """Where a save has begun and not committed, the error says so."""
    attempt = begin(storage, PATH, attempt="job-1", rank=0, world_size=2)
    with pytest.raises(CheckpointNotFoundError, match="has not committed"):
        locate(storage, PATH)
    attempt.close()


def test_errors_of_the_file_system_are_not_taken_for_absence(storage):
    """A load that meets an I/O error raises it, and does not say that there is no checkpoint."""
    save(storage, PATH, 1)
    attempt = arrive(storage, PATH, 2)
    for number in range(1, 200):
        faulty = FaultyStorage(storage).fail_at(number, OSError(5, "Input/output error"))
        try:
            found = locate(faulty, PATH)
        except StorageError as error:
            assert error.errno == 5  # noqa: PT017 - which of many operations failed is the point
            continue
        found.folder.close()
        if len(faulty.operations) < number:
            break
    attempt.close()
    assert number > 10


def test_a_listing_shows_whole_and_partial_checkpoints_by_time(storage):
    """`scan` shows committed, waiting, partial and damaged ones, and leaves out the rest."""
    save(storage, "/run/a", 1, hook=lambda folder: put(storage, f"{folder}/notes", b"12345"))
    waiting = arrive(storage, "/run/b", 2)
    partial = arrive(storage, "/run/c", 3, attempt="job-1", rank=1, world_size=3)
    failing = begin(storage, "/run/c", attempt="job-1", rank=0, world_size=3)
    failing.progress("write", 10)
    make_folders(storage, "/run/other/inner")
    put(storage, "/run/readme.txt", b"")
    entries = {entry.name: entry for entry in scan(storage, "/run")}
    assert entries.keys() == {"a", "b", "c"}
    a, b, c = (entries[name] for name in "abc")
    assert (a.state, a.step, a.world_size, a.problem) == ("committed", 1, 1, None)
    assert a.size_bytes == sum(map(len, tree(storage, "/run/a").values())) - len(
        tree(storage, "/run/a")["manifest.json"]
    )
    assert (b.state, b.step, b.path) == ("committed", 2, waiting.folder)
    assert "not published" in b.problem
    assert (c.state, c.world_size, c.path) == ("partial", 3, partial.folder)
    assert c.problem == "1 of 3 ranks arrived; rank 0: write; rank 2 has not begun"
    failing.abort(OSError("disk full"))
    told = explain(storage, partial.folder)
    assert told.arrived == [1]
    assert told.aborted[0].message == "disk full"
    assert told.beacons[0].bytes_done == 10
    assert told.note.attempt == "job-1"
    assert told.problem.startswith("rank 0 failed: OSError: disk full; 1 of 3 ranks arrived")
    for attempt in (waiting, partial, failing):
        attempt.close()


def test_a_listing_tells_what_was_replaced_and_not_cleared(storage):
    """What a kill left after the exchange is shown as what it is."""
    save(storage, PATH, 1)
    storage.rename(PATH, "/run/.step-100.job-1.replaced", "create")
    save(storage, "/run/x", 2)
    (entry,) = [entry for entry in scan(storage, "/run") if entry.name == "step-100"]
    assert (entry.state, entry.step) == ("partial", 1)
    assert "replaced by a later save" in entry.problem


def test_a_listing_of_nothing_is_an_error(storage):
    """`scan` of a folder that is not there says so."""
    with pytest.raises(CheckpointNotFoundError, match="no such folder"):
        scan(storage, "/nowhere")


def test_a_listing_survives_folders_that_cannot_be_read(storage):
    """A folder without permission is left out; the others are listed."""

    class Forbidden(Wrapper):
        def open_folder(self, path):
            if path == "/run/secret":
                raise StorageError.wrap(PermissionError(13, "Permission denied"), "open", path)
            return self.inner.open_folder(path)

    save(storage, PATH, 1)
    make_folders(storage, "/run/secret")
    assert [entry.name for entry in scan(Forbidden(storage), "/run")] == ["step-100"]


class FailsAt(Wrapper):
    """Cannot open one folder."""

    def __init__(self, inner, place, number):
        super().__init__(inner)
        self.place, self.number = place, number

    def open_folder(self, path):
        if path == self.place:
            raise StorageError.wrap(OSError(self.number, os.strerror(self.number)), "open", path)
        return self.inner.open_folder(path)


def test_a_newer_save_that_cannot_be_read_is_no_reason_to_load_an_older_one(storage):
    """Where the complete save beside a checkpoint cannot be opened for an I/O error, the load raises."""
    save(storage, PATH, 1)
    newer = arrive(storage, PATH, 2)
    with pytest.raises(StorageError, match="Input/output error"):
        located(FailsAt(storage, newer.folder, errno.EIO))
    assert located(FailsAt(storage, newer.folder, errno.EACCES)).manifest.step == 1  # another user's, private
    newer.abort(ValueError("no"))
    newer.close()


def test_a_folder_that_may_not_be_listed_still_loads(storage, caplog):
    """Where the folder above a checkpoint cannot be listed, a load says that it saw no newer saves."""
    save(storage, PATH, 1)
    assert located(FailsAt(storage, "/run", errno.EACCES)).manifest.step == 1
    assert "cannot look for newer saves" in caplog.text
    with pytest.raises(StorageError):
        located(FailsAt(storage, "/run", errno.EIO))


def test_an_older_save_is_not_loaded_for_a_damaged_newer_one(storage):
    """Where the checkpoint at the path has lost a file, what was saved before it does not take its place."""
    older = arrive(storage, PATH, 1)
    save(storage, PATH, 2)
    storage.remove(f"{PATH}/checkpoint_0.pt")
    with pytest.raises(CorruptCheckpointError, match="is missing"):
        located(storage)
    older.abort(ValueError("no"))
    older.close()
