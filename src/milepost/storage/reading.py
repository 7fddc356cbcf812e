"""Reads many parts of a file into raw memory, in parallel, and checks the bytes while they are in cache.

Each 64 MiB of the file is read in one of three ways. Whether it is in the page cache decides:

- *warm, large*: pieces of 1 MiB straight into the target, each checked right after its read;
- *warm, small*: one vectored read for many parts; the bytes between them go to a sink;
- *cold*: some threads make large direct reads into a ring of private memory, others check and copy. (A
  target is rarely aligned for direct I/O, and one thread cannot do both at the disk's speed.)

The caller's thread alone reads a few megabytes: starting threads takes longer.
Nothing here knows tensors. Addresses must stay valid until the call is over.
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

__all__ = ["Damage", "Part", "ReadReport", "check_mapped", "read_parts", "scan_file"]

_REGION_BYTES = 64 << 20
_PIECE_BYTES = 1 << 20
_GROUP_BYTES = 4 << 20
_GROUP_PARTS = 256
_WARM_GAP_BYTES = 64 << 10
_COLD_GAP_BYTES = 256 << 10
_WINDOW_BYTES = 8 << 20
_SCAN_BYTES = 256 << 10
_INLINE_BYTES = 4 << 20
_SMALL_BYTES = 32 << 10
_CHECKED_CHUNKS = 64


@dataclass(slots=True)
class Part:
    """A range of bytes of a file to read.

    Attributes:
        offset: Where it starts in the file.
        address: Where in memory its bytes go; None to check them only.
        length: Number of bytes.
        crcs: CRC-32 of each chunk of it, from its first byte on; None to skip the check.
        tag: Any value by which the caller knows this part again.
    """

    offset: int
    address: int | None
    length: int
    crcs: Sequence[int] | None = None
    tag: object = None


@dataclass(frozen=True, slots=True)
class Damage:
    """A chunk whose bytes changed since they were written.

    Attributes:
        tag: The tag of its part.
        chunk: Its index in the part.
        offset: Where it starts in the file.
        expected: The CRC-32 it should have.
        found: The CRC-32 it has.
    """

    tag: object
    chunk: int
    offset: int
    expected: int
    found: int


@dataclass(slots=True)
class ReadReport:
    """The result of a read.

    Attributes:
        damaged: The chunks that failed their check, in file order; their bytes are in the target.
        cached_bytes: How much was read through the page cache.
        direct_bytes: How much was read past it.
    """

    damaged: list[Damage] = field(default_factory=list)
    cached_bytes: int = 0
    direct_bytes: int = 0


_Piece = tuple[int, int, int | None, int, Part]
"""Some whole chunks of a part (its last one may be short): offset, length, address, first chunk, part."""


@dataclass(slots=True)
class _Operation:
    """Pieces that one read serves, up to `limit`, with at most `gap` bytes between two of them."""

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
    """Read all `parts`, sorted by offset, to their addresses, and check those that have CRCs.

    On return every byte is in place, and the report lists the chunks that failed their check. If it raises,
    the targets hold anything, and no thread is left.

    Args:
        file: The file.
        parts: What to read; parts may overlap.
        chunk_bytes: The length of a chunk; parts with CRCs are divided by it.
        threads: How many threads read from the page cache at most; by default the processors, 2 to 8.
        ring: Memory for direct reads; by default this call makes one.

    Raises:
        CorruptCheckpointError: The file ends before a part does; nothing was read.
    """
    _check_extent(file, max((part.offset + part.length for part in parts), default=0))
    windows = _Windows(file, chunk_bytes)
    with gc_paused():
        for part in parts:
            windows.add(part)
    warm, cold = windows.warm, windows.cold
    report = ReadReport(
        cached_bytes=sum(operation.end - operation.start for operation in warm),
        direct_bytes=sum(operation.end - operation.start for operation in cold),
    )
    targets = _Targets(parts, chunk_bytes, report.damaged)
    if cold:
        extents = [(operation.start, operation.end) for operation in cold]
        through_ring(
            file,
            extents,
            windows.window_bytes,
            ring,
            lambda index, view: targets.copy(cold[index], view),
            alone=report.direct_bytes <= _INLINE_BYTES,
        )
    if warm:
        few = _is_little(report.cached_bytes, sum(len(operation.pieces) for operation in warm))
        enough = 1 if few else threads or default_threads()
        todo = deque(warm)
        with gc_paused() if few else nullcontext():
            run_workers([partial(targets.read, file, todo)] * min(enough, len(warm)), todo.clear)
    report.damaged.sort(key=lambda damage: damage.offset)
    return report


def check_mapped(memory: memoryview, parts: Sequence[Part], *, chunk_bytes: int) -> list[Damage]:
    """Check parts of a file, which is mapped into `memory`, in place; returns the damage in file order.

    Parts without CRCs are left out.
    """
    size = _CHECKED_CHUNKS * chunk_bytes
    todo: deque[_Piece] = deque(
        (part.offset + start, min(size, part.length - start), None, start // chunk_bytes, part)
        for part in parts
        for start in range(0, part.length if part.crcs else 0, size)
    )
    damaged: list[Damage] = []
    targets = _Targets((), chunk_bytes, damaged)
    few = _is_little(sum(part.length for part in parts), len(todo))
    check = partial(targets.check_mapped, memory, todo)
    run_workers([check] * (1 if few else default_threads()), todo.clear)
    return sorted(damaged, key=lambda damage: damage.offset)


def _is_little(size: int, pieces: int) -> bool:
    """Whether one thread is the fastest: others would start, or take the interpreter from each other."""
    return size <= max(_INLINE_BYTES, (_PIECE_BYTES >> 4) * pieces)


def default_threads() -> int:
    """How many threads to use: the processors of this process, 2 at least and 8 at most."""
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

    Bytes that are not in the page cache are read past it, so that checking a file pushes nothing out of
    memory. If it raises, no thread is left.

    Args:
        file: The file.
        pieces: Offset and length of each piece; in order, without a gap, to the end of the file.
        ring: Memory for the data; by default this call makes one.
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
    alone = end <= _INLINE_BYTES
    cached = cached_regions(file, _REGION_BYTES)
    # One read from the disk; from the page cache windows that stay in the processor's cache.
    window_bytes = _SCAN_BYTES if alone and cached(0) else _WINDOW_BYTES
    crcs = array("L", bytes(array("L").itemsize * len(ends)))
    split: list[tuple[int, int, int, int]] = []

    def check(index: int, view: memoryview) -> None:
        start = index * window_bytes
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

    extents = [(start, min(start + window_bytes, end)) for start in range(0, end, window_bytes)]
    through_ring(file, extents, window_bytes, ring, check, alone=alone, cached=cached, progress=progress)
    for piece, _, length, crc in sorted(split):
        crcs[piece] = crc32_combine(crcs[piece], crc, length)
    return crcs.tolist()


# ---------------------------------------------------------------------------- planning


class _Windows:
    """Groups parts, which come in the order of the file, into reads.

    Attributes:
        window_bytes: No direct read takes more.
        warm: The reads through the page cache.
        cold: The reads past it.
    """

    def __init__(self, file: OpenFile, chunk_bytes: int) -> None:
        self.window_bytes = max(_WINDOW_BYTES, blocks_up(chunk_bytes) + 2 * ALIGNMENT)
        self.warm: list[_Operation] = []
        self.cold: list[_Operation] = []
        self._chunk_bytes = chunk_bytes
        self._piece_bytes = max(_PIECE_BYTES // chunk_bytes, 1) * chunk_bytes
        self._cached = cached_regions(file, _REGION_BYTES)
        self._region_end = -1
        self._is_warm = False
        self._operation = _FULL

    def add(self, part: Part) -> None:
        """Add a part to the last read, as far as that has room for it, and to new ones."""
        start, rest, address, crcs = part.offset, part.length, part.address, part.crcs
        if crcs is not None and len(crcs) != -(-rest // self._chunk_bytes):
            raise ValueError(f"{len(crcs)} CRCs for {rest} bytes in chunks of {self._chunk_bytes}")
        if address is None and crcs is None:
            return
        chunk = 0
        while rest > 0:
            if start >= self._region_end:
                self._enter_region(start)
            operation = self._operation
            length = self._fitting(operation, start, rest)
            if not length:
                operation = self._operation = self._opened(start, rest)
                length = self._fitting(operation, start, rest)
            operation.pieces.append((start, length, address, chunk, part))
            start += length
            operation.end = start
            rest -= length
            chunk += length // self._chunk_bytes
            if address is not None:
                address += length

    def _enter_region(self, start: int) -> None:
        self._region_end = (start // _REGION_BYTES + 1) * _REGION_BYTES
        if self._is_warm is not self._cached(start):
            self._is_warm, self._operation = not self._is_warm, _FULL

    def _fitting(self, operation: _Operation, start: int, rest: int) -> int:
        """How many of `rest` bytes from `start` on fit into a read: all, or whole chunks."""
        if not operation.end <= start <= operation.end + operation.gap:
            return 0
        pieces = len(operation.pieces)
        if self._is_warm and pieces and (rest >= _PIECE_BYTES or pieces == _GROUP_PARTS):
            return 0
        room = operation.limit - start
        return rest if rest <= room else max(room // self._chunk_bytes * self._chunk_bytes, 0)

    def _opened(self, start: int, rest: int) -> _Operation:
        if not self._is_warm:
            limit = blocks_down(start) + self.window_bytes
            self.cold.append(_Operation(start, start, limit, _COLD_GAP_BYTES))
            return self.cold[-1]
        limit = start + (min(rest, self._piece_bytes) if rest >= _PIECE_BYTES else _GROUP_BYTES)
        self.warm.append(_Operation(start, start, limit, _WARM_GAP_BYTES))
        return self.warm[-1]


_FULL = _Operation(0, 0, 0, -1)
"""A read into which nothing fits."""


# ---------------------------------------------------------------------------- doing


class _Targets:
    """The memory of the parts, and the check of the bytes that arrive there."""

    def __init__(self, parts: Sequence[Part], chunk_bytes: int, damaged: list[Damage]) -> None:
        self._chunk_bytes = chunk_bytes
        self._damaged = damaged
        # One view over all targets and the memory between them: slicing it is far cheaper than making a
        # view from every address.
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

    def check_mapped(self, memory: memoryview, todo: deque[_Piece]) -> None:
        """Check pieces of `todo`, which are in the memory of the whole file, until none is left."""
        while True:
            try:
                piece = todo.popleft()
            except IndexError:
                return
            self._check(piece, memory[piece[0] : piece[0] + piece[1]])

    def _at(self, address: int, length: int) -> memoryview:
        return self._memory[address - self._lowest : address - self._lowest + length]

    def _check(self, piece: _Piece, view: memoryview) -> None:
        _, length, _, chunk, part = piece
        size = self._chunk_bytes
        if part.crcs is None:
            return
        for number, start in enumerate(range(0, length, size)):
            self._compare(part, chunk + number, crc32(view[start : start + size]))

    def _compare(self, part: Part, chunk: int, found: int) -> None:
        if part.crcs is not None and part.crcs[chunk] != found:
            offset = part.offset + chunk * self._chunk_bytes
            self._damaged.append(Damage(part.tag, chunk, offset, part.crcs[chunk], found))
