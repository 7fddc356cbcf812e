"""The user's own writer inside the checkpoint process. Imported only where there is one: it needs torch."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import msgspec
import torch

from milepost.arena import Arena
from milepost.channel import Write
from milepost.image import Layout
from milepost.manifest import Tensors
from milepost.rebuild import TensorBuilder
from milepost.snapshot import Labels, Packed

__all__ = ["start"]

Serve = Callable[[Write, Packed, Arena, Labels], None]


def start(setup: bytes) -> tuple[Serve, Callable[[], None]]:
    """Call the user's init functions; returns what carries out a write, and what closes the writer.

    Args:
        setup: Pickle of (init function, its arguments, function that makes the writer, its arguments).
    """
    init, init_arguments, make_writer, writer_arguments = pickle.loads(setup)  # noqa: S301 - our trainer's
    if init is not None:
        init(*init_arguments)
    writer = make_writer(**writer_arguments)

    def serve(request: Write, packed: Packed, arena: Arena, _: Labels) -> None:
        arguments = pickle.loads(packed.arguments)  # noqa: S301 - our trainer's
        writer.write(path=request.path, state_dict=state_dict(packed, arena), **arguments)

    return serve, getattr(writer, "close", lambda: None)


def state_dict(packed: Packed, arena: Arena) -> Any:
    """The state dict whose tensors are views of the arena."""
    layout, tensors = Layout(packed.lengths), msgspec.msgpack.decode(packed.tensors, type=Tensors)
    memory = arena.view

    def storage_of(record: int) -> torch.UntypedStorage:
        if record not in storages:
            offset, length = layout.offsets[record], layout.lengths[record]
            data = (
                torch.frombuffer(memory[offset : offset + length], dtype=torch.uint8)
                if length
                else torch.empty(0)
            )
            storages[record] = data.untyped_storage()
        return storages[record]

    storages: dict[int, torch.UntypedStorage] = {}
    first = len(layout.lengths)
    return TensorBuilder(tensors, storage_of, lambda record: packed.objects[record - first]).decode(
        packed.tree
    )
