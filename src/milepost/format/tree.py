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
from collections.abc import Callable, Iterator, Sized
from typing import Any, TypeVar

import msgspec

from milepost.errors import CorruptCheckpointError, StateError
from milepost.format.limits import MAX_DEPTH, crowded, excess
from milepost.format.nodes import DECODERS, FACTORIES, Node, check_node
from milepost.format.paths import ATTRIBUTES, Item, Path, path_text

__all__ = [
    "HOLE",
    "Node",
    "TreeDecoder",
    "TreeEncoder",
    "UnencodableError",
    "children",
    "encode_tree",
    "key_value",
    "numbers_of",
    "paths_of",
    "scalar_value",
]

HOLE: Node = ("none", "not known")
"""Where another rank had a value that is not known here; never in a file, and None for a decoder. A list of
which others may have had more has it as its last element: ``["list", [...], HOLE]``."""


class UnencodableError(Exception):
    """A value or key cannot be written down; `path` tells where, and `hint` what to do."""

    def __init__(self, message: str, path: Path, hint: str | None = None) -> None:
        super().__init__(message)
        self.path = path
        self.hint = hint


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
        self._further = scalars or {}
        self._native = {kind: encode for kind, encode in _SCALARS.items() if kind not in self._further}
        self._keys: dict[str, Node] = {}

    def encode(self, value: Any, path: Path = ()) -> Node:
        """The node of a value.

        Raises:
            UnencodableError: For a value or key that has no node, or one that a load would refuse.
        """
        # One Python frame a level: at MAX_DEPTH this must fit the recursion limit of any caller.
        kind = type(value)
        native = self._native.get(kind)
        if native is not None:
            return native(value)
        tag = _TAGS.get(kind)
        if tag is None:
            further = self._further.get(kind)
            return _checked(self._leaf(value, path) if further is None else further(value), path)
        if len(path) >= MAX_DEPTH:
            raise UnencodableError(
                f"containers are nested more than {MAX_DEPTH} deep, or a container holds itself", path
            )
        nodes: list[Node] = []
        if tag in ("set", "dict", "ordered", "default") and crowded(value):
            raise UnencodableError("very many keys of a dict or items of a set have the same hash", path)
        if tag == "set":
            return (tag, [self._key(item, path) for item in value])
        if tag in ("list", "tuple"):
            for position, item in enumerate(value):
                nodes.append(self.encode(item, (*path, Item(position))))
            return (tag, nodes)
        natives, key_node = self._native, self._key
        for key, item in value.items():
            native = natives.get(type(item))
            node = self.encode(item, (*path, key)) if native is None else native(item)
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
        if (scalar := _SCALARS.get(kind)) is not None:
            return scalar(key)
        if (further := self._further.get(kind)) is not None:
            return _checked(further(key), path, key=True)
        if kind.__module__ == "numpy":
            node = self._leaf(key, path)
            if node[0] == "scalar":
                return _checked(node, path, key=True)
        raise UnencodableError(
            f"the key {reprlib.repr(key)} has type {kind.__module__}.{kind.__qualname__}; keys of dicts and "
            "items of sets can be str, int, float, bool, complex, bytes, None, numpy scalars and tuples of "
            "these: convert it, for instance with int() or str()",
            path,
        )


def _checked(node: Node, path: Path, *, key: bool = False) -> Node:
    """The node, which a load will not refuse."""
    if node[0] in _LIMITED:
        try:
            check_node(node, key=key)
        except ValueError as error:
            raise UnencodableError(str(error), path) from None
    return node


_LIMITED = {"dtype", "device", "scalar", "array", "object"}
"""The kinds of nodes that may be beyond a limit though they were made of values in memory."""

_TAGS: dict[type, str] = {
    dict: "dict",
    list: "list",
    tuple: "tuple",
    set: "set",
    OrderedDict: "ordered",
    defaultdict: "default",
}


def encode_tree(tree: Node, limit: int | None = None) -> msgspec.Raw:
    """A tree as an index holds it, which a load will not refuse for its size.

    Raises:
        StateError: It has more nodes, or more than `limit` bytes; names the key that takes most of them.
    """
    data = msgspec.json.encode(tree)
    problem = excess(data, limit)
    if problem is None:
        return msgspec.Raw(data)
    pairs = tree[1] if tree[0] in ("dict", "ordered", "default") else ()
    key, _ = max(pairs, key=lambda pair: len(msgspec.json.encode(pair)), default=(None, None))
    raise StateError(
        f"the state's plain values are too many: {problem}",
        key=None if key is None else str(key[1])[:200],
        hint="convert long lists of numbers to tensors or numpy arrays, and long texts to bytes",
    )


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
        self._leaves = DECODERS | (leaves or {})

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
                return _unique(set(_spread(items, node)), node)
            return items if tag == "list" else tuple(items)
        value: dict[Any, Any] = {}
        if tag == "ordered":
            value = OrderedDict()
        elif tag == "default":
            value = defaultdict(getattr(builtins, node[2]) if node[2] else None)
        keys: list[Any] = []
        for key, _ in node[1]:
            keys.append(self.decode(key))
        for key, (_, item) in zip(_spread(keys, node), node[1], strict=True):
            value[key] = self.decode(item)
        if tag == "ordered" and node[2] is not None:
            vars(value).update(self.decode(node[2]))
        return _unique(value, node)


def _spread(keys: list[Any], node: Node) -> list[Any]:
    """Refuse keys whose hashes are the same though those of their nodes are not, as of numpy's scalars."""
    if not set(map(type, keys)) <= _SCALARS.keys() and crowded(keys):  # of others it is known
        raise CorruptCheckpointError(f"a {node[0]} of the tree has too many keys of one hash")
    return keys


_Sized = TypeVar("_Sized", bound=Sized)


def _unique(value: _Sized, node: Node) -> _Sized:
    """Refuse keys that are equal in Python though their nodes are not, such as two names of one dtype."""
    if len(value) != len(node[1]):
        raise CorruptCheckpointError(f"a {node[0]} of the tree has equal keys")
    return value


def scalar_value(node: Node) -> int | float | bytes:
    """The value of a numpy scalar: a bool, an int or a float, or its bytes if it is none of these."""
    descr, data = node[1], bytes.fromhex(node[2])
    kind, is_big = descr[1:], descr.startswith(">")
    if kind == "b1":
        return data != b"\0"
    if kind[:1] in ("i", "u"):
        return int.from_bytes(data, "big" if is_big else "little", signed=kind[0] == "i")
    if kind in _FLOATS:
        return float(struct.unpack(f"{'>' if is_big else '<'}{_FLOATS[kind]}", data)[0])
    return data


_FLOATS = {"f2": "e", "f4": "f", "f8": "d"}

_plain_keys = TreeDecoder(
    {**dict.fromkeys(("size", "dtype", "device"), lambda node: node[1]), "scalar": scalar_value}
)


def key_value(step: Any) -> Any:
    """The step of a path that a step of `children` stands for; of torch's types only the text."""
    return step if type(step) is Item else _plain_keys.decode(step)


def children(node: Node) -> Iterator[tuple[Any, Node]]:
    """The values in a container of a checked tree, each after the step to it: its key's node, or an `Item`.

    An OrderedDict's attributes are not among them. Other nodes have no children.
    """
    if node[0] in ("dict", "ordered", "default"):
        return iter(node[1])
    items = node[1] if node[0] in ("list", "tuple", "set") else ()
    return ((Item(position), item) for position, item in enumerate(items))


_Trail = tuple[Any, Any]
"""The steps to a value, the last one first: (the trail to the container, a step of `children`)."""


def paths_of(node: Node, *kinds: str) -> dict[int, str]:
    """The path of each value of these kinds in a checked tree, by its number; the first of several."""
    paths: dict[int, str] = {}
    for number, found in _trails_of(node, kinds).items():
        trail, steps = found, list[Any]()
        while trail:
            trail, step = trail
            steps.append(key_value(step))
        paths[number] = path_text(tuple(reversed(steps)))
    return paths


def numbers_of(node: Node, *kinds: str) -> set[int]:
    """The numbers of the values of these kinds in a checked tree."""
    return set(_trails_of(node, kinds))


def _trails_of(node: Node, kinds: tuple[str, ...]) -> dict[int, _Trail | tuple[()]]:
    trails: dict[int, _Trail | tuple[()]] = {}
    wanted = {*kinds, *_TAGS.values()}
    stack: list[tuple[Node, _Trail | tuple[()]]] = [(node, ())]
    while stack:
        node, trail = stack.pop()
        if node[0] in kinds:
            trails.setdefault(node[1], trail)
        else:
            found = [(child, (trail, step)) for step, child in children(node) if child[0] in wanted]
            stack += reversed(found)
    return trails
