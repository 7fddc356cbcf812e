"""`index_<rank>.json`: what one rank's data file holds.

docs/format.md specifies it: the file's records, its tensors (in columns) and the tree of values. Its head,
the `Mark`, tells the commit that the rank has arrived. `decode_index` and `decode_mark` return consistent
values or raise `CorruptCheckpointError` (`UnsupportedFormatError` for files of a later format).
"""

from __future__ import annotations

import hashlib
from operator import lt
from typing import Annotated, Any

import msgspec

from milepost.errors import StateError
from milepost.format.checked import VERSION, Checker, decode_object
from milepost.format.limits import MAX_DIMS, MAX_INT, excess, is_device, sizes_fit
from milepost.format.names import is_plain_name
from milepost.format.nodes import Node, check_tree
from milepost.format.shards import Shards, check_leaves, check_shards, dtype_bytes
from milepost.utils import gc_paused

__all__ = [
    "CHUNK_BYTES",
    "DataFile",
    "FileDigest",
    "Index",
    "Mark",
    "Records",
    "Sequence",
    "Tensors",
    "check_files",
    "check_metadata",
    "decode_index",
    "decode_mark",
    "digest",
    "encode_index",
]

CHUNK_BYTES = 256 * 1024
"""Every record carries one CRC-32 per this many bytes."""

Sequence = Annotated[int, msgspec.Meta(ge=0, le=MAX_INT)]


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


def digest(name: str, data: bytes) -> FileDigest:
    """The FileDigest of a file with these bytes."""
    return FileDigest(name, len(data), hashlib.sha256(data).hexdigest())


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


def encode_index(index: Index) -> bytes:
    """The bytes of an index file: one JSON object without white space. StateError if it is too large."""
    data = msgspec.json.encode(index)
    problem = excess(data)
    if problem is not None:
        raise StateError(f"the index is too large: {problem}", hint="save fewer tensors and values")
    return data


def decode_mark(data: bytes, path: str) -> Mark:
    """The head of the index in `data`, without its contents (which are not checked)."""
    mark = decode_object(Mark, data, "milepost.index", path)
    _check_mark(mark, Checker(path))
    return mark


@gc_paused()  # very many small lists, none of which is garbage
def decode_index(data: bytes, path: str) -> Index:
    """The index in `data`, which was read from `path` (for messages), checked whole."""
    index = decode_object(Index, data, "milepost.index", path, columns=("records", "tensors"))
    check = Checker(path)
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


def _check_mark(mark: Mark, check: Checker) -> None:
    check(0 <= mark.rank < mark.world_size <= 1 << 24, f"rank {mark.rank} of {mark.world_size}")
    names = [file.name for file in mark.files] + [file.name for file in mark.attachments]
    for name in names:
        check(is_plain_name(name), f"a file name leaves the folder: {name!r}")
    check(len(set(names)) == len(names), "a file is listed twice")
    check_files([*mark.files, *mark.attachments], check)
    check_metadata(mark.metadata, check)


def check_metadata(metadata: Node | None, check: Checker) -> None:
    """Refuse metadata that hold more than plain values."""
    if metadata is not None:
        try:
            check_tree(metadata)
        except ValueError as error:
            check.fail(f"metadata: {error}")


def check_files(files: list[FileDigest | DataFile], check: Checker) -> None:
    """Refuse sizes and checksums that cannot be."""
    for file in files:
        check(0 <= file.size <= MAX_INT, f"{file.name} has size {file.size}")
        if isinstance(file, DataFile):
            check(0 <= file.crc32 < 1 << 32, f"{file.name} has CRC {file.crc32}")


def _check_records(records: Records, files: list[DataFile], check: Checker) -> None:
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
            check.fail(f"record {number} is in file {file} of {len(files)}")
        if length < 0 or offset < ends[file]:
            check.fail(f"record {number} overlaps the one before it")
        ends[file] = offset + length
        if ends[file] > sizes[file]:
            check.fail(f"record {number} reaches beyond {files[file].name}")
    unknown = set(records.encoding) - {"raw"}
    check(not unknown, f"unknown encoding {sorted(unknown)}")
    check(len(records.crcs) == records.chunks()[-1], "the number of chunk CRCs does not fit the records")
    check(not records.crcs or (min(records.crcs) >= 0 and max(records.crcs) < 1 << 32), "a CRC is no CRC-32")


def _check_tensors(tensors: Tensors, records: Records, check: Checker) -> None:
    count = len(tensors.record)
    columns = (
        tensors.byte_offset,
        tensors.dtype,
        tensors.shape,
        tensors.stride,
        tensors.kind,
        tensors.device,
    )
    check({len(column) for column in columns} == {count}, "the columns of the tensors differ in length")
    problem = check_leaves(tensors)
    check(problem is None, problem or "")
    for device in set(tensors.device):
        check(is_device(device), f"a tensor was saved on an unknown device: {device[:80]!r}")
    for name in ("requires_grad", "conj", "neg"):
        numbers: list[int] = getattr(tensors, name)
        check(all(map(lt, numbers, numbers[1:])), f"{name} is not ascending")
        inside = not numbers or 0 <= numbers[0] <= numbers[-1] < count
        check(inside, f"{name} names a tensor that does not exist")
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
            check.fail(f"tensor {number} is in record {record} of {len(lengths)}")
        if start < 0 or start % size or start + (0 if empty else reach) > lengths[record]:
            check.fail(f"tensor {number} reaches beyond its record")
