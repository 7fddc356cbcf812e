"""Checks the nodes of a tree, whose meaning `tree` describes. Torch-free.

A load checks each tree that it reads with `check_tree`. A save checks the nodes that it makes with
`check_node`, which `check_tree` uses as well.
"""

from __future__ import annotations

import base64
import reprlib
import struct
from collections.abc import Callable, Collection, Sequence
from typing import Any

from milepost.format.limits import (
    MAX_DEPTH,
    MAX_NAME,
    crowded,
    is_array,
    is_device,
    is_dtype,
    is_hex,
    is_int,
    numpy_size,
)
from milepost.format.paths import Item, path_text

__all__ = ["DECODERS", "FACTORIES", "Node", "check_node", "check_tree", "place_of"]

Node = Any
"""A node as in `tree`: a tuple or list."""

FACTORIES = ("int", "float", "bool", "complex", "str", "bytes", "list", "tuple", "dict", "set")
"""The built-ins that a defaultdict's factory may be."""


def _decode_float(node: Node) -> float:
    if isinstance(node[1], str):
        number: float = struct.unpack(">d", bytes.fromhex(node[1]))[0]
        return number
    return float(node[1])


def _decode_str(node: Node) -> str:
    if node[1] is None:
        return bytes.fromhex(node[2]).decode("utf-8", "surrogatepass")
    text: str = node[1]
    return text


DECODERS: dict[str, Callable[[Node], Any]] = {
    "none": lambda _: None,
    "bool": lambda node: node[1],
    "int": lambda node: int(node[1], 16) if isinstance(node[1], str) else node[1],
    "float": _decode_float,
    "complex": lambda node: complex(_decode_float(node[1]), _decode_float(node[2])),
    "str": _decode_str,
    "bytes": lambda node: base64.b64decode(node[1]),
}
"""The value of each kind of node that Python has, containers aside."""

_KEY_TAGS = {*DECODERS, "tuple", "dtype", "device", "size", "scalar"}


def check_tree(root: Node, *, tensors: int = 0, records: Sequence[int] = ()) -> None:
    """Check a tree from outside: after it returns, `TreeDecoder` meets no malformed node.

    Args:
        root: The root.
        tensors: How many tensors the index has.
        records: Bytes of each record of the index.

    Raises:
        ValueError: The tree is malformed, is beyond one of the limits, has equal keys in one dictionary, or
            refers to a tensor or record that is not there. The message says where.
    """
    check = _TreeCheck(tensors, records)
    check.stack.append((root, 0, False))
    node = root
    try:
        while check.stack:
            node, depth, key = check.stack.pop()
            check_node(node, key=key)
            inner = check.inner.get(node[0])
            if depth > MAX_DEPTH + (node[0] not in _CONTAINERS):
                raise ValueError(f"the tree is nested more than {MAX_DEPTH} deep")
            if inner is not None:
                inner(node, depth, key)
    except ValueError as error:
        place = place_of(root, node)
        raise ValueError(f"{error} (at {place})" if place else str(error)) from None


_CONTAINERS = ("list", "tuple", "set", "dict", "ordered", "default")


class _TreeCheck:
    """Checks what well-formed nodes hold and refer to: one method for each kind of node in `inner`.

    Attributes:
        stack: Nodes yet to check, each with its depth, and whether it is a key or in one.
        inner: The method for each tag; other nodes hold nothing.
    """

    def __init__(self, tensors: int, records: Sequence[int]) -> None:
        self.stack: list[tuple[Node, int, bool]] = []
        self.inner: dict[str, Callable[[Node, int, bool], None]] = {
            **dict.fromkeys(("list", "tuple"), self._items),
            "set": self._set,
            **dict.fromkeys(("dict", "ordered", "default"), self._entries),
            "tensor": self._tensor,
            **dict.fromkeys(("array", "blob", "object"), self._record),
        }
        self._tensors, self._records = tensors, records
        self._named: set[int] = set()

    def _items(self, node: Node, depth: int, key: bool) -> None:  # noqa: FBT001 - one of a row
        for child in node[1]:
            if not _is_fine(child):
                self.stack.append((child, depth + 1, key))

    def _set(self, node: Node, depth: int, _: bool) -> None:  # noqa: FBT001 - as above
        self._items(node, depth, key=True)
        _check_keys(node, (), [_frozen(child, depth) for child in node[1]])

    def _entries(self, node: Node, depth: int, _: bool) -> None:  # noqa: FBT001 - as above
        """Check the keys of a dictionary; values, and keys other than plain text, go onto the stack."""
        texts, others = set(), []
        for pair in node[1]:
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise ValueError("an entry of a dictionary is no pair")
            key_node, child = pair
            if _is_plain_text(key_node):
                texts.add(key_node[1])
            else:
                self.stack.append((key_node, depth + 1, True))
                others.append(_frozen(key_node, depth))
            if not _is_fine(child):
                self.stack.append((child, depth + 1, False))
        _check_keys(node, texts, others)
        if node[0] == "ordered" and node[2] is not None:
            if not _has_text_keys(node[2]):
                raise ValueError("the attributes of an OrderedDict are no dictionary of names")
            self.stack.append((node[2], depth + 1, False))

    def _tensor(self, node: Node, *_: object) -> None:
        if not 0 <= node[1] < self._tensors:
            raise ValueError(f"the tree refers to tensor {node[1]} of {self._tensors}")

    def _record(self, node: Node, *_: object) -> None:
        tag, record = node[0], node[1]
        if not 0 <= record < len(self._records):
            raise ValueError(f"the tree refers to {tag} {record} of {len(self._records)}")
        if record in self._named:  # each would be one more copy in memory
            raise ValueError(f"record {record} is that of two values")
        self._named.add(record)
        length = self._records[record]
        if tag == "array" and not is_array(node[2], node[3], length):
            raise ValueError(f"a numpy array is not what its record of {length} bytes is: {_excerpt(node)}")


def check_node(node: Node, *, key: bool = False) -> None:
    """Check one node, without the nodes in it.

    Args:
        node: The node.
        key: Whether it is a key of a dict or an item of a set, or in one.

    Raises:
        ValueError: It is malformed, or may not be a key. The message says what is wrong.
    """
    if not isinstance(node, list | tuple) or not node or not isinstance(node[0], str):
        raise ValueError(f"a node of the tree is malformed: {_excerpt(node)}")
    tag = node[0]
    check = _CHECKS.get(tag)
    if check is None:
        raise ValueError(f"unknown kind of value {tag[:40]!r} in the tree")
    if not check(node):
        raise ValueError(f"a {tag} node of the tree is malformed: {_excerpt(node)}")
    # A structure of numpy has no hash.
    if key and (tag not in _KEY_TAGS or (tag == "scalar" and node[1][1:2] in ("V", "(", "]"))):
        raise ValueError(f"a dictionary key of kind {tag!r}")


def _is_fine(node: Node) -> bool:
    """Whether a node is a plain value, well-formed: nearly all are, so this is the fast way past them."""
    if type(node) is not list or not node or type(node[0]) is not str or node[0] not in DECODERS:
        return False
    return _CHECKS[node[0]](node)


def _check_keys(node: Node, texts: Collection[str], others: list[Any]) -> None:
    """Refuse keys that come twice, and those that would make a hash table slow."""
    if crowded(others):
        raise ValueError(f"a {node[0]} of the tree has too many keys of one hash")
    if len(texts) + len(set(others)) != len(node[1]):
        raise ValueError(f"a {node[0]} of the tree has the same key twice")


def place_of(root: Node, wanted: Node) -> str:
    """The path of a node in a tree that may be malformed elsewhere, cut to a readable length."""
    stack: list[tuple[Node, Any]] = [(root, None)]
    while stack:
        node, trail = stack.pop()
        if node is wanted:
            steps: list[Any] = []
            while trail is not None and len(steps) < _SHOWN_STEPS:
                trail, step = trail
                text = isinstance(step, list | tuple) and len(step) > 1 and isinstance(step[1], str)
                steps.insert(0, step if type(step) is Item else (step[1] if text else _excerpt(step))[:80])
            return path_text(tuple(steps))
        if isinstance(node, list | tuple) and len(node) > 1 and isinstance(node[1], list | tuple):
            pairs = node[0] in ("dict", "ordered", "default")
            for position, child in enumerate(node[1]):
                if not pairs:
                    stack.append((child, (trail, Item(position))))
                elif isinstance(child, list | tuple) and len(child) == 2:
                    stack += [(child[0], (trail, child[0])), (child[1], (trail, child[0]))]
    return ""


_SHOWN_STEPS = 20


def _excerpt(node: Node) -> str:
    """The beginning of what may be huge."""
    return reprlib.repr(node)[:120]


def _is_plain_text(node: Node) -> bool:
    """Whether a node is ["str", text]: nearly every key is, so this is the fast way past them."""
    return type(node) is list and len(node) == 2 and node[0] == "str" and type(node[1]) is str


def _has_text_keys(node: Node) -> bool:
    """Whether a node is a dict whose keys, as far as they are well-formed, are text."""
    if not isinstance(node, list | tuple) or len(node) != 2 or node[0] != "dict" or not _has_items(node):
        return False
    return all(isinstance(pair, list | tuple) and pair and _is_name(pair[0]) for pair in node[1])


def _is_name(node: Node) -> bool:
    return isinstance(node, list | tuple) and len(node) >= 2 and node[0] == "str"


def _frozen(node: Node, depth: int) -> Any:
    """A hashable stand-in for a key node; equal for nodes whose values are equal as keys."""
    if depth > MAX_DEPTH + 1:
        raise ValueError(f"the tree is nested more than {MAX_DEPTH} deep")
    if isinstance(node, dict):
        raise ValueError(f"a node of the tree is malformed: {_excerpt(node)}")  # noqa: TRY004 - bad content
    if not isinstance(node, list | tuple):
        return node
    if node and node[0] in ("bool", "int", "float", "complex") and _CHECKS[node[0]](node):
        return DECODERS[node[0]](node)
    if len(node) == 2 and node[0] == "tuple" and isinstance(node[1], list | tuple):
        return tuple([_frozen(part, depth + 1) for part in node[1]])  # of the hash of the tuple itself
    return ("", *[_frozen(part, depth + 1) for part in node])


def _is_hex_int(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    digits = value.removeprefix("-").removeprefix("0x")
    return (
        value.removeprefix("-").startswith("0x") and digits != "" and set(digits) <= set("0123456789abcdef")
    )


def _is_float(node: Any) -> bool:
    if not isinstance(node, list | tuple) or len(node) != 2 or node[0] != "float":
        return False
    return type(node[1]) is float or is_int(node[1]) or is_hex(node[1], 8)


def _is_surrogate_hex(value: Any) -> bool:
    if not is_hex(value):
        return False
    try:
        text = bytes.fromhex(value).decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False  # it has a plain form, and may have no second one


def _is_base64(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        return base64.b64encode(base64.b64decode(value, validate=True)).decode() == value
    except ValueError:
        return False


def _has_items(node: Node) -> bool:
    return len(node) == 2 and isinstance(node[1], list | tuple)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(is_int(n) and n >= 0 for n in value)


_CHECKS: dict[str, Callable[[Node], bool]] = {
    "none": lambda node: len(node) == 1,
    "bool": lambda node: len(node) == 2 and type(node[1]) is bool,
    "int": lambda node: len(node) == 2 and (is_int(node[1]) or _is_hex_int(node[1])),
    "float": _is_float,
    "complex": lambda node: len(node) == 3 and _is_float(node[1]) and _is_float(node[2]),
    "str": lambda node: (
        (len(node) == 2 and isinstance(node[1], str))
        or (len(node) == 3 and node[1] is None and _is_surrogate_hex(node[2]))
    ),
    "bytes": lambda node: len(node) == 2 and _is_base64(node[1]),
    "list": _has_items,
    "tuple": _has_items,
    "set": _has_items,
    "dict": _has_items,
    "ordered": lambda node: len(node) == 3 and isinstance(node[1], list | tuple),
    "default": lambda node: (
        len(node) == 3 and isinstance(node[1], list | tuple) and (node[2] is None or node[2] in FACTORIES)
    ),
    "size": lambda node: len(node) == 2 and _are_sizes(node[1]),
    "dtype": lambda node: len(node) == 2 and is_dtype(node[1]),
    "device": lambda node: len(node) == 2 and is_device(node[1]),
    "tensor": lambda node: len(node) == 2 and is_int(node[1]),
    "scalar": lambda node: (
        len(node) == 3 and isinstance(node[1], str) and is_hex(node[2], numpy_size(node[1]))
    ),
    "array": lambda node: (
        len(node) == 4
        and is_int(node[1])
        and isinstance(node[2], str)
        and numpy_size(node[2]) >= 0
        and _are_sizes(node[3])
    ),
    "blob": lambda node: len(node) == 2 and is_int(node[1]),
    "object": lambda node: (
        len(node) == 3 and is_int(node[1]) and isinstance(node[2], str) and len(node[2]) <= MAX_NAME
    ),
}
