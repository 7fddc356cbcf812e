"""What dead attempts leave, and the rules by which it is finished, removed or left alone."""

from __future__ import annotations

import os
import time

import pytest
from support.commits import StepClock, arrive, assert_clean, content, let_die, loaded_step, save
from support.disks import Killed, MemoryStorage, MortalStorage, Wrapper, hidden, make_folders, put, tree

from milepost.commit import begin, clean_up, roll_forward
from milepost.commit.by_rename.removal import remove_tree
from milepost.errors import StorageError
from milepost.format.names import join_hidden
from milepost.storage.local import LocalStorage
from milepost.testing import MUTATIONS, FaultyStorage

PATH = "/run/step"


@pytest.fixture
def storage():
    """An empty storage with a folder for runs."""
    storage = MemoryStorage()
    make_folders(storage, "/run")
    return storage


def die_at(storage, condition, step=2, **kwargs):
    """A save that dies before the first operation that fulfils a condition."""
    mortal = MortalStorage(storage)

    def watch(operation, path):
        if condition(operation, path):
            mortal.dies_at = 0

    mortal.meanwhile = watch
    with pytest.raises(Killed):
        save(mortal, PATH, step, **kwargs)


def unpublished(storage, step, **kwargs):
    """A save that dies between its commit and its publishing; its hidden folder."""
    before = set(hidden(storage, PATH))
    die_at(storage, lambda operation, path: operation == "rename" and path == PATH, step, **kwargs)
    (new,) = set(hidden(storage, PATH)) - before
    return f"/run/{new}"


def test_a_complete_set_of_marks_is_committed_by_the_next_save(storage):
    """Marks without a manifest and without an abort are a checkpoint; recovery commits and publishes it."""
    attempts = [arrive(storage, PATH, 2, attempt="job-1", rank=rank, world_size=3) for rank in range(3)]
    for attempt in attempts:
        let_die(attempt)
    assert loaded_step(storage, PATH) == 2
    assert storage.stat(PATH) is None
    assert roll_forward(storage, PATH) == ["/run/.step.job-1.partial"]
    assert loaded_step(storage, PATH) == 2
    clean_up(storage, PATH)
    assert_clean(storage, PATH)


def test_an_incomplete_set_of_marks_never_appears(storage):
    """With a mark missing nothing is published, and the rest is removed."""
    for rank in (0, 2):
        arrive(storage, PATH, 2, attempt="job-1", rank=rank, world_size=3).close()
    assert loaded_step(storage, PATH) is None
    assert roll_forward(storage, PATH) == []
    assert clean_up(storage, PATH) == ["/run/.step.job-1.partial"]


@pytest.mark.parametrize("damage", ["data", "size", "index", "shorter"])
def test_marks_whose_files_are_not_there_are_not_rolled_forward(storage, damage):
    """A data file that is missing or cut, or a damaged mark, makes the attempt a dead one."""
    save(storage, PATH, 1)
    attempt = arrive(storage, PATH, 2)
    let_die(attempt)
    name = "index_0.json" if damage in {"index", "shorter"} else "checkpoint_0.pt"
    data = tree(storage, attempt.folder)[name]
    storage.remove(f"{attempt.folder}/{name}")
    if damage != "data":
        put(
            storage,
            f"{attempt.folder}/{name}",
            data[:-1] if damage != "index" else data.replace(b":", b";", 1),
        )
    assert loaded_step(storage, PATH) == 1
    assert roll_forward(storage, PATH) == []
    assert clean_up(storage, PATH) == [attempt.folder]
    assert loaded_step(storage, PATH) == 1


def test_a_manifest_whose_index_was_changed_is_not_rolled_forward(storage):
    """Before a manifest is published its hashes of the indexes are compared."""
    folder = unpublished(storage, 2)
    data = tree(storage, folder)["index_0.json"]
    storage.remove(f"{folder}/index_0.json")
    put(storage, f"{folder}/index_0.json", data.replace(b'"step":2', b'"step":3'))
    assert roll_forward(storage, PATH) == []
    assert loaded_step(storage, PATH) is None


def test_an_attempt_somebody_works_on_is_left_alone(storage):
    """While its lock is held, an attempt is neither published nor removed, and it still loads in place."""
    attempt = arrive(storage, PATH, 2)
    assert roll_forward(storage, PATH) == []
    assert clean_up(storage, PATH) == []
    assert loaded_step(storage, PATH) == 2
    attempt.close()


def test_an_older_attempt_is_never_published_over_a_newer_checkpoint(storage):
    """A complete attempt that was overtaken is removed; what is newer stays."""
    attempt = arrive(storage, PATH, 1)
    save(storage, PATH, 2)
    assert loaded_step(storage, PATH) == 2
    let_die(attempt)
    assert roll_forward(storage, PATH) == []
    assert loaded_step(storage, PATH) == 2
    assert clean_up(storage, PATH) == [attempt.folder]
    assert_clean(storage, PATH)


def test_of_several_unpublished_attempts_the_newest_wins(storage):
    """Two complete attempts beside each other: the newer loads and is published, the older is removed."""
    older, newer = arrive(storage, PATH, 1), arrive(storage, PATH, 2)
    for attempt in (older, newer):
        let_die(attempt)
    assert loaded_step(storage, PATH) == 2
    assert roll_forward(storage, PATH) == [newer.folder]
    assert clean_up(storage, PATH) == [older.folder]
    assert loaded_step(storage, PATH) == 2
    assert_clean(storage, PATH)


def test_a_kill_between_exchange_and_removal_never_brings_the_old_one_back(storage):
    """After the exchange the hidden name holds the old checkpoint: it is removed, never published."""
    save(storage, PATH, 1)
    put(storage, f"{PATH}/notes.txt", b"mine")
    die_at(storage, lambda operation, path: operation == "sync_folder" and path == "/run")
    (name,) = hidden(storage, PATH)
    assert tree(storage, f"/run/{name}")["notes.txt"] == b"mine"
    assert loaded_step(storage, PATH) == 2
    assert roll_forward(storage, PATH) == []
    assert clean_up(storage, PATH) == [f"/run/{name}"]
    assert loaded_step(storage, PATH) == 2
    assert tree(storage, PATH)["notes.txt"] == b"mine"
    assert_clean(storage, PATH)


def test_a_kill_between_exchange_and_removal_of_plain_files_is_cleared(storage):
    """Plain files that were exchanged out are known by the attempt that did it, and removed."""
    make_folders(storage, PATH)
    put(storage, f"{PATH}/checkpoint_0.pt", content(0))
    die_at(storage, lambda operation, path: operation == "sync_folder" and path == "/run")
    (name,) = hidden(storage, PATH)
    assert tree(storage, f"/run/{name}").keys() == {"checkpoint_0.pt"}
    assert clean_up(storage, PATH) == [f"/run/{name}"]
    assert loaded_step(storage, PATH) == 2


def test_nothing_is_removed_for_its_name_alone(storage):
    """Folders that look like ours but do not say so themselves are left alone, whatever is in them."""
    save(storage, PATH, 1)
    other = arrive(storage, "/run/other", 5)
    let_die(other)
    storage.rename(other.folder, join_hidden(PATH, other.id), "create")
    for attempt, files in {
        "mine": {"notes.txt": b""},
        "plain": {"checkpoint_0.pt": b""},
        "lost": {"attempt.json": b"", "checkpoint_0.pt": b"x"},
        "foreign": {
            "attempt.json": b'{"name":"other","stem":"other","attempt":"foreign","world_size":1,"process":""}'
        },
        "renamed": {
            "attempt.json": b'{"name":"step","stem":"step","attempt":"before","world_size":1,"process":""}'
        },
        "damaged": {"attempt.json": b"", "manifest.json": b"{}"},
    }.items():
        folder = join_hidden(PATH, attempt)
        make_folders(storage, folder)
        for name, data in files.items():
            put(storage, f"{folder}/{name}", data)
    before = tree(storage, "/run")
    assert clean_up(storage, PATH) == []
    assert roll_forward(storage, PATH) == []
    assert tree(storage, "/run") == before


def test_a_partial_without_its_attempt_json_is_known_by_its_other_files(storage):
    """When a power cut took attempt.json, a beacon or a mark that names the attempt is enough to clear it."""
    for rank, keep in ((0, "state_0.json"), (1, "index_1.json")):
        attempt = arrive(storage, PATH, 2, attempt="job-1", rank=rank, world_size=2)
        let_die(attempt)
        for name in tree(storage, attempt.folder):
            if name not in {keep, f"checkpoint_{rank}.pt"}:
                storage.remove(f"{attempt.folder}/{name}")
        assert clean_up(storage, PATH) == [attempt.folder]


def test_empty_hidden_folders_go(storage):
    """A folder that died before it held anything is removed."""
    make_folders(storage, join_hidden(PATH, "job-1"))
    assert clean_up(storage, PATH) == ["/run/.step.job-1.partial"]


def test_a_damaged_checkpoint_at_the_path_is_not_replaced_by_recovery(storage):
    """What cannot be read at the path is left for its owner; the complete attempt still loads."""
    make_folders(storage, PATH)
    attempt = arrive(storage, PATH, 2)
    let_die(attempt)
    put(storage, f"{PATH}/manifest.json", b"{}")
    assert roll_forward(storage, PATH) == []
    assert loaded_step(storage, PATH) == 2


def test_a_replaced_checkpoint_returns_when_its_successor_is_lost(storage):
    """With nothing at the path and no complete attempt, what was moved aside loads, and is put back."""
    save(storage, PATH, 1)
    storage.rename(PATH, "/run/.step.job-1.replaced", "create")
    assert loaded_step(storage, PATH) == 1
    assert clean_up(storage, PATH) == []
    assert roll_forward(storage, PATH) == ["/run/.step.job-1.replaced"]
    assert loaded_step(storage, PATH) == 1
    assert_clean(storage, PATH)


def test_leftovers_in_a_published_folder_are_swept(storage):
    """A kill before the beacons were removed leaves them to the next recovery."""
    die_at(storage, lambda operation, path: operation == "remove" and path == f"{PATH}/attempt.json")
    assert "attempt.json" in tree(storage, PATH)
    clean_up(storage, PATH)
    assert_clean(storage, PATH)


class Network(Wrapper):
    """A network file system, on which locks always seem free."""

    def is_network(self, path):
        return True


def test_on_a_network_file_system_only_age_makes_an_attempt_dead(tmp_path):
    """Where locks may lie, a partial is removed, or rolled forward, only when unchanged for a day."""
    storage = Network(LocalStorage())
    path = str(tmp_path / "step")
    attempt = arrive(storage, path, 2, attempt="job-1", rank=0, world_size=2)
    let_die(attempt)
    assert clean_up(storage, path) == []
    long_ago = time.time() - 25 * 3600
    for name in os.listdir(attempt.folder):
        os.utime(f"{attempt.folder}/{name}", (long_ago, long_ago))
    recent = f"{attempt.folder}/state_0.json"
    os.utime(recent)
    assert clean_up(storage, path) == []
    os.utime(recent, (long_ago, long_ago))
    assert clean_up(storage, path) == [attempt.folder]


def test_a_save_goes_on_when_old_leftovers_cannot_be_cleared(storage):
    """A failure to finish or clear an earlier save is a warning."""
    arrive(storage, PATH, 1, attempt="job-1", rank=1, world_size=2).close()
    faulty = FaultyStorage(storage, counts={"lock"}).fail_at(1, OSError(5, "broken"))
    assert save(faulty, PATH, 2)
    assert loaded_step(storage, PATH) == 2


def test_a_folder_that_is_just_being_cleared_is_begun_again(storage):
    """A begin that meets a cleaner waits until the folder is gone, and then makes its own."""
    dead = begin(storage, PATH, attempt="job-1", rank=1, world_size=2)
    let_die(dead)
    lock = storage.lock(f"{dead.folder}/attempt.json", exclusive=True)

    def clear():
        remove_tree(storage, dead.folder, lock)

    clock = StepClock(clear)
    attempt = begin(storage, PATH, attempt="job-1", rank=1, world_size=2, clock=clock.clock)
    assert "attempt.json" in tree(storage, attempt.folder)
    assert clean_up(storage, PATH) == []
    attempt.close()


def test_a_begin_that_fails_leaves_nothing(storage):
    """Whatever operation of begin fails, no hidden folder is left, and the error names the path."""
    seen = []
    for number in range(1, 100):
        faulty = FaultyStorage(storage, counts=MUTATIONS | {"lock", "open_folder", "names"})
        faulty.fail_at(number, OSError(28, "No space left on device"))
        try:
            attempt = begin(faulty, PATH, attempt="one", rank=0, world_size=1)
        except StorageError as error:
            seen.append((error.path is not None, error.phase, hidden(storage, PATH)))
            continue
        attempt.close()
        if len(faulty.operations) < number:
            assert number > 8
            assert set(map(str, seen)) == {"(True, 'begin', [])"}
            return


class NeverEmpty(Wrapper):
    """Keeps of each file that is removed another under a new name, as FUSE does while it is open."""

    def __init__(self, inner):
        super().__init__(inner)
        self.removed = 0

    def remove(self, path):
        self.inner.remove(path)
        self.removed += 1
        assert self.removed < 100
        put(self.inner, f"{os.path.dirname(path)}/.fuse_hidden{self.removed:016x}", b"")


def test_what_cannot_be_removed_is_left_and_named(storage, caplog):
    """The clean-up of a save that failed ends, and says which entries come back."""
    attempt = arrive(NeverEmpty(storage), PATH, 2)
    attempt.abort(ValueError("no"))
    attempt.close()
    assert "when they are removed (.fuse_hidden" in caplog.text
    assert loaded_step(storage, PATH) is None
    assert clean_up(storage, PATH) == [attempt.folder]


def test_a_part_is_kept_while_anybody_of_its_start_works_here(storage):
    """What a rank has done is not cleared by others while its start lives, even where nobody holds it."""
    done = arrive(storage, PATH, 1, attempt="one-1", rank=0, world_size=2)
    done.close()
    later = arrive(storage, PATH, 2, attempt="one-2", rank=0, world_size=2)
    save(storage, PATH, 3)
    assert clean_up(storage, PATH) == []
    later.close()
    assert clean_up(storage, PATH, keep="one-3") == []
    assert clean_up(storage, PATH, keep="two-1") == [done.folder, later.folder]


def test_parts_do_not_pile_up(storage):
    """The rank that commits an attempt clears what came of the earlier ones of its start."""
    for number in (1, 2):
        arrive(storage, PATH, number, attempt=f"one-{number}", rank=0, world_size=2).close()
    for rank in (0, 1):
        save(storage, PATH, 3, attempt="one-3", rank=rank, world_size=2)
    assert_clean(storage, PATH)


class Unreadable(Wrapper):
    """Cannot read the manifest of what is published."""

    def open_folder(self, path):
        folder = Wrapper(self.inner.open_folder(path))
        if path == PATH:

            def read(name, limit):
                raise StorageError.wrap(OSError(5, "Input/output error"), "read", f"{path}/{name}")

            folder.read = read
        return folder


def test_an_unreadable_checkpoint_is_not_taken_for_none(storage):
    """Where what is published cannot be read, nothing is published, cleared, or loaded in its place."""
    older = arrive(storage, PATH, 1)
    save(storage, PATH, 2)
    newer = arrive(storage, PATH, 3)
    for attempt in (older, newer):
        let_die(attempt)
    before = tree(storage, "/run")
    for look in (roll_forward, loaded_step):
        with pytest.raises(StorageError, match="Input/output error"):
            look(Unreadable(storage), PATH)
    assert clean_up(Unreadable(storage), PATH) == []
    assert tree(storage, "/run") == before
    assert roll_forward(storage, PATH) == [newer.folder]


def test_a_committed_attempt_whose_files_seem_to_be_missing_is_left(storage):
    """A manifest is a commit, and what it lists may only not be seen: a later save has to come first."""
    folder = unpublished(storage, 2)
    storage.remove(f"{folder}/checkpoint_0.pt")
    assert clean_up(storage, PATH) == []
    save(storage, PATH, 3)
    save(storage, PATH, 4)
    assert_clean(storage, PATH)


def test_the_order_of_saves_does_not_depend_on_clocks(storage):
    """A save whose clock is behind is still the later one: it is published, loaded and never cleared."""
    save(storage, PATH, 1, fields={"time": 100_000.0})
    folder = unpublished(storage, 2, fields={"time": 10.0})
    assert loaded_step(storage, PATH) == 2
    assert clean_up(storage, PATH) == []
    assert roll_forward(storage, PATH) == [folder]
    unpublished(storage, 3, fields={"time": 5.0})
    save(storage, PATH, 4, fields={"time": 1.0})
    clean_up(storage, PATH)
    assert loaded_step(storage, PATH) == 4
    assert_clean(storage, PATH)


def test_a_day_of_patience_is_one_of_the_file_system(tmp_path, monkeypatch):
    """On a network disk the host's clock does not count: a day ahead, it makes no attempt dead."""
    storage, path = Network(LocalStorage()), str(tmp_path / "step")
    arrive(storage, path, 2, attempt="job-1", rank=0, world_size=2).close()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 25 * 3600)
    assert clean_up(storage, path) == []
