"""Waiting for other ranks: the pauses, the deadline, the watch on rank 0, and what the errors say."""

from __future__ import annotations

import time as _time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

import msgspec

from milepost.commit.contents import MAX_SMALL_BYTES, failures, numbers, read_beacons
from milepost.errors import (
    AbortedError,
    CommitError,
    CommitTimeoutError,
    CorruptCheckpointError,
    EntryNotFoundError,
)
from milepost.format.manifest import Manifest, identity_of
from milepost.format.names import (
    ABORTED_NAME,
    ARRIVED_NAME,
    MANIFEST_NAME,
    beacon_name,
    index_name,
    is_aborted,
    ranks_in,
)
from milepost.storage import Folder

if TYPE_CHECKING:
    from milepost.commit.attempt import Attempt

__all__ = [
    "VISIBLE_SECONDS",
    "Clock",
    "Meeting",
    "News",
    "Outcome",
    "Wait",
    "is_at_least",
    "raise_if_aborted",
    "timeout_error",
    "unseen_error",
    "wait_for_commit",
    "wait_for_marks",
]

VISIBLE_SECONDS = 60.0
"""How long a file system may take to show this host what another one has committed."""
HEARTBEAT_SECONDS = 5.0
STALL_SECONDS = 30.0
_FIRST_PAUSE_SECONDS = 0.005
_NEWS_SECONDS = 0.02
_PUBLISH_SECONDS = 5.0


class Clock(msgspec.Struct, frozen=True):
    """The source of an attempt's time; tests give another."""

    time: Callable[[], float] = _time.time
    monotonic: Callable[[], float] = _time.monotonic
    sleep: Callable[[float], None] = _time.sleep


class News(msgspec.Struct):
    """What a meeting knows about the other ranks, in addition to what the folder shows.

    Attributes:
        arrived: Every rank has arrived.
        identity: If the checkpoint is committed, its identity for `is_at_least`.
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
    """A way for the ranks of a save to report to each other, in addition to the folder that they share."""

    def arrive(self) -> None:
        """This rank's part is durable."""

    def poll(self) -> News:
        """What is known of the others by now; never waits."""

    def end(self, outcome: Outcome) -> None:
        """The checkpoint is committed."""


class Wait:
    """One wait of one rank.

    Args:
        attempt: What it waits for.
        phase: What it says meanwhile, every few seconds, so that the others see that this rank lives.
        timeout_seconds: How long it waits.
        poll_seconds: The longest pause between two looks; the first ones are shorter.
        news: What the meeting knows; asked more often than the folder is looked at.

    Attributes:
        news: What it knew when it was last asked.
    """

    def __init__(
        self,
        attempt: Attempt,
        phase: str,
        timeout_seconds: float,
        poll_seconds: float,
        news: Callable[[], News] | None = None,
    ) -> None:
        now = attempt.clock.monotonic()
        self._ask, self.news = news, news() if news else News()
        self._attempt, self._clock, self._phase = attempt, attempt.clock, phase
        self._seconds, self._deadline = timeout_seconds, now + timeout_seconds
        self._longest = poll_seconds
        self._pause = min(_FIRST_PAUSE_SECONDS, poll_seconds)
        self._beat_at = self._listen_at = self._heard_at = now
        self._heard: bytes | None = None

    def another(self, timeout_seconds: float) -> Wait:
        """A wait like this one for what comes next, without a meeting."""
        return Wait(self._attempt, self._phase, timeout_seconds, self._longest)

    def leads(self) -> bool:
        """Whether this rank must list the marks: it is rank 0, or rank 0's beacon stands still."""
        now = self._clock.monotonic()
        if self._attempt.rank and now >= self._listen_at:
            self._listen_at = now + HEARTBEAT_SECONDS
            word = b""
            with suppress(EntryNotFoundError, CorruptCheckpointError):
                word = self._attempt.inside().read(beacon_name(0), MAX_SMALL_BYTES)
            if word != self._heard:
                self._heard, self._heard_at = word, now
        return self._attempt.rank == 0 or now - self._heard_at > STALL_SECONDS

    def pause(self) -> bool:
        """Sleep a little, or until there is news; False when the time is over."""
        now = self._clock.monotonic()
        if now >= self._deadline:
            return False
        if now >= self._beat_at:
            self._beat_at = now + HEARTBEAT_SECONDS
            self._attempt.progress(self._phase)
        end, known = min(now + self._pause, self._deadline), self.news
        while now < end and self.news == known:
            self._clock.sleep(min(end - now, _NEWS_SECONDS) if self._ask else end - now)
            now = self._clock.monotonic()
            self.news = self._ask() if self._ask else known
        self._pause = min(self._pause * 1.5, self._longest)
        return True

    def pause_or_raise(self) -> None:
        """As `pause`, but when the time is over raise the error that names the ranks that are missing."""
        if not self.pause():
            attempt = self._attempt
            attempt.check_view(names := attempt.names())
            raise timeout_error(attempt.inside(), names, attempt.world_size, self._seconds)


def wait_for_marks(attempt: Attempt, wait: Wait) -> None:
    """Returns when every rank has arrived. `Attempt.wait_for_marks` describes it."""
    while not (attempt.heard(wait.news) or attempt.has(ARRIVED_NAME) or attempt.has(MANIFEST_NAME)):
        # Without its own mark it may have been committed, replaced and cleared meanwhile.
        if wait.leads() or attempt.has(ABORTED_NAME) or not attempt.has(index_name(attempt.rank)):
            names = attempt.names()
            if attempt.sees_commit(names):
                return
            raise_if_aborted(attempt.inside(), names)
            if ranks_in(names) >= set(range(attempt.world_size)):
                attempt.say_arrived()
                return
        wait.pause_or_raise()


def wait_for_commit(attempt: Attempt, wait: Wait) -> None:
    """Returns when the checkpoint is committed. `Attempt.wait_for_commit` describes it."""
    while not (attempt.committed or _is_committed(attempt, wait)):
        wait.pause_or_raise()
    publishing = wait.another(_PUBLISH_SECONDS)
    while attempt.is_pending() and publishing.pause():
        pass
    showing = wait.another(VISIBLE_SECONDS)
    while not (shown := attempt.is_shown()) and showing.pause():
        pass
    attempt.hidden = not shown


def _is_committed(attempt: Attempt, wait: Wait) -> bool:
    attempt.heard(wait.news)
    if attempt.committed:
        return True
    if wait.leads():
        attempt.complete()
    elif attempt.has(MANIFEST_NAME) or not attempt.has(index_name(attempt.rank)):
        attempt.sees_commit()
    elif attempt.has(ABORTED_NAME):
        raise_if_aborted(attempt.inside(), attempt.names())
    return attempt.committed


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
    """The error of a rank whose folder does not show the rank's own mark."""
    return CommitError(
        f"the folder of this attempt does not show what this rank has written there: {path}",
        hint="was it removed, or does the file system show an old state of it? If it is there, "
        "`milepost doctor` tells what is in it",
    )


def is_at_least(manifest: Manifest | None, identity: str) -> bool:
    """Whether a manifest has this identity, or belongs to a later save to the same path.

    Args:
        manifest: What is seen.
        identity: The sequence and the SHA-256 of a manifest, as another rank gave them.
    """
    sequence, _, sha = identity.partition(":")
    if manifest is None:
        return False
    return manifest.sequence > int(sequence) or identity_of(manifest) == sha
