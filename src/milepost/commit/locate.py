"""Finding checkpoints: the one to load at a path, and all that lie in a folder."""

# Paths are str, here as in the storage package.
from __future__ import annotations

import errno
import logging
import os
import time
from contextlib import suppress

import msgspec

from milepost.commit.folders import (
    Hidden,
    absolute_path,
    list_names,
    names_of,
    open_if_there,
    opened,
    published_manifest,
    read_manifest,
    siblings,
)
from milepost.commit.marks import checked_manifest, missing_files
from milepost.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    EntryNotFoundError,
    IncompleteCheckpointError,
    LoadError,
    StorageError,
)
from milepost.format.image import IDENTITY_ENTRY
from milepost.format.manifest import Manifest, identity_of
from milepost.format.names import MANIFEST_NAME, NOTE_NAME, data_rank, index_rank, looks_hidden, shown
from milepost.storage import Folder, Storage

__all__ = ["VISIBLE_SECONDS", "Located", "expect", "has_identity", "is_at_least", "locate"]

VISIBLE_SECONDS = 60.0
"""How long a file system may take to show this host what another one has committed."""

_expected: dict[str, str] = {}
"""Paths at which another host has committed a checkpoint that is not seen here yet, and what that is."""

_logger = logging.getLogger(__name__)
_TRIES = 20
_TAIL_BYTES = 1 << 16
_LOOK_SECONDS = 0.5
_MANY_RANKS = 64
"""With more ranks than these nobody looks at every file's size: each checks those that it reads."""


class Located(msgspec.Struct, frozen=True):
    """What `locate` found. The caller closes `folder`.

    Attributes:
        folder: The open folder; what is opened through it is this checkpoint's, whatever replaces it.
        manifest: Its manifest, with which the presence and size of all files were compared; None for a folder
            of plain ``checkpoint_<n>.pt`` files.
        path: Where the folder is.
        in_place: It is complete, but was not published yet.
    """

    folder: Folder
    manifest: Manifest | None
    path: str
    in_place: bool

    @property
    def identity(self) -> str:
        """What no other checkpoint has: the SHA-256 of the manifest's file; for plain files, the path."""
        if self.manifest is None:
            return self.path
        return identity_of(self.manifest)


def locate(storage: Storage, path: str | os.PathLike[str]) -> Located:
    """Open what `load` of this path reads: the newest complete checkpoint there.

    That is the folder itself, or a complete attempt beside it that was left unpublished. All files that
    the manifest lists are there (with their sizes, unless very many ranks saved it). When a later save
    replaces the folder while its files are being opened, they may be gone: then call this again.

    Raises:
        CheckpointNotFoundError: There is none, and the nearest ones are named; or this is no path.
        IncompleteCheckpointError: The folder holds parts of a save that never committed.
        CorruptCheckpointError: The manifest is damaged, or files are not as it says.
        UnsupportedFormatError: It was written by a later Milepost.
    """
    path = absolute_path(path, CheckpointNotFoundError)
    deadline = time.monotonic() + VISIBLE_SECONDS
    while True:
        try:
            located = _locate_settled(storage, path)
        except (CheckpointNotFoundError, IncompleteCheckpointError, CorruptCheckpointError) as error:
            damaged = isinstance(error, CorruptCheckpointError) and time.monotonic() > deadline
            if path not in _expected or damaged:
                raise
        else:
            if path not in _expected or is_at_least(located.manifest, _expected[path]):
                _expected.pop(path, None)
                return located
            located.folder.close()
        if time.monotonic() > deadline:
            raise CheckpointNotFoundError(
                f"the ranks have committed a checkpoint here, but this host has not seen it within "
                f"{VISIBLE_SECONDS:g} s: {path}",
                path=path,
                hint="see that every rank's host shows the same folder; the file system may cache listings",
            )
        time.sleep(_LOOK_SECONDS)


def expect(path: str, identity: str) -> None:
    """A checkpoint has been committed at a path where this host does not show it: `locate` waits for it.

    Args:
        path: The absolute path of the checkpoint.
        identity: What `is_at_least` knows it by.
    """
    _expected[path] = identity


def is_at_least(manifest: Manifest | None, identity: str) -> bool:
    """Whether a manifest is the one with this identity, or that of a later save to its path.

    Args:
        manifest: What is seen.
        identity: The sequence and the SHA-256 of a manifest, as another rank gave them.
    """
    sequence, _, sha = identity.partition(":")
    if manifest is None:
        return False
    return manifest.sequence > int(sequence) or identity_of(manifest) == sha


def _locate_settled(storage: Storage, path: str) -> Located:
    """What is at a path; what a save changes meanwhile is looked at again."""
    before: object = None
    for _ in range(_TRIES):
        state: list[object] = []
        try:
            return _locate_once(storage, path, state)
        except (
            CorruptCheckpointError,
            IncompleteCheckpointError,
            CheckpointNotFoundError,
            EntryNotFoundError,
        ):
            # A save may be replacing the folder: what fails twice in the same way is so.
            if state == before:
                raise
            before = state
    return _locate_once(storage, path, [])


def _locate_once(storage: Storage, path: str, state: list[object]) -> Located:
    """One look. `state` collects what was seen, to tell whether something has changed since the last look."""
    found = storage.stat(path)
    if found is not None and found.kind == "symlink":
        path = os.path.realpath(path)
    waiting = _waiting(storage, path)
    try:
        try:
            published = _published(storage, path, state)
        except LoadError as error:
            there = None
            with suppress(CorruptCheckpointError):
                there = published_manifest(storage, path)
            if waiting is None or _is_older(waiting, there):
                raise
            if isinstance(error, CorruptCheckpointError):
                _logger.warning("loading the complete save beside a damaged checkpoint: %s", error)
            return waiting
    except BaseException:
        if waiting is not None:
            waiting.folder.close()
        raise
    if waiting is None:
        return published
    keep = _is_older(waiting, published.manifest)
    (waiting if keep else published).folder.close()
    return published if keep else waiting


def _is_older(waiting: Located, published: Manifest | None) -> bool:
    assert waiting.manifest is not None
    return published is not None and published.order >= waiting.manifest.order


def _waiting(storage: Storage, path: str) -> Located | None:
    """The newest complete attempt that is not published; where nothing is at the path, what was replaced."""
    best: Located | None = None
    for hidden in _siblings(storage, path):
        candidate = _open_hidden(storage, hidden, replaced=False)
        if candidate is None and storage.stat(path) is None:
            candidate = _open_hidden(storage, hidden, replaced=True)
        if candidate is None:
            continue
        if best is None or _preference(candidate) > _preference(best):
            best, candidate = candidate, best
        if candidate is not None:
            candidate.folder.close()
    return best


def _siblings(storage: Storage, path: str) -> list[Hidden]:
    """As `siblings`; none where this user may open what lies in the folder above, but not list it."""
    try:
        return siblings(storage, path)
    except StorageError as error:
        if error.errno != errno.EACCES:
            raise
        _logger.warning("cannot look for newer saves that were not published: %s", error)
        return []


def _preference(located: Located) -> tuple[bool, tuple[int, float], str]:
    manifest, hidden = located.manifest, looks_hidden(os.path.basename(located.path))
    assert manifest is not None
    return hidden is not None and hidden[1] == manifest.attempt, manifest.order, manifest.attempt


def _open_hidden(storage: Storage, hidden: Hidden, *, replaced: bool) -> Located | None:
    folder = open_if_there(storage, hidden.path)
    if folder is None:
        return None
    manifest = None
    try:
        attempt = hidden.attempt
        if replaced:
            with suppress(LoadError):
                old = read_manifest(folder)
                attempt = old.attempt if old else attempt
        manifest = checked_manifest(folder, attempt, list_names(folder), deep=True)
    finally:
        if manifest is None:
            folder.close()
    return Located(folder, manifest, hidden.path, in_place=True) if manifest else None


def _published(storage: Storage, path: str, state: list[object]) -> Located:
    try:
        folder = storage.open_folder(path)
    except EntryNotFoundError:
        raise _not_found(storage, path, f"there is no checkpoint at {path}") from None
    except StorageError as error:
        if error.errno != errno.ENOTDIR:
            raise
        raise _not_found(storage, path, f"a checkpoint is a folder, but this is a file: {path}") from None
    try:
        names = list_names(folder)
        state.append(names)
        manifest = read_manifest(folder)
        if manifest is None:
            _check_plain(storage, folder, path, names)
        else:
            state.append((manifest.attempt, manifest.order))
            problems = missing_files(folder, manifest, sizes=manifest.world_size <= _MANY_RANKS)
            if problems:
                more = f" and {len(problems) - 5} more problems" if len(problems) > 5 else ""
                raise CorruptCheckpointError(
                    f"the checkpoint is not what its manifest says: {', '.join(problems[:5])}{more}: {path}",
                    path=path,
                    hint="load another checkpoint; `milepost ls` on the folder above lists them",
                )
        return Located(folder, manifest, path, in_place=False)
    except BaseException:
        folder.close()
        raise


def _check_plain(storage: Storage, folder: Folder, path: str, names: list[str]) -> None:
    """Let a folder without a manifest pass only if its files are plain ones, not parts of a save of ours."""
    data = [name for name in names if data_rank(name) is not None]
    ours = [name for name in names if index_rank(name) is not None or name == NOTE_NAME]
    ours += [name for name in data if has_identity(folder, name)]
    if ours:
        raise IncompleteCheckpointError(
            f"this folder has no manifest, but {ours[0]} in it is part of a save: "
            f"the save never committed, or the manifest was removed: {path}",
            path=path,
            hint="load another checkpoint; `milepost ls` on the folder above lists them",
        )
    if not data:
        raise _not_found(storage, path, f"there is no checkpoint in this folder: {path}")


def has_identity(folder: Folder, name: str) -> bool:
    """Whether a data file has the record that tells our files from plain ones, near its end."""
    try:
        file = folder.open(name)
    except (CorruptCheckpointError, EntryNotFoundError):
        return False
    try:
        tail = bytearray(min(file.size, _TAIL_BYTES))
        file.read_into(file.size - len(tail), [memoryview(tail)])
    finally:
        file.close()
    return f"/{IDENTITY_ENTRY}".encode() in tail


def _not_found(storage: Storage, path: str, message: str) -> CheckpointNotFoundError:
    parent, name = os.path.split(path)
    above: list[str] | None = []
    with suppress(StorageError):  # it may be one that this user cannot list
        above = names_of(storage, parent)
    if above is None:
        return CheckpointNotFoundError(
            message, path=path, hint=f"the folder above does not exist: {parent}; check the path"
        )
    hints = []
    for hidden in _siblings(storage, path):
        with opened(storage, hidden.path) as folder:
            if folder is not None and folder.stat(NOTE_NAME) is not None:
                hints.append(f"a save to it was begun and has not committed: see `milepost doctor {path}`")
                break
    within = _checkpoints_in(storage, path, "")
    existing = within or _checkpoints_in(storage, parent, name)
    if existing:
        hints.append(f"existing checkpoints in {path if within else parent}: {', '.join(existing)}")
    return CheckpointNotFoundError(message, path=path, hint="; ".join(hints) or None)


def _checkpoints_in(storage: Storage, folder: str, name: str) -> list[str]:
    """Up to five checkpoints in a folder, those whose names are like `name` first."""
    try:
        entries = names_of(storage, folder) or []
    except StorageError:  # it is a file, or may not be looked into
        return []
    visible = {shown(entry): entry for entry in entries if not entry.startswith(".")}
    import difflib  # noqa: PLC0415 - a writer process never gets here

    near = difflib.get_close_matches(shown(name), visible, n=50, cutoff=0.5)
    near += [entry for entry in sorted(visible) if entry not in near]
    existing: list[str] = []
    for entry in near[:200]:
        if len(existing) < 5 and _is_checkpoint(storage, os.path.join(folder, visible[entry])):
            existing.append(entry)
    return existing


def _is_checkpoint(storage: Storage, path: str) -> bool:
    try:
        return storage.stat(os.path.join(path, MANIFEST_NAME)) is not None
    except StorageError:  # it is a file, or may not be looked into
        return False
