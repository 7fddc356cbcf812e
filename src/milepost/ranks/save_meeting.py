"""Where the ranks of a job meet in each save: at the store of the default process group.

The keys of a save are below ``milepost/<start id>/save/<hash of the path>/<number of saves to it>`` (`start`
explains the start id, and why no thread waits inside the store):

    called/<r>                          rank r has called save
    arrived/<r>                         the part of rank r is durable: its process and host
    failed                              the first failure of a rank, which ends the save on all
    verdict                             the checkpoint is committed: the identity of its manifest

If the store is gone, the folder of the attempt decides. The ranks look at it anyway.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from milepost.commit import (
    News,
    Outcome,
    attempt_id,
    count_save,
    environment_start_id,
    expect,
    is_undecided,
    process_id,
    sees_rank,
)
from milepost.commit.save import SaveOptions
from milepost.errors import AbortedError, CommitError, CommitTimeoutError, MilepostError, text_of
from milepost.ranks.start import Start, StoreGoneError, background, ending, start_at
from milepost.storage import Storage

__all__ = ["Ranks", "SaveMeeting"]

logger = logging.getLogger(__name__)

_PATIENCE_SECONDS = 30.0
"""After so long the log names the ranks that a save waits for."""

_VISIBLE_SECONDS = 60.0
"""How long a shared folder may take to show another host's files."""

_LOOK_SECONDS = 0.5
_REMEMBERED = 100
"""How many saves that are not known to be committed are looked at again."""


class Ranks:
    """Matches the saves of one checkpointer with those of the other ranks.

    Args:
        options: What all its saves have in common.
        start_id: The user's start id. By default it comes from the environment, else the ranks agree on one
            at a store.
        store: The store of a barrier. By default the store that the default process group has when a save
            begins.
        meets: Whether saves meet at the default group's store.
    """

    def __init__(
        self, options: SaveOptions, start_id: str | None, *, store: Any = None, meets: bool = False
    ) -> None:
        self._options, self._rank, self._world_size = options, options.rank, options.world_size
        self._start_id, self._seconds = start_id, options.timeout_seconds
        self._store, self.meets = store, meets
        self._start: Start | None = None
        self._open: deque[tuple[str, str]] = deque(maxlen=_REMEMBERED)
        self.start()

    def start(self) -> Start | None:
        """The start of these ranks at the present store; without one, at the last store that there was."""
        if self._world_size > 1:
            self._start = start_at(self._store, self._rank, self._world_size) or self._start
        return self._start

    def next(self, target: str) -> tuple[SaveOptions, SaveMeeting | None]:
        """Count a save to a path. A save that fails counts too, so that all ranks count alike.

        Returns:
            The options of the save, and where the ranks meet, if they do.

        Raises:
            CommitError: The store was gone before the ranks had agreed on a start id.
            CommitTimeoutError: The ranks have not agreed on a start id within the time.
        """
        if self._world_size == 1:
            attempt = attempt_id(target, self._rank, 1)
            return replace(self._options, target=target, attempt=attempt), None
        start, given = self.start(), self._start_id or environment_start_id()
        scope = given or (start.token if start is not None else "")
        number = count_save(scope, target, self._rank)
        if not given and start is not None:
            self._agree(start, target)
        common = given or (start.id if start else None)
        attempt = attempt_id(target, self._rank, self._world_size, common, number)
        meeting = None
        if start is not None and self.meets:
            meeting = SaveMeeting(start, self._options.storage, target, attempt, number)
        private = not given and start is None
        options = replace(self._options, target=target, attempt=attempt, private=private, meeting=meeting)
        return options, meeting

    def wrote(self, target: str, attempt: str) -> None:
        """Remember an attempt: this rank's part is written, and it is not known to be committed."""
        self._open.append((target, attempt))

    def failures(self) -> list[CommitError]:
        """The remembered attempts that have failed since; each is returned once."""
        found: list[CommitError] = []
        for _ in range(len(self._open)):
            target, attempt = self._open.popleft()
            try:
                if is_undecided(self._options.storage, target, attempt):
                    self._open.append((target, attempt))
            except CommitError as error:
                found.append(error.located(path=target))
        return found

    def _agree(self, start: Start, target: str) -> None:
        """Wait until the ranks have agreed on a start id."""
        patience = min(_PATIENCE_SECONDS, self._seconds)
        known = start.wait(patience)
        if not known and not start.lost:
            logger.warning(
                "the save to %s waits: %s. Make a checkpointer on every rank, or pass RankInfo(0, 1) for "
                "one rank alone",
                *(target, _missing(start)),
            )
            known = start.wait(self._seconds - patience)
        if start.lost:
            raise CommitError(
                f"the process group has gone before all its ranks had made a checkpointer: {start.trouble}",
                path=target,
                rank=self._rank,
                phase="begin",
                hint="save, or close the checkpointer, before destroy_process_group; if the process that "
                "serves the group's store has died, start the job again",
            )
        if not known:
            raise CommitTimeoutError(
                f"the ranks have no start id after {self._seconds:g} s: {_missing(start)}",
                path=target,
                rank=self._rank,
                phase="begin",
                hint="the process that serves the store may have died: look at the logs of rank 0 and of "
                "the job's launcher, and start the job again"
                if start.trouble
                else "make a checkpointer on every rank, or pass RankInfo(0, 1) for one rank alone",
            )


def _missing(start: Start) -> str:
    if start.trouble:
        return f"the store at which they agree cannot be used: {start.trouble}"
    who = f"ranks {start.absent}" if start.absent else "some ranks"
    return f"{who} have not made a checkpointer"


class SaveMeeting:
    """One rank's part in the meeting of one save.

    A thread of its own looks at the store. No other thread waits for the store. If the store is gone, there
    is no news.

    Args:
        start: Of the ranks that meet.
        storage: Where the checkpoint is stored.
        path: The checkpoint's absolute path, the same on all ranks.
        attempt: The attempt's id.
        number: How many saves to the path there were since the start, this one included.
    """

    def __init__(self, start: Start, storage: Storage, path: str, attempt: str, number: int) -> None:
        self._start, self._storage, self._path, self._attempt = start, storage, path, attempt
        self._name = hashlib.sha256(path.encode("utf-8", "surrogatepass")).hexdigest()[:16], number
        self._served = start.store()  # a clone does not keep the server alive, which rank 0 may be
        self._began = time.monotonic()
        self._told: set[str] = set()
        self._looked = self._asked = 0.0
        self._warned = False
        self._news = News()
        self._listener: Callable[[News], None] = _nobody
        self._arrived, self._over, self._wake = False, False, threading.Event()
        self._last: tuple[str, str] | None = None
        self._thread = background(self._run, "milepost-meeting")

    def listen(self, listener: Callable[[News], None]) -> None:
        """Call `listener` with all news: at once with what is known, then from another thread."""
        self._listener = listener
        if self._news:
            listener(self._news)

    def arrive(self) -> None:
        """Report that this rank's part is durable."""
        self._arrived = True
        self._wake.set()

    def poll(self) -> News:
        """What is known of the other ranks by now; never waits."""
        return self._news

    def end(self, outcome: Outcome) -> None:
        """Report that the checkpoint is committed, unless another rank has."""
        if outcome.hidden:
            expect(self._path, outcome.identity)
            logger.warning("%s is committed, but this host does not show it yet", self._path)
        if outcome.identity and not self._news.identity:
            self._last = ("verdict", outcome.identity)
        self._finish()

    def close(self, outcome: Outcome | None, error: BaseException | None) -> None:
        """End the meeting. An error is reported to the other ranks."""
        if outcome is not None and outcome.committed:
            self.end(outcome)
        elif error is not None:
            word = {"rank": self._start.rank, "name": type(error).__qualname__, "message": text_of(error)}
            if isinstance(error, MilepostError):
                word |= {"message": error.brief, "hint": error.hint, "phase": error.phase}
            if not isinstance(error, AbortedError):  # which another rank has reported
                self._last = ("failed", json.dumps(word))
            self._finish()

    def _finish(self) -> None:
        self._over = True
        self._wake.set()

    def join(self, timeout_seconds: float) -> None:
        """Wait until the end is reported: a process that ends would end the thread before."""
        self._thread.join(timeout_seconds)

    def _run(self) -> None:
        try:
            self._meet()
        except StoreGoneError as error:
            logger.info("the store where ranks meet is gone, the folder decides: %s", error)
        self._served, self._listener = None, _nobody

    def _meet(self) -> None:
        pause = 0.001
        while not (self._over or ending.is_set()):
            if self._start.wait(0) and not self._news.failure and not self._news.identity:
                try:
                    news = self._look()
                except MilepostError as error:
                    news = News(failure=error)
                if news != self._news:
                    self._news = news
                    self._listener(news)
            pause = 0.001 if self._wake.wait(pause) else min(pause * 1.5, 0.1)
            self._wake.clear()
        if self._start.wait(0):
            if self._last:
                self._start.line.first(self._key(self._last[0]), self._last[1])
            ends = ["verdict", "failed"] if self._start.rank == 0 else []
            told = [self._key(what, self._start.rank) for what in self._told]
            self._start.retire(told + [self._key(end) for end in ends])

    def _key(self, *parts: object) -> str:
        return self._start.key("save", *self._name, *parts)

    def _tell(self, what: str, value: str = "") -> None:
        if what not in self._told:
            self._start.line.set(self._key(what, self._start.rank), value)
            self._told.add(what)

    def _look(self) -> News:
        line, rank = self._start.line, self._start.rank
        verdict = line.get(self._key("verdict"))
        if verdict is not None:
            return News(identity=verdict.decode())
        failed = line.get(self._key("failed"))
        if failed is not None:
            return News(failure=_aborted(json.loads(failed)))
        self._tell("called")
        if self._arrived and "arrived" not in self._told and (rank == 0 or self._is_shared()):
            self._tell("arrived", json.dumps([process_id(), socket.gethostname()]))
        self._warn()
        if rank:
            return News()
        return News(
            arrived=line.has(*(self._key("arrived", other) for other in range(self._start.world_size)))
        )

    def _is_shared(self) -> bool:
        """Whether this rank sees the folder in which rank 0 works.

        Raises:
            CommitError: It has not seen it within the time.
        """
        above, now = os.path.dirname(self._path), time.monotonic()
        if above in self._start.shared:
            return True
        word = self._start.line.get(self._key("arrived", 0))
        if word is None or now - self._looked < _LOOK_SECONDS:
            return False
        self._looked, self._asked = now, self._asked or now
        process, host = json.loads(word)
        if sees_rank(self._storage, self._path, self._attempt, 0, process):
            self._start.shared.add(above)
            return True
        if now - self._asked > _VISIBLE_SECONDS:
            raise CommitError(
                f"the folder is not shared between the ranks: rank {self._start.rank} on "
                f"{socket.gethostname()} has not seen within {_VISIBLE_SECONDS:g} s what rank 0 on {host} "
                f"has written: {above}",
                path=self._path,
                rank=self._start.rank,
                phase="meet",
                hint="save to a folder that all hosts mount, or pass RankInfo(0, 1) to let each rank save "
                "alone, to a different path",
            )
        return False

    def _warn(self) -> None:
        """Log once which ranks have not called save."""
        if self._warned or time.monotonic() - self._began < _PATIENCE_SECONDS:
            return
        self._warned = True
        ranks = range(self._start.world_size)
        absent = [rank for rank in ranks if not self._start.line.has(self._key("called", rank))]
        if absent:
            logger.warning(
                "the save to %s waits for ranks %s, which have not called save for it: call it on every "
                "rank, or pass RankInfo(0, 1) for one rank alone",
                *(self._path, absent),
            )


def _nobody(news: News) -> None:
    """Ignore the news."""


def _aborted(word: dict[str, Any]) -> AbortedError:
    phase = word.get("phase") or "its save"
    return AbortedError(
        f"rank {word['rank']} failed in {phase} with {word['name']}: {word['message']}",
        rank=word["rank"],
        phase=word.get("phase"),
        hint=word.get("hint") or "look at that rank's log; the next save starts a new attempt",
    )
