"""One rank's data file with its index: verified reads of its records."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Literal

from milepost.errors import CorruptCheckpointError
from milepost.format.index import CHUNK_BYTES, Index
from milepost.format.tree import paths_of
from milepost.storage import OpenFile
from milepost.storage.reading import Damage, Part, check_mapped, read_parts

__all__ = ["RankFile", "Verify"]

Verify = bool | Literal["first"]
_SHOWN = 20


class RankFile:
    """One rank's index, and its data file, which is open.

    Args:
        index: The checked index.
        file: The data file. The owner of this object closes it, and may put the same file, opened again, in
            its place.
        verify: Whether chunks are compared with their checksums.
    """

    def __init__(self, index: Index, file: OpenFile, verify: Verify) -> None:
        self.index = index
        self.file = file
        self._verify = bool(verify)
        self._chunks = index.records.chunks()

    def part(self, record: int, start: int, end: int, address: int | None) -> Part:
        """The bytes of a record from `start` to `end`, both between chunks or at the record's end."""
        records, first = self.index.records, self._chunks[record]
        crcs = None
        if self._verify:
            crcs = records.crcs[first + start // CHUNK_BYTES : first + -(-end // CHUNK_BYTES)]
        return Part(records.offset[record] + start, address, end - start, crcs, record)

    def record(self, record: int, address: int | None) -> Part:
        """All bytes of a record."""
        records = self.index.records
        crcs = records.crcs[self._chunks[record] : self._chunks[record + 1]] if self._verify else None
        return Part(records.offset[record], address, records.length[record], crcs, record)

    def read(self, parts: Sequence[Part]) -> None:
        """Read parts to their addresses, in the order of the file.

        Raises:
            CorruptCheckpointError: Chunks are damaged; names them and their keys.
        """
        if parts:
            parts = sorted(parts, key=attrgetter("offset"))
            self._refuse(read_parts(self.file, parts, chunk_bytes=CHUNK_BYTES).damaged)

    def map(self) -> memoryview | None:
        """The file, mapped privately, with all records verified; None where it cannot be mapped."""
        memory = self.file.map()
        if memory is not None and self._verify:
            parts = [self.record(record, None) for record in range(len(self.index.records.length))]
            self._refuse(check_mapped(memory, parts, chunk_bytes=CHUNK_BYTES))
        return memory

    def checksums(self, number: int) -> object:
        """A value that two tensors of one dtype and shape share only if they have the same bytes."""
        tensors, records = self.index.tensors, self.index.records
        record = tensors.record[number]
        return (
            records.length[record],
            records.crcs[self._chunks[record] : self._chunks[record + 1]],
            (tensors.byte_offset[number], tensors.stride[number]),
            (number in tensors.conj, number in tensors.neg),
        )

    def _refuse(self, damaged: Sequence[Damage]) -> None:
        """Raise for chunks that failed their check; the message names their keys."""
        if not damaged:
            return
        keys = paths_of(self.index.tree, "tensor")
        objects = paths_of(self.index.tree, "array", "blob", "object")
        where = []
        for damage in damaged[:_SHOWN]:
            names = [
                keys.get(number, f"tensor {number}")
                for number, record in enumerate(self.index.tensors.record)
                if record == damage.tag
            ] + [path for record, path in objects.items() if record == damage.tag]
            where.append(
                f"{' = '.join(names[:3])} at byte {damage.offset} "
                f"(CRC-32 {damage.expected:08x} expected, {damage.found:08x} found)"
            )
        raise CorruptCheckpointError(
            f"{self.file.path} is damaged: {'; '.join(where)}"
            + (f" and {len(damaged) - _SHOWN} more" if len(damaged) > _SHOWN else ""),
            path=self.file.path,
            hint="load another checkpoint; `milepost ls` on the folder above lists them",
        )
