"""Loading as one job: every rank learns what the others found, and all load or none does.

The ranks meet at a store (see `start`), never in a collective. Rank 0 reads what each rank reports there, and
puts one verdict for all. `Round` describes the keys.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from typing import Any, TypeVar

import msgspec

from milepost.commit.contents import numbers
from milepost.errors import MilepostError, PeerLoadError, text_of
from milepost.ranks.start import Line, Start, StoreGoneError, start_at

__all__ = ["Meeting", "Report", "Verdict", "default_meeting"]

logger = logging.getLogger(__name__)

_Kind = TypeVar("_Kind")

_MEETINGS = 3
"""The most meetings that one load has: all fits, all is verified, all is read."""

GRACE_SECONDS = 5
"""How much longer than rank 0 the others wait, and how long a rank 0 that failed waits for the others."""


class Report(msgspec.Struct):
    """What one rank found.

    Attributes:
        path: Where it loads from.
        identity: Tells this checkpoint from all others (`Checkpoint.identity`); "" if it is not known.
        missing: See `Match`.
        unexpected: See `Match`.
        misfits: See `Match`.
        strict: Whether missing keys are an error.
        first: Whether everything is verified before anything is written to.
        error: Why this rank cannot load; None if it can.
    """

    path: str
    identity: str = ""
    missing: list[str] = []
    unexpected: list[str] = []
    misfits: list[str] = []
    strict: bool = False
    first: bool = False
    error: str | None = None


class Verdict(msgspec.Struct):
    """What all ranks found together.

    Attributes:
        missing: Keys of any rank's template that were not saved.
        unexpected: Saved keys that no rank's template has.
        misfits: What does not fit a rank's template, with the rank.
        strict: Whether missing keys are an error for any rank.
        first: Whether any rank wants everything verified first.
        failed: The ranks that cannot load, with their errors.
    """

    missing: list[str] = []
    unexpected: list[str] = []
    misfits: list[str] = []
    strict: bool = False
    first: bool = False
    failed: list[tuple[int, str]] = []

    @classmethod
    def of(cls, reports: list[Report]) -> Verdict:
        """The verdict on the reports of all ranks, in the order of ranks."""
        verdict = cls()
        verdict.missing = list(dict.fromkeys(key for report in reports for key in report.missing))
        verdict.unexpected = _common([report.unexpected for report in reports])
        verdict.strict = any(report.strict for report in reports)
        verdict.first = any(report.first for report in reports)
        by_misfit: dict[str, list[int]] = {}
        for rank, report in enumerate(reports):
            for misfit in report.misfits:
                by_misfit.setdefault(misfit, []).append(rank)
            if report.error is not None:
                verdict.failed.append((rank, report.error))
            elif report.identity != reports[0].identity and reports[0].error is None:
                reason = f"it loads {report.path}, but rank 0 loads {reports[0].path}"
                if report.path == reports[0].path:
                    reason = f"a save replaced {report.path} while the ranks opened it: load again"
                verdict.failed.append((rank, reason))
        verdict.misfits = [
            misfit
            if len(ranks) == len(reports)
            else f"{misfit} (on rank{'s' * (len(ranks) > 1)} {numbers(ranks)})"
            for misfit, ranks in by_misfit.items()
        ]
        return verdict


@dataclass(frozen=True)
class Round:
    """One load of all ranks, at the store. A round is one or more meetings.

    Rank 0 assigns each round a number, from 1. Other ranks wait for its report before they write to
    the store, except to report an error. This keeps entries of a dead rank out of later rounds.

    | who        | does                                   | key, below ``milepost/<start id>/load/`` |
    |------------|----------------------------------------|------------------------------------------|
    | rank 0     | opens round n                          | ``opened``: n                            |
    | each rank  | reports at meeting m of round n        | ``<n>/<m>/<rank>``: a `Report`           |
    | rank 0     | decides, at the latest at its deadline | ``<n>/<m>/verdict``: a `Verdict`         |
    | other rank | decides, if rank 0 has not in time     | the same: the first verdict stands       |
    | each rank  | enters round n                         | deletes its keys of round n - 2; rank 0  |
    |            |                                        | the verdicts too                         |

    A round is open until its first meeting has a verdict. Then it is lost for the ranks of which the verdict
    says that they failed or did not come, and decided for the others. Its last round says which round a rank
    enters next:

    | its last round | rank 0                                 | another rank                             |
    |----------------|----------------------------------------|------------------------------------------|
    | none           | opens round 1                          | enters the opened round, or round 1      |
    | open           | opens the next one                     | waits for the verdict; without one it    |
    |                |                                        | reports again at the same round          |
    | decided        | opens the next one                     | enters the opened round if that is       |
    |                |                                        | later, else the next one                 |
    | lost           | waits until all ranks have reported:   | as for decided                           |
    |                | they have heard why. Opens the next    |                                          |

    If the round that another rank would enter is lost for it already, it enters the one after that.

    Attributes:
        number: The number of the load.
        line: To the store.
        base: Key that the keys of all loads have in common.
        ranks: How many ranks there are.
        meeting: The number of the meeting, from 0.
    """

    number: int
    line: Line
    base: str
    ranks: int
    meeting: int = 0

    def opened(self) -> int:
        """The number of the last round that rank 0 has opened; 0 before the first."""
        return int(self.line.get(f"{self.base}/opened") or 0)

    def lost(self, rank: int) -> bool:
        """Whether this round is lost for a rank."""
        verdict = replace(self, meeting=0).verdict()
        return verdict is not None and rank in dict(verdict.failed)

    def has(self, *names: int | str) -> bool:
        """Whether these ranks have reported; for "verdict", whether there is a verdict."""
        return self.line.has(*map(self.key, names))

    def absent(self) -> list[int]:
        """The ranks that have not reported."""
        return [rank for rank in range(self.ranks) if not self.has(rank)]

    def verdict(self) -> Verdict | None:
        """The verdict, if there is one."""
        data = self.line.get(self.key("verdict"))
        return None if data is None else _decoded(data, Verdict)

    def decide(self, verdict: Verdict) -> Verdict:
        """Put a verdict, if there is none; returns the one that stands."""
        return _decoded(self.line.first(self.key("verdict"), _encoded(verdict)), Verdict)

    def key(self, name: int | str) -> str:
        """The key of a rank's report, or of the verdict."""
        return f"{self.base}/{self.number}/{self.meeting}/{name}"


class Meeting:
    """Where the ranks of a job meet during one load, which is one `Round`.

    A rank that missed loads takes part in the one that is under way, or in the next one if that has been
    given up already.

    Args:
        start: Of the ranks that meet.
        timeout_seconds: How long to wait for the others.
    """

    def __init__(self, start: Start, timeout_seconds: float) -> None:
        self._start = start
        self._rank, self._world_size = start.rank, start.world_size
        self._seconds = timeout_seconds
        self._round: Round | None = None
        self._deadline = 0.0

    def hold(self, report: Report) -> Verdict:
        """Return the verdict on all ranks' reports, the same on each rank that comes in time.

        The verdict says that ranks which do not come within the timeout have failed. A rank that reports
        an error does not wait. The others hear of the error when they come.

        Raises:
            PeerLoadError: The store cannot be reached.
        """
        self._deadline = time.monotonic() + self._seconds + (GRACE_SECONDS if self._rank else 0)
        try:
            return self._hold(report)
        except StoreGoneError as error:
            raise PeerLoadError(
                f"the store at which the ranks agree on a load failed: {error}",
                rank=self._rank,
                phase="load",
                hint="its host process may have died; pass together=False to load without the other ranks",
            ) from error

    def _hold(self, report: Report) -> Verdict:
        failed = report.error is not None
        if self._round is None:
            seconds = min(self._seconds, GRACE_SECONDS) if failed else self._deadline - time.monotonic()
            if not self._start.wait_for_answer(seconds):
                return self._without([0])
            self._round = self._joined(failed=failed) if self._rank else self._opened()
            if self._round is None:
                return self._without([0])
            for meeting in range(_MEETINGS):
                old = replace(self._round, number=self._round.number - 2, meeting=meeting)
                for name in (self._rank,) if self._rank else (0, "verdict"):
                    old.line.delete(old.key(name))
        else:
            self._round = replace(self._round, meeting=self._round.meeting + 1)
        now = self._round
        now.line.set(now.key(self._rank), _encoded(report))
        if not self._rank:
            return self._judge(now, report.error)
        return Verdict(failed=[(self._rank, report.error or "")]) if failed else self._hear(now)

    def _numbered(self, number: int) -> Round:
        return Round(number, self._start.line, self._start.key("load"), self._world_size)

    def _opened(self) -> Round:
        """As rank 0: open the next round."""
        number = self._start.loads + 1
        last, now = self._numbered(number - 1), self._numbered(number)
        if last.lost(0):
            self._until(last.has, *range(last.ranks))
        self._start.loads = number
        now.line.set(f"{now.base}/opened", str(number))
        return now

    def _joined(self, *, failed: bool) -> Round | None:
        """As another rank: the round to enter; None if rank 0 does not come to it in time."""
        now = self._numbered(self._start.loads)
        if not now.number or now.number < now.opened() or self._until(now.has, "verdict"):
            now = replace(now, number=max(now.number + 1, now.opened()))
            if now.lost(self._rank):
                now = replace(now, number=now.number + 1)
        if not failed and not self._until(now.has, 0):
            return None
        self._start.loads = now.number
        return now

    def _judge(self, now: Round, error: str | None) -> Verdict:
        """As rank 0: put the verdict."""
        if error is not None:
            verdict = now.decide(Verdict(failed=[(0, error)]))
            # The store may end with this process: ranks that are about to come are to hear first.
            self._deadline = min(self._deadline, time.monotonic() + GRACE_SECONDS)
            self._until(now.has, *range(now.ranks))
            return verdict
        if not self._until(now.has, *range(now.ranks)):
            return now.decide(self._without(now.absent()))
        reports = [now.line.get(now.key(rank)) or b"" for rank in range(now.ranks)]
        return now.decide(Verdict.of([_decoded(report, Report) for report in reports]))

    def _hear(self, now: Round) -> Verdict:
        """As another rank: the verdict. Rank 0 puts one at its own deadline, which is earlier."""
        found = now.verdict() if self._until(now.has, "verdict") else None
        return found or now.decide(self._without(now.absent() or [0]))

    def _until(self, done: Callable[..., bool], *arguments: int | str) -> bool:
        """Wait until something is done; whether it is at the deadline."""
        pause = 0.001
        while not done(*arguments):
            if time.monotonic() >= self._deadline:
                return done(*arguments)
            time.sleep(pause)
            pause = min(pause * 1.5, 0.05)
        return True

    def _without(self, ranks: list[int]) -> Verdict:
        reason = (
            f"it did not call load within {self._seconds:g} seconds (to load on some ranks: together=False)"
        )
        return Verdict(failed=[(rank, reason) for rank in ranks])

    def agree(self, report: Report, work: Callable[[], None], *, modifies: bool) -> None:
        """Do some work; if it fails on one rank, fail on all.

        Args:
            report: This rank's.
            work: What to do.
            modifies: Whether the work writes to targets.

        Raises:
            PeerLoadError: Another rank failed; this one has done its part.
            Exception: What `work` raised; the others have been told.
        """
        try:
            work()
        except BaseException as error:
            report.error = describe(error)
            self.tell(report)
            raise
        try:
            refuse(self.hold(report), modified=modifies)
        except PeerLoadError as error:  # of a store that failed, too
            error.targets_modified = modifies
            raise

    @contextmanager
    def telling(self, path: str) -> Iterator[None]:
        """If the body raises, tell the other ranks at the next meeting."""
        try:
            yield
        except BaseException as error:
            self.tell(Report(path, error=describe(error)))
            raise

    def tell(self, report: Report) -> None:
        """Report why this rank cannot load. The others hear it when they come to this meeting."""
        try:
            self.hold(report)
        except Exception as error:  # noqa: BLE001 - the caller raises the reason for not loading, not this
            logger.warning("could not report an error to the other ranks: %s", error)


def refuse(verdict: Verdict, *, modified: bool) -> None:
    """Raise if another rank cannot load."""
    others = verdict.failed
    if not others:
        return
    rank, reason = others[0]
    more = f" (nor could ranks {numbers(other for other, _ in others[1:])})" if others[1:] else ""
    error = PeerLoadError(
        f"rank {rank} could not load: {reason}{more}",
        rank=rank,
        phase="load",
        hint="all ranks load, or none: fix the error on that rank, or load another checkpoint",
    )
    error.targets_modified = modified
    raise error


def _encoded(value: Report | Verdict) -> str:
    """As JSON in ASCII: paths and keys may hold lone surrogates, which have no UTF-8."""
    return json.dumps(msgspec.to_builtins(value))


def _decoded(data: bytes, kind: type[_Kind]) -> _Kind:
    return msgspec.convert(json.loads(data), kind)


def _common(lists: list[list[str]]) -> list[str]:
    """The topmost paths that every list has, by themselves or with a path above them."""
    who: dict[str, int] = {}  # a bit for each list
    for number, keys in enumerate(lists):
        for key in keys:
            who[key] = who.get(key, 0) | 1 << number
    everyone = (1 << len(lists)) - 1

    def known(key: str) -> int:
        return who[key] | reduce(
            or_, (who.get(key[:end], 0) for end, sign in enumerate(key) if sign in ".["), 0
        )

    return [key for key in who if known(key) == everyone]


def describe(error: BaseException) -> str:
    """An error in one line."""
    text = error.brief if isinstance(error, MilepostError) else text_of(error)
    return f"{type(error).__name__}: {text}"


def default_meeting(rank: int, world_size: int, store: Any, timeout_seconds: float) -> Meeting | None:
    """The meeting at the given store, or at that of the default process group; None without either."""
    start = None if world_size == 1 else start_at(store, rank, world_size)
    return None if start is None else Meeting(start, timeout_seconds)
