"""Tensors that several ranks hold between them, as the JSON files describe them. Torch-free.

`Shards` are the columns of an index: what this rank's file holds of which global tensor. The committing
rank merges those of all ranks into `shards.json`, the `ShardMap`: for each key the global tensor, and which
rank's file holds which box of it. A loader that reshards reads that one file, and then only the indexes of
the ranks that it reads from.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import repeat
from operator import add, le, mul
from typing import Protocol

import msgspec

from milepost.errors import CorruptCheckpointError
from milepost.format.boxes import Box, Piece, disjoint, intersection
from milepost.format.keys import Key, is_key
from milepost.format.limits import sizes_fit
from milepost.format.names import SHARDS_NAME

__all__ = [
    "ARRAY_DTYPES",
    "MAX_SHARDS_BYTES",
    "ON_EACH_MESH",
    "SHARDS_FEATURE",
    "ShardMap",
    "Shards",
    "Table",
    "check_described",
    "check_leaves",
    "check_shards",
    "decode_shard_map",
    "dtype_bytes",
    "encode_shard_map",
]

SHARDS_FEATURE = "shards"
"""The feature that an index or manifest with shards requires of its reader."""

ON_EACH_MESH = ", on each mesh"
"""The end of the placement of tensors whose mesh is a part of the job, so that several may hold it."""

MAX_SHARDS_BYTES = 1 << 31


class Shards(msgspec.Struct):
    """The shards of an index, in columns: one entry for each tensor that is part of a global one.

    Attributes:
        tensor: Number of the tensor that holds what this rank's file has of it.
        key: The typed path, which is the tensor's identity on all ranks.
        dtype: As in `Tensors`.
        kind: As in `Tensors`.
        shape: The global shape.
        placement: How it lies on the ranks, for people: "Shard(0) on ranks 0-3".
        alias: Number of the first entry that shares the same memory; its own number if none does.
        copies: The ranks that hold the very same part of it, "" if only this one does.
        crcs: With several such ranks, the CRC-32 of each rank's share of that part, row by row; and where
            other meshes may hold it as well, that of what this rank saves, behind them.
        requires_grad: Numbers of the entries with requires_grad, ascending.
        pieces: How many pieces this rank's file holds of it.
        start: *(flat)* where each piece starts in the global tensor.
        local: *(flat)* where it starts in the tensor that holds it.
        size: *(flat)* its size.
    """

    tensor: list[int] = []
    key: list[Key] = []
    dtype: list[str] = []
    kind: list[str] = []
    shape: list[list[int]] = []
    placement: list[str] = []
    alias: list[int] = []
    copies: list[str] = []
    crcs: list[list[int]] = []
    requires_grad: list[int] = []
    pieces: list[int] = []
    start: list[int] = []
    local: list[int] = []
    size: list[int] = []

    def pieces_of_each(self) -> Iterator[list[Piece]]:
        """The pieces of each entry, in order."""
        position = 0
        for count, shape in zip(self.pieces, self.shape, strict=True):
            dims = len(shape)
            found = []
            for _ in range(count):
                end = position + dims
                found.append(
                    Piece(
                        tuple(self.start[position:end]),
                        tuple(self.local[position:end]),
                        tuple(self.size[position:end]),
                    )
                )
                position = end
            yield found


class Table(msgspec.Struct):
    """Which rank's file holds which box of a global tensor; `start` and `size` are flat.

    The boxes come in the order of their starts in the first dimension.
    """

    rank: list[int]
    start: list[int]
    size: list[int]

    def boxes(self, dims: int) -> list[Box]:
        """All boxes, of this many dimensions."""
        if not dims:
            return [Box((), ())] * len(self.rank)
        starts = zip(*[iter(self.start)] * dims, strict=True)
        sizes = zip(*[iter(self.size)] * dims, strict=True)
        return [Box(start, size) for start, size in zip(starts, sizes, strict=True)]

    def sort(self, dims: int) -> None:
        """Bring the boxes into the order of their starts in the first dimension."""
        starts = self.start[::dims] if dims else []
        if starts == sorted(starts):
            return
        order = sorted(range(len(starts)), key=starts.__getitem__)
        boxes = self.boxes(dims)
        self.rank = [self.rank[number] for number in order]
        self.start = [place for number in order for place in boxes[number].start]
        self.size = [length for number in order for length in boxes[number].size]

    def volume(self, dims: int) -> int:
        """How many elements its boxes have in all."""
        volumes: Iterable[int] = repeat(1, len(self.rank))
        for dim in range(dims):
            volumes = map(mul, volumes, self.size[dim::dims])
        return sum(volumes)

    def is_disjoint(self, dims: int) -> bool:
        """Whether no two of its boxes, which are in order, have an element in common."""
        if dims:
            starts = self.start[::dims]
            if all(map(le, map(add, starts, self.size[::dims]), starts[1:])):
                return True  # one behind the other: mostly so, and there may be very many
        return disjoint(self.boxes(dims))

    def within(self, wanted: Box) -> Iterator[tuple[int, Box]]:
        """The (rank, box) of every part of a box that some file holds.

        Boxes that are out of order may not be found: whoever needs all of a box must count its elements.
        """
        dims = len(wanted.start)
        if not dims:
            yield from ((rank, wanted) for rank in self.rank[:1])
            return
        starts, first = self.start[::dims], wanted.start[0]
        lowest = bisect_right(starts, first - max(self.size[::dims], default=0))
        for n in range(lowest, bisect_left(starts, first + wanted.size[0])):
            at = n * dims
            held = Box(tuple(self.start[at : at + dims]), tuple(self.size[at : at + dims]))
            common = intersection(wanted, held)
            if common is not None:
                yield self.rank[n], common


class ShardMap(msgspec.Struct, kw_only=True):
    """``shards.json``: every global tensor of a checkpoint, in columns, and where its parts lie.

    `tables` holds each distinct `Table` once, encoded; `table` tells which one is a tensor's. Other columns
    as in `Shards`.
    """

    format: str = "milepost.shards"
    version: tuple[int, int] = (1, 0)
    attempt: str
    world_size: int
    key: list[Key] = []
    dtype: list[str] = []
    kind: list[str] = []
    shape: list[list[int]] = []
    placement: list[str] = []
    alias: list[int] = []
    requires_grad: list[int] = []
    table: list[int] = []
    tables: list[msgspec.Raw] = []

    def where(self, number: int) -> Table:
        """The table of a tensor. Its columns have the right lengths; whether they are true is not known.

        Raises:
            CorruptCheckpointError: It is malformed.
        """
        dims = len(self.shape[number])
        try:
            table = msgspec.json.decode(self.tables[self.table[number]], type=Table)
        except msgspec.DecodeError as error:
            raise CorruptCheckpointError(f"{SHARDS_NAME}: a table is malformed: {error}") from None
        count = len(table.rank)
        if not len(table.start) == len(table.size) == count * dims:
            raise CorruptCheckpointError(f"{SHARDS_NAME}: the columns of a table differ in length")
        return table


def encode_shard_map(shards: ShardMap) -> bytes:
    """The bytes of ``shards.json``."""
    return msgspec.json.encode(shards)


def decode_shard_map(data: bytes, path: str, *, attempt: str, world_size: int) -> ShardMap:
    """The map in `data`, which was read from `path`; tables are checked when they are used.

    Raises:
        CorruptCheckpointError: It is malformed, or belongs to another checkpoint.
    """
    try:
        shards = msgspec.json.decode(data, type=ShardMap)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise CorruptCheckpointError(f"not valid shard map JSON ({error}): {path}", path=path) from None
    count = len(shards.key)
    columns = (shards.dtype, shards.kind, shards.shape, shards.placement, shards.alias, shards.table)
    problem = None
    if shards.format != "milepost.shards" or shards.version[0] != 1:
        problem = f"the format is {shards.format!r} {shards.version}"
    elif (shards.attempt, shards.world_size) != (attempt, world_size):
        problem = "it belongs to another checkpoint"
    elif any(len(column) != count for column in columns):
        problem = "its columns differ in length"
    elif any(not 0 <= table < len(shards.tables) for table in shards.table):
        problem = "it names a table that does not exist"
    else:
        problem = check_described(shards)
    if problem:
        raise CorruptCheckpointError(f"{problem}: {path}", path=path)
    return shards


def check_shards(shards: Shards, tensors: list[tuple[str, list[int]]]) -> str | None:
    """What is wrong with the columns of an index, None if nothing.

    Args:
        shards: The columns.
        tensors: Dtype and shape of each tensor of the index.
    """
    count = len(shards.tensor)
    columns = (
        *(shards.key, shards.dtype, shards.kind, shards.shape, shards.placement),
        *(shards.alias, shards.copies, shards.crcs, shards.pieces),
    )
    if any(len(column) != count for column in columns):
        return "the columns of the shards differ in length"
    if any(not 0 <= number < len(tensors) for number in shards.tensor):
        return "a shard names a tensor that does not exist"
    if any(n < 0 for n in shards.pieces):
        return "a shard has a negative number of pieces"
    if any(n > 1 and not shape for n, shape in zip(shards.pieces, shards.shape, strict=True)):
        return "a number has several pieces"
    flat = sum(n * len(shape) for n, shape in zip(shards.pieces, shards.shape, strict=True))
    if not len(shards.start) == len(shards.local) == len(shards.size) == flat:
        return "the columns of the pieces differ in length"
    problem = check_described(shards)
    if problem:
        return problem
    for entry, pieces in enumerate(shards.pieces_of_each()):
        dtype, held = tensors[shards.tensor[entry]]
        shape = shards.shape[entry]
        if dtype != shards.dtype[entry] or (pieces and len(held) != len(shape)):
            return f"shard {entry} does not fit its tensor"
        for piece in pieces:
            for start, local, size, length, extent in zip(*piece, shape, held, strict=True):
                if min(start, local, size) < 0 or start + size > length or local + size > extent:
                    return f"a piece of shard {entry} reaches beyond its tensor"
    return None


_DTYPE_CHARACTERS = 32
_DTYPE = re.compile(r"(?!q)[a-z]+([1-9][0-9]?[0-9]?)(?:x([1-9]))?(?:_[a-z0-9]+?)?(?:_x([1-9]))?")


@lru_cache(maxsize=256)
def dtype_bytes(name: str) -> int:
    """Bytes per element of a dtype of torch, which its name tells; 0 if this is no name of one.

    The first number is the bits of a value, and a factor after an x tells how many values make an element:
    ``float32`` and ``bcomplex32`` have 4 bytes, ``float8_e4m3fn``, ``bits2x4`` and ``float4_e2m1fn_x2`` one.
    Quantised dtypes, whose names begin with a q, are not among them: such tensors are saved as objects.
    """
    found = _DTYPE.fullmatch(name)
    if found is None:
        return int(name == "bool")
    bits, inner, outer = (int(number or 1) for number in found.groups())
    size = -(-bits * inner * outer // 8)
    return size if size in (1, 2, 4, 8, 16) else 0


class _Leaves(Protocol):
    dtype: list[str]
    kind: list[str]
    requires_grad: list[int]


def check_leaves(columns: _Leaves) -> str | None:
    """What is wrong with the dtypes, kinds and gradients of tensors, a rank's own or global ones."""
    count = len(columns.dtype)
    for name in set(columns.dtype):
        if len(name) > _DTYPE_CHARACTERS or not dtype_bytes(name):
            return f"unknown dtype {name[:80]!r}"
    if not set(columns.kind) <= {"tensor", "parameter", "ndarray"}:
        return f"unknown kind of tensor {sorted(set(columns.kind))}"
    for kind, dtype in set(zip(columns.kind, columns.dtype, strict=True)):
        if kind == "ndarray" and dtype not in ARRAY_DTYPES:
            return f"a numpy array of dtype {dtype}, which numpy lacks"
    if any(not 0 <= number < count for number in columns.requires_grad):
        return "requires_grad names a tensor that does not exist"
    if any(not columns.dtype[n].lstrip("b").startswith(("float", "complex")) for n in columns.requires_grad):
        return "a tensor of a dtype that has no gradient requires one"
    return None


ARRAY_DTYPES = {
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
}
"""The dtypes that torch and numpy share; arrays of others are kept as raw bytes."""


class _Described(_Leaves, Protocol):
    key: list[Key]
    shape: list[list[int]]
    alias: list[int]


def check_described(shards: _Described) -> str | None:
    """What is wrong with the columns that an index and the map have in common."""
    problem = check_leaves(shards)
    if problem:
        return problem
    for number, first in enumerate(shards.alias):
        if not 0 <= first <= number:
            return "an alias names an entry that does not come before"
        if (shards.dtype[first], shards.shape[first]) != (shards.dtype[number], shards.shape[number]):
            return "an alias names an entry of another dtype or shape"
    for shape in shards.shape:
        if any(length < 0 for length in shape) or not sizes_fit(shape, 16):
            return f"a global tensor has shape {shape}"
    for key in shards.key:
        if not is_key(key):
            return f"a key of the shards is malformed: {str(key)[:80]!r}"
    return None
