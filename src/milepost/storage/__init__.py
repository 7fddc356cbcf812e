"""The interface of a storage, where Milepost keeps checkpoints.

A `Storage` has the operations of a file system that a crash-safe commit needs. Paths are absolute ``str``.
`milepost.storage.local` is the local file system. `milepost.testing` has a wrapper whose operations fail.

Every failed operation raises `StorageError`. It is also an ``OSError`` with the ``errno`` of the cause, and
names the operation and the path. No operation raises ``EINTR``; a short write is continued.
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
    """The file or folder at a path. Symbolic links are not followed.

    Attributes:
        kind: "file", "folder", "symlink" or "other".
        size_bytes: Length of a file in bytes; 0 for the rest.
        modified_seconds: Last modification, in seconds since the epoch.
        mount_point: Whether a folder is the root of a mounted file system.
        writable: Whether this process may create entries in it (folders) or write to it (files).

    Examples:
        >>> import os
        >>> from milepost.storage import default_storage
        >>> default_storage().stat(os.getcwd()).kind
        'folder'
    """

    kind: Literal["file", "folder", "symlink", "other"]
    size_bytes: int
    modified_seconds: float
    mount_point: bool
    writable: bool


class NewFile(Protocol):
    """A file being created. Exactly one of `finish` and `discard` must end it.

    Examples:
        >>> import os
        >>> from milepost.storage import default_storage
        >>> file = default_storage().create(os.path.abspath("file"))
        >>> file.write(0, memoryview(b"abc"))
        >>> file.finish(3)
    """

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of `data` (bytes, contiguous) at `offset`.

        For a file created with ``direct=True``, the offset is a multiple of `ALIGNMENT`. So is the length of
        every write except the one at the highest offset. Data whose address is also a multiple of it is
        written without a copy.
        """

    def finish(self, size: int, *, sync: bool = True) -> None:
        """Return when the file holds exactly `size` bytes and they are durable (fsync). Close it.

        With ``sync=False`` nothing is fsynced: for files that may be lost, such as beacons.
        If this raises, the file has been removed, because its bytes are not trusted after a failed fsync.
        """

    def discard(self) -> None:
        """Close and remove the file. Never raises. Does nothing after `finish`."""


class OpenFile(Protocol):
    """A file open for reading. It stays readable when it is renamed, replaced or removed.

    Examples:
        >>> import os
        >>> from milepost.storage import default_storage
        >>> storage, here = default_storage(), os.getcwd()
        >>> storage.create(f"{here}/file").finish(3)
        >>> folder = storage.open_folder(here)
        >>> file, buffer = folder.open("file"), bytearray(3)
        >>> file.read_into(0, [memoryview(buffer)])
        >>> file.close(), folder.close()
        (None, None)
    """

    path: str
    size: int

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill `buffers` (any number) one after the other with the bytes from `offset` on.

        Raises:
            CorruptCheckpointError: The file ends before the buffers are full.
        """

    def read_direct(self, offset: int, buffer: memoryview) -> None:
        """Read like `read_into`, and bypass the page cache if possible.

        `offset`, the buffer's length and its address are multiples of `ALIGNMENT`. The read may reach past
        the end of the file. The buffer's bytes after the end are arbitrary.
        """

    def cached(self, offset: int, length: int) -> bool:
        """Return whether most of this range seems to be in memory (a sample, never a read)."""

    def map(self) -> memoryview | None:
        """Map the whole file privately (writes stay in this process). None if that is not possible.

        The mapping exists as long as any view of it, also after `close`.
        """

    def close(self) -> None:
        """Release the descriptor; idempotent."""


class Folder(Protocol):
    """An open folder. Files are opened in this folder, even if its path now leads to another one.

    Examples:
        >>> import os
        >>> from milepost.storage import default_storage
        >>> folder = default_storage().open_folder(os.getcwd())
        >>> folder.names()
        []
        >>> folder.close()
    """

    path: str

    def names(self) -> list[str]:
        """Return the sorted names of its entries at this moment."""

    def stat(self, name: str) -> Stat | None:
        """Look at `name` (a relative path of plain components). None if it does not exist."""

    def read(self, name: str, limit: int) -> bytes:
        """Return all bytes of a small file.

        Raises:
            EntryNotFoundError: It does not exist.
            CorruptCheckpointError: It is longer than `limit` bytes, or not a regular file.
        """

    def open(self, name: str) -> OpenFile:
        """Open a regular file for reading. Symbolic links are refused in every component.

        Raises:
            EntryNotFoundError: It does not exist.
            CorruptCheckpointError: It is a link, a folder or a device, or the name leaves the folder.
        """

    def close(self) -> None:
        """Release the descriptor. Files opened through it stay open. Idempotent."""


class Lock(Protocol):
    """A lock. It is held until `release`, or until the process dies.

    Examples:
        >>> import os
        >>> from milepost.storage import default_storage
        >>> storage, path = default_storage(), os.path.abspath("file")
        >>> storage.create(path).finish(0)
        >>> lock = storage.lock(path, exclusive=True)
        >>> storage.lock(path) is None
        True
        >>> lock.release()
    """

    def release(self) -> None:
        """Release the lock. Idempotent."""


class Storage(Protocol):
    """A place where checkpoints are stored. Instances are cheap, comparable and picklable.

    Examples:
        >>> import os
        >>> from milepost.storage import default_storage
        >>> storage, run = default_storage(), os.path.abspath("run")
        >>> storage.make_folder(run)
        >>> storage.rename(run, f"{run}-1", "create")
        >>> storage.stat(run) is None
        True
    """

    def create(self, path: str, *, direct: bool = False) -> NewFile:
        """Create a file. EntryExistsError if it exists.

        With `direct`, writes bypass the page cache if the file system allows it.
        """

    def open_folder(self, path: str) -> Folder:
        """Open an existing folder. The last component may not be a symbolic link.

        Raises:
            EntryNotFoundError: It does not exist.
            StorageError: It is not a folder (``errno.ENOTDIR``).
        """

    def stat(self, path: str) -> Stat | None:
        """Look at `path`. None if it does not exist."""

    def make_folder(self, path: str, *, private: bool = False) -> None:
        """Create one folder, with mode 0700 if `private`. EntryExistsError if it exists."""

    def make_public(self, path: str) -> None:
        """Give a private folder the mode of a new folder.

        If the file system cannot change modes, the folder stays private, and the log says so.
        """

    def rename(self, source: str, target: str, mode: RenameMode) -> None:
        """Rename atomically.

        "create": EntryExistsError if `target` exists. "replace": replaces a file at `target`. "exchange":
        both must exist and swap places; ``errno.EOPNOTSUPP`` if the file system cannot do this.
        """

    def remove(self, path: str) -> None:
        """Remove a file or an empty folder."""

    def sync_folder(self, path: str) -> None:
        """Return when the names in this folder are durable."""

    def sync_file(self, path: str) -> None:
        """Return when the bytes of an existing file are durable, even if another process wrote them."""

    def is_network(self, path: str) -> bool:
        """Return whether locks of other hosts in this folder may be invisible here.

        The files of a dead save are then removed only after a day.
        """

    def lock(self, path: str, *, exclusive: bool = False) -> Lock | None:
        """Lock an existing file without waiting. None if another lock conflicts with it."""


ALIGNMENT = 4096
"""Bytes to which direct writes and reads are aligned."""


def default_storage() -> Storage:
    """Return the default storage: the local file system.

    Examples:
        >>> from milepost.storage import default_storage
        >>> default_storage() == default_storage()
        True
    """
    from milepost.storage.local import LocalStorage

    return LocalStorage()
