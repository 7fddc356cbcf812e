"""Divides tensors that several ranks hold between these ranks: each saves a share.

Each rank derives the same division by one rule (`format.boxes.cut`), so a save needs no collective. A
division depends on the structure of the state alone, and is kept for the next save. Checksums are computed
anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import msgspec
import numpy as np
import torch
from isal.isal_zlib import crc32

from milepost import syscalls
from milepost.errors import StateError
from milepost.format.boxes import Box, Piece, cut, is_run, span
from milepost.format.keys import encode_key
from milepost.format.paths import Path, path_text
from milepost.format.shards import ON_EACH_MESH, Shards
from milepost.format.tree import Node
from milepost.state.decode import dtype_name
from milepost.state.placements import Placed, narrowed, ranges
from milepost.utils import beside, gc_paused

__all__ = ["STAGED_SHARE", "Division", "Member", "is_share_array", "mark_share"]

_CRC_BYTES = 8 << 20

STAGED_SHARE = "_milepost_share"
"""Attribute of a staged tensor that is a part of a global one. Without it, it looks like a whole tensor."""

_share_arrays: WeakValueDictionary[int, np.ndarray[Any, Any]] = WeakValueDictionary()
"""Staged arrays that are parts of global tensors, by their ids."""


@dataclass
class Member:
    """A tensor of a state dict that is part of a global one.

    Attributes:
        path: Its path in the state dict.
        number: Its number among the tensors.
        placed: Which part of the global tensor each rank holds.
        requires_grad: Whether the global tensor requires a gradient.
    """

    path: Path
    number: int
    placed: Placed
    requires_grad: bool


@dataclass
class Division:
    """What each rank saves of the tensors that are parts of global ones.

    Attributes:
        structure: All that the division depends on.
        columns: The columns for the index, without CRCs.
        encoded: The columns as msgpack.
        agreement: Hash of what all ranks must agree on.
        owned: Numbers of the tensors that this rank does not save whole, with the box that it saves.
        checks: Entries that other ranks hold too, with the boxes whose checksums are compared.
        tied: Entries that share the memory of an entry in `checks`, with its number.
    """

    structure: list[Any]
    columns: Shards
    encoded: bytes
    agreement: str
    owned: list[tuple[int, Box | None]]
    checks: list[tuple[int, list[Box]]]
    tied: list[tuple[int, int]]

    @classmethod
    def of(
        cls,
        members: Sequence[Member],
        tensors: Sequence[torch.Tensor],
        kinds: Sequence[str],
        rank: int,
        world_size: int,
        known: Division | None,
        node_of: Callable[[Any], Node],
    ) -> Division:
        """The division for these tensors: the known one if the structure is the same.

        Args:
            members: The tensors that are parts of global ones.
            tensors: All local tensors, by number.
            kinds: Their kinds.
            rank: This rank.
            world_size: How many ranks there are.
            known: The division of an earlier save.
            node_of: Encodes a key that is not text.
        """
        first: dict[Any, int] = {}
        structure: list[Any] = []
        aliases = []
        for entry, member in enumerate(members):
            tensor = tensors[member.number]
            # A part without elements has no address. Where it is shared on other ranks, its storage is here.
            at: Any = tensor.data_ptr()
            if not tensor.numel():
                at = (tensor.untyped_storage()._cdata, tensor.storage_offset())  # noqa: SLF001
            memory = (at, tensor.shape, tensor.stride(), tensor.dtype, member.placed)
            alias = first.setdefault(memory, entry)
            aliases.append(alias)
            structure.append(
                (
                    *(member.path, tuple(map(_written, member.path)), member.number, member.placed),
                    *(member.requires_grad, alias, tensor.dtype, kinds[member.number]),
                )
            )
        if known is not None and known.structure == structure:
            return known
        return _Divider(members, tensors, kinds, aliases, rank, world_size, node_of).divide(structure)

    def take(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Replace each local tensor by the share that this rank saves; returns the tensors as they were."""
        whole_ones = list(tensors)
        for number, box in self.owned:
            tensor = tensors[number]
            if box is None:
                tensors[number] = torch.empty(0, dtype=tensor.dtype, device="cpu")
            else:
                tensors[number] = narrowed(tensor, box)
        return whole_ones

    @gc_paused()
    def crcs(self, tensors: Sequence[torch.Tensor]) -> list[list[int]]:
        """For each entry the CRC-32s of the shares of all replicas, from this rank's memory."""
        numbers = self.columns.tensor
        jobs = [(tensors[numbers[entry]], box) for entry, boxes in self.checks for box in boxes]
        if sum(tensor.nbytes for tensor, _ in jobs) > _CRC_BYTES:
            # Two threads with half of the boxes each: a task for each tensor would cost more than its bytes.
            results = [0] * len(jobs)
            with beside(lambda: _crcs_of(jobs[1::2])) as others:
                results[::2] = _crcs_of(jobs[::2])
            results[1::2] = others[0]
        else:
            results = _crcs_of(jobs)
        found: list[list[int]] = [[] for _ in numbers]
        position = 0
        for entry, boxes in self.checks:
            found[entry] = results[position : position + len(boxes)]
            position += len(boxes)
        for entry, root in self.tied:  # on other ranks they may not be tied: each is compared
            found[entry] = found[root]
        return found


def _written(part: Any) -> Any:
    """Differs for keys that are equal but not the same: 1 and True, 0.0 and -0.0, in tuples as well."""
    return type(part) if isinstance(part, str | int) else repr(part)


def _crcs_of(jobs: Sequence[tuple[torch.Tensor, Box]]) -> list[int]:
    return [box_crc(tensor, box) for tensor, box in jobs]


def box_crc(tensor: torch.Tensor, box: Box) -> int:
    """The CRC-32 of a box's bytes, row by row, whatever the strides."""
    if tensor.is_cpu and tensor.is_contiguous() and box.volume == tensor.numel():
        memory = syscalls.memory_at(tensor.data_ptr(), tensor.nbytes)
    elif tensor.is_cpu and is_run(box.size, tensor.stride()):
        size = tensor.element_size()
        start = span(box.start, box.size, tensor.stride())[0] * size
        memory = syscalls.memory_at(tensor.data_ptr() + start, box.volume * size)
    else:
        tensor = narrowed(tensor, box).cpu().contiguous()
        memory = syscalls.memory_at(tensor.data_ptr(), tensor.nbytes)
    return int(crc32(memory))


@dataclass(slots=True)
class _Entry:
    """What this rank saves of a member.

    Attributes:
        member: The member.
        whole: The box that is all of its local tensor.
        mine: The box of the local tensor that this rank saves; None if it saves nothing.
        compared: The boxes of the local tensor whose checksums are compared with those of other ranks.
        pieces: Where `mine` is in the global tensor.
    """

    member: Member
    whole: Box
    mine: Box | None
    compared: list[Box]
    pieces: list[Piece]


@dataclass
class _Divider:
    members: Sequence[Member]
    tensors: Sequence[torch.Tensor]
    kinds: Sequence[str]
    aliases: list[int]
    rank: int
    world_size: int
    node_of: Callable[[Any], Node]
    places: dict[tuple[int, ...], int] = field(default_factory=dict)

    def divide(self, structure: list[Any]) -> Division:
        members, aliases = self.members, self.aliases
        keys = [encode_key(member.path, self.node_of) for member in members]
        names = [msgspec.json.encode(key) for key in keys]
        shares = self._shares(names)
        entries = list(map(self._entry, members, map(shares.get, aliases)))
        pieces = [piece for entry in entries for piece in entry.pieces]
        columns = Shards(
            tensor=[member.number for member in members],
            key=keys,
            dtype=[dtype_name(self.tensors[member.number].dtype) for member in members],
            kind=[self.kinds[member.number] for member in members],
            shape=[list(member.placed.shape) for member in members],
            placement=[self._text(member) for member in members],
            alias=aliases,
            copies=[
                ranges(member.placed.copies) if alias in shares else ""
                for member, alias in zip(members, aliases, strict=True)
            ],
            crcs=[[] for _ in members],
            requires_grad=[number for number, member in enumerate(members) if member.requires_grad],
            pieces=[len(entry.pieces) for entry in entries],
            start=[n for piece in pieces for n in piece.start],
            local=[n for piece in pieces for n in piece.local],
            size=[n for piece in pieces for n in piece.size],
        )
        compared = [number for number, entry in enumerate(entries) if entry.compared]
        return Division(
            structure,
            columns,
            msgspec.msgpack.encode(columns),
            self._agreement(names, columns),
            # By number, as a tensor at several paths is several members.
            owned=list({e.member.number: e.mine for e in entries if e.mine != e.whole}.items()),
            checks=[(number, entries[number].compared) for number in compared if aliases[number] == number],
            tied=[(number, aliases[number]) for number in compared if aliases[number] != number],
        )

    def _entry(self, member: Member, boxes: dict[int, Box] | None) -> _Entry:
        place = member.placed
        everything = Box((0,) * len(place.local), place.local)
        mine = everything if boxes is None else boxes.get(self._place_in(place.copies))
        compared = [] if boxes is None else list(boxes.values())
        if mine is not None and place.pieces and self._is_of_part(member):
            compared.append(mine)
        pieces = [] if mine is None else _held(place.pieces, mine)
        return _Entry(member, everything, mine, compared, pieces)

    def _place_in(self, copies: tuple[int, ...]) -> int:
        found = self.places.get(copies)
        if found is None:
            found = self.places[copies] = copies.index(self.rank)
        return found

    def _is_of_part(self, member: Member) -> bool:
        """Whether a tensor's mesh is a part of the job. Other meshes may hold it too; no rank knows which.

        Then each mesh saves it, with a checksum of what this rank saves behind those of the shares. If
        several meshes have saved it, they are compared at the commit, and the first is kept.
        """
        return len(member.placed.ranks) < self.world_size

    def _text(self, member: Member) -> str:
        if self._is_of_part(member):
            return f"{member.placed.text.partition(' ranks ')[0]} ranks{ON_EACH_MESH}"
        return member.placed.text

    def _shares(self, names: list[bytes]) -> dict[int, dict[int, Box]]:
        """For each tensor that several ranks hold alike: the box that each saves, by its place among them."""
        groups: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for entry, member in enumerate(self.members):
            if len(member.placed.copies) > 1 and self.aliases[entry] == entry:
                # A tensor that other meshes may hold too is divided by itself: alike on all meshes.
                alone = entry if self._is_of_part(member) else -1
                groups.setdefault((member.placed.copies, alone), []).append(entry)
        shares: dict[int, dict[int, Box]] = {}
        for (copies, _), entries in groups.items():
            if self.rank not in copies:
                raise StateError(
                    f"a tensor is held by ranks {ranges(copies)}, but this is rank {self.rank}",
                    key=path_text(self.members[entries[0]].path),
                    hint="rank_info must give this process's rank in the default process group",
                )
            entries.sort(key=names.__getitem__)
            tensors = [self.tensors[self.members[entry].number] for entry in entries]
            boxes = cut(
                [tensor.shape for tensor in tensors], [t.element_size() for t in tensors], len(copies)
            )
            shares.update(zip(entries, boxes, strict=True))
        return shares

    def _agreement(self, names: list[bytes], columns: Shards) -> str:
        """The hash of all tensors of which every rank may hold a part; "" if there is none.

        It includes what shares memory where all ranks hold the same. A rank whose part is empty does not know
        that.
        """
        rows = sorted(
            (
                *(names[entry], columns.dtype[entry], columns.shape[entry], columns.placement[entry]),
                names[self.aliases[entry]] if member.placed.copies == member.placed.ranks else b"",
            )
            for entry, member in enumerate(self.members)
            if len(member.placed.ranks) == self.world_size
        )
        return hashlib.sha256(msgspec.json.encode(rows)).hexdigest() if rows and self.world_size > 1 else ""


def _held(pieces: Sequence[Piece], box: Box) -> list[Piece]:
    """The pieces of a local tensor, cut to a box of it."""
    held = []
    for piece in pieces if box.volume else ():
        local, start, size = [], [], []
        for at, first, n, begin, count in zip(
            piece.local, piece.start, piece.size, box.start, box.size, strict=True
        ):
            lower, upper = max(at, begin), min(at + n, begin + count)
            local.append(lower - begin)
            start.append(first + lower - at)
            size.append(upper - lower)
        if all(n > 0 for n in size):
            held.append(Piece(tuple(start), tuple(local), tuple(size)))
    return held


# -- staged shares ---------------------------------------------------------------------------------


def mark_share(value: torch.Tensor | np.ndarray[Any, Any], is_share: bool) -> None:  # noqa: FBT001
    """Mark a tensor or array as a part of a global one, so that a save refuses it; or remove the mark."""
    if isinstance(value, torch.Tensor):
        value.__dict__.pop(STAGED_SHARE, None)
        if is_share:
            setattr(value, STAGED_SHARE, True)
    elif is_share:
        _share_arrays[id(value)] = value
    else:
        _share_arrays.pop(id(value), None)


def is_share_array(value: np.ndarray[Any, Any]) -> bool:
    """Whether an array is marked. A marked tensor has the attribute `STAGED_SHARE`."""
    return _share_arrays.get(id(value)) is value
