"""Small helpers with no better home."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

__all__ = ["wrap_future"]


def wrap_future(original_result: Any) -> Future[None]:
    """A future that is done, with result None, when `original_result` is.

    Args:
        original_result: Anything. If it is a future, its exception (or cancellation, as a
            ``CancelledError``) is carried over; anything else counts as done already.

    Returns:
        A future whose result is always None.
    """
    wrapped: Future[None] = Future()
    if not isinstance(original_result, Future):
        wrapped.set_result(None)
        return wrapped

    def finish(done: Future[Any]) -> None:
        try:
            done.result()
        except BaseException as error:  # noqa: BLE001 - the future carries whatever it was
            wrapped.set_exception(error)
        else:
            wrapped.set_result(None)

    original_result.add_done_callback(finish)
    return wrapped
