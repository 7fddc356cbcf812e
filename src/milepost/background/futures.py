"""Futures that know whether somebody has looked at their outcome."""

from __future__ import annotations

import copy
from concurrent.futures import Future
from typing import Any, TypeVar

from milepost.errors import MilepostError

__all__ = ["TrackedFuture", "raise_unseen"]

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


_Future = TypeVar("_Future", bound=TrackedFuture[Any])


def raise_unseen(
    futures: list[_Future],
    keep: type[BaseException] | tuple[type[BaseException], ...] = (),
    *,
    refused: str | None = None,
) -> None:
    """Raise the oldest failure that nobody has looked at; each is raised once.

    Args:
        futures: Those that failed, or are about to be done with that; what was raised or seen is removed.
        keep: Which failures are not to be raised now.
        refused: The path of a save that is not made for this reason; the error then says so.
    """
    for future in [*futures]:
        if future.done() and (future.seen or not isinstance(future.failure(), keep)):
            futures.remove(future)
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
