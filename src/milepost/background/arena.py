"""Arenas: shared memory that a rank's file is staged into. One descriptor each, whatever they hold."""

from __future__ import annotations

import errno
import mmap
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from milepost import syscalls
from milepost.errors import LowMemoryError

__all__ = ["Arena", "available_bytes"]

_STEP_BYTES = 16 << 20
_PAGE = mmap.PAGESIZE


class Arena:
    """Anonymous shared memory, mapped once. Its descriptor can be passed to another process.

    The memory is given back when the arena is closed and nothing refers to `view` or parts of it.

    Args:
        size: Bytes, at least.
        descriptor: An arena received from another process, which this one takes over; None to make one.
    """

    def __init__(self, size: int, descriptor: int | None = None) -> None:
        if descriptor is None:
            with _room(size):
                descriptor = syscalls.anonymous_file("milepost-arena", _in_pages(size))
        self.descriptor = descriptor
        self._finalizer = weakref.finalize(self, _close, self.descriptor, os.getpid())
        self._finalizer.atexit = False
        self.view = memoryview(b"")
        self.size = 0
        self._populated = 0
        self._hurry = False
        self._lock = threading.Lock()
        self.grow(max(size, os.fstat(descriptor).st_size))

    def grow(self, size: int) -> None:
        """Make it hold `size` bytes at least; what it holds stays, views made before keep the old mapping.

        Raises LowMemoryError if that cannot be had; nothing has changed then.
        """
        size = _in_pages(size)
        if size <= self.size:
            return
        with _room(size):
            syscalls.extend(self.descriptor, size)
            self.view = memoryview(mmap.mmap(self.descriptor, size))
        self.size = size

    def first(self, size: int) -> memoryview:
        """The first `size` bytes; the arena grows if it is smaller."""
        self.grow(size)
        return self.view[:size]

    def populate(self) -> None:
        """Touch every page now, in small steps that leave other threads alone; for a background thread.

        First touches are many times slower than the copies that would meet them.
        """
        with self._lock:
            view, address = self.view, syscalls.address_of(self.view)
            while self._populated < len(view) and address is not None and not self._hurry:
                step = min(_STEP_BYTES, len(view) - self._populated)
                syscalls.populate(address + self._populated, step)
                self._populated += step

    def stop_populating(self) -> None:
        """Have `populate` return soon, and do nothing from now on."""
        self._hurry = True

    def close(self) -> None:
        """Give up the descriptor and this object's hold on the memory; idempotent."""
        self.view = memoryview(b"")
        self.size = 0
        self._finalizer()
        self.descriptor = -1


def _in_pages(size: int) -> int:
    return -(-max(size, 1) // _PAGE) * _PAGE


@contextmanager
def _room(size: int) -> Iterator[None]:
    """Make an OSError in the context the error for so many bytes that cannot be had."""
    try:
        yield
    except OSError as error:
        hint = 'on_low_memory="sync" saves without staging'
        if error.errno == errno.EFBIG:
            hint = f"the limit of file sizes (ulimit -f) holds for shared memory as well: raise it; {hint}"
        raise LowMemoryError(
            f"{size:,} bytes of shared memory cannot be had: {error.strerror}", phase="stage", hint=hint
        ) from error


def _close(descriptor: int, owner: int) -> None:
    if owner == os.getpid():
        with suppress(OSError):
            os.close(descriptor)


def available_bytes(
    meminfo: str = "/proc/meminfo", cgroup: str = "/sys/fs/cgroup", groups: str = "/proc/self/cgroup"
) -> int | None:
    """How much memory is left, to the machine or to the control group, whichever is less; None if unknown.

    Cached file content counts as left, as the system drops it for memory that is asked for. Not only the
    control group of this process has limits, but each of those around it.

    Args:
        meminfo: The kernel's file of that name.
        cgroup: Where the control groups are mounted.
        groups: The kernel's file that names the control groups of this process.
    """
    found = []
    with suppress(OSError, ValueError, IndexError), open(meminfo) as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    for folder in _group_folders(cgroup, groups):
        for limit_name, used_name, prefix in (
            ("memory.max", "memory.current", ""),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        ):
            with suppress(OSError, ValueError):
                limit, used = (_number(f"{folder}/{name}") for name in (limit_name, used_name))
                found.append(max(limit - used + _cached(folder, prefix), 0))
    return min(found, default=None)


def _group_folders(cgroup: str, groups: str) -> list[str]:
    """The folders of this process's control groups and of those around them, as far as they are mounted."""
    folders = [cgroup, f"{cgroup}/memory"]
    with suppress(OSError), open(groups) as file:
        for line in file:
            _, _, rest = line.rstrip("\n").partition(":")
            controllers, _, path = rest.partition(":")
            if controllers and "memory" not in controllers.split(","):
                continue
            parts = [part for part in path.split("/") if part and part != ".."]
            root = f"{cgroup}/memory" if controllers else cgroup
            folders += ["/".join([root, *parts[:count]]) for count in range(1, len(parts) + 1)]
    return folders


def _number(path: str) -> int:
    with open(path) as file:
        return int(file.read())


def _cached(folder: str, prefix: str) -> int:
    """Bytes of file content that a control group could give back."""
    count = 0
    with suppress(OSError, ValueError, IndexError), open(f"{folder}/memory.stat") as file:
        for line in file:
            name, _, value = line.partition(" ")
            if name in (f"{prefix}inactive_file", f"{prefix}active_file"):
                count += int(value)
    return count
