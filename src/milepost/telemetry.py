"""Events of saves, for observers: progress lines, logs, your own metrics. No global state."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Protocol, Self

__all__ = ["Event", "LoggingObserver", "Observer", "ProgressObserver", "notify"]

_logger = logging.getLogger(__name__)

Kind = Literal["staging", "staged", "writing", "written", "committed", "failed", "skipped", "low_memory"]


@dataclass(frozen=True)
class Event:
    """An event of one save.

    Attributes:
        kind: "staging" (it began), "staged" (the training may change its state), "writing" (more bytes are
            written), "committed", "written" (this rank's part is written; the ranks do not meet, so it is
            not known to be committed), "failed", "skipped" (busy), "low_memory" (saved without staging).
        path: The path that `save` got.
        step: The step that `save` got.
        seconds: Time since the call of `save`, in seconds.
        bytes_done: Bytes written so far. For "staged": bytes of the staged state.
        size_bytes: Bytes of the file, 0 while unknown.
        error: Why it failed.

    Examples:
        >>> from milepost.telemetry import Event
        >>> event = Event("committed", "run/step-100", step=100, seconds=0.5)
        >>> f"{event.path} {event.kind} after {event.seconds} s"
        'run/step-100 committed after 0.5 s'
    """

    kind: Kind
    path: str
    step: int | None = None
    seconds: float = 0.0
    bytes_done: int = 0
    size_bytes: int = 0
    error: BaseException | None = None


class Observer(Protocol):
    """An object that receives events. It is called from any thread, and must not block for long.

    Examples:
        >>> import milepost
        >>> class Committed:
        ...     def on_event(self, event):
        ...         if event.kind == "committed":
        ...             print("committed", event.step)
        >>> config = milepost.CheckpointerConfig(async_config=milepost.AsyncConfig(observers=[Committed()]))
    """

    def on_event(self, event: Event) -> None:
        """Called for each event. Its errors are logged and ignored."""


def notify(observers: list[Observer], event: Event) -> None:
    """Send an event to every observer. Log the error of an observer that fails, and continue.

    Examples:
        >>> from milepost.telemetry import Event, notify
        >>> class Printer:
        ...     def on_event(self, event):
        ...         print(event.kind, event.path)
        >>> notify([Printer()], Event("committed", "run/step-100"))
        committed run/step-100
    """
    for observer in observers:
        try:
            observer.on_event(event)
        except Exception:
            _logger.exception("an observer failed")


class LoggingObserver:
    """Logs staged, committed and failed saves.

    Args:
        logger: Gets the lines. Defaults to Milepost's logger.

    Examples:
        >>> import milepost
        >>> from milepost.telemetry import LoggingObserver
        >>> options = milepost.AsyncConfig(observers=[LoggingObserver()])
        >>> config = milepost.CheckpointerConfig(async_config=options)
    """

    def __init__(self, logger: logging.Logger | None = None) -> None:
        self._logger = logger or _logger

    def on_event(self, event: Event) -> None:
        """Log one line for an event that is worth it."""
        if event.kind == "failed":
            self._logger.error("%s failed after %.2f s: %s", event.path, event.seconds, event.error)
        elif event.kind == "low_memory":
            self._logger.warning("%s is saved without staging: memory is low", event.path)
        elif event.kind in ("staged", "written", "committed", "skipped"):
            self._logger.info(
                "%s %s after %.2f s, %.1f MiB",
                event.path,
                event.kind,
                event.seconds,
                event.bytes_done / 2**20,
            )


class ProgressObserver:
    """Shows one progress line for each running save on standard error. A context manager. Needs rich.

    Examples:
        >>> from milepost.telemetry import Event, ProgressObserver
        >>> with ProgressObserver() as observer:
        ...     observer.on_event(Event("committed", "run/step-100"))
    """

    def __init__(self) -> None:
        from rich.console import Console  # noqa: PLC0415 - only who shows progress needs rich
        from rich.progress import (  # noqa: PLC0415
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TransferSpeedColumn,
        )

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            console=Console(stderr=True),
        )
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Self:
        """Start showing."""
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last state on the screen."""
        self._progress.stop()

    def on_event(self, event: Event) -> None:
        """Move the line of the event's save."""
        if event.path not in self._tasks:
            self._tasks[event.path] = self._progress.add_task(event.path, total=None)
        task = self._tasks[event.path]
        self._progress.update(task, description=f"{event.path} {event.kind}")
        if event.size_bytes:
            self._progress.update(task, completed=event.bytes_done, total=event.size_bytes)
        if event.kind in ("written", "committed", "failed", "skipped"):
            self._progress.stop_task(task)
            del self._tasks[event.path]
