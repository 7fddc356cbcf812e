"""Writing a file as a stream of blocks: one is filled while the one before it goes to the disk."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

from milepost import syscalls
from milepost.errors import StorageError
from milepost.storage import ALIGNMENT, NewFile, RenameMode, Storage
from milepost.utils import OwnedByProcess

__all__ = ["WRITE_BYTES", "Ring", "publish_bytes", "write_bytes", "write_memory", "write_stream"]

DEFAULT_BLOCK_BYTES = 16 << 20
DEFAULT_BLOCKS = 4
WRITE_BYTES = 32 << 20
"""How much `write_memory` writes at a time."""


class Ring(OwnedByProcess):
    """A few blocks of private memory for data on its way, kept by its owner from one file to the next.

    The memory comes with the first use of each part of it and goes with `close` or with the ring. One
    user at a time: others wait. A forked child gets memory of its own.

    Args:
        block_bytes: Size of a block, a multiple of `ALIGNMENT`.
        blocks: How many there are, 2 at least.
    """

    def __init__(self, block_bytes: int = DEFAULT_BLOCK_BYTES, blocks: int = DEFAULT_BLOCKS) -> None:
        if block_bytes <= 0 or block_bytes % ALIGNMENT or blocks < 2:
            raise ValueError(
                f"a ring needs 2 blocks or more of n*{ALIGNMENT} bytes, not {blocks} of {block_bytes}"
            )
        self.block_bytes = block_bytes
        self._count = blocks
        self._reset()

    def _reset(self) -> None:
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._memory: memoryview | None = None

    @contextmanager
    def lease(self) -> Iterator[list[memoryview]]:
        """The blocks, for one user until the context ends; what they hold is arbitrary."""
        if not self.is_owned:
            self._reset()
        with self._lock:
            if self._memory is None:
                self._memory = syscalls.private_memory(self._count * self.block_bytes)
            starts = range(0, len(self._memory), self.block_bytes)
            yield [self._memory[start : start + self.block_bytes] for start in starts]

    def close(self) -> None:
        """Give the memory back, as soon as nobody uses it; idempotent. The next lease gets new memory."""
        self._memory = None


def write_stream(
    file: NewFile,
    size: int,
    fill: Callable[[memoryview, int], None],
    ring: Ring,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write `size` bytes from the start of `file`, block by block; does not finish the file.

    Returns when every byte was written. If it raises, the error is the first one of `fill`, `progress`
    or the file, with its own type, some of the file may be written, and no thread is left.

    Args:
        file: Where to; its writes happen in a thread of their own, one at a time and in order.
        size: How many bytes.
        fill: Called in this thread as ``fill(view, offset)`` for each block in file order; fills the
            whole view, which has the ring's block size (the last one what remains).
        ring: Its blocks carry the data.
        progress: Called in this thread with the number of bytes of each block that was written.
    """
    with ring.lease() as blocks:
        if size <= ring.block_bytes:
            if size:
                view = blocks[0][:size]
                fill(view, 0)
                file.write(0, view)
                if progress:
                    progress(size)
            return
        _Pipeline(file, blocks).run(size, fill, progress)


def write_memory(
    file: NewFile,
    memory: memoryview,
    seal: Callable[[memoryview, int], None],
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write memory that is (nearly) the file: no copy is made; does not finish the file.

    A thread seals block after block, in order, and runs ahead of the writes in this thread. If it
    raises, the error is the first one, some of the file may be written, and no thread is left.

    Args:
        file: Where to.
        memory: All of the file's bytes, page-aligned.
        seal: Called as ``seal(view, offset)`` for each block of WRITE_BYTES, to complete it in place.
        progress: Called with the number of bytes of each block that was written.
    """
    views = [(start, memory[start : start + WRITE_BYTES]) for start in range(0, len(memory), WRITE_BYTES)]
    with ThreadPoolExecutor(1, "milepost-seal") as pool:
        sealed = [pool.submit(seal, view, start) for start, view in views]
        try:
            for done, (start, view) in zip(sealed, views, strict=True):
                done.result()
                file.write(start, view)
                if progress:
                    progress(len(view))
        finally:
            pool.shutdown(cancel_futures=True)


class _Pipeline:
    """One thread that writes what the caller's thread fills."""

    def __init__(self, file: NewFile, blocks: list[memoryview]) -> None:
        self._file = file
        self._blocks = blocks
        self._filled: queue.SimpleQueue[tuple[int, memoryview] | None] = queue.SimpleQueue()
        self._written: queue.SimpleQueue[tuple[memoryview, int] | BaseException] = queue.SimpleQueue()
        self._stopped = False

    def run(
        self, size: int, fill: Callable[[memoryview, int], None], progress: Callable[[int], None] | None
    ) -> None:
        thread = threading.Thread(target=self._write, name="milepost-write", daemon=True)
        thread.start()
        try:
            free = list(reversed(self._blocks))
            block_bytes = len(free[0])
            for offset in range(0, size, block_bytes):
                while not free or not self._written.empty():
                    free.append(self._next_written(progress))
                view = free.pop()[: min(block_bytes, size - offset)]
                fill(view, offset)
                self._filled.put((offset, view))
            while len(free) < len(self._blocks):
                free.append(self._next_written(progress))
        except BaseException:
            self._stopped = True
            raise
        finally:
            self._filled.put(None)
            join(thread)

    def _next_written(self, progress: Callable[[int], None] | None) -> memoryview:
        result = self._written.get()
        if isinstance(result, BaseException):
            raise result
        block, count = result
        if progress:
            progress(count)
        return block

    def _write(self) -> None:
        for offset, view in iter(self._filled.get, None):
            if self._stopped:
                return
            try:
                self._file.write(offset, view)
            except BaseException as error:  # noqa: BLE001 - raised in the caller's thread
                self._written.put(error)
                return
            self._written.put((view, len(view)))


def join(*threads: threading.Thread, stop: Callable[[], None] | None = None) -> None:
    """Wait until the threads have ended, also through Ctrl-C: that calls `stop`, and is raised afterwards."""
    interrupt: KeyboardInterrupt | None = None
    for thread in threads:
        while thread.is_alive():
            try:
                thread.join()
            except KeyboardInterrupt as error:
                interrupt = error
                if stop:
                    stop()
    if interrupt:
        raise interrupt


def write_bytes(storage: Storage, path: str, data: bytes, *, sync: bool = True) -> None:
    """Create a small file; durable on return (but for its name) unless `sync` is False.

    If it raises, there is no file, or (EntryExistsError) the one of before.
    """
    file = storage.create(path)
    try:
        if data:
            file.write(0, memoryview(data))
    except BaseException:
        file.discard()
        raise
    file.finish(len(data), sync=sync)


def publish_bytes(storage: Storage, path: str, data: bytes, mode: RenameMode, *, sync: bool = True) -> None:
    """Write a small file aside and give it its name in one step, so that nobody ever sees a part of it.

    On return the content is durable (unless `sync` is False), the name is once its folder is fsynced.
    If it raises, nothing is left but what was at `path`. EntryExistsError with mode "create" if the
    name is taken; "replace" takes it.
    """
    folder, _, name = path.rpartition("/")
    aside = f"{folder}/.{name}.{os.urandom(8).hex()}.tmp"
    write_bytes(storage, aside, data, sync=sync)
    try:
        storage.rename(aside, path, mode)
    except BaseException:
        with suppress(StorageError):
            storage.remove(aside)
        raise
