"""Typed paths of tensors as the JSON files hold them: the identity of a global tensor on all ranks."""

from __future__ import annotations

from typing import Any

from milepost.format.limits import MAX_DEPTH
from milepost.format.nodes import check_tree
from milepost.format.paths import ATTRIBUTES, Item, Path
from milepost.format.tree import Node, TreeDecoder, TreeEncoder, UnencodableError, scalar_value

__all__ = ["ATTRIBUTES_STEP", "Key", "decode_key", "encode_key", "is_key", "step_of"]

Key = list[Any]
"""A typed path: text for a key that is text, ["item", n] for a position, ["attributes"] for the attributes of
an OrderedDict, else the key's node."""


def _refuse(value: Any, path: Path) -> Node:
    raise UnencodableError(f"a key of type {type(value).__name__}", path)


_encoder = TreeEncoder(_refuse)


def _plain_scalar(node: Any) -> Any:
    """A numpy scalar as the plain value that is equal to it, or else as a tuple of its node."""
    value = scalar_value(node)
    return tuple(node) if isinstance(value, bytes) else value


_decoder = TreeDecoder(
    {
        "scalar": _plain_scalar,
        "size": lambda node: tuple(node[1]),  # to which a torch.Size is equal
        "dtype": tuple,
        "device": tuple,
    }
)


ATTRIBUTES_STEP = ["attributes"]


def encode_key(path: Path, node_of: Any = None) -> Key:
    """A path as it is written down.

    Args:
        path: The keys on the way down.
        node_of: Encodes a key that is no text; by default only plain values can be encoded.
    """
    encode = node_of or _encoder.encode
    key: Key = []
    for step in path:
        if type(step) is Item:
            key.append(["item", int(step)])
            continue
        key.append(ATTRIBUTES_STEP if step is ATTRIBUTES else step_of(encode(step)))
    return key


def decode_key(key: Key) -> Path:
    """The path in a key; for looking things up and for messages."""
    path: list[Any] = []
    for part in key:
        if isinstance(part, str):
            path.append(part)
        elif part[0] == "item":
            path.append(Item(part[1]))
        elif part == ATTRIBUTES_STEP:
            path.append(ATTRIBUTES)
        else:
            path.append(_decoder.decode(part))
    return tuple(path)


def step_of(node: Node) -> Any:
    """The step of a `Key` that stands for a key of a dict, given as its node."""
    return node[1] if node[0] == "str" and node[1] is not None else node


def is_key(key: Key) -> bool:
    """Whether a value read from a file is a well-formed key."""
    if len(key) > MAX_DEPTH + 1:
        return False
    for part in key:
        if isinstance(part, str):
            continue
        if not isinstance(part, list) or not part:
            return False
        if part[0] == "item":
            if len(part) != 2 or type(part[1]) is not int or part[1] < 0:
                return False
            continue
        if part == ATTRIBUTES_STEP:
            continue
        try:
            check_tree(["set", [part]])
        except ValueError:
            return False
    return True
