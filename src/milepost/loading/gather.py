"""The read engine: boxes of the tensors in one rank's file go into tensors of any strides.

Bytes that are one run of memory on both sides are read straight into place, chunk by chunk. All other bytes,
and the chunks at the ends of a run, are read into scratch memory, verified and copied. Each chunk is read
once, in few large reads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from milepost.format.boxes import Box, is_run, span, split_for_reading, whole
from milepost.format.index import CHUNK_BYTES
from milepost.loading.rank_file import RankFile
from milepost.loading.template import copy_into
from milepost.state.decode import dtype_of, tensor_over
from milepost.state.memory import is_dense
from milepost.state.placements import narrowed
from milepost.storage.reading import Part
from milepost.utils import gc_paused

__all__ = ["Gather", "shifted"]

_SMALL_BYTES = 2 * CHUNK_BYTES
_LARGE_BYTES = 16 << 20
_BATCH_BYTES = 64 << 20
_ALIGNED_BYTES = 64

Put = Callable[[torch.UntypedStorage, int], None]
"""Copies bytes into place; gets the scratch memory, and where in it the first of them is."""


@dataclass(slots=True)
class _Wanted:
    """Bytes of a record that are read into scratch memory, and the copy that follows."""

    record: int
    start: int
    end: int
    put: Put


@dataclass(slots=True)
class _Span:
    """Whole chunks of a record, the wanted bytes in them, and their place in the scratch memory."""

    record: int
    start: int
    end: int
    wanted: list[_Wanted]
    place: int = 0


class Gather:
    """Collects requests for tensors of one file, then reads them.

    Args:
        file: The rank's file.
    """

    def __init__(self, file: RankFile) -> None:
        self._file = file
        tensors = file.index.tensors
        self._conj, self._neg = set(tensors.conj), set(tensors.neg)
        self._records: dict[int, int] = {}
        self._copies: list[tuple[int, int, int]] = []
        self._runs: list[tuple[int, int, int, int]] = []
        self._aside: list[_Wanted] = []

    def request(self, number: int, target: torch.Tensor, box: Box | None = None) -> None:
        """Ask for a tensor of the file, or for a box of it, to be read into a target of that shape."""
        tensors, bits = self._file.index.tensors, (number in self._conj, number in self._neg)
        stride, record = tensors.stride[number], tensors.record[number]
        dtype = dtype_of(tensors.dtype[number])
        size = dtype.itemsize
        as_saved = target.is_cpu and (target.dtype, target.is_conj(), target.is_neg()) == (dtype, *bits)
        if as_saved and (box is None or list(box.size) == tensors.shape[number]):
            # Nearly always: a whole record, whose bytes become the target's memory.
            length = self._file.index.records.length[record]
            if length == target.numel() * size and list(target.stride()) == stride and is_dense(target):
                address = target.data_ptr()
                first = self._records.setdefault(record, address)
                if first != address:
                    self._copies.append((address, first, length))
                return
        box = whole(target.shape).box if box is None else box
        if not box.volume:
            return
        base = tensors.byte_offset[number]
        if as_saved and is_run(box.size, stride, target.stride()):
            start = base + span(box.start, box.size, stride)[0] * size
            self._request_run(record, start, start + box.volume * size, target.data_ptr())
            return
        origin = (0,) * len(box.start)
        for part in split_for_reading(box, stride, small=_SMALL_BYTES // size, large=_LARGE_BYTES // size):
            start, end = (base + place * size for place in span(part.start, part.size, stride))
            into = narrowed(target, Box(shifted(part.start, box.start, origin), part.size))
            self._aside.append(_Wanted(record, start, end, partial(_copy_box, into, dtype, stride, bits)))

    def _request_run(self, record: int, start: int, end: int, address: int) -> None:
        length = self._file.index.records.length[record]
        first = -(-start // CHUNK_BYTES) * CHUNK_BYTES
        last = end if end == length else end // CHUNK_BYTES * CHUNK_BYTES
        if first >= last:
            first = last = start
        else:
            self._runs.append((record, first, last, address + first - start))
        for a, b in ((start, first), (last, end)):
            if a < b:
                self._aside.append(_Wanted(record, a, b, partial(_copy_bytes, address + a - start, b - a)))

    def check(self) -> None:
        """Read and verify everything without touching a target."""
        parts = self._direct()
        parts += [self._file.part(item.record, item.start, item.end, None) for item in self._spans()]
        for part in parts:
            part.address = None
        self._file.read(parts)

    def carry_out(self) -> None:
        """Read everything into place, verified."""
        parts = self._direct()
        for batch, size in _batches(self._spans()):
            scratch = torch.empty(size, dtype=torch.uint8, device="cpu").untyped_storage()
            base = scratch.data_ptr()
            self._file.read(
                parts
                + [self._file.part(item.record, item.start, item.end, base + item.place) for item in batch]
            )
            for item in batch:
                for want in item.wanted:
                    want.put(scratch, item.place + want.start - item.start)
            parts = []
        self._file.read(parts)
        for target, source, length in self._copies:
            ctypes.memmove(target, source, length)

    @gc_paused()  # very many small objects, none of which is garbage
    def _direct(self) -> list[Part]:
        parts = [self._file.record(record, address) for record, address in self._records.items()]
        return parts + [self._file.part(*run) for run in self._runs]

    def _spans(self) -> Iterator[_Span]:
        """The chunks that hold wanted bytes, each once (except where a span would become too large)."""
        offsets, lengths = self._file.index.records.offset, self._file.index.records.length
        current: _Span | None = None
        for want in sorted(self._aside, key=lambda want: (offsets[want.record], want.record, want.start)):
            start = want.start // CHUNK_BYTES * CHUNK_BYTES
            end = min(-(-want.end // CHUNK_BYTES) * CHUNK_BYTES, lengths[want.record])
            if current is not None and current.record == want.record and start <= current.end:
                reach = max(end, current.end)
                if reach == current.end or reach - current.start <= _LARGE_BYTES:
                    current.end = reach
                    current.wanted.append(want)
                    continue
            if current is not None:
                yield current
            current = _Span(want.record, start, end, [want])
        if current is not None:
            yield current


def shifted(position: Sequence[int], before: Sequence[int], after: Sequence[int]) -> tuple[int, ...]:
    """A position that counts from `before`, as one that counts from `after`."""
    return tuple(p - a + b for p, a, b in zip(position, before, after, strict=True))


def _copy_bytes(target: int, size: int, scratch: torch.UntypedStorage, place: int) -> None:
    ctypes.memmove(target, scratch.data_ptr() + place, size)


def _copy_box(
    target: torch.Tensor,
    dtype: torch.dtype,
    stride: Sequence[int],
    bits: tuple[bool, bool],
    scratch: torch.UntypedStorage,
    place: int,
) -> None:
    copy_into(target, tensor_over(scratch, place, dtype, target.shape, stride, bits))


def _batches(spans: Iterator[_Span]) -> Iterator[tuple[list[_Span], int]]:
    """Spans that are read at once, with their places in the scratch memory, and the size of that."""
    batch: list[_Span] = []
    size = 0
    for item in spans:
        if batch and size + item.end - item.start > _BATCH_BYTES:
            yield batch, size
            batch, size = [], 0
        item.place = size
        batch.append(item)
        size += -(-(item.end - item.start) // _ALIGNED_BYTES) * _ALIGNED_BYTES
    if batch:
        yield batch, size
