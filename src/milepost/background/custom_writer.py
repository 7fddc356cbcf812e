"""The user's own writer inside the checkpoint process. Imported only where there is one: it needs torch."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch

from milepost.background.arena import Arena
from milepost.background.messages import Write, decode_path
from milepost.format.snapshot import Snapshot
from milepost.state.decode import TensorBuilder

__all__ = ["start"]

Serve = Callable[[Write, Snapshot, Arena, list[int]], None]


def start(setup: bytes) -> tuple[Serve, Callable[[], None]]:
    """Call the user's init functions; returns what carries out a write, and what closes the writer.

    Args:
        setup: Pickle of (init function, its arguments, function that makes the writer, its arguments).
    """
    init, init_arguments, make_writer, writer_arguments = pickle.loads(setup)  # noqa: S301 - our trainer's
    if init is not None:
        init(*init_arguments)
    writer = make_writer(**writer_arguments)

    def serve(request: Write, snapshot: Snapshot, arena: Arena, attached: list[int]) -> None:
        arguments = pickle.loads(snapshot.arguments)  # noqa: S301 - our trainer's
        state = state_dict(snapshot, arena, attached)
        result = writer.write(path=decode_path(request.path), state_dict=state, **arguments)
        if isinstance(result, Future):  # it may work in the background: its outcome counts
            result.result()

    return serve, getattr(writer, "close", lambda: None)


def state_dict(snapshot: Snapshot, arena: Arena, attached: list[int]) -> Any:
    """The state dict whose tensors are views of the arena, or lie in shared memory of their own."""
    from_descriptor: Any = torch.UntypedStorage._new_shared_fd_cpu  # type: ignore[attr-defined]  # noqa: SLF001
    sizes = [os.fstat(descriptor).st_size for descriptor in attached]
    wholes = [from_descriptor(descriptor, size) for descriptor, size in zip(attached, sizes, strict=True)]
    shared = {record: (wholes[which], offset) for record, which, offset in snapshot.shared}
    layout, memory = snapshot.plan.layout, arena.view

    def storage_of(record: int) -> torch.UntypedStorage:
        if record in shared:
            whole, start = shared[record]
            length = layout.lengths[record]
            complete = start == 0 and length == whole.nbytes()
            storages[record] = whole if complete else whole[start : start + length]
        elif record not in storages:
            offset, length = layout.offsets[record], layout.lengths[record]
            data = (
                torch.frombuffer(memory[offset : offset + length], dtype=torch.uint8)
                if length
                else torch.empty(0)
            )
            storages[record] = data.untyped_storage()
        return storages[record]

    storages: dict[int, torch.UntypedStorage] = {}
    builder = TensorBuilder(snapshot.plan.tensors, storage_of, snapshot.record_bytes)
    return builder.decode(snapshot.tree)
