"""Where the ranks of a job meet in each save: at the store of the default process group.

Keys of a save, below ``milepost/<id of the start>/save/<hash of the path>/<how often it was saved to>`` (the
start is that of `start`, which also says why nobody waits inside the store):

    called/<r>                          rank r has called save
    arrived/<r>                         its part is durable; the process and host that it is
    failed                              the first failure of a rank, which ends the save for all
    verdict                             the identity of the manifest: the checkpoint is committed

A store that is gone is no verdict: what lies in the folder then decides, which the ranks look at anyway.
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
from milepost.ranks.start import Start, StoreGoneError, background, ending, group_store, start_at
from milepost.storage import Storage

__all__ = ["Ranks", "SaveMeeting"]

logger = logging.getLogger(__name__)

_PATIENCE_SECONDS = 30.0
"""After so long the log says whom a save waits for."""

_VISIBLE_SECONDS = 60.0
"""How long a shared folder may take to show another host's files."""

_LOOK_SECONDS = 0.5
_REMEMBERED = 100
"""So many saves that were not known to be committed are looked at again."""


class Ranks:
    """The attempts of one checkpointer: it counts them, and names each one as the other ranks name theirs.

    Args:
        options: What all its saves have in common.
        start_id: The user's; by default that of the environment, else the ranks agree on one at a store.
        store: The store of a barrier; by default that of the default process group, whichever that is when
            a save begins.
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
        """The start of these ranks, at the store that there is now, or the last one that there was."""
        if self._world_size > 1:
            store = group_store(self._rank, self._world_size) if self._store is None else self._store
            if store is not None:
                self._start = start_at(store, self._rank, self._world_size) or self._start
        return self._start

    def next(self, target: str) -> tuple[SaveOptions, SaveMeeting | None]:
        """Count a save to a path. A save that fails counts too, so that all ranks count alike.

        Returns:
            The options of the save, and where the ranks meet, if they do.

        Raises:
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
        """This rank's part of an attempt is written, and nobody knows yet what becomes of it."""
        self._open.append((target, attempt))

    def failures(self) -> list[CommitError]:
        """What is known by now to have failed of what was only known to be written; each is told once."""
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
        known = start.wait(min(_PATIENCE_SECONDS, self._seconds))
        if start.lost:
            raise CommitError(
                "the process group has gone before all its ranks had made a checkpointer",
                path=target,
                rank=self._rank,
                phase="begin",
                hint="save, or close the checkpointer, before destroy_process_group",
            )
        if known:
            return
        who = f"ranks {start.absent}" if start.absent else "some ranks"
        logger.warning(
            "the save to %s waits: %s have not made a checkpointer yet. Make one on every rank, or pass "
            "RankInfo(0, 1) for one rank alone",
            *(target, who),
        )
        if not start.wait(max(self._seconds - _PATIENCE_SECONDS, 0)):
            raise CommitTimeoutError(
                f"{who} have not made a checkpointer within {self._seconds:g} s: the ranks have no start id",
                path=target,
                rank=self._rank,
                phase="begin",
                hint="make a checkpointer on every rank, or pass RankInfo(0, 1) for one rank alone",
            )


class SaveMeeting:
    """One rank's part in the meeting of one save, in a thread of its own that looks at the store.

    Nothing that is called from elsewhere waits for the store, and one that is gone is only silent.

    Args:
        start: Of the ranks that meet.
        storage: Where the checkpoint lies.
        path: The checkpoint's absolute path, the same on all ranks.
        attempt: The attempt's id.
        number: How often it was saved to since the start.
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
        """Have each news told, from another thread; what is known already is told now."""
        self._listener = listener
        if self._news:
            listener(self._news)

    def arrive(self) -> None:
        """This rank's part is durable."""
        self._arrived = True
        self._wake.set()

    def poll(self) -> News:
        """What is known of the other ranks by now."""
        return self._news

    def end(self, outcome: Outcome) -> None:
        """The checkpoint is committed: the others are told, unless that is known from them."""
        if outcome.hidden:
            expect(self._path, outcome.identity)
            logger.warning("%s is committed, but this host does not show it yet", self._path)
        if outcome.identity and not self._news.identity:
            self._last = ("verdict", outcome.identity)
        self._finish()

    def close(self, outcome: Outcome | None, error: BaseException | None) -> None:
        """The save has ended: committed, as an outcome says, or in an error, which the others hear of."""
        if outcome is not None and outcome.committed:
            self.end(outcome)
        elif error is not None:
            word = {"rank": self._start.rank, "name": type(error).__qualname__, "message": text_of(error)}
            if isinstance(error, MilepostError):
                word |= {"message": error.brief, "hint": error.hint, "phase": error.phase}
            if not isinstance(error, AbortedError):  # of which all know
                self._last = ("failed", json.dumps(word))
            self._finish()

    def _finish(self) -> None:
        self._over = True
        self._wake.set()

    def join(self, timeout_seconds: float) -> None:
        """Wait until the last word is told, so that a process that ends does not take it along."""
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
        """Whether the folder that rank 0 works in is the one that this rank works in.

        Raises:
            CommitError: It has not been seen to be within the time.
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
                f"the folder is not shared between the ranks: what rank 0 has written on {host}, rank "
                f"{self._start.rank} on {socket.gethostname()} does not see within {_VISIBLE_SECONDS:g} s: "
                f"{above}",
                path=self._path,
                rank=self._start.rank,
                phase="meet",
                hint="save to a folder that all hosts mount, or let each rank save alone, to a path of its "
                "own, with RankInfo(0, 1)",
            )
        return False

    def _warn(self) -> None:
        """Say once whom this save waits for."""
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
    """The listener where nobody listens."""


def _aborted(word: dict[str, Any]) -> AbortedError:
    phase = word.get("phase") or "its save"
    return AbortedError(
        f"rank {word['rank']} failed in {phase} with {word['name']}: {word['message']}",
        rank=word["rank"],
        phase=word.get("phase"),
        hint=word.get("hint") or "look at that rank's log; the next save starts a new attempt",
    )
