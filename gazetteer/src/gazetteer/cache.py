"""What a build remembers for the next one, in ``OUT/.gazetteer``.

Losing it costs time, never correctness: a state that is missing, of another version or damaged
counts as empty, and everything is built anew.
"""

from __future__ import annotations

import hashlib
import os
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from gazetteer.model import FileFacts, History
from gazetteer.paths import STATE

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["PageRecord", "State", "facts_of", "fingerprint", "pack", "write_atomic"]


class PageRecord(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One page as it was written: what from, and what its file looked like."""

    key: bytes
    size: int
    mtime_ns: int


class State(msgspec.Struct, array_like=True):
    """A finished or interrupted build.

    Attributes:
        version: Fingerprint of the Gazetteer that made it.
        inputs: Digest of everything the build depended on; empty when it was interrupted.
        digests: Digest of each file.
        pages: Every page by name.
        history: What git said.
    """

    version: bytes = b""
    inputs: bytes = b""
    digests: dict[str, bytes] = {}
    pages: dict[str, PageRecord] = {}
    summary: dict[str, int] = {}
    history: History = History()

    @staticmethod
    def load(out: Path) -> State:
        """Read the state of an output folder; an empty one when there is none that fits."""
        try:
            state = msgspec.msgpack.decode((out / STATE / "state").read_bytes(), type=State)
        except (OSError, msgspec.MsgspecError, ValueError):
            return State(version=fingerprint())
        return state if state.version == fingerprint() else State(version=fingerprint(), pages=state.pages)

    def save(self, out: Path) -> None:
        """Write the state atomically."""
        write_atomic(out / STATE / "state", msgspec.msgpack.encode(self))


def load_facts(out: Path) -> dict[str, bytes]:
    """Return each file's packed facts from the last build, or nothing."""
    try:
        return msgspec.msgpack.decode((out / STATE / "facts").read_bytes(), type=dict[str, bytes])
    except (OSError, msgspec.MsgspecError, ValueError):
        return {}


def save_facts(out: Path, packed: dict[str, bytes]) -> None:
    """Write every file's packed facts atomically."""
    write_atomic(out / STATE / "facts", msgspec.msgpack.encode(packed))


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(FileFacts)


def pack(facts: FileFacts) -> bytes:
    """Pack facts; equal facts give equal bytes."""
    return _encoder.encode(facts)


def facts_of(packed: bytes) -> FileFacts:
    """Unpack facts."""
    return _decoder.decode(packed)


def _own_files() -> Iterator[tuple[str, bytes]]:
    pending = [("", resources.files("gazetteer"))]
    while pending:
        prefix, folder = pending.pop()
        for entry in sorted(folder.iterdir(), key=lambda e: e.name):
            if entry.is_dir():
                if entry.name != "__pycache__":
                    pending.append((f"{prefix}{entry.name}/", entry))
            elif entry.name.endswith((".py", ".scm", ".toml")):
                yield prefix + entry.name, entry.read_bytes()


_fingerprint: list[bytes] = []


def fingerprint() -> bytes:
    """Return a digest of Gazetteer itself: its code, queries and rules."""
    if not _fingerprint:
        digest = hashlib.sha256()
        for name, data in _own_files():
            digest.update(name.encode() + b"\0" + data + b"\0")
        _fingerprint.append(digest.digest())
    return _fingerprint[0]


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, whole.

    When it raises, the old one is still there.
    """
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
