"""The user's own writer inside the checkpoint process. Imported only where there is one: it needs torch."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing.reduction import ForkingPickler
from typing import Any

import msgspec
import torch
from torch.multiprocessing.reductions import reduce_storage

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


class UntypedStorage(torch.UntypedStorage):
    """Memory shared with the trainer. torch counts only mappings that it has made itself as shared.

    It has the name of torch's own class, as which it is pickled.
    """

    def __new__(cls, *arguments: Any, **options: Any) -> Any:
        """A copy is new memory, and so of torch's own class."""
        return torch.UntypedStorage(*arguments, **options)  # type: ignore[no-untyped-call]

    def is_shared(self) -> bool:
        """True."""
        return True


torch._storage_classes.add(UntypedStorage)  # noqa: SLF001 - so that torch.save knows it
ForkingPickler.register(UntypedStorage, reduce_storage)


def _known_as_shared(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    storage.__class__ = UntypedStorage
    return storage


def state_dict(snapshot: Snapshot, arena: Arena, attached: list[int]) -> Any:
    """The state dict: its tensors are views of the arena, or of the shared memory that they had."""
    from_descriptor: Any = torch.UntypedStorage._new_shared_fd_cpu  # type: ignore[attr-defined]  # noqa: SLF001
    wholes: dict[int, torch.UntypedStorage] = {}
    shared: dict[int, tuple[int, int]] = {}
    for record, which, place, size, start in snapshot.shared:
        shared[record] = which, start
        if which not in wholes:
            file = from_descriptor(attached[which], os.fstat(attached[which]).st_size)
            is_all = (place, size) == (0, file.nbytes())
            wholes[which] = file if is_all else _known_as_shared(file[place : place + size])
    layout, tensors, memory = snapshot.plan.layout, snapshot.plan.tensors, arena.view
    starts = (shared.get(record, (0, 0))[1] for record in tensors.record)
    offsets = [start + offset for start, offset in zip(starts, tensors.byte_offset, strict=True)]
    tensors = msgspec.structs.replace(tensors, byte_offset=offsets)  # the plan's own is kept for later saves

    def storage_of(record: int) -> torch.UntypedStorage:
        if record in shared:
            return wholes[shared[record][0]]
        if record not in storages:
            offset, length = layout.offsets[record], layout.lengths[record]
            data = (
                torch.frombuffer(memory[offset : offset + length], dtype=torch.uint8)
                if length
                else torch.empty(0)
            )
            storages[record] = _known_as_shared(data.untyped_storage())
        return storages[record]

    storages: dict[int, torch.UntypedStorage] = {}
    builder = TensorBuilder(tensors, storage_of, snapshot.record_bytes)
    return builder.decode(snapshot.tree)
