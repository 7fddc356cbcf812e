"""Where ranks meet to load: one verdict, ranks that miss loads, stores of every kind. Ranks are threads."""

from __future__ import annotations

import threading
from datetime import timedelta
from functools import partial
from itertools import product

import pytest
import torch
import torch.distributed as dist
from support.processes import together

from milepost import RankInfo, builder
from milepost.barriers import Barrier, barrier_store
from milepost.config import CheckpointerConfig
from milepost.errors import PeerLoadError
from milepost.ranks.load_meeting import Meeting, Report, Round, Verdict, default_meeting, refuse
from milepost.ranks.start import Start


def test_a_checkpoint_that_was_replaced_meanwhile_is_told_as_that():
    """Ranks that found two checkpoints at one path need not look for two paths."""
    verdict = Verdict.of([Report("/c", "one"), Report("/c", "two"), Report("/d", "three")])
    assert [rank for rank, _ in verdict.failed] == [1, 2]
    assert "a save replaced /c while the ranks opened it" in verdict.failed[0][1]
    assert "it loads /d, but rank 0 loads /c" in verdict.failed[1][1]


class Killed(BaseException):
    """The end of a rank that is killed."""


class WatchedLine:
    """A line to a store that tells when a rank waits there, and kills the rank at an operation."""

    def __init__(self, line, kill_at=None):
        self.line, self.kill_at, self.operations, self.waits = line, kill_at, 0, threading.Event()
        self.missed = None

    def __getattr__(self, name):
        self.operations += 1
        if self.operations == self.kill_at:
            raise Killed
        return getattr(self.line, name)

    def has(self, *keys):
        found = self.__getattr__("has")(*keys)
        if not found and keys == self.missed:
            self.waits.set()
        self.missed = None if found else keys
        return found


def life(store, world, kills=()):
    """The starts of all ranks in a new life, which have agreed; a rank may be killed at an operation."""
    starts = [Start(store, rank, world) for rank in range(world)]
    assert all(start.wait(60) for start in starts)
    for start, kill_at in zip(starts, [*kills, *[None] * world], strict=False):
        start.line = WatchedLine(start.line, kill_at)
    return starts


def load(meeting):
    """A load, as the reader does it."""
    refuse(meeting.hold(Report("a")), modified=False)
    meeting.agree(Report("a"), lambda: None, modifies=True)
    return "loaded"


def loads(starts, seconds):
    """What becomes of a load on each of some ranks."""
    return together(*(partial(load, Meeting(start, seconds)) for start in starts))


def all_load(starts, first):
    """What becomes of a load to which all come: some ranks first, the others when those wait for them."""
    for start in starts:
        start.line = WatchedLine(getattr(start.line, "line", start.line))

    def come(start):
        if start.rank not in first:
            for other in first:
                starts[other].line.waits.wait()
        try:
            return load(Meeting(start, 60))
        finally:
            start.line.waits.set()

    return together(*(partial(come, start) for start in starts))


class PythonStore(dist.Store):
    """A store written in Python, with what a load needs and no more: there is no clone."""

    def __init__(self):
        super().__init__()
        self.data, self.changed = {}, threading.Condition()

    def set(self, key, value):
        with self.changed:
            self.data[key] = value if isinstance(value, bytes) else value.encode()
            self.changed.notify_all()

    def get(self, key):
        self.wait([key])
        return self.data[key]

    def add(self, key, number):
        with self.changed:
            self.data[key] = str(int(self.data.get(key, b"0")) + number).encode()
            return int(self.data[key])

    def compare_set(self, key, expected, desired):
        with self.changed:
            if self.data.get(key, b"").decode() == expected:
                self.set(key, desired)
            return self.data[key]

    def check(self, keys):
        return all(key in self.data for key in keys)

    def wait(self, keys, timeout=timedelta(seconds=5)):
        with self.changed:
            if not self.changed.wait_for(lambda: self.check(keys), timeout.total_seconds()):
                raise RuntimeError("timeout")


class BrokenStore(PythonStore):
    """A store whose host has died."""

    def check(self, keys):
        raise RuntimeError("Broken pipe")


def test_ranks_meet_at_a_store_written_in_python():
    """A store that cannot be cloned is used itself."""
    store = PythonStore()
    meetings = [default_meeting(rank, 2, store, 60) for rank in range(2)]
    reports = [Report("a", missing=["x"]), Report("a", missing=["y"])]
    verdicts = together(*(lambda rank=rank: meetings[rank].hold(reports[rank]) for rank in range(2)))
    assert [verdict.missing for verdict in verdicts] == [["x", "y"]] * 2


@pytest.fixture
def meet():
    """Meetings of a number of ranks at one store; a load is a new one, as in the reader."""
    store, lives, lock = dist.HashStore(), {}, threading.Lock()

    def make(rank, world=2, seconds=60):
        with lock:
            if world not in lives:
                lives[world] = life(store, world)
        return Meeting(lives[world][rank], seconds)

    return make


def test_text_that_no_encoding_takes_comes_through(meet):
    """Keys, paths and errors may hold lone surrogates (file names that are not UTF-8): others get them so."""
    reports = [
        Report("/\udcff", "/\udcff:1", missing=["\ud800"]),
        Report("/\udcff", "/\udcff:1", strict=True),
    ]
    verdicts = together(*(lambda rank=rank: meet(rank).hold(reports[rank]) for rank in range(2)))
    assert [verdict.missing for verdict in verdicts] == [["\ud800"]] * 2
    assert [verdict.failed for verdict in verdicts] == [[], []]
    reports = [Report("a"), Report("a", error="no such file: /\udcff")]
    verdict, _ = together(*(lambda rank=rank: meet(rank).hold(reports[rank]) for rank in range(2)))
    assert verdict.failed == [(1, "no such file: /\udcff")]


def test_a_store_that_fails_when_targets_were_written_to_says_so():
    """If the store fails in the meeting after the work, the error says whether targets were modified."""
    store = BrokenStore()
    for modifies in (True, False):
        meeting = Meeting(Start(store, 0, 2), 60)
        with pytest.raises(PeerLoadError, match="on a load failed: Broken pipe") as caught:
            meeting.agree(Report("a"), lambda: None, modifies=modifies)
        assert caught.value.targets_modified is modifies


def begun(meet, seconds):
    """The meetings of two ranks that have agreed to load; the first rank has time, the second `seconds`."""
    meetings = [meet(0), meet(1)]
    together(*(lambda meeting=meeting: meeting.hold(Report("a")) for meeting in meetings))
    meetings[1]._seconds = seconds
    return meetings


def test_a_rank_that_gives_up_as_the_others_agree_agrees(meet, monkeypatch):
    """If the verdict comes just when a rank's time is up, that is what this rank returns, too."""
    monkeypatch.setattr("milepost.ranks.load_meeting.GRACE_SECONDS", 0)
    first, second = begun(meet, 0.01)
    verdicts = []
    look = Round.absent

    def late(round_of_second):
        verdicts.append(first.hold(Report("a")))
        return look(round_of_second)

    monkeypatch.setattr(Round, "absent", late)
    verdicts.append(second.hold(Report("a")))
    assert verdicts == [Verdict(), Verdict()]


def test_a_rank_that_has_given_up_is_not_taken_to_agree(meet, monkeypatch):
    """If a rank gives up while rank 0 reads the reports, both say so, though rank 0 has read one of it."""
    monkeypatch.setattr("milepost.ranks.load_meeting.GRACE_SECONDS", 0)
    first, second = begun(meet, 0.01)
    verdicts = []
    thread = threading.Thread(target=lambda: verdicts.append(second.hold(Report("a"))))
    judge = Verdict.of

    def slow(reports):
        thread.join()  # the other rank has given up
        return judge(reports)

    monkeypatch.setattr(Verdict, "of", slow)
    thread.start()
    verdicts.append(first.hold(Report("a")))
    assert verdicts[0] == verdicts[1]
    assert [rank for rank, _ in verdicts[0].failed] == [0]


MISSES = [
    *((2, [[who]]) for who in range(2)),
    *((2, [[one], [other]]) for one in range(2) for other in range(2)),
    *((3, [[who]]) for who in range(3)),
    *((3, [[one], [other]]) for one in range(3) for other in range(3)),
    (3, [[0, 1], [2]]),
    (3, [[0], [0], [0], [1, 2], [1]]),
]
"""Numbers of ranks, and for each of some loads the ranks that miss it."""


STEPS = [
    *product(map("".join, product("LF-", repeat=2)), repeat=2),
    *((one,) for one in map("".join, product("LF-", repeat=3))),
    *((one, one, one) for one in ("-F", "F-", "-FL", "L-F", "F-L", "-FF", "F-F")),
]
"""For each of some loads what each rank does: it loads, it fails, or it is not there."""


@pytest.mark.parametrize("first", ["rank 0", "the others"])
@pytest.mark.parametrize(("world", "misses"), MISSES)
def test_ranks_are_in_step_after_loads_that_some_missed(monkeypatch, world, misses, first):
    """Whoever missed whatever loads, and whoever comes first to the next, all take part in that."""
    monkeypatch.setattr("milepost.ranks.load_meeting.GRACE_SECONDS", 0)
    store = dist.HashStore()
    starts = life(store, world)
    for absent in misses:
        for result in loads([start for start in starts if start.rank not in absent], 0.01):
            assert isinstance(result, PeerLoadError)
    for _ in range(2):
        come = [0] if first == "rank 0" else range(1, world)
        assert all_load(starts, come) == ["loaded"] * world


@pytest.mark.parametrize("first", ["rank 0", "the others"])
def test_ranks_that_were_killed_are_in_step_when_started_again(monkeypatch, first):
    """At a store that outlives them, what killed ranks have left at any operation is not taken for new."""
    monkeypatch.setattr("milepost.ranks.load_meeting.GRACE_SECONDS", 0)
    last, killed = 0, True
    while killed:
        last, killed = last + 1, False
        for other in range(1, 20, 3):
            store = dist.HashStore()
            results = loads(life(store, 2, (last, other)), 0.01)
            killed = killed or isinstance(results[0], Killed)
            assert all_load(life(store, 2), [0] if first == "rank 0" else [1]) == ["loaded"] * 2
    assert last > 10


def try_all(meet, rank, broken):
    """As a job that loads the newest of three checkpoints that can be read; returns which that was."""
    for name in "abc":
        try:
            meeting = meet(rank)
            with meeting.telling(name):
                if name in broken:
                    raise OSError(name)
            refuse(meeting.hold(Report(name, name)), modified=False)
            meeting.agree(Report(name), lambda: None, modifies=True)
        except (OSError, PeerLoadError):
            continue
        return name
    return None


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_that_fails_waits_for_nobody(meet, monkeypatch, rank):
    """A rank that cannot load raises at once, and the others hear of it when they come, however late."""
    monkeypatch.setattr(
        "milepost.ranks.load_meeting.GRACE_SECONDS", 0
    )  # that rank 0 leaves those who are about to come
    with pytest.raises(OSError, match="broken"), meet(rank, 3).telling("a"):
        raise OSError("broken")
    others = [other for other in range(3) if other != rank]
    verdicts = together(*(partial(meet(other, 3).hold, Report("a")) for other in others))
    assert [verdict.failed for verdict in verdicts] == [[(rank, "OSError: broken")]] * 2
    assert together(*(partial(load, meet(other, 3)) for other in range(3))) == ["loaded"] * 3


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_at_its_work_waits_for_nobody(meet, monkeypatch, rank):
    """A rank that fails while it reads raises at once, and the other hears of it when it has read."""
    monkeypatch.setattr("milepost.ranks.load_meeting.GRACE_SECONDS", 0)

    def fail():
        raise OSError("broken")

    meetings = begun(meet, 60)
    with pytest.raises(OSError, match="broken"):
        meetings[rank].agree(Report("a"), fail, modifies=True)
    with pytest.raises(PeerLoadError, match=f"rank {rank} could not load: OSError: broken"):
        meetings[1 - rank].agree(Report("a"), lambda: None, modifies=True)
    assert together(*(partial(load, meet(other)) for other in range(2))) == ["loaded"] * 2


@pytest.mark.parametrize("broken", list(product(["", "a", "b", "ab"], repeat=2)), ids=str)
def test_a_failure_is_heard_by_others_at_the_same_load(meet, broken):
    """Ranks that try one checkpoint after the other load the same one, whoever fails and does not wait."""
    found = together(*(partial(try_all, meet, rank, broken[rank]) for rank in range(2)))
    assert found == [min(set("abc") - set("".join(broken)))] * 2


@pytest.mark.parametrize("steps", STEPS, ids="-".join)
def test_ranks_are_in_step_one_load_after_some_failed_or_missed_it(monkeypatch, steps):
    """Whatever loads some ranks miss and others fail at, not waiting: one more load, and all are in step."""
    monkeypatch.setattr("milepost.ranks.load_meeting.GRACE_SECONDS", 0)
    store, world = dist.HashStore(), len(steps[0])
    starts = life(store, world)

    def step(rank, what):
        meeting = Meeting(starts[rank], 0.02)
        if what == "L":
            load(meeting)
        elif what == "F":
            meeting.tell(Report("a", error="broken"))

    for doings in (*steps, "L" * world):
        together(*(partial(step, rank, what) for rank, what in enumerate(doings)))
    assert loads(starts, 60) == ["loaded"] * world


def test_a_store_does_not_grow_with_every_load():
    """What is two loads old is taken from the store, where keys can be deleted."""
    store, sizes = dist.HashStore(), []
    starts = life(store, 3)
    for _ in range(6):
        assert loads(starts, 60) == ["loaded"] * 3
        sizes.append(store.num_keys())
    assert len(set(sizes[2:])) == 1


class Mine(Barrier):
    """A barrier of a user's, whose `store` is something else than a store of torch's."""

    def __init__(self):
        self.store = "redis://host"

    def execute_barrier(self):
        pass


def test_a_store_of_a_barrier_that_is_none_of_torchs_is_left_alone(tmp_path):
    """What a user's barrier calls its store is used neither to save nor to load if it is another thing."""
    assert barrier_store(Mine()) is None
    torch.save({"w": torch.ones(4)}, tmp_path / "checkpoint_0.pt")
    reader = builder._reader(CheckpointerConfig(), RankInfo(0, 2), Mine())
    loaded, missing = reader.read(str(tmp_path), {"w": torch.zeros(4)})
    assert loaded["w"].tolist() == [1] * 4
    assert missing == []
