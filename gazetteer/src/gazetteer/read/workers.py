"""Work on many files in several processes, in a fixed order, whatever a file does to its worker."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType
    from typing import Self

__all__ = ["Workers", "default_jobs"]

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")

_SMALL = 150
_CHUNK = 48


def default_jobs() -> int:
    """Return the number of processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _prepare() -> None:
    """Leave interrupts to the parent, and look for cycles seldom: tasks make few and end soon."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.set_threshold(50_000, 20, 50)


def _run_chunk(work: Callable[[_Task], _Result], tasks: Sequence[_Task]) -> list[_Result]:
    return [work(task) for task in tasks]


class Workers(Generic[_Task]):
    """A pool of processes, started when there is enough to do.

    Leaving the ``with`` block ends every process, also after an interrupt.
    """

    def __init__(self, jobs: int) -> None:
        self._jobs = jobs
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        """Return itself; processes start with the first tasks that need them."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _value: BaseException | None, _trace: TracebackType | None
    ) -> None:
        """End every process."""
        self._stop(cancel=kind is not None)

    def _stop(self, *, cancel: bool) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=cancel)
            self._pool = None

    def _new_pool(self, jobs: int) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(jobs, mp_context=context, initializer=_prepare)

    def run(
        self,
        work: Callable[[_Task], _Result],
        tasks: Sequence[_Task],
        crashed: Callable[[_Task], _Result],
    ) -> Iterator[_Result]:
        """Yield ``work(task)`` for each task, in order.

        Args:
            work: A module-level function.
            tasks: What to call it with.
            crashed: Gives the result for a task that killed its process.
        """
        if self._jobs < 2 or len(tasks) < _SMALL:
            yield from map(work, tasks)
            return
        if self._pool is None:
            self._pool = self._new_pool(self._jobs)
        chunks = [tasks[i : i + _CHUNK] for i in range(0, len(tasks), _CHUNK)]
        futures: list[Future[list[_Result]]] = [self._pool.submit(_run_chunk, work, chunk) for chunk in chunks]
        for index, chunk in enumerate(chunks):
            future = futures[index]
            try:
                yield from future.result()
            except BrokenProcessPool:
                yield from self._one_by_one(work, chunk, crashed)
                self._stop(cancel=True)
                self._pool = self._new_pool(self._jobs)
                for later in range(index + 1, len(chunks)):
                    broken = futures[later]
                    if not broken.done() or broken.cancelled() or broken.exception() is not None:
                        futures[later] = self._pool.submit(_run_chunk, work, chunks[later])
            futures[index] = Future()  # let go of the result

    def _one_by_one(
        self, work: Callable[[_Task], _Result], tasks: Sequence[_Task], crashed: Callable[[_Task], _Result]
    ) -> Iterator[_Result]:
        for task in tasks:
            with self._new_pool(1) as pool:
                try:
                    yield pool.submit(work, task).result()
                except BrokenProcessPool:
                    yield crashed(task)
