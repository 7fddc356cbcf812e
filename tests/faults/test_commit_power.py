"""A power cut at any moment of a save, on a disk that keeps only what was made durable."""

from __future__ import annotations

import pytest
from support.commits import arrive, content, loaded_step, save
from support.disks import MemoryStorage, NoExchange, Wrapper, make_folders, put, tree
from support.power import RecordingStorage, disk_states

from milepost.errors import MilepostError

PATH = "/run/step"
NOTES = {"notes.txt": b"mine", "plots/loss.png": b"png", "vocab/mine.txt": b"also mine"}


class DropSync(Wrapper):
    """Leaves out the `dropped`-th fsync, of files and folders alike, and notes them all."""

    def __init__(self, inner, dropped=0):
        super().__init__(inner)
        self.dropped = dropped
        self.synced = []

    def drops(self, what):
        self.synced.append(what)
        return len(self.synced) == self.dropped

    def create(self, path, *, direct=False):
        return _File(self, path, self.inner.create(path, direct=direct))

    def sync_folder(self, path):
        if not self.drops(path):
            self.inner.sync_folder(path)

    def sync_file(self, path):
        if not self.drops(path):
            self.inner.sync_file(path)


class _File(Wrapper):
    def __init__(self, storage, path, inner):
        super().__init__(inner)
        self._storage, self._path = storage, path

    def finish(self, size, *, sync=True):
        self.inner.finish(size, sync=sync and not self._storage.drops(self._path))


def hook(storage):
    def add(folder):
        put(storage, f"{folder}/tokenizer.json", b"new" * 3000, sync=False)
        storage.make_folder(f"{folder}/vocab")
        put(storage, f"{folder}/vocab/words.txt", b"new" * 1000, sync=False)

    return add


def fresh(storage):
    make_folders(storage, "/run")


def plain(storage):
    make_folders(storage, PATH)
    put(storage, f"{PATH}/checkpoint_0.pt", content(0))


def old(storage):
    make_folders(storage, "/run")
    save(storage, PATH, 1)


def old_with_notes(storage):
    make_folders(storage, "/run")
    save(storage, PATH, 1, hook=hook(storage))
    make_folders(storage, f"{PATH}/plots")
    for name, data in NOTES.items():
        put(storage, f"{PATH}/{name}", data)


SETUPS = [fresh, plain, old, old_with_notes]


def violations(setup, *, dropped=0, with_exchange=True, attach=False, limit=64):
    """What is wrong with the disks that a power cut during or after a save may leave."""
    recording = RecordingStorage(MemoryStorage())
    storage = recording if with_exchange else NoExchange(recording)
    setup(storage)
    settled = len(recording.log)
    dropping = DropSync(storage, dropped)
    save(dropping, PATH, 2, hook=hook(dropping) if attach else None)
    before = {fresh: None, plain: 0}.get(setup, 1)
    found, seen = [], (set(), set())
    for upto in range(settled, len(recording.log) + 1):
        finished = upto == len(recording.log)
        disks = disk_states(recording.log, upto, settled=settled, seed=upto, limit=limit, seen=seen[finished])
        for disk in disks:
            storage = disk if with_exchange else NoExchange(disk)
            problem = judge(
                storage, {2} if finished else {before, 2}, NOTES if setup is old_with_notes else {}
            )
            if problem:
                found.append(f"after {upto - settled} events: {problem}")
    return found, dropping.synced


def judge(storage, allowed, notes):
    """What is wrong with this disk, if anything: now, and after the next save."""
    try:
        step = loaded_step(storage, PATH)
        if step not in allowed:
            return f"step {step} loads"
        save(storage, PATH, 3)
        if loaded_step(storage, PATH) != 3:
            return "the next save is not what loads"
        lost = notes.keys() - tree(storage, PATH).keys()
        return f"the user's {lost} are lost" if lost else None
    except (MilepostError, AssertionError) as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("with_exchange", [True, False], ids=["exchange", "no exchange"])
@pytest.mark.parametrize("setup", SETUPS)
def test_a_power_cut_leaves_the_old_checkpoint_or_the_new_one_whole(setup, with_exchange):
    """On any disk that a power cut may leave, the old or the new checkpoint loads, and saving goes on."""
    found, _ = violations(setup, with_exchange=with_exchange, attach=setup is old_with_notes)
    assert found == []


@pytest.mark.parametrize("setup", [fresh, plain, old])
def test_a_save_makes_exactly_five_fsyncs(setup):
    """One rank makes data, index, manifest, the hidden folder and the folder above durable, each once."""
    _, synced = violations(setup, limit=1)
    data, index, manifest, partial, above = synced
    assert data.endswith(".partial/checkpoint_0.pt")
    assert ".partial/.index_0.json." in index
    assert ".partial/.manifest.json." in manifest
    assert partial.endswith(".partial")
    assert above == "/run"


@pytest.mark.parametrize("dropped", [1, 2, 3, 4, 5])
def test_without_any_one_of_its_fsyncs_a_save_is_not_safe(dropped):
    """Each fsync is necessary: with one left out, some power cut loses or damages a checkpoint."""
    found, synced = violations(old, dropped=dropped)
    assert found, f"nothing rests on the fsync of {synced[dropped - 1]}"


def test_marks_whose_data_file_a_power_cut_took_are_not_rolled_forward():
    """A full set of durable marks does not commit while a data file's name is lost."""
    recording = RecordingStorage(MemoryStorage())
    old(recording)
    settled = len(recording.log)
    arrive(recording, PATH, 2).close()
    steps = set()
    marked = 0
    for upto in range(settled, len(recording.log) + 1):
        for disk in disk_states(recording.log, upto, settled=settled):
            marked += any(name.endswith("index_0.json") and ".partial" in name for name in tree(disk, "/run"))
            steps.add(loaded_step(disk, PATH))
            save(disk, PATH, 3)
            assert loaded_step(disk, PATH) == 3
    assert marked
    assert steps == {1, 2}
