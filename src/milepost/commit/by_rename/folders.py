"""The hidden folders beside a checkpoint, and how folders are opened.

While it is made, a checkpoint ``name`` is the folder ``.<name>.<attempt>.partial`` beside it. Where an older
one is exchanged out, that becomes ``.<name>.<attempt>.replaced``. `milepost.commit.judge` says what such a
folder is.
"""

# Paths are str, here as in the storage package.
from __future__ import annotations

import errno
import os
import re
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from milepost.commit.contents import list_names, read_manifest
from milepost.errors import CheckpointNotFoundError, StorageError, TargetError
from milepost.format.manifest import Manifest
from milepost.format.names import PARTIAL, REPLACED, is_attempt_id, looks_hidden, stem_of
from milepost.storage import Folder, Storage

__all__ = [
    "Hidden",
    "absolute_path",
    "given_path",
    "names_of",
    "open_if_there",
    "opened",
    "published_manifest",
    "siblings",
]

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)


class Hidden(msgspec.Struct, frozen=True):
    """A hidden folder: its path, and the attempt in its name."""

    path: str
    attempt: str


# ---------------------------------------------------------------------------- names


_PathError = type[TargetError | CheckpointNotFoundError]


def given_path(path: str | os.PathLike[str], error: _PathError = TargetError) -> str:
    """The text of a path as a caller gave it. In an address, pathlib makes one slash of two: this undoes it.

    Raises:
        MilepostError: It is no path; of the class `error`.
    """
    given: object = path  # users give anything
    text = os.fspath(given) if isinstance(given, str | os.PathLike) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise error(
            "this is no path of a checkpoint: "
            + (reprlib.repr(text) if isinstance(text, str) else f"a value of type {type(given).__name__}"),
            phase="check",
            hint="the first argument of save and load is the path of a folder, a str or os.PathLike",
        )
    doubled = text.replace(":/", "://", 1)
    return doubled if not isinstance(given, str) and _ADDRESS.fullmatch(doubled) else text


def absolute_path(path: str | os.PathLike[str], error: _PathError = TargetError) -> str:
    """The absolute path of a checkpoint, or of a folder of checkpoints, that a user gave.

    Refuses an address such as ``s3://bucket/step`` and a ``~`` that nobody has expanded: they could be
    names of local folders, but no user means that. ``./~x``, ``a~b`` and ``x:y`` are names.

    Raises:
        MilepostError: It is no such path; of the class `error`.
    """
    text = given_path(path, error)
    try:
        absolute = os.path.abspath(text)
    except FileNotFoundError:
        raise error(
            f"the working directory has been removed, so this path leads nowhere: {text}",
            path=text,
            phase="check",
            hint="give an absolute path",
        ) from None
    address = _ADDRESS.fullmatch(text)
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
    """Open a folder; None if there is none, or no folder, or another user's hidden folder.

    A hidden folder is private until it is committed. Any other folder that cannot be opened is an error.
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


def published_manifest(storage: Storage, path: str) -> Manifest | None:
    """The manifest of the checkpoint at `path`; None where there is none.

    Raises:
        CorruptCheckpointError: It is damaged (UnsupportedFormatError: of a later format).
        StorageError: It cannot be read.
    """
    with opened(storage, path) as folder:
        return None if folder is None else read_manifest(folder)
