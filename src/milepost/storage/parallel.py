"""Threads that read and threads that use what was read."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from milepost.storage import ALIGNMENT, OpenFile
from milepost.storage.writing import Ring, join

__all__ = ["blocks_down", "blocks_up", "cached_regions", "run_workers", "through_ring"]

_WINDOWS = 8
_READERS = 3
_USERS = 2


def blocks_up(position: int) -> int:
    """The next position that is aligned for direct I/O."""
    return -(-position // ALIGNMENT) * ALIGNMENT


def blocks_down(position: int) -> int:
    """The last position that is aligned for direct I/O."""
    return position // ALIGNMENT * ALIGNMENT


def cached_regions(file: OpenFile, region_bytes: int) -> Callable[[int], bool]:
    """Tells whether the region round an offset is in the page cache; asks once for each region."""
    known: dict[int, bool] = {}

    def cached(offset: int) -> bool:
        region = offset // region_bytes
        if region not in known:
            known[region] = file.cached(region * region_bytes, region_bytes)
        return known[region]

    return cached


def through_ring(
    file: OpenFile,
    extents: Sequence[tuple[int, int]],
    window_bytes: int,
    ring: Ring | None,
    use: Callable[[int, memoryview], None],
    *,
    cached: Callable[[int], bool] = lambda _: False,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Read ranges of the file into windows of the ring, round the page cache, and use them elsewhere.

    `use` gets the index of a range and its bytes, from several threads, in no certain order. Ranges at whose
    start `cached` is true are read from the page cache.
    """
    if ring is None or ring.block_bytes < window_bytes:
        ring = Ring(window_bytes, _WINDOWS)
    free: queue.SimpleQueue[memoryview | None] = queue.SimpleQueue()
    filled: queue.SimpleQueue[tuple[int, memoryview, memoryview] | None] = queue.SimpleQueue()
    to_read = deque(range(len(extents)))
    to_use = deque(range(len(extents)))
    finished: deque[int] = deque()

    def read() -> None:
        while to_read:
            buffer = free.get()
            if buffer is None:
                return
            try:
                index = to_read.popleft()
            except IndexError:
                return
            start, end = extents[index]
            base = blocks_down(start)
            if cached(start):
                file.read_into(start, [buffer[start - base : end - base]])
            else:
                file.read_direct(base, buffer[: blocks_up(end) - base])
            filled.put((index, buffer, buffer[start - base : end - base]))

    def consume(report: Callable[[int], None] | None = None) -> None:
        while True:
            try:
                to_use.popleft()
            except IndexError:
                return
            item = filled.get()
            if item is None:
                return
            index, buffer, view = item
            use(index, view)
            free.put(buffer)
            finished.append(len(view))
            if report:
                report(_drain(finished))

    def stop() -> None:
        to_read.clear()
        to_use.clear()
        for _ in range(_READERS):
            free.put(None)
        for _ in range(_USERS):
            filled.put(None)

    with ring.lease() as blocks:
        for block in blocks:
            for start in range(0, len(block) - window_bytes + 1, window_bytes):
                free.put(block[start : start + window_bytes])
        run_workers([*[read] * _READERS, *[consume] * (_USERS - 1), partial(consume, progress)], stop)
    if progress and finished:
        progress(_drain(finished))


def _drain(counts: deque[int]) -> int:
    total = 0
    while counts:
        total += counts.popleft()
    return total


def run_workers(workers: Sequence[Callable[[], None]], stop: Callable[[], None]) -> None:
    """Run all workers, each in a thread, the last one in this. Raises the first error, when all have ended.

    `stop`, called after an error, makes them end soon.
    """
    errors: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)
            stop()

    threads = [
        threading.Thread(target=guarded, args=(work,), name="milepost-read", daemon=True)
        for work in workers[:-1]
    ]
    started: list[threading.Thread] = []
    try:
        for thread in threads:
            thread.start()
            started.append(thread)
        guarded(workers[-1])
    except BaseException:
        stop()
        raise
    finally:
        join(*started, stop=stop)
    if errors:
        raise next((error for error in errors if isinstance(error, KeyboardInterrupt)), errors[0])
