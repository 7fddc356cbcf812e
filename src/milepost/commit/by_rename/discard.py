"""Removing a checkpoint because somebody asks for it, never because of what it holds."""

from __future__ import annotations

# Paths are str, here as in the storage package.
import os
from collections.abc import Iterator
from contextlib import suppress

from milepost.commit.by_rename.folders import names_of, opened
from milepost.commit.by_rename.recover import clean_up, roll_forward
from milepost.commit.by_rename.removal import remove_entry
from milepost.commit.contents import list_names, read_manifest
from milepost.commit.ids import new_attempt_id
from milepost.errors import (
    CheckpointNotFoundError,
    EntryNotFoundError,
    LoadError,
    MilepostError,
    TargetError,
)
from milepost.format.names import (
    MANIFEST_NAME,
    REMOVED,
    REPLACED,
    SHARDS_NAME,
    data_rank,
    index_rank,
    is_own,
    join_hidden,
    removed_stem,
)
from milepost.storage import Folder, Storage

__all__ = ["check_discardable", "discard", "discard_emptied", "is_emptied", "is_rest", "remove_rest"]


def check_discardable(storage: Storage, path: str) -> None:
    """Check that `discard` may remove what is at a path: a checkpoint, whole or not, and nothing else.

    Args:
        storage: Where.
        path: The absolute path of the checkpoint.

    Raises:
        CheckpointNotFoundError: There is no checkpoint, and no part of one.
        TargetError: It is a link, or holds entries that are not the checkpoint's; nothing was touched.
    """
    found = storage.stat(path)
    if found is not None and found.kind == "symlink":
        raise TargetError(
            f"this is a symbolic link, not a checkpoint: {path}",
            path=path,
            hint=f"give the folder that it points to: {os.path.realpath(path)}",
        )
    if found is None or found.kind != "folder":
        raise CheckpointNotFoundError(f"there is no checkpoint at this path: {path}", path=path)
    folder = storage.open_folder(path)
    try:
        names = list_names(folder)
        ours = {name for name in names if name == MANIFEST_NAME or _is_part(name)}
        if not ours:
            raise CheckpointNotFoundError(f"there is no checkpoint in this folder: {path}", path=path)
        with suppress(LoadError):
            manifest = read_manifest(folder)
            ours |= manifest.names() if manifest is not None else set()
        others = [name for name in _files(storage, path) if name not in ours and not is_own(name)]
    finally:
        folder.close()
    if others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        raise TargetError(
            f"the folder holds files that are not the checkpoint's ({', '.join(others[:5])}{more}): {path}",
            path=path,
            hint="move them away, or delete the folder yourself",
        )


def discard(storage: Storage, path: str) -> None:
    """Remove the checkpoint at a path; on return its end is durable, and `load` finds none there.

    The folder is renamed first. If this dies in the middle, the rest is no checkpoint any more, and
    `milepost doctor --repair` removes it. Dead saves to the path are finished or cleared before.

    Args:
        storage: Where.
        path: As for `check_discardable`, which is called.

    Raises:
        CheckpointNotFoundError: As for `check_discardable`.
        TargetError: As for `check_discardable`.
        StorageError: Something could not be removed.
    """
    with suppress(LoadError, TargetError):  # what cannot be read is to go anyway
        roll_forward(storage, path)
        clean_up(storage, path)
    check_discardable(storage, path)
    _remove(storage, path, path)


def discard_emptied(storage: Storage, path: str) -> bool:
    """Remove the checkpoint at a path if none of its data files is there; False if one is.

    It is set aside as a replaced checkpoint first. So if a save publishes a whole one at the path just now,
    recovery puts that back, even if this process dies.

    Args:
        storage: Where.
        path: As for `check_discardable`, which is called.

    Raises:
        MilepostError: As for `discard`.
    """
    check_discardable(storage, path)
    aside = join_hidden(path, new_attempt_id(), REPLACED)
    storage.rename(path, aside, "create")
    with opened(storage, aside) as folder:
        if folder is None or not is_emptied(folder):
            roll_forward(storage, path)
            return False
    _remove(storage, aside, path)
    return True


def is_emptied(folder: Folder) -> bool:
    """Whether a checkpoint's folder has a manifest that can be read, and no data file."""
    with suppress(LoadError):
        return read_manifest(folder) is not None and not any(map(_is_data, list_names(folder)))
    return False


def is_rest(storage: Storage, path: str) -> bool:
    """Whether a folder is what is left of one that `discard` renamed. Its content must say so as well."""
    if removed_stem(os.path.basename(path)) is None:
        return False
    names = names_of(storage, path)
    with suppress(MilepostError):
        if names:
            check_discardable(storage, path)
        return names is not None
    return False


def remove_rest(storage: Storage, path: str) -> None:
    """Remove a folder that `discard` renamed, the manifest last: it says which files are the checkpoint's."""
    for name in sorted(names_of(storage, path) or (), key=MANIFEST_NAME.__eq__):
        remove_entry(storage, os.path.join(path, name))
    remove_entry(storage, path)


def _remove(storage: Storage, place: str, path: str) -> None:
    """Remove the folder at `place`, the checkpoint of `path`."""
    aside = join_hidden(path, new_attempt_id(), REMOVED)
    try:
        storage.rename(place, aside, "create")
    except EntryNotFoundError as error:
        raise CheckpointNotFoundError(f"somebody else has removed it: {path}", path=path) from error
    storage.sync_folder(os.path.dirname(path))
    remove_rest(storage, aside)


def _is_data(name: str) -> bool:
    return data_rank(name) is not None


def _is_part(name: str) -> bool:
    return _is_data(name) or index_rank(name) is not None or name == SHARDS_NAME


def _files(storage: Storage, path: str, prefix: str = "") -> Iterator[str]:
    """All files in a folder and its folders, by their relative names."""
    for name in names_of(storage, os.path.join(path, prefix)) or ():
        entry = storage.stat(os.path.join(path, prefix, name))
        if entry is not None and entry.kind == "folder":
            yield from _files(storage, path, f"{prefix}{name}/")
        else:
            yield prefix + name
