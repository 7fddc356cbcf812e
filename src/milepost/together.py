"""Loading as one job: every rank learns what the others found, and all load or none does.

The ranks meet at a store, never in a collective: rank 0 reads what each of them puts there, and puts one
answer for all. A store is used from the thread that loads only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import msgspec
import torch.distributed as dist

from milepost.errors import MilepostError, PeerLoadError

__all__ = ["Meeting", "Report", "Verdict", "default_meeting"]

logger = logging.getLogger(__name__)

_meetings = 0


class Report(msgspec.Struct):
    """What one rank found.

    Attributes:
        path: Where it loads from.
        attempt: The attempt that made the checkpoint there; "" if that is not known.
        missing: See `Match`.
        unexpected: See `Match`.
        misfits: See `Match`.
        error: Why it cannot load, if it cannot.
    """

    path: str
    attempt: str = ""
    missing: list[str] = []
    unexpected: list[str] = []
    misfits: list[str] = []
    error: str | None = None


class Verdict(msgspec.Struct):
    """What all ranks found together.

    Attributes:
        missing: What any rank's template has and was not saved.
        unexpected: What was saved and no rank's template has.
        misfits: What does not fit some rank's template, with the rank.
        failed: The ranks that cannot load, with their errors.
    """

    missing: list[str] = []
    unexpected: list[str] = []
    misfits: list[str] = []
    failed: list[tuple[int, str]] = []

    @classmethod
    def of(cls, reports: list[Report]) -> Verdict:
        """The verdict on the reports of all ranks, in the order of ranks."""
        verdict = cls()
        verdict.missing = list(dict.fromkeys(key for report in reports for key in report.missing))
        common = set(reports[0].unexpected).intersection(*(report.unexpected for report in reports))
        verdict.unexpected = [key for key in reports[0].unexpected if key in common]
        by_misfit: dict[str, list[int]] = {}
        for rank, report in enumerate(reports):
            for misfit in report.misfits:
                by_misfit.setdefault(misfit, []).append(rank)
            if report.error is not None:
                verdict.failed.append((rank, report.error))
            elif report.attempt != reports[0].attempt and reports[0].error is None:
                verdict.failed.append(
                    (rank, f"it loads another checkpoint ({report.path}) than rank 0 ({reports[0].path})")
                )
        verdict.misfits = [
            misfit
            if len(ranks) == len(reports)
            else f"{misfit} (on rank{'s' * (len(ranks) > 1)} {_some(ranks)})"
            for misfit, ranks in by_misfit.items()
        ]
        return verdict


class Meeting:
    """Where the ranks of a job meet when they load. For one thread at a time.

    Args:
        store: A ``torch.distributed`` store that all ranks share.
        rank: This rank.
        world_size: How many ranks there are.
        timeout_seconds: How long to wait for the others.
    """

    def __init__(self, store: Any, rank: int, world_size: int, timeout_seconds: float) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        self._timeout = timedelta(seconds=timeout_seconds)

    def hold(self, report: Report) -> Verdict:
        """Returns the verdict on all ranks' reports, the same on each.

        Raises:
            PeerLoadError: A rank did not come in time.
        """
        global _meetings  # noqa: PLW0603 - the ranks count the meetings of their process
        _meetings += 1
        prefix = f"milepost/load/{_meetings}"
        self._store.set(f"{prefix}/{self._rank}", msgspec.json.encode(report))
        if self._rank == 0:
            keys = [f"{prefix}/{rank}" for rank in range(self._world_size)]
            self._await(keys)
            reports = [msgspec.json.decode(self._store.get(key), type=Report) for key in keys]
            verdict = Verdict.of(reports)
            self._store.set(f"{prefix}/verdict", msgspec.json.encode(verdict))
            return verdict
        self._await([f"{prefix}/verdict"])
        return msgspec.json.decode(self._store.get(f"{prefix}/verdict"), type=Verdict)

    def _await(self, keys: list[str]) -> None:
        try:
            self._store.wait(keys, self._timeout)
        except (dist.DistStoreError, RuntimeError) as error:
            missing = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
            if not missing:
                return
            who = f"ranks {_some(missing)}" if self._rank == 0 else "rank 0"
            raise PeerLoadError(
                f"{who} did not come to load within {self._timeout.total_seconds():g} seconds",
                rank=self._rank,
                phase="load",
                hint="with a process group all ranks load together; to load on some only: together=False",
            ) from error

    def agree(self, report: Report, work: Callable[[], None]) -> None:
        """Do something that may fail, and fail on all ranks if it does on one.

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
        refuse(self.hold(report), modified=True)

    def tell(self, report: Report) -> None:
        """Tell the others why this rank cannot load, which they hear at this meeting."""
        try:
            self.hold(report)
        except Exception as error:  # noqa: BLE001 - the reason for not loading is raised, not this
            logger.warning("could not tell the other ranks: %s", error)


def refuse(verdict: Verdict, *, modified: bool) -> None:
    """Raise if a rank cannot load; one that failed by itself has raised that already."""
    others = verdict.failed
    if not others:
        return
    more = f" (so did ranks {_some([other for other, _ in others[1:]])})" if others[1:] else ""
    error = PeerLoadError(
        f"rank {others[0][0]} could not load: {others[0][1]}{more}",
        rank=others[0][0],
        phase="load",
        hint="all ranks load, or none does: see to that rank, or load another checkpoint",
    )
    error.targets_modified = modified
    raise error


def describe(error: BaseException) -> str:
    """An error in one line."""
    text = error.message if isinstance(error, MilepostError) else str(error)
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
    clone = getattr(store, "clone", None)
    return Meeting(store if clone is None else clone(), rank, world_size, timeout_seconds)
