"""Any sequence of saves, deaths, failures and recoveries of several savers, against a model."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support.commits import arrive, assert_clean, let_die, loaded_step, save
from support.disks import Killed, MemoryStorage, MortalStorage, NoExchange, hidden, make_folders, put, tree

from milepost.commit import clean_up, roll_forward
from milepost.errors import StorageError
from milepost.testing import FaultyStorage

PATH = "/run/step"


class Commits(RuleBasedStateMachine):
    """What loads is always the last checkpoint that was committed, or one whose death left that open."""

    exchange = True

    def __init__(self):
        super().__init__()
        self.storage = MemoryStorage() if self.exchange else NoExchange(MemoryStorage())
        make_folders(self.storage, "/run")
        self.possible = {None}
        self.step = 0
        self.notes = {}
        self.live = []

    def next_step(self):
        self.step += 1
        return self.step

    @rule()
    def save(self):
        step = self.next_step()
        assert save(self.storage, PATH, step)
        self.possible = {step}

    @rule(at=st.integers(1, 70))
    def save_and_die(self, at):
        step = self.next_step()
        try:
            save(MortalStorage(self.storage, at), PATH, step)
            self.possible = {step}
        except Killed:
            self.possible |= {step}
            self.possible = {loaded_step(self.storage, PATH)} & self.possible

    @rule(at=st.integers(1, 120))
    def save_and_fail(self, at):
        step = self.next_step()
        faulty = FaultyStorage(self.storage).fail_at(at, OSError(28, "No space left on device"))
        try:
            save(faulty, PATH, step)
            self.possible = {step}
        except (StorageError, OSError):
            found = loaded_step(self.storage, PATH)
            assert found in self.possible | {step}
            self.possible = {found}

    @rule(world_size=st.integers(2, 4), missing=st.integers(0, 3), order=st.randoms(use_true_random=False))
    def save_by_ranks(self, world_size, missing, order):
        step = self.next_step()
        ranks = list(range(world_size))
        order.shuffle(ranks)
        for rank in ranks:
            if rank != missing:
                save(self.storage, PATH, step, attempt=f"job-{step}", rank=rank, world_size=world_size)
        if missing >= world_size:
            self.possible = {step}

    @rule()
    def begin_and_stay(self):
        step = self.next_step()
        self.live.append(arrive(self.storage, PATH, step))
        self.possible = {step}  # complete: it loads in place

    @precondition(lambda self: self.live)
    @rule(number=st.integers(0, 10), how=st.sampled_from(["complete", "close", "die"]))
    def end_a_live_one(self, number, how):
        attempt = self.live.pop(number % len(self.live))
        before = loaded_step(self.storage, PATH)
        if how == "complete":
            attempt.complete()
        if how == "die":
            let_die(attempt)
        attempt.close()
        found = loaded_step(self.storage, PATH)
        if how == "die":
            assert found == before
        self.possible = {found}

    @rule(recover=st.sampled_from([roll_forward, clean_up]))
    def recover(self, recover):
        recover(self.storage, PATH)

    @precondition(lambda self: self.storage.stat(PATH) is not None)
    @rule(name=st.sampled_from(["notes.txt", "a", "b"]), inside=st.booleans())
    def the_user_adds_a_file(self, name, inside):
        data = f"{name} {self.step}".encode()
        if data in self.notes.values():
            return
        folder = f"{PATH}/plots" if inside else PATH
        make_folders(self.storage, folder)
        if self.storage.stat(f"{folder}/{name}") is None:
            put(self.storage, f"{folder}/{name}", data)
            self.notes[f"{folder}/{name}"] = data

    @invariant()
    def what_loads_is_whole_and_new(self):
        assert loaded_step(self.storage, PATH) in self.possible

    @invariant()
    def the_users_files_are_somewhere(self):
        there = tree(self.storage, "/run").values()
        assert set(self.notes.values()) <= set(there)

    def teardown(self):
        for attempt in self.live:
            attempt.close()
        save(self.storage, PATH, 10_000)
        assert loaded_step(self.storage, PATH) == 10_000
        assert hidden(self.storage, PATH) == []
        assert_clean(self.storage, PATH)
        assert set(self.notes.values()) <= set(tree(self.storage, PATH).values())


class CommitsWithoutExchange(Commits):
    """The same on a file system that cannot swap two names."""

    exchange = False


TestCommits = Commits.TestCase
TestCommits.__doc__ = "Whatever savers do, and however they end, what loads is whole."
TestCommits.settings = settings(max_examples=60, stateful_step_count=25)
TestCommitsWithoutExchange = CommitsWithoutExchange.TestCase
TestCommitsWithoutExchange.__doc__ = TestCommits.__doc__
TestCommitsWithoutExchange.settings = TestCommits.settings
