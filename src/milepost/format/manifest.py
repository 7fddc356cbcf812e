"""The JSON files of a checkpoint: `index_<rank>.json` and `manifest.json`.

docs/format.md specifies both. An index describes one rank's data file: its records, its tensors (in
columns) and the tree of values. The manifest lists the files of the whole checkpoint with their sizes
and hashes; a folder with a valid manifest is a committed checkpoint.

Everything read here comes from outside and is checked before it is used: `decode_index`,
`decode_mark` and `decode_manifest` return consistent values or raise `CorruptCheckpointError`
(`UnsupportedFormatError` for files of a later format).
"""

from __future__ import annotations

import hashlib
from itertools import pairwise
from typing import Annotated, Any, NoReturn, TypeVar

import msgspec

from milepost.errors import CorruptCheckpointError, StateError, UnsupportedFormatError
from milepost.format.limits import MAX_DIMS, MAX_INDEX_BYTES, MAX_INT, excess, is_device, sizes_fit
from milepost.format.nodes import Node, check_tree
from milepost.format.shards import (
    SHARDS_FEATURE,
    SHARDS_NAME,
    Shards,
    check_leaves,
    check_shards,
    dtype_bytes,
)
from milepost.utils import gc_paused

__all__ = [
    "CHUNK_BYTES",
    "MANIFEST_NAME",
    "MAX_INDEX_BYTES",
    "DataFile",
    "FileDigest",
    "Index",
    "Manifest",
    "Mark",
    "Records",
    "Tensors",
    "data_name",
    "decode_index",
    "decode_manifest",
    "decode_mark",
    "digest",
    "encode_index",
    "encode_manifest",
    "identity_of",
    "index_name",
    "is_plain_name",
]

MANIFEST_NAME = "manifest.json"
CHUNK_BYTES = 256 * 1024
"""Every record carries one CRC-32 per this many bytes."""

VERSION = (1, 0)
"""Format version (major, minor). A reader refuses another major version and accepts any minor one."""

FEATURES: frozenset[str] = frozenset({SHARDS_FEATURE})
"""The optional features that this version of the library can read."""

MAX_MANIFEST_BYTES = 1 << 28

Sequence = Annotated[int, msgspec.Meta(ge=0, le=MAX_INT)]


def data_name(rank: int) -> str:
    """The name of a rank's data file."""
    return f"checkpoint_{rank}.pt"


def index_name(rank: int) -> str:
    """The name of a rank's index."""
    return f"index_{rank}.json"


class FileDigest(msgspec.Struct, frozen=True):
    """A small file that is hashed whole: an index or an attachment (a file that a hook added)."""

    name: str
    size: int
    sha256: str


class DataFile(msgspec.Struct, frozen=True):
    """A data file, with the CRC-32 of all its bytes."""

    name: str
    size: int
    crc32: int


class Records(msgspec.Struct):
    """The records of an index, in columns. `crcs` holds the chunks of all records, one after the other."""

    file: list[int] = []
    offset: list[int] = []
    length: list[int] = []
    encoding: list[str] = []
    crcs: list[int] = []

    def chunks(self) -> list[int]:
        """For each record the position of its first chunk in `crcs`, and the total at the end."""
        starts = [0]
        for length in self.length:
            starts.append(starts[-1] + -(-length // CHUNK_BYTES))
        return starts


class Tensors(msgspec.Struct):
    """The tensors of an index, in columns.

    Attributes:
        record: Number of the record that holds the bytes; a tensor without elements has an empty one.
        byte_offset: Where in the record the element of index (0, …, 0) lies.
        dtype: Name as in torch, without the prefix: "float32".
        shape: Sizes.
        stride: Strides, in elements; never negative.
        kind: "tensor", "parameter" or "ndarray" (a numpy array).
        device: Where the tensor was, such as "cuda:0".
        requires_grad: Numbers of the tensors with requires_grad, ascending.
        conj: Numbers of the tensors whose conjugate bit is set, ascending.
        neg: Numbers of the tensors whose negative bit is set, ascending.
    """

    record: list[int] = []
    byte_offset: list[int] = []
    dtype: list[str] = []
    shape: list[list[int]] = []
    stride: list[list[int]] = []
    kind: list[str] = []
    device: list[str] = []
    requires_grad: list[int] = []
    conj: list[int] = []
    neg: list[int] = []


class Mark(msgspec.Struct, kw_only=True):
    """The head of an index: what the commit needs to know of a rank. Its presence says: I have arrived.

    Attributes:
        attempt: Id of the try at this path that the index belongs to.
        process: Random id of the process that wrote it.
        rank: The rank that wrote it.
        world_size: How many ranks take part.
        time: When it was written, seconds since the epoch. Nothing is decided by it: clocks go wrong.
        sequence: Rank 0's: one above that of every save to this path that it could see by then. It orders
            the saves to one path; 0 where none was given.
        step: The training step that was given to `save`, if any.
        agreement: Hash of what all ranks must agree on ("" with nothing to agree on).
        files: The data files of this rank.
        attachments: Files that hooks of this rank added to the folder.
        metadata: The user's metadata, as a tree of plain values, or None.
        writer: Who wrote it: host, pid, versions.
        requires: Features that a reader must know.
    """

    format: str = "milepost.index"
    version: tuple[int, int] = VERSION
    requires: list[str] = []
    attempt: str
    process: str
    rank: int
    world_size: int
    time: float
    sequence: Sequence = 0
    step: int | None = None
    agreement: str = ""
    files: list[DataFile] = []
    attachments: list[FileDigest] = []
    metadata: Any = None
    writer: dict[str, str] = {}


class Index(Mark, kw_only=True):
    """One rank's description of what it saved: the mark, and then the contents."""

    records: Records
    tensors: Tensors
    shards: Shards | msgspec.UnsetType = msgspec.UNSET
    tree: Any


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


def digest(name: str, data: bytes) -> FileDigest:
    """The FileDigest of a file with these bytes."""
    return FileDigest(name, len(data), hashlib.sha256(data).hexdigest())


def encode_index(index: Index) -> bytes:
    """The bytes of an index file: one JSON object without white space. StateError if it is too large."""
    data = msgspec.json.encode(index)
    problem = excess(data)
    if problem is not None:
        raise StateError(f"the index is too large: {problem}", hint="save fewer tensors and values")
    return data


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
    manifest = _decode(Manifest, body, "milepost.manifest", path)
    names = manifest.listed()
    check = _Checker(path)
    for name in names:
        check(is_plain_name(name), f"a file name leaves the folder: {name!r}")
    check(len(set(names)) == len(names) and MANIFEST_NAME not in names, "a file is listed twice")
    check(1 <= manifest.world_size == len(manifest.indexes), "there must be one index for each rank")
    for rank, index in enumerate(manifest.indexes):
        check(index.name == index_name(rank), f"index {rank} is named {index.name!r}")
    check(manifest.shards is None or manifest.shards.name == SHARDS_NAME, "the shard map has another name")
    _check_sizes(manifest.entries(), check)
    check(all(index.size <= MAX_INDEX_BYTES for index in manifest.indexes), "an index is too large")
    _check_metadata(manifest.metadata, check)
    return manifest


def decode_mark(data: bytes, path: str) -> Mark:
    """The head of the index in `data`, without its contents (which are not checked)."""
    mark = _decode(Mark, data, "milepost.index", path)
    _check_mark(mark, _Checker(path))
    return mark


@gc_paused()  # very many small lists, none of which is garbage
def decode_index(data: bytes, path: str) -> Index:
    """The index in `data`, which was read from `path` (for messages), checked whole."""
    index = _decode(Index, data, "milepost.index", path, columns=("records", "tensors"))
    check = _Checker(path)
    _check_mark(index, check)
    _check_records(index.records, index.files, check)
    _check_tensors(index.tensors, index.records, check)
    if index.shards is not msgspec.UNSET:
        held = list(zip(index.tensors.dtype, index.tensors.shape, strict=True))
        problem = check_shards(index.shards, held)
        check(problem is None, problem or "")
    try:
        check_tree(index.tree, tensors=len(index.tensors.record), records=index.records.length)
    except ValueError as error:
        check.fail(str(error))
    return index


def is_plain_name(name: str) -> bool:
    """Whether `name` is a relative path of plain components, which cannot leave its folder."""
    return (
        0 < len(name) <= 4096
        and "\0" not in name
        and "\\" not in name
        and all(part not in ("", ".", "..") for part in name.split("/"))
    )


class _Checker:
    """Raises CorruptCheckpointError with the file's path when a condition does not hold."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, condition: object, message: str) -> None:
        if not condition:
            self.fail(message)

    def fail(self, message: str) -> NoReturn:
        """Raise; loops call it themselves, so that no message is made up for what is right."""
        raise CorruptCheckpointError(f"{message}: {self.path}", path=self.path)


_T = TypeVar("_T", Manifest, Mark, Index)


def _decode(kind: type[_T], data: bytes, name: str, path: str, *, columns: tuple[str, ...] = ()) -> _T:
    """Decode one JSON object; version and features first, so that later formats get the right error."""
    problem = excess(data)
    _Checker(path)(problem is None, f"the file is too large: {problem}")
    try:
        fields = _fields(data)
        for column in columns:
            _fields(bytes(fields.get(column, b"")))
        head = msgspec.json.decode(data, type=_Head)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError, ValueError) as error:
        raise CorruptCheckpointError(f"not valid {name} JSON ({error}): {path}", path=path) from None
    _Checker(path)(head.format == name, f"the format is {head.format[:80]!r}, not {name!r}")
    unknown = sorted(set(head.requires) - FEATURES)
    if head.version[0] != VERSION[0] or unknown:
        needs = f"features {str(unknown)[:200]}" if unknown else f"format version {head.version[0]}"
        raise UnsupportedFormatError(
            f"{path} needs {needs}, which this version of Milepost cannot read",
            path=path,
            hint="update Milepost: pip install -U milepost",
        )
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise CorruptCheckpointError(f"not valid {name} JSON ({error}): {path}", path=path) from None


class _Head(msgspec.Struct):
    format: str
    version: tuple[int, int]
    requires: list[str]


def _fields(data: bytes) -> dict[str, msgspec.Raw]:
    """The fields of a JSON object, refusing repeated names and white space.

    A decoder keeps the last of two fields of one name, another may keep the first; so that all
    readers see the same, the lengths of the fields must add up to the length of the object.
    """
    fields = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
    length = 1 + sum(len(msgspec.json.encode(name)) + len(bytes(raw)) + 2 for name, raw in fields.items())
    if length != len(data):
        raise ValueError("a field is repeated, or there is white space between the fields")
    return fields


def _check_mark(mark: Mark, check: _Checker) -> None:
    check(0 <= mark.rank < mark.world_size <= 1 << 24, f"rank {mark.rank} of {mark.world_size}")
    names = [file.name for file in mark.files] + [file.name for file in mark.attachments]
    for name in names:
        check(is_plain_name(name), f"a file name leaves the folder: {name!r}")
    check(len(set(names)) == len(names), "a file is listed twice")
    _check_sizes([*mark.files, *mark.attachments], check)
    _check_metadata(mark.metadata, check)


def _check_metadata(metadata: Node | None, check: _Checker) -> None:
    if metadata is not None:
        try:
            check_tree(metadata)
        except ValueError as error:
            check.fail(f"metadata: {error}")


def _check_sizes(files: list[FileDigest | DataFile], check: _Checker) -> None:
    for file in files:
        check(0 <= file.size <= MAX_INT, f"{file.name} has size {file.size}")
        if isinstance(file, DataFile):
            check(0 <= file.crc32 < 1 << 32, f"{file.name} has CRC {file.crc32}")


def _check_records(records: Records, files: list[DataFile], check: _Checker) -> None:
    count = len(records.length)
    check(
        len(records.file) == len(records.offset) == len(records.encoding) == count,
        "the columns of the records differ in length",
    )
    ends, sizes = [0] * len(files), [file.size for file in files]
    for number, (file, offset, length) in enumerate(
        zip(records.file, records.offset, records.length, strict=True)
    ):
        if not 0 <= file < len(files):
            check.fail(f"record {number} lies in file {file} of {len(files)}")
        if length < 0 or offset < ends[file]:
            check.fail(f"record {number} overlaps the one before it")
        ends[file] = offset + length
        if ends[file] > sizes[file]:
            check.fail(f"record {number} reaches beyond {files[file].name}")
    unknown = set(records.encoding) - {"raw"}
    check(not unknown, f"unknown encoding {sorted(unknown)}")
    check(len(records.crcs) == records.chunks()[-1], "the number of chunk CRCs does not fit the records")
    check(not records.crcs or (min(records.crcs) >= 0 and max(records.crcs) < 1 << 32), "a CRC is no CRC-32")


def _check_tensors(tensors: Tensors, records: Records, check: _Checker) -> None:
    count = len(tensors.record)
    columns = (
        tensors.byte_offset,
        tensors.dtype,
        tensors.shape,
        tensors.stride,
        tensors.kind,
        tensors.device,
    )
    check(all(len(column) == count for column in columns), "the columns of the tensors differ in length")
    problem = check_leaves(tensors)
    check(problem is None, problem or "")
    for device in set(tensors.device):
        check(is_device(device), f"a tensor was saved on an unknown device: {device[:80]!r}")
    for name in ("requires_grad", "conj", "neg"):
        numbers: list[int] = getattr(tensors, name)
        check(all(0 <= n < count for n in numbers), f"{name} names a tensor that is not there")
        check(all(a < b for a, b in pairwise(numbers)), f"{name} is not ascending")
    check(
        all("complex" in tensors.dtype[n] for n in tensors.conj),
        "a tensor that is not complex has the conjugate bit",
    )
    check(
        all(tensors.kind[n] != "ndarray" for n in (*tensors.conj, *tensors.neg)),
        "a numpy array has the conjugate or negative bit",
    )
    lengths = records.length
    for number, (record, start, dtype, shape, stride) in enumerate(
        zip(tensors.record, tensors.byte_offset, tensors.dtype, tensors.shape, tensors.stride, strict=True)
    ):
        size = dtype_bytes(dtype)
        reach = extent = size
        empty = False
        if len(shape) != len(stride) or len(shape) > MAX_DIMS:
            check.fail(f"tensor {number} has shape {shape} and stride {stride}")
        for length, step in zip(shape, stride, strict=True):
            if not (0 <= length <= MAX_INT and 0 <= step <= MAX_INT):
                check.fail(f"tensor {number} has shape {shape} and stride {stride}")
            empty = empty or length == 0
            extent *= length
            reach += (length - 1) * step * size
        if extent > MAX_INT or (tensors.kind[number] == "ndarray" and not sizes_fit(shape, size)):
            check.fail(f"tensor {number} has too many elements: {shape}")
        if not -1 < record < len(lengths):
            check.fail(f"tensor {number} lies in record {record} of {len(lengths)}")
        if start < 0 or start % size or start + (0 if empty else reach) > lengths[record]:
            check.fail(f"tensor {number} reaches beyond its record")
