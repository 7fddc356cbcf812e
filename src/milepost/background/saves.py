"""Saves under way: their futures, with figures, and what becomes of them when nobody waits."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

from milepost.background.futures import Failures, TrackedFuture
from milepost.telemetry import Event, Kind, Observer, notify

__all__ = ["GUARD_ADVICE", "Save", "SaveFuture", "UnderWay", "drain", "finish_abandoned", "guard_steps"]

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
        self.what = f"the save to {path}" if step is None else f"the save of step {step} to {path}"
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


class UnderWay:
    """The saves of a checkpointer that are not over, and the failed ones that nobody has looked at.

    Args:
        observers: Get the event of each change.

    Attributes:
        saves: Those that are not over.
        failures: Those that failed.
    """

    def __init__(self, observers: list[Observer]) -> None:
        self.saves: list[Save] = []
        self.failures = Failures()
        self._observers = observers
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)

    def add(self, save: Save) -> None:
        """Count a save as under way."""
        with self._lock:
            self.saves.append(save)

    def remove(self, save: Save) -> None:
        """A save is over: its arena may be used again, and another save may begin."""
        save.staged = None
        with self._changed, suppress(ValueError):
            self._changed.notify_all()
            self.saves.remove(save)

    def wait_below(self, limit: int, *, skip: bool) -> bool:
        """Wait until fewer saves are under way; with `skip`, return False instead of waiting."""
        with self._changed:
            while len(self.saves) >= limit:
                if skip:
                    return False
                self._changed.wait(1.0)
        return True

    def wait_for_earlier(self, save: Save) -> None:
        """Wait until the saves before this one are over."""
        with self._changed:
            while self.saves[0] is not save:
                self._changed.wait(1.0)

    def staging(self) -> list[SaveFuture]:
        """The futures of what is being staged."""
        with self._lock:
            return [save.stage_future for save in self.saves]

    def writing(self, target: str | None = None) -> list[SaveFuture]:
        """The futures of what is being written, to this absolute path if one is given."""
        with self._lock:
            return [save.write_future for save in self.saves if target in (None, save.target)]

    def keep_failures_of(self, process: Any) -> None:
        """Log and keep what was written here, and is now known to have failed on another rank."""
        for error in getattr(process, "failures", list)():
            logger.error("%s was not committed: %s", error.path, error)
            future = SaveFuture(error.path or "", None, time.monotonic())
            future.set_exception(error)
            self.failures.add(future)

    def on_progress(self, path: str, phase: str, done: int, size: int) -> None:
        """Called as the save to an absolute path advances."""
        future = next(iter(self.writing(path)), None)
        if future is not None and phase == "write":
            future.bytes_done = done
            self.tell("writing", future, size=size)
        elif future is not None and future.bytes_done and future.written_at is None:
            future.written_at = time.monotonic()

    def tell(self, kind: Kind, future: SaveFuture, error: BaseException | None = None, size: int = 0) -> None:
        """Hand an event to the observers."""
        step = future.step if isinstance(future.step, int) else None
        event = Event(kind, future.path, step, future.seconds, future.bytes_done, size, error)
        notify(self._observers, event)


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


def finish_abandoned(process: Any, stager: Any, under_way: UnderWay, owner: int) -> None:
    """An unclosed checkpointer was collected, or the interpreter ends: finish what was accepted."""
    if owner != os.getpid():
        return
    with ExitStack() as stack:  # the warning may be an error, and nothing may be left open
        stack.callback(_log_unseen, under_way.failures)
        stack.callback(_close, stager)
        stack.callback(_close, process)
        stack.callback(drain, process, under_way.saves)
        count = len(under_way.saves)
        warnings.warn(
            f"an AsyncCheckpointer was not closed, {count} saves are under way: they are finished now",
            ResourceWarning,
            stacklevel=2,
        )


def _close(part: Any) -> None:
    try:
        part.close()
    except Exception:
        logger.exception("a checkpointer that was not closed could not be closed either")


def _log_unseen(failures: Failures) -> None:
    """Log the failures that nobody has looked at. If the interpreter ends, it ends with exit code 1."""
    failed = failures.unseen()
    for future in failed:
        path = getattr(future, "path", "")
        logger.error("%s was not saved, and nobody has looked: %s", path, future.exception())
    if failed and not threading.main_thread().is_alive():
        setattr(sys, "_milepost_failed", _FailsAtExit())  # noqa: B010 - sys has no such attribute


class _FailsAtExit:
    """Ends the process with exit code 1 when the interpreter clears `sys`, after all other work at exit.

    An exception of a function that runs at exit would not change the exit code.
    """

    def __del__(self, end: Callable[[int], None] = os._exit) -> None:
        end(1)
