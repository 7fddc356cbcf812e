"""State dicts put together again: the values of an index over memory that holds its records."""

from __future__ import annotations

import ast
import io
import pickle
import warnings
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from milepost.errors import CorruptCheckpointError
from milepost.format.index import Tensors
from milepost.format.limits import numpy_size
from milepost.format.shards import dtype_bytes
from milepost.format.tree import Node, TreeDecoder
from milepost.state.objects import storage_from, unpickle_object

__all__ = [
    "NATIVE_LEAVES",
    "TensorBuilder",
    "device_of",
    "dtype_name",
    "dtype_of",
    "finished",
    "first_line",
    "numpy_dtype",
    "tensor_over",
]


@cache
def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in an index; empty if this torch cannot save tensors of it, which it is asked."""
    name = str(dtype).removeprefix("torch.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of dtypes that it calls experimental
            torch.save(torch.empty(0, dtype=dtype, device="cpu"), io.BytesIO())
    except Exception:  # noqa: BLE001 - KeyError, RuntimeError and others, by dtype
        return ""
    return name if dtype_bytes(name) == dtype.itemsize else ""


def dtype_of(name: str) -> torch.dtype:
    """The dtype of this name; `CorruptCheckpointError` if this torch has none.

    The name comes from a file, and ``getattr(torch, name)`` would import a module of that name.
    """
    dtype = vars(torch).get(name)
    if not isinstance(dtype, torch.dtype):
        raise CorruptCheckpointError(
            f"the checkpoint holds the dtype {name[:80]!r}, which torch {torch.__version__} lacks",
            hint="load it with a newer torch",
        )
    return dtype


def finished(tensor: torch.Tensor, kind: str, requires_grad: bool) -> Any:  # noqa: FBT001 - a column
    """What was saved as this kind, over a tensor that holds its values."""
    if kind == "ndarray":
        return tensor.numpy()
    if kind == "parameter":
        return torch.nn.Parameter(tensor, requires_grad=requires_grad)
    return tensor.requires_grad_() if requires_grad else tensor


def tensor_over(
    storage: torch.UntypedStorage,
    byte_offset: int,
    dtype: torch.dtype,
    shape: Sequence[int],
    stride: Sequence[int],
    bits: tuple[bool, bool],
) -> torch.Tensor:
    """A tensor over the memory of a storage; `bits` say whether it is conjugate, and negative.

    Raises:
        CorruptCheckpointError: torch cannot make such a tensor.
    """
    tensor = torch.empty(0, dtype=dtype, device=storage.device)
    try:
        tensor.set_(storage, byte_offset // dtype.itemsize, shape, stride)
    except (RuntimeError, ValueError, TypeError) as error:
        raise CorruptCheckpointError(
            f"torch cannot make a tensor of shape {str(shape)[:80]}: {first_line(error)}"
        ) from error
    if any(bits):
        set_metadata: Any = torch._utils.set_tensor_metadata  # noqa: SLF001 - as torch.load does
        set_metadata(tensor, {name: True for name, on in zip(("conj", "neg"), bits, strict=True) if on})
    return tensor


class TensorBuilder:
    """Builds the values of an index over storages that hold its records.

    Args:
        tensors: The columns of a checked index.
        storage_of: The storage that holds a record's bytes, on the device where it is to be.
        bytes_of: The bytes of a record that is no tensor.
        path_of: The path of a node in the index's tree, for messages.
        beyond: Makes the values whose numbers are beyond the columns: tensors that several ranks hold.
    """

    def __init__(
        self,
        tensors: Tensors,
        storage_of: Callable[[int], torch.UntypedStorage],
        bytes_of: Callable[[int], bytes],
        path_of: Callable[[Node], str | None] = lambda _: None,
        beyond: Callable[[int], Any] | None = None,
    ) -> None:
        self._tensors = tensors
        self._storage_of = storage_of
        self._bytes_of = bytes_of
        self._beyond = beyond
        self._built: dict[int, Any] = {}
        self._gradients = set(tensors.requires_grad)
        self._conjugates = set(tensors.conj)
        self._negatives = set(tensors.neg)
        this = weakref.proxy(self)  # no cycle: what was built goes when the last reference goes

        def located(leaf: Callable[[Node], Any]) -> Callable[[Node], Any]:
            def decode(node: Node) -> Any:
                try:
                    return leaf(node)
                except CorruptCheckpointError as error:
                    error.located(key=path_of(node) or None)
                    raise

            return decode

        leaves: dict[str, Callable[[Node], Any]] = {
            **NATIVE_LEAVES,
            "tensor": lambda node: this.value(node[1]),
            "array": lambda node: this._array(node),  # noqa: PLW0108, SLF001 - a bound method is a cycle
            "blob": lambda node: bytes_of(node[1]),
            "object": lambda node: this._object(node),  # noqa: PLW0108, SLF001 - as above
        }
        self._decoder = TreeDecoder({tag: located(leaf) for tag, leaf in leaves.items()})

    def decode(self, node: Node) -> Any:
        """The value of a node; a tensor that occurs twice is one object, as it was when saved."""
        return self._decoder.decode(node)

    def value(self, number: int) -> Any:
        """The tensor, parameter or array of this number."""
        if number not in self._built:
            if self._beyond is not None and number >= len(self._tensors.record):
                self._built[number] = self._beyond(number)
            else:
                self._built[number] = self._build(number)
        return self._built[number]

    def forget(self) -> None:
        """Let go of what was built: nothing but its users keeps it alive from now on."""
        self._built.clear()

    def tensor(self, number: int) -> torch.Tensor:
        """The plain tensor of this number, over its record's storage, without gradient."""
        columns = self._tensors
        return tensor_over(
            self._storage_of(columns.record[number]),
            columns.byte_offset[number],
            dtype_of(columns.dtype[number]),
            columns.shape[number],
            columns.stride[number],
            (number in self._conjugates, number in self._negatives),
        )

    def _build(self, number: int) -> Any:
        return finished(self.tensor(number), self._tensors.kind[number], number in self._gradients)

    def _array(self, node: Node) -> Any:
        dtype, data, shape = numpy_dtype(node[2]), self._bytes_of(node[1]), node[3]
        try:
            return np.frombuffer(bytearray(data), dtype).reshape(shape) if data else np.zeros(shape, dtype)
        except ValueError as error:
            raise CorruptCheckpointError(
                f"numpy cannot make an array of shape {str(shape)[:80]} and dtype {str(dtype)[:80]}: {error}"
            ) from error

    def _object(self, node: Node) -> Any:
        def storage(number: int) -> torch.UntypedStorage:
            if not 0 <= number < len(self._tensors.record):
                raise ValueError(f"there is no tensor {number}")
            return storage_from(self.tensor(number))

        try:
            return unpickle_object(self._bytes_of(node[1]), storage)
        except Exception as error:
            raise CorruptCheckpointError(
                f"an object of type {node[2]} could not be read: {first_line(error)}",
                hint=f"if it is a type of yours, allow it: torch.serialization.add_safe_globals([{node[2]}])"
                if isinstance(error, pickle.UnpicklingError)
                else None,
            ) from error


def first_line(error: Exception) -> str:
    """What an error says, without a trace of C++ and without what a file made it repeat."""
    return (str(error) or type(error).__name__).splitlines()[0][:500]


def device_of(name: str) -> torch.device:
    """The device of this name; `CorruptCheckpointError` if this torch has none."""
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise CorruptCheckpointError(f"unknown device {name[:80]!r}") from error


def numpy_dtype(descr: str) -> np.dtype[Any]:
    """The numpy dtype of a text in an index; `CorruptCheckpointError` if there is none."""
    try:
        size = numpy_size(descr)  # before numpy or ast see the text
        parsed: Any = ast.literal_eval(descr) if descr.startswith("[") else descr
        dtype: np.dtype[Any] = np.lib.format.descr_to_dtype(parsed)
    except (ValueError, TypeError) as error:
        raise CorruptCheckpointError(f"unknown numpy dtype {descr[:80]!r}") from error
    if dtype.itemsize != size:
        raise CorruptCheckpointError(
            f"numpy dtype {descr[:80]!r} has {dtype.itemsize} bytes here, not {size}"
        )
    return dtype


def _numpy_scalar(node: Node) -> Any:
    dtype, data = numpy_dtype(node[1]), bytes.fromhex(node[2])
    try:
        return np.frombuffer(data, dtype)[0] if data else np.zeros((), dtype)[()]
    except SystemError as error:  # so numpy says that a character of a text is beyond Unicode
        raise CorruptCheckpointError(
            f"numpy cannot make a value of dtype {node[1][:80]!r}: {error}"
        ) from error


NATIVE_LEAVES: dict[str, Callable[[Node], Any]] = {
    "size": lambda node: torch.Size(node[1]),
    "dtype": lambda node: dtype_of(node[1]),
    "device": lambda node: device_of(node[1]),
    "scalar": _numpy_scalar,
}
