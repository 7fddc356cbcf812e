"""Finding a repository's files, and saying what was left out and why.

A file is left out only when ``.gitignore`` or the built-in list says so (folders of version control
and of caches), or when it is Gazetteer's own output. Links are described, never followed, so a
loop of them ends here.
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pathspec

from gazetteer.errors import RepositoryError
from gazetteer.paths import STATE

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Found", "Scan", "digest_file", "scan"]

_SKIPPED = {
    ".git",
    ".hg",
    ".svn",
    "__pycache__",
    ".mypy_cache",
    ".ruff_cache",
    ".pytest_cache",
    ".hypothesis",
    "node_modules",
    ".venv",
    "venv",
    ".tox",
    ".eggs",
}
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Found:
    r"""One file as the scan saw it.

    Attributes:
        path: Key: relative path, with undecodable bytes as ``\xNN``.
        real: The path to open.
        size: Bytes.
        link: Target, when it is a symbolic link.
        special: Whether it is a socket, a pipe or a device.
    """

    path: str
    real: str
    size: int
    link: str = ""
    special: bool = False


@dataclass
class Scan:
    """The files of a repository, in order of path, and what was left out.

    Attributes:
        files: What will be documented.
        excluded: Path of each file or folder left out, with the reason.
    """

    files: list[Found] = field(default_factory=list)
    excluded: list[tuple[str, str]] = field(default_factory=list)


def _key(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "backslashreplace")


class _Ignore:
    """The ``.gitignore`` files of one folder and of those above it."""

    def __init__(self, above: _Ignore | None, folder: str, lines: list[str]) -> None:
        self._above = above
        self._prefix = len(folder) + 1 if folder else 0
        self._spec = pathspec.GitIgnoreSpec.from_lines(lines)

    def matches(self, path: str) -> bool:
        """Tell whether a path (folders end with a slash) is ignored; the nearest file decides."""
        result = self._spec.check_file(path[self._prefix :])
        if result.include is not None:
            return result.include
        return self._above.matches(path) if self._above else False


def scan(root: Path, *, out: Path | None = None) -> Scan:
    """List a repository.

    Args:
        root: The repository.
        out: An output folder to leave out, besides every folder that holds Gazetteer's state.

    Returns:
        Files sorted by path. The result does not depend on the order in which the system lists them.

    Raises:
        RepositoryError: ``root`` is not a folder that can be listed.
    """
    result = Scan()
    try:
        top = list(os.scandir(root))
    except OSError as error:
        msg = f"{root}: cannot be listed ({error.strerror}). Name an existing folder."
        raise RepositoryError(msg) from error
    out_real = os.path.realpath(out) if out else ""
    root_real = os.path.realpath(root)
    pending: list[tuple[str, str, _Ignore | None, list[os.DirEntry[str]]]] = [("", root_real, None, top)]
    while pending:
        folder, real, ignore, entries = pending.pop()
        ignore = _ignore_here(folder, entries, ignore)
        for entry in entries:
            path = f"{folder}/{_key(entry.name)}" if folder else _key(entry.name)
            here = f"{real}/{entry.name}"
            is_dir = entry.is_dir(follow_symlinks=False)
            reason = _reason(entry.name, path, here, ignore, out_real, is_dir=is_dir)
            if reason:
                result.excluded.append((path + "/" if is_dir else path, reason))
                continue
            if is_dir:
                try:
                    pending.append((path, here, ignore, list(os.scandir(here))))
                except OSError as error:
                    result.excluded.append((path + "/", f"cannot be listed: {error.strerror}"))
                continue
            result.files.append(_found(entry, path, here))
    result.files.sort(key=lambda f: f.path)
    result.excluded.sort()
    return result


def _ignore_here(folder: str, entries: list[os.DirEntry[str]], above: _Ignore | None) -> _Ignore | None:
    for entry in entries:
        if entry.name == ".gitignore" and entry.is_file(follow_symlinks=False):
            try:
                lines = Path(entry.path).read_text("utf-8", "replace").splitlines()
            except OSError:
                return above
            return _Ignore(above, folder, lines)
    return above


def _reason(name: str, path: str, real: str, ignore: _Ignore | None, out: str, *, is_dir: bool) -> str:
    if name in _SKIPPED or name.endswith(".pyc"):
        return "version control or cache"
    if is_dir and (real == out or os.path.isdir(f"{real}/{STATE}")):
        return "output of Gazetteer"
    if ignore and ignore.matches(path + "/" if is_dir else path):
        return ".gitignore"
    return ""


def _found(entry: os.DirEntry[str], path: str, real: str) -> Found:
    info = entry.stat(follow_symlinks=False)
    if stat.S_ISLNK(info.st_mode):
        return Found(path, real, info.st_size, link=_key(os.readlink(real)) or "?")
    return Found(path, real, info.st_size, special=not stat.S_ISREG(info.st_mode))


def digest_file(found: Found) -> bytes:
    """Return a digest of what a file holds; a link's is that of its target's name.

    A file that cannot be read has a digest too, that of the reason.
    """
    if found.link:
        return hashlib.sha256(b"link:" + found.link.encode()).digest()
    if found.special:
        return b"special".ljust(32)
    try:
        with open(found.real, "rb", buffering=0) as stream:
            digest = hashlib.sha256()
            for block in _blocks(stream.fileno()):
                digest.update(block)
            return digest.digest()
    except OSError as error:
        return hashlib.sha256(f"error:{error.errno}".encode()).digest()


def _blocks(descriptor: int) -> Iterator[bytes]:
    while block := os.read(descriptor, _BLOCK):
        yield block
