"""Values that are no native kind: a small pickle each, whose tensors are kept apart.

Such a pickle is read through torch's restricted unpickler alone (``weights_only``), which runs no code
but what torch and the user have allowed. Tensors inside it are numbered, and live in records of their own.
"""

from __future__ import annotations

import ctypes
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import _weights_only_unpickler as restricted

from milepost.errors import StateError
from milepost.format.limits import MAX_OBJECT_WORK
from milepost.format.pickle_scan import scan
from milepost.utils import is_dtensor

__all__ = ["pickle_object", "storage_from", "unpickle_object"]

Register = Callable[[torch.Tensor, Any], int]
"""Called with a tensor, and the object that stands for it if it is another one; returns its number."""


def pickle_object(value: Any, register: Register) -> bytes:
    """Pickle one object, with the data of its tensors left out as numbered storages.

    Raises:
        StateError: It holds a meta tensor or a DTensor.
        Exception: Whatever pickling it raises.
    """
    out = io.BytesIO()
    _Pickler(out, register).dump(value)
    return out.getvalue()


class _Pickler(pickle.Pickler):
    def __init__(self, out: io.BytesIO, register: Register) -> None:
        super().__init__(out, protocol=2)
        self._register = register

    def persistent_id(self, obj: Any) -> Any:
        """Storages, and the stand-ins that `reducer_override` makes, become numbers."""
        if isinstance(obj, _StorageOf):
            number = self._register(obj.tensor, None)
            kind: Any = torch.UntypedStorage
            return ("storage", kind, str(number), str(obj.tensor.device), obj.tensor.nbytes)
        if isinstance(obj, torch.storage.TypedStorage):
            typed: Any = obj
            kind = getattr(torch, typed._pickle_storage_type())  # noqa: SLF001 - as torch.save does
            untyped = obj._untyped_storage  # noqa: SLF001
        elif isinstance(obj, torch.UntypedStorage):
            kind, untyped = torch.UntypedStorage, obj
        else:
            return None
        data = torch.empty(0, dtype=torch.uint8, device=untyped.device).set_(untyped)
        return ("storage", kind, str(self._register(data, untyped)), str(untyped.device), len(obj))

    def reducer_override(self, obj: Any) -> Any:
        """Plain tensors are rebuilt over the numbered storage of their own elements."""
        if is_dtensor(obj):
            raise StateError(
                "a DTensor in an object that is not a dict or list would be saved as this rank's part of it",
                hint="put it into plain dicts and lists, or save its full_tensor()",
            )
        if (
            type(obj) is not torch.Tensor
            or obj.layout is not torch.strided
            or obj.is_quantized
            or obj.is_nested
        ):
            return NotImplemented
        if obj.is_meta:
            raise StateError("a meta tensor has no data to save")
        bits = {name: True for name, has in (("conj", obj.is_conj()), ("neg", obj.is_neg())) if has}
        arguments: tuple[Any, ...] = (
            _StorageOf(obj), 0, tuple(obj.shape), obj.stride(), obj.requires_grad, OrderedDict(), obj.dtype,
        )  # fmt: skip
        return (torch._utils._rebuild_tensor_v3, (*arguments, bits) if bits else arguments)  # noqa: SLF001


@dataclass
class _StorageOf:
    """Stands for the memory of one tensor, starting at its first element."""

    tensor: torch.Tensor


def _indices_of(tensor: torch.Tensor, name: str) -> Any:
    """Some indices of a sparse tensor, for numpy; those that share memory may be far too many to see."""
    found: torch.Tensor = getattr(tensor, name)()
    if found.numel() > MAX_OBJECT_WORK and found.untyped_storage().nbytes() < found.nbytes:
        raise ValueError("a sparse tensor has very many indices in the same memory")
    return found.cpu().numpy()


def _indices_fit(tensor: torch.Tensor) -> bool:
    """Whether a sparse tensor's indices lie in it; by numpy, as torch's threads hang in a forked process."""
    shape = np.array(tensor.shape)
    if tensor.layout is torch.sparse_coo:
        inner = _indices_of(tensor, "_indices")  # of tensors that are not coalesced, too
        return bool(((inner >= 0) & (inner < shape[: len(inner), None])).all())
    by_rows = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
    names = ("crow_indices", "col_indices") if by_rows else ("ccol_indices", "row_indices")
    ends, inner = (_indices_of(tensor, name) for name in names)
    batch, values = ends.ndim - 1, tensor.values().shape
    blocked = tensor.layout in (torch.sparse_bsr, torch.sparse_bsc)
    grid = shape[batch : batch + 2] // (values[batch + 1 : batch + 3] if blocked else 1)
    outer, within = grid if by_rows else grid[::-1]
    return bool(
        ends.shape == (*shape[:batch], outer + 1)
        and inner.shape == values[: batch + 1] == (*ends.shape[:-1], inner.shape[-1])
        and (ends[..., 0] == 0).all()
        and (ends[..., :-1] <= ends[..., 1:]).all()
        and (ends[..., -1] == inner.shape[-1]).all()
        and ((inner >= 0) & (inner < within)).all()
    )


def unpickle_object(data: bytes, storage_of: Callable[[int], torch.UntypedStorage]) -> Any:
    """Read one object through torch's restricted unpickler: no code in it runs, and `scan` has passed it.

    Sparse tensors are validated, whatever this version of torch does by itself: to use one whose indices
    are out of range may end the process.
    """
    scan(data)
    given: list[tuple[torch.UntypedStorage, int]] = []

    def persistent_load(identity: Any) -> Any:
        _, kind, key, _, _ = identity
        dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
        typed: Any = torch.storage.TypedStorage
        storage = storage_of(int(key))
        given.append((storage, storage.nbytes()))
        return typed(wrap_storage=storage, dtype=dtype, _internal=True)

    unpickler: Any = restricted.Unpickler(io.BytesIO(data), encoding="utf-8")
    unpickler.persistent_load = persistent_load
    utils: Any = torch._utils  # noqa: SLF001 - where torch.load notes what it has to validate
    pending: list[torch.Tensor] = utils._sparse_tensors_to_validate  # noqa: SLF001
    try:
        value = unpickler.load()
        if not all(tensor.is_meta or _indices_fit(tensor) for tensor in pending):
            raise ValueError("the indices of a sparse tensor reach beyond it")
    finally:
        pending.clear()
    if any(storage.nbytes() != size for storage, size in given):  # torch enlarges what is too small
        raise ValueError("a tensor in it reaches beyond its storage")
    return value


def storage_from(tensor: torch.Tensor) -> torch.UntypedStorage:
    """A storage that starts at the tensor's first element, over the same memory where that can be."""
    start = int(tensor.storage_offset()) * tensor.element_size()
    storage = tensor.untyped_storage()
    if start == 0 or not tensor.is_cpu:
        return storage
    data = torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage)[start:]
    memory: Any = (ctypes.c_char * len(data)).from_address(data.data_ptr())
    memory.keep = data  # frombuffer keeps `memory`
    return torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
