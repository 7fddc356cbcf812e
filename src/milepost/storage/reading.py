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
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

from isal.isal_zlib import crc32, crc32_combine

from milepost import syscalls
from milepost.errors import CorruptCheckpointError
from milepost.storage import ALIGNMENT, OpenFile
from milepost.storage.parallel import blocks_down, blocks_up, cached_regions, run_workers, through_ring
from milepost.storage.writing import Ring
from milepost.utils import gc_paused

__all__ = ["Damage", "Part", "ReadReport", "read_parts", "scan_file"]

_REGION_BYTES = 64 << 20
_PIECE_BYTES = 1 << 20
_GROUP_BYTES = 4 << 20
_GROUP_PARTS = 256
_WARM_GAP_BYTES = 64 << 10
_COLD_GAP_BYTES = 256 << 10
_WINDOW_BYTES = 8 << 20
_INLINE_BYTES = 1 << 20
_SMALL_BYTES = 32 << 10


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


_Piece = tuple[int, int, int | None, int, Part]
"""Some whole chunks of a part (its last one may be short): offset, length, address, first chunk, part."""


@dataclass(slots=True)
class _Operation:
    """Pieces that one read serves, up to `limit`, with `gap` bytes between them at most."""

    start: int
    end: int
    limit: int
    gap: int
    pieces: list[_Piece] = field(default_factory=list)


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
    with gc_paused():
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
        # Threads that do little between two system calls only take the interpreter from each other.
        pieces = sum(len(operation.pieces) for operation in warm)
        few = report.cached_bytes <= max(_INLINE_BYTES, (_PIECE_BYTES >> 4) * pieces)
        enough = 1 if few else threads or default_threads()
        todo = deque(warm)
        with gc_paused() if few else nullcontext():
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
    piece_bytes = max(_PIECE_BYTES // chunk_bytes, 1) * chunk_bytes
    region_end = -1
    is_warm = False
    operation = full = _Operation(0, 0, 0, -1)
    for part in parts:
        start, rest, address, crcs = part.offset, part.length, part.address, part.crcs
        if crcs is not None and len(crcs) != -(-rest // chunk_bytes):
            raise ValueError(f"{len(crcs)} CRCs for {rest} bytes in chunks of {chunk_bytes}")
        if address is None and crcs is None:
            continue
        chunk = 0
        while rest > 0:
            if start >= region_end:
                region_end = (start // _REGION_BYTES + 1) * _REGION_BYTES
                if is_warm is not cached(start):
                    is_warm, operation = not is_warm, full
            length = 0
            if operation.end <= start <= operation.end + operation.gap:
                room = operation.limit - start
                length = rest if rest <= room else room // chunk_bytes * chunk_bytes
                if is_warm and (rest >= _PIECE_BYTES or len(operation.pieces) == _GROUP_PARTS):
                    length = 0
            if length <= 0:
                if is_warm:
                    limit = start + (min(rest, piece_bytes) if rest >= _PIECE_BYTES else _GROUP_BYTES)
                    operation = _Operation(start, start, limit, _WARM_GAP_BYTES)
                    warm.append(operation)
                else:
                    limit = blocks_down(start) + window_bytes
                    operation = _Operation(start, start, limit, _COLD_GAP_BYTES)
                    cold.append(operation)
                room = limit - start
                length = rest if rest <= room else room // chunk_bytes * chunk_bytes
            operation.pieces.append((start, length, address, chunk, part))
            start += length
            operation.end = start
            rest -= length
            chunk += length // chunk_bytes
            if address is not None:
                address += length
    return warm, cold


# ---------------------------------------------------------------------------- doing


class _Targets:
    """Where the parts go, and the check of what arrives there."""

    def __init__(self, parts: Sequence[Part], chunk_bytes: int, damaged: list[Damage]) -> None:
        self._chunk_bytes = chunk_bytes
        self._damaged = damaged
        # One view over all targets and whatever lies between them: slicing it is far cheaper than
        # making a view from every address.
        self._lowest = min((part.address for part in parts if part.address is not None), default=0)
        highest = max((part.address + part.length for part in parts if part.address is not None), default=0)
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
                offset, length, address, _, _ = piece
                if offset > position:
                    buffers.append(scratch[position - start : offset - start])
                if address is None:
                    view = scratch[offset - start : offset - start + length]
                else:
                    view = self._at(address, length)
                buffers.append(view)
                position = offset + length
                checks.append((piece, view))
            file.read_into(start, buffers)
            size = self._chunk_bytes
            for piece, view in checks:
                _, length, _, chunk, part = piece
                # The usual case in place: one chunk, unharmed.
                if part.crcs is None or length > size or part.crcs[chunk] != crc32(view):
                    self._check(piece, view)

    def copy(self, operation: _Operation, view: memoryview) -> None:
        """Check and copy what one operation read into `view`."""
        base = syscalls.address_of(view) or 0
        size = self._chunk_bytes
        for piece in operation.pieces:
            offset, length, address, chunk, part = piece
            start = offset - operation.start
            if length <= _SMALL_BYTES:  # a call that lets go of the interpreter costs more than this copy
                source = view[start : start + length]
                if address is not None:
                    self._at(address, length)[:] = source
                self._check(piece, source)
                continue
            for number, done in enumerate(range(0, length, size)):
                count = min(size, length - done)
                if address is not None:
                    ctypes.memmove(address + done, base + start + done, count)
                if part.crcs is not None:
                    self._compare(part, chunk + number, crc32(view[start + done : start + done + count]))

    def _at(self, address: int, length: int) -> memoryview:
        return self._memory[address - self._lowest : address - self._lowest + length]

    def _check(self, piece: _Piece, view: memoryview) -> None:
        _, length, _, chunk, part = piece
        size = self._chunk_bytes
        if part.crcs is None:
            return
        if length <= size:
            self._compare(part, chunk, crc32(view))
            return
        for number, start in enumerate(range(0, length, size)):
            self._compare(part, chunk + number, crc32(view[start : start + size]))

    def _compare(self, part: Part, chunk: int, found: int) -> None:
        if part.crcs is not None and part.crcs[chunk] != found:
            offset = part.offset + chunk * self._chunk_bytes
            self._damaged.append(Damage(part.tag, chunk, offset, part.crcs[chunk], found))
