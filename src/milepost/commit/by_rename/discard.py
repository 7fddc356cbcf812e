"""Removing a checkpoint because somebody asks for it, never because of what it holds."""

from __future__ import annotations

# Paths are str, here as in the storage package.
import os
from collections.abc import Iterator
from contextlib import suppress

from milepost.commit.by_rename.folders import names_of
from milepost.commit.by_rename.recover import clean_up, roll_forward
from milepost.commit.by_rename.removal import remove_entry
from milepost.commit.contents import list_names, read_manifest
from milepost.commit.ids import new_attempt_id
from milepost.errors import CheckpointNotFoundError, EntryNotFoundError, LoadError, TargetError
from milepost.format.names import (
    MANIFEST_NAME,
    REMOVED,
    SHARDS_NAME,
    data_rank,
    index_rank,
    is_own,
    join_hidden,
)
from milepost.storage import Storage

__all__ = ["check_discardable", "discard"]


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
    aside = join_hidden(path, new_attempt_id(), REMOVED)
    try:
        storage.rename(path, aside, "create")
    except EntryNotFoundError as error:
        raise CheckpointNotFoundError(f"somebody else has removed it: {path}", path=path) from error
    storage.sync_folder(os.path.dirname(path))
    remove_entry(storage, aside)


def _is_part(name: str) -> bool:
    return data_rank(name) is not None or index_rank(name) is not None or name == SHARDS_NAME


def _files(storage: Storage, path: str, prefix: str = "") -> Iterator[str]:
    """All files in a folder and its folders, by their relative names."""
    for name in names_of(storage, os.path.join(path, prefix)) or ():
        entry = storage.stat(os.path.join(path, prefix, name))
        if entry is not None and entry.kind == "folder":
            yield from _files(storage, path, f"{prefix}{name}/")
        else:
            yield prefix + name
