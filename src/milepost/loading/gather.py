"""What is read of one rank's file, and where it goes: boxes of its tensors into tensors of any strides.

A box that is one run of memory on both sides is read straight into place, chunk by chunk; anything else, and
the chunks at the ends of a run, are read aside, verified and copied. Each chunk is read once, in few large
reads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from milepost.format.boxes import Box, is_run, span, split_for_reading
from milepost.format.index import CHUNK_BYTES, Index
from milepost.format.shards import dtype_bytes
from milepost.loading.rank_file import IndexedSource
from milepost.loading.template import copy_into
from milepost.state.decode import dtype_of
from milepost.state.placements import narrowed
from milepost.storage.reading import Part

__all__ = ["Gather", "shifted"]

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


@dataclass(slots=True)
class _Span:
    """Whole chunks of a record, and what is wanted of them."""

    record: int
    start: int
    end: int
    wanted: list[_Wanted]


class Gather:
    """Collects what is wanted of one file, and reads it.

    Args:
        index: The file's index.
        source: The open file.
    """

    def __init__(self, index: Index, source: IndexedSource) -> None:
        self._index = index
        self._source = source
        self._direct: list[Part] = []
        self._aside: list[_Wanted] = []

    @property
    def wants(self) -> bool:
        """Whether there is anything to read."""
        return bool(self._direct or self._aside)

    def request(self, stored: int, box: Box, target: torch.Tensor) -> None:
        """Have a box of a tensor of the file read into a target of that shape."""
        if not box.volume:
            return
        tensors = self._index.tensors
        stride, size = tensors.stride[stored], dtype_bytes(tensors.dtype[stored])
        record, base = tensors.record[stored], tensors.byte_offset[stored]
        as_it_is = target.is_cpu and not target.is_conj() and not target.is_neg()
        if as_it_is and is_run(box.size, stride, target.stride()):
            start = base + span(box.start, box.size, stride)[0] * size
            self._request_run(record, start, start + box.volume * size, target.data_ptr())
            return
        dtype = dtype_of(tensors.dtype[stored])
        origin = (0,) * len(box.start)
        for part in split_for_reading(box, stride, small=_SMALL_BYTES // size, large=_LARGE_BYTES // size):
            first, end = span(part.start, part.size, stride)
            into = narrowed(target, Box(shifted(part.start, box.start, origin), part.size))
            copy = partial(_copy_box, into, dtype, part.size, tuple(stride))
            self._aside.append(_Wanted(record, base + first * size, base + end * size, copy))

    def _request_run(self, record: int, start: int, end: int, address: int) -> None:
        length = self._index.records.length[record]
        first = -(-start // CHUNK_BYTES) * CHUNK_BYTES
        last = end if end == length else end // CHUNK_BYTES * CHUNK_BYTES
        if first >= last:
            self._aside.append(_Wanted(record, start, end, partial(_copy_bytes, address, end - start)))
            return
        self._direct.append(self._source.part(record, first, last, address + first - start))
        for a, b in ((start, first), (last, end)):
            if a < b:
                copy = partial(_copy_bytes, address + a - start, b - a)
                self._aside.append(_Wanted(record, a, b, copy))

    def check(self) -> None:
        """Read and verify everything without touching a target."""
        parts = [Part(part.offset, None, part.length, part.crcs, part.tag) for part in self._direct]
        parts += [self._part(item, None) for item in _spans(self._aside, self._index)]
        self._read(parts)

    def carry_out(self) -> None:
        """Read everything into place, verified."""
        direct, self._direct = self._direct, []
        for batch in _batches(_spans(self._aside, self._index)):
            total = sum(_aligned(item.end - item.start) for item in batch)
            scratch = torch.empty(total, dtype=torch.uint8, device="cpu")
            address, copies = scratch.data_ptr(), []
            for item in batch:
                direct.append(self._part(item, address))
                copies += [(want.copy, address + want.start - item.start) for want in item.wanted]
                address += _aligned(item.end - item.start)
            self._read(direct)
            for copy, place in copies:
                copy(place)
            direct = []
        self._read(direct)
        self._aside = []

    def _part(self, item: _Span, address: int | None) -> Part:
        return self._source.part(item.record, item.start, item.end, address)

    def _read(self, parts: list[Part]) -> None:
        if parts:
            self._source.read(sorted(parts, key=lambda part: part.offset))


def shifted(position: Sequence[int], before: Sequence[int], after: Sequence[int]) -> tuple[int, ...]:
    """A position, given from `before`, as one from `after`."""
    return tuple(p - a + b for p, a, b in zip(position, before, after, strict=True))


def _aligned(length: int) -> int:
    return -(-length // 64) * 64


def _copy_bytes(target: int, size: int, address: int) -> None:
    ctypes.memmove(target, address, size)


def _copy_box(
    target: torch.Tensor, dtype: torch.dtype, size: tuple[int, ...], stride: tuple[int, ...], address: int
) -> None:
    reach = span((0,) * len(size), size, stride)[1] * dtype.itemsize
    memory = (ctypes.c_char * reach).from_address(address)
    source = torch.frombuffer(memory, dtype=torch.uint8).view(dtype).as_strided(size, stride)
    copy_into(target, source)


def _spans(wanted: Sequence[_Wanted], index: Index) -> Iterator[_Span]:
    """The chunks that hold what is wanted, each once (but where a span would become too large)."""
    offsets, lengths = index.records.offset, index.records.length
    current: _Span | None = None
    for want in sorted(wanted, key=lambda want: (offsets[want.record], want.record, want.start)):
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


def _batches(spans: Iterator[_Span]) -> Iterator[list[_Span]]:
    batch: list[_Span] = []
    size = 0
    for item in spans:
        if batch and size + item.end - item.start > _BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += item.end - item.start
    if batch:
        yield batch
