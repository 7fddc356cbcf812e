"""The tree of one rank with the tensors of all: where in it global tensors are referred to. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from milepost.errors import CorruptCheckpointError
from milepost.manifest import Tensors
from milepost.reshard import steps_of
from milepost.shards import Key, ShardMap
from milepost.tree import Node

__all__ = ["with_global_columns", "with_shards"]


def with_global_columns(tensors: Tensors, shards: ShardMap) -> Tensors:
    """The columns of an index, with the global tensors behind its own."""
    return Tensors(
        record=[*tensors.record, *(-1 - alias for alias in shards.alias)],
        byte_offset=[*tensors.byte_offset, *[0] * len(shards.key)],
        dtype=[*tensors.dtype, *shards.dtype],
        shape=[*tensors.shape, *shards.shape],
        stride=[*tensors.stride, *(list(steps_of(shape)) for shape in shards.shape)],
        kind=[*tensors.kind, *shards.kind],
        device=[*tensors.device, *[""] * len(shards.key)],
        requires_grad=tensors.requires_grad,
        conj=tensors.conj,
        neg=tensors.neg,
    )


_Trie = dict[bytes, Any]


def with_shards(tree: Node, keys: Sequence[Key], first: int) -> tuple[Node, list[Node]]:
    """A tree that refers to global tensors, as numbers from `first` on, wherever a rank has a part of one.

    Tensors that other ranks alone hold get a place in it as well.

    Args:
        tree: A rank's tree.
        keys: The keys of all global tensors.
        first: The number of the first of them.

    Returns:
        The tree, and the topmost nodes in it that the rank's own tree does not have.
    """
    root: _Trie = {}
    for number, key in enumerate(keys):
        node = root
        for part in key[:-1]:
            node = node.setdefault(msgspec.json.encode(part), {})
            if not isinstance(node, dict):
                raise CorruptCheckpointError(f"the shard map has a tensor within a tensor: {key}")
        if not key or isinstance(node.get(msgspec.json.encode(key[-1])), dict):
            raise CorruptCheckpointError(f"the shard map has a tensor within a tensor: {key}")
        node[msgspec.json.encode(key[-1])] = number
    others: list[Node] = []
    return _merged(tree, root, first, others), others


def _merged(node: Node, trie: _Trie | int, first: int, others: list[Node]) -> Node:
    if isinstance(trie, int):
        return ["tensor", first + trie]
    tag = node[0]
    left = dict(trie)
    if tag in ("dict", "ordered", "default"):
        entries = []
        for key, child in node[1]:
            plain = key[0] == "str" and key[1] is not None
            below = left.pop(msgspec.json.encode(key[1] if plain else key), None)
            entries.append((key, child if below is None else _merged(child, below, first, others)))
        for part, below in left.items():
            name = msgspec.json.decode(part)
            if isinstance(name, list) and name[0] == "item":
                continue
            others.append(_made(below, first))
            entries.append((["str", name] if isinstance(name, str) else name, others[-1]))
        return [tag, entries, *node[2:]]
    if tag in ("list", "tuple"):
        items = []
        for position, child in enumerate(node[1]):
            below = left.pop(msgspec.json.encode(["item", position]), None)
            items.append(child if below is None else _merged(child, below, first, others))
        while (below := left.pop(msgspec.json.encode(["item", len(items)]), None)) is not None:
            others.append(_made(below, first))
            items.append(others[-1])
        return [tag, items]
    others.append(_made(trie, first))
    return others[-1]


def _made(trie: _Trie | int, first: int) -> Node:
    """The node of what only other ranks hold."""
    if isinstance(trie, int):
        return ["tensor", first + trie]
    if all(part == msgspec.json.encode(["item", n]) for n, part in enumerate(trie)):
        return ["list", [_made(below, first) for below in trie.values()]]
    return _merged(["dict", []], trie, first, [])
