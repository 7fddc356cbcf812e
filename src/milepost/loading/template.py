"""Compares a template, which is a state dict of the caller, with a saved tree.

`match` finds everything that does not fit, and changes nothing. Its result is a plan: a `Fill` for each
tensor that is read into the template, and a `Put` for each other value that replaces one of the template.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch

from milepost.errors import CorruptCheckpointError, StateError
from milepost.format.boxes import Piece, whole
from milepost.format.index import Tensors
from milepost.format.paths import Item, Path, path_text
from milepost.format.tree import HOLE, Node, children
from milepost.loading.renames import Names, nodes_by_path
from milepost.state.decode import dtype_of
from milepost.state.memory import end_of, reach
from milepost.state.placements import local_of, placed
from milepost.utils import is_dtensor

__all__ = ["Fill", "Match", "Put", "copy_into", "match"]

_META = (
    "a meta tensor in the template (first call model.to_empty(device=...); or load without a template, then "
    "model.load_state_dict(..., assign=True))"
)
_WRITEABLE = "a numpy array that can be written to"
_LISTS = {"list": list, "tuple": tuple}
_NUMBERS = {"int", "float", "bool", "none", "scalar"}
_NUMBER_TYPES = (numbers.Number, np.generic)
_EXACT: dict[str, type] = {
    "complex": complex,
    "str": str,
    "bytes": bytes,
    "blob": bytes,
    "set": set,
    "size": torch.Size,
    "dtype": torch.dtype,
    "device": torch.device,
}


@dataclass(slots=True)
class Fill:
    """A tensor of the template, and the number of the saved tensor that is read into it.

    If the target is a rank's part of a DTensor, `pieces` name the parts of the saved one, and their places.
    """

    target: torch.Tensor
    number: int
    pieces: tuple[Piece, ...] | None = None

    def parts(self) -> tuple[Piece, ...]:
        """The pieces of the saved tensor that are read: all of it, unless `pieces` say otherwise."""
        return (whole(self.target.shape),) if self.pieces is None else self.pieces


class Put(NamedTuple):
    """A value that goes into a container of the template: ``container[key] = value``."""

    container: Any
    key: Any
    value: Any


_KEEP = object()
"""Instead of a new value: the container keeps the value that it has."""


@dataclass
class Match:
    """How a template and a saved tree fit together.

    Attributes:
        fills: The tensors to fill.
        puts: The values to put into containers, in this order.
        missing: Topmost paths of the template that were not saved.
        unexpected: Topmost saved paths that the template lacks.
        sections: Those of them that are a whole part of the saved state: top-level values but tensors.
        misfits: One sentence for each value that does not fit; with any, nothing may be written.
        allowed: Topmost paths that were not saved, and that need not have been.
        renamed: The saved path and the template's, for each value that was renamed.
        unused: Renames that fit nothing, as text.
    """

    fills: list[Fill] = field(default_factory=list)
    puts: list[Put] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    sections: set[str] = field(default_factory=set)
    misfits: list[str] = field(default_factory=list)
    allowed: list[str] = field(default_factory=list)
    renamed: list[tuple[str, str]] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def finish(self) -> None:
        """Put all values in place, after the tensors were filled, and tell autograd that these changed."""
        torch.autograd.graph.increment_version([fill.target for fill in self.fills])
        for container, key, value in self.puts:
            container[key] = value


def match(
    template: Any,
    node: Node,
    tensors: Tensors,
    decode: Callable[[Node], Any],
    names: Names | None = None,
    foreign: Container[int] = (),
    folds: Callable[[Fill], bool] = lambda _: False,
) -> Match:
    """Compare a template with a saved tree; neither is changed.

    Args:
        template: The state dict to load into. Only its keys are loaded; None stands for any value.
        node: The saved tree.
        tensors: The tensors that it refers to.
        decode: Makes the values that are new to the template, and objects.
        names: The paths that were renamed since the save, and those that need not have been saved.
        foreign: Identities of nodes that the template need not have.
        folds: Whether a target whose elements share memory can hold its saved values. It is asked where
            strides cannot tell.
    """
    return _Matcher(tensors, decode, names or Names(), foreign, folds).run(template, node)


class _Matcher:
    """Walks a template and a saved tree together.

    The methods for values return the value that the container is to hold, or _KEEP.
    """

    def __init__(
        self,
        tensors: Tensors,
        decode: Callable[[Node], Any],
        names: Names,
        foreign: Container[int],
        folds: Callable[[Fill], bool],
    ) -> None:
        self._foreign, self._folds = foreign, folds
        self._tensors = tensors
        self._decode = decode
        self._names = names
        self._match = Match()
        self._saved: dict[str, Node] = {}
        self._moved: set[Path] = set()
        self._unexpected: list[tuple[Path, Node]] = []

    def run(self, template: Any, node: Node) -> Match:
        if self._names.renames:
            self._saved = nodes_by_path(node)
        self._value(template, node, ())
        self._match.unexpected = self._names.left_over(self._unexpected, self._match.renamed)
        tops = ((path, node) for path, node in self._unexpected if len(path) == 1)
        self._match.sections = {path_text(path) for path, node in tops if node[0] != "tensor"}
        self._match.unused = self._names.unused()
        return self._match

    def _misfit(self, path: Path, expected: str, found: str) -> Any:
        self._match.misfits.append(
            f"{path_text(path) or 'the state dict'}: expected {expected}, found {found}"
        )
        return _KEEP

    def _value(self, target: Any, node: Node, path: Path) -> Any:
        tag = node[0]
        if node is HOLE:
            return _KEEP
        if target is None:
            return self._decode(node)
        if tag == "tensor":
            return self._tensor(target, node[1], path)
        if tag in ("dict", "ordered", "default"):
            if isinstance(target, dict):
                return self._dict(target, node, path)
        elif tag in _LISTS:
            kind: Any = _LISTS[tag]
            if type(target) is kind or (type(target) is tuple and node[-1] is HOLE):
                return self._list(target, node, path)
        elif tag == "object":
            return self._object(target, node, path)
        elif tag == "array" and type(target) is np.ndarray:
            return self._raw_array(target, node, path)
        elif type(target) is _EXACT.get(tag) or (tag in _NUMBERS and isinstance(target, _NUMBER_TYPES)):
            return self._decode(node)  # now, as damage would be found too late when targets are written
        return self._misfit(path, _kind(target), _tag_text(node))

    def _dict(self, target: dict[Any, Any], node: Node, path: Path) -> Any:
        saved = {
            key[1] if key[0] == "str" and key[1] is not None else self._decode(key): value
            for key, value in node[1]
        }
        if len(saved) != len(node[1]):
            raise CorruptCheckpointError(f"a dict of the tree has equal keys: {path_text(path)}")
        for key, value in target.items():
            where = (*path, key)
            new = self._value(value, self._node(value, saved.get(key, HOLE), where), where)
            if new is not _KEEP:
                self._match.puts.append(Put(target, key, new))
        self._unexpected += [
            ((*path, key), value)
            for key, value in saved.items()
            if key not in target and id(value) not in self._foreign
        ]
        return _KEEP

    def _node(self, value: Any, node: Node, path: Path) -> Node:
        """The node of a value in a container; HOLE, which is reported, if it was not saved."""
        if self._names.renames:
            node = self._renamed(value, node, path)
        if node is HOLE:
            lacks = self._match.allowed if self._names.may_lack(value, path) else self._match.missing
            lacks.append(path_text(path))
        return node

    def _renamed(self, value: Any, node: Node, path: Path) -> Node:
        """The node of a value that may have had another name when it was saved."""
        new = path_text(path)
        old = self._names.old_name(new, self._saved)
        if old is not None:
            self._match.renamed.append((old, new))
            self._moved.add(path)
            return self._saved[old]
        if node is HOLE and any(path[:depth] in self._moved for depth in range(1, len(path))):
            node = self._saved.get(new, HOLE)
        if node is HOLE and self._names.reach_into(value, path, self._saved):
            # Everything below it has other names.
            node = ("dict", []) if isinstance(value, dict) else ("list", [], HOLE)
        return node

    def _list(self, target: Any, node: Node, path: Path) -> Any:
        saved = node[1]
        if node[-1] is HOLE or (
            len(target) > len(saved) and self._names.reach_into(target, path, self._saved)
        ):
            saved = [*saved, *[HOLE] * (len(target) - len(saved))]
        if len(target) != len(saved):
            if _holds_tensor(target) or _names_tensor(node):
                return self._misfit(path, f"{len(target)} items", f"{len(saved)} items")
            return self._decode(node)
        items = list(target)
        for position, (value, child) in enumerate(zip(target, saved, strict=True)):
            where = (*path, Item(position))
            new = self._value(value, self._node(value, child, where), where)
            if new is not _KEEP:
                items[position] = new
                if isinstance(target, list):
                    self._match.puts.append(Put(target, position, new))
        return tuple(items) if isinstance(target, tuple) else _KEEP

    def _tensor(self, target: Any, number: int, path: Path) -> Any:
        columns = self._tensors
        if columns.kind[number] == "ndarray":
            if type(target) is not np.ndarray:
                return self._misfit(path, _kind(target), "a numpy array")
            if not target.flags.writeable:
                return self._misfit(path, _WRITEABLE, "a read-only one in the template")
            try:
                destination = torch.from_numpy(target)
            except (TypeError, ValueError):
                layout = "" if target.dtype.isnative else " in foreign byte order"
                if any(step < 0 or step % target.itemsize for step in target.strides):
                    layout = f" with strides {target.strides}"
                return self._misfit(
                    path, f"a numpy array of dtype {target.dtype}{layout}", columns.dtype[number]
                )
        elif is_dtensor(target):
            return self._dtensor(target, number, path)
        elif isinstance(target, torch.Tensor):
            destination = target.detach() if target.requires_grad else target
        else:
            return self._misfit(path, _kind(target), "a tensor")
        dtype, shape = dtype_of(columns.dtype[number]), columns.shape[number]
        if not destination.is_cpu and destination.is_meta:
            return self._misfit(path, "a tensor with memory to fill", _META)
        if destination.layout is not torch.strided:
            return self._misfit(path, f"a dense tensor to fill, not {_kind(target)}", "a dense tensor")
        if not self._takes(destination.dtype, dtype) or list(destination.shape) != shape:
            return self._misfit(
                path,
                f"{destination.dtype} of shape {tuple(destination.shape)}",
                f"{dtype} of shape {tuple(shape)}",
            )
        if _lacks_memory(destination):
            return self._misfit(path, f"a tensor with memory to fill, not {_kind(target)}", "a dense tensor")
        fill, steps = Fill(destination, number), columns.stride[number]
        if _overlaps(destination) and not _same_steps(destination, steps) and not self._folds(fill):
            return self._folded(path, destination, f"strides {tuple(steps)}")
        self._match.fills.append(fill)
        return _KEEP

    def _dtensor(self, target: Any, number: int, path: Path) -> Any:
        """This rank's part of a DTensor: it is filled with those parts of the saved tensor."""
        dtype, shape = dtype_of(self._tensors.dtype[number]), self._tensors.shape[number]
        if not self._takes(target.dtype, dtype) or list(target.shape) != shape:
            return self._misfit(
                path,
                f"a DTensor of {target.dtype} of shape {tuple(target.shape)}",
                f"{dtype} of shape {tuple(shape)}",
            )
        try:
            pieces = placed(target).pieces
        except StateError as error:
            return self._misfit(path, f"a DTensor that can be filled: {error.message}", "a tensor")
        local = local_of(target).detach()
        if local.is_meta:
            return self._misfit(path, "a tensor with memory to fill", _META)
        if local.layout is not torch.strided or _lacks_memory(local):
            return self._misfit(path, f"a dense tensor to fill, not {_kind(local)}", "a dense tensor")
        fill = Fill(local, number, pieces)
        if _overlaps(local) and not self._folds(fill):
            return self._folded(path, local, "a tensor whose parts do not agree there")
        self._match.fills.append(fill)
        return _KEEP

    def _takes(self, wanted: torch.dtype, saved: torch.dtype) -> bool:
        return wanted == saved or (self._names.cast and _converts(saved, wanted))

    def _folded(self, path: Path, target: torch.Tensor, found: str) -> Any:
        return self._misfit(path, f"elements that share memory (strides {tuple(target.stride())})", found)

    def _raw_array(self, target: Any, node: Node, path: Path) -> Any:
        value = self._decode(node)
        if (target.dtype, target.shape) != (value.dtype, value.shape):
            return self._misfit(
                path,
                f"a numpy array of dtype {target.dtype}, shape {target.shape}",
                f"dtype {value.dtype}, shape {value.shape}",
            )
        if not target.flags.writeable:
            return self._misfit(path, _WRITEABLE, "a read-only one in the template")
        self._match.puts.append(Put(target, ..., value))
        return _KEEP

    def _object(self, target: Any, node: Node, path: Path) -> Any:
        value = self._decode(node)
        fits = type(value) is type(target)
        if fits and isinstance(value, torch.Tensor):
            fits = _outline(value) == _outline(target)
        return value if fits else self._misfit(path, _kind(target), _kind(value))


@cache
def _converts(saved: torch.dtype, wanted: torch.dtype) -> bool:
    """Whether torch can copy values of one dtype into the other without dropping their imaginary parts."""
    if saved.is_complex and not wanted.is_complex:
        return False
    try:
        torch.zeros(1, dtype=wanted, device="cpu").copy_(torch.zeros(1, dtype=saved, device="cpu"))
    except RuntimeError:  # torch has no such copy, or cannot even make such a tensor
        return False
    return True


def _lacks_memory(tensor: torch.Tensor) -> bool:
    """Whether a tensor's elements are not where it says: it was freed, or stands for other tensors."""
    try:
        start, size = tensor.data_ptr(), tensor.untyped_storage().nbytes()
    except (RuntimeError, NotImplementedError):  # as of wrapper subclasses
        return True
    end = end_of(tensor, int(tensor.storage_offset()))
    return end > (size if start else 0)


def _outline(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What two tensors that are objects must have in common (a nested tensor has no shape)."""
    shape = [part.shape for part in tensor.unbind()] if tensor.is_nested else tensor.shape
    return (tensor.dtype, tensor.layout, tensor.is_nested, tensor.is_quantized, shape)


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        shape = "nested" if value.is_nested else tuple(value.shape)
        return f"a {value.layout} tensor of {value.dtype}, shape {shape}"
    kind = type(value)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return f"a value of type {name}"


def _tag_text(node: Node) -> str:
    names = {"ordered": "an OrderedDict", "default": "a defaultdict", "none": "None", "blob": "bytes"}
    return names.get(node[0], f"a value of type {node[0]}")


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_tensor, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_holds_tensor, value))
    return isinstance(value, torch.Tensor | np.ndarray)


def _names_tensor(node: Node) -> bool:
    return node[0] in ("tensor", "array", "object") or any(
        _names_tensor(child) for _, child in children(node)
    )


# -- geometry --------------------------------------------------------------------------------------


def _overlaps(tensor: torch.Tensor) -> bool:
    """Whether two elements may lie at the same place (never False for a tensor where they do)."""
    if tensor.is_contiguous():
        return False
    return tensor.numel() > 0 and _overlap(zip(tensor.stride(), tensor.shape, strict=True))


def _overlap(steps: Iterable[tuple[int, int]]) -> bool:
    reach = 1
    for step, n in sorted(steps):
        if n > 1:
            if step < reach:
                return True
            reach += (n - 1) * step
    return False


def _same_steps(tensor: torch.Tensor, stride: list[int]) -> bool:
    """Whether elements that are one in `tensor` are one in a saved tensor of these strides, too."""
    steps = [(a, b, n) for a, b, n in zip(tensor.stride(), stride, tensor.shape, strict=True) if n > 1]
    apart = [(a, b, n) for a, b, n in steps if a or b]  # what both expand takes no part
    return all(a == b for a, b, _ in apart) or not _overlap([(a, n) for a, _, n in apart])


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def copy_into(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy between tensors of one shape; dtypes are converted.

    Elements of the source must agree where elements of the target share memory.
    """
    with torch.inference_mode() if target.is_inference() else torch.no_grad():
        for dim, (n, step) in enumerate(zip(target.shape, target.stride(), strict=True)):
            if step == 0 and n > 1:
                target, source = target.narrow(dim, 0, 1), source.narrow(dim, 0, 1)
        if not _overlaps(target):
            target.copy_(source)
            return
        source = source.to(target.dtype)
        places = torch.zeros(1, dtype=torch.int64, device="cpu")
        for n, step in zip(target.shape, target.stride(), strict=True):
            places = (places[:, None] + torch.arange(n, device="cpu") * step).reshape(-1)
        if not (target.is_complex() or target.is_neg() or source.is_neg()):
            integers = _INTEGERS[target.element_size()]  # torch cannot index every dtype
            target, source = target.view(integers), source.view(integers)
        flat = target.as_strided((reach(target),), (1,))
        flat[places.to(target.device)] = source.to(target.device).reshape(-1)
