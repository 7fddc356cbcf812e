"""Loading as one job: every rank learns what the others found, and all load or none does.

The ranks meet at a store (see `meeting`), never in a collective: rank 0 reads what each of them puts there,
and puts one answer for all.

    milepost/<id>/load/opened           the number of the last load that rank 0 has opened
    milepost/<id>/load/<n>/<m>/<r>      what rank r reports at the m-th meeting of load n
    milepost/<id>/load/<n>/<m>/verdict  the answer for all
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from operator import or_
from typing import Any, TypeVar

import msgspec

from milepost.commit.contents import numbers
from milepost.errors import MilepostError, PeerLoadError, text_of
from milepost.ranks.start import Start, StoreGoneError, group_store, start_at

__all__ = ["Meeting", "Report", "Verdict", "default_meeting"]

logger = logging.getLogger(__name__)

_Kind = TypeVar("_Kind")

_MEETINGS = 3
"""The most that a load has: all fits, all is verified, all is read."""

_GRACE_SECONDS = 5
"""How much longer others wait than rank 0, which says who did not come; how long that stays if it fails."""


class Report(msgspec.Struct):
    """What one rank found.

    Attributes:
        path: Where it loads from.
        identity: What no other checkpoint has (`Checkpoint.identity`); "" if that is not known.
        missing: See `Match`.
        unexpected: See `Match`.
        misfits: See `Match`.
        strict: Whether missing keys are to be refused.
        first: Whether all is to be verified before anything is written to.
        error: Why it cannot load, if it cannot.
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
        missing: What any rank's template has and was not saved.
        unexpected: What was saved and no rank's template has.
        misfits: What does not fit some rank's template, with the rank.
        strict: Whether any rank refuses missing keys.
        first: Whether any rank wants all to be verified first.
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
                reason = f"it loads another checkpoint ({report.path}) than rank 0 ({reports[0].path})"
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


class Meeting:
    """Where the ranks of a job meet during one load.

    Rank 0 numbers the loads. The others wait until it has opened one before they put anything there, but for
    why they cannot load; so what a rank has put that has left is not taken for part of a later load. A
    rank that missed loads takes part in the one that is under way, or in the next if that has been given
    up already.

    Args:
        start: Of the ranks that meet.
        timeout_seconds: How long to wait for the others.
    """

    def __init__(self, start: Start, timeout_seconds: float) -> None:
        self._start, self._line = start, start.line
        self._rank, self._world_size = start.rank, start.world_size
        self._seconds = timeout_seconds
        self._id, self._load, self._held, self._deadline = "", 0, 0, 0.0

    def hold(self, report: Report) -> Verdict:
        """Returns the verdict on all ranks' reports, the same on each that comes in time.

        Ranks that do not come within the timeout have failed, says the verdict. A rank that reports an error
        does not wait: the others hear of it when they come.

        Raises:
            PeerLoadError: The store cannot be reached.
        """
        self._deadline = time.monotonic() + self._seconds + (_GRACE_SECONDS if self._rank else 0)
        try:
            return self._hold(report)
        except StoreGoneError as error:
            raise PeerLoadError(
                f"the store at which the ranks agree on a load failed: {error}",
                rank=self._rank,
                phase="load",
                hint="the process that hosts it may have died; to load without the others: together=False",
            ) from error

    def _hold(self, report: Report) -> Verdict:
        if not self._held:
            self._load = self._joined(failed=report.error is not None) if self._rank else self._opened()
            if not self._load:
                return self._without([0])
            self._forget(self._load - 2)
        prefix = self._key(self._load, self._held)
        self._held += 1
        self._line.set(f"{prefix}/{self._rank}", _encoded(report))
        if self._rank and report.error is not None:
            return Verdict(failed=[(self._rank, report.error)])
        return self._hear(prefix) if self._rank else self._judge(prefix, report.error)

    def _key(self, *parts: object) -> str:
        return "/".join(["milepost", self._id, "load", *map(str, parts)])

    def _forget(self, load: int) -> None:
        """Delete what this rank put at a load that all have left."""
        for held in range(_MEETINGS):
            for name in [str(self._rank)] if self._rank else ["0", "verdict"]:
                self._line.delete(self._key(load, held, name))

    def _opened(self) -> int:
        """As rank 0: the number of the next load."""
        self._id, last = self._start.id, self._start.loads
        verdict = self._line.get(self._key(last, 0, "verdict"))
        if verdict is not None and 0 in dict(_decoded(verdict, Verdict).failed):
            self._await(self._keys(self._key(last, 0)))  # all are to hear of what it did not wait for
        self._start.loads += 1
        self._line.set(self._key("opened"), str(self._start.loads))
        return self._start.loads

    def _joined(self, *, failed: bool) -> int:
        """As another rank: the number of the load to take part in, or 0 if rank 0 does not open it."""
        seconds = min(self._seconds, _GRACE_SECONDS) if failed else self._seconds + _GRACE_SECONDS
        if not self._start.wait_for_answer(seconds):
            return 0
        self._id = self._start.id
        number = last = self._start.loads
        # Where this rank failed and did not wait, all are to hear of that before the next; if they never do,
        # what it has to say now takes its place.
        if not last or last < self._last_opened() or self._await([self._key(last, 0, "verdict")]):
            number = max(last + 1, self._last_opened())
            verdict = self._line.get(self._key(number, 0, "verdict"))
            if verdict is not None:  # rank 0 has failed, or this one has missed it
                number += self._rank in dict(_decoded(verdict, Verdict).failed)
        if not failed and not self._await([self._key(number, 0, "0")]):
            return 0
        self._start.loads = number
        return number

    def _last_opened(self) -> int:
        return int(self._line.get(self._key("opened")) or 0)

    def _judge(self, prefix: str, error: str | None) -> Verdict:
        """As rank 0: put the verdict where all ranks find it."""
        keys = self._keys(prefix)
        if error is not None:
            verdict = self._decided(prefix, Verdict(failed=[(0, error)]))
            # The store may end with this process: those who are about to come are to hear first.
            self._deadline = min(self._deadline, time.monotonic() + _GRACE_SECONDS)
            self._await(keys)
            return verdict
        if self._await(keys):
            verdict = Verdict.of([_decoded(self._line.get(key) or b"", Report) for key in keys])
        else:
            verdict = self._without(self._absent(prefix))
        return self._decided(prefix, verdict)

    def _hear(self, prefix: str) -> Verdict:
        """As another rank: the verdict of rank 0, which says at its own deadline who did not come."""
        key = f"{prefix}/verdict"
        if self._await([key]):
            return _decoded(self._line.get(key) or b"", Verdict)
        return self._decided(prefix, self._without(self._absent(prefix) or [0]))

    def _decided(self, prefix: str, verdict: Verdict) -> Verdict:
        """The one verdict of a meeting: this one, if there is none yet."""
        return _decoded(self._line.first(f"{prefix}/verdict", _encoded(verdict)), Verdict)

    def _await(self, keys: list[str]) -> bool:
        """Whether there are these keys before the deadline."""
        return self._until(lambda: self._line.has(*keys))

    def _until(self, done: Callable[[], bool]) -> bool:
        """Whether something is done before the deadline."""
        pause = 0.001
        while not done():
            if time.monotonic() >= self._deadline:
                return done()
            time.sleep(pause)
            pause = min(pause * 1.5, 0.05)
        return True

    def _keys(self, prefix: str) -> list[str]:
        return [f"{prefix}/{rank}" for rank in range(self._world_size)]

    def _absent(self, prefix: str) -> list[int]:
        return [rank for rank, key in enumerate(self._keys(prefix)) if not self._line.has(key)]

    def _without(self, ranks: list[int]) -> Verdict:
        reason = (
            f"it did not come to load within {self._seconds:g} seconds (to load on some only: together=False)"
        )
        return Verdict(failed=[(rank, reason) for rank in ranks])

    def agree(self, report: Report, work: Callable[[], None], *, modifies: bool) -> None:
        """Do something that may fail, and fail on all ranks if it does on one.

        Args:
            report: This rank's.
            work: What to do.
            modifies: Whether targets have been written to when it is done.

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
        """If something fails that comes before a meeting, tell the others at that."""
        try:
            yield
        except BaseException as error:
            self.tell(Report(path, error=describe(error)))
            raise

    def tell(self, report: Report) -> None:
        """Tell the others why this rank cannot load, which they hear when they come to this meeting."""
        try:
            self.hold(report)
        except Exception as error:  # noqa: BLE001 - the reason for not loading is raised, not this
            logger.warning("could not tell the other ranks: %s", error)


def refuse(verdict: Verdict, *, modified: bool) -> None:
    """Raise if a rank cannot load; one that failed by itself has raised that already."""
    others = verdict.failed
    if not others:
        return
    rank, reason = others[0]
    more = f" (nor could ranks {numbers([other for other, _ in others[1:]])})" if others[1:] else ""
    error = PeerLoadError(
        f"rank {rank} could not load: {reason}{more}",
        rank=rank,
        phase="load",
        hint="all ranks load, or none does: see to that rank, or load another checkpoint",
    )
    error.targets_modified = modified
    raise error


def _encoded(value: Report | Verdict) -> str:
    """As JSON in ASCII: paths and keys may hold lone surrogates, which have no UTF-8."""
    return json.dumps(msgspec.to_builtins(value))


def _decoded(data: bytes, kind: type[_Kind]) -> _Kind:
    return msgspec.convert(json.loads(data), kind)


def _common(lists: list[list[str]]) -> list[str]:
    """The topmost paths that every list has, by themselves or with all that is above them."""
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
    """The meeting at a store of the user's, or at that of the default process group; None without either."""
    if world_size == 1:
        return None
    store = group_store(rank, world_size) if store is None else store
    start = None if store is None else start_at(store, rank, world_size)
    return None if start is None else Meeting(start, timeout_seconds)
