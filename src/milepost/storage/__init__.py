"""What Milepost asks of a place where checkpoints live.

`Storage` is a file system cut down to what a crash-safe commit needs. Paths are absolute ``str``.
`milepost.storage.local` is the real one; `milepost.testing` has a wrapper whose operations fail.

Every failed operation raises `StorageError`, which is also an ``OSError`` with the ``errno`` of the
cause and names the operation and the path. ``EINTR`` never gets out; a short write is continued.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import msgspec

__all__ = [
    "ALIGNMENT",
    "Folder",
    "Lock",
    "NewFile",
    "OpenFile",
    "RenameMode",
    "Stat",
    "Storage",
    "default_storage",
]

RenameMode = Literal["create", "replace", "exchange"]


class Stat(msgspec.Struct, frozen=True):
    """What is at a path; symbolic links are not followed.

    Attributes:
        kind: "file", "folder", "symlink" or "other".
        size_bytes: Length of a file; 0 for the rest.
        modified_seconds: Last modification, seconds since the epoch.
        mount_point: Whether a folder is the root of a mounted file system.
        writable: Whether this process may create entries in it (folders) or write to it (files).
    """

    kind: Literal["file", "folder", "symlink", "other"]
    size_bytes: int
    modified_seconds: float
    mount_point: bool
    writable: bool


class NewFile(Protocol):
    """A file being created. Exactly one of `finish` and `discard` must end it."""

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of `data` (bytes, contiguous) at `offset`.

        For a file created with ``direct=True`` the offset is a multiple of `ALIGNMENT`, and so is the
        length of every write but the one at the highest offset; data at an address that is a
        multiple of it is written without a copy.
        """

    def finish(self, size: int, *, sync: bool = True) -> None:
        """Returns when the file holds exactly `size` bytes and they are durable (fsync); closes it.

        With ``sync=False`` nothing is fsynced: for what may be lost, such as beacons.
        If it raises, the file has been removed: after a failed fsync nothing written is trusted.
        """

    def discard(self) -> None:
        """Close and remove the file; never raises, and does nothing after `finish`."""


class OpenFile(Protocol):
    """A file open for reading. Stays readable when it is renamed, replaced or removed."""

    path: str
    size: int

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill `buffers` one after the other with the bytes from `offset` on (any number of them).

        Raises:
            CorruptCheckpointError: The file ends before the buffers are full.
        """

    def read_direct(self, offset: int, buffer: memoryview) -> None:
        """As `read_into`, round the page cache where that is possible.

        `offset`, the buffer's length and its address are multiples of `ALIGNMENT`; the read may
        reach past the end of the file, what the buffer holds beyond it is arbitrary.
        """

    def cached(self, offset: int, length: int) -> bool:
        """Whether most of this range seems to be in memory already (a sample, never a read)."""

    def map(self) -> memoryview | None:
        """The whole file mapped privately (writes stay in this process), or None if it cannot be.

        The mapping lives as long as any view of it, also after `close`.
        """

    def close(self) -> None:
        """Release the descriptor; idempotent."""


class Folder(Protocol):
    """An open folder: what is opened through it stays in it, whatever happens to its path."""

    path: str

    def names(self) -> list[str]:
        """The names of its entries as they are now, also of those made since it was opened; sorted."""

    def stat(self, name: str) -> Stat | None:
        """What `name` (a relative path of plain components) is, or None when it is not there."""

    def read(self, name: str, limit: int) -> bytes:
        """The whole of a small file.

        Raises:
            EntryNotFoundError: It is not there.
            CorruptCheckpointError: It is longer than `limit` bytes, or no regular file.
        """

    def open(self, name: str) -> OpenFile:
        """Open a regular file for reading; symbolic links are refused in every component.

        Raises:
            EntryNotFoundError: It is not there.
            CorruptCheckpointError: It is a link, a folder or a device, or the name leaves the folder.
        """

    def close(self) -> None:
        """Release the descriptor; files opened through it stay open. Idempotent."""


class Lock(Protocol):
    """Held until `release`, or until the process dies."""

    def release(self) -> None:
        """Give the lock up; idempotent."""


class Storage(Protocol):
    """A place where checkpoints live. Instances are cheap, comparable and picklable."""

    def create(self, path: str, *, direct: bool = False) -> NewFile:
        """Create a file that does not exist yet (EntryExistsError if it does).

        With `direct`, writes go round the page cache where the file system allows it.
        """

    def open_folder(self, path: str) -> Folder:
        """Open an existing folder; the last component may not be a symbolic link.

        Raises:
            EntryNotFoundError: It is not there.
            StorageError: It is something else (``errno.ENOTDIR``).
        """

    def stat(self, path: str) -> Stat | None:
        """What is at `path`, or None."""

    def make_folder(self, path: str, *, private: bool = False) -> None:
        """Create one folder, with mode 0700 if `private` (EntryExistsError if it does)."""

    def make_public(self, path: str) -> None:
        """Give a private folder the mode that a new folder would have had.

        Where modes cannot be changed it stays private, and the log says so.
        """

    def rename(self, source: str, target: str, mode: RenameMode) -> None:
        """Rename atomically.

        "create": EntryExistsError if `target` exists. "replace": a file there is
        replaced. "exchange": both must exist and swap places; ``errno.EOPNOTSUPP`` where the file
        system cannot.
        """

    def remove(self, path: str) -> None:
        """Remove a file or an empty folder."""

    def sync_folder(self, path: str) -> None:
        """Returns when the names in this folder are durable."""

    def sync_file(self, path: str) -> None:
        """Returns when the bytes of an existing file are durable, even if another process wrote them."""

    def is_network(self, path: str) -> bool:
        """Whether locks that other hosts hold in this folder may not show here.

        What a dead save left there is then cleared only after a day.
        """

    def lock(self, path: str, *, exclusive: bool = False) -> Lock | None:
        """Take a lock on an existing file without waiting; None if somebody else's stands against it."""


ALIGNMENT = 4096
"""Bytes to which direct writes and reads are aligned."""


def default_storage() -> Storage:
    """The storage that is used where none is given: the local file system."""
    from milepost.storage.local import LocalStorage

    return LocalStorage()
