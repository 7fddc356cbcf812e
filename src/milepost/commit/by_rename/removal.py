"""Remove our temporary files and the folders of attempts."""

# Paths are str, here as in the storage package.
from __future__ import annotations

import errno
import os

from milepost.commit.by_rename.folders import names_of
from milepost.errors import EntryNotFoundError, StorageError
from milepost.format.names import MANIFEST_NAME, NOTE_NAME, index_rank, is_aborted, is_own
from milepost.storage import Lock, Storage

__all__ = ["remove_entry", "remove_file", "remove_if_empty", "remove_tree", "sweep"]

_ROUNDS = 5
_NOT_EMPTY = frozenset({errno.ENOTEMPTY, errno.EEXIST})
_GONE_SOON = frozenset({errno.ENOENT, errno.EBUSY})


def sweep(storage: Storage, path: str) -> None:
    """Remove our temporary files (attempt.json, beacons, abort marks) from a published checkpoint."""
    names = names_of(storage, path) or []
    if MANIFEST_NAME not in names:
        return
    for name in names:
        if is_own(name) and name != MANIFEST_NAME:
            remove_file(storage, os.path.join(path, name))


def remove_tree(storage: Storage, path: str, lock: Lock, *, word: bool = False) -> None:
    """Remove an attempt's folder with everything in it, and release the lock on its ``attempt.json``.

    With `word` the folder and the abort marks stay.

    The order matters: at no moment does the rest look like a whole checkpoint, or like nobody's folder. When
    ``attempt.json`` is gone, another saver may use the folder's name: its files stay.

    Raises:
        StorageError: Something could not be removed. It stays, with the ``attempt.json``.
    """
    for _ in range(_ROUNDS):
        names = [name for name in names_of(storage, path) or () if name != NOTE_NAME]
        names = [name for name in names if not (word and is_aborted([name]))]
        for name in sorted(names, key=_removal_order):
            remove_entry(storage, os.path.join(path, name))
        if not names:
            break
    else:
        raise StorageError(
            f"what is removed here comes back as {', '.join(names[:5])}: {path}",
            path=path,
            operation="remove",
            hint="end the processes that hold files in it open, then delete the folder",
        )
    if word:
        return
    remove_entry(storage, os.path.join(path, NOTE_NAME))
    lock.release()  # before the folder goes: NFS and FUSE keep a removed file that is open in it
    remove_if_empty(storage, path)


def _removal_order(name: str) -> int:
    if name == MANIFEST_NAME:
        return 0
    if index_rank(name) is not None:
        return 1
    return 3 if name.startswith("abort") else 2


def remove_entry(storage: Storage, path: str) -> None:
    """Remove a file, or a folder with everything in it; it may be gone already."""
    found = storage.stat(path)
    if found is None:
        return
    if found.kind == "folder":
        for name in names_of(storage, path) or ():
            remove_entry(storage, os.path.join(path, name))
    remove_file(storage, path)


def remove_if_empty(storage: Storage, path: str) -> bool:
    """Remove a folder that holds nothing; True if it is gone."""
    try:
        storage.remove(path)
    except EntryNotFoundError:
        return True
    except StorageError as error:
        if error.errno not in _NOT_EMPTY:
            raise
        return False
    return True


def remove_file(storage: Storage, path: str) -> None:
    """Remove a file or an empty folder, unless it is gone, or NFS keeps it while somebody has it open."""
    try:
        storage.remove(path)
    except StorageError as error:
        if error.errno not in _GONE_SOON:
            raise
