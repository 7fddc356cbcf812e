"""Futures that know whether somebody has looked at their outcome."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any, TypeVar

__all__ = ["TrackedFuture", "raise_unseen"]

T = TypeVar("T")


class TrackedFuture(Future[T]):
    """A future that knows whether somebody has looked at its outcome."""

    seen = False

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


_Future = TypeVar("_Future", bound=TrackedFuture[Any])


def raise_unseen(
    futures: list[_Future], keep: type[BaseException] | tuple[type[BaseException], ...] = ()
) -> None:
    """Raise the oldest failure that nobody has looked at; each is raised once.

    Args:
        futures: Those that failed, or are about to be done with that; what was raised or seen is removed.
        keep: Which failures are not to be raised now.
    """
    for future in [*futures]:
        if future.done() and (future.seen or not isinstance(future.failure(), keep)):
            futures.remove(future)
            if not future.seen:
                future.result()
