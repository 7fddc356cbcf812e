"""The tensors that a load wants, and the reads that fill them: one `Gather` for each file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from milepost.format.boxes import Box, Piece
from milepost.loading.gather import Gather, shifted
from milepost.loading.shard_lookup import ShardLookup
from milepost.loading.template import Fill
from milepost.state.placements import narrowed

__all__ = ["ReadPlan"]


class ReadPlan:
    """Collects tensors to fill, and fills them.

    Args:
        lookup: The files.
        fills: The first tensors to fill.

    Attributes:
        filling: Whether targets have been written to.
    """

    def __init__(self, lookup: ShardLookup, fills: Sequence[Fill] = ()) -> None:
        self.filling = False
        self._lookup = lookup
        self._gathers: dict[int, Gather] = {}
        self._own = self._gathers[lookup.own.file.index.rank] = Gather(lookup.own.file)
        self._seen: set[Any] = set()
        self.add(fills)

    def add(self, fills: Sequence[Fill]) -> None:
        """Plan the reads of these tensors; opens every file that is read from."""
        own, first = self._own, self._lookup.first
        for fill in fills:
            if fill.number >= first:
                self._add_global(fill)
            elif fill.pieces is None:
                own.request(fill.number, fill.target)
            else:
                for piece in fill.pieces:
                    target = narrowed(fill.target, Box(piece.local, piece.size))
                    own.request(fill.number, target, piece.box)

    def _add_global(self, fill: Fill) -> None:
        number, target = fill.number - self._lookup.first, fill.target
        root = self._lookup.shards.alias[number]
        place = (target.data_ptr(), target.dtype, target.shape, target.stride(), fill.pieces, root)
        if target.numel() and place in self._seen:
            return
        self._seen.add(place)
        for piece in fill.parts():
            self.add_parts(target, piece, self._lookup.parts(number, piece.box))

    def add_parts(
        self, target: torch.Tensor, wanted: Piece, parts: Iterable[tuple[int, int, Box, Box]]
    ) -> None:
        """Plan the reads of the parts of a box of a global tensor, as `ShardLookup.parts` gives them."""
        for rank, stored, box, common in parts:
            gather = self._gathers.get(rank)
            if gather is None:
                gather = self._gathers[rank] = Gather(self._lookup.rank(rank).file)
            into = Box(shifted(common.start, wanted.start, wanted.local), common.size)
            gather.request(stored, narrowed(target, into), box)

    def check(self) -> None:
        """Read and verify everything that `carry_out` will read; no target is written to."""
        for rank, gather in self._gathers.items():
            with self._lookup.opened(rank):
                gather.check()

    def carry_out(self) -> None:
        """Read everything into its target, verified.

        If it raises, targets may have been written to.
        """
        self.filling = True
        for rank, gather in self._gathers.items():
            with self._lookup.opened(rank):
                gather.carry_out()
