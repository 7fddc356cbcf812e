"""Tells once of plain tensors that every rank has saved alike, as those of DDP that nobody has declared."""

from __future__ import annotations

import logging
from collections import Counter
from contextlib import suppress

import msgspec

from milepost.format.index import Records, Tensors

__all__ = ["Copies"]

logger = logging.getLogger(__name__)

_MANY_BYTES = 64 << 10
"""States of random generators, which are the same at first, have less."""

_told = False
"""Whether a save of this process has been looked at: to read all indexes takes time, so it is done once."""


class _Shards(msgspec.Struct):
    tensor: list[int] = []


class _Index(msgspec.Struct):
    """What is needed of an index."""

    records: Records
    tensors: Tensors
    shards: _Shards = msgspec.field(default_factory=_Shards)


class Copies:
    """Compares the checksums of what each rank of a save has of its own, one index after the other."""

    def __init__(self) -> None:
        self._ranks = 0
        self._same: Counter[tuple[int, int]] = Counter()

    def add(self, data: bytes) -> None:
        """Take in a rank's index."""
        if _told or (self._ranks and self._size() <= _MANY_BYTES):
            return
        found: Counter[tuple[int, int]] = Counter()
        with suppress(msgspec.DecodeError, IndexError):  # who loads it is told
            index = msgspec.json.decode(data, type=_Index)
            records, record_of = index.records, index.tensors.record
            start = records.chunks()
            for record in set(record_of) - {record_of[number] for number in index.shards.tensor}:
                crcs = tuple(records.crcs[start[record] : start[record + 1]])
                found[records.length[record], hash(crcs)] += 1
        self._same = self._same & found if self._ranks else found
        self._ranks += 1

    def _size(self) -> int:
        return sum(length * count for (length, _), count in self._same.items())

    def tell(self) -> None:
        """Say what all ranks have saved, if it is much; once in a process."""
        global _told  # noqa: PLW0603 - see there
        if not _told and self._size() > _MANY_BYTES:
            logger.warning(
                "%.1f MiB of plain tensors (%d of them) are the same on all %d ranks, and each rank saved "
                "them. If they are replicas, as under DistributedDataParallel, declare them in "
                "CheckpointWriterConfig.replicated: then each byte is saved once",
                *(self._size() / 2**20, self._same.total(), self._ranks),
            )
        _told = True
