"""Which part of a global tensor each rank holds.

Placement and declaration decide, never the values. The mesh and placements of a DTensor say what its ranks
hold. A plain tensor belongs to this rank alone, unless it was declared to be a replica.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from math import prod
from typing import Any

import torch

from milepost.errors import ConfigError, StateError
from milepost.format.boxes import Box, Piece, Split, pieces_of, whole
from milepost.format.paths import Path, matcher, path_text

__all__ = ["Placed", "Replicated", "declared_whole", "local_of", "narrowed", "placed", "ranges"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Placed:
    """Which part of a tensor each rank holds. Equal placements are one object while they are cached.

    Attributes:
        shape: The global shape.
        pieces: The pieces that this rank holds.
        local: The shape of the local tensor that holds them.
        copies: All ranks that hold the same pieces, this one included, ascending.
        ranks: All ranks that hold a piece, ascending.
        text: The same as text, for messages and for comparison between ranks.
    """

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    local: tuple[int, ...]
    copies: tuple[int, ...]
    ranks: tuple[int, ...]
    text: str


def local_of(value: Any) -> torch.Tensor:
    """The plain tensor that holds this rank's part of a DTensor. They share memory."""
    local = value._local_tensor  # noqa: SLF001 - to_local() would make a node of the autograd graph
    return local.wait() if hasattr(local, "trigger_wait") else local  # type: ignore[no-any-return]


_known: dict[Any, tuple[Placed, ...]] = {}
_MAX_KNOWN = 1 << 16


def placed(value: Any, *, everywhere: bool = False) -> Placed:
    """Which part of a DTensor each rank of its mesh holds.

    Args:
        value: The DTensor.
        everywhere: The mesh is a slice of a larger one, and all slices hold the same (as declared).

    Raises:
        StateError: It has Partial placements, or its local tensor has not the shape that they give.
    """
    mesh, shape = value.device_mesh, tuple(value.shape)
    # The rank is part of the key: a process that joins another group may have another rank in an equal mesh.
    key = (mesh, mesh.get_rank(), tuple(value.placements), shape, everywhere)
    ways = _known.get(key)
    if ways is None:
        if len(_known) >= _MAX_KNOWN:
            _known.clear()
        wide = _widened(mesh, key[2]) if everywhere else (mesh, key[2])
        ways = _known[key] = _ways(*wide, shape)
    local = local_of(value)
    for found in ways:
        if tuple(local.shape) == found.local or not (found.pieces or local.numel()):
            return found
    means = " or ".join(str(way.local) for way in ways)
    raise StateError(
        f"this rank's part of a DTensor has shape {tuple(local.shape)}, but {ways[0].text} of "
        f"{shape} means {means}",
        hint="does another library shard this tensor in a way of its own?",
    )


def _widened(mesh: Any, placements: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """The mesh of which this one is a slice, and the placements on it: replicated in other dimensions."""
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


def _ways(mesh: Any, placements: Sequence[Any], shape: tuple[int, ...]) -> tuple[Placed, ...]:
    """The placements that these can mean. The caller chooses by the local shape.

    A strided shard says that the dimension was divided over a later mesh dimension first. If it does not
    divide evenly, torch's ``_StridedShard`` and FSDP2 on top of tensor parallelism cut at different rows.
    """
    torchs = _place(mesh, placements, shape)
    if not any(getattr(placement, "split_factor", 1) > 1 for placement in placements):
        return (torchs,)
    fsdps = _place(mesh, placements, shape, inner_first=True)
    if set(torchs.pieces) == set(fsdps.pieces):
        return (torchs,)
    if torchs.local == fsdps.local:
        raise StateError(
            f"it cannot be told which rows this rank holds of {torchs.text} of {shape}",
            hint="pad the dimension to a multiple of the ranks that divide it, or use another mesh",
        )
    return (torchs, fsdps)


def _inner_first(splits: list[Split]) -> list[Split]:
    """The splits of a dimension as FSDP2 applies them: the strided split, which comes first, is last."""
    strided, plain = splits[:1], splits[1:]
    room = prod(split.parts for split in plain)
    if room == 1 or any(s.factor != room for s in strided) or any(s.factor != 1 for s in plain):
        return splits
    return [*plain, *(Split(split.parts, split.index) for split in strided)]


def _place(
    mesh: Any, placements: Sequence[Any], shape: tuple[int, ...], *, inner_first: bool = False
) -> Placed:
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
            if coordinate is not None and mesh.get_local_rank(dim) != index:
                raise StateError(
                    f"a DTensor is on a mesh whose ranks do not ascend ({mesh.mesh.tolist()}): its rows may "
                    "be ordered by the place in the mesh or by the rank in the group",
                    hint="make the mesh with ascending ranks in each dimension that divides a tensor",
                )
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
    pieces, local = pieces_of(shape, [_inner_first(dims) for dims in splits] if inner_first else splits)
    copies = tuple(sorted(mesh.mesh[tuple(same)].flatten().tolist()))
    return Placed(shape, tuple(pieces), local, copies, ranks, text)


@lru_cache(256)
def ranges(ranks: tuple[int, ...]) -> str:
    """Ascending ranks as text: ``0-3,8``."""
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
        declared: Patterns such as ``"model.*"`` (``*`` stands for any text, ``?`` for a character), and
            DistributedDataParallel modules, which stand for their parameters. (Their buffers differ after a
            forward pass.)
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
        """Note the memory of the modules, before a state dict is walked."""
        self._memory = {
            tensor.untyped_storage().data_ptr() for module in self._modules for tensor in module.parameters()
        } - {0}

    def declares(self, tensor: torch.Tensor, path: Path) -> bool:
        """Whether a plain tensor is declared a replica, or a DTensor to be the same on all slices."""
        if self._match(path_text(path)):
            return True
        return bool(self._memory) and tensor.untyped_storage().data_ptr() in self._memory

    def end(self, paths: Iterable[Path]) -> None:
        """After the walk: warn once of patterns that match no tensor."""
        if not self._unused:
            return
        texts = [path_text(path) for path in paths]
        for pattern in sorted(self._unused):
            if not any(map(matcher([pattern]), texts)):
                logger.warning("replicated=[%r] fits no tensor of this state dict", pattern)
        self._unused = set()


def declared_whole(tensor: torch.Tensor, ranks: tuple[int, ...]) -> Placed:
    """The placement of a plain tensor that all ranks hold."""
    return _declared_whole(tuple(tensor.shape), ranks)


@lru_cache(_MAX_KNOWN)
def _declared_whole(shape: tuple[int, ...], ranks: tuple[int, ...]) -> Placed:
    return Placed(shape, (whole(shape),) if 0 not in shape else (), shape, ranks, ranks, "replicated")


def narrowed(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    """A view of a box of a tensor."""
    view = tensor.detach()
    for dim, (start, size) in enumerate(zip(box.start, box.size, strict=True)):
        if size != view.shape[dim]:
            view = view.narrow(dim, start, size)
    return view
