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
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from milepost.background.arena import Arena, available_bytes
from milepost.background.slot import Copy, Slot, arena_bytes
from milepost.background.staged import SharedRecords, StagedImage
from milepost.config import CheckpointStagerConfig
from milepost.errors import ClosedError, LowMemoryError, StateError, UnavailableError
from milepost.format.paths import path_text
from milepost.state.encode import Parts, StateEncoder
from milepost.types import STATE_DICT
from milepost.utils import OwnedByProcess, gc_paused

__all__ = [
    "CheckpointStager",
    "CheckpointStagerConfig",
    "DefaultStager",
    "StagingPlan",
]

logger = logging.getLogger(__name__)

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


class DefaultStager(OwnedByProcess, CheckpointStager):
    """Stages into arenas of shared memory, which are reused from save to save.

    Args:
        config: Options; the defaults are what this machine can do.
        available: Tells how many bytes of memory are left, None if unknown; for tests.
        encoder: Takes the states apart; it knows which of several ranks this is, and what is replicated.
    """

    def __init__(
        self,
        config: CheckpointStagerConfig | None = None,
        *,
        available: Callable[[], int | None] = available_bytes,
        encoder: StateEncoder | None = None,
    ) -> None:
        self._config = config or CheckpointStagerConfig()
        if self._config.use_non_blocking_copy and not torch.accelerator.is_available():
            raise UnavailableError(
                "use_non_blocking_copy=True needs an accelerator, and there is none", hint="leave it out here"
            )
        self._available = available
        self._encoder = encoder or StateEncoder()
        self._slots: list[Slot] = []
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._background: list[threading.Thread] = []
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
        with self._lock, gc_paused():
            self._check_open()
            parts = self._encoder.take_apart(state_dict)
            slot = self._free_slot(parts)
            slot.busy = True
            if not self._config.use_async_staging:
                return slot.fill(parts)[0]
            if self._pool is None:
                self._pool = ThreadPoolExecutor(1, "milepost-stage")
            try:
                return self._pool.submit(
                    self._fill_later, slot, parts, _versions(parts.sources), parts.copier()
                )
            except BaseException:
                slot.busy = False
                raise

    def stage_image(
        self,
        state_dict: STATE_DICT,
        *,
        leave_shared: bool = False,
    ) -> tuple[STATE_DICT, StagedImage]:
        """As `stage`, at once, and with the image behind the result.

        Args:
            state_dict: What to copy.
            leave_shared: Do not copy what lies in memory that another process can map: see the image's
                `shared`.
        """
        with self._lock:
            self._check_open()
            parts = self._encoder.take_apart(state_dict)
            slot = self._free_slot(parts)
            slot.busy = True
            shared = SharedRecords.of(parts) if leave_shared else SharedRecords()
            return slot.fill(parts, shared)

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
            arena_bytes=arena_bytes(parts),
            tensor_bytes=sum(layout.lengths),
            tensors=len(parts.walk.tensors),
            available_bytes=self._available(),
        )

    def close(self) -> None:
        """Wait for copies that are under way and release the arenas; idempotent."""
        if not self.is_owned:
            return
        self._closed = True
        if self._pool is not None:
            self._pool.shutdown()
        with self._lock:
            for slot in self._slots:
                slot.arena.stop_populating()
        self.wait_prepared()
        with self._lock:
            for slot in self._slots:
                slot.close()
            self._slots = []

    def _check_open(self) -> None:
        self.check_owner("stager")
        if self._closed:
            raise ClosedError("the stager is closed", hint="make a new one")

    def _fill_later(self, slot: Slot, parts: Parts, versions: list[int], copy: Copy) -> STATE_DICT:
        staged, _ = slot.fill(parts, copy=copy)
        after = _versions(parts.sources)
        if after == versions:
            return staged
        del staged  # the error's traceback would keep the arena from being used again
        changed = next(
            number for number, pair in enumerate(zip(versions, after, strict=True)) if pair[0] != pair[1]
        )
        raise StateError(
            "a tensor changed while it was being staged: this save would mix old and new values",
            key=path_text(parts.walk.paths[changed]),
            phase="stage",
            hint="checkpointer.guard(optimizer), or checkpointer.wait_staged() before the update",
        )

    def _free_slot(self, parts: Parts) -> Slot:
        """An arena that nobody uses and that is large enough, or a new one if it fits into memory."""
        need = arena_bytes(parts)
        free = [slot for slot in self._slots if slot.is_free()]
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
        if slot is not None and missing > 0:
            try:
                slot.grow(need)
            except LowMemoryError:  # it may lie where there is no more room; a new one may lie elsewhere
                self._slots.remove(slot)
                slot.close()
                slot = None
        if slot is None:
            slot = Slot(Arena(need), pin=self._config.use_pinned_memory)
            self._slots.append(slot)
            if len(self._slots) == 1 and not self._background:
                logger.debug("made an arena of %d bytes", need)
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


def _versions(tensors: list[torch.Tensor]) -> list[int]:
    """Torch's counters of changes; -1 for inference tensors, which have none."""
    return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]  # noqa: SLF001
