"""Savers, readers and recoveries at one path at the same time, in every order that matters."""

from __future__ import annotations

import itertools
import os
import random
import signal
import threading

import pytest
from support.commits import Turns, arrive, assert_clean, content, loaded_step, save
from support.disks import (
    Killed,
    MemoryStorage,
    MortalStorage,
    NoExchange,
    hidden,
    make_folders,
    put,
    tree,
)
from support.processes import KILLED, ended, fork, in_child

from milepost.commit import clean_up, roll_forward
from milepost.errors import AbortedError
from milepost.storage.local import LocalStorage
from milepost.testing import FaultyStorage

PATH = "/run/step"
NOTES = {"notes.txt": b"mine", "plots/loss.png": b"png"}


def old_with_notes(storage):
    make_folders(storage, "/run")
    save(storage, PATH, 1)
    make_folders(storage, f"{PATH}/plots")
    for name, data in NOTES.items():
        put(storage, f"{PATH}/{name}", data)


def fresh(storage):
    make_folders(storage, "/run")


def plain(storage):
    make_folders(storage, PATH)
    put(storage, f"{PATH}/checkpoint_0.pt", content(0))


def at_every_operation(make, setup, visitor):
    """Save step 2, and call `visitor(storage)` before one of its operations, each in turn."""
    for at in itertools.count(1):
        storage = make()
        setup(storage)
        visits = []
        count = itertools.count(1)

        def visit(operation, path, storage=storage, at=at, visits=visits, count=count):
            if next(count) == at:
                visits.append(visitor(storage))

        save(MortalStorage(storage, before=visit), PATH, 2)
        if not visits:
            return
        yield storage, visits[0]


MAKERS = [MemoryStorage, lambda: NoExchange(MemoryStorage())]


@pytest.mark.parametrize("make", MAKERS, ids=["exchange", "no exchange"])
@pytest.mark.parametrize("setup", [fresh, plain, old_with_notes])
def test_two_savers_at_one_path_both_succeed(setup, make):
    """A whole save of another process between any two operations of a save: both succeed, each whole."""
    published = []

    def visitor(storage):
        save(storage, PATH, 5)
        return loaded_step(storage, PATH)

    for storage, seen in at_every_operation(make, setup, visitor):
        last = loaded_step(storage, PATH)
        assert last in {2, 5}
        published.append((seen, last))
        if setup is old_with_notes:
            assert NOTES.items() <= tree(storage, PATH).items()
        save(storage, PATH, 6)
        assert_clean(storage, PATH)
        assert loaded_step(storage, PATH) == 6
    assert {last for _, last in published} == {2, 5}
    assert published[0] == (5, 2)


@pytest.mark.parametrize("make", MAKERS, ids=["exchange", "no exchange"])
@pytest.mark.parametrize("setup", [fresh, plain, old_with_notes])
def test_recovery_beside_a_live_saver_does_no_harm(setup, make):
    """Rolling forward and clearing between any two operations of a live save change nothing for it."""

    def visitor(storage):
        before = loaded_step(storage, PATH)
        roll_forward(storage, PATH)
        clean_up(storage, PATH)
        assert loaded_step(storage, PATH) == before
        return True

    for storage, _ in at_every_operation(make, setup, visitor):
        assert loaded_step(storage, PATH) == 2
        assert_clean(storage, PATH)
        if setup is old_with_notes:
            assert NOTES.items() <= tree(storage, PATH).items()


@pytest.mark.parametrize("make", MAKERS, ids=["exchange", "no exchange"])
@pytest.mark.parametrize("setup", [fresh, plain, old_with_notes])
def test_a_reader_at_any_moment_of_a_replace_loads_the_old_or_the_new(setup, make):
    """Between any two operations of a save a load finds a whole checkpoint, never an older one again."""
    before = {fresh: None, plain: 0, old_with_notes: 1}[setup]
    steps = [step for _, step in at_every_operation(make, setup, lambda storage: loaded_step(storage, PATH))]
    assert steps[0] == before
    assert steps[-1] == 2
    assert steps == sorted(steps, key=lambda step: step == 2)


@pytest.mark.parametrize("make", MAKERS, ids=["exchange", "no exchange"])
def test_a_replace_at_any_moment_of_a_load_is_not_noticed(make):
    """Whole saves between any two looks of a load: it loads the old or the new, whole."""
    for at in itertools.count(1):
        storage = make()
        old_with_notes(storage)
        count = itertools.count(1)
        saved = []

        def visit(operation, path, storage=storage, at=at, count=count, saved=saved):
            if next(count) in {at, at + 2}:
                saved.append(save(storage, PATH, 2))

        assert loaded_step(FaultyStorage(storage, before=visit), PATH) in {1, 2}
        if not saved:
            return


@pytest.mark.parametrize("seed", [*range(60), 2173, 2922])
def test_savers_in_any_order_leave_one_whole_checkpoint_and_the_users_files(seed):
    """Three savers, some of which die, and a reader, in a random order of their operations: all is whole."""
    choose = random.Random(seed)
    storage = (MemoryStorage if seed % 2 else lambda: NoExchange(MemoryStorage()))()
    old_with_notes(storage)
    turns = Turns(choose.choice)

    def saver(name, step, dies_at):
        def run():
            mortal = MortalStorage(storage, dies_at, before=lambda *_: turns.wait(name))
            return save(mortal, PATH, step)

        return run

    def reader():
        watched = FaultyStorage(storage, before=lambda *_: turns.wait("reader"))
        return [loaded_step(watched, PATH) for _ in range(8)]

    deaths = [choose.randrange(20, 80) if choose.random() < 0.5 else float("inf") for _ in range(3)]
    results = turns.run(
        a=saver("a", 2, deaths[0]), b=saver("b", 3, deaths[1]), c=saver("c", 4, deaths[2]), reader=reader
    )
    for result in (results["a"], results["b"], results["c"]):
        assert result is True or isinstance(result, Killed), repr(result)
    assert isinstance(results["reader"], list), repr(results["reader"])
    assert set(results["reader"]) <= {1, 2, 3, 4}
    assert loaded_step(storage, PATH) in {1, 2, 3, 4}
    save(storage, PATH, 9)
    assert loaded_step(storage, PATH) == 9
    assert_clean(storage, PATH)
    assert NOTES.items() <= tree(storage, PATH).items()


@pytest.mark.parametrize("world_size", range(2, 9))
@pytest.mark.parametrize("seed", range(4))
def test_ranks_in_any_order_commit_once(world_size, seed):
    """In any order of the ranks' operations, without a barrier, one rank commits all of them."""
    choose = random.Random(seed * 100 + world_size)
    storage = MemoryStorage()
    old_with_notes(storage)
    turns = Turns(choose.choice)

    def rank(number):
        def run():
            watched = MortalStorage(storage, before=lambda *_: turns.wait(f"rank{number}"))
            return save(watched, PATH, 2, attempt="job-1", rank=number, world_size=world_size)

        return run

    results = turns.run(**{f"rank{number}": rank(number) for number in range(world_size)})
    assert sorted(map(repr, results.values())) == ["False"] * (world_size - 1) + ["True"]
    assert loaded_step(storage, PATH) == 2
    assert NOTES.items() <= tree(storage, PATH).items()
    clean_up(storage, PATH)
    assert_clean(storage, PATH)


@pytest.mark.parametrize("dying", [0, 1])
def test_a_rank_that_dies_at_any_operation_leaves_the_old_checkpoint_or_the_new_one(dying):
    """With one of two ranks dying at any operation, what loads is whole, and the next attempt commits."""
    for at in itertools.count(1):
        storage = MemoryStorage()
        old_with_notes(storage)
        first, second = (0, 1) if at % 2 else (1, 0)
        died = False
        for rank in (first, second):
            mortal = MortalStorage(storage, at if rank == dying else float("inf"))
            try:
                save(mortal, PATH, 2, attempt="job-1", rank=rank, world_size=2)
            except Killed:
                died = True
        assert loaded_step(storage, PATH) in {1, 2}
        for rank in (1, 0):
            save(storage, PATH, 3, attempt="job-2", rank=rank, world_size=2)
        assert loaded_step(storage, PATH) == 3
        assert NOTES.items() <= tree(storage, PATH).items()
        assert_clean(storage, PATH)
        if not died:
            return


# ---------------------------------------------------------------------------- processes


@pytest.mark.parametrize("stride_start", range(3))
def test_sigkill_between_any_two_operations_on_a_real_disk(tmp_path, stride_start):
    """SIGKILL of a real process at any operation: old or new loads whole, and the next save clears up."""
    storage = LocalStorage()
    path = str(tmp_path / "step")
    for at in itertools.count(1 + stride_start, 3):
        save(storage, path, 1)
        os.makedirs(f"{path}/plots", exist_ok=True)
        for name, data in NOTES.items():
            with open(f"{path}/{name}", "wb") as file:
                file.write(data)
        code = in_child(lambda at=at: save(FaultyStorage(storage).fail_at(at), path, 2))
        died = code == KILLED
        assert died or code == 0
        assert loaded_step(storage, path) in ({1, 2} if died else {2})
        save(storage, path, 3)
        assert loaded_step(storage, path) == 3
        assert_clean(storage, path)
        assert NOTES.items() <= tree(storage, path).items()
        if not died:
            return


def test_real_processes_save_to_one_path_at_the_same_time(tmp_path):
    """Many saves by several processes at once, with a reader: every one succeeds, and every load is whole."""
    path = str(tmp_path / "step")
    storage = LocalStorage()
    save(storage, path, 1)
    with open(f"{path}/notes.txt", "wb") as file:
        file.write(b"mine")

    def saves(number):
        for step in range(10):
            save(storage, path, 100 * (number + 1) + step)

    for pid in [fork(lambda number=number: saves(number)) for number in range(3)]:
        while not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            assert loaded_step(storage, path) is not None
        assert ended(pid) == 0
    save(storage, path, 9)
    assert_clean(storage, path)
    assert tree(storage, path)["notes.txt"] == b"mine"


def test_a_live_saver_in_another_process_keeps_its_folder(tmp_path):
    """Clearing up never takes the folder of a process that lives, and takes it as soon as that is killed."""
    path = str(tmp_path / "step")
    storage = LocalStorage()
    ready, go = os.pipe(), os.pipe()

    def saver():
        attempt = arrive(storage, path, 2, attempt="job-1", rank=1, world_size=2)
        os.write(ready[1], b"x")
        os.read(go[0], 1)
        attempt.close()

    pid = fork(saver)
    try:
        os.read(ready[0], 1)
        assert clean_up(storage, path) == []
        assert hidden(storage, path) == [".step.job-1.partial"]
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        for descriptor in (*ready, *go):
            os.close(descriptor)
    assert clean_up(storage, path) == [str(tmp_path / ".step.job-1.partial")]


def test_an_abort_mark_reaches_the_other_rank_at_once():
    """A rank that waits for another gets that one's error as soon as it has failed."""
    storage = MemoryStorage()
    make_folders(storage, "/run")
    waiting = arrive(storage, PATH, 2, attempt="job-1", rank=1, world_size=2)
    failing = arrive(storage, PATH, 2, attempt="job-1", rank=0, world_size=2)
    thread = threading.Thread(target=failing.abort, args=(OSError("the disk is full"),))
    thread.start()
    with pytest.raises(AbortedError, match=r"rank 0 failed in begin with OSError: the disk is full"):
        waiting.wait_for_marks(60)
    thread.join()
    waiting.close()
    failing.close()
