"""Check which paths a save may replace; move a committed checkpoint to its path.

In a published folder Milepost deletes only the files that its manifest lists, the plain
``checkpoint_<n>.pt`` files that a save replaces, and its own temporary files. Everything else belongs to the
user and moves into the new checkpoint.
"""

# Paths are str, here as in the storage package.
from __future__ import annotations

import errno
import logging
import os
from contextlib import suppress
from typing import Literal

import msgspec

from milepost.commit.by_rename.folders import absolute_path, names_of, published_manifest
from milepost.commit.by_rename.removal import remove_file, remove_if_empty, sweep
from milepost.commit.contents import list_names, read_manifest
from milepost.errors import (
    CorruptCheckpointError,
    EntryExistsError,
    EntryNotFoundError,
    LoadError,
    MilepostError,
    StorageError,
    TargetError,
)
from milepost.format.manifest import Manifest
from milepost.format.names import MANIFEST_NAME, REPLACED, data_rank, index_rank, is_own, join_hidden
from milepost.storage import Folder, Storage

__all__ = ["Target", "check_target", "is_pending", "publish", "retire"]

_logger = logging.getLogger(__name__)
_TRIES = 50


# ---------------------------------------------------------------------------- the target


class Target(msgspec.Struct, frozen=True):
    """Where a save goes.

    Attributes:
        path: The absolute path of the checkpoint.
        replaces: What is there now: "nothing", an "empty" folder, a "checkpoint", or a folder of "plain"
            ``checkpoint_<n>.pt`` files.
    """

    path: str
    replaces: Literal["nothing", "empty", "checkpoint", "plain"]


def check_target(storage: Storage, path: str | os.PathLike[str]) -> Target:
    """Check that a save may create or replace `path`; nothing is touched.

    A relative path means the folder at the time of this call. Missing parents are created later.

    Raises:
        TargetError: It may not; the hint says what to do.
    """
    absolute = absolute_path(path)
    try:
        target = Target(absolute, _what_is_at(storage, absolute))
        _check_parents(storage, absolute)
    except StorageError as error:
        raise TargetError(
            f"cannot save to {absolute}: {error.message}",
            path=absolute,
            phase="check",
            hint=error.hint or "save to another path",
        ) from error
    return target


def _what_is_at(storage: Storage, path: str) -> Literal["nothing", "empty", "checkpoint", "plain"]:
    found = storage.stat(path)
    if found is None:
        return "nothing"
    if found.kind != "folder":
        kind = {"symlink": "a symbolic link", "file": "a file"}.get(found.kind, "not a folder")
        way_out = (
            "save to the folder that it points to" if found.kind == "symlink" else "save to another path"
        )
        raise TargetError(
            f"a checkpoint is a folder, but this is {kind}: {path}",
            path=path,
            phase="check",
            hint=way_out,
        )
    if found.mount_point:
        raise TargetError(
            f"a mount point cannot be replaced by a checkpoint: {path}",
            path=path,
            phase="check",
            hint=f"save to a folder in it, such as {os.path.join(path, 'checkpoint')}",
        )
    if not found.writable:
        raise TargetError(
            f"the checkpoint there is read-only: {path}",
            path=path,
            phase="check",
            hint="save to another path, or make the folder writable",
        )
    for _ in range(3):
        with suppress(
            TargetError, EntryNotFoundError
        ):  # a folder that is being replaced may look like anything
            return _content(storage, path)
        if storage.stat(path) is None:
            return "nothing"
    return _content(storage, path)


def _content(storage: Storage, path: str) -> Literal["empty", "checkpoint", "plain"]:
    folder = storage.open_folder(path)
    try:
        names = folder.names()
        if MANIFEST_NAME in names:
            try:
                read_manifest(folder)
            except LoadError as error:
                raise TargetError(
                    f"the checkpoint there has a manifest that cannot be read, so it is not replaced: {path}",
                    path=path,
                    phase="check",
                    hint="look at it with `milepost verify`, and move or delete the folder yourself",
                ) from error
            return "checkpoint"
        names = [name for name in names if not is_own(name)]
        strangers = [name for name in names if data_rank(name) is None or _kind(folder, name) != "file"]
    finally:
        folder.close()
    if strangers:
        more = f" and {len(strangers) - 5} more" if len(strangers) > 5 else ""
        raise TargetError(
            f"the folder holds files that are no checkpoint ({', '.join(strangers[:5])}{more}): {path}",
            path=path,
            phase="check",
            hint=f"save to a folder in it, such as {os.path.join(path, 'checkpoint')}, or move them away",
        )
    return "plain" if names else "empty"


def _kind(folder: Folder, name: str) -> str:
    found = folder.stat(name)
    return found.kind if found else "file"


def _check_parents(storage: Storage, path: str) -> None:
    """The nearest existing folder above must be one, and writable."""
    above = os.path.dirname(path)
    found = storage.stat(above)
    while found is None and os.path.dirname(above) != above:
        above = os.path.dirname(above)
        found = storage.stat(above)
    if found is not None and found.kind == "symlink":
        found = storage.stat(os.path.join(above, "."))
    if found is None or found.kind != "folder":
        raise TargetError(
            f"this is not a folder, so no checkpoint can be made in it: {above}",
            path=path,
            phase="check",
            hint="save to another path",
        )
    if not found.writable:
        raise TargetError(
            f"no checkpoint can be made here, as the folder above is not writable: {above}",
            path=path,
            phase="check",
            hint="check its permissions and whether its file system is mounted read-only, or save to "
            "another path",
        )


# ---------------------------------------------------------------------------- publishing


def publish(storage: Storage, path: str, manifest: Manifest) -> None:
    """Move a committed attempt, whose manifest is durable, to its path; on return that is durable.

    Then clear the checkpoint that it replaces: the user's entries move into the new folder, and the files
    that the old manifest lists are removed. If only the clearing fails, the log says so, and the next save
    does it.

    Raises:
        TargetError: Something that may not be replaced has appeared at `path`. The attempt stays beside
            it, committed: `locate` finds it, and the next save publishes it when the way is free.
        StorageError: Neither the attempt nor a later checkpoint is seen at the path or beside it.
    """
    attempt = manifest.attempt
    if not _move_in(storage, path, manifest):
        return
    storage.sync_folder(os.path.dirname(path))
    try:
        retire(storage, path, join_hidden(path, attempt, REPLACED), attempt)
        sweep(storage, path)
    except MilepostError as error:
        _logger.warning("the checkpoint is saved, but clearing what it replaces failed: %s", error)


def _move_in(storage: Storage, path: str, manifest: Manifest) -> bool:
    """Do the renames; False if another process has published this attempt or a later one."""
    attempt = manifest.attempt
    partial, slot = join_hidden(path, attempt), join_hidden(path, attempt, REPLACED)
    overtaken = False
    for _ in range(_TRIES):
        source = next((place for place in (partial, slot) if _holds(storage, place, attempt)), None)
        there = published_manifest(storage, path)
        if source is None:
            if overtaken or (there and (there.attempt == attempt or there.order >= manifest.order)):
                return False
            continue  # it has been moved between the looks
        try:
            if there is not None and there.sequence > manifest.sequence > 0:
                # A later save is there already, as when writers of a dead start commit late.
                overtaken = True
                gone = [retire(storage, path, place, None) for place in (partial, slot)]
                if all(gone):
                    return False
                continue  # the path is empty for a moment, as the later one is moved in
            free = storage.stat(path) is None
            # Where no rename refuses a taken name, one that ended halfway leaves an empty folder.
            if free or (_what_is_at(storage, path) == "empty" and remove_if_empty(storage, path)):
                storage.rename(source, path, "create")
                return True
            if source == partial:
                # Slow ranks may still write to the partial's path: the old folder must not get that name.
                if storage.stat(slot) is not None:
                    retire(storage, path, slot, attempt)
                storage.rename(partial, slot, "create")
            _exchange(storage, path, partial, slot)
        except (EntryExistsError, EntryNotFoundError):
            continue  # another saver moved something: look again
        return True
    raise StorageError(
        f"the checkpoint is committed, but not seen, or others replace this path all the time: {path}",
        path=path,
        operation="publish",
        hint=f"look for it with `milepost doctor {path}`; the next save to the path publishes it",
    )


def _exchange(storage: Storage, path: str, partial: str, slot: str) -> None:
    """Swap the new checkpoint (in `slot`) with the one at `path`."""
    try:
        storage.rename(slot, path, "exchange")
    except StorageError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        # Until the last rename nothing is at the path, but `locate` finds the new checkpoint.
        # Each must be durable before the next: else a power cut could give a folder the name of another.
        parent = os.path.dirname(path)
        remove_if_empty(storage, partial)  # of a rename that ended halfway
        storage.rename(slot, partial, "create")
        storage.sync_folder(parent)
        storage.rename(path, slot, "create")
        storage.sync_folder(parent)
        storage.rename(partial, path, "create")


def is_pending(storage: Storage, path: str, attempt: str) -> bool:
    """Whether a committed attempt may still be in a hidden folder, or on its way between two."""
    partial, slot = join_hidden(path, attempt), join_hidden(path, attempt, REPLACED)
    with suppress(LoadError, StorageError):
        return any(_holds(storage, place, attempt) for place in (partial, slot, partial))
    return True


def _holds(storage: Storage, place: str, attempt: str) -> bool:
    found = published_manifest(storage, place)
    return found is not None and found.attempt == attempt


# ---------------------------------------------------------------------------- what was replaced


def retire(storage: Storage, path: str, hidden: str, attempt: str | None) -> bool:
    """Clear a hidden folder that holds what a save replaced at `path`; True if it is gone.

    Entries that its manifest does not list move into the checkpoint at `path`, then the listed files are
    removed, the manifest last, so that every part of this can be taken up again. Any number of processes
    may do it at once. Nothing happens where there is no checkpoint at `path`, or if the folder holds
    the checkpoint of `attempt` itself.
    """
    for _ in range(_TRIES):
        try:
            folder = storage.open_folder(hidden)
        except EntryNotFoundError:
            return True
        try:
            manifest = read_manifest(folder)
            if manifest is not None and manifest.attempt == attempt:
                return False
            if published_manifest(storage, path) is None:
                return False
            names = list_names(folder)
            listed = manifest.names() if manifest else {name for name in names if _is_plain(name)}
            _move_unlisted(storage, hidden, path, "", listed)
            _remove_listed(storage, folder, hidden, listed | {name for name in names if is_own(name)})
        except CorruptCheckpointError:
            return False
        except EntryNotFoundError:  # somebody clears it too, or replaces the checkpoint at the path
            continue
        finally:
            folder.close()
        if remove_if_empty(storage, hidden):
            return True
    return False


def _is_plain(name: str) -> bool:
    """An index without its manifest: a clearing that a power cut undid in part."""
    return data_rank(name) is not None or index_rank(name) is not None


def _move_unlisted(storage: Storage, source: str, target: str, prefix: str, listed: set[str]) -> None:
    moved = False
    for name in names_of(storage, source) or ():
        inner = prefix + name
        if inner in listed or (not prefix and is_own(name)):
            continue
        old = os.path.join(source, name)
        found = storage.stat(old)
        if found is None:
            continue
        if found.kind == "folder" and any(entry.startswith(f"{inner}/") for entry in listed):
            if names_of(storage, old):
                new = os.path.join(target, name)
                if _has_unlisted(storage, old, f"{inner}/", listed):
                    with suppress(EntryExistsError):
                        storage.make_folder(new)
                        moved = True
                    _move_unlisted(storage, old, new, f"{inner}/", listed)
            continue
        _move_beside(storage, old, target, name)
        moved = True
    if moved:
        # The user's entries must be durable in their new place before anything of the old is removed.
        storage.sync_folder(target)
        storage.sync_folder(source)


def _has_unlisted(storage: Storage, folder: str, prefix: str, listed: set[str]) -> bool:
    return any(prefix + name not in listed for name in names_of(storage, folder) or ())


def _move_beside(storage: Storage, old: str, folder: str, name: str) -> None:
    """Move an entry into a folder, under a name of its own if there is one of that name."""
    for number in range(1000):
        new = os.path.join(folder, f"{name}.{number}" if number else name)
        try:
            if _is_folder(storage, old) and _is_folder(storage, new):
                remove_if_empty(storage, new)  # as a rename that ended halfway leaves it
            storage.rename(old, new, "create")
        except EntryExistsError:
            continue
        if number:
            _logger.warning("%s was in the replaced checkpoint as well: it is now %s", name, new)
        return
    raise StorageError(f"there are too many entries of this name: {name}", path=folder, operation="rename")


def _remove_listed(storage: Storage, folder: Folder, path: str, names: set[str]) -> None:
    """Remove files by their relative names, the manifest last, and the folders that they leave empty."""
    inner = set()
    for name in sorted(names - {MANIFEST_NAME}):
        with suppress(CorruptCheckpointError):  # a link on the way: not ours
            found = folder.stat(name)
            if found is not None and found.kind == "file":
                remove_file(storage, os.path.join(path, name))
            parts = name.split("/")[:-1]
            inner |= {"/".join(parts[: depth + 1]) for depth in range(len(parts))}
    for name in sorted(inner, key=len, reverse=True):
        with suppress(CorruptCheckpointError, EntryNotFoundError):
            found = folder.stat(name)
            if found is not None and found.kind == "folder":
                # If this fails, the manifest is there still: the folder is known to be ours.
                remove_if_empty(storage, os.path.join(path, name))
    remove_file(storage, os.path.join(path, MANIFEST_NAME))


def _is_folder(storage: Storage, path: str) -> bool:
    found = storage.stat(path)
    return found is not None and found.kind == "folder"
