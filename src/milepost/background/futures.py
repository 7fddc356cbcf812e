"""Futures that know whether somebody has looked at their outcome."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import Future
from typing import Any, TypeVar

from milepost.errors import AbortedError, MilepostError

__all__ = ["Failures", "TrackedFuture"]

T = TypeVar("T")


class TrackedFuture(Future[T]):
    """A future that knows whether somebody has looked at its outcome, and what it is the outcome of."""

    seen = False
    what = "an earlier save"

    def result(self, timeout: float | None = None) -> T:
        """As ``Future.result``; the outcome counts as seen."""
        try:
            return super().result(timeout)
        finally:
            self.seen = self.seen or self.done()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """As ``Future.exception``; the outcome counts as seen."""
        try:
            return super().exception(timeout)
        finally:
            self.seen = self.seen or self.done()

    def failure(self) -> BaseException | None:
        """What it has failed with, if it is done and has; does not count as a look."""
        return super().exception() if self.done() and not self.cancelled() else None


class Failures:
    """The futures that failed, and whose outcome nobody has looked at. Thread-safe."""

    def __init__(self) -> None:
        self._futures: list[TrackedFuture[Any]] = []
        self._lock = threading.RLock()

    def add(self, future: TrackedFuture[Any]) -> None:
        """Add a future that failed, or is about to be done with a failure."""
        with self._lock:
            self._futures.append(future)

    def unseen(self) -> list[TrackedFuture[Any]]:
        """Those that nobody has looked at, the oldest first."""
        with self._lock:
            return [future for future in self._futures if not future.seen]

    def raise_oldest(self, refused: str | None = None) -> None:
        """Raise the oldest failure that nobody has looked at; each is raised once.

        Args:
            refused: The path of a save that is not made for this reason; the error then says so. What
                failed because another rank did is kept then.
        """
        keep: tuple[type[BaseException], ...] = () if refused is None else (AbortedError,)
        with self._lock:
            for future in [*self._futures]:
                if future.done() and (future.seen or not isinstance(future.failure(), keep)):
                    self._futures.remove(future)
                    if not future.seen:
                        error = future.exception()
                        if error is not None:
                            raise error if refused is None else _with_refused(error, future.what, refused)


def _with_refused(error: BaseException, failed: str, refused: str) -> BaseException:
    """The failure of one save as the reason why another one was not made."""
    text = f"{failed} has failed, and this save to {refused} was not made"
    hint = "call save again; with several ranks, go on with the next save on each of them"
    if not isinstance(error, MilepostError):
        error.add_note(f"{text}\nhint: {hint}")
        return error
    later = copy.copy(error)
    later.message, later.__cause__ = f"{text}: {error.message}", error
    later.hint = f"{error.hint}; {hint}" if error.hint else hint
    return later
