"""`locate` finds the checkpoint that `load` of a path reads."""

# Paths are str, here as in the storage package.
from __future__ import annotations

import errno
import logging
import os
import time
from contextlib import suppress

from milepost.commit.by_rename.folders import (
    Hidden,
    absolute_path,
    names_of,
    open_if_there,
    opened,
    published_manifest,
    siblings,
)
from milepost.commit.checkpoint import Checkpoint
from milepost.commit.contents import list_names, read_manifest
from milepost.commit.judge import classify, is_overtaken, is_whole
from milepost.commit.marks import missing_files
from milepost.commit.waiting import VISIBLE_SECONDS, is_at_least
from milepost.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    EntryNotFoundError,
    IncompleteCheckpointError,
    LoadError,
    StorageError,
)
from milepost.format.image import IDENTITY_ENTRY
from milepost.format.manifest import Manifest
from milepost.format.names import MANIFEST_NAME, NOTE_NAME, data_rank, index_rank, looks_hidden, shown
from milepost.storage import Folder, Storage

__all__ = ["expect", "has_identity", "locate"]

_expected: dict[str, str] = {}
"""Paths where another host has committed a checkpoint that this host does not see, with its identity."""

_logger = logging.getLogger(__name__)
_TRIES = 20
_TAIL_BYTES = 1 << 16
_LOOK_SECONDS = 0.5
_MANY_RANKS = 64
"""With more ranks than these `locate` does not compare sizes: a load checks the files that it reads."""


def locate(storage: Storage, path: str | os.PathLike[str]) -> Checkpoint:
    """Open what `load` of this path reads: the newest complete checkpoint there.

    That is the folder itself, or a complete attempt beside it that was left unpublished. All files that
    the manifest lists are there (with their sizes, unless very many ranks saved it). When a later save
    replaces the folder while its files are being opened, they may be gone: then call this again. The caller
    closes the checkpoint.

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
            located.close()
        if time.monotonic() > deadline:
            raise CheckpointNotFoundError(
                f"the ranks have committed a checkpoint here, but this host has not seen it within "
                f"{VISIBLE_SECONDS:g} s: {path}",
                path=path,
                hint="see that every rank's host shows the same folder; the file system may cache listings",
            )
        time.sleep(_LOOK_SECONDS)


def expect(path: str, identity: str) -> None:
    """Let `locate` wait for a checkpoint that is committed, but not seen on this host yet.

    Args:
        path: The absolute path of the checkpoint.
        identity: The one that `is_at_least` compares.
    """
    _expected[path] = identity


def _locate_settled(storage: Storage, path: str) -> Checkpoint:
    """What is at a path. If a save changes something meanwhile, looks again."""
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
            # A save may be replacing the folder: only what fails twice in the same way is raised.
            if state == before:
                raise
            before = state
    return _locate_once(storage, path, [])


def _locate_once(storage: Storage, path: str, state: list[object]) -> Checkpoint:
    """One look. `state` collects what was seen, to compare it with the last look."""
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
            if waiting is None or _is_overtaken(waiting, there):
                raise
            if isinstance(error, CorruptCheckpointError):
                _logger.warning("loading the complete save beside a damaged checkpoint: %s", error)
            return waiting
    except BaseException:
        if waiting is not None:
            waiting.close()
        raise
    if waiting is None:
        return published
    keep = _is_overtaken(waiting, published.manifest)
    (waiting if keep else published).close()
    return published if keep else waiting


def _is_overtaken(waiting: Checkpoint, published: Manifest | None) -> bool:
    assert waiting.manifest is not None
    return is_overtaken(waiting.manifest, published)


def _waiting(storage: Storage, path: str) -> Checkpoint | None:
    """The newest complete attempt beside the path; if nothing is at the path, also a replaced checkpoint."""
    best: Checkpoint | None = None
    for hidden in _siblings(storage, path):
        candidate = _open_hidden(storage, path, hidden)
        if candidate is None:
            continue
        if best is None or _preference(candidate) > _preference(best):
            best, candidate = candidate, best
        if candidate is not None:
            candidate.close()
    return best


def _siblings(storage: Storage, path: str) -> list[Hidden]:
    """As `siblings`; none if this user may not list the folder above."""
    try:
        return siblings(storage, path)
    except StorageError as error:
        if error.errno != errno.EACCES:
            raise
        _logger.warning("cannot look for newer saves that were not published: %s", error)
        return []


def _preference(located: Checkpoint) -> tuple[bool, tuple[int, float], str]:
    manifest, hidden = located.manifest, looks_hidden(os.path.basename(located.path))
    assert manifest is not None
    return hidden is not None and hidden[1] == manifest.attempt, manifest.order, manifest.attempt


def _open_hidden(storage: Storage, path: str, hidden: Hidden) -> Checkpoint | None:
    """The checkpoint in a hidden folder, if a load of the path may read it."""
    folder = open_if_there(storage, hidden.path)
    if folder is None:
        return None
    loads = False
    try:
        verdict = classify(folder, hidden.attempt, deep=True)
        loads = verdict.state == "complete" or (
            verdict.state == "replaced" and storage.stat(path) is None and is_whole(folder, verdict)
        )
    finally:
        if not loads:
            folder.close()
    return Checkpoint(folder, verdict.manifest, hidden.path, in_place=True) if loads else None


def _published(storage: Storage, path: str, state: list[object]) -> Checkpoint:
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
        return Checkpoint(folder, manifest, path, in_place=False)
    except BaseException:
        folder.close()
        raise


def _check_plain(storage: Storage, folder: Folder, path: str, names: list[str]) -> None:
    """Refuse a folder without a manifest unless its files are those of plain ``torch.save``."""
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
    """Whether a data file is ours: such files have an identity record near their end."""
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
        with suppress(StorageError), opened(storage, hidden.path) as folder:
            if folder and classify(folder, hidden.attempt, deep=False).state in ("part", "torn"):
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
