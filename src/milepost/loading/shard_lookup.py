"""The files of all ranks, and which of them holds which part of a global tensor."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec

from milepost.errors import CorruptCheckpointError
from milepost.format.boxes import Box, Piece, disjoint
from milepost.format.index import Index
from milepost.format.keys import decode_key
from milepost.format.paths import path_text
from milepost.format.shards import ShardMap, Shards
from milepost.loading.gather import shifted
from milepost.loading.rank_file import RankFile, Verify
from milepost.storage import OpenFile

__all__ = ["HeldRank", "ShardLookup"]

_KEPT_LOOKUPS = 256

_OPEN_SHARE = 8
"""One in so many of the files that a process may have open are kept open here; each may take two.

The rest are opened again when they are read. If a save has replaced the checkpoint by then, the load fails,
and targets may have changed; a higher ``ulimit -n`` keeps all of them open.
"""


@dataclass
class HeldRank:
    """One rank's file, and its parts of global tensors.

    Attributes:
        file: The index and the data file.
        shards: The columns of the index that describe the parts; None if it has none.
        entries: The entry in these columns of each encoded key.
        pieces: The pieces of each entry.
        parked: The data file is closed, except while it is read.
    """

    file: RankFile
    shards: Shards | None
    entries: dict[bytes, int]
    pieces: list[list[Piece]]
    parked: bool


class ShardLookup:
    """Knows which rank's file holds which part of a global tensor, and opens each file when first asked for.

    Args:
        rank: The rank whose own values are loaded.
        shards: The shard map; without global tensors it is empty.
        open_rank: Opens a rank's index and data file.
        open_again: Opens a data file once more: a process cannot have those of thousands of ranks open.
        verify: Whether chunks are compared with their checksums.
    """

    def __init__(
        self,
        rank: int,
        shards: ShardMap,
        open_rank: Callable[[int], tuple[Index, OpenFile]],
        open_again: Callable[[Index], OpenFile],
        verify: Verify,
    ) -> None:
        self.shards = shards
        self._open_rank, self._open_again, self._verify = open_rank, open_again, verify
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most_open = limit // _OPEN_SHARE if limit != resource.RLIM_INFINITY else shards.world_size
        self._ranks: dict[int, HeldRank] = {}
        self._lookups: dict[tuple[int, int, Box], tuple[tuple[int, Box], ...]] = {}
        self._names = [msgspec.json.encode(key) for key in shards.key]
        self.own = self.rank(rank)
        self.first = len(self.own.file.index.tensors.record)
        """The number of the first global tensor: those before it are tensors of this rank's own file."""

    def close(self) -> None:
        """Close all files."""
        for held in self._ranks.values():
            held.file.file.close()

    def rank(self, rank: int) -> HeldRank:
        """A rank's file, which is open or parked on return."""
        found = self._ranks.get(rank)
        if found is None:
            if not 0 <= rank < self.shards.world_size:
                raise CorruptCheckpointError(f"the shard map names rank {rank} of {self.shards.world_size}")
            index, file = self._open_rank(rank)
            shards = index.shards if isinstance(index.shards, Shards) else None
            entries = {msgspec.json.encode(key): n for n, key in enumerate(shards.key)} if shards else {}
            pieces = list(shards.pieces_of_each()) if shards else []
            parked = len(self._ranks) >= max(self._most_open, 1)  # never this rank's own
            if parked:
                file.close()
            found = HeldRank(RankFile(index, file, self._verify), shards, entries, pieces, parked)
            self._ranks[rank] = found
        return found

    def open_all(self) -> None:
        """Open every file that holds a part of a global tensor."""
        for number in {table: number for number, table in enumerate(self.shards.table)}.values():
            for rank in self.shards.where(number).rank:
                self.rank(rank)

    @contextmanager
    def opened(self, rank: int) -> Iterator[None]:
        """Has a rank's file open in the context, also if it is parked."""
        held = self.rank(rank)
        if held.parked:
            held.file.file = self._open_again(held.file.index)
        try:
            yield
        finally:
            if held.parked:
                held.file.file.close()

    def parts(self, number: int, wanted: Box) -> Iterator[tuple[int, int, Box, Box]]:
        """The parts of a box of a global tensor that files hold, which together are all of it.

        Yields:
            The rank, the number of its tensor, the box of that tensor, and the box of the global one.

        Raises:
            CorruptCheckpointError: The map and the ranks' indexes contradict each other, or they do not hold
                each element of the box once.
        """
        described = (self.shards.dtype[number], self.shards.shape[number])
        for rank, common in self._held_by(number, wanted):
            held = self.rank(rank)
            entry = self._entry(held, number)
            source = _containing(held.pieces[entry], common)
            if source is None:
                raise self._contradiction(held, f"does not hold {common} of {self._key(number)}")
            assert held.shards is not None
            if (held.shards.dtype[entry], held.shards.shape[entry]) != described:
                raise self._contradiction(held, f"holds {self._key(number)} of another dtype or shape")
            start = shifted(common.start, source.start, source.local)
            yield rank, held.shards.tensor[entry], Box(start, common.size), common

    def _held_by(self, number: int, box: Box) -> tuple[tuple[int, Box], ...]:
        """Which rank holds which part of a box. Many tensors are divided alike: answers are kept."""
        place = (self.shards.table[number], len(self.shards.shape[number]), box)
        found = self._lookups.get(place)
        if found is None:
            found = tuple(self.shards.where(number).within(box))
            if not disjoint([common for _, common in found]):
                raise CorruptCheckpointError("the shard map has an element twice", key=self._key(number))
            volume = sum(common.volume for _, common in found)
            if volume != box.volume:
                raise CorruptCheckpointError(
                    f"the ranks' files hold {volume} of the {box.volume} elements that are wanted",
                    key=self._key(number),
                )
            if len(self._lookups) >= _KEPT_LOOKUPS:
                self._lookups.clear()
            self._lookups[place] = found
        return found

    def same_bytes(self, first: int, second: int) -> bool:
        """Whether two tensors of one dtype, shape and stride have the same bytes, as their checksums tell."""
        if first < self.first and second < self.first:
            return self.own.file.checksums(first) == self.own.file.checksums(second)
        if min(first, second) < self.first:
            return False
        a, b = first - self.first, second - self.first
        table = self.shards.where(a)
        return table == self.shards.where(b) and all(
            self._checksums(rank, a) == self._checksums(rank, b) for rank in set(table.rank)
        )

    def location(self, number: int) -> str:
        """The device on which the rank whose values are loaded had a global tensor; "cpu" if it had none."""
        entry, shards = self.own.entries.get(self._names[number]), self.own.shards
        if entry is None or shards is None:
            return "cpu"
        return self.own.file.index.tensors.device[shards.tensor[entry]]

    def _checksums(self, rank: int, number: int) -> object:
        held = self.rank(rank)
        entry = self._entry(held, number)
        assert held.shards is not None
        return held.file.checksums(held.shards.tensor[entry])

    def _entry(self, held: HeldRank, number: int) -> int:
        if held.shards is None:
            raise self._contradiction(held, "has no shards")
        entry = held.entries.get(self._names[number])
        if entry is None:
            raise self._contradiction(held, f"does not hold {self._key(number)}")
        return entry

    def _contradiction(self, held: HeldRank, what: str) -> CorruptCheckpointError:
        return CorruptCheckpointError(
            f"the shard map and the index of rank {held.file.index.rank} contradict each other: it {what}",
            rank=held.file.index.rank,
            path=held.file.file.path,
        )

    def _key(self, number: int) -> str:
        return path_text(decode_key(self.shards.key[number]))


def _containing(pieces: Sequence[Piece], box: Box) -> Piece | None:
    for piece in pieces:
        if all(
            first <= start and start + n <= first + count
            for first, count, start, n in zip(piece.start, piece.size, box.start, box.size, strict=True)
        ):
            return piece
    return None
