"""`manifest.json`: the files of the whole checkpoint with their sizes and hashes.

docs/format.md specifies it. A folder with a valid manifest is a committed checkpoint. `decode_manifest`
returns consistent values or raises `CorruptCheckpointError` (`UnsupportedFormatError` for files of a later
format).
"""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

from milepost.errors import CorruptCheckpointError
from milepost.format.checked import VERSION, Checker, decode_object
from milepost.format.index import DataFile, FileDigest, Sequence, check_files, check_metadata, digest
from milepost.format.limits import MAX_INDEX_BYTES
from milepost.format.names import MANIFEST_NAME, SHARDS_NAME, index_name, is_plain_name

__all__ = ["MAX_MANIFEST_BYTES", "Manifest", "decode_manifest", "encode_manifest", "identity_of"]

MAX_MANIFEST_BYTES = 1 << 28


class Manifest(msgspec.Struct, kw_only=True):
    """The body of the manifest: what the whole checkpoint consists of. Fields as in `Mark`."""

    format: str = "milepost.manifest"
    version: tuple[int, int] = VERSION
    requires: list[str] = []
    attempt: str
    world_size: int
    time: float
    sequence: Sequence = 0
    step: int | None = None
    metadata: Any = None
    writer: dict[str, str] = {}
    indexes: list[FileDigest]
    files: list[DataFile]
    attachments: list[FileDigest] = []
    shards: FileDigest | None = None

    @property
    def order(self) -> tuple[int, float]:
        """Compares saves to one path, the later is greater; time counts only where both have no sequence."""
        return self.sequence, 0.0 if self.sequence else self.time

    @property
    def size_bytes(self) -> int:
        """Bytes of all files that the manifest lists."""
        return sum(file.size for file in self.entries())

    def listed(self) -> list[str]:
        """The names of all files that the manifest lists, as relative paths."""
        return [file.name for file in self.entries()]

    def names(self) -> set[str]:
        """The names in `listed`, and the manifest's own."""
        return {*self.listed(), MANIFEST_NAME}

    def entries(self) -> list[FileDigest | DataFile]:
        """All files that the manifest lists."""
        return [*self.indexes, *self.files, *self.attachments, *([self.shards] if self.shards else [])]


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of the manifest file: the body, framed with the SHA-256 of its exact bytes."""
    body = msgspec.json.encode(manifest)
    return _PREFIX + hashlib.sha256(body).hexdigest().encode() + _MIDDLE + body + b"}"


_PREFIX, _MIDDLE = b'{"sha256":"', b'","body":'
_BODY_START = len(_PREFIX) + 64 + len(_MIDDLE)


def identity_of(manifest: Manifest) -> str:
    """What no other checkpoint has: the SHA-256 of the manifest's file."""
    return digest(MANIFEST_NAME, encode_manifest(manifest)).sha256


def decode_manifest(data: bytes, path: str) -> Manifest:
    """The manifest in `data`, which was read from `path` (for messages)."""
    if (
        not data.startswith(_PREFIX)
        or data[_BODY_START - len(_MIDDLE) : _BODY_START] != _MIDDLE
        or not data.endswith(b"}")
    ):
        raise CorruptCheckpointError(f"not a manifest: {path}", path=path)
    body = data[_BODY_START:-1]
    found, expected = hashlib.sha256(body).hexdigest().encode(), data[len(_PREFIX) : len(_PREFIX) + 64]
    if found != expected:
        raise CorruptCheckpointError(
            f"the manifest is damaged: SHA-256 {expected.decode('ascii', 'backslashreplace')} expected, "
            f"{found.decode()} found: {path}",
            path=path,
            hint="load another checkpoint; `milepost ls` on the folder above lists them",
        )
    manifest = decode_object(Manifest, body, "milepost.manifest", path)
    names = manifest.listed()
    check = Checker(path)
    for name in names:
        check(is_plain_name(name), f"a file name leaves the folder: {name!r}")
    check(len(set(names)) == len(names) and MANIFEST_NAME not in names, "a file is listed twice")
    check(1 <= manifest.world_size == len(manifest.indexes), "there must be one index for each rank")
    for rank, index in enumerate(manifest.indexes):
        check(index.name == index_name(rank), f"index {rank} is named {index.name!r}")
    check(manifest.shards is None or manifest.shards.name == SHARDS_NAME, "the shard map has another name")
    check_files(manifest.entries(), check)
    check(all(index.size <= MAX_INDEX_BYTES for index in manifest.indexes), "an index is too large")
    check_metadata(manifest.metadata, check)
    return manifest
