"""Which elements of a global tensor lie where: pure geometry over boxes. Torch-free.

A *box* is a range of indices in each dimension of a global tensor. A *piece* is a box that is stored: it
also knows where it lies in the local tensor that holds it. What a rank holds is a list of pieces (a
strided shard is not one box), and loading into another layout is nothing but intersecting the pieces that
are wanted with those that were saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod
from typing import NamedTuple

import msgspec

__all__ = [
    "Box",
    "Piece",
    "Run",
    "Split",
    "cut",
    "disjoint",
    "intersection",
    "is_run",
    "pieces_of",
    "runs_of",
    "span",
    "split_for_reading",
    "steps_of",
    "whole",
]


class Box(NamedTuple):
    """A range of indices in each dimension: `start` and `size`, a number a dimension."""

    start: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def volume(self) -> int:
        """How many elements it has; 1 without dimensions."""
        return prod(self.size)


class Piece(NamedTuple):
    """A box of a global tensor, and where it starts in the local tensor that holds it."""

    start: tuple[int, ...]
    local: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def box(self) -> Box:
        """The box, in indices of the global tensor."""
        return Box(self.start, self.size)


class Run(NamedTuple):
    """Consecutive indices of one dimension."""

    start: int
    size: int


class Split(msgspec.Struct, frozen=True):
    """One dimension of a tensor, or what is left of it, divided over one dimension of a mesh.

    Attributes:
        parts: The size of the mesh dimension.
        index: This rank's place in it.
        factor: 1: into `parts` chunks, of which this rank has one. More: first into `factor` chunks, then
            each of them into `parts`, of which this rank has the one of its index (a strided shard).
    """

    parts: int
    index: int
    factor: int = 1


def whole(shape: Sequence[int]) -> Piece:
    """A tensor of this shape as one piece."""
    origin = (0,) * len(shape)
    return Piece(origin, origin, tuple(shape))


def runs_of(length: int, splits: Sequence[Split]) -> list[Run]:
    """The indices of a dimension that a rank holds after some splits, in the order of its local tensor.

    The chunks are those of ``torch.chunk``: all of the same size (rounded up) but the last ones, which
    may be short or empty.
    """
    runs = [Run(0, length)]
    for split in splits:
        total = sum(run.size for run in runs)
        taken: list[Run] = []
        for first, size in _chunks(total, split.factor):
            start, count = _chunk(size, split.parts, split.index)
            taken += _take(runs, first + start, count)
        runs = _joined(taken)
    return runs


def _chunk(length: int, parts: int, index: int) -> tuple[int, int]:
    size = -(-length // parts)
    start = min(size * index, length)
    return start, min(size, length - start)


def _chunks(length: int, parts: int) -> Iterator[tuple[int, int]]:
    return (_chunk(length, parts, index) for index in range(parts))


def _take(runs: Sequence[Run], start: int, count: int) -> Iterator[Run]:
    """The runs of positions `start` to `start` + `count` of the indices in `runs`."""
    position = 0
    for run in runs:
        first, end = max(start, position), min(start + count, position + run.size)
        if first < end:
            yield Run(run.start + first - position, end - first)
        position += run.size


def _joined(runs: Sequence[Run]) -> list[Run]:
    joined: list[Run] = []
    for run in runs:
        if joined and joined[-1].start + joined[-1].size == run.start:
            joined[-1] = Run(joined[-1].start, joined[-1].size + run.size)
        elif run.size:
            joined.append(run)
    return joined


def pieces_of(shape: Sequence[int], splits: Sequence[Sequence[Split]]) -> tuple[list[Piece], tuple[int, ...]]:
    """The pieces that a rank holds of a tensor, and the shape of its local tensor.

    Args:
        shape: The global shape.
        splits: For each dimension its splits, in the order in which they are applied.
    """
    runs = [runs_of(length, dims) for length, dims in zip(shape, splits, strict=True)]
    local = tuple(sum(run.size for run in dim) for dim in runs)
    if 0 in local:
        return [], local
    pieces = []
    placed = [_placed(dim) for dim in runs]
    for combination in product(*placed):
        pieces.append(
            Piece(
                tuple(run.start for run, _ in combination),
                tuple(place for _, place in combination),
                tuple(run.size for run, _ in combination),
            )
        )
    return pieces, local


def _placed(runs: Sequence[Run]) -> list[tuple[Run, int]]:
    placed, position = [], 0
    for run in runs:
        placed.append((run, position))
        position += run.size
    return placed


def intersection(first: Box, second: Box) -> Box | None:
    """What two boxes have in common; None if nothing."""
    starts, sizes = [], []
    for a, n, b, m in zip(first.start, first.size, second.start, second.size, strict=True):
        start = max(a, b)
        size = min(a + n, b + m) - start
        if size <= 0:
            return None
        starts.append(start)
        sizes.append(size)
    return Box(tuple(starts), tuple(sizes))


def disjoint(boxes: Sequence[Box]) -> bool:
    """Whether no two of these boxes, which all have elements, have one in common."""
    if len(boxes) < 2:
        return True
    dims = len(boxes[0].start)
    if not dims:
        return False
    # Along the dimension with the most places to start from, few boxes are met at a time.
    along = max(range(dims), key=lambda dim: len({box.start[dim] for box in boxes}))
    met: list[Box] = []
    for box in sorted(boxes, key=lambda box: box.start[along]):
        met = [other for other in met if other.start[along] + other.size[along] > box.start[along]]
        if any(intersection(box, other) is not None for other in met):
            return False
        met.append(box)
    return True


# -- who of several replicas writes what -------------------------------------------------------------


def cut(shapes: Sequence[Sequence[int]], itemsizes: Sequence[int], parts: int) -> list[dict[int, Box]]:
    """Divide tensors that `parts` replicas hold whole, so that each writes about as many bytes.

    The tensors are thought of as one line of bytes, which is cut into equal lengths; a cut falls between two
    rows of a tensor (its first dimension of more than one index), and only where both sides are worth a box
    of their own. So at most ``parts - 1`` tensors are divided, and every rank derives the same division.

    Args:
        shapes: The shape of each tensor, in an order that is the same for all replicas.
        itemsizes: Bytes of an element of each.
        parts: How many replicas there are.

    Returns:
        For each tensor the box that a replica writes, by the replica's place, ascending; none is empty.
    """
    sizes = [prod(shape) * itemsize for shape, itemsize in zip(shapes, itemsizes, strict=True)]
    total = sum(sizes)
    divided: list[dict[int, Box]] = []
    position = part = 0
    for shape, size in zip(shapes, sizes, strict=True):
        dim = next((d for d, n in enumerate(shape) if n > 1), 0)
        rows = shape[dim] if shape else 1
        row_bytes = size // rows if rows else 0
        boxes: dict[int, Box] = {}
        first = 0
        while part + 1 < parts and (wanted := total * (part + 1) // parts - position) < size:
            end = max(min(round(wanted / row_bytes), rows), first)
            if (end - first) * row_bytes < MIN_CUT_BYTES:
                end = first
            if (rows - end) * row_bytes < MIN_CUT_BYTES:
                end = 0 if end == 0 and wanted < size / 2 else rows
            if end > first:
                boxes[part] = _rows(shape, dim, first, end)
            first = end
            part += 1
        if first < rows and size:
            boxes[part] = _rows(shape, dim, first, rows)
        divided.append(boxes)
        position += size
    return divided


MIN_CUT_BYTES = 64 << 10
"""Tensors are not divided into boxes smaller than this."""


def _rows(shape: Sequence[int], dim: int, first: int, end: int) -> Box:
    start, size = [0] * len(shape), list(shape)
    if shape:
        start[dim], size[dim] = first, end - first
    return Box(tuple(start), tuple(size))


# -- bytes -----------------------------------------------------------------------------------------


def steps_of(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides, in elements, of a tensor of this shape whose rows follow one another."""
    steps, step = [0] * len(shape), 1
    for dim in range(len(shape) - 1, -1, -1):
        steps[dim] = step
        step *= max(shape[dim], 1)
    return tuple(steps)


def span(start: Sequence[int], size: Sequence[int], stride: Sequence[int]) -> tuple[int, int]:
    """The first element of a box that is not empty, and the one after its last, in elements of memory."""
    first = sum(a * step for a, step in zip(start, stride, strict=True))
    return first, first + 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))


def is_run(size: Sequence[int], *strides: Sequence[int]) -> bool:
    """Whether a box of this size is one run of memory, in the same order, under each of these strides."""
    wanted = steps_of(size)
    return all(n == 1 or all(stride[dim] == wanted[dim] for stride in strides) for dim, n in enumerate(size))


def split_for_reading(box: Box, stride: Sequence[int], *, small: int, large: int) -> Iterator[Box]:
    """Divide a box so that what lies between the first and the last element of each part is worth reading.

    Args:
        box: What is wanted, in indices of a tensor.
        stride: That tensor's strides, in elements.
        small: Parts that reach over this many elements are not divided further.
        large: No part reaches over more than this many.
    """
    stack = [box]
    while stack:
        part = stack.pop()
        first, end = span(part.start, part.size, stride)
        reach = end - first
        if reach <= small or (reach <= large and part.volume * 2 >= reach):
            yield part
            continue
        dim = max(
            (d for d, n in enumerate(part.size) if n > 1),
            key=lambda d: stride[d] * part.size[d],
            default=None,
        )
        if dim is None:
            yield part
            continue
        half = part.size[dim] // 2
        starts, sizes = list(part.start), list(part.size)
        sizes[dim] = half
        lower = Box(tuple(starts), tuple(sizes))
        starts[dim] += half
        sizes[dim] = part.size[dim] - half
        stack += (Box(tuple(starts), tuple(sizes)), lower)
