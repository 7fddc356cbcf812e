"""What all ranks' indexes say of the tensors that they hold between them, merged and compared."""

from __future__ import annotations

import logging
from math import prod

import msgspec

from milepost.commit.contents import numbers
from milepost.errors import CommitError, CorruptCheckpointError
from milepost.format.global_tree import key_trie
from milepost.format.keys import Key, decode_key
from milepost.format.paths import path_text
from milepost.format.shards import ON_EACH_MESH, ShardMap, Table, check_described, dtype_bytes

__all__ = ["Merger"]

logger = logging.getLogger(__name__)

_SHOWN = 5
_MANY_BYTES = 64 << 20
_told = False
"""Whether this process has said that bytes were saved more than once."""


class _Columns(msgspec.Struct):
    """The columns of an index's shards: those that most ranks have in common stay encoded."""

    key: msgspec.Raw
    dtype: msgspec.Raw
    kind: msgspec.Raw
    shape: msgspec.Raw
    placement: msgspec.Raw
    alias: msgspec.Raw
    requires_grad: msgspec.Raw
    copies: msgspec.Raw
    crcs: msgspec.Raw
    pieces: list[int]
    start: list[int]
    size: list[int]

    def described(self) -> tuple[bytes, ...]:
        return tuple(bytes(getattr(self, name)) for name in _Described.__struct_fields__)


class _Index(msgspec.Struct):
    shards: _Columns


class _Described(msgspec.Struct):
    """The columns that describe global tensors, decoded."""

    key: list[Key]
    dtype: list[str]
    kind: list[str]
    shape: list[list[int]]
    placement: list[str]
    alias: list[int]
    requires_grad: list[int]


class _Group(msgspec.Struct):
    """Ranks whose columns describe the same tensors, and where these are in the merged columns.

    `of_parts` are the entries that several meshes may hold, `ties` the rows whose memory each entry shares.
    """

    described: _Described
    rows: list[int]
    names: list[bytes]
    of_parts: set[int] = set()
    ties: list[int] = []


class Merger:
    """Merges the shards of all ranks, one index after the other, in the order of ranks.

    Args:
        attempt: Id of the attempt.
        world_size: How many ranks there are.
    """

    def __init__(self, attempt: str, world_size: int) -> None:
        self._merged = ShardMap(attempt=attempt, world_size=world_size)
        self._rows: dict[bytes, int] = {}
        self._groups: dict[tuple[bytes, ...], _Group] = {}
        self._group_of: dict[int, _Group] = {}
        self._tables: list[Table] = []
        self._ties: list[int | None] = []
        self._untied: set[int] = set()
        self._boxes: dict[int, set[tuple[int, ...]]] = {}
        self._replicas: dict[tuple[int, str], dict[tuple[int, ...], list[int]]] = {}
        self._seen: dict[tuple[int, bytes, bytes], list[tuple[int, str, tuple[int, ...]]]] = {}
        self._conflicts: list[str] = []
        self._twice: dict[int, int] = {}

    def add(self, rank: int, data: bytes, path: str) -> None:
        """Take in a rank's index.

        Raises:
            CorruptCheckpointError: Its shards are malformed.
        """
        try:
            columns = msgspec.json.decode(data, type=_Index).shards
            group = self._group(rank, columns)
        except msgspec.DecodeError as error:
            raise CorruptCheckpointError(
                f"the shards of an index are malformed: {error}: {path}", path=path
            ) from None
        self._group_of[rank] = group
        described = group.described
        flat = sum(count * len(shape) for count, shape in zip(columns.pieces, described.shape, strict=False))
        if len(columns.pieces) != len(described.key) or not len(columns.start) == len(columns.size) == flat:
            raise CorruptCheckpointError(f"the shards of an index differ in length: {path}", path=path)
        self._compare_replicas(rank, group, columns, path)
        position = 0
        for entry, count in enumerate(columns.pieces):
            if count:
                end = position + count * len(described.shape[entry])
                self._place(
                    rank, group, entry, count, columns.start[position:end], columns.size[position:end]
                )
                position = end

    def _group(self, rank: int, columns: _Columns) -> _Group:
        key = columns.described()
        group = self._groups.get(key)
        if group is None:
            described = msgspec.convert(
                {
                    name: msgspec.json.decode(raw)
                    for name, raw in zip(_Described.__struct_fields__, key, strict=True)
                },
                _Described,
            )
            problem = check_described(described)
            if problem:
                raise msgspec.ValidationError(problem)
            names = [msgspec.json.encode(name) for name in described.key]
            rows = [self._row(rank, described, entry, names) for entry in range(len(names))]
            of_parts = {n for n, text in enumerate(described.placement) if text.endswith(ON_EACH_MESH)}
            ties = [rows[alias] for alias in described.alias]
            group = self._groups[key] = _Group(described, rows, names, of_parts, ties)
        return group

    def _row(self, rank: int, described: _Described, entry: int, names: list[bytes]) -> int:
        """The row of the merged columns for an entry of a rank's columns."""
        merged = self._merged
        row = self._rows.get(names[entry])
        facts = (described.dtype[entry], described.shape[entry], described.placement[entry])
        if row is None:
            row = self._rows[names[entry]] = len(merged.key)
            merged.key.append(described.key[entry])
            merged.dtype.append(facts[0])
            merged.shape.append(facts[1])
            merged.placement.append(facts[2])
            merged.kind.append(described.kind[entry])
            alias = described.alias[entry]
            merged.alias.append(row if alias == entry else self._rows[names[alias]])
            if entry in described.requires_grad:
                merged.requires_grad.append(row)
            self._tables.append(Table([], [], []))
            self._ties.append(None)
            return row
        known = (merged.dtype[row], merged.shape[row], merged.placement[row])
        if known != facts:
            self._conflicts.append(
                f"{_text(described.key[entry])}: {_facts(known)} on an earlier rank, "
                f"{_facts(facts)} on rank {rank}"
            )
        return row

    def _place(
        self, rank: int, group: _Group, entry: int, count: int, start: list[int], size: list[int]
    ) -> None:
        row, tie = group.rows[entry], group.ties[entry]
        if self._ties[row] != tie:
            if self._ties[row] is not None:  # the first that has elements of it says whose memory it shares
                self._untie(row, rank, group, entry)
            self._ties[row] = tie
        table = self._tables[row]
        if entry in group.of_parts:
            start, size, count = self._not_yet_held(row, count, start, size)
        if count == 1:
            table.rank.append(rank)
        else:
            table.rank += [rank] * count
        table.start += start
        table.size += size

    def _untie(self, row: int, rank: int, group: _Group, entry: int) -> None:
        """A tensor shares memory on some ranks that hold parts of it and not on others."""
        if entry in group.of_parts:  # each mesh may do as it likes: what they hold is compared
            self._untied.add(row)
        else:
            self._conflicts.append(
                f"{_text(group.described.key[entry])}: rank {rank} and an earlier one differ in what shares "
                "memory with it"
            )

    def _differs_in_ties(self, row: int) -> bool:
        """Whether ranks that have a tensor differ in what shares memory with it."""
        groups = [group for group in self._groups.values() if row in group.rows]
        return len({group.ties[group.rows.index(row)] for group in groups}) > 1

    def _not_yet_held(
        self, row: int, count: int, start: list[int], size: list[int]
    ) -> tuple[list[int], list[int], int]:
        """Of boxes that a rank of another mesh may have saved as well, those that none has."""
        known = self._boxes.setdefault(row, set())
        dims = len(start) // count
        kept_start: list[int] = []
        kept_size: list[int] = []
        kept = 0
        for n in range(count):
            box = (*start[n * dims : (n + 1) * dims], *size[n * dims : (n + 1) * dims])
            if box not in known:
                known.add(box)
                kept_start += box[:dims]
                kept_size += box[dims:]
                kept += 1
            else:
                volume = prod(box[dims:]) * dtype_bytes(self._merged.dtype[row])
                self._twice[row] = self._twice.get(row, 0) + volume
        return kept_start, kept_size, kept

    # -- replicas --------------------------------------------------------------------------------

    def _compare_replicas(self, rank: int, group: _Group, columns: _Columns, path: str) -> None:
        """Sort a rank's checksums of what others hold as well to theirs."""
        same = (id(group), bytes(columns.copies), bytes(columns.crcs))
        known = self._seen.get(same)
        if known is None:
            copies = msgspec.json.decode(columns.copies, type=list[str])
            crcs = msgspec.json.decode(columns.crcs, type=list[list[int]])
            if not len(copies) == len(crcs) == len(group.rows):
                raise CorruptCheckpointError(f"the shards of an index differ in length: {path}", path=path)
            known = self._seen[same] = [
                (entry, held_by, tuple(crc))
                for entry, (held_by, crc) in enumerate(zip(copies, crcs, strict=True))
                if crc
            ]
        boxes = self._boxes_of(group, columns) if group.of_parts else {}
        for entry, held_by, crc in known:
            row, shares = group.rows[entry], crc
            if boxes.get(entry):
                shares = crc[:-1]
                self._note(row, boxes[entry], crc[-1:], rank)
            if shares:
                self._note(row, held_by, shares, rank)

    def _note(self, row: int, held_by: str, crcs: tuple[int, ...], rank: int) -> None:
        self._replicas.setdefault((row, held_by), {}).setdefault(crcs, []).append(rank)

    def _boxes_of(self, group: _Group, columns: _Columns) -> dict[int, str]:
        """What a rank saves of the tensors that several meshes may hold, by their entries."""
        boxes, position = {}, 0
        for entry, count in enumerate(columns.pieces):
            end = position + count * len(group.described.shape[entry])
            if entry in group.of_parts and count:
                boxes[entry] = f"{columns.start[position:end]} {columns.size[position:end]}"
            position = end
        return boxes

    # -- the result ------------------------------------------------------------------------------

    def difference(self, first: int, second: int) -> str:
        """The first tensor in which two ranks' columns differ, as the end of a message."""
        a, b = self._group_of.get(first), self._group_of.get(second)
        here = dict(zip(a.names, range(len(a.names)), strict=True)) if a else {}
        there = dict(zip(b.names, range(len(b.names)), strict=True)) if b else {}
        for name in sorted({*here, *there}):
            key = _text(msgspec.json.decode(name))
            if name not in here or name not in there:
                has, lacks = (first, second) if name in here else (second, first)
                return f"; first: {key}, which rank {has} has and rank {lacks} has not"
            assert a is not None
            assert b is not None
            facts = [
                (g.described.dtype[n], g.described.shape[n], g.described.placement[n])
                for g, n in ((a, here[name]), (b, there[name]))
            ]
            if facts[0] != facts[1]:
                return (
                    f"; first: {key}, {_facts(facts[0])} on rank {first}, {_facts(facts[1])} on rank {second}"
                )
        return "; the tensors are the same, but not how they share memory"

    def finish(self) -> ShardMap | None:
        """The shard map; None if no rank has shards.

        Raises:
            CommitError: The ranks contradict each other, replicas differ, or a part is held by no rank.
        """
        if not self._group_of:
            return None
        if self._conflicts:
            raise CommitError(
                f"the ranks hold tensors of one key that differ: {'; '.join(self._conflicts[:_SHOWN])}",
                phase="commit",
                hint="a key must mean the same tensor, placed in the same way, on all ranks that have it",
            )
        self._check_replicas()
        merged = self._merged
        for row, tie in enumerate(self._ties):
            if tie is not None:
                merged.alias[row] = row if row in self._untied or tie > row else tie
        try:
            key_trie(merged.key)
        except CorruptCheckpointError as error:
            raise CommitError(
                f"the ranks' states do not go together: {error.message}",
                phase="commit",
                hint="a key must mean the same thing on all ranks",
            ) from None
        encoded: dict[bytes, int] = {}
        for shape, table in zip(merged.shape, self._tables, strict=True):
            table.sort(len(shape))
            merged.table.append(encoded.setdefault(msgspec.json.encode(table), len(encoded)))
        self._check_coverage()
        merged.tables = [msgspec.Raw(data) for data in encoded]
        self._tell_of_copies()
        return merged

    def _tell_of_copies(self) -> None:
        """Say once in a process what could be saved once, and is not, as nobody has declared it."""
        global _told  # noqa: PLW0603 - see there
        size = sum(self._twice.values())
        if size > _MANY_BYTES and not _told:
            _told = True
            largest = max(self._twice, key=self._twice.__getitem__)
            logger.warning(
                "%d MiB were saved more than once, by several slices of a mesh, most of them of %s: declare "
                "such tensors as replicated, and each byte is saved once",
                *(size >> 20, _text(self._merged.key[largest])),
            )

    def _check_replicas(self) -> None:
        differing = []
        for (row, _), replicas in self._replicas.items():
            if len(replicas) > 1:
                groups = sorted(replicas.values(), key=len, reverse=True)
                differing.append(
                    f"{_text(self._merged.key[row])}: "
                    + ", others on ".join(f"ranks {numbers(ranks)}" for ranks in groups)
                )
        if differing:
            more = f" and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
            raise CommitError(
                f"replicas differ, so none of them can be saved for all: one value of "
                f"{'; one of '.join(differing[:_SHOWN])}{more}",
                phase="commit",
                hint="the ranks have run apart: find out since when; or do not declare these as replicated",
            )

    def _check_coverage(self) -> None:
        """Every element of every global tensor must be held once."""
        merged = self._merged
        first_of: dict[tuple[int, tuple[int, ...]], int] = {}
        for row, (shape, number) in enumerate(zip(merged.shape, merged.table, strict=True)):
            first_of.setdefault((number, tuple(shape)), row)
        for row in first_of.values():
            shape, table = merged.shape[row], self._tables[row]
            volume = table.volume(len(shape))
            if volume != prod(shape) or not table.is_disjoint(len(shape)):
                twice = "" if volume != prod(shape) else ", some of them twice,"
                hint = "every rank of the tensor's mesh must save it, with one key and one mesh"
                if self._differs_in_ties(row):
                    hint = "the ranks differ in what shares memory with it: tie it on all of them, or on none"
                raise CommitError(
                    f"the ranks hold {volume} elements{twice} "
                    f"of {_text(merged.key[row])}, which has {prod(shape)}: {merged.placement[row]}",
                    phase="commit",
                    hint=hint,
                )


def _text(key: Key) -> str:
    return path_text(decode_key(key))


def _facts(facts: tuple[str, list[int], str]) -> str:
    return f"{facts[0]} {facts[1]} {facts[2]}"
