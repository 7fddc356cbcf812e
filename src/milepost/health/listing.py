"""List the checkpoints in a folder, whole ones and parts; explain an attempt that did not commit."""

from __future__ import annotations

# Paths are str, here as in the storage package.
import errno
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

from milepost.commit.by_rename.folders import absolute_path, names_of, opened
from milepost.commit.contents import (
    AbortMark,
    Beacon,
    Note,
    failures,
    list_names,
    numbers,
    read_beacons,
    read_manifest,
    read_note,
)
from milepost.commit.judge import classify, wording
from milepost.commit.locate import has_identity
from milepost.commit.marks import missing_files
from milepost.errors import (
    AbortedError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    LoadError,
    StorageError,
    UnsupportedFormatError,
)
from milepost.format.manifest import Manifest
from milepost.format.names import (
    MANIFEST_NAME,
    data_rank,
    index_rank,
    is_own,
    looks_hidden,
    ranks_in,
    removed_stem,
)
from milepost.storage import Folder, Storage

__all__ = ["Entry", "Explanation", "causes", "entry_at", "explain", "ranks_named", "scan"]


_MAX_RANKS = 1 << 20
"""A larger number of ranks in an ``attempt.json`` is not believed."""


@dataclass(frozen=True)
class Entry:
    """One checkpoint, or part of one, in a folder.

    Attributes:
        name: Its name (also for a hidden folder: the name that it would have).
        path: The folder that holds it now.
        state: "committed": it was committed, and all its files are there with their sizes (no bytes are
            compared). "partial": a save that is under way or died, or what one has not cleared yet.
            "damaged": it does not load. "unreadable": a later version wrote it.
        step: The training step, if it was given.
        size_bytes: Bytes of its files.
        time: When it was saved (or last changed), seconds since the epoch.
        world_size: How many ranks wrote it.
        problem: What is wrong with it, or worth knowing.
    """

    name: str
    path: str
    state: Literal["committed", "partial", "damaged", "unreadable"]
    step: int | None = None
    size_bytes: int = 0
    time: float = 0.0
    world_size: int | None = None
    problem: str | None = None


def scan(storage: Storage, folder: str) -> list[Entry]:
    """All checkpoints in a folder, and parts of checkpoints, by time.

    Raises:
        CheckpointNotFoundError: There is no such folder, or this is no path.
    """
    folder = absolute_path(folder, CheckpointNotFoundError)
    names = names_of(storage, folder)
    if names is None:
        raise CheckpointNotFoundError(f"there is no such folder: {folder}", path=folder)
    found = (_entry_or_none(storage, os.path.join(folder, name)) for name in names)
    return sorted((entry for entry in found if entry), key=lambda entry: (entry.time, entry.name))


def _entry_or_none(storage: Storage, path: str) -> Entry | None:
    try:
        return entry_at(storage, path)
    except StorageError as error:
        if error.errno != errno.EACCES:
            raise
        return None  # a user who may not open a folder cannot load from it


def entry_at(storage: Storage, path: str) -> Entry | None:
    """The checkpoint, or part of one, in this folder; None if it is neither."""
    name = os.path.basename(path)
    with opened(storage, path) as folder:
        if folder is None or removed_stem(name):
            return None
        hidden = looks_hidden(name)
        return _hidden_entry(folder, *hidden) if hidden else _visible_entry(folder, name)


def _visible_entry(folder: Folder, name: str) -> Entry | None:
    names = list_names(folder)
    if MANIFEST_NAME in names:
        try:
            manifest = read_manifest(folder)
        except LoadError as error:
            return _unread_entry(folder, name, names, error)
        if manifest is not None:
            return _manifest_entry(folder, name, manifest)
    data = [entry for entry in names if data_rank(entry) is not None]
    if not data:
        return None
    size, moment = _measure(folder, names)
    ours = [entry for entry in names if index_rank(entry) is not None] or [
        entry for entry in data if has_identity(folder, entry)
    ]
    if ours:
        problem = "the manifest is missing"
        return Entry(name, folder.path, "damaged", size_bytes=size, time=moment, problem=problem)
    return Entry(
        name, folder.path, "committed", size_bytes=size, time=moment, world_size=len(data),
        problem="files of plain torch.save, without a manifest",
    )  # fmt: skip


def _unread_entry(folder: Folder, name: str, names: list[str], error: LoadError) -> Entry:
    is_later = isinstance(error, UnsupportedFormatError)
    facts = (None, *_measure(folder, names), None, error.message)
    return Entry(name, folder.path, "unreadable" if is_later else "damaged", *facts)


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
    verdict = classify(folder, attempt, deep=False)
    names, note, manifest = verdict.names, verdict.note, verdict.manifest
    name = note.name if note is not None and note.attempt == attempt else stem
    if isinstance(verdict.error, UnsupportedFormatError):
        return _unread_entry(folder, name, names, verdict.error)
    said, (size, moment) = wording(verdict.state, folder.path), _measure(folder, names)
    if manifest is not None and verdict.state == "complete":
        said = f"{said}: the next save to it, or `doctor --repair`, publishes it"
        facts = (manifest.step, manifest.size_bytes, manifest.time, manifest.world_size, said)
        return Entry(name, folder.path, "committed", *facts)
    if manifest is not None and verdict.state == "replaced":
        return Entry(name, folder.path, "partial", manifest.step, size, moment, manifest.world_size, said)
    if note is None and not any(is_own(entry) or index_rank(entry) is not None for entry in names):
        return None
    told = explain_folder(folder)
    problem = verdict.error.message if verdict.error else said or told.problem
    return Entry(name, folder.path, "partial", None, size, moment, told.world_size, problem)


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
        aborted: The ranks that failed, the first to fail first, with their errors.
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
    world_size = note.world_size if note is not None and 0 < note.world_size <= _MAX_RANKS else None
    here = ranks_in(names)
    arrived = sorted(here)
    aborted, beacons = failures(folder, names), read_beacons(folder, names)
    parts = []
    if aborted:
        roots, stopped = causes((mark.rank, f"{mark.type}: {mark.message}") for mark in aborted.values())
        (error, first), *others = roots.items()
        parts.append(f"{ranks_named(first)} failed: {error}")
        if others:
            parts.append(f"{ranks_named(rank for _, ranks in others for rank in ranks)} failed too")
        if stopped:
            parts.append(f"{ranks_named(stopped)} stopped because of it")
    if world_size is not None:
        parts.append(f"{len(arrived)} of {world_size} ranks arrived")
        missing = [rank for rank in range(world_size) if rank not in here]
        silent = [rank for rank in missing if rank not in beacons and rank not in aborted]
        begun = [rank for rank in missing[:10] if rank in beacons and rank not in aborted]
        parts += [f"rank {rank}: {beacons[rank].phase}" for rank in begun]
        if silent:
            parts.append(f"{ranks_named(silent)} {'has' if len(silent) == 1 else 'have'} not begun")
    return Explanation(
        note, world_size, arrived, aborted, beacons, "; ".join(parts) or "no rank has left a word"
    )


def causes(failures: Iterable[tuple[int, str]]) -> tuple[dict[str, list[int]], list[int]]:
    """Why an attempt failed: each error with the ranks that raised it, and the ranks that stopped for it.

    If all ranks stopped for another that left no abort mark, the message of the first is the error.

    Args:
        failures: Ranks, the first to fail first, with type and message of their errors.
    """
    roots: dict[str, list[int]] = {}
    stopped: dict[int, str] = {}
    for rank, error in failures:
        if error.startswith(f"{AbortedError.__name__}: "):
            stopped[rank] = error
        else:
            roots.setdefault(error, []).append(rank)
    if stopped and not roots:
        first = next(iter(stopped))
        roots[stopped.pop(first)] = [first]
    return roots, list(stopped)


def ranks_named(ranks: Iterable[int]) -> str:
    """Ranks as the subject of a sentence."""
    listed = list(ranks)
    return f"rank{'' if len(listed) == 1 else 's'} {numbers(listed)}"
