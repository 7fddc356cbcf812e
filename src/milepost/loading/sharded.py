"""Loading tensors that several ranks saved between them, into whatever layout the template has.

`ShardedSource` is what `IndexedSource` is for one rank's file: it gives the whole state, or matches a
template and fills it. What a target wants of a global tensor is intersected with what the ranks' files hold
(`reshard`); only the chunks that hold some of that are read, each verified, in one go for each file.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import msgspec
import torch

from milepost.errors import CorruptCheckpointError
from milepost.format.boxes import Box, Piece, disjoint, whole
from milepost.format.global_tree import with_global_columns, with_shards
from milepost.format.index import Index
from milepost.format.keys import decode_key
from milepost.format.paths import path_text
from milepost.format.shards import ShardMap, Shards
from milepost.format.tree import Node, numbers_of
from milepost.loading.aliases import raw_bytes, sharing_misfits
from milepost.loading.gather import Gather, shifted
from milepost.loading.rank_file import IndexedSource
from milepost.loading.renames import Names
from milepost.loading.template import Fill, Match, copy_into, match
from milepost.state.decode import dtype_of, finished
from milepost.state.memory import reach
from milepost.state.placements import narrowed
from milepost.storage import OpenFile
from milepost.types import STATE_DICT

__all__ = ["ShardedSource"]

_KEPT_LOOKUPS = 256

_OPEN_SHARE = 8
"""One in so many of the files that a process may have open are kept open here; each may take two.

The rest are opened again when they are read. If a save has replaced the checkpoint by then, the load fails,
and targets may have changed; a higher ``ulimit -n`` keeps all of them open.
"""


@dataclass
class _Rank:
    """One rank's index and file, what they hold of global tensors, and what is wanted of it.

    `parked` says that the file is closed but for the time of reading.
    """

    index: Index
    source: IndexedSource
    gather: Gather
    entries: dict[bytes, int]
    pieces: list[list[Piece]]
    parked: bool


class ShardedSource:
    """The files of all ranks, as one rank loads from them.

    Args:
        rank: The rank whose own values are loaded.
        shards: Where the parts of global tensors lie.
        open_rank: Opens a rank's index and data file; it is called for those that are read from.
        open_again: Opens a data file once more: a process cannot have those of thousands of ranks open.
        map_location: Where new tensors go.
        verify: Whether chunks are compared with their checksums: True, False, or "first".
        own_only: What other ranks alone hold need not be in the template.
        close: Called at the end.
    """

    def __init__(
        self,
        rank: int,
        shards: ShardMap,
        open_rank: Callable[[int], tuple[Index, OpenFile]],
        open_again: Callable[[Index], OpenFile],
        map_location: Any,
        verify: Any,
        *,
        own_only: bool = False,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        self._close = close
        self._shards = shards
        self._open_rank, self._open_again = open_rank, open_again
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most_open = limit // _OPEN_SHARE if limit != resource.RLIM_INFINITY else shards.world_size
        self._map_location, self._verify = map_location, verify
        self._ranks: dict[int, _Rank] = {}
        self._plain: list[Fill] = []
        self._whole_ones: list[Fill] = []
        self._values: dict[int, Any] = {}
        self._made: dict[tuple[int, str, bool], Any] = {}
        self._lookups: dict[tuple[int, int, Box], Sequence[tuple[int, Box]]] = {}
        self._filling = False
        self._names = [msgspec.json.encode(key) for key in shards.key]
        self._own = self._rank(rank)
        index = self._own.index
        self._first = len(index.tensors.record)
        self._columns = with_global_columns(index.tensors, shards)
        self.tree, others = with_shards(index.tree, shards.key, self._first, self._own_numbers())
        self._foreign = frozenset(map(id, others)) if own_only else frozenset()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self._ranks.values():
            rank.source.file.close()
        self._close()

    @property
    def filling(self) -> bool:
        """Whether targets have been written to."""
        return self._filling or self._own.source.filling

    # -- what there is -----------------------------------------------------------------------------

    def whole(self) -> STATE_DICT:
        """The whole state: this rank's own values, and every global tensor, as a plain one."""
        self._make(range(len(self._shards.key)))
        return self._own.source.whole(self.tree)

    def open_all(self) -> None:
        """Open every file that holds a part of a global tensor: `whole` reads from all of them."""
        for number in {table: number for number, table in enumerate(self._shards.table)}.values():
            for rank in self._shards.where(number).rank:
                self._rank(rank)

    def match(self, template: STATE_DICT, names: Names | None = None) -> Match:
        """Compare with the template, and open everything that is read from; nothing is changed."""
        together = self._fit_together
        found = match(template, self.tree, self._columns, self._decode, names, self._foreign, together)
        found.misfits += sharing_misfits(found.fills, self._columns, self.tree, self._same_bytes, together)
        if not found.misfits:
            self._plan(found.fills)
        return found

    def _fit_together(self, *fills: Fill) -> bool:
        """Whether targets that share memory, among them or in one, can hold what was saved: tried elsewhere.

        How global tensors shared memory in part, as a view does, is not written down.
        """
        targets = [fill.target for fill in fills]
        start = min(target.data_ptr() for target in targets)
        end = max(target.data_ptr() + reach(target) * target.element_size() for target in targets)
        memory = torch.zeros(end - start, dtype=torch.uint8, device="cpu").untyped_storage()
        values, views = [], []
        for fill, target in zip(fills, targets, strict=True):
            offset, rest = divmod(target.data_ptr() - start, target.element_size())
            if rest:
                return False
            values.append(torch.empty(target.shape, dtype=target.dtype, device="cpu"))
            views.append(torch.empty(0, dtype=target.dtype, device="cpu"))
            views[-1].set_(memory, offset, target.shape, target.stride())
            if target.is_conj():
                views[-1] = views[-1].conj()
            if target.is_neg():
                views[-1] = torch._neg_view(views[-1])  # noqa: SLF001 - there is no public way
            self._plan([Fill(values[-1], fill.number, fill.parts())])
        self.fill(())
        self._filling = False
        for view, value in zip(views, values, strict=True):
            copy_into(view, value)
        return all(
            torch.equal(raw_bytes(view), raw_bytes(value)) for view, value in zip(views, values, strict=True)
        )

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
            if not 0 <= rank < self._shards.world_size:
                raise CorruptCheckpointError(f"the shard map names rank {rank} of {self._shards.world_size}")
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
            parked = len(self._ranks) >= max(self._most_open, 1)  # never this rank's own
            if parked:
                file.close()
            found = _Rank(index, source, Gather(index, source), entries, pieces, parked)
            self._ranks[rank] = found
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

    def _own_numbers(self) -> set[int]:
        shards = self._own.index.shards
        return set(shards.tensor) if isinstance(shards, Shards) else set()

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
        self._own.gather.request(fill.number, piece.box, target)

    def _held_by(self, number: int, box: Box) -> Sequence[tuple[int, Box]]:
        """Who holds which parts of a box. Tensors of one shape mostly lie alike: answers are kept."""
        place = (self._shards.table[number], len(self._shards.shape[number]), box)
        found = self._lookups.get(place)
        if found is None:
            if len(self._lookups) >= _KEPT_LOOKUPS:
                self._lookups.clear()
            found = self._lookups[place] = tuple(self._shards.where(number).within(box))
        return found

    def _found(self, number: int, wanted: Box) -> Iterator[tuple[_Rank, int, Box, Box]]:
        """What the files hold of a box: the rank, its tensor, where in that, and which part of the box.

        Raises:
            CorruptCheckpointError: Now or at the end: they do not hold all of it, each element once.
        """
        volume = 0
        found = self._held_by(number, wanted)
        if not disjoint([common for _, common in found]):
            raise CorruptCheckpointError("the shard map has an element twice", key=self._key(number))
        for rank, common in found:
            held = self._rank(rank)
            entry = self._entry(held, number)
            source = _containing(held.pieces[entry], common)
            if source is None:
                raise self._contradiction(held, f"does not hold {common} of {self._key(number)}")
            start = shifted(common.start, source.start, source.local)
            shards = self._shards_of(held)
            described = shards.dtype[entry], shards.shape[entry]
            if described != (self._shards.dtype[number], self._shards.shape[number]):
                raise self._contradiction(held, f"holds {self._key(number)} of another dtype or shape")
            yield held, shards.tensor[entry], Box(start, common.size), common
            volume += common.volume
        if volume != wanted.volume:
            raise CorruptCheckpointError(
                f"the ranks' files hold {volume} of the {wanted.volume} elements that are wanted",
                key=self._key(number),
            )

    def _plan_piece(self, number: int, target: torch.Tensor, wanted: Piece) -> None:
        for held, stored, box, common in self._found(number, wanted.box):
            into = Box(shifted(common.start, wanted.start, wanted.local), common.size)
            held.gather.request(stored, box, narrowed(target, into))

    # -- reading -----------------------------------------------------------------------------------

    def check(self, _: Sequence[Fill]) -> None:
        """Read and verify what `fill` will read; nothing is written to."""
        self._own.source.check(self._plain)
        self._own.source.read_aside([fill.number for fill in self._whole_ones])
        self._with_files(Gather.check)

    def fill(self, _: Sequence[Fill]) -> None:
        """Read what `match` has planned into the targets."""
        own = self._own.source
        own.read_aside([fill.number for fill in self._whole_ones])
        if self._plain:
            own.fill(self._plain)
        self._filling = True
        self._with_files(Gather.carry_out)
        for fill in self._whole_ones:
            own.copy_pieces(fill)
        self._plain, self._whole_ones = [], []

    def _with_files(self, read: Callable[[Gather], None]) -> None:
        for held in self._ranks.values():
            if held.parked and held.gather.wants:
                held.source.file = self._open_again(held.index)
            read(held.gather)
            if held.parked:
                held.source.file.close()

    # -- new tensors -------------------------------------------------------------------------------

    def _make(self, numbers: Sequence[int]) -> None:
        """Make global tensors whole, all in one go."""
        shards, fills = self._shards, []
        tensors: dict[int, torch.Tensor] = {}
        for number in numbers:
            root = shards.alias[number]
            if root not in tensors:
                for _ in self._found(root, whole(shards.shape[root]).box):
                    pass  # before memory is asked for: it is there
                tensors[root] = torch.empty(
                    shards.shape[root], dtype=dtype_of(shards.dtype[root]), device="cpu"
                )
                fills.append(Fill(tensors[root], self._first + root))
        self._plan(fills)
        filling = self._filling
        self.fill(fills)
        self._filling = filling
        gradients = set(shards.requires_grad)
        arrays = {shards.alias[number] for number in numbers if shards.kind[number] == "ndarray"}
        moved = {
            root: tensor if root in arrays else self._own.source.relocated(tensor, self._location(root))
            for root, tensor in tensors.items()
        }
        for number in numbers:
            root = shards.alias[number]
            made = (root, shards.kind[number], number in gradients)
            if made not in self._made:
                # Of its own: what requires a gradient must not make others on its memory do so.
                self._made[made] = finished(moved[root].detach(), made[1], made[2])
            self._values[number] = self._made[made]

    def _location(self, number: int) -> str:
        """The device on which the rank whose values are loaded had a tensor."""
        entry = self._own.entries.get(self._names[number])
        if entry is None:
            return "cpu"
        return self._own.index.tensors.device[self._shards_of(self._own).tensor[entry]]

    def _value_of(self, number: int) -> Any:
        self._make_missing([number])
        return self._values[number - self._first]

    def _make_missing(self, numbers: Iterable[int]) -> None:
        missing = {number - self._first for number in numbers if number >= self._first} - self._values.keys()
        if missing:
            self._make(sorted(missing))

    def _decode(self, node: Node) -> Any:
        """The value of a node; the global tensors in it are made in one go."""
        self._make_missing(numbers_of(node, "tensor"))
        return self._own.source.decode(node)


def _containing(pieces: Sequence[Piece], box: Box) -> Piece | None:
    for piece in pieces:
        if all(
            first <= start and start + n <= first + count
            for first, count, start, n in zip(piece.start, piece.size, box.start, box.size, strict=True)
        ):
            return piece
    return None
