"""A process that dies between any two operations of a save."""

from __future__ import annotations

import itertools

import pytest
from support.commits import arrive, assert_clean, content, let_die, loaded_step, save
from support.disks import Killed, MemoryStorage, MortalStorage, NoExchange, hidden, make_folders, put, tree

from milepost.commit import clean_up, roll_forward

PATH = "/run/step"
NOTES = {"notes.txt": b"mine", "plots/a/loss.png": b"png", "vocab/mine.txt": b"also mine"}


def hook(tag):
    """Adds attachments, one of them in a folder where the user has put something too."""

    def add(storage, folder):
        put(storage, f"{folder}/tokenizer.json", tag, sync=False)
        storage.make_folder(f"{folder}/vocab")
        put(storage, f"{folder}/vocab/words.txt", tag * 1000, sync=False)

    return add


def put_notes(storage):
    for name, data in NOTES.items():
        make_folders(storage, f"{PATH}/{name}".rpartition("/")[0])
        put(storage, f"{PATH}/{name}", data)


def fresh(storage):
    make_folders(storage, "/run")


def empty(storage):
    make_folders(storage, PATH)


def plain(storage):
    make_folders(storage, PATH)
    put(storage, f"{PATH}/checkpoint_0.pt", content(0))


def old(storage):
    make_folders(storage, "/run")
    save(storage, PATH, 1, hook=lambda folder: hook(b"old")(storage, folder))


def old_with_notes(storage):
    old(storage)
    put_notes(storage)


def leftovers(storage):
    """A dead rank's partial, and what a save exchanged out before it died."""
    old(storage)
    dying = MortalStorage(storage)
    dying.meanwhile = lambda operation, path: setattr(dying, "dies_at", 0) if path == "/run" else None
    with pytest.raises(Killed):
        save(dying, PATH, 1)
    arrive(storage, PATH, 8, attempt="job-1", rank=1, world_size=2).close()
    assert len(hidden(storage, PATH)) == 2


SETUPS = [fresh, empty, plain, old, old_with_notes, leftovers]
STORAGES = [MemoryStorage, lambda: NoExchange(MemoryStorage())]


def before_of(setup):
    return {fresh: None, empty: None, plain: 0}.get(setup, 1)


def save_and_die(storage, at):
    """A save of step 2 that dies at an operation; whether it does."""
    mortal = MortalStorage(storage, at)
    try:
        save(mortal, PATH, 2, hook=lambda folder: hook(b"new")(mortal, folder))
    except Killed:
        return True
    return False


def check_next_save(storage, setup):
    """The next save works and clears everything; what is the user's is still there."""
    save(storage, PATH, 3)
    assert loaded_step(storage, PATH) == 3
    assert_clean(storage, PATH)
    found = tree(storage, PATH)
    if setup is old_with_notes:
        assert NOTES.items() <= found.items()
    users = NOTES if setup is old_with_notes else {}
    assert found.keys() == {"checkpoint_0.pt", "index_0.json", "manifest.json", *users}


@pytest.mark.parametrize("make", STORAGES, ids=["exchange", "no exchange"])
@pytest.mark.parametrize("setup", SETUPS)
def test_a_kill_at_any_operation_leaves_the_old_checkpoint_or_the_new_one_whole(setup, make):
    """Whenever the process dies, the old checkpoint or the new one loads whole, and saving goes on."""
    for at in itertools.count(1):
        storage = make()
        setup(storage)
        died = save_and_die(storage, at)
        found = loaded_step(storage, PATH)
        assert found in {before_of(setup), 2} if died else found == 2
        check_next_save(storage, setup)
        if not died:
            assert at > 20
            return


@pytest.mark.parametrize("make", STORAGES, ids=["exchange", "no exchange"])
@pytest.mark.parametrize("setup", SETUPS)
def test_recovery_alone_keeps_what_loads(setup, make):
    """After a kill, recovery changes nothing about what loads, and a second time does nothing."""
    for at in itertools.count(1):
        storage = make()
        setup(storage)
        if not save_and_die(storage, at):
            return
        found = loaded_step(storage, PATH)
        roll_forward(storage, PATH)
        assert loaded_step(storage, PATH) == found
        clean_up(storage, PATH)
        assert loaded_step(storage, PATH) == found
        assert hidden(storage, PATH) == []
        assert roll_forward(storage, PATH) == []
        assert clean_up(storage, PATH) == []


@pytest.mark.parametrize("make", STORAGES, ids=["exchange", "no exchange"])
@pytest.mark.parametrize("setup", SETUPS)
def test_a_second_kill_while_the_next_save_clears_up_is_safe_too(setup, make):
    """A kill during the clearing after a kill loses nothing either, at any pair of operations."""
    for first in itertools.count(1):
        for second in itertools.count(1 + first % 7, 7):
            storage = make()
            setup(storage)
            if not save_and_die(storage, first):
                return
            found = loaded_step(storage, PATH)
            mortal = MortalStorage(storage, second)
            try:
                save(mortal, PATH, 4)
                break
            except Killed:
                assert loaded_step(storage, PATH) in {found, 4}
            check_next_save(storage, setup)


def test_a_load_finds_a_complete_save_that_died_before_it_was_published():
    """A committed but unpublished save is what loads, in place, although the path holds an older one."""
    storage = MemoryStorage()
    old(storage)
    attempt = arrive(storage, PATH, 2)
    assert loaded_step(storage, PATH) == 2
    let_die(attempt)
    assert roll_forward(storage, PATH) == [attempt.folder]
    assert loaded_step(storage, PATH) == 2
    assert clean_up(storage, PATH) == []
    assert_clean(storage, PATH)
