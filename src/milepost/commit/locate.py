"""Finding checkpoints: the one to load at a path, and all that lie in a folder."""

# Paths are str, here as in the storage package.
# ruff: noqa: PTH100, PTH118, PTH119, PTH120
from __future__ import annotations

import difflib
import errno
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import RawIOBase
from typing import Any, Literal

from milepost.commit.hidden import (
    NOTE_NAME,
    AbortMark,
    Beacon,
    Hidden,
    Note,
    checked_manifest,
    data_rank,
    index_rank,
    is_own,
    list_names,
    looks_hidden,
    missing_files,
    names_of,
    numbers,
    ranks_in,
    read_abort_marks,
    read_beacons,
    read_manifest,
    read_note,
    shown,
    siblings,
)
from milepost.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    EntryNotFoundError,
    IncompleteCheckpointError,
    LoadError,
    StorageError,
)
from milepost.image import IDENTITY_ENTRY
from milepost.manifest import MANIFEST_NAME, Manifest
from milepost.storage import Folder, OpenFile, Storage

__all__ = ["Entry", "Explanation", "Located", "explain", "locate", "scan"]

_TRIES = 20


@dataclass(frozen=True)
class Located:
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


def locate(storage: Storage, path: str | os.PathLike[str]) -> Located:
    """Open what `load` of this path reads: the newest complete checkpoint there.

    That is the folder itself, or a complete attempt beside it that was left unpublished. All files that
    the manifest lists are there with their sizes; their content is not read. When a later save replaces
    the folder while its files are being opened, they may be gone: then call this again.

    Raises:
        CheckpointNotFoundError: There is none; names the nearest ones.
        IncompleteCheckpointError: The folder holds parts of a save that never committed.
        CorruptCheckpointError: The manifest is damaged, or files are not as it says.
        UnsupportedFormatError: It was written by a later Milepost.
    """
    path = os.path.abspath(os.fspath(path))
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
        published = _published(storage, path, state)
    except LoadError:
        if waiting is not None:
            return waiting
        raise
    except BaseException:
        if waiting is not None:
            waiting.folder.close()
        raise
    if waiting is None:
        return published
    assert waiting.manifest is not None
    keep = published.manifest is not None and published.manifest.time > waiting.manifest.time
    (waiting if keep else published).folder.close()
    return published if keep else waiting


def _waiting(storage: Storage, path: str) -> Located | None:
    """The newest complete attempt that is not published; where nothing is at the path, what was replaced."""
    best: Located | None = None
    for hidden in siblings(storage, path):
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


def _preference(located: Located) -> tuple[bool, float]:
    assert located.manifest is not None
    hidden = looks_hidden(os.path.basename(located.path))
    return hidden is not None and hidden[1] == located.manifest.attempt, located.manifest.time


def _open_hidden(storage: Storage, hidden: Hidden, *, replaced: bool) -> Located | None:
    try:
        folder = storage.open_folder(hidden.path)
    except StorageError:
        return None
    manifest = None
    try:
        attempt = hidden.attempt
        if replaced:
            with suppress(LoadError):
                old = read_manifest(folder)
                attempt = old.attempt if old else attempt
        manifest = checked_manifest(folder, attempt, list_names(folder), deep=False)
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
            state.append((manifest.attempt, manifest.time))
            problems = missing_files(folder, manifest)
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
    ours += [name for name in data if _has_identity(folder, name)]
    if ours:
        raise IncompleteCheckpointError(
            f"this folder has no manifest, but {ours[0]} in it is part of a save: "
            f"the save never committed, or the manifest was removed: {path}",
            path=path,
            hint="load another checkpoint; `milepost ls` on the folder above lists them",
        )
    if not data:
        raise _not_found(storage, path, f"there is no checkpoint in this folder: {path}")


def _has_identity(folder: Folder, name: str) -> bool:
    """Whether a data file has the record that tells our files from plain ones."""
    try:
        file = folder.open(name)
    except (CorruptCheckpointError, EntryNotFoundError):
        return False
    try:
        with zipfile.ZipFile(_Reader(file)) as archive:
            return any(entry.rpartition("/")[2] == IDENTITY_ENTRY for entry in archive.namelist())
    except (zipfile.BadZipFile, CorruptCheckpointError, ValueError, NotImplementedError):
        return False
    finally:
        file.close()


class _Reader(RawIOBase):
    """An OpenFile as a file object."""

    def __init__(self, file: OpenFile) -> None:
        self._file = file
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._file.size}[whence]
        if base + offset < 0:
            raise ValueError("negative position")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._file.size - self._position))
        if count:
            self._file.read_into(self._position, [view[:count]])
        self._position += count
        return count


def _not_found(storage: Storage, path: str, message: str) -> CheckpointNotFoundError:
    parent, name = os.path.split(path)
    entries = names_of_or_none(storage, parent)
    if entries is None:
        return CheckpointNotFoundError(
            message, path=path, hint=f"the folder above does not exist: {parent}; check the path"
        )
    hints = []
    for hidden in siblings(storage, path):
        with _opened(storage, hidden.path) as folder:
            if folder is not None and folder.stat(NOTE_NAME) is not None:
                hints.append("a save to it was begun and has not committed")
                break
    visible = {shown(entry): entry for entry in entries if not entry.startswith(".")}
    near = difflib.get_close_matches(shown(name), visible, n=50, cutoff=0.5)
    near += [entry for entry in sorted(visible) if entry not in near]
    existing: list[str] = []
    for entry in near[:200]:
        if len(existing) < 5 and _is_checkpoint(storage, os.path.join(parent, visible[entry])):
            existing.append(entry)
    if existing:
        hints.append(f"existing checkpoints in {parent}: {', '.join(existing)}")
    return CheckpointNotFoundError(message, path=path, hint="; ".join(hints) or None)


def names_of_or_none(storage: Storage, path: str) -> list[str] | None:
    """As `names_of`, and None for what is no folder."""
    try:
        return names_of(storage, path)
    except StorageError:
        return None


def _is_checkpoint(storage: Storage, path: str) -> bool:
    return storage.stat(os.path.join(path, MANIFEST_NAME)) is not None


@contextmanager
def _opened(storage: Storage, path: str) -> Iterator[Folder | None]:
    try:
        folder = storage.open_folder(path)
    except StorageError:
        yield None
        return
    try:
        yield folder
    finally:
        folder.close()


# ---------------------------------------------------------------------------- listing


@dataclass(frozen=True)
class Entry:
    """One checkpoint, or part of one, in a folder.

    Attributes:
        name: Its name (also for a hidden folder: the name that it would have).
        path: The folder that holds it now.
        state: "committed": it loads. "partial": a save that is under way or died, or what one has not cleared
            yet. "damaged": it does not load.
        step: The training step, if it was given.
        size_bytes: Bytes of its files.
        time: When it was saved (or last changed), seconds since the epoch.
        world_size: How many ranks wrote it.
        problem: What is wrong with it, or worth knowing.
    """

    name: str
    path: str
    state: Literal["committed", "partial", "damaged"]
    step: int | None = None
    size_bytes: int = 0
    time: float = 0.0
    world_size: int | None = None
    problem: str | None = None


def scan(storage: Storage, folder: str) -> list[Entry]:
    """All checkpoints in a folder, and parts of some, by time; what is none is left out.

    Raises:
        CheckpointNotFoundError: There is no such folder.
    """
    folder = os.path.abspath(folder)
    names = names_of_or_none(storage, folder)
    if names is None:
        raise CheckpointNotFoundError(f"there is no such folder: {folder}", path=folder)
    entries = []
    for name in names:
        with _opened(storage, os.path.join(folder, name)) as opened:
            if opened is None:
                continue
            hidden = looks_hidden(name)
            entry = _hidden_entry(opened, *hidden) if hidden else _visible_entry(opened, name)
            if entry is not None:
                entries.append(entry)
    return sorted(entries, key=lambda entry: (entry.time, entry.name))


def _visible_entry(folder: Folder, name: str) -> Entry | None:
    names = list_names(folder)
    if MANIFEST_NAME in names:
        try:
            manifest = read_manifest(folder)
        except LoadError as error:
            size, moment = _measure(folder, names)
            return Entry(name, folder.path, "damaged", size_bytes=size, time=moment, problem=error.message)
        if manifest is not None:
            return _manifest_entry(folder, name, manifest)
    data = [entry for entry in names if data_rank(entry) is not None]
    if not data:
        return None
    size, moment = _measure(folder, names)
    ours = [entry for entry in names if index_rank(entry) is not None] or [
        entry for entry in data if _has_identity(folder, entry)
    ]
    if ours:
        problem = "the manifest is missing"
        return Entry(name, folder.path, "damaged", size_bytes=size, time=moment, problem=problem)
    return Entry(
        name, folder.path, "committed", size_bytes=size, time=moment, world_size=len(data),
        problem="plain files without a manifest: they cannot be verified",
    )  # fmt: skip


def _manifest_entry(folder: Folder, name: str, manifest: Manifest) -> Entry:
    problems = missing_files(folder, manifest)
    return Entry(
        name=name,
        path=folder.path,
        state="damaged" if problems else "committed",
        step=manifest.step,
        size_bytes=manifest.size_bytes,
        time=manifest.time,
        world_size=manifest.world_size,
        problem="; ".join(problems[:5]) or None,
    )


def _hidden_entry(folder: Folder, stem: str, attempt: str) -> Entry | None:
    names = list_names(folder)
    note = read_note(folder)
    name = note.name if note is not None and note.attempt == attempt else stem
    size, moment = _measure(folder, names)
    manifest = None
    with suppress(LoadError):
        manifest = read_manifest(folder)
    if manifest is not None and manifest.attempt != attempt:
        problem = "replaced by a later save, which has not cleared it yet"
        return Entry(name, folder.path, "partial", manifest.step, size, moment, manifest.world_size, problem)
    whole = checked_manifest(folder, attempt, names, deep=False)
    if whole is not None:
        problem = "complete, but not published: it loads, and the next save or `doctor --repair` publishes it"
        return Entry(
            name,
            folder.path,
            "committed",
            whole.step,
            whole.size_bytes,
            whole.time,
            whole.world_size,
            problem,
        )
    if note is None and not any(is_own(entry) or index_rank(entry) is not None for entry in names):
        return None
    told = explain_folder(folder)
    return Entry(name, folder.path, "partial", None, size, moment, told.world_size, told.problem)


def _measure(folder: Folder, names: list[str]) -> tuple[int, float]:
    """The size of the files directly in a folder, and the last change of one."""
    size, moment = 0, 0.0
    for name in names:
        with suppress(StorageError, CorruptCheckpointError):
            found = folder.stat(name)
            if found is not None:
                size, moment = size + found.size_bytes, max(moment, found.modified_seconds)
    return size, moment


@dataclass(frozen=True)
class Explanation:
    """What is known of an attempt that has not committed.

    Attributes:
        note: Its ``attempt.json``, if it can be read.
        world_size: How many ranks take part, if that is known.
        arrived: The ranks whose marks are there.
        aborted: The ranks that failed, with their errors.
        beacons: The last words of each rank.
        problem: All this in one line.
    """

    note: Note | None
    world_size: int | None
    arrived: list[int]
    aborted: dict[int, AbortMark] = field(default_factory=dict)
    beacons: dict[int, Beacon] = field(default_factory=dict)
    problem: str = ""


def explain(storage: Storage, path: str) -> Explanation:
    """What is known of the attempt in this hidden folder (an Entry's `path`)."""
    folder = storage.open_folder(path)
    try:
        return explain_folder(folder)
    finally:
        folder.close()


def explain_folder(folder: Folder) -> Explanation:
    """As `explain`, for an open folder."""
    names = list_names(folder)
    note = read_note(folder)
    world_size = note.world_size if note is not None and note.world_size > 0 else None
    arrived = sorted(ranks_in(names))
    aborted, beacons = read_abort_marks(folder, names), read_beacons(folder, names)
    parts = []
    if aborted:
        parts += [
            f"rank {rank} failed: {mark.type}: {mark.message}" for rank, mark in sorted(aborted.items())[:5]
        ]
    if world_size is not None:
        parts.append(f"{len(arrived)} of {world_size} ranks arrived")
        missing = [rank for rank in range(world_size) if rank not in arrived]
        silent = [rank for rank in missing if rank not in beacons and rank not in aborted]
        parts += [f"rank {rank}: {beacons[rank].phase}" for rank in missing[:10] if rank in beacons]
        if silent:
            parts.append(f"ranks {numbers(silent)} never began")
    return Explanation(
        note, world_size, arrived, aborted, beacons, "; ".join(parts) or "no rank has left a word"
    )
