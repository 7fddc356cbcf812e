"""Waiting for other ranks: the pauses, the deadline, the watch on rank 0, and what the errors say."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import msgspec

from milepost.commit.claim import Clock
from milepost.commit.folders import MAX_SMALL_BYTES, failures, list_names, numbers, opened, read_beacons
from milepost.errors import (
    AbortedError,
    CommitError,
    CommitTimeoutError,
    CorruptCheckpointError,
    EntryNotFoundError,
)
from milepost.format.names import MANIFEST_NAME, beacon_name, is_aborted, join_hidden, ranks_in
from milepost.storage import Folder, Storage

__all__ = [
    "Meeting",
    "News",
    "Outcome",
    "Wait",
    "is_undecided",
    "raise_if_aborted",
    "sees_rank",
    "timeout_error",
    "unseen_error",
]

HEARTBEAT_SECONDS = 5.0
STALL_SECONDS = 30.0
_FIRST_PAUSE_SECONDS = 0.005
_NEWS_SECONDS = 0.02


class News(msgspec.Struct):
    """What a meeting knows of the other ranks beside what the folder shows.

    Attributes:
        arrived: Every rank has arrived.
        identity: The checkpoint is committed: what `is_at_least` knows its manifest by.
        failure: Why a rank failed.
    """

    arrived: bool = False
    identity: str = ""
    failure: BaseException | None = None

    def __bool__(self) -> bool:
        """Whether there is anything to know."""
        return self.arrived or bool(self.identity) or self.failure is not None


class Outcome(msgspec.Struct):
    """What is known at the end of a save that did not fail.

    Attributes:
        committed: The checkpoint is committed; else this rank's part is durable, and others are to come.
        identity: As in `News`, where there was a meeting; "" if it is not known.
        hidden: The others say that it is committed, but this host does not show it yet.
    """

    committed: bool = True
    identity: str = ""
    hidden: bool = False


class Meeting(Protocol):
    """Where the ranks of a save tell each other how far they are, beside the folder that they share."""

    def arrive(self) -> None:
        """This rank's part is durable."""

    def poll(self) -> News:
        """What is known of the others by now; never waits."""

    def end(self, outcome: Outcome) -> None:
        """The checkpoint is committed."""


class Wait:
    """One wait of one rank.

    Args:
        clock: Where time comes from.
        folder: The attempt's folder.
        rank: The rank that waits.
        timeout_seconds: How long it does.
        poll_seconds: The longest pause between two looks; the first ones are shorter.
        heartbeat: Called every few seconds: shows the others that this rank lives.
        news: What the meeting knows; asked more often than the folder is looked at.

    Attributes:
        news: What it knew when it was last asked.
    """

    def __init__(
        self,
        clock: Clock,
        folder: Folder,
        *,
        rank: int,
        timeout_seconds: float,
        poll_seconds: float,
        heartbeat: Callable[[], None],
        news: Callable[[], News] | None = None,
    ) -> None:
        now = clock.monotonic()
        self._ask, self.news = news, news() if news else News()
        self._clock, self._folder, self._rank, self._heartbeat = clock, folder, rank, heartbeat
        self._deadline = now + timeout_seconds
        self._longest = poll_seconds
        self._pause = min(_FIRST_PAUSE_SECONDS, poll_seconds)
        self._beat_at = self._listen_at = self._heard_at = now
        self._heard: bytes | None = None

    def leads(self) -> bool:
        """Whether this rank has to look for itself: it is rank 0, or rank 0's beacon stands still."""
        now = self._clock.monotonic()
        if self._rank and now >= self._listen_at:
            self._listen_at = now + HEARTBEAT_SECONDS
            word = b""
            with suppress(EntryNotFoundError, CorruptCheckpointError):
                word = self._folder.read(beacon_name(0), MAX_SMALL_BYTES)
            if word != self._heard:
                self._heard, self._heard_at = word, now
        return self._rank == 0 or now - self._heard_at > STALL_SECONDS

    def pause(self) -> bool:
        """Sleep a little, or until there is news; False when the time is over."""
        now = self._clock.monotonic()
        if now >= self._deadline:
            return False
        if now >= self._beat_at:
            self._beat_at = now + HEARTBEAT_SECONDS
            self._heartbeat()
        end, known = min(now + self._pause, self._deadline), self.news
        while now < end and self.news == known:
            self._clock.sleep(min(end - now, _NEWS_SECONDS) if self._ask else end - now)
            now = self._clock.monotonic()
            self.news = self._ask() if self._ask else known
        self._pause = min(self._pause * 1.5, self._longest)
        return True


def raise_if_aborted(folder: Folder, names: list[str]) -> None:
    """Raise the error of the first rank that failed, unless the checkpoint was committed before."""
    if not is_aborted(names) or MANIFEST_NAME in names:
        return
    marks = failures(folder, names)
    if not marks:
        raise AbortedError("another rank failed", hint="look at the logs of the ranks")
    first = next(iter(marks.values()))
    also = set(marks) - {first.rank}
    raise AbortedError(
        f"rank {first.rank} failed in {first.phase or 'its save'} with {first.type}: {first.message}"
        + (f" (so did ranks {numbers(also)})" if also else ""),
        rank=first.rank,
        phase=first.phase,
        hint="look at that rank's log; the next save starts a new attempt",
    )


def timeout_error(folder: Folder, names: list[str], world_size: int, seconds: float) -> CommitTimeoutError:
    """The error that names the missing ranks and what they did last."""
    hint = "look at these ranks' logs; write_barrier_timeout_secs allows more time"
    missing = sorted(set(range(world_size)) - ranks_in(names))
    if not missing:
        return CommitTimeoutError(f"all ranks arrived, but none committed within {seconds:g} s", hint=hint)
    beacons = read_beacons(folder, names)
    if any(rank not in beacons for rank in missing):
        hint = f"call save on every rank, or pass RankInfo(0, 1) for one rank alone; {hint}"
    said = []
    for rank in missing[:10]:
        word = beacons.get(rank)
        said.append(f"rank {rank}: {f'{word.phase}, {word.bytes_done} bytes' if word else 'never began'}")
    return CommitTimeoutError(
        f"ranks {numbers(missing)} did not arrive within {seconds:g} s ({'; '.join(said)})", hint=hint
    )


def unseen_error(path: str) -> CommitError:
    """The error of a rank that does not see what it has written itself."""
    return CommitError(
        f"the folder of this attempt does not show what this rank has written there: {path}",
        hint="was it removed, or does the file system show an old state of it? If it is there, "
        "`milepost doctor` tells what is in it",
    )


def sees_rank(storage: Storage, path: str, attempt: str, rank: int, process: str) -> bool:
    """Whether an attempt's folder, opened anew, shows what a process has written there as that rank."""
    with opened(storage, join_hidden(path, attempt)) as folder:
        beacon = read_beacons(folder, [beacon_name(rank)]).get(rank) if folder else None
    return beacon is not None and beacon.process == process


def is_undecided(storage: Storage, path: str, attempt: str) -> bool:
    """Whether an attempt that has written its part may still be committed, or fail.

    Raises:
        AbortedError: Another rank has failed.
    """
    with opened(storage, join_hidden(path, attempt)) as folder:
        names = list_names(folder) if folder else []
        if folder:
            raise_if_aborted(folder, names)
        return bool(names) and MANIFEST_NAME not in names
