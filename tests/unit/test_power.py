"""The model of a power cut: what may be lost, what may not, and what hangs together."""

from __future__ import annotations

import pytest
from support.disks import MemoryStorage
from support.power import RecordingStorage, copy_out, disk_states

from milepost.errors import StorageError
from milepost.storage.local import LocalStorage
from milepost.storage.writing import publish_bytes, write_bytes
from milepost.testing import FaultyStorage


def tree(storage, path="/"):
    """All files below `path` and their contents; folders are None."""
    found = {}
    folder = storage.open_folder(path)
    for name in folder.names():
        here = f"{path.rstrip('/')}/{name}"
        if folder.stat(name).kind == "folder":
            found[here] = None
            found.update(tree(storage, here))
        else:
            found[here] = folder.read(name, 1 << 30)
    return found


def states(storage, **options):
    return [tree(state) for state in disk_states(storage.log, **options)]


@pytest.fixture
def storage():
    return RecordingStorage(MemoryStorage())


def test_nothing_is_safe_before_its_fsync(storage):
    """A file that was not fsynced may be there whole, in part, empty, or not at all."""
    data = b"a" * 4096 + b"b" * 4096
    write_bytes(storage, "/f", data, sync=False)
    found = [state.get("/f") for state in states(storage)]
    for content in (data, b"", None, b"a" * 4096, bytes(4096) + b"b" * 4096, b"a" * 4096 + bytes(4096)):
        assert content in found, content


def test_content_is_safe_after_fsync_and_names_are_not(storage):
    """An fsynced file has its whole content, if its name is there at all."""
    write_bytes(storage, "/f", b"x" * 10_000)
    found = states(storage)
    assert {} in found
    assert {"/f": b"x" * 10_000} in found
    assert len(found) == 2


def test_names_are_safe_after_the_fsync_of_their_folder(storage):
    """After file and folder were fsynced nothing can be lost."""
    write_bytes(storage, "/f", b"x")
    storage.sync_folder("/")
    assert states(storage) == [{"/f": b"x"}]


def test_a_new_folder_is_lost_with_all_in_it(storage):
    """Everything below a folder goes with its name, however durable it is inside."""
    storage.make_folder("/d")
    write_bytes(storage, "/d/f", b"x")
    storage.sync_folder("/d")
    assert states(storage) == [{}, {"/d": None, "/d/f": b"x"}]


@pytest.mark.parametrize("sync", [True, False])
def test_a_rename_needs_the_content_before_it(storage, sync):
    """Without fsync before the rename, the name may be there with nothing behind it."""
    write_bytes(storage, "/f", b"old")
    storage.sync_folder("/")
    publish_bytes(storage, "/f", b"new", "replace", sync=sync)
    found = [state["/f"] for state in states(storage)]
    assert b"old" in found
    assert b"new" in found
    assert (b"" in found) is not sync


def test_an_exchange_happens_whole_or_not_at_all(storage):
    """After a power cut both folders have changed places, or neither has."""
    for name in "ab":
        storage.make_folder(f"/{name}")
        write_bytes(storage, f"/{name}/{name}", b"")
        storage.sync_folder(f"/{name}")
    storage.sync_folder("/")
    storage.rename("/a", "/b", "exchange")
    found = [sorted(name for name, content in state.items() if content == b"") for state in states(storage)]
    assert sorted(found) == [["/a/a", "/b/b"], ["/a/b", "/b/a"]]


def test_a_move_across_folders_needs_both_of_them(storage):
    """A file that moves is in one place or the other, until both folders were fsynced."""
    storage.make_folder("/a")
    storage.make_folder("/b")
    write_bytes(storage, "/a/f", b"x")
    storage.sync_folder("/a")
    storage.sync_folder("/")
    storage.rename("/a/f", "/b/f", "create")
    storage.sync_folder("/b")
    files = [[name for name, content in state.items() if content == b"x"] for state in states(storage)]
    assert sorted(files) == [["/a/f"], ["/b/f"]]
    storage.sync_folder("/a")
    assert [state["/b/f"] for state in states(storage)] == [b"x"]


def test_a_removal_may_be_undone(storage):
    """A removed name can come back until its folder is fsynced."""
    write_bytes(storage, "/f", b"x")
    storage.sync_folder("/")
    storage.remove("/f")
    assert {"/f": b"x"} in states(storage)
    storage.sync_folder("/")
    assert states(storage) == [{}]


def test_changes_may_be_lost_out_of_order(storage):
    """Of two names in one folder the later may be there and the earlier not; a node never has two names."""
    write_bytes(storage, "/a", b"1")
    write_bytes(storage, "/b", b"2")
    storage.rename("/a", "/c", "create")
    storage.rename("/c", "/d", "create")
    found = states(storage)
    assert {"/b": b"2"} in found
    assert {"/c": b"1"} in found
    assert {"/d": b"1", "/b": b"2"} in found
    assert all(list(state.values()).count(b"1") <= 1 for state in found)


def test_discarded_and_failed_files_are_removed_in_the_log(storage):
    """A file that was discarded, or could not be finished, is gone; the name can be used again."""
    file = storage.create("/f")
    file.write(0, memoryview(b"x"))
    file.discard()
    faulty = RecordingStorage(FaultyStorage(storage.inner).fail_at(2, OSError(5, "bad")))
    faulty.log = storage.log
    with pytest.raises(StorageError):
        faulty.create("/f").finish(0)
    write_bytes(storage, "/f", b"y")
    storage.sync_folder("/")
    assert states(storage) == [{"/f": b"y"}]


def test_earlier_moments_and_settled_ones(storage):
    """Any number of events can have happened, and any number of those can count as durable."""
    write_bytes(storage, "/f", b"x", sync=False)
    write_bytes(storage, "/g", b"y", sync=False)
    assert [event.kind for event in storage.log] == ["create", "write", "size"] * 2
    assert states(storage, upto=0) == [{}]
    assert {"/g": b"y"} not in states(storage, upto=3)
    assert all(state["/f"] == b"x" for state in states(storage, settled=3))
    assert states(storage, settled=6) == [{"/f": b"x", "/g": b"y"}]


def test_states_are_repeatable_and_limited(storage):
    """One seed gives the same disks again, and about as many as wanted."""
    write_bytes(storage, "/f", bytes(range(256)) * 16 * 500, sync=False)
    for limit in (16, 64):
        first = states(storage, seed=1, limit=limit)
        assert first == states(storage, seed=1, limit=limit)
        assert limit // 2 <= len(first) <= limit + 16
    assert states(storage, seed=2) != states(storage, seed=1)


def test_recorded_paths_may_lie_in_a_real_folder(tmp_path):
    """What was there before the recording is taken as durable, and a state can be written to a real disk."""
    storage = RecordingStorage(LocalStorage())
    storage.make_folder(f"{tmp_path}/d")
    publish_bytes(storage, f"{tmp_path}/d/f", b"x", "create")
    storage.sync_folder(f"{tmp_path}/d")
    *_, last = disk_states(storage.log, settled=len(storage.log))
    copy_out(last, str(tmp_path), f"{tmp_path}/copy")
    assert (tmp_path / "copy" / "d" / "f").read_bytes() == b"x"
