"""Loading tensors that several ranks saved between them, into whatever layout the template has.

`ShardedSource` is what `IndexedSource` is for one rank's file: it gives the whole state, or matches a template
and fills it. What a target wants of a global tensor is intersected with what the ranks' files hold (`reshard`);
only the chunks that hold some of that are read, each verified, in one go for each file.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import msgspec
import torch

from milepost.errors import CorruptCheckpointError
from milepost.manifest import CHUNK_BYTES, DTYPE_BYTES, Index, Tensors
from milepost.names import Names
from milepost.placements import narrowed
from milepost.rebuild import dtype_of, finished
from milepost.reshard import Box, Piece, is_run, span, split_for_reading, steps_of
from milepost.shards import Key, ShardMap, Shards, decode_key
from milepost.sharing import sharing_misfits
from milepost.sources import IndexedSource
from milepost.storage import OpenFile
from milepost.storage.reading import Part
from milepost.template import Fill, Match, copy_into, match
from milepost.tree import Node, path_text
from milepost.types import STATE_DICT

__all__ = ["ShardedSource", "with_shards"]

_SMALL_BYTES = 2 * CHUNK_BYTES
_LARGE_BYTES = 16 << 20
_BATCH_BYTES = 64 << 20

Copy = Callable[[int], None]
"""Puts what was read in place; called with the address of the first byte that was asked for."""


@dataclass(slots=True)
class _Wanted:
    """Bytes of a record that are read aside, and what is done with them then."""

    record: int
    start: int
    end: int
    copy: Copy


@dataclass
class _Reading:
    """What is read from one rank's file."""

    direct: list[Part] = field(default_factory=list)
    aside: list[_Wanted] = field(default_factory=list)


@dataclass
class _Rank:
    """One rank's index and file."""

    index: Index
    source: IndexedSource
    entries: dict[bytes, int]
    pieces: list[list[Piece]]


class ShardedSource:
    """The files of all ranks, as one rank loads from them.

    Args:
        rank: The rank whose own values are loaded.
        shards: Where the parts of global tensors lie.
        open_rank: Opens a rank's index and data file; it is called for those that are read from.
        map_location: Where new tensors go.
        verify: Whether chunks are compared with their checksums: True, False, or "first".
        same_world: As many ranks load as saved, so that what other ranks alone hold is not expected here.
        close: Called at the end.
    """

    def __init__(
        self,
        rank: int,
        shards: ShardMap,
        open_rank: Callable[[int], tuple[Index, OpenFile]],
        map_location: Any,
        verify: Any,
        *,
        same_world: bool = False,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        self._same_world, self._close = same_world, close
        self._shards = shards
        self._open_rank = open_rank
        self._map_location, self._verify = map_location, verify
        self._ranks: dict[int, _Rank] = {}
        self._readings: dict[int, _Reading] = {}
        self._plain: list[Fill] = []
        self._whole_ones: list[Fill] = []
        self._values: dict[int, Any] = {}
        self._made: dict[tuple[int, str, bool], Any] = {}
        self.filling = False
        self._names = [msgspec.json.encode(key) for key in shards.key]
        self._own = self._rank(rank)
        index = self._own.index
        self._first = len(index.tensors.record)
        self._columns = _extended(index.tensors, shards)
        self.tree, self._others = with_shards(index.tree, shards.key, self._first)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self._ranks.values():
            rank.source.file.close()
        self._close()

    # -- what there is -----------------------------------------------------------------------------

    def whole(self) -> STATE_DICT:
        """The whole state: this rank's own values, and every global tensor, as a plain one."""
        self._make(range(len(self._shards.key)))
        return self._own.source.whole(self.tree)

    def match(self, template: STATE_DICT, names: Names | None = None) -> Match:
        """Compare with the template, and open everything that is read from; nothing is changed."""
        found = match(template, self.tree, self._columns, self._own.source.decode, names)
        found.misfits += sharing_misfits(found.fills, self._columns, self.tree, self._same_bytes)
        if not found.misfits:
            self._plan(found.fills)
        return found

    @property
    def of_others(self) -> set[str]:
        """Paths of tensors that the rank whose values are loaded does not hold itself."""
        return {path_text(decode_key(self._shards.key[number])) for number in self._others}

    def _same_bytes(self, first: int, second: int) -> bool:
        if first < self._first and second < self._first:
            return self._own.source.same_bytes(first, second)
        if min(first, second) < self._first:
            return False
        a, b = first - self._first, second - self._first
        table = self._shards.where(a)
        return table == self._shards.where(b) and all(
            self._checksums(rank, a) == self._checksums(rank, b) for rank in set(table.rank)
        )

    def _checksums(self, rank: int, number: int) -> Any:
        held = self._rank(rank)
        stored = self._shards_of(held).tensor[self._entry(held, number)]
        tensors, records = held.index.tensors, held.index.records
        record, starts = tensors.record[stored], records.chunks()
        return (
            tensors.byte_offset[stored],
            tensors.stride[stored],
            records.crcs[starts[record] : starts[record + 1]],
        )

    # -- ranks -------------------------------------------------------------------------------------

    def _rank(self, rank: int) -> _Rank:
        found = self._ranks.get(rank)
        if found is None:
            index, file = self._open_rank(rank)
            source = IndexedSource(
                index,
                file,
                self._map_location,
                self._verify,
                beyond=self._value_of if not self._ranks else None,
            )
            shards = index.shards
            entries: dict[bytes, int] = {}
            pieces: list[list[Piece]] = []
            if isinstance(shards, Shards):
                entries = {msgspec.json.encode(key): n for n, key in enumerate(shards.key)}
                pieces = list(shards.pieces_of_each())
            found = self._ranks[rank] = _Rank(index, source, entries, pieces)
        return found

    def _shards_of(self, held: _Rank) -> Shards:
        shards = held.index.shards
        if not isinstance(shards, Shards):
            raise self._contradiction(held, "has no shards")
        return shards

    def _entry(self, held: _Rank, number: int) -> int:
        entry = held.entries.get(self._names[number])
        if entry is None:
            raise self._contradiction(held, f"does not hold {self._key(number)}")
        return entry

    def _contradiction(self, held: _Rank, what: str) -> CorruptCheckpointError:
        return CorruptCheckpointError(
            f"the shard map and the index of rank {held.index.rank} contradict each other: it {what}",
            rank=held.index.rank,
            path=held.source.file.path,
        )

    def _key(self, number: int) -> str:
        return path_text(decode_key(self._shards.key[number]))

    # -- planning ----------------------------------------------------------------------------------

    def _plan(self, fills: Sequence[Fill]) -> None:
        seen = set()
        for fill in fills:
            number = fill.number - self._first
            if number < 0 and fill.pieces is None:
                self._plain.append(fill)
                continue
            if number >= 0:
                target = fill.target
                place = (
                    target.data_ptr(),
                    target.shape,
                    target.stride(),
                    fill.pieces,
                    self._shards.alias[number],
                )
                if target.numel() and place in seen:
                    continue
                seen.add(place)
            for piece in fill.parts():
                if number < 0:
                    self._plan_own(fill, piece)
                else:
                    self._plan_piece(number, fill.target, piece)

    def _plan_own(self, fill: Fill, piece: Piece) -> None:
        """A part of a tensor that this rank alone saved."""
        tensors = self._own.index.tensors
        if fill.number in tensors.conj or fill.number in tensors.neg:
            self._whole_ones.append(Fill(fill.target, fill.number, (piece,)))
            return
        target = narrowed(fill.target, Box(piece.local, piece.size))
        self._request(self._own.index.rank, fill.number, piece.box, target)

    def _plan_piece(self, number: int, target: torch.Tensor, wanted: Piece) -> None:
        volume = 0
        for rank, common in self._shards.where(number).within(wanted.box):
            held = self._rank(rank)
            entry = self._entry(held, number)
            source = _containing(held.pieces[entry], common)
            if source is None:
                raise self._contradiction(held, f"does not hold {common} of {self._key(number)}")
            start = _shifted(common.start, source.start, source.local)
            into = Box(_shifted(common.start, wanted.start, wanted.local), common.size)
            stored = self._shards_of(held).tensor[entry]
            if held.index.tensors.dtype[stored] != self._shards.dtype[number]:
                raise self._contradiction(held, f"holds {self._key(number)} as another dtype")
            self._request(rank, stored, Box(start, common.size), narrowed(target, into))
            volume += common.volume
        if volume != wanted.box.volume:
            raise CorruptCheckpointError(
                f"the ranks' files hold {volume} of the {wanted.box.volume} elements that are wanted of this tensor",
                key=self._key(number),
            )

    def _request(self, rank: int, stored: int, box: Box, target: torch.Tensor) -> None:
        """Have a box of a tensor in a rank's file read into a target of that shape."""
        if not box.volume:
            return
        held = self._rank(rank)
        tensors = held.index.tensors
        stride, size = tensors.stride[stored], DTYPE_BYTES[tensors.dtype[stored]]
        record, base = tensors.record[stored], tensors.byte_offset[stored]
        reading = self._readings.setdefault(rank, _Reading())
        if target.is_cpu and is_run(box.size, stride, target.stride()):
            start = base + span(box.start, box.size, stride)[0] * size
            self._request_run(reading, held, record, start, start + box.volume * size, target.data_ptr())
            return
        dtype = dtype_of(tensors.dtype[stored])
        for part in split_for_reading(box, stride, small=_SMALL_BYTES // size, large=_LARGE_BYTES // size):
            first, end = span(part.start, part.size, stride)
            into = narrowed(target, Box(_shifted(part.start, box.start, (0,) * len(box.start)), part.size))
            copy = partial(_copy_box, into, dtype, part.size, tuple(stride))
            reading.aside.append(_Wanted(record, base + first * size, base + end * size, copy))

    def _request_run(
        self, reading: _Reading, held: _Rank, record: int, start: int, end: int, address: int
    ) -> None:
        """A run of bytes: whole chunks go straight into place, what is left at the ends is read aside."""
        length = held.index.records.length[record]
        first = -(-start // CHUNK_BYTES) * CHUNK_BYTES
        last = end if end == length else end // CHUNK_BYTES * CHUNK_BYTES
        if first >= last:
            reading.aside.append(_Wanted(record, start, end, partial(_copy_bytes, address, end - start)))
            return
        reading.direct.append(held.source.part(record, first, last, address + first - start))
        for a, b in ((start, first), (last, end)):
            if a < b:
                copy = partial(_copy_bytes, address + a - start, b - a)
                reading.aside.append(_Wanted(record, a, b, copy))

    # -- reading -----------------------------------------------------------------------------------

    def fill(self, _: Sequence[Fill]) -> None:
        """Read what `match` has planned into the targets."""
        own = self._own.source
        if self._verify == "first":
            for rank, reading in self._readings.items():
                source = self._ranks[rank].source
                spans = _spans(reading.aside, self._ranks[rank].index)
                parts = [source.part(record, start, end, None) for record, start, end, _ in spans]
                checks = [
                    Part(part.offset, None, part.length, part.crcs, part.tag) for part in reading.direct
                ]
                source.read(sorted([*parts, *checks], key=lambda part: part.offset))
        if self._plain:
            own.fill(self._plain)
        self.filling = True
        for rank, reading in sorted(self._readings.items()):
            self._carry_out(self._ranks[rank], reading)
        for fill in self._whole_ones:
            own.copy_pieces(fill)
        self._readings, self._plain, self._whole_ones = {}, [], []

    def _carry_out(self, held: _Rank, reading: _Reading) -> None:
        direct = reading.direct
        for batch in _batches(_spans(reading.aside, held.index)):
            scratch = torch.empty(
                sum(_aligned(end - start) for _, start, end, _ in batch), dtype=torch.uint8, device="cpu"
            )
            parts, copies, position = list(direct), [], 0
            for record, start, end, wanted in batch:
                address = scratch.data_ptr() + position
                parts.append(held.source.part(record, start, end, address))
                copies += [(want.copy, address + want.start - start) for want in wanted]
                position += _aligned(end - start)
            held.source.read(sorted(parts, key=lambda part: part.offset))
            for copy, address in copies:
                copy(address)
            direct = []
        if direct:
            held.source.read(sorted(direct, key=lambda part: part.offset))

    # -- new tensors -------------------------------------------------------------------------------

    def _make(self, numbers: Sequence[int]) -> None:
        """Make global tensors whole, all in one go."""
        shards, fills = self._shards, []
        tensors: dict[int, torch.Tensor] = {}
        for number in numbers:
            root = shards.alias[number]
            if root not in tensors:
                tensors[root] = torch.empty(
                    shards.shape[root], dtype=dtype_of(shards.dtype[root]), device="cpu"
                )
                fills.append(Fill(tensors[root], self._first + root))
        self._plan(fills)
        self.fill(fills)
        self.filling = False
        gradients = set(shards.requires_grad)
        moved = {
            root: self._own.source.relocated(tensor, self._location(root)) for root, tensor in tensors.items()
        }
        for number in numbers:
            root = shards.alias[number]
            made = (root, shards.kind[number], number in gradients)
            if made not in self._made:
                self._made[made] = finished(moved[root], made[1], made[2])
            self._values[number] = self._made[made]

    def _location(self, number: int) -> str:
        """The device on which the rank whose values are loaded had a tensor."""
        entry = self._own.entries.get(self._names[number])
        if entry is None:
            return "cpu"
        return self._own.index.tensors.device[self._shards_of(self._own).tensor[entry]]

    def _value_of(self, number: int) -> Any:
        number -= self._first
        if number not in self._values:
            filling = self.filling
            self._make([number])
            self.filling = filling
        return self._values[number]


def _containing(pieces: Sequence[Piece], box: Box) -> Piece | None:
    for piece in pieces:
        if all(
            first <= start and start + n <= first + count
            for first, count, start, n in zip(piece.start, piece.size, box.start, box.size, strict=True)
        ):
            return piece
    return None


def _aligned(length: int) -> int:
    return -(-length // 64) * 64


def _shifted(position: Sequence[int], before: Sequence[int], after: Sequence[int]) -> tuple[int, ...]:
    return tuple(p - a + b for p, a, b in zip(position, before, after, strict=True))


def _copy_bytes(target: int, size: int, address: int) -> None:
    ctypes.memmove(target, address, size)


def _copy_box(
    target: torch.Tensor, dtype: torch.dtype, size: tuple[int, ...], stride: tuple[int, ...], address: int
) -> None:
    reach = span((0,) * len(size), size, stride)[1] * dtype.itemsize
    memory = (ctypes.c_char * reach).from_address(address)
    source = torch.frombuffer(memory, dtype=torch.uint8).view(dtype).as_strided(size, stride)
    copy_into(target, source)


def _spans(wanted: Sequence[_Wanted], index: Index) -> Iterator[tuple[int, int, int, list[_Wanted]]]:
    """Whole chunks that hold what is wanted: (record, start, end, what is wanted of it), each chunk once."""
    lengths = index.records.length
    current: tuple[int, int, int, list[_Wanted]] | None = None
    for want in sorted(wanted, key=lambda want: (index.records.offset[want.record], want.start)):
        start = want.start // CHUNK_BYTES * CHUNK_BYTES
        end = min(-(-want.end // CHUNK_BYTES) * CHUNK_BYTES, lengths[want.record])
        if current is not None and current[0] == want.record and start <= current[2]:
            reach = max(end, current[2])
            if reach == current[2] or reach - current[1] <= _LARGE_BYTES:
                current = (current[0], current[1], reach, current[3])
                current[3].append(want)
                continue
        if current is not None:
            yield current
        current = (want.record, start, end, [want])
    if current is not None:
        yield current


def _batches(
    spans: Iterator[tuple[int, int, int, list[_Wanted]]],
) -> Iterator[list[tuple[int, int, int, list[_Wanted]]]]:
    batch: list[tuple[int, int, int, list[_Wanted]]] = []
    size = 0
    for item in spans:
        if batch and size + item[2] - item[1] > _BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += item[2] - item[1]
    if batch:
        yield batch


# -- the tree --------------------------------------------------------------------------------------


def _extended(tensors: Tensors, shards: ShardMap) -> Tensors:
    """The columns of an index, with the global tensors behind its own."""
    return Tensors(
        record=[*tensors.record, *(-1 - alias for alias in shards.alias)],
        byte_offset=[*tensors.byte_offset, *[0] * len(shards.key)],
        dtype=[*tensors.dtype, *shards.dtype],
        shape=[*tensors.shape, *shards.shape],
        stride=[*tensors.stride, *(list(steps_of(shape)) for shape in shards.shape)],
        kind=[*tensors.kind, *shards.kind],
        device=tensors.device,
        requires_grad=tensors.requires_grad,
        conj=tensors.conj,
        neg=tensors.neg,
    )


_Trie = dict[bytes, Any]


def with_shards(tree: Node, keys: Sequence[Key], first: int) -> tuple[Node, list[int]]:
    """A tree that refers to global tensors, as numbers from `first` on, wherever a rank has a part of one.

    Tensors that other ranks alone hold get a place in it as well.

    Args:
        tree: A rank's tree.
        keys: The keys of all global tensors.
        first: The number of the first of them.

    Returns:
        The tree, and which of the keys it did not have.
    """
    root: _Trie = {}
    for number, key in enumerate(keys):
        node = root
        for part in key[:-1]:
            node = node.setdefault(msgspec.json.encode(part), {})
            if not isinstance(node, dict):
                raise CorruptCheckpointError(f"the shard map has a tensor within a tensor: {key}")
        if not key or isinstance(node.get(msgspec.json.encode(key[-1])), dict):
            raise CorruptCheckpointError(f"the shard map has a tensor within a tensor: {key}")
        node[msgspec.json.encode(key[-1])] = number
    others: list[int] = []
    return _merged(tree, root, first, others), others


def _merged(node: Node, trie: _Trie | int, first: int, others: list[int]) -> Node:
    if isinstance(trie, int):
        return ["tensor", first + trie]
    tag = node[0]
    left = dict(trie)
    if tag in ("dict", "ordered", "default"):
        entries = []
        for key, child in node[1]:
            plain = key[0] == "str" and key[1] is not None
            below = left.pop(msgspec.json.encode(key[1] if plain else key), None)
            entries.append((key, child if below is None else _merged(child, below, first, others)))
        for part, below in left.items():
            name = msgspec.json.decode(part)
            if isinstance(name, list) and name[0] == "item":
                continue
            entries.append((["str", name] if isinstance(name, str) else name, _made(below, first, others)))
        return [tag, entries, *node[2:]]
    if tag in ("list", "tuple"):
        items = []
        for position, child in enumerate(node[1]):
            below = left.pop(msgspec.json.encode(["item", position]), None)
            items.append(child if below is None else _merged(child, below, first, others))
        while (below := left.pop(msgspec.json.encode(["item", len(items)]), None)) is not None:
            items.append(_made(below, first, others))
        return [tag, items]
    return _made(trie, first, others)


def _made(trie: _Trie | int, first: int, others: list[int]) -> Node:
    """The node of what only other ranks hold."""
    if isinstance(trie, int):
        others.append(trie)
        return ["tensor", first + trie]
    if all(part == msgspec.json.encode(["item", n]) for n, part in enumerate(trie)):
        return ["list", [_made(below, first, others) for below in trie.values()]]
    return _merged(["dict", []], trie, first, others)
