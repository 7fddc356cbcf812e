"""The small files in an attempt's folder, and what they say."""

# Paths are str, here as in the storage package.
from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from typing import TypeVar

import msgspec

from milepost.errors import CorruptCheckpointError, EntryNotFoundError
from milepost.format.index import FileDigest
from milepost.format.manifest import MAX_MANIFEST_BYTES, Manifest, decode_manifest
from milepost.format.names import ABORTED_NAME, MANIFEST_NAME, NOTE_NAME, looks_hidden, shown
from milepost.storage import Folder

__all__ = [
    "MAX_SMALL_BYTES",
    "AbortMark",
    "Beacon",
    "Note",
    "belongs",
    "failures",
    "file_digest",
    "list_names",
    "numbers",
    "read_beacons",
    "read_manifest",
    "read_note",
]


MAX_SMALL_BYTES = 1 << 20
_READ_BYTES = 1 << 20


class Note(msgspec.Struct, kw_only=True):
    """``attempt.json``: which folder this is, and who began it. Each process in it holds a lock on this file.

    Attributes:
        name: The checkpoint's name, as `shown` gives it.
        stem: Its form in the folder's name: the name, or a part of it with a hash.
        attempt: Id of the attempt.
        world_size: How many ranks take part.
        process: Random id of the process that wrote this.
        private: The attempt's id is known to this process alone.
        host: Where it ran.
        pid: Its process id there.
        time: When it began, seconds since the epoch.
    """

    format: str = "milepost.attempt"
    name: str
    stem: str
    attempt: str
    world_size: int
    process: str
    private: bool = False
    host: str = ""
    pid: int = 0
    time: float = 0.0


class Beacon(msgspec.Struct, kw_only=True):
    """``state_<rank>.json``: what a rank was doing when it last said so."""

    rank: int
    attempt: str
    phase: str
    bytes_done: int = 0
    time: float = 0.0
    process: str = ""


class AbortMark(msgspec.Struct, kw_only=True):
    """``abort_<rank>.json``: this rank failed; the attempt must not be committed any more."""

    rank: int
    type: str
    message: str
    phase: str | None = None
    time: float = 0.0


def list_names(folder: Folder) -> list[str]:
    """The names in an open folder; none when it has been removed since."""
    try:
        return folder.names()
    except EntryNotFoundError:
        return []


_T = TypeVar("_T", Note, Beacon, AbortMark)


def _read_small(folder: Folder, name: str, kind: type[_T]) -> _T | None:
    """A small file of ours; None if it is absent or damaged. No promise depends on it."""
    try:
        return msgspec.json.decode(folder.read(name, MAX_SMALL_BYTES), type=kind)
    except (EntryNotFoundError, CorruptCheckpointError, msgspec.DecodeError, UnicodeDecodeError):
        return None


def read_note(folder: Folder) -> Note | None:
    """The folder's ``attempt.json``, if it can be read."""
    return _read_small(folder, NOTE_NAME, Note)


def belongs(note: Note, folder: Folder, attempt: str) -> bool:
    """Whether a note names this attempt, and the path that the hidden folder's name belongs to."""
    parts = looks_hidden(os.path.basename(folder.path))
    return parts is not None and note.attempt == attempt and note.stem == shown(parts[0])


def read_beacons(folder: Folder, names: Iterable[str]) -> dict[int, Beacon]:
    """The last beacon of each rank."""
    found = (_read_small(folder, name, Beacon) for name in names if name.startswith("state_"))
    return {beacon.rank: beacon for beacon in found if beacon}


def failures(folder: Folder, names: Iterable[str]) -> dict[int, AbortMark]:
    """The abort marks by rank, the first rank that failed first."""
    listed = [ABORTED_NAME, *sorted(name for name in names if name.startswith("abort_"))]
    found = (_read_small(folder, name, AbortMark) for name in listed)
    return {mark.rank: mark for mark in found if mark}


def read_manifest(folder: Folder) -> Manifest | None:
    """The folder's manifest, or None if it has none.

    Raises:
        CorruptCheckpointError: It is damaged (UnsupportedFormatError: of a later format).
    """
    try:
        data = folder.read(MANIFEST_NAME, MAX_MANIFEST_BYTES)
    except EntryNotFoundError:
        return None
    return decode_manifest(data, os.path.join(folder.path, MANIFEST_NAME))


def file_digest(folder: Folder, name: str) -> FileDigest:
    """Size and SHA-256 of a file, as it is read now."""
    file = folder.open(name)
    try:
        sha, size, buffer = hashlib.sha256(), file.size, memoryview(bytearray(min(_READ_BYTES, file.size)))
        for offset in range(0, size, _READ_BYTES):
            view = buffer[: min(_READ_BYTES, size - offset)]
            file.read_into(offset, [view])
            sha.update(view)
        return FileDigest(name, size, sha.hexdigest())
    finally:
        file.close()


def numbers(ranks: Iterable[int], limit: int = 10) -> str:
    """Ranks for a message: the first few of them."""
    listed = sorted(ranks)
    return ", ".join(map(str, listed[:limit])) + (
        f" and {len(listed) - limit} more" if listed[limit:] else ""
    )
