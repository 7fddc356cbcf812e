"""A rank's data file as bytes: where everything lies, and how it is filled and sealed.

The file is a zip archive that plain ``torch.load`` opens: one stored entry for each record, then the
objects, ``data.pkl``, a few small entries, and the central directory. docs/format.md has the details.
`Layout` depends on nothing but the lengths of the records, so it is planned once and kept; `Image` is one
save's use of it, and knows this save's values and checksums.

Source of the formats: PKWARE's APPNOTE 6.3.10 (zip, zip64), and the entries ``torch.save`` writes.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence

from isal import isal_zlib

from milepost.format.index import CHUNK_BYTES

__all__ = ["IDENTITY_ENTRY", "PICKLE_ENTRY", "Image", "Layout", "address_of"]

_crc32 = isal_zlib.crc32
_combine = isal_zlib.crc32_combine

SMALL_ALIGNMENT = 64
LARGE_ALIGNMENT = 4096
LARGE_BYTES = 1 << 20
"""Records of this size and more start at multiples of LARGE_ALIGNMENT, so that they can be read directly."""

FOLDER = "archive"
PICKLE_ENTRY = "data.pkl"
IDENTITY_ENTRY = ".milepost"

_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_ZIP64_LOCAL = struct.Struct("<HHQQ")
_DESCRIPTOR = struct.Struct("<4sIQQ")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_ZIP64_CENTRAL = struct.Struct("<HHQQQ")
_END64 = struct.Struct("<4sQHHIIQQQQ")
_LOCATOR64 = struct.Struct("<4sIQI")
_END = struct.Struct("<4sHHHHIIH")
_NEEDED, _MADE_BY = 45, (3 << 8) | 45  # 4.5 has zip64; made by Unix
_FLAGS = 1 << 3  # the CRC follows the data in a descriptor
_DATE = (1 << 5) | 1  # 1 January 1980: files with the same contents are the same bytes
_ONES32, _ONES16 = 0xFFFFFFFF, 0xFFFF
_PADDING_ID = 0x504D  # "MP"


def _local_header(name: bytes, start: int, length: int, alignment: int) -> bytes:
    """The local header at `start`, padded so that the data after it begin at a multiple of `alignment`."""
    unpadded = start + _LOCAL.size + len(name) + _ZIP64_LOCAL.size + 4
    padding = -unpadded % alignment
    extra = (
        _ZIP64_LOCAL.pack(1, 16, length, length) + struct.pack("<HH", _PADDING_ID, padding) + bytes(padding)
    )
    fixed = _LOCAL.pack(b"PK\3\4", _NEEDED, _FLAGS, 0, 0, _DATE, 0, _ONES32, _ONES32, len(name), len(extra))
    return fixed + name + extra


def _descriptor(crc: int, length: int) -> bytes:
    return _DESCRIPTOR.pack(b"PK\7\10", crc, length, length)


def _central(name: bytes, crc: int, length: int, start: int) -> bytes:
    extra = _ZIP64_CENTRAL.pack(1, 24, length, length, start)
    fixed = _CENTRAL.pack(
        b"PK\1\2", _MADE_BY, _NEEDED, _FLAGS, 0, 0, _DATE, crc, _ONES32, _ONES32, len(name), len(extra),
        0, 0, 0, 0, _ONES32,
    )  # fmt: skip
    return fixed + name + extra


def _end(count: int, start: int, size: int) -> bytes:
    """The zip64 end record, its locator and the classic end record."""
    end64 = _END64.pack(b"PK\6\6", 44, _MADE_BY, _NEEDED, 0, 0, count, count, size, start)
    locator = _LOCATOR64.pack(b"PK\6\7", 0, start + size, 1)
    return end64 + locator + _END.pack(b"PK\5\6", 0, 0, _ONES16, _ONES16, _ONES32, _ONES32, 0)


_CENTRAL_FIXED = _CENTRAL.size + _ZIP64_CENTRAL.size
_END_BYTES = _END64.size + _LOCATOR64.size + _END.size

Copy = tuple[int, int, int, int, int]
"""(position in the block, record, position in the record, bytes, number of the chunk)."""

Glue = tuple[int, int, int, int]
"""(position in the block, record that the glue precedes, first byte of the glue, end)."""


class Layout:
    """Where the records of a file lie. Immutable; depends on their lengths alone.

    Between two records there is *glue*: the descriptor of the one and the local header of the other.

    Attributes:
        lengths: Bytes of each record.
        offsets: Where each record's data start in the file.
        chunks: For each record the number of its first chunk, and the number of chunks at the end.
        end: Where the last record's data end.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = tuple(lengths)
        self.offsets: list[int] = []
        self.chunks = [0]
        self._names: list[bytes] = []
        self._headers: list[bytes] = []
        self._starts: list[int] = []
        self._operations: dict[int, list[tuple[list[Copy], list[Glue]]]] = {}
        position = 0
        for number, length in enumerate(self.lengths):
            start = position + (_DESCRIPTOR.size if number else 0)
            name = f"{FOLDER}/data/{number}".encode()
            header = _local_header(
                name, start, length, LARGE_ALIGNMENT if length >= LARGE_BYTES else SMALL_ALIGNMENT
            )
            self._names.append(name)
            self._starts.append(start)
            self._headers.append(header)
            self.offsets.append(start + len(header))
            self.chunks.append(self.chunks[-1] + -(-length // CHUNK_BYTES))
            position = start + len(header) + length
        self.end = position

    def glue(self, record: int, crc_before: int) -> bytes:
        """The bytes in front of a record, given the CRC of the record before it."""
        header = self._headers[record]
        return header if record == 0 else _descriptor(crc_before, self.lengths[record - 1]) + header

    def glue_start(self, record: int) -> int:
        """Where the glue in front of a record starts."""
        return self._starts[record] - (_DESCRIPTOR.size if record else 0)

    def central_entries(self, crcs: Sequence[int]) -> list[bytes]:
        """The central directory's entries for the records, given their CRCs."""
        return [
            _central(name, crc, length, start)
            for name, crc, length, start in zip(self._names, crcs, self.lengths, self._starts, strict=True)
        ]

    def central_bytes(self) -> int:
        """The size of `central_entries`, which is known before the CRCs are."""
        return len(self._names) * _CENTRAL_FIXED + sum(map(len, self._names))

    def operations(self, block_bytes: int) -> list[tuple[list[Copy], list[Glue]]]:
        """For each block of the file up to `end`: what to copy into it, chunk by chunk, and its glue."""
        found = self._operations.get(block_bytes)
        if found is None:
            found = self._operations[block_bytes] = self._plan_operations(block_bytes)
        return found

    def _plan_operations(self, block_bytes: int) -> list[tuple[list[Copy], list[Glue]]]:
        blocks: list[tuple[list[Copy], list[Glue]]] = [([], []) for _ in range(-(-self.end // block_bytes))]
        for record, (offset, length) in enumerate(zip(self.offsets, self.lengths, strict=True)):
            start = self.glue_start(record)
            position = start
            while position < offset:
                block, within = divmod(position, block_bytes)
                size = min(offset - position, block_bytes - within)
                blocks[block][1].append((within, record, position - start, position - start + size))
                position += size
            done, chunk = 0, self.chunks[record]
            while done < length:
                block, within = divmod(offset + done, block_bytes)
                size = min(length - done, CHUNK_BYTES - done % CHUNK_BYTES, block_bytes - within)
                blocks[block][0].append((within, record, done, size, chunk + done // CHUNK_BYTES))
                done += size
        return blocks


class Image:
    """One save's file: a layout, this save's further entries, and the checksums as they become known.

    Args:
        layout: Where the records lie.
        entries: Name and bytes of what follows the records, in order: objects, then ``data.pkl`` and the
            small entries that torch expects.

    Attributes:
        size: Bytes of the whole file.
        entry_offsets: Where the data of each of `entries` start.
        chunk_crcs: The CRC-32 of each chunk of the records, valid once it is filled.
        file_crc: The CRC-32 of the whole file, valid once all of it is filled.
    """

    def __init__(self, layout: Layout, entries: Sequence[tuple[str, bytes]]) -> None:
        self.layout = layout
        self._entries = [(f"{FOLDER}/{name}".encode(), data) for name, data in entries]
        self.entry_offsets: list[int] = []
        self._entry_starts: list[int] = []
        self._entry_headers: list[bytes] = []
        position = layout.end
        for number, (name, data) in enumerate(self._entries):
            start = position + (_DESCRIPTOR.size if number or layout.lengths else 0)
            header = _local_header(name, start, len(data), SMALL_ALIGNMENT)
            self._entry_starts.append(start)
            self._entry_headers.append(header)
            self.entry_offsets.append(start + len(header))
            position = start + len(header) + len(data)
        self._central_start = position + _DESCRIPTOR.size
        self._central_bytes = (
            layout.central_bytes()
            + len(self._entries) * _CENTRAL_FIXED
            + sum(len(name) for name, _ in self._entries)
        )
        self.size = self._central_start + self._central_bytes + _END_BYTES
        self.chunk_crcs = [0] * layout.chunks[-1]
        self.file_crc = 0
        self._record_crcs: list[int] = []
        self._tail: bytes | None = None

    def fill(
        self, view: memoryview, offset: int, block_bytes: int, copy: Callable[[int, int, int, int], None]
    ) -> None:
        """Fill the bytes of the file from `offset` on; blocks must come in the order of the file.

        Args:
            view: Where they go; all of it is filled.
            offset: A multiple of `block_bytes`.
            block_bytes: The size of all blocks but the last.
            copy: Called as ``copy(record, position, bytes, address)`` to copy a piece of a record.
        """
        if offset < self.layout.end:
            base = address_of(view)
            copies, glues = self.layout.operations(block_bytes)[offset // block_bytes]
            crcs = self.chunk_crcs
            for within, record, position, size, chunk in copies:
                copy(record, position, size, base + within)
                crcs[chunk] = _crc32(view[within : within + size], crcs[chunk])
            for within, record, first, end in glues:
                view[within : within + end - first] = self._glue(record)[first:end]
        if offset + len(view) > self.layout.end:
            tail = self.seal()
            skip = max(offset - self.layout.end, 0)
            start = max(self.layout.end - offset, 0)
            view[start:] = memoryview(tail)[skip : skip + len(view) - start]

    def seal(self) -> bytes:
        """All bytes from `layout.end` on, once every chunk's CRC is known; sets `file_crc`."""
        if self._tail is None:
            if self.layout.lengths:
                self._glue(len(self.layout.lengths) - 1)
                self._note_record(len(self.layout.lengths) - 1)
            self._tail = self._make_tail()
            self.file_crc = _crc32(self._tail, self.file_crc)
        return self._tail

    def record_crc(self, record: int) -> int:
        """The CRC-32 of a record, from those of its chunks."""
        first, end = self.layout.chunks[record], self.layout.chunks[record + 1]
        if first == end:
            return 0
        crc = self.chunk_crcs[first]
        for chunk in range(first + 1, end):
            size = min(CHUNK_BYTES, self.layout.lengths[record] - (chunk - first) * CHUNK_BYTES)
            crc = _combine(crc, self.chunk_crcs[chunk], size)
        return crc

    def entry_crcs(self, number: int) -> list[int]:
        """The CRC-32 of each chunk of one of the further entries."""
        data = memoryview(self._entries[number][1])
        return [_crc32(data[start : start + CHUNK_BYTES]) for start in range(0, len(data), CHUNK_BYTES)]

    def _note_record(self, record: int) -> None:
        """Take a finished record into the CRC of the file; once for each record, in order."""
        if record == len(self._record_crcs):
            crc = self.record_crc(record)
            self._record_crcs.append(crc)
            self.file_crc = _combine(self.file_crc, crc, self.layout.lengths[record])

    def _glue(self, record: int) -> bytes:
        """The glue in front of a record; taken into the CRC of the file at first sight."""
        if record and record - 1 == len(self._record_crcs):
            self._note_record(record - 1)
        glue = self.layout.glue(record, self._record_crcs[record - 1] if record else 0)
        if record == self._glued:
            self._glued += 1
            self.file_crc = _crc32(glue, self.file_crc)
        return glue

    _glued = 0

    def _make_tail(self) -> bytes:
        parts: list[bytes] = []
        central = self.layout.central_entries(self._record_crcs)
        crc, length = (self._record_crcs[-1], self.layout.lengths[-1]) if self.layout.lengths else (0, -1)
        for (name, data), header, start in zip(
            self._entries, self._entry_headers, self._entry_starts, strict=True
        ):
            if length >= 0:
                parts.append(_descriptor(crc, length))
            parts += (header, data)
            crc, length = _crc32(data), len(data)
            central.append(_central(name, crc, length, start))
        parts.append(_descriptor(crc, length))
        parts += central
        parts.append(_end(len(central), self._central_start, self._central_bytes))
        tail = b"".join(parts)
        if len(tail) != self.size - self.layout.end:
            raise AssertionError("the tail of the image does not have the planned size")
        return tail


def address_of(view: memoryview) -> int:
    """The address of a writable buffer."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))
