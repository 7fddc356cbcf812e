"""Staging: a state dict is copied to where its bytes will lie in the file, and training may go on.

`DefaultStager` copies into an arena, which is the file's image. What it returns is an ordinary state dict
whose tensors are views of the arena, so it can be handed to any writer; the checkpoint process finds the
image behind it (`image_of`) and needs to copy nothing.
"""

from __future__ import annotations

import abc
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from milepost import accelerator, syscalls
from milepost.accelerator import copy_tensors
from milepost.arena import Arena, available_bytes
from milepost.config import CheckpointStagerConfig
from milepost.errors import ClosedError, LowMemoryError, StateError
from milepost.image import Layout
from milepost.manifest import Tensors
from milepost.rebuild import TensorBuilder
from milepost.state import Parts, StateEncoder
from milepost.template import is_dense
from milepost.tree import Node, path_text
from milepost.types import STATE_DICT

__all__ = [
    "CheckpointStager",
    "CheckpointStagerConfig",
    "DefaultStager",
    "StagedImage",
    "StagingPlan",
    "WriteAttempt",
    "image_of",
]

logger = logging.getLogger(__name__)

_TAIL_BYTES = 1 << 20
_LOW_PRIORITY = 10


class CheckpointStager(abc.ABC):
    """What makes a copy of a state dict, so that training may change its own."""

    @abc.abstractmethod
    def stage(self, state_dict: STATE_DICT, **kwargs: Any) -> STATE_DICT | Future[STATE_DICT]:
        """A copy of the state dict, or a future of one; until that is done the original must not change."""

    @abc.abstractmethod
    def close(self) -> None:
        """Release everything."""


@dataclass(frozen=True)
class StagingPlan:
    """What staging a state dict takes.

    Attributes:
        arena_bytes: Shared memory for one save in flight.
        tensor_bytes: Bytes of the tensors' memory, each shared byte once.
        tensors: How many tensors.
        available_bytes: What this machine and control group have left; None if unknown.
    """

    arena_bytes: int
    tensor_bytes: int
    tensors: int
    available_bytes: int | None

    @property
    def fits(self) -> bool:
        """Whether the memory that is left is enough for one more arena."""
        return self.available_bytes is None or self.arena_bytes <= self.available_bytes


@dataclass
class WriteAttempt:
    """An attempt that survives the loss of its writer.

    Attributes:
        id: The attempt's id.
        met: Its barrier has been executed.
    """

    id: str
    met: bool = False


@dataclass
class StagedImage:
    """A state dict staged into an arena: all that the checkpoint process needs to write it.

    Attributes:
        arena: Holds the records, each at its place in the file.
        tree: The tree for the index.
        layout: Where the records lie.
        tensors: The tensor columns.
        objects: The bytes of the records that are no tensors.
        outline: The staged state dict's keys and leaves, to recognise it.
        attempts: What it is being written as, by path; a fresh writer goes on with it.
    """

    arena: Arena
    tree: Node
    layout: Layout
    tensors: Tensors
    objects: list[bytes]
    outline: list[Any]
    attempts: dict[str, WriteAttempt] = field(default_factory=dict)


def image_of(state_dict: STATE_DICT) -> StagedImage | None:
    """The image behind a staged state dict, if each of its leaves is the very object that was staged."""
    for leaf in _walk(state_dict):
        image: StagedImage | None = getattr(leaf, _IMAGE, None) if isinstance(leaf, torch.Tensor) else None
        if image is not None:
            outline = _outline(state_dict)
            same = len(outline) == len(image.outline) and all(map(_same, outline, image.outline))
            return image if same else None
    return None


_IMAGE = "_milepost_image"
_PLAIN = (str, int, float, bool, type(None), bytes)


def _outline(state_dict: Any) -> list[Any]:
    """Keys, plain values and the types of containers as they are; of anything else, which object it is."""
    return [
        item if type(item) in _PLAIN or isinstance(item, type) else id(item) for item in _walk(state_dict)
    ]


def _same(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and (one == other or one != one))  # noqa: PLR0124 - NaN


def _walk(value: Any) -> Iterator[Any]:
    """Every key and leaf of nested dicts, lists and tuples, and the types of these, in order."""
    stack = [value]
    while stack:
        item = stack.pop()
        kind = type(item)
        if isinstance(item, dict):
            yield kind
            yield from item
            stack += reversed(item.values())
        elif kind is list or kind is tuple:
            yield kind
            stack += reversed(item)
        else:
            yield item


class DefaultStager(CheckpointStager):
    """Stages into arenas of shared memory, which are reused from save to save.

    Args:
        config: Options; the defaults are what this machine can do.
        available: Tells how many bytes of memory are left, None if unknown; for tests.
    """

    def __init__(
        self,
        config: CheckpointStagerConfig | None = None,
        *,
        available: Callable[[], int | None] = available_bytes,
    ) -> None:
        self._config = config or CheckpointStagerConfig()
        if self._config.use_non_blocking_copy and not torch.accelerator.is_available():
            raise AssertionError(
                "use_non_blocking_copy=True needs an accelerator, and there is none: leave it out here"
            )
        self._available = available
        self._encoder = StateEncoder()
        self._slots: list[_Slot] = []
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._background: list[threading.Thread] = []
        self._owner = os.getpid()
        self._closed = False

    def stage(self, state_dict: STATE_DICT, **kwargs: Any) -> STATE_DICT | Future[STATE_DICT]:  # noqa: ARG002
        """Copy a state dict into an arena.

        All values but tensors are taken before this returns. With ``use_async_staging`` the tensors are
        copied by a thread, and a future is returned: until it is done the tensors must not change (if
        their version counters tell that they did, the future fails). Otherwise they are copied on return.

        Args:
            state_dict: What to copy; CPU tensors are copied too, never referenced.
            kwargs: Accepted and ignored.

        Raises:
            StateError: It cannot be saved; nothing was copied.
            LowMemoryError: A new arena would not fit into memory; nothing was allocated.
            ClosedError: The stager was closed.
        """
        with self._lock:
            self._check_open()
            parts = self._encoder.take_apart(state_dict)
            slot = self._free_slot(parts)
            slot.busy = True
            if not self._config.use_async_staging:
                return slot.fill(parts)[0]
            versions = [tensor._version for tensor in parts.walk.tensors]  # noqa: SLF001 - torch's own alarm
            if self._pool is None:
                self._pool = ThreadPoolExecutor(1, "milepost-stage")
            return self._pool.submit(self._fill_later, slot, parts, versions)

    def stage_image(self, state_dict: STATE_DICT) -> tuple[STATE_DICT, StagedImage]:
        """As `stage`, at once, and with the image behind the result."""
        with self._lock:
            self._check_open()
            parts = self._encoder.take_apart(state_dict)
            slot = self._free_slot(parts)
            slot.busy = True
            return slot.fill(parts)

    def prepare(self, state_dict: STATE_DICT) -> None:
        """Get an arena for such a state dict ready in the background, so that the first save is not slower.

        Returns at once. `wait_prepared` waits for it.
        """
        with self._lock:
            self._check_open()
            parts = self._encoder.take_apart(state_dict)
            slot = self._free_slot(parts)
            slot.views(parts)
            self._populate(slot.arena)

    def wait_prepared(self, timeout_seconds: float | None = None) -> bool:
        """Wait until what `prepare` began is done; False when the time ran out before."""
        for thread in list(self._background):
            thread.join(timeout_seconds)
        return not any(thread.is_alive() for thread in self._background)

    def plan(self, state_dict: STATE_DICT) -> StagingPlan:
        """What staging this state dict takes; nothing is allocated."""
        with self._lock:
            parts = self._encoder.take_apart(state_dict)
        layout = parts.plan.layout
        return StagingPlan(
            arena_bytes=_arena_bytes(parts),
            tensor_bytes=sum(layout.lengths),
            tensors=len(parts.walk.tensors),
            available_bytes=self._available(),
        )

    def close(self) -> None:
        """Wait for copies that are under way and release the arenas; idempotent."""
        if self._owner != os.getpid():
            return
        self._closed = True
        if self._pool is not None:
            self._pool.shutdown()
        self.wait_prepared()
        with self._lock:
            for slot in self._slots:
                slot.close()
            self._slots = []

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the stager is closed", hint="make a new one")

    def _fill_later(self, slot: _Slot, parts: Parts, versions: list[int]) -> STATE_DICT:
        staged, _ = slot.fill(parts)
        for number, (tensor, version) in enumerate(zip(parts.walk.tensors, versions, strict=True)):
            if tensor._version != version:  # noqa: SLF001 - as above
                raise StateError(
                    "a tensor changed while it was being staged: this save would mix old and new values",
                    key=path_text(parts.walk.paths[number]),
                    phase="stage",
                    hint="checkpointer.guard(optimizer), or checkpointer.wait_staged() before the update",
                )
        return staged

    def _free_slot(self, parts: Parts) -> _Slot:
        """An arena that nobody uses and that is large enough, or a new one if it fits into memory."""
        need = _arena_bytes(parts)
        free = [slot for slot in self._slots if slot.is_free()]
        self._slots = [slot for slot in self._slots if slot in free or not slot.is_abandoned()]
        slot = max(free, key=lambda slot: slot.arena.size, default=None)
        missing = need - (slot.arena.size if slot else 0)
        if missing > 0:
            left = self._available()
            if left is not None and missing > left:
                raise LowMemoryError(
                    f"staging needs {missing:,} more bytes of memory, {left:,} are left",
                    phase="stage",
                    hint='on_low_memory="sync" saves without staging; fewer saves in flight need less',
                )
        if slot is None:
            slot = _Slot(Arena(need), pin=self._config.use_pinned_memory)
            self._slots.append(slot)
            if len(self._slots) == 1 and not self._background:
                logger.debug("made an arena of %d bytes", need)
        elif missing > 0:
            slot.grow(need)
        return slot

    def _populate(self, arena: Arena) -> None:
        def work() -> None:
            if hasattr(os, "setpriority") and sys.platform == "linux":
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOW_PRIORITY)
            arena.populate()

        self._background = [thread for thread in self._background if thread.is_alive()]
        thread = threading.Thread(target=work, name="milepost-populate", daemon=True)
        self._background.append(thread)
        thread.start()


def _arena_bytes(parts: Parts) -> int:
    """The size of the image, with room for its tail."""
    layout = parts.plan.layout
    objects = sum(len(data) + 512 for data in parts.walk.objects)
    per_tensor = 512 * len(parts.walk.tensors)  # data.pkl and the central directory
    return layout.end + objects + per_tensor + _TAIL_BYTES


class _Slot:
    """An arena, and the tensors that show the records of one layout in it."""

    def __init__(self, arena: Arena, *, pin: bool | None) -> None:
        self.arena = arena
        self.busy = False
        self.image: StagedImage | None = None
        self._plan: Any = None
        self._values: list[Any] = []
        self._copies: list[tuple[int, torch.Tensor]] = []
        self._raw: list[int] = []
        self._storages: list[torch.UntypedStorage] = []
        self._baseline: list[int] = []
        self._pin = pin if pin is not None else torch.cuda.is_available()
        self._unpin: Callable[[], object] | None = None
        self._pin_arena()

    def _pin_arena(self) -> None:
        address = syscalls.address_of(self.arena.view)
        if self._pin and address is not None:
            self._unpin = accelerator.pin(self, address, self.arena.size)

    def _release_pin(self) -> None:
        if self._unpin is not None:
            self._unpin()
            self._unpin = None

    def grow(self, size: int) -> None:
        """Make the arena larger; the views of before are dropped."""
        self._drop()
        self._release_pin()
        self.arena.grow(size)
        self._pin_arena()

    def is_free(self) -> bool:
        """Whether no copy is under way and nobody holds a view of the arena."""
        return not self.busy and self._uses() == self._baseline

    def is_abandoned(self) -> bool:
        """Whether it was not free for a reason other than a save that is under way: somebody kept a view."""
        return not self.busy and (self.image is None or not self.image.attempts)

    def _uses(self) -> list[int]:
        """How often each view, and each storage below them, is referred to."""
        counts = list(map(sys.getrefcount, self._values))
        count = getattr(torch._C, "_storage_Use_Count", None)  # noqa: SLF001 - no public way to ask
        if count is not None:
            counts += [count(storage._cdata) for storage in self._storages]  # noqa: SLF001
        return counts

    def views(self, parts: Parts) -> list[Any]:
        """Tensors over the arena for this layout, kept until the layout changes."""
        plan = parts.plan
        if self._plan is plan:
            return self._values
        self._drop()
        layout, memory = plan.layout, self.arena.view
        self._storages = [
            torch.frombuffer(memory[offset : offset + length], dtype=torch.uint8).untyped_storage()
            if length
            else torch.empty(0, dtype=torch.uint8).untyped_storage()
            for offset, length in zip(layout.offsets, layout.lengths, strict=True)
        ]
        builder = TensorBuilder(plan.tensors, self._storages.__getitem__, lambda _: b"")
        self._values = [builder.value(number) for number in range(len(plan.tensors.record))]
        self._copies, self._raw = [], []
        for record, (number, _) in enumerate(plan.firsts):
            view = builder.tensor(number)
            whole = view.nbytes == layout.lengths[record] and is_dense(view)
            if whole and not view.is_conj() and not view.is_neg():
                self._copies.append((number, view))
            elif layout.lengths[record]:
                self._raw.append(record)
        del builder
        self._plan = plan
        self._baseline = self._uses()
        return self._values

    def fill(self, parts: Parts) -> tuple[STATE_DICT, StagedImage]:
        """Copy every record to its place; returns the state dict of views, and the image. Ends `busy`."""
        try:
            return self._fill(parts)
        finally:
            self.busy = False

    def _fill(self, parts: Parts) -> tuple[STATE_DICT, StagedImage]:
        values = self.views(parts)
        tensors = parts.walk.tensors
        copy_tensors(
            [view for _, view in self._copies],
            [tensors[number] for number, _ in self._copies],
            pinned=self._unpin is not None,
        )
        address = syscalls.address_of(self.arena.view)
        if self._raw and address is not None:
            copy, layout = parts.copier(), parts.plan.layout
            for record in self._raw:
                copy(record, 0, layout.lengths[record], address + layout.offsets[record])
        staged: STATE_DICT = parts.rebuild(values.__getitem__)
        self.image = StagedImage(
            self.arena,
            parts.tree,
            parts.plan.layout,
            parts.plan.tensors,
            parts.walk.objects,
            _outline(staged),
        )
        for value in values:
            if isinstance(value, torch.Tensor):
                setattr(value, _IMAGE, self.image)
                break
        return staged, self.image

    def _drop(self) -> None:
        self._plan, self._values, self._copies, self._raw = None, [], [], []
        self._storages, self._baseline = [], []

    def close(self) -> None:
        """Let go of the arena; views that somebody holds keep its memory."""
        self._drop()
        self._release_pin()
        self.arena.close()
