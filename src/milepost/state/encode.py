"""State dicts on torch's side, taken apart into a tree, tensors and memory.

`StateEncoder.take_apart` walks a state dict, finds which bytes of memory its tensors reach, and plans the
file. It keeps structure between calls: dtypes, shapes, strides and how the tensors share memory. It reads
all of these from the tensors again in each call. It never keeps values.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch

from milepost.errors import CorruptCheckpointError, StateError, UnsupportedTypeError
from milepost.format.index import Tensors
from milepost.format.limits import is_array
from milepost.format.paths import Path, path_text
from milepost.format.shards import ARRAY_DTYPES
from milepost.format.snapshot import Plan, Shares, Snapshot
from milepost.format.tree import Node, TreeDecoder, TreeEncoder, UnencodableError
from milepost.state.accelerator import copy_bytes
from milepost.state.decode import NATIVE_LEAVES, dtype_name, numpy_dtype
from milepost.state.memory import check_memory, partition, refuse_meta
from milepost.state.objects import pickle_object, storage_from, unpickle_object
from milepost.state.placements import Placed, Replicated, declared_whole, local_of, placed
from milepost.state.shares import STAGED_SHARE, Division, Member, is_share_array
from milepost.types import RankInfo
from milepost.utils import is_dtensor

__all__ = ["Parts", "StateEncoder"]

BLOB_BYTES = 64 * 1024
"""Longer ``bytes`` are kept out of the index, in a record of their own."""

_KEPT_PLANS = 4
_Partition = tuple[list[int], list[int], list[int]]
"""For each tensor its record and where it starts in that; for each record its length."""

_memmove = ctypes.memmove

_NUMPY_KINDS = set(map(np.dtype, ARRAY_DTYPES))

_CONVERT = "convert it to plain values and tensors, such as vars(value), dict(value) or int(value)"
_CONVERSIONS = (
    ("state_dict", "value.state_dict()"),
    ("_asdict", "value._asdict()"),
    ("isoformat", "value.isoformat()"),
    ("__members__", "value.value"),
    ("__fspath__", "str(value)"),
    ("keys", "dict(value)"),
    ("isdisjoint", "set(value)"),
    ("__getitem__", "list(value)"),
)
"""What to save in place of a value whose class has a method."""


class _Plan(Plan):
    """A plan, with the description of the structure that it holds for."""

    def __init__(
        self, tensors: Tensors, partition: _Partition, firsts: list[tuple[int, int]], structure: list[Any]
    ) -> None:
        super().__init__(tensors, partition[2])
        self.partition = partition
        self.structure = structure
        self.memory: list[int] = []
        self.firsts = firsts


@dataclass
class _Walk:
    """What one walk over a state dict collects."""

    tensors: list[torch.Tensor] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)
    numbers: dict[tuple[int, int], int] = field(default_factory=dict)
    kept: list[Any] = field(default_factory=list)
    objects: list[bytes] = field(default_factory=list)
    object_nodes: list[list[Any]] = field(default_factory=list)
    object_values: list[Any] = field(default_factory=list)
    members: list[Member] = field(default_factory=list)
    wholes: list[torch.Tensor] = field(default_factory=list)

    def add(
        self, tensor: torch.Tensor, kind: str, path: Path, owner: Any = None, place: Placed | None = None
    ) -> int:
        """The number of a tensor; the same object gets the same number each time.

        As a member of a global tensor it has another one for each way to lie on the ranks, as only a part
        of it may be saved.
        """
        identity = (id(tensor if owner is None else owner), id(place))
        number = self.numbers.get(identity)
        if number is None:
            number = self.numbers[identity] = len(self.tensors)
            self.tensors.append(tensor)
            self.kinds.append(kind)
            self.paths.append(path)
            self.kept.append(owner)
        return number

    def value(self, number: int) -> Any:
        """What was found: the tensor or, for a numpy array, the array."""
        return self.tensors[number] if self.kept[number] is None else self.kept[number]

    def add_object(self, value: Any, tag: str, data: bytes, *rest: Any) -> Node:
        """A node for a record that is no tensor; its number is known once all tensors are."""
        self.object_values.append(value)
        node = [tag, len(self.objects), *rest]
        self.objects.append(data)
        self.object_nodes.append(node)
        return node


@dataclass
class Parts:
    """A state dict taken apart, with the very objects that it held.

    Attributes:
        snapshot: All that a save writes of it, except the tensors' bytes.
        walk: The tensors and objects that its tree refers to.
        plan: The snapshot's plan, as the encoder keeps it.
        division: Who saves what of the tensors that are parts of global ones; None without such.
    """

    snapshot: Snapshot
    walk: _Walk
    plan: _Plan
    division: Division | None = None

    @property
    def tree(self) -> Node:
        """The tree of the state."""
        return self.snapshot.tree

    @property
    def sources(self) -> list[torch.Tensor]:
        """The tensors of the state, all of them whole."""
        return self.walk.tensors if self.division is None else self.walk.wholes

    def crcs(self) -> list[list[int]]:
        """The CRCs of replicas for the snapshot's shares, computed from the tensors as they are now."""
        return [] if self.division is None else self.division.crcs(self.walk.wholes)

    def decode(self, node: Node) -> Any:
        """The value of a node of `tree`: the tensors and objects are those that were taken apart."""
        return self._decoder(self.walk.value, self.walk.object_values.__getitem__).decode(node)

    def rebuild(self, value: Callable[[int], Any]) -> Any:
        """The whole state again, with other tensors and arrays: ``value(number)``; nothing is shared."""
        objects = self.snapshot.objects

        def copied(number: int) -> Any:
            original = self.walk.object_values[number]
            if isinstance(original, bytes):
                return original
            if isinstance(original, np.ndarray):
                shape, kind = (
                    original.shape,
                    original.dtype,
                )  # its values are those of when it was taken apart
                data = bytearray(objects[number])
                return np.frombuffer(data, kind).reshape(shape) if data else np.zeros(shape, kind)
            return unpickle_object(objects[number], lambda inner: storage_from(value(inner)))

        return self._decoder(value, copied).decode(self.snapshot.tree)

    def copier(self) -> Callable[[int, int, int, int], None]:
        """A function that copies a piece of a record: ``copy(record, position, bytes, address)``.

        It keeps the tensors alive.
        """
        tensors, plan = self.walk.tensors, self.plan
        sources = [plan.memory[number] + position for number, position in plan.firsts]
        devices = {
            record: tensors[number]
            for record, (number, _) in enumerate(plan.firsts)
            if not tensors[number].is_cpu
        }
        if not devices:

            def copy(record: int, position: int, size: int, address: int, _keep: object = tensors) -> None:
                _memmove(address, sources[record] + position, size)

            return copy
        starts = {
            record: plan.firsts[record][1] + int(tensor.storage_offset()) * tensor.element_size()
            for record, tensor in devices.items()
        }

        def copy_from_device(record: int, position: int, size: int, address: int) -> None:
            if record in devices:
                copy_bytes(devices[record], starts[record] + position, size, address)
            else:
                _memmove(address, sources[record] + position, size)

        return copy_from_device

    def _decoder(self, value: Callable[[int], Any], of_object: Callable[[int], Any]) -> TreeDecoder:
        first = len(self.plan.layout.lengths)
        return TreeDecoder(
            {
                **NATIVE_LEAVES,
                "tensor": lambda node: value(node[1]),
                **dict.fromkeys(("array", "blob", "object"), lambda node: of_object(node[1] - first)),
            }
        )


class StateEncoder:
    """Takes state dicts apart. One instance serves one stream of saves; it is not thread-safe.

    Args:
        rank_info: Which rank this is, of how many.
        replicated: What was declared to be the same on all ranks; see `Replicated`.
    """

    def __init__(self, rank_info: RankInfo | None = None, replicated: Iterable[Any] = ()) -> None:
        self._rank_info = rank_info or RankInfo(0, 1)
        self._replicated = Replicated(replicated, self._rank_info.global_world_size)
        self._division: Division | None = None
        self._plans: list[_Plan] = []
        self._walk = _Walk()
        self._encoder = TreeEncoder(
            self._leaf,
            {
                bytes: self._bytes,
                torch.Size: lambda value: ("size", list(value)),
                torch.dtype: lambda value: ("dtype", str(value).removeprefix("torch.")),
                torch.device: lambda value: ("device", str(value)),
            },
        )
        self._bytes_node = TreeEncoder(self._leaf)

    def take_apart(self, state_dict: Any) -> Parts:
        """Take a state dict apart. The tensors' memory is not read yet; all other values are.

        Raises:
            UnsupportedTypeError: A key or value has a type that could not be read back.
            StateError: It is nested too deep, or holds meta tensors. Nothing has been changed.
        """
        if not isinstance(state_dict, dict):
            kind = type(state_dict)
            raise UnsupportedTypeError(
                f"a state dict must be a dict, not {kind.__module__}.{kind.__qualname__}",
                hint='wrap it: {"state": ...}',
            )
        walk = self._walk = _Walk()
        if self._replicated.active:
            self._replicated.begin()
        try:
            tree = self._encoder.encode(state_dict)
        except UnencodableError as error:
            raise UnsupportedTypeError(
                str(error), key=path_text(error.path) or None, hint=error.hint
            ) from None
        finally:
            self._walk = _Walk()
        self._replicated.end(member.path for member in walk.members)
        division = self._divide(walk) if walk.members else None
        plan = self._plan(walk)
        for node in walk.object_nodes:
            node[1] += len(plan.layout.lengths)
        shares = None if division is None else Shares(division.encoded, division.agreement)
        return Parts(Snapshot(tree, plan, walk.objects, shares), walk, plan, division)

    # -- leaves ------------------------------------------------------------------------------------

    def _bytes(self, value: bytes) -> Node:
        if len(value) > BLOB_BYTES:
            return self._walk.add_object(value, "blob", value)
        return self._bytes_node.encode(value)

    def _leaf(self, value: Any, path: Path) -> Node:
        kind = type(value)
        if kind is torch.Tensor or kind is torch.nn.Parameter:
            # Every property that is asked for costs 2 ms a save of 20,000 tensors: quantised tensors show
            # by their dtype, and meta tensors are refused when their structure is planned.
            if value.layout is torch.strided and dtype_name(value.dtype) and not value.is_nested:
                if value.__dict__ and STAGED_SHARE in value.__dict__:
                    raise _share_error(path)
                name = "tensor" if kind is torch.Tensor else "parameter"
                if self._replicated.active and self._replicated.declares(value, path):
                    return self._member(value, name, path)
                return ("tensor", self._walk.add(value, name, path))
        elif is_dtensor(value):
            return self._dtensor(value, path)
        elif isinstance(value, np.generic) and kind.__module__ == "numpy":
            data = value.tobytes()[: value.dtype.itemsize]  # numpy adds a byte to an empty text
            return ("scalar", _descr(value.dtype, path), data.hex())
        elif kind is np.ndarray:
            return self._array(value, path)
        return self._object(value, path)

    def _dtensor(self, value: Any, path: Path) -> Node:
        """A DTensor: this rank's part of it."""
        local = local_of(value)
        if (
            local.layout is not torch.strided
            or not dtype_name(local.dtype)
            or type(local) is not torch.Tensor
        ):
            raise UnencodableError(
                f"a DTensor of {type(local).__qualname__}, {local.dtype}, {local.layout}, cannot be saved",
                path,
            )
        walk = self._walk
        try:
            place = placed(value)
            everywhere = len(place.ranks) == self._rank_info.global_world_size
            if self._replicated.active and not everywhere and self._replicated.declares(local, path):
                place = placed(value, everywhere=True)
        except StateError as error:
            raise error.located(key=path_text(path)) from None
        kind = "parameter" if getattr(value, "_is_param", False) else "tensor"
        number = walk.add(_resolved(local), kind, path, owner=value, place=place)
        walk.members.append(Member(path, number, place, value.requires_grad))
        return ("tensor", number)

    def _member(self, value: torch.Tensor, kind: str, path: Path, owner: Any = None) -> Node:
        """A plain tensor that was declared to be a replica."""
        place = declared_whole(value, self._replicated.ranks)
        number = self._walk.add(
            _resolved(value), kind, path, owner=value if owner is None else owner, place=place
        )
        self._walk.members.append(Member(path, number, place, value.requires_grad))
        return ("tensor", number)

    def _divide(self, walk: _Walk) -> Division:
        """Settle who saves what, and keep of each tensor only what this rank does."""
        rank, size = self._rank_info.global_rank, self._rank_info.global_world_size
        division = self._division = Division.of(
            walk.members, walk.tensors, walk.kinds, rank, size, self._division, self._encoder.encode
        )
        walk.wholes = division.take(walk.tensors)
        return division

    def _array(self, value: np.ndarray[Any, Any], path: Path) -> Node:
        if is_share_array(value):
            raise _share_error(path)
        if value.dtype in _NUMPY_KINDS and value.dtype.isnative:
            declared = self._replicated.active and self._replicated.declares(_NO_TENSOR, path)
            known = None if declared else self._walk.numbers.get((id(value), id(None)))
            if known is not None:
                return ("tensor", known)
            strided = all(step >= 0 and step % value.itemsize == 0 for step in value.strides)
            shared = value if strided and value.flags.writeable else value.copy()
            if declared:
                return self._member(torch.from_numpy(shared), "ndarray", path, owner=value)
            return ("tensor", self._walk.add(torch.from_numpy(shared), "ndarray", path, owner=value))
        if value.dtype.hasobject:
            raise UnencodableError(
                f"a numpy array of dtype {value.dtype} holds Python objects; convert it to a list", path
            )
        descr, data, shape = _descr(value.dtype, path), value.tobytes(), list(value.shape)
        if not is_array(descr, shape, len(data)):
            raise UnencodableError(
                f"a numpy array of shape {shape} and dtype {descr[:80]} cannot be read", path
            )
        return self._walk.add_object(value, "array", data, descr, shape)

    def _object(self, value: Any, path: Path) -> Node:
        kind = type(value)
        name = f"{kind.__module__}.{kind.__qualname__}"
        walk = self._walk
        try:
            data = pickle_object(value, lambda tensor, owner: self._inner(tensor, owner, path))
            back = unpickle_object(data, lambda number: storage_from(walk.tensors[number]))
            if type(back) is not kind:
                raise TypeError(f"it would come back as a {type(back).__qualname__}")
        except StateError as error:
            raise error.located(key=path_text(path)) from None
        except Exception as error:
            # torch's own reason is advice, and it helps for few types.
            is_advice = isinstance(error, UnpicklingError)
            reason = "" if is_advice else f": {(str(error) or type(error).__name__).splitlines()[0]}"
            hint = next((f"save {way}" for name, way in _CONVERSIONS if hasattr(kind, name)), _CONVERT)
            raise UnencodableError(
                f"a value has type {name}, which could not be read back safely{reason}", path, hint
            ) from error
        return walk.add_object(value, "object", data, name)

    def _inner(self, tensor: torch.Tensor, owner: Any, path: Path) -> int:
        if not dtype_name(tensor.dtype):
            raise TypeError(f"torch cannot save tensors of {tensor.dtype}")
        return self._walk.add(tensor, "tensor", path, owner)

    # -- planning ----------------------------------------------------------------------------------

    def _plan(self, walk: _Walk) -> _Plan:
        """The plan for these tensors: a kept one if the structure is the same, else a new one."""
        tensors = walk.tensors
        structure: list[Any] = [
            (t.dtype, t.shape, t.stride(), t.device, t.requires_grad, t.is_conj(), t.is_neg(), kind)
            for t, kind in zip(tensors, walk.kinds, strict=True)
        ]
        pointers = list(map(torch.Tensor.data_ptr, tensors))
        offsets: list[int] = list(map(torch.Tensor.storage_offset, tensors))  # type: ignore[arg-type]
        sizes = [t.untyped_storage().nbytes() for t in tensors]
        memory = [*pointers, *offsets, *sizes]
        parted = None
        for position, plan in enumerate(self._plans):
            if plan.structure != structure:
                continue
            if plan.memory != memory:
                if parted is None:
                    check_memory(tensors, walk.paths, offsets, sizes)
                    parted, firsts = partition(tensors, pointers, offsets)
                if parted != plan.partition:
                    continue
                plan.memory, plan.firsts = memory, firsts
            self._plans.insert(0, self._plans.pop(position))
            return plan
        if parted is None:
            refuse_meta(tensors, walk.paths)
            check_memory(tensors, walk.paths, offsets, sizes)
            parted, firsts = partition(tensors, pointers, offsets)
        plan = _Plan(_columns(walk, parted), parted, firsts, structure)
        plan.memory = memory
        self._plans = [plan, *self._plans[: _KEPT_PLANS - 1]]
        return plan


def _columns(walk: _Walk, parted: _Partition) -> Tensors:
    tensors = walk.tensors
    return Tensors(
        record=parted[0],
        byte_offset=parted[1],
        dtype=[dtype_name(t.dtype) for t in tensors],
        shape=[list(t.shape) for t in tensors],
        stride=[list(t.stride()) for t in tensors],
        kind=list(walk.kinds),
        device=[str(t.device) for t in tensors],
        requires_grad=[n for n, t in enumerate(tensors) if t.requires_grad],
        conj=[n for n, t in enumerate(tensors) if t.is_conj()],
        neg=[n for n, t in enumerate(tensors) if t.is_neg()],
    )


def _share_error(path: Path) -> StateError:
    return StateError(
        "this was staged as one rank's part of a global tensor, and the state dict was changed since",
        key=path_text(path),
        hint="give the staged state dict to the checkpoint process as it is",
    )


_NO_TENSOR = torch.empty(0)


def _resolved(tensor: torch.Tensor) -> torch.Tensor:
    """With its conjugate and negative bits carried out: a part of a global tensor has none."""
    if tensor.is_conj() or tensor.is_neg():
        return tensor.detach().resolve_conj().resolve_neg()
    return tensor


def _descr(dtype: np.dtype[Any], path: Path) -> str:
    """A numpy dtype as text: its ``str``, or for structured ones the repr of its description."""
    if dtype.hasobject:
        raise UnencodableError(f"a numpy value of dtype {dtype} holds Python objects", path)
    try:
        described: object = np.lib.format.dtype_to_descr(dtype)
        descr = described if isinstance(described, str) else repr(described)
        same = numpy_dtype(descr) == dtype
    except (ValueError, CorruptCheckpointError):
        same = False
    if not same:
        raise UnencodableError(f"a numpy value of dtype {str(dtype)[:80]} could not be read back", path)
    return descr
