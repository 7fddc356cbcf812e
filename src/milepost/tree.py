"""Trees of tagged values: how an index writes down a state dict without losing a bit.

A node is a JSON array whose first element names the kind:

    ["none"]  ["bool", true]  ["int", 5]  ["int", "-36893488147419103232"]  ["float", 0.5]
    ["float", "7ff8000000000000"]         not finite: the IEEE-754 bits, big-endian, as hex
    ["complex", float node, float node]  ["str", "text"]  ["str", null, hex of the UTF-8 bytes]
    ["bytes", base64]  ["list", [...]]  ["tuple", [...]]  ["set", [...]]
    ["dict", [[key, value], ...]]  ["ordered", [[key, value], ...], attributes node or null]
    ["default", [[key, value], ...], factory name or null]
    ["size", [int, ...]]  ["dtype", "float32"]  ["device", "cuda:0"]
    ["tensor", number]  ["scalar", descr, hex]  ["array", record, descr, shape]
    ["blob", record]  ["object", record, "module.Class"]

JSON alone would turn NaN into null, merge the keys 1 and "1", and round large integers.
"""

from __future__ import annotations

import base64
import builtins
import reprlib
import struct
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sized
from typing import Any, TypeVar

from milepost.errors import CorruptCheckpointError
from milepost.paths import ATTRIBUTES, Item, Path, path_text

__all__ = [
    "HOLE",
    "MAX_DEPTH",
    "Node",
    "TreeDecoder",
    "TreeEncoder",
    "UnencodableError",
    "check_tree",
    "paths_of",
]

Node = Any
"""A node as above: a tuple or list."""

HOLE: Node = ("none", "not known")
"""Where another rank had a value that is not known here; never in a file, and None for a decoder. A list of
which others may have had more has it as its last element: ``["list", [...], HOLE]``."""

MAX_DEPTH = 200
"""Containers may be nested this deep."""

FACTORIES = ("int", "float", "bool", "complex", "str", "bytes", "list", "tuple", "dict", "set")
"""The built-ins that a defaultdict's factory may be."""


class UnencodableError(Exception):
    """A value or key cannot be written down; `path` tells where."""

    def __init__(self, message: str, path: Path) -> None:
        super().__init__(message)
        self.path = path


_NONE = ("none",)
_TRUE, _FALSE = ("bool", True), ("bool", False)


def _encode_int(value: int) -> Node:
    # Beyond 64 bits in hexadecimal: Python limits decimal text to 4,300 digits.
    return ("int", value) if -(1 << 63) <= value < 1 << 63 else ("int", hex(value))


def _encode_float(value: float) -> Node:
    if value - value == 0.0:
        return ("float", value)
    return ("float", struct.pack(">d", value).hex())


def _encode_str(value: str) -> Node:
    try:
        value.encode()
    except UnicodeEncodeError:
        return ("str", None, value.encode("utf-8", "surrogatepass").hex())
    return ("str", value)


_SCALARS: dict[type, Callable[[Any], Node]] = {
    type(None): lambda _: _NONE,
    bool: lambda value: _TRUE if value else _FALSE,
    int: _encode_int,
    float: _encode_float,
    complex: lambda value: ("complex", _encode_float(value.real), _encode_float(value.imag)),
    str: _encode_str,
    bytes: lambda value: ("bytes", base64.b64encode(value).decode()),
}

_MAX_CACHED_KEYS = 1 << 20


class TreeEncoder:
    """Turns values into nodes, dispatching on their exact type.

    Args:
        leaf: Called with (value, path) for every value that is no native scalar or container; returns
            its node, or raises UnencodableError.
        scalars: Encoders for further exact types, which may also be dictionary keys.
    """

    def __init__(
        self,
        leaf: Callable[[Any, Path], Node],
        scalars: dict[type, Callable[[Any], Node]] | None = None,
    ) -> None:
        self._leaf = leaf
        self._scalars = _SCALARS | (scalars or {})
        self._keys: dict[str, Node] = {}

    def encode(self, value: Any, path: Path = ()) -> Node:
        """The node of a value.

        Raises:
            UnencodableError: For a value or key that has no node, or nesting beyond MAX_DEPTH.
        """
        # One Python frame a level: at MAX_DEPTH this must fit the recursion limit of any caller.
        kind = type(value)
        scalar = self._scalars.get(kind)
        if scalar is not None:
            return scalar(value)
        tag = _TAGS.get(kind)
        if tag is None:
            return self._leaf(value, path)
        if len(path) >= MAX_DEPTH:
            raise UnencodableError(
                f"containers are nested more than {MAX_DEPTH} deep, or a container holds itself", path
            )
        nodes: list[Node] = []
        if tag == "set":
            return (tag, [self._key(item, path) for item in value])
        if tag in ("list", "tuple"):
            for position, item in enumerate(value):
                nodes.append(self.encode(item, (*path, Item(position))))
            return (tag, nodes)
        scalars, key_node = self._scalars, self._key
        for key, item in value.items():
            scalar = scalars.get(type(item))
            node = self.encode(item, (*path, key)) if scalar is None else scalar(item)
            nodes.append((key_node(key, path), node))
        if tag == "ordered":
            extra = vars(value)
            return (tag, nodes, self.encode(dict(extra), (*path, ATTRIBUTES)) if extra else None)
        if tag == "default":
            return (tag, nodes, _factory_name(value.default_factory, path))
        return (tag, nodes)

    def _key(self, key: Any, path: Path, depth: int = 0) -> Node:
        kind = type(key)
        if kind is str:
            node = self._keys.get(key)
            if node is None:
                node = _encode_str(key)
                if len(self._keys) < _MAX_CACHED_KEYS:
                    self._keys[key] = node
            return node
        if kind is tuple:
            if len(path) + depth >= MAX_DEPTH:
                raise UnencodableError(f"a key is nested more than {MAX_DEPTH} deep", path)
            return ("tuple", [self._key(part, path, depth + 1) for part in key])
        scalar = _SCALARS.get(kind) or self._scalars.get(kind)
        if scalar is not None:
            return scalar(key)
        if kind.__module__ == "numpy":
            node = self._leaf(key, path)
            if node[0] == "scalar":
                return node
        raise UnencodableError(
            f"the key {reprlib.repr(key)} has type {kind.__module__}.{kind.__qualname__}; keys of dicts and "
            "items of sets can be str, int, float, bool, complex, bytes, None, numpy scalars and tuples of "
            "these: convert it, for instance with int() or str()",
            path,
        )


_TAGS: dict[type, str] = {
    dict: "dict",
    list: "list",
    tuple: "tuple",
    set: "set",
    OrderedDict: "ordered",
    defaultdict: "default",
}


def _factory_name(factory: Any, path: Path) -> str | None:
    if factory is None:
        return None
    name: str = getattr(factory, "__name__", "")
    if name not in FACTORIES or getattr(builtins, name) is not factory:
        raise UnencodableError(
            f"a defaultdict has the factory {factory!r}; only built-in types and None can be saved", path
        )
    return name


class TreeDecoder:
    """Turns nodes, which `check_tree` has passed, back into values.

    Args:
        leaves: For each tag that is not native here, the function that gets the whole node.
    """

    def __init__(self, leaves: dict[str, Callable[[Node], Any]] | None = None) -> None:
        self._leaves = _DECODERS | (leaves or {})

    def decode(self, node: Node) -> Any:
        """The value of a node."""
        tag = node[0]
        leaf = self._leaves.get(tag)
        if leaf is not None:
            return leaf(node)
        if tag in ("list", "tuple", "set"):
            items = []
            for item in node[1]:
                items.append(self.decode(item))
            if tag == "set":
                return _unique(set(items), node)
            return items if tag == "list" else tuple(items)
        value: dict[Any, Any] = {}
        if tag == "ordered":
            value = OrderedDict()
        elif tag == "default":
            value = defaultdict(getattr(builtins, node[2]) if node[2] else None)
        for key, item in node[1]:
            value[self.decode(key)] = self.decode(item)
        if tag == "ordered" and node[2] is not None:
            vars(value).update(self.decode(node[2]))
        return _unique(value, node)


_Sized = TypeVar("_Sized", bound=Sized)


def _unique(value: _Sized, node: Node) -> _Sized:
    """Refuse keys that are equal in Python though their nodes are not, such as two names of one dtype."""
    if len(value) != len(node[1]):
        raise CorruptCheckpointError(f"a {node[0]} of the tree has equal keys")
    return value


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


_DECODERS: dict[str, Callable[[Node], Any]] = {
    "none": lambda _: None,
    "bool": lambda node: node[1],
    "int": lambda node: int(node[1], 16) if isinstance(node[1], str) else node[1],
    "float": _decode_float,
    "complex": lambda node: complex(_decode_float(node[1]), _decode_float(node[2])),
    "str": _decode_str,
    "bytes": lambda node: base64.b64decode(node[1]),
}

_KEY_TAGS = {*_DECODERS, "tuple", "dtype", "device", "size", "scalar"}


def check_tree(node: Node, *, tensors: int, records: int) -> None:
    """Check a tree from outside: after it returns, `TreeDecoder` meets no malformed node.

    Args:
        node: The root.
        tensors: How many tensors the index has.
        records: How many records the index has.

    Raises:
        ValueError: The tree is malformed, nested too deep, has equal keys in one dictionary, or refers
            to a tensor or record that is not there.
    """
    stack: list[tuple[Node, int, bool]] = [(node, 0, False)]
    while stack:
        node, depth, key = stack.pop()
        if depth > MAX_DEPTH + 1:
            raise ValueError(f"the tree is nested more than {MAX_DEPTH} deep")
        if not isinstance(node, list | tuple) or not node or not isinstance(node[0], str):
            raise ValueError(f"a node of the tree is malformed: {str(node)[:80]!r}")
        tag = node[0]
        check = _CHECKS.get(tag)
        if check is None:
            raise ValueError(f"unknown kind of value {tag[:40]!r} in the tree")
        if key and tag not in _KEY_TAGS:
            raise ValueError(f"a dictionary key of kind {tag!r}")
        if not check(node):
            raise ValueError(f"a {tag} node of the tree is malformed: {str(node)[:80]!r}")
        if tag in ("tensor", "array", "blob", "object"):
            limit = tensors if tag == "tensor" else records
            if not 0 <= node[1] < limit:
                raise ValueError(f"the tree refers to {tag} {node[1]} of {limit}")
        elif tag in ("list", "tuple", "set"):
            stack.extend((child, depth + 1, key or tag == "set") for child in node[1])
            if tag == "set" and len({_frozen(child, depth) for child in node[1]}) != len(node[1]):
                raise ValueError("a set has the same element twice")
        elif tag in ("dict", "ordered", "default"):
            seen = set()
            for pair in node[1]:
                if not isinstance(pair, list | tuple) or len(pair) != 2:
                    raise ValueError("an entry of a dictionary is no pair")
                key_node, child = pair
                if _is_plain_text(key_node):
                    seen.add(key_node[1])
                else:
                    stack.append((key_node, depth + 1, True))
                    seen.add(_frozen(key_node, depth))
                stack.append((child, depth + 1, False))
            if len(seen) != len(node[1]):
                raise ValueError("a dictionary has the same key twice")
            if tag == "ordered" and node[2] is not None:
                if not _has_text_keys(node[2]):
                    raise ValueError("the attributes of an OrderedDict are no dictionary of names")
                stack.append((node[2], depth + 1, False))


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
        raise ValueError(f"a node of the tree is malformed: {str(node)[:80]!r}")  # noqa: TRY004 - bad content
    if not isinstance(node, list | tuple):
        return node
    if node and node[0] in ("bool", "int", "float", "complex") and _CHECKS[node[0]](node):
        return _DECODERS[node[0]](node)
    return tuple([_frozen(part, depth + 1) for part in node])


def _is_int(value: Any) -> bool:
    return type(value) is int and -(1 << 63) <= value < 1 << 63


def _is_hex_int(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    digits = value.removeprefix("-").removeprefix("0x")
    return (
        value.removeprefix("-").startswith("0x") and digits != "" and set(digits) <= set("0123456789abcdef")
    )


def _is_hex(value: Any, size: int | None = None) -> bool:
    if not isinstance(value, str) or (size is not None and len(value) != 2 * size):
        return False
    return len(value) % 2 == 0 and set(value) <= set("0123456789abcdef")


def _is_float(node: Any) -> bool:
    if not isinstance(node, list | tuple) or len(node) != 2 or node[0] != "float":
        return False
    return type(node[1]) in (float, int) or _is_hex(node[1], 8)


def _is_surrogate_hex(value: Any) -> bool:
    if not _is_hex(value):
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


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _has_items(node: Node) -> bool:
    return len(node) == 2 and isinstance(node[1], list | tuple)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(_is_int(n) and n >= 0 for n in value)


_CHECKS: dict[str, Callable[[Node], bool]] = {
    "none": lambda node: len(node) == 1,
    "bool": lambda node: len(node) == 2 and type(node[1]) is bool,
    "int": lambda node: len(node) == 2 and (_is_int(node[1]) or _is_hex_int(node[1])),
    "float": _is_float,
    "complex": lambda node: len(node) == 3 and _is_float(node[1]) and _is_float(node[2]),
    "str": lambda node: (
        (len(node) == 2 and _is_text(node[1]))
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
    "dtype": lambda node: len(node) == 2 and _is_text(node[1]),
    "device": lambda node: len(node) == 2 and _is_text(node[1]),
    "tensor": lambda node: len(node) == 2 and _is_int(node[1]),
    "scalar": lambda node: len(node) == 3 and _is_text(node[1]) and _is_hex(node[2]),
    "array": lambda node: len(node) == 4 and _is_int(node[1]) and _is_text(node[2]) and _are_sizes(node[3]),
    "blob": lambda node: len(node) == 2 and _is_int(node[1]),
    "object": lambda node: len(node) == 3 and _is_int(node[1]) and _is_text(node[2]),
}


def paths_of(node: Node, *kinds: str) -> dict[int, str]:
    """The path of each value of these kinds in a checked tree, by its number; the first of several."""
    paths: dict[int, str] = {}
    decoder = TreeDecoder({tag: lambda key: key[1] for tag in ("size", "dtype", "device", "scalar")})
    stack: list[tuple[Node, Path]] = [(node, ())]
    while stack:
        node, path = stack.pop()
        if node[0] in kinds:
            paths.setdefault(node[1], path_text(path))
        elif node[0] in ("dict", "ordered", "default"):
            stack += [(value, (*path, decoder.decode(key))) for key, value in reversed(node[1])]
        elif node[0] in ("list", "tuple", "set"):
            stack += [(item, (*path, Item(i))) for i, item in reversed(list(enumerate(node[1])))]
    return paths
