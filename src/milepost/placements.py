"""Which part of a global tensor each rank holds, and which part of that it saves.

Placement and declaration decide, never the values: a DTensor says by its mesh and placements what its ranks
hold; a plain tensor is this rank's own, unless it was declared to be a replica. What several ranks hold alike
is divided between them, by a rule (`reshard.cut`) that each rank applies for itself, so that no save needs a
collective.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import msgspec
import torch
from isal.isal_zlib import crc32

from milepost import syscalls
from milepost.errors import ConfigError, StateError
from milepost.names import matcher
from milepost.rebuild import DTYPE_NAMES
from milepost.reshard import Box, Piece, Split, cut, pieces_of, whole
from milepost.shards import ON_EACH_MESH, Shards, encode_key
from milepost.tree import Node, Path, path_text

__all__ = ["Division", "Member", "Placed", "Replicated", "is_dtensor", "local_of", "narrowed", "placed"]

logger = logging.getLogger(__name__)

_CRC_BYTES = 8 << 20


@dataclass(frozen=True, eq=False)
class Placed:
    """How a tensor lies on the ranks. Two that are equal are one object, as long as they are kept.

    Attributes:
        shape: The global shape.
        pieces: What this rank holds of it.
        local: The shape of the tensor that holds that.
        copies: All ranks that hold these very pieces, ascending; this rank's own alone if no other does.
        ranks: All ranks that hold some of it, ascending.
        text: The same for people and for comparison between the ranks.
    """

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    local: tuple[int, ...]
    copies: tuple[int, ...]
    ranks: tuple[int, ...]
    text: str


def is_dtensor(value: Any) -> bool:
    """Whether a value is a DTensor, without importing what defines it."""
    kind = type(value)
    return kind.__name__ == "DTensor" and kind.__module__.startswith("torch.distributed")


def local_of(value: Any) -> torch.Tensor:
    """The plain tensor that holds this rank's part of a DTensor; the same memory."""
    local = value._local_tensor  # noqa: SLF001 - to_local() would make a node of the autograd graph
    return local.wait() if hasattr(local, "trigger_wait") else local  # type: ignore[no-any-return]


_known: dict[Any, Placed] = {}
_MAX_KNOWN = 1 << 16


def placed(value: Any, *, everywhere: bool = False) -> Placed:
    """How a DTensor lies on the ranks of its mesh.

    Args:
        value: The DTensor.
        everywhere: Its mesh is a slice of a larger one, and it was declared to be the same on all slices.

    Raises:
        StateError: It has Partial placements, or its local tensor is not what they say.
    """
    mesh, shape = value.device_mesh, tuple(value.shape)
    # A mesh does not know its rank: a process that joins another group may have another one.
    key = (mesh, mesh.get_rank(), tuple(value.placements), shape, everywhere)
    found = _known.get(key)
    if found is None:
        if len(_known) >= _MAX_KNOWN:
            _known.clear()
        wide = _widened(mesh, key[2]) if everywhere else (mesh, key[2])
        found = _known[key] = _place(*wide, shape)
    local = local_of(value)
    if tuple(local.shape) != found.local and not (0 in found.local and local.numel() == 0):
        raise StateError(
            f"this rank's part of a DTensor has shape {tuple(local.shape)}, but {found.text} of "
            f"{shape} means {found.local}",
            hint="does another library shard this tensor in a way of its own?",
        )
    return found


def _widened(mesh: Any, placements: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """The mesh that this one is a slice of, and the placements on it: replicated in its other dimensions."""
    find = getattr(mesh, "_get_root_mesh", None)
    if find is None:
        from torch.distributed.device_mesh import _mesh_resources  # noqa: PLC0415 - gone in newer versions

        find = partial(_mesh_resources.get_root_mesh, mesh)
    root = find()
    names, all_names = mesh.mesh_dim_names or (), root.mesh_dim_names or ()
    if len(names) != len(placements) or not set(names) <= set(all_names):
        return mesh, placements
    by_name = dict(zip(names, placements, strict=True))
    if [name for name in all_names if name in by_name] != list(names):
        return mesh, placements
    from torch.distributed.tensor import Replicate  # noqa: PLC0415 - a DTensor has imported it

    return root, tuple(by_name.get(name, Replicate()) for name in all_names)


def _place(mesh: Any, placements: Sequence[Any], shape: tuple[int, ...]) -> Placed:
    splits: list[list[Split]] = [[] for _ in shape]
    coordinate = mesh.get_coordinate()
    same: list[Any] = []
    names = []
    for dim, placement in enumerate(placements):
        parts = mesh.size(dim)
        index = coordinate[dim] if coordinate is not None else 0
        shard_dim = getattr(placement, "dim", None)
        if placement.is_replicate():
            same.append(slice(None))
            names.append("Replicate()")
        elif shard_dim is not None and not placement.is_partial():
            factor = int(getattr(placement, "split_factor", 1))
            splits[shard_dim].append(Split(parts, index, factor))
            same.append(index)
            names.append(f"Shard({shard_dim})" if factor == 1 else f"Shard({shard_dim}, strided by {factor})")
        else:
            raise StateError(
                f"a DTensor has the placement {placement}: its values are not summed up yet",
                hint="redistribute it first: tensor.redistribute(placements=[Replicate()])",
            )
    ranks = tuple(sorted(mesh.mesh.flatten().tolist()))
    text = f"[{', '.join(names)}] on {'x'.join(map(str, mesh.mesh.shape))} ranks {ranges(ranks)}"
    if coordinate is None:
        return Placed(shape, (), (0,) * len(shape), (), ranks, text)
    pieces, local = pieces_of(shape, splits)
    copies = tuple(sorted(mesh.mesh[tuple(same)].flatten().tolist()))
    return Placed(shape, tuple(pieces), local, copies, ranks, text)


def ranges(ranks: Sequence[int]) -> str:
    """Ascending ranks as text: ``0-3, 8``."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and parts[-1][1] == rank - 1:
            parts[-1][1] = rank
        else:
            parts.append([rank, rank])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


class Replicated:
    """Which plain tensors were declared to be the same on all ranks.

    Args:
        declared: Patterns such as ``"model.*"`` (``*`` stands for any text, ``?`` for a character), or
            DistributedDataParallel modules, whose parameters and synchronised buffers are meant.
        world_size: How many ranks there are.
    """

    def __init__(self, declared: Iterable[Any], world_size: int) -> None:
        self._patterns = [item for item in declared if isinstance(item, str)]
        self._modules = [item for item in declared if not isinstance(item, str)]
        for module in self._modules:
            if type(module).__name__ != "DistributedDataParallel" or not callable(
                getattr(module, "parameters", None)
            ):
                raise ConfigError(
                    "replicated takes patterns and DistributedDataParallel modules, not "
                    f"{type(module).__name__}",
                    hint='name its keys: replicated=["model.*"]',
                )
        self.ranks = tuple(range(world_size))
        self.active = world_size > 1 and bool(self._patterns or self._modules)
        self._match = matcher(self._patterns)
        self._unused = set(self._patterns) if self.active else set()
        self._memory: set[int] = set()

    def begin(self) -> None:
        """Called before a state dict is walked: modules may have got new memory."""
        self._memory = {
            tensor.untyped_storage().data_ptr()
            for module in self._modules
            for tensor in (
                *module.parameters(),
                *(module.buffers() if getattr(module, "broadcast_buffers", True) else ()),
            )
        } - {0}

    def declares(self, tensor: torch.Tensor, path: Path) -> bool:
        """Whether a plain tensor is a replica, or a DTensor the same on all slices of the mesh."""
        if self._match(path_text(path)):
            return True
        return bool(self._memory) and tensor.untyped_storage().data_ptr() in self._memory

    def end(self, paths: Iterable[Path]) -> None:
        """Called after: warns of a pattern that fits nothing, once."""
        if not self._unused:
            return
        texts = [path_text(path) for path in paths]
        for pattern in sorted(self._unused):
            if not any(map(matcher([pattern]), texts)):
                logger.warning("replicated=[%r] fits no tensor of this state dict", pattern)
        self._unused = set()


@dataclass
class Member:
    """A tensor of a state dict that is part of a global one.

    Attributes:
        path: Where it is.
        number: Its number among the tensors.
        placed: How it lies on the ranks.
        requires_grad: Whether the global one requires a gradient.
    """

    path: Path
    number: int
    placed: Placed
    requires_grad: bool


def declared_whole(tensor: torch.Tensor, ranks: tuple[int, ...]) -> Placed:
    """How a plain tensor lies that all ranks hold."""
    return _declared_whole(tuple(tensor.shape), ranks)


@lru_cache(_MAX_KNOWN)
def _declared_whole(shape: tuple[int, ...], ranks: tuple[int, ...]) -> Placed:
    return Placed(shape, (whole(shape),) if 0 not in shape else (), shape, ranks, ranks, "replicated")


@dataclass
class Division:
    """Who saves what of the tensors that are parts of global ones; depends on structure alone.

    Attributes:
        columns: The columns for the index, without CRCs.
        encoded: The same as msgpack.
        agreement: Hash of what all ranks must agree on.
    """

    structure: list[Any]
    columns: Shards
    encoded: bytes
    agreement: str
    owned: list[tuple[int, Box | None]] = field(default_factory=list)
    checks: list[tuple[int, list[Box]]] = field(default_factory=list)

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
            members: What is part of a global tensor.
            tensors: The local tensors, by number.
            kinds: Their kinds.
            rank: This rank.
            world_size: How many ranks there are.
            known: That of an earlier save.
            node_of: Encodes a key that is no text.
        """
        first: dict[Any, int] = {}
        structure: list[Any] = []
        aliases = []
        for entry, member in enumerate(members):
            tensor = tensors[member.number]
            # A part without elements has no address: what shares it elsewhere shares its storage here.
            at: Any = tensor.data_ptr()
            if not tensor.numel():
                at = (tensor.untyped_storage()._cdata, tensor.storage_offset())  # noqa: SLF001
            memory = (at, tensor.shape, tensor.stride(), tensor.dtype, member.placed)
            alias = first.setdefault(memory, entry)
            aliases.append(alias)
            structure.append(
                (
                    *(member.path, tuple(map(type, member.path)), member.number, member.placed),
                    *(member.requires_grad, alias, tensor.dtype, kinds[member.number]),
                )
            )
        if known is not None and known.structure == structure:
            return known
        return _Divider(members, tensors, kinds, aliases, rank, world_size, node_of).divide(structure)

    def take(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Put what this rank saves in the place of each whole local tensor; returns those, as they were."""
        whole_ones = list(tensors)
        for number, box in self.owned:
            tensor = tensors[number]
            if box is None:
                tensors[number] = _nothing(tensor)
            else:
                tensors[number] = narrowed(tensor, box)
        return whole_ones

    def crcs(self, tensors: Sequence[torch.Tensor]) -> list[list[int]]:
        """For each entry the CRC-32 of every replica's share of it, from this rank's memory."""
        found: list[list[int]] = [[] for _ in self.columns.key]
        jobs = [(entry, box) for entry, boxes in self.checks for box in boxes]

        def work(job: tuple[int, Box]) -> int:
            entry, box = job
            return box_crc(tensors[self._numbers[entry]], box)

        large = sum(tensors[self._numbers[entry]].nbytes for entry, _ in self.checks) > _CRC_BYTES
        if large:
            with ThreadPoolExecutor(2, "milepost-replicas") as pool:
                results = list(pool.map(work, jobs))
        else:
            results = [work(job) for job in jobs]
        for (entry, _), crc in zip(jobs, results, strict=True):
            found[entry].append(crc)
        return found

    @property
    def _numbers(self) -> list[int]:
        return self.columns.tensor


def narrowed(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    """The view of a box of a tensor."""
    view = tensor.detach()
    for dim, (start, size) in enumerate(zip(box.start, box.size, strict=True)):
        if size != view.shape[dim]:
            view = view.narrow(dim, start, size)
    return view


def _nothing(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=tensor.dtype, device="cpu")


def box_crc(tensor: torch.Tensor, box: Box) -> int:
    """The CRC-32 of a box's bytes, row by row, whatever the strides."""
    view = narrowed(tensor, box).cpu().contiguous()
    size = view.nbytes
    return int(crc32(syscalls.memory_at(view.data_ptr(), size))) if size else 0


@dataclass
class _Divider:
    members: Sequence[Member]
    tensors: Sequence[torch.Tensor]
    kinds: Sequence[str]
    aliases: list[int]
    rank: int
    world_size: int
    node_of: Callable[[Any], Node]

    def divide(self, structure: list[Any]) -> Division:
        keys = [encode_key(member.path, self.node_of) for member in self.members]
        names = [msgspec.json.encode(key) for key in keys]
        shares = self._shares(names)
        columns = Shards(key=keys)
        owned: dict[int, Box | None] = {}
        checks = []
        for entry, member in enumerate(self.members):
            place, tensor = member.placed, self.tensors[member.number]
            boxes = shares.get(self.aliases[entry])
            mine = None
            shares_of = [box for box in boxes or () if box.volume]
            if boxes is not None:
                mine = boxes[place.copies.index(self.rank)]
            if self._is_of_part(member) and place.pieces:
                shares_of += [box for box in (mine or whole(tensor.shape).box,) if box.volume]
            if shares_of and self.aliases[entry] == entry:
                checks.append((entry, shares_of))
            pieces = list(place.pieces) if mine is None else _held(place.pieces, mine)
            if mine is not None and mine != whole(tensor.shape).box:
                owned[member.number] = mine if mine.volume and pieces else None
            columns.tensor.append(member.number)
            columns.dtype.append(DTYPE_NAMES[tensor.dtype])
            columns.kind.append(self.kinds[member.number])
            columns.shape.append(list(place.shape))
            columns.placement.append(self._text(member))
            columns.alias.append(self.aliases[entry])
            columns.copies.append(ranges(place.copies) if boxes is not None else "")
            columns.pieces.append(len(pieces))
            for piece in pieces:
                columns.start += piece.start
                columns.local += piece.local
                columns.size += piece.size
            if member.requires_grad:
                columns.requires_grad.append(entry)
        columns.crcs = [[] for _ in keys]
        return Division(
            structure,
            columns,
            msgspec.msgpack.encode(columns),
            self._agreement(names, columns),
            list(owned.items()),
            checks,
        )

    def _is_of_part(self, member: Member) -> bool:
        """Whether a tensor's mesh is a part of the job: other meshes may hold it too, and nobody knows which.

        Then each mesh saves it, with a checksum of what this rank saves behind those of the shares. Where
        several did, they are compared at the commit, and the first is kept.
        """
        return len(member.placed.ranks) < self.world_size

    def _text(self, member: Member) -> str:
        if self._is_of_part(member):
            return f"{member.placed.text.partition(' ranks ')[0]} ranks{ON_EACH_MESH}"
        return member.placed.text

    def _shares(self, names: list[bytes]) -> dict[int, list[Box]]:
        """For each tensor that several ranks hold alike the box that each of them saves."""
        groups: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for entry, member in enumerate(self.members):
            if len(member.placed.copies) > 1 and self.aliases[entry] == entry:
                # What other meshes may hold too must be divided alike on all of them: by itself.
                alone = entry if self._is_of_part(member) else -1
                groups.setdefault((member.placed.copies, alone), []).append(entry)
        shares: dict[int, list[Box]] = {}
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
        """The hash of every tensor that all ranks have a part in; empty if there is none."""
        rows = sorted(
            (
                *(names[entry], columns.dtype[entry], columns.shape[entry], columns.placement[entry]),
                names[self.aliases[entry]],
            )
            for entry, member in enumerate(self.members)
            if len(member.placed.ranks) == self.world_size
        )
        return hashlib.sha256(msgspec.json.encode(rows)).hexdigest() if rows and self.world_size > 1 else ""


def _held(pieces: Sequence[Piece], box: Box) -> list[Piece]:
    """What is left of the pieces of a local tensor when only a box of that is kept."""
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
