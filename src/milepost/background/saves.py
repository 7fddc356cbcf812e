"""Saves under way: their futures, with figures, and what becomes of them when nobody waits."""

from __future__ import annotations

import logging
import os
import time
import warnings
import weakref
from concurrent.futures import wait
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from milepost.background.futures import Failures, TrackedFuture

__all__ = ["GUARD_ADVICE", "Save", "SaveFuture", "drain", "finish_abandoned", "guard_steps"]

logger = logging.getLogger(__name__)

GUARD_ADVICE = (
    "the state is copied while the training goes on: call checkpointer.guard(optimizer) once, or "
    "checkpointer.wait_staged() before each update"
)


class SaveFuture(TrackedFuture[None]):
    """The future of a part of a save, with figures.

    Attributes:
        path: The checkpoint's path, as it was given.
        step: The step that was given.
        skipped: Nothing was saved, as too many saves were under way.
        started_at: When `save` was called: seconds, as ``time.monotonic``.
        finished_at: When the part was done, or None.
        written_at: When the data file was durable, as far as the writer told; of the write alone.
        bytes_done: Bytes staged or written so far.
        committed: True when the checkpoint is known to be committed; None while it is not. It stays None
            where several ranks do not meet: this rank's part is written, and others may still fail.

    Nobody can cancel it: what was accepted is carried out.
    """

    def __init__(self, path: str, step: Any, started_at: float) -> None:
        super().__init__()
        self.set_running_or_notify_cancel()
        self.path = path
        self.step = step
        self.skipped = False
        self.started_at = started_at
        self.finished_at: float | None = None
        self.written_at: float | None = None
        self.bytes_done = 0
        self.committed: bool | None = None

    def skip(self) -> None:
        """Be done, with nothing saved."""
        self.skipped = True
        self.finished_at = time.monotonic()
        self.set_result(None)

    @property
    def seconds(self) -> float:
        """How long the part took, or has taken so far."""
        return (self.finished_at or time.monotonic()) - self.started_at


@dataclass
class Save:
    """One save under way."""

    target: str
    staged: Any
    arguments: dict[str, Any]
    stage_future: SaveFuture
    write_future: SaveFuture
    retries: int


def guard_steps(optimizer: Any, checkpointer: weakref.ref[Any]) -> Any:
    """Have an optimizer call ``wait_staged`` before each step, as long as there is a checkpointer."""

    def wait_staged(*_: Any) -> None:
        found = checkpointer()
        if found is not None:
            found.wait_staged()

    return optimizer.register_step_pre_hook(wait_staged)


def drain(process: Any, saves: list[Save]) -> None:
    """Wait for the saves under way, so that a lost writer is still replaced, as long as they get on."""
    stalled = getattr(process, "stalled", lambda: False)
    while saves and not stalled():
        wait([save.write_future for save in saves], 0.05)


def finish_abandoned(process: Any, stager: Any, saves: list[Save], failures: Failures, owner: int) -> None:
    """An unclosed checkpointer was collected, or the interpreter ends: finish what was accepted."""
    if owner != os.getpid():
        return
    with ExitStack() as stack:  # the warning may be an error, and nothing may be left open
        stack.callback(_log_unseen, failures)
        stack.callback(_close, stager)
        stack.callback(_close, process)
        stack.callback(drain, process, saves)
        warnings.warn(
            f"an AsyncCheckpointer was not closed, {len(saves)} saves are under way: they are finished now",
            ResourceWarning,
            stacklevel=2,
        )


def _close(part: Any) -> None:
    try:
        part.close()
    except Exception:
        logger.exception("a checkpointer that was not closed could not be closed either")


def _log_unseen(failures: Failures) -> None:
    for future in failures.unseen():
        path = getattr(future, "path", "")
        logger.error("%s was not saved, and nobody has looked: %s", path, future.exception())
