"""Small helpers."""

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
    """Base of objects that belong to the process that made them. A forked process must not use them.

    Examples:
        >>> from milepost.utils import OwnedByProcess
        >>> class Pool(OwnedByProcess):
        ...     pass
        >>> Pool().is_owned
        True
    """

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
    """Return a future that is done, with result None, when `original_result` is done.

    Args:
        original_result: Any value. If it is a future that fails or is cancelled, the returned future fails
            with its exception or with ``CancelledError``. A value that is not a future counts as done.

    Returns:
        A future whose result is always None.

    Examples:
        >>> from concurrent.futures import Future
        >>> from milepost import wrap_future
        >>> failed = Future()
        >>> failed.set_exception(OSError("disk full"))
        >>> wrap_future(failed).exception()
        OSError('disk full')
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
    """Return whether a value is a DTensor, without an import of torch.

    Examples:
        >>> import torch
        >>> from milepost.utils import is_dtensor
        >>> is_dtensor(torch.ones(2))
        False
    """
    kind = type(value)
    return kind.__name__ == "DTensor" and kind.__module__.startswith("torch.distributed")


@contextmanager
def beside(work: Callable[[], Any] | None) -> Iterator[list[Any]]:
    """Run `work` in a thread during the context. Afterwards the list holds its result.

    This is no thread of a pool: those of `concurrent.futures` take no work while the interpreter ends.

    Examples:
        >>> from milepost.utils import beside
        >>> with beside(lambda: sum(range(10))) as results:
        ...     other = max(range(10))
        >>> results
        [45]
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
    """Switch off cyclic garbage collection during the context.

    Use it for code that makes many containers and no cycles. The collector would walk the whole heap again
    and again: it took two thirds of the time to load a checkpoint of 20,000 tensors.

    Examples:
        >>> import gc
        >>> from milepost.utils import gc_paused
        >>> with gc_paused():
        ...     gc.isenabled()
        False
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
