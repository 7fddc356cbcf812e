"""Small helpers with no better home."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Self

from milepost.errors import ClosedError

__all__ = ["OwnedByProcess", "beside", "gc_paused", "is_dtensor", "wrap_future"]


class OwnedByProcess:
    """An object that belongs to the process that made it. A forked process must not use or release it."""

    _owner: int

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """Remember the process."""
        made = super().__new__(cls)
        made._owner = os.getpid()
        return made

    @property
    def is_owned(self) -> bool:
        """Whether this process made it."""
        return self._owner == os.getpid()

    def check_owner(self, name: str, what: str = "one") -> None:
        """Refuse the use in a forked process.

        Raises:
            ClosedError: Says which process it belongs to, and what to make in this one.
        """
        if not self.is_owned:
            raise ClosedError(
                f"the {name} belongs to process {self._owner}, from which this one was forked",
                hint=f"make {what} in this process",
            )


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


def is_dtensor(value: Any) -> bool:
    """Whether a value is a DTensor, without importing what defines it."""
    kind = type(value)
    return kind.__name__ == "DTensor" and kind.__module__.startswith("torch.distributed")


@contextmanager
def beside(work: Callable[[], Any] | None) -> Iterator[list[Any]]:
    """Run `work` in a thread during the context; its result is in the list afterwards.

    The thread is its own: the pools of `concurrent.futures` take no work while the interpreter ends.
    """
    if work is None:
        yield [None]
        return
    results: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - raised below, in the thread that asked for it
            errors.append(error)

    thread = threading.Thread(target=run, name="milepost-replicas")
    thread.start()
    try:
        yield results
    finally:
        thread.join()
    if errors:
        raise errors[0]


@contextmanager
def gc_paused() -> Iterator[None]:
    """No cyclic garbage collection inside, for stretches that make many containers and no cycles.

    The collector would walk the whole heap again and again meanwhile: of a checkpoint of 20,000 tensors
    it took two thirds of the time to load it.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
