"""Loading as one job: every rank learns what the others found, and all load or none does.

The ranks meet at a store, never in a collective: rank 0 reads what each of them puts there, and puts one
answer for all. A store is used from the thread that loads only.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import reduce
from operator import or_
from typing import Any, TypeVar

import msgspec
import torch.distributed as dist

from milepost.commit import environment_start_id
from milepost.errors import MilepostError, PeerLoadError

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
        identity: What no other checkpoint has (`Located.identity`); "" if that is not known.
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
        void: Nothing: rank 0 died, and has been started again. All begin again.
    """

    missing: list[str] = []
    unexpected: list[str] = []
    misfits: list[str] = []
    strict: bool = False
    first: bool = False
    failed: list[tuple[int, str]] = []
    void: bool = False

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
            else f"{misfit} (on rank{'s' * (len(ranks) > 1)} {_some(ranks)})"
            for misfit, ranks in by_misfit.items()
        ]
        return verdict


class Meeting:
    """Where the ranks of a job meet during one load.

    Rank 0 numbers the loads. The others wait until it has opened one before they put anything there, but for
    why they cannot load; so what a rank has put that has left or died is not taken for part of a
    later load. A rank that missed loads takes part in the one that is under way, or in the next if that has
    been given up already.

    Args:
        store: A ``torch.distributed`` store that all ranks share.
        rank: This rank.
        world_size: How many ranks there are.
        timeout_seconds: How long to wait for the others.
    """

    def __init__(self, store: Any, rank: int, world_size: int, timeout_seconds: float) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        self._seconds = timeout_seconds
        self._base = "/".join(filter(None, ("milepost/load", environment_start_id(), str(world_size))))
        self._load, self._held, self._deadline = 0, 0, 0.0

    def hold(self, report: Report) -> Verdict:
        """Returns the verdict on all ranks' reports, the same on each that comes in time.

        Ranks that do not come within the timeout have failed, says the verdict. A rank that reports an error
        does not wait: the others hear of it when they come.

        Raises:
            PeerLoadError: The store cannot be reached.
        """
        try:
            return self._hold(report)
        except RuntimeError as error:
            raise PeerLoadError(
                f"the store at which the ranks agree on a load failed: {str(error).splitlines()[0]}",
                rank=self._rank,
                phase="load",
                hint="the process that hosts it may have died; to load without the others: together=False",
            ) from error

    def _hold(self, report: Report) -> Verdict:
        self._deadline = time.monotonic() + self._seconds + (_GRACE_SECONDS if self._rank else 0)
        if not self._held:
            self._load = self._joined(failed=report.error is not None) if self._rank else self._opened()
            if not self._load:
                return self._without([0])
            self._forget(self._load - 2)
        prefix = f"{self._base}/{self._load}/{self._held}"
        self._held += 1
        self._store.set(f"{prefix}/{self._rank}", _encoded(report))
        if self._rank and report.error is not None:
            return Verdict(failed=[(self._rank, report.error)])
        verdict = self._hear(prefix) if self._rank else self._judge(prefix, report.error)
        if not verdict.void:
            return verdict
        self._held = 0
        return self._hold(report)

    def _forget(self, load: int) -> None:
        """Delete what this rank put at a load that all have left."""
        names = [str(self._rank)] if self._rank else ["0", "verdict"]
        with suppress(AttributeError, RuntimeError):  # some stores cannot
            for key in (f"{self._base}/{load}/{held}/{name}" for held in range(_MEETINGS) for name in names):
                self._store.delete_key(key)

    def _opened(self) -> int:
        """As rank 0: the number of the next load."""
        count = f"{self._base}/0"
        last = self._store.add(count, 0)
        prefix = f"{self._base}/{last}/0"
        verdict = self._decided(prefix, Verdict(void=True)) if last else Verdict()
        if verdict.void:  # an earlier life of this rank left it open: who waits there begins again
            self._store.set(f"{prefix}/0", "")
        elif 0 in dict(verdict.failed):  # it did not wait: all are to hear of that before the next
            self._await(self._keys(prefix))
        return int(self._store.add(count, 1))

    def _joined(self, *, failed: bool) -> int:
        """As another rank: the number of the load to take part in, or 0 if rank 0 does not open it."""
        count, opened = f"{self._base}/{self._rank}", f"{self._base}/0"
        number = last = self._store.add(count, 0)
        # Where this rank failed and did not wait, all are to hear of that before the next; if they never do,
        # what it has to say now takes its place.
        if not last or last < self._store.add(opened, 0) or self._await([f"{self._base}/{last}/0/verdict"]):
            number = max(last + 1, self._store.add(opened, 0))
            key = f"{self._base}/{number}/0/verdict"
            if self._store.check([key]):  # rank 0 has failed, or this one has missed it
                verdict = _decoded(self._store.get(key), Verdict)
                number += verdict.void or self._rank in dict(verdict.failed)
        if not failed and not self._await([f"{self._base}/{number}/0/0"]):
            return 0
        self._store.add(count, number - last)
        return int(number)

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
            verdict = Verdict.of([_decoded(self._store.get(key), Report) for key in keys])
        else:
            verdict = self._without(self._absent(prefix))
        return self._decided(prefix, verdict)

    def _hear(self, prefix: str) -> Verdict:
        """As another rank: the verdict of rank 0, which says at its own deadline who did not come."""
        key = f"{prefix}/verdict"
        if self._await([key]):
            return _decoded(self._store.get(key), Verdict)
        return self._decided(prefix, self._without(self._absent(prefix) or [0]))

    def _decided(self, prefix: str, verdict: Verdict) -> Verdict:
        """The one verdict of a meeting: this one, if there is none yet."""
        return _decoded(self._store.compare_set(f"{prefix}/verdict", "", _encoded(verdict)), Verdict)

    def _await(self, keys: list[str]) -> bool:
        """Whether there are these keys before the deadline."""
        left = max(self._deadline - time.monotonic(), 0.01)  # no time at all would mean no limit
        try:
            self._store.wait(keys, timedelta(seconds=left))
        except RuntimeError:  # a timeout, or the store is gone: the check tells
            return bool(self._store.check(keys))
        return True

    def _keys(self, prefix: str) -> list[str]:
        return [f"{prefix}/{rank}" for rank in range(self._world_size)]

    def _absent(self, prefix: str) -> list[int]:
        return [rank for rank, key in enumerate(self._keys(prefix)) if not self._store.check([key])]

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
    more = f" (nor could ranks {_some([other for other, _ in others[1:]])})" if others[1:] else ""
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
    text = error.brief if isinstance(error, MilepostError) else str(error)
    return f"{type(error).__name__}: {text}"


def _some(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:10])) + (f" and {len(ranks) - 10} more" if ranks[10:] else "")


def default_meeting(rank: int, world_size: int, store: Any, timeout_seconds: float) -> Meeting | None:
    """The meeting at a store of the user's, or at that of the default process group; None without either."""
    if world_size == 1:
        return None
    if (
        store is None
        and dist.is_available()
        and dist.is_initialized()
        and dist.get_world_size() == world_size
    ):
        store = dist.distributed_c10d._get_default_store()  # noqa: SLF001 - there is no public way to it
    if store is None:
        return None
    # A connection of its own: a barrier that waits at the same store in another thread would block this one.
    with suppress(AttributeError, RuntimeError):  # one that was written in Python may have none to give
        store = store.clone()
    return Meeting(store, rank, world_size, timeout_seconds)
