"""A storm: jobs of three ranks, one after the other, under SIGKILL, SIGSTOP and SIGCONT.

Nothing is configured: a checkpointer is made without arguments when the process group is there. (Rounds in
which a rank stands still for longer than the time limit set that limit, as 600 s are too long.) A named
session: `make test-storm`.

Whom a signal hits, in which step, and how long after that step has begun there, follows from the seed.
"""

from __future__ import annotations

import contextlib
import faulthandler
import heapq
import itertools
import os
import random
import select
import shutil
import signal
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
from support.processes import free_port
from support.ranks import WORLD, Launcher, agent_store, join
from support.states import differences
from test_rank_kills import full_state, state_of

from milepost import CheckpointerConfig, RankInfo, make_async_checkpointer, make_sync_checkpointer
from milepost.checkpoint_reader import CheckpointReader
from milepost.errors import MilepostError
from milepost.health.listing import scan
from milepost.health.verify import verify
from milepost.storage import default_storage

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the launcher adopts orphans as Linux can"),
    pytest.mark.slow,
    pytest.mark.timeout(3600),
]

ROUNDS = int(os.environ.get("STORM_ROUNDS", "64"))
SEED = int(os.environ.get("STORM_SEED", "1"))
STEPS = 12
"""How many steps a job saves if it lives."""
LIMIT = 3
"""The time limit in rounds where a rank stands still for longer."""
LONG = float("inf")
"""How long a rank stands still there: until the others know what has become of the save."""
SLACK = 15
"""How many seconds more than the limit it may take until they know."""
PATIENCE = 60
"""Seconds that a round may take."""
KEPT = 4
"""How many steps a job keeps, besides each eighth."""


@dataclass(order=True)
class Blow:
    """A signal.

    Attributes:
        step: The number of the step in which it comes, from 1 in each job.
        rank: The rank that it hits.
        delay: How many seconds after that rank has begun that step it comes.
        who: "trainer", "writer", or "job": all trainers and writers.
        stopped: For how long a process is stopped, in seconds, or LONG; 0 to kill it.
    """

    step: int
    rank: int
    delay: float
    who: str
    stopped: float = 0.0


@dataclass
class Round:
    """A start of the job.

    Attributes:
        number: Its number; a step's values tell in which round it was saved.
        folder: Where the checkpoints are.
        reports: The FIFO through which the ranks report.
        background: Whether it saves in the background.
        store: Where the ranks meet: "kept" is the store of an agent that outlives the ranks, and the
            rounds; "new" is that of a new agent, and "rank 0" is in that rank.
        grace: How long the launcher lets the others live when a trainer was killed, in seconds.
        limit: The time limit, if it is set.
        blows: The signals.
    """

    number: int
    folder: str
    reports: str
    background: bool
    store: str
    grace: float
    limit: int | None = None
    blows: list[Blow] = field(default_factory=list)

    @property
    def fatal(self):
        """Whether it ends the job."""
        return any(blow.stopped == 0 and blow.who != "writer" for blow in self.blows)


def plan(number, choose, folder, reports):
    """The round of a number."""
    store = choose.choice(["kept", "kept", "new", "rank 0"])
    found = Round(number, folder, reports, choose.random() < 0.7, store, choose.choice([0, 0.05, 0.5]))
    processes = ["trainer", "writer"] if found.background else ["trainer"]

    def blow(who, stopped=0.0, last=STEPS):
        delay = choose.choice([0, 0.01, 0.03, 0.1]) * choose.random()
        found.blows.append(Blow(choose.randint(1, last), choose.randrange(WORLD), delay, who, stopped))

    kind = choose.choice(["calm", "trainer", "trainer", "trainer", "job", "long"])
    if kind == "long":
        found.limit = LIMIT
        blow(choose.choice(processes), LONG, STEPS - 2)
        return found
    for _ in range(choose.randint(0, 3)):
        blow(choose.choice(processes), choose.choice([0.02, 0.2, 0.6]))
    if choose.random() < 0.5 and found.background:
        blow("writer")
    if kind != "calm":
        blow(kind)
    return found


# -- one rank ----------------------------------------------------------------------------------------------


def train(job):
    """What each rank runs."""
    faulthandler.register(signal.SIGUSR1)
    del os.environ["MILEPOST_START_ID"]
    if job.store == "rank 0":
        for name in ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT"):
            del os.environ[name]
    rank, _ = join()
    config = None
    if job.limit:
        config = CheckpointerConfig()
        config.writer_config.write_barrier_timeout_secs = job.limit
    make = make_async_checkpointer if job.background else make_sync_checkpointer
    checkpointer = make(config)
    Trainer(job, rank, checkpointer).run()
    checkpointer.close()


class Trainer:
    """A rank that resumes from the newest step, and saves STEPS more; it reports in lines that survive it."""

    def __init__(self, job, rank, checkpointer):
        self.job, self.rank, self.checkpointer = job, rank, checkpointer
        self.reports = os.open(job.reports, os.O_WRONLY)
        self.told = []

    def report(self, what, path="", value=0, text=""):
        line = f"{self.rank}\t{what}\t{path}\t{value}\t{text}".replace("\n", " ")
        os.write(self.reports, f"{line[: select.PIPE_BUF // 4]}\n".encode())

    def run(self):
        import torch
        import torch.distributed as dist

        first = self.resume() + 1
        for n in range(1, STEPS + 1):
            dist.all_reduce(torch.ones(3))  # as training does
            path = f"{self.job.folder}/last" if n % 3 == 0 else f"{self.job.folder}/step-{first + n:06}"
            value = 100 * self.job.number + n
            self.report("begins", path, value, self.writer)
            try:
                self.save(path, value)
            except MilepostError as error:
                self.report("failed", path, value, repr(error))
            except Exception as error:
                self.report("wrong", path, value, f"save raised {error!r}")
            self.delete_old()

    @property
    def writer(self):
        """The writer's pid, 0 where there is none."""
        return self.checkpointer._process.process.pid if self.job.background else 0

    def resume(self):
        """Load the newest step; returns it, or 0 where there is none."""
        import torch.distributed as dist

        entries = scan(default_storage(), self.job.folder)
        names = [entry.name for entry in entries if entry.state == "committed" and entry.name != "last"]
        newest = [max(names, default="")]
        dist.broadcast_object_list(newest)
        if not newest[0]:
            return 0
        path, template = f"{self.job.folder}/{newest[0]}", state_of(0)
        self.checkpointer.load(path, template, strict=True)
        value = template["facts"]["step"]
        wrong = differences(template, state_of(value))
        self.report("wrong" if wrong else "loaded", path, value, f"a load gave {wrong}")
        return int(newest[0].removeprefix("step-"))

    def save(self, path, value):
        state = state_of(value)
        if self.job.background:
            _, written = self.checkpointer.save(path, state, step=value)
            written.add_done_callback(lambda done: self.hear(path, value, done))
        else:
            self.checkpointer.save(path, state, step=value)
            self.hear(path, value)

    def hear(self, path, value, written=None):
        """A save is over."""
        error = None if written is None else written.exception()
        if error is None and getattr(written, "committed", True):
            self.told.append(path)
            self.report("told", path, value)
        else:
            self.report("failed", path, value, repr(error))

    def delete_old(self):
        """The first rank keeps the newest KEPT steps that it was told of, and each eighth."""
        steps = sorted({path for path in self.told if not path.endswith("last")})
        for path in steps[:-KEPT] if self.rank == 0 else []:
            self.told.remove(path)
            if int(path[-6:]) % 8:
                self.report("deletes", path)
                shutil.rmtree(path)


# -- the storm ---------------------------------------------------------------------------------------------


def parent(pid):
    """The pid of a process's parent; None where it has ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        state, above, *_ = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else int(above)


class Weather:
    """The signals of one round.

    Args:
        launcher: The pid of the trainers' parent, which adopts their writers.
        job: The processes that are hit.
        plan: The round, with its signals.
        fifo: The end of the reports' FIFO that is read.
        heard: Called with each report.
    """

    def __init__(self, launcher, job, plan, fifo, heard):
        self.job, self.plan, self._fifo, self._heard = job, plan, fifo, heard
        self._launcher = launcher
        self.counts = Counter()
        self.writers = set()
        self._writer = [0] * WORLD
        self._actions, self._order = [], itertools.count()
        self._stopped, self._long = set(), None
        self.late = False
        self._answers = {n: set() for n in range(1, STEPS + 1)}
        self._rest = b""

    def run(self):
        """Until no trainer runs; whether that was in time."""
        end = time.monotonic() + PATIENCE
        while any(parent(pid) == self._launcher for pid in self.job.pids):
            now = time.monotonic()
            if now > end:
                self._send(signal.SIGUSR1, self.job.pids)  # they write down where they are
                time.sleep(1)
                self.kill_all()
            while self._actions and self._actions[0][0] <= now:
                heapq.heappop(self._actions)[2]()
            wait = self._actions[0][0] - now if self._actions else 0.05
            if select.select([self._fifo], [], [], min(wait, 0.05))[0]:
                self._read()
        self._read()
        self._go_on(set(self._stopped))
        return time.monotonic() <= end

    def kill_all(self):
        self._send(signal.SIGKILL, [*self.job.pids, *self.writers])

    def close(self):
        os.close(self._fifo)

    def _send(self, number, pids):
        """Send a signal to those of these processes that run (a pid may be another process's by now)."""
        for pid in pids:
            above = parent(pid)
            ours = above in self.job.pids and parent(above) == self._launcher
            if ours or above == self._launcher:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def _in(self, seconds, action):
        heapq.heappush(self._actions, (time.monotonic() + seconds, next(self._order), action))

    def _read(self):
        with contextlib.suppress(BlockingIOError):
            while True:
                *lines, self._rest = (self._rest + os.read(self._fifo, 1 << 16)).split(b"\n")
                for line in lines:
                    rank, what, path, value, text = line.decode().split("\t")
                    self._hear(int(rank), what, int(value), text)
                    self._heard(int(rank), what, path, int(value), text)

    def _hear(self, rank, what, value, text):
        n = value % 100
        if what == "begins":
            self._writer[rank] = int(text)
            self.writers |= {int(text)} - {0}
            for blow in self.plan.blows:
                if (blow.step, blow.rank) == (n, rank):
                    self._in(blow.delay, partial(self._strike, blow))
        elif what in {"told", "failed"}:
            self._answers[n].add(rank)
            self._end_long()

    def _strike(self, blow):
        writer = {self._writer[blow.rank]} - {0}
        pids = {"trainer": {self.job.pids[blow.rank]}, "writer": writer}.get(
            blow.who, {*self.job.pids, *self.writers}
        )
        self.counts[f"SIG{'STOP' if blow.stopped else 'KILL'} to {blow.who}s"] += bool(pids)
        if not blow.stopped:
            self._send(signal.SIGKILL, pids)
            if blow.who == "trainer":
                self._in(self.plan.grace, lambda: self._send(signal.SIGKILL, self.job.pids))
            return
        self._send(signal.SIGSTOP, pids)
        self._stopped |= pids
        if blow.stopped == LONG:
            self._long = blow
            self._end_long()
            self._in(LIMIT + SLACK, partial(self._end_long, late=True))
        else:
            self._in(blow.stopped, lambda: self._go_on(pids))

    def _end_long(self, *, late=False):
        """What stands still goes on when the others know what has become of the save, or should know."""
        if self._long is None:
            return
        known = len(self._answers[self._long.step] | {self._long.rank}) == WORLD
        self.late = late and not known
        if known or late:
            self._long = None
            self._go_on(set(self._stopped))

    def _go_on(self, pids):
        self._send(signal.SIGCONT, pids)
        self.counts["SIGCONT"] += len(pids)
        self._stopped -= pids


@pytest.fixture(scope="module")
def launchers():
    launchers = [Launcher(), Launcher()]
    yield launchers
    for launcher in launchers:
        launcher.close()


class Storm:
    """Rounds, and what the ranks were told in them.

    Writers of a round may go on in the next one, as under a launcher that starts a job again at once: there
    are two launchers, by turns.

    Attributes:
        told: By path, the newest value that any rank was told is committed there.
        begun: By path, the values that any rank has begun to save there.
        deleted: Paths that the job has begun to delete.
        bad: What should not be.
        commits: By round, how many steps were told committed.
    """

    def __init__(self, launchers, root, seed):
        self._launchers, self._running = launchers, [None, None]
        self.root, self.folder, self.choose = root, f"{root}/run", random.Random(seed)
        for folder in (self.folder, f"{root}/0", f"{root}/1"):
            os.mkdir(folder)
        self.kept = agent_store()
        self.told, self.begun, self.deleted = {}, defaultdict(set), set()
        self.bad, self.commits, self.counts = [], [], Counter()

    def close(self):
        for slot in (0, 1):
            self._finish(slot)
        self.kept = None

    def _finish(self, slot):
        """End all that a launcher has started: the writers that are left."""
        if self._running[slot] is None:
            return
        weather, self._running[slot] = self._running[slot], None
        weather.kill_all()
        outcomes = weather.job.wait()
        weather.close()
        for rank, outcome in enumerate(outcomes):
            if outcome is not None and not weather.plan.fatal:
                self.bad.append(f"round {weather.plan.number}: rank {rank} ended with {outcome!r}")
        shutil.rmtree(weather.job.folder)

    def round(self, number):
        slot, began = number % 2, time.monotonic()
        self._finish(slot)
        fifo = f"{self.root}/reports-{number}"
        os.mkfifo(fifo)
        end = os.open(fifo, os.O_RDWR | os.O_NONBLOCK)
        todo = plan(number, self.choose, self.folder, fifo)
        where = {"TORCHELASTIC_RESTART_COUNT": str(number)}
        if todo.store == "rank 0":
            where["MASTER_PORT"] = str(free_port())
        store = None
        if todo.store == "kept":
            store = self.kept
            for key in store.list_keys():
                if "milepost" not in key:  # a gloo group would connect to the dead ranks of the last one
                    store.delete_key(key)
        job = self._launchers[slot].start(f"{self.root}/{slot}", train, todo, store=store, **where)
        answers = {"told": set(), "failed": {}}
        launcher = self._launchers[slot]._process.pid
        weather = Weather(launcher, job, todo, end, partial(self._hear, todo, answers))
        self._running[slot] = weather
        in_time = weather.run()
        if weather.late:
            self.bad.append(f"round {number}: {LIMIT + SLACK} s were not enough to learn that a rank is late")
        if not in_time:
            logs = "\n".join(f"rank {rank}: {text}" for rank, text in enumerate(job.logs()))
            self.bad.append(f"round {number}: not over within {PATIENCE} s\n{logs}")
        self._judge_round(todo, answers)
        self._judge_folder(f"after round {number}")
        self.commits.append(len({n for n, _ in answers["told"]}))
        self.counts += weather.counts
        seconds = time.monotonic() - began
        sys.stdout.write(f"{todo}: {self.commits[-1]} steps, {dict(weather.counts)}, {seconds:.1f} s\n")

    def _hear(self, todo, answers, rank, what, path, value, text):
        if what == "begins":
            self.begun[path].add(value)
        elif what == "told":
            answers["told"].add((value % 100, rank))
            self.told[path] = max(self.told.get(path, 0), value)
        elif what == "failed":
            answers["failed"][value % 100, rank] = text
            self.counts["failures told"] += 1
        elif what == "deletes":
            self.deleted.add(path)
        elif what == "loaded":
            steps = self.told.keys() - self.deleted - {f"{self.folder}/last"}
            if path < max(steps, default=""):
                self.bad.append(f"round {todo.number}: {path} was loaded, {max(steps)} had been told")
        elif what == "wrong":
            self.bad.append(f"round {todo.number}: rank {rank}, {path}: {text}")

    def _judge_round(self, todo, answers):
        """A job that nothing has ended has saved each step, but those in which a rank missed the limit."""
        if todo.fatal:
            return
        for n in [STEPS] if todo.limit else range(1, STEPS + 1):
            for rank in range(WORLD):
                if (n, rank) not in answers["told"]:
                    text = answers["failed"].get((n, rank), "nothing was heard")
                    self.bad.append(f"round {todo.number}: rank {rank} was not told of its step {n}: {text}")

    def _judge_folder(self, when):
        """What is listed as committed is whole, and what any rank was told is there."""
        entries = {f"{self.folder}/{entry.name}": entry for entry in scan(default_storage(), self.folder)}
        for path in sorted((self.told.keys() | entries.keys()) - self.deleted):
            entry = entries.get(path)
            if entry is not None and entry.state == "partial" and path not in self.told:
                continue
            try:
                self._check(path)
            except Exception as error:
                self.bad.append(f"{when}: {path}, told {self.told.get(path)}: {error!r}")

    def _check(self, path):
        report = verify(default_storage(), path)
        assert not report.problems, report.problems
        for rank in range(WORLD):
            loaded, _ = CheckpointReader(RankInfo(rank, WORLD)).read(path)
            value = loaded["facts"]["step"]
            assert value in self.begun[path], f"{value} was never saved there"
            assert value >= self.told.get(path, 0), f"the older {value} is loaded"
            wrong = differences(loaded, full_state(value, rank))
            assert not wrong, f"as rank {rank}: {wrong}"


def test_what_any_rank_was_told_is_committed_survives_a_storm(launchers, quick_path, capfd):
    """With nothing configured, what any rank was told is committed loads for ever, whoever is hit when."""
    storm = Storm(launchers, quick_path, SEED)
    try:
        for number in range(1, ROUNDS + 1):
            storm.round(number)
    finally:
        storm.close()
        busy = sum(commits >= 5 for commits in storm.commits)
        with capfd.disabled():
            sys.stdout.write(
                f"\nseed {SEED}: {len(storm.commits)} rounds, {busy} of them with 5 commits or more, "
                f"{sum(storm.commits)} commits, {dict(storm.counts)}, {len(storm.bad)} bad\n"
            )
    assert not storm.bad, "\n".join(storm.bad)
    assert busy >= ROUNDS / 2
