"""A snapshot: a state dict taken apart, with all that a save writes except the bytes of its tensors.

Those bytes are beside it: a function copies them, or an arena holds them at their place in the file. A
snapshot is data. It crosses to another process as it is, and needs no torch there.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

import msgspec

from milepost.errors import StateError
from milepost.format.data_pkl import emit, tensor_fragments
from milepost.format.image import Layout
from milepost.format.index import Tensors
from milepost.format.limits import MAX_METADATA_BYTES
from milepost.format.paths import path_text
from milepost.format.shards import Shards
from milepost.format.tree import Node, TreeEncoder, UnencodableError, encode_tree

__all__ = ["Labels", "Plan", "Shares", "Snapshot", "decode_snapshot", "encode_snapshot"]


class Plan:
    """The part of a snapshot that depends on structure alone. It is kept from save to save.

    Attributes:
        tensors: The tensor columns for the index.
        layout: Where the records are in the file.
    """

    def __init__(self, tensors: Tensors, lengths: Sequence[int]) -> None:
        self.tensors = tensors
        self.layout = Layout(lengths)

    @cached_property
    def fragments(self) -> list[bytes]:
        """The pickle of each tensor, for ``data.pkl``."""
        return tensor_fragments(self.tensors, self.layout.lengths)

    @cached_property
    def encoded(self) -> bytes:
        """The plan as msgpack."""
        return msgspec.msgpack.encode((self.tensors, self.layout.lengths))


class Shares(msgspec.Struct):
    """What this rank's file holds of global tensors.

    Attributes:
        columns: The columns `Shards` of the index, without CRCs, as msgpack.
        agreement: Hash of all that the ranks must agree on.
        crcs: The column of CRCs. Empty if it is computed while the file is written.
    """

    columns: bytes
    agreement: str
    crcs: list[list[int]] = []

    def decoded(self) -> Shards:
        """The columns, without CRCs."""
        return msgspec.msgpack.decode(self.columns, type=Shards)


class Labels(msgspec.Struct):
    """What a save records beside the state.

    Attributes:
        step: The step.
        metadata: The user's metadata, as a tree.
        writer: Facts about the process that saves.
    """

    step: int | None = None
    metadata: Any = None
    writer: dict[str, str] = {}

    @classmethod
    def of(cls, arguments: dict[str, Any], writer: dict[str, str]) -> Labels:
        """The labels among `save`'s keyword arguments (``step`` and ``metadata``).

        Raises:
            StateError: The step is no integer, or the metadata hold more than plain values.
        """
        step, metadata = arguments.get("step"), arguments.get("metadata")
        if step is not None:
            try:
                step = step.__index__()
            except (AttributeError, TypeError):
                raise StateError(f"step must be an integer, not a {type(step).__name__}") from None
            if not -(1 << 63) <= step < 1 << 63:
                raise StateError(f"step must fit 64 bits: {step}")
        if metadata is None:
            return cls(step, None, writer)

        def refuse(value: Any, path: tuple[Any, ...]) -> Node:
            hint = "save value.item() instead" if hasattr(value, "item") else None
            raise UnencodableError(f"metadata cannot hold a {type(value).__name__}", path, hint)

        try:
            node = TreeEncoder(refuse).encode(metadata)
            encode_tree(node, MAX_METADATA_BYTES)
            return cls(step, node, writer)
        except UnencodableError as error:
            raise StateError(
                f"{error}: metadata{f' at {path_text(error.path)}' if error.path else ''}",
                hint=error.hint
                or "metadata are plain values in dicts and lists; save tensors in the state dict",
            ) from None


class Snapshot(msgspec.Struct):
    """A state dict taken apart.

    Attributes:
        tree: The tree for the index.
        plan: The tensor columns and the layout of the file.
        objects: The bytes of the records that follow the tensors' records.
        shares: This rank's part of global tensors; None without such.
        labels: The step, the metadata and the facts to record.
        shared: The records that an arena does not hold, as memory attached to the request holds them: the
            record, which of the attached files holds its storage, where the storage begins there, how long
            it is, and where the record begins in the storage.
        arguments: Pickle of the save's keyword arguments, for a hook or writer in another process.
    """

    tree: Any
    plan: Plan
    objects: list[bytes]
    shares: Shares | None = None
    labels: Labels = msgspec.field(default_factory=Labels)
    shared: list[tuple[int, int, int, int, int]] = []
    arguments: bytes = b""

    def record_bytes(self, record: int) -> bytes:
        """The bytes of a record that is no tensor's."""
        return self.objects[record - len(self.plan.layout.lengths)]

    def pickle(self) -> bytes:
        """The bytes of ``data.pkl``."""
        return emit(self.tree, self.plan.fragments, self.record_bytes)


def encode_snapshot(snapshot: Snapshot) -> bytes:
    """A snapshot as bytes that `decode_snapshot` reads."""
    return _encoder.encode(snapshot)


def decode_snapshot(data: bytes) -> Snapshot:
    """The snapshot that `encode_snapshot` was given. The plan of the last one is kept and used again."""
    return _decoder.decode(data)


@lru_cache(1)
def _decoded_plan(data: bytes) -> Plan:
    return Plan(*msgspec.msgpack.decode(data, type=tuple[Tensors, list[int]]))


_encoder = msgspec.msgpack.Encoder(enc_hook=lambda plan: plan.encoded)
_decoder = msgspec.msgpack.Decoder(Snapshot, dec_hook=lambda _, data: _decoded_plan(data))
