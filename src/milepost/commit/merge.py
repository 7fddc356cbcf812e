"""Merges and compares what the indexes of all ranks say about global tensors."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from math import prod
from operator import mul

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
    """The columns of an index's shards. Those that are the same on most ranks stay encoded."""

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

    @classmethod
    def decoded(cls, columns: tuple[bytes, ...]) -> _Described:
        """The columns, checked.

        Raises:
            msgspec.DecodeError: They are malformed.
        """
        raw = map(msgspec.json.decode, columns)
        described = msgspec.convert(dict(zip(cls.__struct_fields__, raw, strict=True)), cls)
        one_each = (described.dtype, described.kind, described.shape, described.placement, described.alias)
        problem: str | None = "its columns differ in length"
        if all(len(column) == len(described.key) for column in one_each):
            problem = check_described(described)
        if problem:
            raise msgspec.ValidationError(problem)
        return described


_Facts = tuple[str, list[int], str]
"""Dtype, global shape and placement of a tensor, which must be the same on all ranks."""


class _Row(msgspec.Struct, eq=False):
    """A global tensor, as the ranks that were added so far describe it.

    Attributes:
        number: Its number among all global tensors.
        key: As in `Shards`.
        facts: As the first rank that has it says.
        kind: As in `Shards`.
        requires_grad: Whether it requires a gradient.
        alias: The number of the tensor whose memory it shares on the first rank that has it.
        tie: The tensor whose memory it shares on the last rank that holds elements of it.
        untied: Meshes differ in `tie`.
        table: Which rank's file holds which box of it.
        boxes: The boxes in `table`, if several meshes may hold the tensor.
        twice: How many bytes of it were saved more than once.
        replicas: The ranks that hold the same part, by that part and its checksums.
    """

    number: int
    key: Key
    facts: _Facts
    kind: str
    requires_grad: bool
    alias: int
    tie: _Row | None = None
    untied: bool = False
    table: Table = msgspec.field(default_factory=lambda: Table([], [], []))
    boxes: set[tuple[int, ...]] = set()
    twice: int = 0
    replicas: dict[str, dict[tuple[int, ...], list[int]]] = {}

    @property
    def shape(self) -> list[int]:
        return self.facts[1]

    def memory(self) -> int:
        """The number of the tensor whose memory it shares; its own number if none comes before it."""
        if self.tie is None:
            return self.alias
        return self.number if self.untied else min(self.number, self.tie.number)

    def note(self, part: str, crcs: tuple[int, ...], rank: int) -> None:
        """Note a rank's checksums of a part that other ranks may hold too."""
        self.replicas.setdefault(part, {}).setdefault(crcs, []).append(rank)

    def not_yet_held(self, count: int, start: list[int], size: list[int]) -> tuple[int, list[int], list[int]]:
        """Of some boxes those that no other mesh has saved: their count, starts and sizes."""
        dims = len(start) // count
        kept_start: list[int] = []
        kept_size: list[int] = []
        kept = 0
        for n in range(count):
            box = (*start[n * dims : (n + 1) * dims], *size[n * dims : (n + 1) * dims])
            if box in self.boxes:
                self.twice += prod(box[dims:]) * dtype_bytes(self.facts[0])
            else:
                self.boxes.add(box)
                kept_start += box[:dims]
                kept_size += box[dims:]
                kept += 1
        return kept, kept_start, kept_size


class _Entry(msgspec.Struct, eq=False):
    """A tensor in the columns of a rank.

    Attributes:
        facts: As this rank says.
        row: The global tensor.
        tie: The global tensor whose memory it shares; its own row if there is none.
        dims: How many dimensions it has.
        of_part: Whether several meshes may hold it.
    """

    facts: _Facts
    row: _Row
    tie: _Row
    dims: int
    of_part: bool


class Merger:
    """Merges the shards of all ranks, one index after the other, in the order of ranks.

    Args:
        attempt: Id of the attempt.
        world_size: How many ranks there are.
    """

    def __init__(self, attempt: str, world_size: int) -> None:
        self._attempt, self._world_size = attempt, world_size
        self._rows: dict[bytes, _Row] = {}
        self._groups: dict[tuple[bytes, ...], list[_Entry]] = {}
        """The entries of ranks whose columns describe the same tensors, by these columns."""

        self._group_of: dict[int, list[_Entry]] = {}
        self._seen: dict[tuple[int, bytes, bytes], list[tuple[int, str, tuple[int, ...]]]] = {}
        self._conflicts: list[str] = []

    def add(self, rank: int, data: bytes, path: str) -> None:
        """Take in a rank's index.

        Raises:
            CorruptCheckpointError: Its shards are malformed.
        """
        try:
            columns = msgspec.json.decode(data, type=_Index).shards
            key = columns.described()
            group = self._groups.get(key)
            if group is None:
                group = self._groups[key] = self._entries(rank, _Described.decoded(key))
        except msgspec.DecodeError as error:
            raise CorruptCheckpointError(
                f"the shards of an index are malformed: {error}: {path}", path=path
            ) from None
        self._group_of[rank] = group
        flat = sum(map(mul, columns.pieces, [entry.dims for entry in group]))
        if len(columns.pieces) != len(group) or not len(columns.start) == len(columns.size) == flat:
            raise CorruptCheckpointError(f"the shards of an index differ in length: {path}", path=path)
        self._compare_replicas(rank, group, columns, path)
        for number, start, size in _held(group, columns):
            self._place(rank, group[number], columns.pieces[number], start, size)

    def _entries(self, rank: int, described: _Described) -> list[_Entry]:
        """The tensors that a rank describes. Each new one gets a row."""
        entries: list[_Entry] = []
        gradients = set(described.requires_grad)
        facts_of = zip(described.dtype, described.shape, described.placement, strict=True)
        for number, (key, facts, kind, alias) in enumerate(
            zip(described.key, facts_of, described.kind, described.alias, strict=True)
        ):
            name = msgspec.json.encode(key)
            row = self._rows.get(name)
            if row is None:
                count = len(self._rows)
                first = count if alias == number else entries[alias].row.number
                row = self._rows[name] = _Row(count, key, facts, kind, number in gradients, first)
            elif row.facts != facts:
                self._conflicts.append(
                    f"{_text(key)}: {_facts(row.facts)} on an earlier rank, {_facts(facts)} on rank {rank}"
                )
            tie = row if alias == number else entries[alias].row
            entries.append(_Entry(facts, row, tie, len(facts[1]), facts[2].endswith(ON_EACH_MESH)))
        return entries

    def _place(self, rank: int, entry: _Entry, count: int, start: list[int], size: list[int]) -> None:
        row = entry.row
        if row.tie is not entry.tie:
            if row.tie is not None:  # the first rank that holds elements of it says whose memory it shares
                self._untie(rank, entry)
            row.tie = entry.tie
        if entry.of_part:
            count, start, size = row.not_yet_held(count, start, size)
        row.table.rank += [rank] * count
        row.table.start += start
        row.table.size += size

    def _untie(self, rank: int, entry: _Entry) -> None:
        """Note that a tensor shares memory on some ranks that hold parts of it and not on others."""
        if entry.of_part:  # each mesh may tie it or not: their values are compared
            entry.row.untied = True
        else:
            self._conflicts.append(
                f"{_text(entry.row.key)}: rank {rank} and an earlier one differ in what shares memory with it"
            )

    def _compare_replicas(self, rank: int, group: list[_Entry], columns: _Columns, path: str) -> None:
        """Note a rank's checksums of what other ranks hold too."""
        same = (id(group), bytes(columns.copies), bytes(columns.crcs))
        known = self._seen.get(same)
        if known is None:
            copies = msgspec.json.decode(columns.copies, type=list[str])
            crcs = msgspec.json.decode(columns.crcs, type=list[list[int]])
            if not len(copies) == len(crcs) == len(group):
                raise CorruptCheckpointError(f"the shards of an index differ in length: {path}", path=path)
            known = self._seen[same] = [
                (number, held_by, tuple(crc))
                for number, (held_by, crc) in enumerate(zip(copies, crcs, strict=True))
                if crc
            ]
        boxes = {}
        if any(group[number].of_part for number, _, _ in known):
            held = _held(group, columns)
            boxes = {number: f"{start} {size}" for number, start, size in held if group[number].of_part}
        for number, held_by, crc in known:
            entry, shares = group[number], crc
            if number in boxes:  # the last checksum is of what this rank saves
                entry.row.note(boxes[number], crc[-1:], rank)
                shares = crc[:-1]
            if shares:
                entry.row.note(held_by, shares, rank)

    def difference(self, first: int, second: int) -> str:
        """The first tensor in which two ranks' columns differ, as the end of a message."""
        here, there = (
            {msgspec.json.encode(entry.row.key): entry.facts for entry in self._group_of.get(rank, [])}
            for rank in (first, second)
        )
        for name in sorted({*here, *there}):
            key = _text(msgspec.json.decode(name))
            if name not in here or name not in there:
                has, lacks = (first, second) if name in here else (second, first)
                return f"; first: {key}, which rank {has} has and rank {lacks} has not"
            ours, theirs = _facts(here[name]), _facts(there[name])
            if ours != theirs:
                return f"; first: {key}, {ours} on rank {first}, {theirs} on rank {second}"
        return "; the tensors are the same, but not how they share memory"

    def finish(self) -> ShardMap | None:
        """The shard map; None if no rank has shards.

        Raises:
            CommitError: The ranks contradict each other, replicas differ, or no rank holds a part.
        """
        if not self._group_of:
            return None
        if self._conflicts:
            raise CommitError(
                f"the ranks hold tensors of one key that differ: {'; '.join(self._conflicts[:_SHOWN])}",
                phase="commit",
                hint="a key must mean the same tensor, placed in the same way, on all ranks that have it",
            )
        rows = list(self._rows.values())
        _check_replicas(rows)
        try:
            key_trie([row.key for row in rows])
        except CorruptCheckpointError as error:
            raise CommitError(
                f"the ranks' states do not go together: {error.message}",
                phase="commit",
                hint="a key must mean the same thing on all ranks",
            ) from None
        table, tables = self._tables(rows)
        _warn_of_copies(rows)
        return ShardMap(
            attempt=self._attempt,
            world_size=self._world_size,
            key=[row.key for row in rows],
            dtype=[row.facts[0] for row in rows],
            kind=[row.kind for row in rows],
            shape=[row.shape for row in rows],
            placement=[row.facts[2] for row in rows],
            alias=[row.memory() for row in rows],
            requires_grad=[row.number for row in rows if row.requires_grad],
            table=table,
            tables=list(map(msgspec.Raw, tables)),
        )

    def _tables(self, rows: list[_Row]) -> tuple[list[int], list[bytes]]:
        """The number of each tensor's table, and the tables, encoded.

        Raises:
            CommitError: An element of a tensor is held by no rank, or twice.
        """
        encoded: dict[bytes, int] = {}
        column: list[int] = []
        checked: set[tuple[int, ...]] = set()
        for row in rows:
            row.table.sort(len(row.shape))
            number = encoded.setdefault(msgspec.json.encode(row.table), len(encoded))
            column.append(number)
            if (number, *row.shape) not in checked:
                checked.add((number, *row.shape))
                self._check_coverage(row)
        return column, list(encoded)

    def _check_coverage(self, row: _Row) -> None:
        dims, elements = len(row.shape), prod(row.shape)
        held = row.table.volume(dims)
        if held == elements and row.table.is_disjoint(dims):
            return
        twice = "" if held != elements else ", some of them twice,"
        hint = "every rank of the tensor's mesh must save it, with one key and one mesh"
        ties = {entry.tie for group in self._groups.values() for entry in group if entry.row is row}
        if len(ties) > 1:
            hint = "the ranks differ in what shares memory with it: tie it on all of them, or on none"
        raise CommitError(
            f"the ranks hold {held} elements{twice} "
            f"of {_text(row.key)}, which has {elements}: {row.facts[2]}",
            phase="commit",
            hint=hint,
        )


def _held(group: list[_Entry], columns: _Columns) -> Iterator[tuple[int, list[int], list[int]]]:
    """The number of each tensor of which a rank saves elements, and the starts and sizes of its boxes."""
    position = 0
    for number, count in enumerate(columns.pieces):
        if count:
            end = position + count * group[number].dims
            yield number, columns.start[position:end], columns.size[position:end]
            position = end


def _warn_of_copies(rows: list[_Row]) -> None:
    """Log once in a process which bytes were saved more than once, as nobody has declared them."""
    global _told  # noqa: PLW0603 - see there
    size = sum(row.twice for row in rows)
    if size > _MANY_BYTES and not _told:
        _told = True
        logger.warning(
            "%d MiB were saved more than once, by several slices of a mesh, most of them of %s: declare "
            "such tensors as replicated, and each byte is saved once",
            *(size >> 20, _text(max(rows, key=lambda row: row.twice).key)),
        )


def _check_replicas(rows: list[_Row]) -> None:
    differing = []
    for row in rows:
        for replicas in row.replicas.values():
            if len(replicas) > 1:
                groups = sorted(replicas.values(), key=len, reverse=True)
                who = " vs. ".join(f"rank{'s' * (len(ranks) > 1)} {numbers(ranks)}" for ranks in groups)
                differing.append(f"{_text(row.key)} ({who})")
    if differing:
        more = f"; and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        raise CommitError(
            f"replicated tensors differ between ranks: {'; '.join(differing[:_SHOWN])}{more}",
            phase="commit",
            hint="the ranks have diverged: compare them at an earlier step, or remove these keys from "
            "`replicated`",
        )


def _text(key: Key) -> str:
    return path_text(decode_key(key))


def _facts(facts: _Facts) -> str:
    return f"{facts[0]} {facts[1]} {facts[2]}"
