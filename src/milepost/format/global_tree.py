"""The tree of one rank with the tensors of all: where in it global tensors are referred to. Torch-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence
from typing import Any

import msgspec

from milepost.errors import CorruptCheckpointError
from milepost.format.boxes import steps_of
from milepost.format.index import Tensors
from milepost.format.keys import ATTRIBUTES_STEP, Key, decode_key, step_of
from milepost.format.limits import MAX_EQUAL_HASHES
from milepost.format.paths import path_text
from milepost.format.shards import ShardMap
from milepost.format.tree import HOLE, Node

__all__ = ["key_trie", "with_global_columns", "with_shards"]


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


def with_shards(
    tree: Node, keys: Sequence[Key], first: int, own: Container[int] = ()
) -> tuple[Node, list[Node]]:
    """A tree that refers to global tensors, as numbers from `first` on, wherever the rank has a part of one.

    Tensors that other ranks alone hold get a place in it as well, unless the rank has something else there.

    Args:
        tree: A rank's tree.
        keys: The keys of all global tensors.
        first: The number of the first of them.
        own: Numbers of the rank's tensors that are parts of global ones.

    Returns:
        The tree, and the topmost nodes in it that the rank's own tree does not have.
    """
    others: list[Node] = []
    if not keys:
        return tree, others
    return _Merge(first, own, others).merged(tree, key_trie(keys)), others


def key_trie(keys: Sequence[Key]) -> _Trie:
    """The keys as a tree of their encoded steps, with the number of each key as its leaf.

    Raises:
        CorruptCheckpointError: Two keys cannot be in one tree: one leads through the other, or they are
            equal as keys of a dict, as 1 and True are.
    """
    root: _Trie = {}
    paths: dict[Any, int] = {}
    hashes: Counter[int] = Counter()
    for number, key in enumerate(keys):
        node: Any = root
        for part in key[:-1]:
            node = node.setdefault(msgspec.json.encode(part), {})
            if not isinstance(node, dict):
                raise _conflict(key, "has a tensor on its way")
        last = msgspec.json.encode(key[-1]) if key else b""
        if not key or last in node:
            raise _conflict(key, "is on the way to another tensor")
        node[last] = number
        path = decode_key(key)
        for depth in range(1, len(path) + 1):
            # Steps that are equal, such as 1 and True, must be written alike.
            known = paths.setdefault(path[:depth], number)
            if known == number:
                hashes[hash(path[:depth])] += 1
                if hashes[hash(path[:depth])] > MAX_EQUAL_HASHES:
                    raise _conflict(key, "has the same hash as very many others")
            if known != number and keys[known][:depth] != key[:depth]:
                raise _conflict(
                    key, f"has a step that is equal to one of {path_text(decode_key(keys[known]))}"
                )
    return root


def _conflict(key: Key, what: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(f"the key {path_text(decode_key(key))} {what}")


class _Merge(msgspec.Struct):
    first: int
    own: Container[int]
    others: list[Node]

    def merged(self, node: Node, trie: _Trie | int) -> Node:
        tag = node[0]
        if isinstance(trie, int):
            # What the rank has there instead is its own.
            return ["tensor", self.first + trie] if tag == "tensor" and node[1] in self.own else node
        left = dict(trie)
        if tag in ("dict", "ordered", "default"):
            rest = node[2:]
            attributes = left.pop(_ATTRIBUTES, None)
            if tag == "ordered" and attributes is not None and node[2] is not None:
                rest = [self.merged(node[2], attributes)]
            entries = []
            for key, child in node[1]:
                below = left.pop(msgspec.json.encode(step_of(key)), None)
                entries.append((key, child if below is None else self.merged(child, below)))
            mine = {decode_key([step_of(key)])[0] for key, _ in node[1]} if left else set()
            for part, below in left.items():
                step = msgspec.json.decode(part)
                # What is equal to a key of the rank's own, as 1 is to True, stands for the same place.
                if _is_name(step) and decode_key([step])[0] not in mine:
                    self.others.append(self._made(below))
                    entries.append((["str", step] if isinstance(step, str) else step, self.others[-1]))
            return [tag, entries, *rest]
        if tag in ("list", "tuple"):
            # Its length is the rank's own: what others have behind its end has no place in it.
            items = []
            for position, child in enumerate(node[1]):
                below = left.get(msgspec.json.encode(["item", position]))
                items.append(child if below is None else self.merged(child, below))
            return [tag, items]
        return node

    def _made(self, trie: _Trie | int) -> Node:
        """The node of what only other ranks hold. Of a list they may hold more than tensors."""
        if isinstance(trie, int):
            return ["tensor", self.first + trie]
        steps = {part: msgspec.json.decode(part) for part in trie}
        if all(isinstance(step, list) and step[0] == "item" for step in steps.values()):
            places = {step[1]: trie[part] for part, step in steps.items()}
            if max(places) < _MAX_LIST:
                count = max(places) + 1
                return ["list", [self._made(places[n]) if n in places else HOLE for n in range(count)], HOLE]
        entries = [
            (["str", step] if isinstance(step, str) else step, self._made(trie[part]))
            for part, step in steps.items()
            if _is_name(step)
        ]
        return ["dict", entries]


def _is_name(step: Any) -> bool:
    """Whether a step leads to an entry of a dict."""
    return isinstance(step, str) or (step[0] != "item" and step != ATTRIBUTES_STEP)


_ATTRIBUTES = msgspec.json.encode(ATTRIBUTES_STEP)
_MAX_LIST = 1 << 20
