"""The values that an index describes, for people: one line each, with path, type and size."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any

import msgspec

from milepost.format.global_tree import with_global_columns, with_shards
from milepost.format.index import Index
from milepost.format.shards import ShardMap, Shards, dtype_bytes
from milepost.format.tree import Node, TreeDecoder, children, scalar_value

__all__ = ["Line", "outline", "outline_sharded", "plain_value", "text_of"]

_CONTAINERS = {
    "dict": "dict",
    "ordered": "OrderedDict",
    "default": "defaultdict",
    "list": "list",
    "tuple": "tuple",
    "set": "set",
}
_PLAIN = {"none", "bool", "int", "float", "complex", "str", "bytes", "size", "dtype", "device", "scalar"}


def _numpy_scalar(node: Node) -> str:
    value = scalar_value(node)
    return f"numpy({node[1]}, 0x{node[2]})" if isinstance(value, bytes) else str(value)


class _Literal:
    """Shows as its text: for values that plain Python has no literal for."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


_decoder = TreeDecoder(
    {
        "size": lambda node: _Literal(f"torch.Size({list(node[1])})"),
        "dtype": lambda node: _Literal(f"torch.{node[1]}"),
        "device": lambda node: _Literal(f"device({node[1]!r})"),
        "scalar": lambda node: _Literal(_numpy_scalar(node)),
    }
)


def plain_value(node: Node) -> Any:
    """The value of a node without tensors, arrays and objects; what is torch's or numpy's becomes text."""
    return _decoder.decode(node)


def text_of(value: Any) -> str:
    """A value as Python writes it; integers that it refuses to write in decimal in hexadecimal."""
    try:
        return repr(value)
    except ValueError:
        return hex(value) if isinstance(value, int) else f"a {type(value).__name__} of very large integers"


@dataclass(slots=True)
class Line:
    """One value of a state dict.

    Attributes:
        label: Its own key, or its position in brackets.
        depth: How many containers it is in.
        above: The line of the container that it is in, None for the root.
        kind: "dict", "tensor", "parameter", "array", "object", "int" and so on.
        text: A tensor's dtype and shape, a container's number of entries, a plain value itself.
        size_bytes: Bytes of the elements, in a container of all that is in it.
        record: Number of the record that holds the bytes, -1 if none does.
        start: First byte of the value in its record.
        end: One more than the last.
        left_out: How many values in it have no line.
        facts: Further facts about it, for machines.
    """

    kind: str
    label: str = ""
    text: str = ""
    depth: int = 0
    above: Line | None = None
    size_bytes: int = 0
    record: int = -1
    start: int = 0
    end: int = 0
    left_out: int = 0
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """The whole path, as in ``model.layers[0].weight``; long keys are cut."""
        labels, line = [], self
        while line.above is not None:
            label = line.label if len(line.label) <= _LONGEST else f"{line.label[:_LONGEST]}…"
            labels.append(label if label.startswith("[") else f".{label}")
            line = line.above
        return "".join(reversed(labels)).removeprefix(".")


_LONGEST = 1000

MOST_LINES = 1 << 17
"""How many values are described by default."""

MOST_PLAIN = 1000
"""How many plain values of one container are described."""


def outline(index: Index, most: float = MOST_LINES) -> list[Line]:
    """The lines of an index, containers before what they hold, in the order of the state dict.

    Args:
        index: What to describe.
        most: How many values get a line, the root always. What has none is counted in ``left_out`` of the
            container that it is in, and in its size.
    """
    lines: list[Line] = []
    stack: list[tuple[Any, Node, int]] = [("", index.tree, -1)]
    while stack:
        step, node, parent = stack.pop()
        line = _line(index, node)
        if parent >= 0 and len(lines) >= most:
            lines[parent].left_out += 1
            lines[parent].size_bytes += line.size_bytes
            here = parent
        else:
            here = len(lines)
            if parent >= 0:
                line.above, line.depth = lines[parent], lines[parent].depth + 1
                line.label = _label(step)
            lines.append(line)
        if node[0] in _CONTAINERS:
            stack.extend(reversed(_children(node, here, lines[here])))
    for line in reversed(lines):
        if line.above is not None:
            line.above.size_bytes += line.size_bytes
    return lines


def outline_sharded(index: Index, shards: ShardMap) -> tuple[Index, list[Line]]:
    """As `outline`, with the global tensors as whole ones.

    Args:
        index: A rank's index.
        shards: The checkpoint's shard map.

    Returns:
        The index with the global tensors behind its own, and its lines.
    """
    own = set(index.shards.tensor) if isinstance(index.shards, Shards) else set()
    tree, _ = with_shards(index.tree, shards.key, len(index.tensors.record), own)
    columns = with_global_columns(index.tensors, shards)
    index = msgspec.structs.replace(index, tree=tree, tensors=columns)
    lines = outline(index)
    for line in lines:
        if line.kind in ("tensor", "parameter", "ndarray") and line.record < 0:
            number = -1 - line.record  # see with_global_columns
            table, dims = shards.where(number), len(shards.shape[number])
            count = len(table.rank)
            line.text += f", {shards.placement[number]}, {count} shard{'s' if count != 1 else ''}"
            line.facts["placement"] = shards.placement[number]
            line.facts["shards"] = [
                {
                    "rank": rank,
                    "start": table.start[n * dims : (n + 1) * dims],
                    "size": table.size[n * dims : (n + 1) * dims],
                }
                for n, rank in enumerate(table.rank)
            ]
    return index, lines


def _children(node: Node, number: int, line: Line) -> list[tuple[Any, Node, int]]:
    """What a container holds, with the steps to it; most plain values are only counted."""
    kept, plain = [], 0
    for step, child in children(node):
        if child[0] in _PLAIN:
            plain += 1
            if plain > MOST_PLAIN:
                line.left_out += 1
                continue
        kept.append((step, child, number))
    return kept


def _label(step: Any) -> str:
    """The label of a value: its position in brackets, or its key."""
    if isinstance(step, int):
        return f"[{step}]"
    key = plain_value(step)
    return key if isinstance(key, str) else text_of(key)


def _line(index: Index, node: Node) -> Line:
    tag = node[0]
    line = Line(tag)
    if tag in _CONTAINERS:
        line.kind = _CONTAINERS[tag]
        line.text = f"{len(node[1]):,} {'entry' if len(node[1]) == 1 else 'entries'}"
        line.facts = {"entries": len(node[1])}
    elif tag == "tensor":
        _describe_tensor(index, node[1], line)
    elif tag in ("array", "blob", "object"):
        line.record = node[1]
        line.size_bytes = line.end = index.records.length[node[1]]
        if tag == "array":
            line.text = f"numpy {node[2]} {list(node[3])}"
            line.facts = {"dtype": node[2], "shape": list(node[3])}
        elif tag == "blob":
            line.kind, line.text = "bytes", ""
        else:
            line.text = node[2]
            line.facts = {"class": node[2]}
    else:
        value = plain_value(node)
        line.text = text_of(value)
        line.facts = {"value": value}
    return line


def _describe_tensor(index: Index, number: int, line: Line) -> None:
    tensors = index.tensors
    dtype, shape = tensors.dtype[number], tensors.shape[number]
    line.kind = tensors.kind[number]
    line.record = tensors.record[number]
    if line.record >= 0:
        line.start = tensors.byte_offset[number]
        steps = zip(shape, tensors.stride[number], strict=True)
        line.end = line.start + dtype_bytes(dtype) * (1 + sum((length - 1) * step for length, step in steps))
    line.size_bytes = prod(shape) * dtype_bytes(dtype)
    line.text = f"{dtype} {list(shape)}"
    line.facts = {"dtype": dtype, "shape": list(shape), "device": tensors.device[number]}
