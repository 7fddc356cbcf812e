"""Threads that read, and threads that use the bytes that were read."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from milepost import syscalls
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
    """A function that tells whether the region around an offset is in the page cache.

    It asks the system once for each region.
    """
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
    alone: bool = False,
    cached: Callable[[int], bool] = lambda _: False,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Read ranges of the file into windows of memory, past the page cache, and use them there.

    Args:
        file: The file.
        extents: Start and end of each range.
        window_bytes: No range takes more than this, counted in aligned blocks.
        ring: Its blocks become the windows. A ring whose blocks are too small is not used.
        use: Gets the index of a range and its bytes, from several threads, in any order.
        alone: Read and use in this thread, in order, without the ring: threads cost more than a few
            megabytes do.
        cached: Ranges at whose start this is true are read from the page cache.
        progress: Called in this thread with the number of bytes used since it was called last.
    """
    flow = _Flow(file, extents, use, cached)
    if alone:
        flow.run_here(progress)
        return
    if ring is None or ring.block_bytes < window_bytes:
        ring = Ring(window_bytes, _WINDOWS)
    with ring.lease() as blocks:
        for block in blocks:
            for start in range(0, len(block) - window_bytes + 1, window_bytes):
                flow.free.put(block[start : start + window_bytes])
        workers: list[Callable[[], None]] = [flow.read] * _READERS + [flow.use] * (_USERS - 1)
        run_workers([*workers, partial(flow.use, progress)], flow.stop)
    flow.report(progress)


class _Flow:
    """Ranges of a file: readers take a free window and fill it, users use it and free it again."""

    def __init__(
        self,
        file: OpenFile,
        extents: Sequence[tuple[int, int]],
        use: Callable[[int, memoryview], None],
        cached: Callable[[int], bool],
    ) -> None:
        self.free: queue.SimpleQueue[memoryview | None] = queue.SimpleQueue()
        self._filled: queue.SimpleQueue[tuple[int, memoryview, memoryview] | None] = queue.SimpleQueue()
        self._file, self._extents, self._use, self._cached = file, extents, use, cached
        self._to_read, self._to_use = deque(range(len(extents))), deque(range(len(extents)))
        self._used: deque[int] = deque()

    def run_here(self, progress: Callable[[int], None] | None) -> None:
        """Read and use every range in this thread."""
        sizes = [blocks_up(end) - blocks_down(start) for start, end in self._extents]
        window = syscalls.private_memory(max(sizes, default=0))
        for index in self._to_read:
            view = self._fetch(index, window)
            self._use(index, view)
            if progress:
                progress(len(view))

    def read(self) -> None:
        """Fill free windows until all ranges are read."""
        while self._to_read:
            window = self.free.get()
            if window is None:
                return
            try:
                index = self._to_read.popleft()
            except IndexError:
                return
            self._filled.put((index, window, self._fetch(index, window)))

    def _fetch(self, index: int, window: memoryview) -> memoryview:
        start, end = self._extents[index]
        base = blocks_down(start)
        view = window[start - base : end - base]
        if self._cached(start):
            self._file.read_into(start, [view])
        else:
            self._file.read_direct(base, window[: blocks_up(end) - base])
        return view

    def use(self, progress: Callable[[int], None] | None = None) -> None:
        """Use filled windows until all ranges are used."""
        while True:
            try:
                self._to_use.popleft()
            except IndexError:
                return
            item = self._filled.get()
            if item is None:
                return
            index, window, view = item
            self._use(index, view)
            self.free.put(window)
            self._used.append(len(view))
            self.report(progress)

    def report(self, progress: Callable[[int], None] | None) -> None:
        """Report the bytes that were used since the last report."""
        total = 0
        while progress and self._used:
            total += self._used.popleft()
        if progress and total:
            progress(total)

    def stop(self) -> None:
        """End `read` and `use` soon, in all threads."""
        self._to_read.clear()
        self._to_use.clear()
        for _ in range(_READERS):
            self.free.put(None)
        for _ in range(_USERS):
            self._filled.put(None)


def run_workers(workers: Sequence[Callable[[], None]], stop: Callable[[], None]) -> None:
    """Run each worker in a thread, the last one in this. Raises the first error, when all have ended.

    `stop` is called after an error and makes the workers end soon.
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
