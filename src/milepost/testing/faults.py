"""A storage that fails at a chosen operation, and system calls that are interrupted or cut short."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Self

from milepost.errors import MilepostError, StorageError
from milepost.storage import Folder, Lock, NewFile, OpenFile, RenameMode, Stat, Storage

__all__ = ["MUTATIONS", "FaultyStorage", "short_writes", "signal_storm"]

MUTATIONS = frozenset(
    {
        "create",
        "write",
        "finish",
        "discard",
        "make_folder",
        "make_public",
        "rename",
        "remove",
        "sync_folder",
    }
)
"""The operations that change what is on the disk."""

Fault = BaseException | Literal["kill", "torn"]


class FaultyStorage:
    """Passes all operations to another storage, and fails at chosen ones.

    It counts operations from 1, in all threads, including those of its files, folders and locks. It can be
    pickled: a child process counts from 1 again, with the same faults.

    Args:
        inner: The storage that does the work.
        counts: The names of the operations that count. Defaults to all. See `MUTATIONS`.
        before: Called as ``before(operation, path)`` before each counted one: to add latency, or order.

    Attributes:
        operations: The counted operations so far, such as ``"rename /a/b"``.
        faults: What `fail_at` was told; may be cleared.
        before: As given; may be changed.

    Examples:
        >>> import errno
        >>> from milepost.storage import default_storage
        >>> from milepost.testing import FaultyStorage
        >>> storage = FaultyStorage(default_storage()).fail_at(1, OSError(errno.EIO, "broken disk"))
        >>> storage.remove("/run/step-1")
        Traceback (most recent call last):
        milepost.errors.StorageError: remove failed: broken disk: /run/step-1
        hint: the device reports an error: check the disk before you trust it again
    """

    def __init__(
        self,
        inner: Storage,
        *,
        counts: Collection[str] | None = None,
        before: Callable[[str, str], None] | None = None,
    ) -> None:
        self.inner = inner
        self.operations: list[str] = []
        self._counts = None if counts is None else frozenset(counts)
        self.before = before
        self.faults: list[tuple[int, float, Fault]] = []
        self._guard = threading.Lock()

    def fail_at(self, number: int, error: Fault = "kill", *, times: int | None = 1) -> Self:
        """Fail at operation `number` and the ``times - 1`` after it (None: at all later ones).

        Args:
            number: Which operation, from 1.
            error: The operation raises this instead. An OSError is converted to its StorageError, other
                exceptions are not. "kill" sends SIGKILL to this process before the operation. "torn" kills
                it in the middle of a write.
            times: How often.
        """
        self.faults.append((number, float("inf") if times is None else number + times, error))
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Everything except the count."""
        return {**self.__dict__, "operations": [], "_guard": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Start to count from 1."""
        self.__dict__.update(state, _guard=threading.Lock())

    def _step(self, operation: str, path: str, torn: Callable[[], None] | None = None) -> None:
        if self._counts is not None and operation not in self._counts:
            return
        if self.before:
            self.before(operation, path)
        with self._guard:
            self.operations.append(f"{operation} {path}")
            number = len(self.operations)
        for first, end, error in self.faults:
            if not first <= number < end:
                continue
            if isinstance(error, str):
                if torn and error == "torn":
                    torn()
                os.kill(os.getpid(), signal.SIGKILL)
            elif operation != "discard":  # which never raises
                raise _as_storage_error(error, operation, path)

    def create(self, path: str, *, direct: bool = False) -> NewFile:
        """See `Storage.create`."""
        self._step("create", path)
        return _FaultyNewFile(self._step, path, self.inner.create(path, direct=direct))

    def open_folder(self, path: str) -> Folder:
        """See `Storage.open_folder`."""
        self._step("open_folder", path)
        return _FaultyFolder(self._step, self.inner.open_folder(path))

    def stat(self, path: str) -> Stat | None:
        """See `Storage.stat`."""
        self._step("stat", path)
        return self.inner.stat(path)

    def make_folder(self, path: str, *, private: bool = False) -> None:
        """See `Storage.make_folder`."""
        self._step("make_folder", path)
        self.inner.make_folder(path, private=private)

    def make_public(self, path: str) -> None:
        """See `Storage.make_public`."""
        self._step("make_public", path)
        self.inner.make_public(path)

    def rename(self, source: str, target: str, mode: RenameMode) -> None:
        """See `Storage.rename`."""
        self._step("rename", target)
        self.inner.rename(source, target, mode)

    def remove(self, path: str) -> None:
        """See `Storage.remove`."""
        self._step("remove", path)
        self.inner.remove(path)

    def sync_folder(self, path: str) -> None:
        """See `Storage.sync_folder`."""
        self._step("sync_folder", path)
        self.inner.sync_folder(path)

    def sync_file(self, path: str) -> None:
        """See `Storage.sync_file`."""
        self._step("sync_file", path)
        self.inner.sync_file(path)

    def is_network(self, path: str) -> bool:
        """See `Storage.is_network`."""
        self._step("is_network", path)
        return self.inner.is_network(path)

    def lock(self, path: str, *, exclusive: bool = False) -> Lock | None:
        """See `Storage.lock`."""
        self._step("lock", path)
        return self.inner.lock(path, exclusive=exclusive)


Step = Callable[..., None]


def _as_storage_error(error: BaseException, operation: str, path: str) -> BaseException:
    if isinstance(error, OSError) and not isinstance(error, MilepostError):
        return StorageError.wrap(error, operation, path)
    return error


class _FaultyNewFile:
    def __init__(self, step: Step, path: str, inner: NewFile) -> None:
        self._step, self._path, self._inner = step, path, inner

    def write(self, offset: int, data: memoryview) -> None:
        half = len(data) // 2 // 4096 * 4096
        self._step("write", self._path, lambda: self._inner.write(offset, data[:half]))
        self._inner.write(offset, data)

    def finish(self, size: int, *, sync: bool = True) -> None:
        try:
            self._step("finish", self._path)
        except BaseException:
            self._inner.discard()
            raise
        self._inner.finish(size, sync=sync)

    def discard(self) -> None:
        self._step("discard", self._path)
        self._inner.discard()


class _FaultyFolder:
    def __init__(self, step: Step, inner: Folder) -> None:
        self.path = inner.path
        self._step, self._inner = step, inner

    def names(self) -> list[str]:
        self._step("names", self.path)
        return self._inner.names()

    def stat(self, name: str) -> Stat | None:
        self._step("stat", f"{self.path}/{name}")
        return self._inner.stat(name)

    def read(self, name: str, limit: int) -> bytes:
        self._step("read", f"{self.path}/{name}")
        return self._inner.read(name, limit)

    def open(self, name: str) -> OpenFile:
        self._step("open", f"{self.path}/{name}")
        return _FaultyOpenFile(self._step, self._inner.open(name))

    def close(self) -> None:
        self._inner.close()


class _FaultyOpenFile:
    def __init__(self, step: Step, inner: OpenFile) -> None:
        self.path, self.size = inner.path, inner.size
        self._step, self._inner = step, inner

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self._step("read", self.path)
        self._inner.read_into(offset, buffers)

    def read_direct(self, offset: int, buffer: memoryview) -> None:
        self._step("read", self.path)
        self._inner.read_direct(offset, buffer)

    def cached(self, offset: int, length: int) -> bool:
        return self._inner.cached(offset, length)

    def map(self) -> memoryview | None:
        self._step("map", self.path)
        return self._inner.map()

    def close(self) -> None:
        self._inner.close()


@contextmanager
def short_writes(limit_bytes: int) -> Iterator[None]:
    """Limit each ``os.pwrite`` in the context to so many bytes, as a full or slow disk may do.

    Examples:
        >>> import os
        >>> from milepost.testing import short_writes
        >>> with open("file", "wb") as file, short_writes(2):
        ...     os.pwrite(file.fileno(), b"abcd", 0)
        2
    """
    real = os.pwrite
    os.pwrite = lambda descriptor, data, offset: real(descriptor, memoryview(data)[:limit_bytes], offset)
    try:
        yield
    finally:
        os.pwrite = real


@contextmanager
def signal_storm(interval_seconds: float = 0.0005) -> Iterator[None]:
    """Interrupt system calls in the context with signals (``EINTR``). For the main thread.

    Examples:
        >>> import milepost
        >>> from milepost.testing import signal_storm
        >>> with signal_storm(), milepost.make_sync_checkpointer() as checkpointer:
        ...     checkpointer.save("run/step-1", {"epoch": 3})
    """
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.siginterrupt(signal.SIGALRM, True)  # noqa: FBT003 - its only form
    signal.setitimer(signal.ITIMER_REAL, interval_seconds, interval_seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
