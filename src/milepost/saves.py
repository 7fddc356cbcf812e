"""Saves under way: their futures, with figures, and what becomes of them when nobody waits."""

from __future__ import annotations

import logging
import os
import time
import warnings
from dataclasses import dataclass
from typing import Any

from milepost.utils import TrackedFuture

__all__ = ["Save", "SaveFuture", "finish_abandoned"]

logger = logging.getLogger(__name__)


class SaveFuture(TrackedFuture[None]):
    """The future of a part of a save, with figures.

    Attributes:
        path: The checkpoint's path, as it was given.
        step: The step that was given.
        skipped: Nothing was saved, as too many saves were under way.
        started_at: When `save` was called: seconds, as ``time.monotonic``.
        finished_at: When the part was done, or None.
        bytes_done: Bytes staged or written so far.
    """

    def __init__(self, path: str, step: Any, started_at: float) -> None:
        super().__init__()
        self.path = path
        self.step = step
        self.skipped = False
        self.started_at = started_at
        self.finished_at: float | None = None
        self.bytes_done = 0

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


def finish_abandoned(process: Any, stager: Any, saves: list[Save], owner: int) -> None:
    """An unclosed checkpointer was collected, or the interpreter ends: finish what was accepted."""
    if owner != os.getpid():
        return
    warnings.warn(
        f"an AsyncCheckpointer was not closed, {len(saves)} saves are under way: they are finished now",
        ResourceWarning,
        stacklevel=2,
    )
    try:
        process.close()
        stager.close()
    except Exception:
        logger.exception("a save failed that nobody waited for")
