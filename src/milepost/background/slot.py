"""A slot of a stager: an arena, and the tensors that show the records of one layout in it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from milepost import syscalls
from milepost.background.arena import Arena
from milepost.background.staged import SharedRecords, StagedImage
from milepost.state import accelerator
from milepost.state.decode import TensorBuilder
from milepost.state.encode import Parts
from milepost.state.memory import is_dense
from milepost.state.shares import mark_share
from milepost.types import STATE_DICT

__all__ = ["Copy", "Slot", "arena_bytes"]

Copy = Callable[[int, int, int, int], None]
"""Copies a piece of a record: ``copy(record, position, bytes, address)``."""

_TAIL_BYTES = 1 << 20


def arena_bytes(parts: Parts) -> int:
    """The size of the image, with room for its tail."""
    objects = sum(len(data) + 512 for data in parts.snapshot.objects)
    per_tensor = 512 * len(parts.walk.tensors)  # data.pkl and the central directory
    return parts.plan.layout.end + objects + per_tensor + _TAIL_BYTES


class Slot:
    """An arena, and the tensors that show the records of one layout in it."""

    def __init__(self, arena: Arena, *, pin: bool | None) -> None:
        self.arena = arena
        self.busy = False
        self.image: StagedImage | None = None
        self._plan: Any = None
        self._values: list[Any] = []
        self._copies: list[tuple[int, torch.Tensor]] = []
        self._raw: list[int] = []
        self._shares: set[int] = set()
        self._storages: list[torch.UntypedStorage] = []
        self._baseline: list[int] = []
        self._pin = pin if pin is not None else torch.cuda.is_available()
        self._unpin: Callable[[], object] | None = None
        self._pin_arena()

    def _pin_arena(self) -> None:
        address = syscalls.address_of(self.arena.view)
        if self._pin and address is not None:
            self._unpin = accelerator.pin(self, address, self.arena.size)

    def _release_pin(self) -> None:
        if self._unpin is not None:
            self._unpin()
            self._unpin = None

    def grow(self, size: int) -> None:
        """Make the arena larger; the views of before are dropped."""
        self._drop()
        self._release_pin()
        self.arena.grow(size)
        self._pin_arena()

    def is_free(self) -> bool:
        """Whether no copy is under way and nobody holds a view of the arena."""
        return not self.busy and self._uses() == self._baseline

    def _uses(self) -> list[int]:
        """How often each view, and each storage below them, is referred to."""
        counts = [*map(sys.getrefcount, self._values), *map(sys.getrefcount, self._storages)]
        count = getattr(torch._C, "_storage_Use_Count", None)  # noqa: SLF001 - no public way to ask
        if count is not None:
            counts += [count(storage._cdata) for storage in self._storages]  # noqa: SLF001
        return counts

    def views(self, parts: Parts) -> list[Any]:
        """Tensors over the arena for this layout, kept until the layout changes."""
        plan = parts.plan
        if self._plan is plan:
            return self._values
        self._drop()
        with torch.inference_mode(mode=False):  # views that count their changes, and can be changed
            self._make_views(plan)
        self._plan = plan
        self._baseline = self._uses()
        return self._values

    def _make_views(self, plan: Any) -> None:
        layout, memory = plan.layout, self.arena.view
        self._storages = [
            torch.frombuffer(memory[offset : offset + length], dtype=torch.uint8).untyped_storage()
            if length
            else torch.empty(0, dtype=torch.uint8).untyped_storage()
            for offset, length in zip(layout.offsets, layout.lengths, strict=True)
        ]
        builder = TensorBuilder(plan.tensors, self._storages.__getitem__, lambda _: b"")
        self._values = [builder.value(number) for number in range(len(plan.tensors.record))]
        self._copies, self._raw = [], []
        for record, (number, _) in enumerate(plan.firsts):
            view = builder.tensor(number)
            whole = view.nbytes == layout.lengths[record] and is_dense(view)
            if whole and not view.is_conj() and not view.is_neg():
                self._copies.append((number, view))
            elif layout.lengths[record]:
                self._raw.append(record)
        builder.forget()  # it is part of a reference cycle, and would count as a user until collected

    def fill(
        self, parts: Parts, shared: SharedRecords | None = None, copy: Copy | None = None
    ) -> tuple[STATE_DICT, StagedImage]:
        """Copy every record to its place; returns the state dict of views, and the image. Ends `busy`.

        Args:
            parts: What to copy.
            shared: Records that need not be copied.
            copy: The state's copier, if other states were taken apart since.
        """
        try:
            return self._fill(parts, shared or SharedRecords(), copy)
        finally:
            self.busy = False

    def _fill(self, parts: Parts, shared: SharedRecords, copy: Copy | None) -> tuple[STATE_DICT, StagedImage]:
        values = self.views(parts)
        tensors, left = parts.walk.tensors, {record for record, *_ in shared.records}
        copies, raw = self._copies, self._raw
        if left:
            numbers = {parts.plan.firsts[record][0] for record in left}
            copies = [copy for copy in copies if copy[0] not in numbers]
            raw = [record for record in raw if record not in left]
        accelerator.copy_tensors(
            [view for _, view in copies],
            [tensors[number] for number, _ in copies],
            pinned=self._unpin is not None,
        )
        address = syscalls.address_of(self.arena.view)
        if raw and address is not None:
            copy, layout = copy or parts.copier(), parts.plan.layout
            for record in raw:
                copy(record, 0, layout.lengths[record], address + layout.offsets[record])
        staged: STATE_DICT = parts.rebuild(values.__getitem__)
        snapshot = parts.snapshot
        snapshot.shared = shared.records
        if snapshot.shares is not None:
            snapshot.shares.crcs = parts.crcs()
        self._mark_shares(values, set(parts.division.columns.tensor) if parts.division else set())
        self.image = StagedImage(self.arena, snapshot, shared)
        self.image.recognise(staged, values)
        return staged, self.image

    def _mark_shares(self, values: list[Any], shares: set[int]) -> None:
        for number in shares ^ self._shares:
            mark_share(values[number], number in shares)
        self._shares = shares

    def _drop(self) -> None:
        self._plan, self._values, self._copies, self._raw = None, [], [], []
        self._storages, self._baseline, self._shares = [], [], set()

    def close(self) -> None:
        """Let go of the arena; views that somebody holds keep its memory."""
        self._drop()
        self._release_pin()
        self.arena.close()
