"""A checkpoint as one rank loads from it: the whole state, or what fits into a template."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

from milepost.errors import CorruptCheckpointError
from milepost.format.global_tree import with_global_columns, with_shards
from milepost.format.index import Index
from milepost.format.shards import ShardMap
from milepost.loading.aliases import hold_together, sharing_misfits
from milepost.loading.new_values import NewValues, relocation
from milepost.loading.rank_file import Verify
from milepost.loading.read_plan import ReadPlan
from milepost.loading.renames import Names
from milepost.loading.shard_lookup import ShardLookup
from milepost.loading.template import Fill, Match, match
from milepost.storage import OpenFile
from milepost.types import STATE_DICT

__all__ = ["CheckpointSource"]


class CheckpointSource:
    """The files of all ranks, of which those are opened that this rank needs. A context manager.

    Args:
        rank: The rank whose own values are loaded.
        shards: Where the parts of global tensors are; an empty map for a checkpoint without any.
        open_rank: Opens a rank's index and data file.
        open_again: Opens a data file once more.
        map_location: Where new tensors go, as for ``torch.load``.
        verify: Whether chunks are compared with their checksums: True, False, or "first".
        own_only: The template need not have tensors that other ranks alone hold.
        close: Called at the end.
    """

    def __init__(
        self,
        rank: int,
        shards: ShardMap,
        open_rank: Callable[[int], tuple[Index, OpenFile]],
        open_again: Callable[[Index], OpenFile],
        map_location: Any,
        verify: Verify,
        *,
        own_only: bool = False,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        relocate = relocation(map_location)
        self._close = close
        self._lookup = ShardLookup(rank, shards, open_rank, open_again, verify)
        self._plan = ReadPlan(self._lookup)
        self._new = NewValues(self._lookup, relocate)
        index, own = self._lookup.own.file.index, self._lookup.own.shards
        self._columns = with_global_columns(index.tensors, shards)
        self._tree, others = with_shards(
            index.tree, shards.key, self._lookup.first, set(own.tensor) if own else ()
        )
        self._foreign = frozenset(map(id, others)) if own_only else frozenset()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lookup.close()
        self._new.forget()
        self._close()

    @property
    def filling(self) -> bool:
        """Whether targets have been written to."""
        return self._plan.filling

    def open_all(self) -> None:
        """Open every file that `whole` reads from."""
        self._lookup.open_all()

    def whole(self) -> STATE_DICT:
        """The whole state: this rank's own values, and every global tensor as a plain one."""
        state = self._new.whole(self._tree)
        if not isinstance(state, dict):
            path = self._lookup.own.file.file.path
            raise CorruptCheckpointError(f"the index holds no state dict: {path}", path=path)
        return state

    def match(self, template: STATE_DICT, names: Names | None = None) -> Match:
        """Compare with the template, and open every file that `fill` reads; no target is written to.

        Values that replace others of the template are read here, tensors that it has by `fill`.
        """
        together = self._fit_together
        found = match(template, self._tree, self._columns, self._new.decode, names, self._foreign, together)
        found.misfits += sharing_misfits(
            found.fills, self._columns, self._tree, self._lookup.same_bytes, together
        )
        if not found.misfits:
            self._plan.add(found.fills)
        return found

    def check(self) -> None:
        """Read and verify what `fill` will read; no target is written to."""
        self._plan.check()

    def fill(self) -> None:
        """Read the tensors that `match` found into their targets, verified as asked."""
        self._plan.carry_out()

    def _fit_together(self, *fills: Fill) -> bool:
        """Whether targets that share memory, with others or in themselves, can hold their saved values.

        A checkpoint tells how tensors of a rank's own shared memory. It does not for global tensors: their
        values are read aside and compared.
        """
        if all(fill.number < self._lookup.first and fill.pieces is None for fill in fills):
            return False
        return hold_together(fills, lambda aside: ReadPlan(self._lookup, aside).carry_out())
