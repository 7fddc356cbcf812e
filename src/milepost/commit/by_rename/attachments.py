"""The files that hooks add to a checkpoint while it is made."""

from __future__ import annotations

# Paths are str, here as in the storage package.
import os
from contextlib import suppress

from milepost.commit.contents import file_digest, list_names
from milepost.errors import CommitError, EntryNotFoundError
from milepost.format.index import FileDigest
from milepost.format.names import SHARDS_NAME, data_rank, index_rank, is_own, is_plain_name
from milepost.storage import Folder, Storage

__all__ = ["collect"]


def collect(storage: Storage, root: Folder, path: str, world_size: int) -> list[FileDigest]:
    """Hash the files below a folder that hooks have added, and make them durable.

    Other ranks' hooks may be at work there: a file that vanishes meanwhile was a temporary file of theirs.

    Args:
        storage: Where.
        root: The attempt's folder.
        path: Its path.
        world_size: How many ranks there are.

    Raises:
        CommitError: A hook added something that a checkpoint cannot hold, or used a name of ours.
    """
    found: list[FileDigest] = []
    names = [name for name in list_names(root) if not _is_ours(name, world_size)]
    _collect(storage, root, path, names, found)
    return found


def _collect(storage: Storage, root: Folder, path: str, names: list[str], found: list[FileDigest]) -> None:
    for name in names:
        stat = root.stat(name)
        if stat is None:
            continue
        inner = os.path.join(path, name)
        if stat.kind == "folder":
            folder = storage.open_folder(inner)
            try:
                below = [f"{name}/{entry}" for entry in list_names(folder)]
            finally:
                folder.close()
            _collect(storage, root, path, below, found)
            if below:
                storage.sync_folder(inner)
        elif stat.kind == "file" and is_plain_name(name) and name.isprintable():
            with suppress(EntryNotFoundError):
                storage.sync_file(inner)
                found.append(file_digest(root, name))
        else:
            what = {"symlink": "a symbolic link", "other": "a device"}.get(stat.kind, "no valid name")
            raise _refused(f"{name!r}, which is {what}", "add a copy, as a plain file")


def _is_ours(name: str, world_size: int) -> bool:
    rank = data_rank(name)
    rank = index_rank(name) if rank is None else rank
    if (rank is not None and rank >= world_size) or name == SHARDS_NAME:
        raise _refused(f"{name!r}, a name that Milepost uses for its own files", "give the file another name")
    return rank is not None or is_own(name)


def _refused(what: str, hint: str) -> CommitError:
    return CommitError(f"pre_commit added {what}", phase="pre_commit", hint=hint)
