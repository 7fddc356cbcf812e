"""What a rank says in its attempt's folder for the others: what it does, and that it failed."""

from __future__ import annotations

# Paths are str, here as in the storage package.
import os
from contextlib import suppress

import msgspec

from milepost.commit.claim import Clock
from milepost.commit.folders import AbortMark, Beacon
from milepost.errors import EntryExistsError, StorageError
from milepost.format.names import ABORTED_NAME, abort_name, beacon_name, shown
from milepost.storage import Storage
from milepost.storage.writing import publish_bytes

__all__ = ["Word"]

_BEACON_SECONDS = 0.25


class Word:
    """The word of one rank.

    Args:
        storage: Where.
        folder: The attempt's folder.
        attempt: The attempt's id.
        rank: The rank.
        process: Random id of the process that the save belongs to.
        clock: Where time comes from.
    """

    def __init__(
        self, storage: Storage, folder: str, attempt: str, rank: int, process: str, clock: Clock
    ) -> None:
        self._storage, self._folder, self._clock = storage, folder, clock
        self._attempt, self._rank, self._process = attempt, rank, process
        self._phase = "begin"
        self._last_seconds = float("-inf")

    def put(self, name: str, data: bytes, *, replace: bool = False) -> None:
        """A small file that may be lost. EntryExistsError if it is there, unless `replace`."""
        path = os.path.join(self._folder, name)
        publish_bytes(self._storage, path, data, "replace" if replace else "create", sync=False)

    def begin(self) -> None:
        """The first beacon; EntryExistsError if there is one of this rank."""
        self.put(beacon_name(self._rank), self._beacon(0))

    def progress(self, phase: str, bytes_done: int) -> None:
        """Renew the beacon at a change of phase, else a few times a second at most. Never raises."""
        now = self._clock.monotonic()
        if phase == self._phase and now - self._last_seconds < _BEACON_SECONDS:
            return
        self._phase, self._last_seconds = phase, now
        with suppress(StorageError):
            self.put(beacon_name(self._rank), self._beacon(bytes_done), replace=True)

    def _beacon(self, bytes_done: int) -> bytes:
        beacon = Beacon(rank=self._rank, attempt=self._attempt, phase=self._phase, process=self._process)
        beacon.bytes_done, beacon.time = bytes_done, self._clock.time()
        return msgspec.json.encode(beacon)

    def failed(self, error: BaseException) -> None:
        """Leave the abort mark of this rank; the first rank's is that of the attempt as well."""
        mark = AbortMark(
            rank=self._rank,
            type=type(error).__name__,
            message=shown(str(getattr(error, "brief", error))[:10_000]),
            phase=getattr(error, "phase", None) or self._phase,
            time=self._clock.time(),
        )
        for name in (abort_name(self._rank), ABORTED_NAME):
            with suppress(EntryExistsError):
                self.put(name, msgspec.json.encode(mark))
