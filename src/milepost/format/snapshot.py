"""A snapshot: everything that a save needs from a state dict.

That is where the bytes are, how to copy them, and every other value in encoded form. Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from milepost.format.data_pkl import emit
from milepost.format.image import Layout
from milepost.format.index import Tensors
from milepost.format.shards import Shards
from milepost.format.tree import Node

__all__ = ["Packed", "Shares", "Snapshot"]


@dataclass
class Shares:
    """What this rank's file holds of tensors that several ranks hold between them.

    Attributes:
        columns: The columns `Shards` of the index, without CRCs, as msgpack.
        agreement: Hash of what all ranks must agree on.
        crcs: Computes (or returns) the column of CRCs.
    """

    columns: bytes
    agreement: str
    crcs: Callable[[], list[list[int]]]

    def decoded(self) -> Shards:
        """The columns, without CRCs."""
        return msgspec.msgpack.decode(self.columns, type=Shards)

    def numbers(self) -> list[int]:
        """Numbers of the tensors that are parts of global ones."""
        return self.decoded().tensor


@dataclass
class Snapshot:
    """A state dict taken apart.

    Attributes:
        tree: The tree for the index.
        tensors: The tensor columns for the index.
        layout: Where the records lie in the file.
        fragments: The pickle of each tensor, for ``data.pkl``.
        objects: The bytes of the records that follow the tensors' records.
        copy: Copies a piece of a record: ``copy(record, position, bytes, address)``.
        memory: Where the records are in place already: a function that returns that memory, page-aligned
            and at least as large as it is asked for.
        shares: This rank's part of global tensors; None without such.
    """

    tree: Node
    tensors: Tensors
    layout: Layout
    fragments: list[bytes]
    objects: list[bytes]
    copy: Callable[[int, int, int, int], None]
    memory: Callable[[int], memoryview] | None = None
    shares: Shares | None = None

    def pickle(self) -> bytes:
        """The bytes of ``data.pkl``."""
        first = len(self.layout.lengths)
        return emit(self.tree, self.fragments, lambda record: self.objects[record - first])


class Packed(msgspec.Struct):
    """A snapshot on its way to another process, but for the memory that holds its records.

    Attributes:
        tree: The tree for the index.
        tensors: The tensor columns, encoded as msgpack.
        lengths: Bytes of each record.
        objects: The bytes of the records that follow the tensors' records.
        metadata: The user's metadata, as a tree, or None.
        writer: Facts about the trainer, for the index.
        arguments: Pickle of the save's keyword arguments, where a hook or writer of the user's wants them.
        shared: Records that are not in the arena but in memory attached to the request: (record, which
            of the attached, where in that memory).
        shares: As in `Shares`, its columns; b"" without shares.
        agreement: As in `Shares`.
        crcs: As in `Shares`.
    """

    tree: Any
    tensors: bytes
    lengths: list[int]
    objects: list[bytes]
    metadata: Any = None
    writer: dict[str, str] = {}
    arguments: bytes = b""
    shared: list[tuple[int, int, int]] = []
    shares: bytes = b""
    agreement: str = ""
    crcs: list[list[int]] = []
