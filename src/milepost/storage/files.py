"""Files of the local file systems, being written and being read."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from milepost import syscalls
from milepost.errors import CorruptCheckpointError, StorageError
from milepost.storage import ALIGNMENT
from milepost.utils import OwnedByProcess

__all__ = ["LocalNewFile", "LocalOpenFile", "wrapped"]

_logger = logging.getLogger(__name__)
_BOUNCE_BYTES = 1 << 20
_READ_BYTES = 1 << 30
_IOVECS = 1024


@contextmanager
def wrapped(operation: str, path: str) -> Iterator[None]:
    """Turn any OSError inside into the StorageError for it."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError.wrap(error, operation, path) from error


# ---------------------------------------------------------------------------- writing


class LocalNewFile(OwnedByProcess):
    """See `milepost.storage.NewFile`."""

    def __init__(self, path: str, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor
        self._direct = False
        self._identity: os.stat_result | None = None
        try:
            self._identity = os.fstat(descriptor)
        except BaseException:
            self.discard()
            raise

    def go_direct(self) -> None:
        """Write round the page cache from now on, if the file system allows it."""
        self._direct = syscalls.enable_direct(self._descriptor)

    def write(self, offset: int, data: memoryview) -> None:
        with wrapped("write", self._path):
            if not self._direct:
                self._write_all(offset, data)
                return
            address = syscalls.address_of(data)
            whole = len(data) - len(data) % ALIGNMENT
            if address is None or address % ALIGNMENT:
                whole = 0
            if whole:
                self._write_all(offset, data[:whole])
            if whole < len(data):
                self._write_bounced(offset + whole, data[whole:])

    def _write_bounced(self, offset: int, data: memoryview) -> None:
        """Write through aligned memory; a last part of a block is filled up with zeros."""
        padded = -(-len(data) // ALIGNMENT) * ALIGNMENT
        bounce = syscalls.private_memory(min(padded, _BOUNCE_BYTES))
        for start in range(0, len(data), _BOUNCE_BYTES):
            part = data[start : start + _BOUNCE_BYTES]
            block = bounce[: -(-len(part) // ALIGNMENT) * ALIGNMENT]
            block[: len(part)] = part
            block[len(part) :] = bytes(len(block) - len(part))
            self._write_all(offset + start, block)

    def _write_all(self, offset: int, data: memoryview) -> None:
        while data:
            try:
                written = os.pwrite(self._descriptor, data, offset)
            except OSError as error:
                if not self._direct or error.errno not in syscalls.UNSUPPORTED:
                    raise
                _logger.debug("direct write refused (%s), going on buffered: %s", error, self._path)
                syscalls.disable_direct(self._descriptor)
                self._direct = False
                continue
            if not written:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            data = data[written:]
            offset += written

    def finish(self, size: int, *, sync: bool = True) -> None:
        with wrapped("finish", self._path):
            if not self.is_owned or self._descriptor < 0:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            try:
                with wrapped("truncate", self._path):
                    os.ftruncate(self._descriptor, size)
                if sync:
                    with wrapped("fsync", self._path):
                        syscalls.sync(self._descriptor)
            except BaseException:
                self.discard()
                raise
            descriptor, self._descriptor = self._descriptor, -1
            try:
                with wrapped("close", self._path):
                    os.close(descriptor)
            except BaseException:
                self._remove()
                raise

    def discard(self) -> None:
        if not self.is_owned or self._descriptor < 0:
            return
        descriptor, self._descriptor = self._descriptor, -1
        self._remove()
        with suppress(OSError):
            os.close(descriptor)

    def _remove(self) -> None:
        """Remove the name, if it still is this file's."""
        with suppress(OSError):
            if self._identity and os.path.samestat(os.lstat(self._path), self._identity):
                os.unlink(self._path)

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            self.discard()


# ---------------------------------------------------------------------------- reading


class LocalOpenFile(OwnedByProcess):
    """See `milepost.storage.OpenFile`."""

    def __init__(self, path: str, descriptor: int, size: int) -> None:
        self.path = path
        self.size = size
        self._descriptor = descriptor
        self._direct: int | None = None
        self._lock = threading.Lock()

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        total = sum(map(len, buffers))
        if len(buffers) <= _IOVECS and total <= _READ_BYTES:
            if total:
                self._fill(offset, list(buffers), total)
            return
        group: list[memoryview] = []
        total = 0
        for whole in buffers:
            for start in range(0, len(whole), _READ_BYTES):
                buffer = whole[start : start + _READ_BYTES] if len(whole) > _READ_BYTES else whole
                if len(group) == _IOVECS or total + len(buffer) > _READ_BYTES:
                    self._fill(offset, group, total)
                    offset += total
                    group, total = [], 0
                group.append(buffer)
                total += len(buffer)
        if group:
            self._fill(offset, group, total)

    def _fill(self, offset: int, buffers: list[memoryview], total: int) -> None:
        with wrapped("read", self.path):
            done = os.preadv(self._descriptor, buffers, offset)
            while done < total:
                skip, rest = done, []
                for buffer in buffers:
                    if skip < len(buffer):
                        rest.append(buffer[skip:])
                    skip = max(skip - len(buffer), 0)
                count = os.preadv(self._descriptor, rest, offset + done)
                if not count:
                    raise self._too_short(offset + total)
                done += count

    def _too_short(self, wanted: int) -> CorruptCheckpointError:
        found = os.fstat(self._descriptor).st_size
        return CorruptCheckpointError(
            f"the file ends too early: {wanted} bytes expected at least, {found} found: {self.path}",
            path=self.path,
        )

    def read_direct(self, offset: int, buffer: memoryview) -> None:
        end = min(offset + len(buffer), self.size)
        refused = False
        with wrapped("read", self.path):
            while offset < end:
                descriptor = self._direct_descriptor()
                try:
                    count = os.preadv(descriptor, [buffer], offset)
                except OSError as error:
                    if refused or descriptor == self._descriptor or error.errno not in syscalls.UNSUPPORTED:
                        raise
                    # Other threads may be using the descriptor: change what it is, do not close it.
                    _logger.debug("direct read refused (%s), going on buffered: %s", error, self.path)
                    syscalls.disable_direct(descriptor)
                    refused = True
                    continue
                if not count:
                    raise self._too_short(end)
                offset += count
                buffer = buffer[count:]

    def _direct_descriptor(self) -> int:
        """A descriptor of its own for direct reads, or the ordinary one where they are refused."""
        if self._direct is None:
            with self._lock:
                if self._direct is None:
                    self._direct = self._reopen()
        return self._direct

    def _reopen(self) -> int:
        if not syscalls.O_DIRECT:
            return self._descriptor
        flags = os.O_RDONLY | os.O_CLOEXEC | syscalls.O_DIRECT
        try:
            return os.open(f"/proc/self/fd/{self._descriptor}", flags)
        except OSError as error:
            _logger.debug("direct reads refused (%s), going on buffered: %s", error, self.path)
            return self._descriptor

    def cached(self, offset: int, length: int) -> bool:
        length = min(length, self.size - offset)
        return syscalls.cached_fraction(self._descriptor, offset, length) > 0.5

    def fileno(self) -> int:
        """The descriptor, for libraries that open files themselves."""
        return self._descriptor

    def map(self) -> memoryview | None:
        if not self.size or syscalls.is_network_file_system(self._descriptor):
            return None
        try:
            return syscalls.map_file_private(self._descriptor, self.size)
        except OSError as error:
            if error.errno == errno.ENODEV or error.errno in syscalls.UNSUPPORTED:
                return None
            raise StorageError.wrap(error, "map", self.path) from error

    def close(self) -> None:
        with self._lock:
            descriptors = {self._descriptor, self._direct} - {None, -1}
            self._descriptor = self._direct = -1
        if self.is_owned:
            for descriptor in descriptors:
                with suppress(OSError):
                    os.close(descriptor)  # type: ignore[arg-type]  # None was taken out above

    def __del__(self) -> None:
        if hasattr(self, "_lock"):
            self.close()
