"""What a rank leaves in its attempt for the others: beacons that say what it does, and that it failed."""

from __future__ import annotations

from contextlib import suppress

import msgspec

from milepost.commit.contents import AbortMark, Beacon, read_beacons
from milepost.commit.place import Place
from milepost.commit.waiting import Clock
from milepost.errors import EntryExistsError, StorageError
from milepost.format.names import ABORTED_NAME, abort_name, beacon_name, shown

__all__ = ["Presence"]

_BEACON_SECONDS = 0.25


class Presence:
    """What the others see of one rank.

    Args:
        place: Where the attempt is.
        attempt: The attempt's id.
        rank: The rank.
        process: Random id of the process that the save belongs to.
        clock: Where time comes from.
    """

    def __init__(self, place: Place, attempt: str, rank: int, process: str, clock: Clock) -> None:
        self._place, self._clock = place, clock
        self._attempt, self._rank, self._process = attempt, rank, process
        self._phase = "begin"
        self._last_seconds = float("-inf")

    def begin(self) -> bool:
        """Leave the first beacon; False if another process has left one as this rank."""
        try:
            self._place.put(beacon_name(self._rank), self._beacon(0))
        except EntryExistsError:
            known = read_beacons(self._place.inside(), [beacon_name(self._rank)]).get(self._rank)
            return known is None or known.process == self._process
        return True

    def progress(self, phase: str, bytes_done: int) -> None:
        """Renew the beacon at a change of phase, else a few times a second at most. Never raises."""
        now = self._clock.monotonic()
        if phase == self._phase and now - self._last_seconds < _BEACON_SECONDS:
            return
        self._phase, self._last_seconds = phase, now
        with suppress(StorageError):
            self._place.put(beacon_name(self._rank), self._beacon(bytes_done), replace=True)

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
                self._place.put(name, msgspec.json.encode(mark))
