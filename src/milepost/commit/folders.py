"""The hidden folders beside a checkpoint: how they are named, what lies in them, what that means.

While it is made, a checkpoint ``name`` is the folder ``.<name>.<attempt>.partial`` beside it. Where an
older one is exchanged out, that becomes ``.<name>.<attempt>.replaced``. What such a folder *is* follows from
its content alone: with a manifest (or a full set of marks) of the attempt in its name it is that attempt's
checkpoint; with a manifest of another attempt it is the one that was exchanged out.
"""

# Paths are str, here as in the storage package.
from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import msgspec

from milepost.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    EntryNotFoundError,
    StorageError,
    TargetError,
)
from milepost.format.index import FileDigest
from milepost.format.manifest import MAX_MANIFEST_BYTES, Manifest, decode_manifest
from milepost.format.names import (
    ABORTED_NAME,
    MANIFEST_NAME,
    NOTE_NAME,
    PARTIAL,
    REPLACED,
    is_attempt_id,
    looks_hidden,
    shown,
    stem_of,
)
from milepost.storage import Folder, Storage

__all__ = [
    "MAX_SMALL_BYTES",
    "AbortMark",
    "Beacon",
    "Hidden",
    "Note",
    "absolute_path",
    "belongs",
    "failures",
    "file_digest",
    "names_of",
    "numbers",
    "open_if_there",
    "opened",
    "published_manifest",
    "read_beacons",
    "read_manifest",
    "read_note",
    "siblings",
]


MAX_SMALL_BYTES = 1 << 20
_READ_BYTES = 1 << 20
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)


class Note(msgspec.Struct, kw_only=True):
    """``attempt.json``: which folder this is, and who began it. Whoever works in it holds a lock on it.

    Attributes:
        name: The checkpoint's name, as `shown` gives it.
        stem: What stands for it in the folder's name: the name, or a part of it with a hash.
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


class Hidden(msgspec.Struct, frozen=True):
    """A hidden folder: its path, and the attempt in its name."""

    path: str
    attempt: str


# ---------------------------------------------------------------------------- names


def absolute_path(
    path: str | os.PathLike[str], error: type[TargetError | CheckpointNotFoundError] = TargetError
) -> str:
    """The absolute path of what a user gave as that of a checkpoint, or of a folder of checkpoints.

    An address such as ``s3://bucket/step`` and a ``~`` that nobody has expanded are refused: they could be
    names of local folders, but are not meant so. ``./~x``, ``a~b`` and ``x:y`` are names.

    Raises:
        MilepostError: It is no such path; of the class `error`.
    """
    given: object = path  # users give anything
    text = os.fspath(given) if isinstance(given, str | os.PathLike) else ""
    if not isinstance(text, str) or not text or "\0" in text:
        raise error(
            f"this is no path of a checkpoint: {path!r}",
            phase="check",
            hint="give the path of a folder, as text",
        )
    try:
        absolute = os.path.abspath(text)
    except FileNotFoundError:
        raise error(
            f"the working directory has been removed, so this path leads nowhere: {text}",
            path=text,
            phase="check",
            hint="give an absolute path",
        ) from None
    # pathlib makes one slash of two
    address = _ADDRESS.fullmatch(text if isinstance(given, str) else text.replace(":/", "://", 1))
    if address is not None:
        what, way_out = "an address", "the path of a folder, such as one where that storage is mounted"
        if address[1].lower() == "file":
            way_out = f"/{address[2].lstrip('/')}"
    elif text.startswith("~"):
        what, way_out = "a ~ that was not expanded", os.path.expanduser(text)
    else:
        return absolute
    raise error(
        f"a checkpoint is a folder with a local path, and this is {what}: {text}",
        path=text,
        phase="check",
        hint=f"give {way_out}; for a folder that really has this name, give {absolute}",
    )


def siblings(storage: Storage, path: str) -> list[Hidden]:
    """The hidden folders beside `path` that may belong to it, by their names alone."""
    parent, name = os.path.split(path)
    start = f".{stem_of(name)}."
    found = []
    for entry in names_of(storage, parent) or ():
        for suffix in (PARTIAL, REPLACED):
            attempt = entry[len(start) : -len(suffix)]
            if entry.startswith(start) and entry.endswith(suffix) and is_attempt_id(attempt):
                found.append(Hidden(os.path.join(parent, entry), attempt))
    return found


def open_if_there(storage: Storage, path: str) -> Folder | None:
    """An open folder; None where there is none, or something else, or another user's hidden one.

    That one is private until it is committed. Any other folder that cannot be opened is an error.
    """
    try:
        return storage.open_folder(path)
    except StorageError as error:
        private = error.errno == errno.EACCES and looks_hidden(os.path.basename(path))
        if not private and error.errno not in {errno.ENOENT, errno.ENOTDIR}:
            raise
    return None


@contextmanager
def opened(storage: Storage, path: str) -> Iterator[Folder | None]:
    """As `open_if_there`, closed at the end."""
    folder = open_if_there(storage, path)
    try:
        yield folder
    finally:
        if folder is not None:
            folder.close()


def names_of(storage: Storage, path: str) -> list[str] | None:
    """The names in a folder, or None if there is no such folder."""
    with opened(storage, path) as folder:
        return None if folder is None else list_names(folder)


def list_names(folder: Folder) -> list[str]:
    """The names in an open folder; none when it has been removed since."""
    try:
        return folder.names()
    except EntryNotFoundError:
        return []


# ---------------------------------------------------------------------------- contents

_T = TypeVar("_T", Note, Beacon, AbortMark)


def _read_small(folder: Folder, name: str, kind: type[_T]) -> _T | None:
    """A small file of ours; None if it is not there or was lost in a crash (nothing rests on it)."""
    try:
        return msgspec.json.decode(folder.read(name, MAX_SMALL_BYTES), type=kind)
    except (EntryNotFoundError, CorruptCheckpointError, msgspec.DecodeError, UnicodeDecodeError):
        return None


def read_note(folder: Folder) -> Note | None:
    """The folder's ``attempt.json``, if it can be read."""
    return _read_small(folder, NOTE_NAME, Note)


def belongs(note: Note, folder: Folder, attempt: str) -> bool:
    """Whether a note is that of this attempt at the path to which the hidden folder belongs by its name."""
    parts = looks_hidden(os.path.basename(folder.path))
    return parts is not None and note.attempt == attempt and note.stem == shown(parts[0])


def read_beacons(folder: Folder, names: Iterable[str]) -> dict[int, Beacon]:
    """The last words of each rank."""
    found = (_read_small(folder, name, Beacon) for name in names if name.startswith("state_"))
    return {beacon.rank: beacon for beacon in found if beacon}


def failures(folder: Folder, names: Iterable[str]) -> dict[int, AbortMark]:
    """The abort marks by rank: that of the rank which failed first, then the others."""
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


def published_manifest(storage: Storage, path: str) -> Manifest | None:
    """The manifest of the checkpoint at `path`; None where there is none.

    Raises:
        CorruptCheckpointError: It is damaged (UnsupportedFormatError: of a later format).
        StorageError: It cannot be read.
    """
    with opened(storage, path) as folder:
        return None if folder is None else read_manifest(folder)


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
