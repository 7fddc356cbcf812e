"""Reading many parts of a file into raw memory, in parallel and verified while the bytes are in cache.

Three ways, chosen for every 64 MiB of the file by whether it is in the page cache:

- *warm, large*: pieces of 1 MiB straight into the target, each checked right after its read;
- *warm, small*: one vectored read for many parts, what lies between them goes to a sink;
- *cold*: large direct reads into a ring of private memory by some threads, while others check and copy
  (a target is rarely aligned for direct I/O, and one thread cannot do both at the disk's speed).

Nothing here knows of tensors. Addresses must stay valid until the call is over.
"""

from __future__ import annotations

import ctypes
import os
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from isal.isal_zlib import crc32, crc32_combine

from milepost import syscalls
from milepost.errors import CorruptCheckpointError
from milepost.storage import ALIGNMENT, OpenFile
from milepost.storage.parallel import blocks_down, blocks_up, cached_regions, run_workers, through_ring
from milepost.storage.writing import Ring

__all__ = ["Damage", "Part", "ReadReport", "read_parts", "scan_file"]

_REGION_BYTES = 64 << 20
_PIECE_BYTES = 1 << 20
_GROUP_BYTES = 4 << 20
_GROUP_PARTS = 256
_WARM_GAP_BYTES = 64 << 10
_COLD_GAP_BYTES = 256 << 10
_WINDOW_BYTES = 8 << 20
_INLINE_BYTES = 1 << 20


@dataclass(slots=True)
class Part:
    """A range of bytes of a file that somebody wants.

    Attributes:
        offset: Where it starts in the file.
        address: Where in memory its bytes go; None if they are only to be checked.
        length: Number of bytes.
        crcs: CRC-32 of each chunk of it, from its first byte on; None if it is not to be verified.
        tag: Whatever tells the caller which part this is.
    """

    offset: int
    address: int | None
    length: int
    crcs: Sequence[int] | None = None
    tag: object = None


@dataclass(frozen=True, slots=True)
class Damage:
    """A chunk whose bytes are not what they were.

    Attributes:
        tag: That of its part.
        chunk: Its index in the part.
        offset: Where it starts in the file.
        expected: The CRC-32 it should have.
        found: The one it has.
    """

    tag: object
    chunk: int
    offset: int
    expected: int
    found: int


@dataclass(slots=True)
class ReadReport:
    """What a read found.

    Attributes:
        damaged: The chunks that failed their check, in file order; their bytes are in the target.
        cached_bytes: How much was read through the page cache.
        direct_bytes: How much was read round it.
    """

    damaged: list[Damage] = field(default_factory=list)
    cached_bytes: int = 0
    direct_bytes: int = 0


class _Piece(NamedTuple):
    """Some whole chunks of a part; the part's last one may be short."""

    offset: int
    length: int
    address: int | None
    chunk: int
    part: Part


@dataclass(slots=True)
class _Operation:
    """Pieces that one read serves."""

    start: int
    end: int
    pieces: list[_Piece]


def read_parts(
    file: OpenFile,
    parts: Sequence[Part],
    *,
    chunk_bytes: int,
    threads: int | None = None,
    ring: Ring | None = None,
) -> ReadReport:
    """Read all `parts`, sorted by offset, to where they go, and check those that have CRCs.

    On return every byte is in place, and what failed its check is in the report. If it raises, the
    targets hold anything, and no thread is left.

    Args:
        file: The file.
        parts: What to read; may overlap.
        chunk_bytes: The length of a chunk; parts with CRCs are divided by it.
        threads: How many read at most what is in the page cache; by default the processors, 2 to 8.
        ring: Carries what is not; by default one is made for this call.

    Raises:
        CorruptCheckpointError: The file ends before a part does; nothing was read.
    """
    _check_extent(file, max((part.offset + part.length for part in parts), default=0))
    window_bytes = max(_WINDOW_BYTES, blocks_up(chunk_bytes) + 2 * ALIGNMENT)
    warm, cold = _plan(file, parts, chunk_bytes, window_bytes)
    report = ReadReport(
        cached_bytes=sum(operation.end - operation.start for operation in warm),
        direct_bytes=sum(operation.end - operation.start for operation in cold),
    )
    targets = _Targets(parts, chunk_bytes, report.damaged)
    if cold:
        extents = [(operation.start, operation.end) for operation in cold]
        through_ring(file, extents, window_bytes, ring, lambda index, view: targets.copy(cold[index], view))
    if warm:
        enough = 1 if report.cached_bytes <= _INLINE_BYTES else threads or default_threads()
        todo = deque(warm)
        run_workers([partial(targets.read, file, todo)] * min(enough, len(warm)), todo.clear)
    report.damaged.sort(key=lambda damage: damage.offset)
    return report


def default_threads() -> int:
    """The processors this process may use, 2 at least and 8 at most."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
    return min(max(usable, 2), 8)


def _check_extent(file: OpenFile, end: int) -> None:
    if end > file.size:
        raise CorruptCheckpointError(
            f"the file ends too early: {end} bytes expected at least, {file.size} found: {file.path}",
            path=file.path,
        )


def scan_file(
    file: OpenFile,
    pieces: Iterable[tuple[int, int]],
    *,
    ring: Ring | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[int]:
    """Read a whole file once and compute the CRC-32 of each of its pieces.

    What is not in the page cache is read round it, so that checking a file pushes nothing out of memory.
    If it raises, no thread is left.

    Args:
        file: The file.
        pieces: Offset and length of each piece; in order, without a gap, to the end of the file.
        ring: Carries the data; by default one is made for this call.
        progress: Called in this thread with the number of bytes read since it was called last.

    Returns:
        One CRC per piece.

    Raises:
        CorruptCheckpointError: The file is shorter or longer than the pieces together.
        ValueError: The pieces leave gaps, or overlap.
    """
    ends = array("q")
    end = 0
    for offset, length in pieces:
        if offset != end or length < 0:
            raise ValueError(f"piece {len(ends)} starts at {offset}, not at {end}, or its length is negative")
        end += length
        ends.append(end)
    _check_extent(file, end)
    if end < file.size:
        raise CorruptCheckpointError(
            f"the file is too long: {end} bytes expected, {file.size} found: {file.path}", path=file.path
        )
    crcs = array("L", bytes(array("L").itemsize * len(ends)))
    split: list[tuple[int, int, int, int]] = []

    def check(index: int, view: memoryview) -> None:
        start = index * _WINDOW_BYTES
        stop = start + len(view)
        position = start
        piece = bisect_right(ends, start)
        while position < stop:
            upto = min(ends[piece], stop)
            crc = crc32(view[position - start : upto - start])
            if upto == ends[piece] and position == (ends[piece - 1] if piece else 0):
                crcs[piece] = crc
            else:
                split.append((piece, position, upto - position, crc))
            position = upto
            piece += 1

    extents = [(start, min(start + _WINDOW_BYTES, end)) for start in range(0, end, _WINDOW_BYTES)]
    cached = cached_regions(file, _REGION_BYTES)
    through_ring(file, extents, _WINDOW_BYTES, ring, check, cached=cached, progress=progress)
    for piece, _, length, crc in sorted(split):
        crcs[piece] = crc32_combine(crcs[piece], crc, length)
    return crcs.tolist()


# ---------------------------------------------------------------------------- planning


def _plan(
    file: OpenFile, parts: Sequence[Part], chunk_bytes: int, window_bytes: int
) -> tuple[list[_Operation], list[_Operation]]:
    """The reads through the page cache, and those round it."""
    warm: list[_Operation] = []
    cold: list[_Operation] = []
    cached = cached_regions(file, _REGION_BYTES)
    for part in parts:
        if part.crcs is not None and len(part.crcs) != -(-part.length // chunk_bytes):
            raise ValueError(f"{len(part.crcs)} CRCs for {part.length} bytes in chunks of {chunk_bytes}")
        if part.address is None and part.crcs is None:
            continue
        done = 0
        while done < part.length:
            if cached(part.offset + done):
                done += _add_warm(warm, part, done, chunk_bytes)
            else:
                done += _add_cold(cold, part, done, chunk_bytes, window_bytes)
    return warm, cold


def _add_warm(operations: list[_Operation], part: Part, done: int, chunk_bytes: int) -> int:
    """Add the next piece of `part`, after its first `done` bytes; returns the piece's length."""
    start = part.offset + done
    length = min(part.length - done, max(_PIECE_BYTES // chunk_bytes, 1) * chunk_bytes)
    last = operations[-1] if operations else None
    if (
        last is None
        or not 0 <= start - last.end <= _WARM_GAP_BYTES
        or start + length - last.start > _GROUP_BYTES
        or len(last.pieces) == _GROUP_PARTS
        or length >= _PIECE_BYTES
        or last.pieces[-1].length >= _PIECE_BYTES
    ):
        last = _Operation(start, start, [])
        operations.append(last)
    return _add(last, part, done, length, chunk_bytes)


def _add_cold(
    operations: list[_Operation], part: Part, done: int, chunk_bytes: int, window_bytes: int
) -> int:
    """As `_add_warm`; an operation is as many whole chunks as fit into one window, aligned to blocks."""
    start = part.offset + done
    last = operations[-1] if operations else None
    for operation in (last, _Operation(start, start, [])):
        if operation is None or not operation.start <= start <= operation.end + _COLD_GAP_BYTES:
            continue
        room = blocks_down(operation.start) + window_bytes - start
        length = min(part.length - done, room // chunk_bytes * chunk_bytes)
        if room >= part.length - done:
            length = part.length - done
        if length > 0:
            if operation is not last:
                operations.append(operation)
            return _add(operation, part, done, length, chunk_bytes)
    raise AssertionError("a window holds a chunk")


def _add(operation: _Operation, part: Part, done: int, length: int, chunk_bytes: int) -> int:
    address = None if part.address is None else part.address + done
    operation.pieces.append(_Piece(part.offset + done, length, address, done // chunk_bytes, part))
    operation.end = max(operation.end, part.offset + done + length)
    return length


# ---------------------------------------------------------------------------- doing


class _Targets:
    """Where the parts go, and the check of what arrives there."""

    def __init__(self, parts: Sequence[Part], chunk_bytes: int, damaged: list[Damage]) -> None:
        self._chunk_bytes = chunk_bytes
        self._damaged = damaged
        # One view over all targets and whatever lies between them: slicing it is far cheaper than
        # making a view from every address.
        extents = [(part.address, part.length) for part in parts if part.address is not None]
        self._lowest = min((address for address, _ in extents), default=0)
        highest = max((address + length for address, length in extents), default=0)
        self._memory = syscalls.memory_at(self._lowest, highest - self._lowest)

    def read(self, file: OpenFile, todo: deque[_Operation]) -> None:
        """Read operations of `todo` through the page cache until none is left."""
        scratch = memoryview(b"")
        while True:
            try:
                operation = todo.popleft()
            except IndexError:
                return
            start = position = operation.start
            if operation.end - start > len(scratch):
                scratch = syscalls.private_memory(max(operation.end - start, _GROUP_BYTES))
            buffers: list[memoryview] = []
            checks: list[tuple[_Piece, memoryview]] = []
            for piece in operation.pieces:
                offset, length, address, _, part = piece
                if offset > position:
                    buffers.append(scratch[position - start : offset - start])
                if address is None:
                    view = scratch[offset - start : offset - start + length]
                else:
                    view = self._memory[address - self._lowest : address - self._lowest + length]
                buffers.append(view)
                position = offset + length
                if part.crcs is not None:
                    checks.append((piece, view))
            file.read_into(start, buffers)
            for piece, view in checks:
                self._check(piece, view)

    def copy(self, operation: _Operation, view: memoryview) -> None:
        """Check and copy what one operation read into `view`."""
        base = syscalls.address_of(view) or 0
        for piece in operation.pieces:
            start = piece.offset - operation.start
            for done in range(0, piece.length, self._chunk_bytes):
                length = min(self._chunk_bytes, piece.length - done)
                if piece.address is not None:
                    ctypes.memmove(piece.address + done, base + start + done, length)
                if piece.part.crcs is not None:
                    chunk = view[start + done : start + done + length]
                    self._compare(piece, piece.chunk + done // self._chunk_bytes, crc32(chunk))

    def _check(self, piece: _Piece, view: memoryview) -> None:
        size = self._chunk_bytes
        if piece.length <= size:
            self._compare(piece, piece.chunk, crc32(view))
            return
        for number, start in enumerate(range(0, piece.length, size)):
            self._compare(piece, piece.chunk + number, crc32(view[start : start + size]))

    def _compare(self, piece: _Piece, chunk: int, found: int) -> None:
        part = piece.part
        if part.crcs is not None and part.crcs[chunk] != found:
            offset = part.offset + chunk * self._chunk_bytes
            self._damaged.append(Damage(part.tag, chunk, offset, part.crcs[chunk], found))
