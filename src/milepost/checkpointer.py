"""The checkpointers: what a training loop holds, with save, load and close."""

from __future__ import annotations

import abc
import logging
import os
import threading
import time
import weakref
from concurrent.futures import CancelledError, Future, wait
from contextlib import ExitStack, suppress
from typing import Any, Self

from milepost.background.futures import Failures
from milepost.background.saves import GUARD_ADVICE, Save, SaveFuture, drain, finish_abandoned, guard_steps
from milepost.background.staged import staged_bytes
from milepost.checkpoint_process import CheckpointProcess, WriteFuture
from milepost.checkpoint_reader import CheckpointReader, load_with
from milepost.checkpoint_writer import CheckpointWriter
from milepost.config import AsyncConfig
from milepost.errors import AbortedError, ClosedError, ConfigError, LostWriterError, LowMemoryError
from milepost.staging import CheckpointStager, StagingPlan
from milepost.telemetry import Event, Kind, notify
from milepost.types import STATE_DICT
from milepost.utils import OwnedByProcess

__all__ = ["AsyncCheckpointer", "Checkpointer", "SaveFuture", "SyncCheckpointer"]

logger = logging.getLogger(__name__)


class Checkpointer(abc.ABC):
    """Saves and loads training state. Usable as a context manager, which closes it."""

    def __enter__(self) -> Self:
        """The checkpointer itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    @abc.abstractmethod
    def save(self, path: str, state_dict: STATE_DICT, **kwargs: Any) -> Any:
        """Save a state dict as the checkpoint at `path`; what holds on return is up to the subclass."""

    @abc.abstractmethod
    def load(
        self,
        path: str,
        state_dict: STATE_DICT | None = None,
        *,
        default_map_location: Any = None,
        strict: bool = False,
        **kwargs: Any,
    ) -> STATE_DICT:
        """Load the checkpoint at `path`, into `state_dict` if one is given."""

    @abc.abstractmethod
    def close(self) -> None:
        """Finish what was accepted and release everything."""


class SyncCheckpointer(Checkpointer):
    """Saves while the caller waits. Usable as a context manager.

    Args:
        writer: Writes this rank's part.
        reader: Reads it.
    """

    def __init__(self, writer: CheckpointWriter, reader: CheckpointReader) -> None:
        self._writer = writer
        self._reader = reader
        self._closed = False

    def save(self, path: str, state_dict: STATE_DICT, **kwargs: Any) -> None:
        """Save a state dict; see `CheckpointWriter.write` for arguments, guarantees and errors.

        On return the checkpoint is durable and, unless other ranks are still to come and no barrier is
        configured, committed. If it raises, `path` is as it was.
        """
        self._check_open()
        result: object = self._writer.write(path, state_dict, **kwargs)  # type: ignore[func-returns-value]
        if isinstance(result, Future):  # a writer of the user's own may work in the background
            result.result()

    def load(
        self,
        path: str,
        state_dict: STATE_DICT | None = None,
        *,
        default_map_location: Any = None,
        strict: bool = False,
        **kwargs: Any,
    ) -> STATE_DICT:
        """Load what this rank saved at `path`; see `CheckpointReader.read` for guarantees and errors.

        Args:
            path: The checkpoint's folder.
            state_dict: A template, whose tensors are filled in place; None to get all that was saved.
            default_map_location: Where new tensors go, as ``map_location`` of ``torch.load``.
            strict: Refuse, before anything is changed, keys of the template that were not saved.
            kwargs: Passed to the reader: ``verify`` = True, False or "first".

        Returns:
            The template, filled; or the state dict that was saved.

        Raises:
            MismatchError: Does not fit, or (if strict) "… missing keys …"; nothing was changed.
        """
        self._check_open()
        return load_with(
            self._reader, path, state_dict, map_location=default_map_location, strict=strict, options=kwargs
        )

    def close(self) -> None:
        """Release the writer; idempotent. Later calls raise `ClosedError`."""
        self._closed = True
        self._writer.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the checkpointer is closed", hint="make a new one")


class AsyncCheckpointer(OwnedByProcess, Checkpointer):
    """Saves beside the training, in a process of their own. Usable as a context manager.

    Args:
        checkpoint_stager: Makes the copy that is written.
        checkpoint_process: Writes it.
        reader: Loads.
        config: How many saves may be under way, and what to do when something fails.
        fallback: Writes while the caller waits, when memory does not suffice for staging; None to raise.
    """

    def __init__(
        self,
        checkpoint_stager: CheckpointStager,
        checkpoint_process: CheckpointProcess,
        reader: CheckpointReader,
        *,
        config: AsyncConfig | None = None,
        fallback: CheckpointWriter | None = None,
    ) -> None:
        self._stager = checkpoint_stager
        self._process = checkpoint_process
        self._reader = reader
        self._config = config or AsyncConfig()
        self._fallback = fallback
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._saves: list[Save] = []
        self._failures = Failures()
        self._guards: list[Any] = []
        self._warned = False
        self._closed = False
        self._finalizer = weakref.finalize(
            self,
            finish_abandoned,
            checkpoint_process,
            checkpoint_stager,
            self._saves,
            self._failures,
            self._owner,
        )

    # -- saving ------------------------------------------------------------------------------------

    def save(self, path: str, state_dict: STATE_DICT, **kwargs: Any) -> tuple[SaveFuture, SaveFuture]:
        """Save a state dict in the background.

        On return all values but tensors are taken, and (unless staging is asynchronous) the tensors are
        copied: the state may change. The save goes on if this process dies from then on. Waits while
        ``max_in_flight`` saves are under way.

        Args:
            path: As for `CheckpointWriter.write`.
            state_dict: What to save.
            kwargs: Passed to the hooks; ``step`` and ``metadata`` are also recorded.

        Returns:
            Two futures of None: the first is done when the state may change, the second when the checkpoint
            is committed and durable. Their figures are those of `SaveFuture`.

        Raises:
            Exception: An earlier save failed and nobody has looked at that: it is raised here, once, and
                nothing was staged; call again to save. With several ranks this call counts as a save, of
                which the others are told: go on with the next one on all ranks. What failed because another
                rank did is a warning in the log instead.
            StateError: The state dict cannot be saved.
            TargetError: The path may not be written to or replaced.
            ConfigError: Asynchronous staging without a guard, and ``require_guard``.
        """
        self._check_open()
        self._hear_of_earlier()
        started = time.monotonic()
        step = kwargs.get("step")
        stage_future, write_future = SaveFuture(path, step, started), SaveFuture(path, step, started)
        try:
            self._raise_unseen(aborted=False)
            self._check_guard()
            its_turn = self._wait_for_turn()
            self._raise_unseen(aborted=False)
        except BaseException as error:
            self._give_up(path, error)
            raise
        if not its_turn:
            stage_future.skip()
            write_future.skip()
            self._tell("skipped", write_future)
            return stage_future, write_future
        save = Save(os.path.abspath(path), None, kwargs, stage_future, write_future, self._config.retries)
        with self._lock:
            self._saves.append(save)
        try:
            self._start(save, state_dict)
        except BaseException as error:
            self._forget(save)
            write_future.finished_at = time.monotonic()
            self._tell("failed", write_future, error)
            raise
        return stage_future, write_future

    def _start(self, save: Save, state_dict: STATE_DICT) -> None:
        """Stage the state, and hand it over or have it handed over."""
        self._tell("staging", save.stage_future)
        try:
            save.staged = self._stager.stage(state_dict)
        except BaseException as error:
            if isinstance(error, LowMemoryError) and self._fallback and self._config.on_low_memory != "raise":
                logger.warning("%s: it is saved without staging", error.message)
                self._save_without_staging(save, self._fallback, state_dict)
                return
            self._give_up(save.write_future.path, error)
            raise
        if isinstance(save.staged, Future):
            save.staged.add_done_callback(lambda done: self._staged(save, done))
        else:
            self._staged(save, None)
        self._write(save)

    def _give_up(self, path: str, error: BaseException) -> None:
        if isinstance(self._process, CheckpointProcess):
            self._process.give_up(path, error)

    def _hear_of_earlier(self) -> None:
        """Keep for `close`, and log, what has failed since on another rank although it was written here."""
        for error in getattr(self._process, "failures", list)():
            logger.error("%s was not committed: %s", error.path, error)
            future = SaveFuture(error.path or "", None, time.monotonic())
            future.set_exception(error)
            self._failures.add(future)

    def _wait_for_turn(self) -> bool:
        """Wait until another save may begin; False where it is to be skipped."""
        with self._changed:
            while len(self._saves) >= self._config.max_in_flight:
                if self._config.when_busy == "skip":
                    return False
                self._changed.wait(1.0)
        return True

    def _staged(self, save: Save, done: Future[Any] | None) -> None:
        future = save.stage_future
        future.finished_at = time.monotonic()
        error = done.exception() if done is not None else None
        if error is None:
            staged = done.result() if done is not None else save.staged
            future.bytes_done = staged_bytes(staged) if isinstance(staged, dict) else 0
            self._tell("staged", future)
            future.set_result(None)
        else:
            future.seen = True  # the write's future carries the same failure
            future.set_exception(error)

    def _write(self, save: Save, lost: Future[Any] | None = None) -> None:
        path = save.write_future.path
        if isinstance(lost, WriteFuture):
            written = self._process.write_again(lost)
        else:
            written = self._process.write(save.staged, path, **save.arguments)
        written.add_done_callback(lambda done: self._written(save, done))

    def _written(self, save: Save, done: Future[Any]) -> None:
        error = CancelledError("the write was cancelled") if done.cancelled() else done.exception()
        if isinstance(error, LostWriterError) and self._config.on_failure == "retry" and save.retries > 0:
            save.retries -= 1
            logger.warning("%s: %s; writing it again with a new one", save.write_future.path, error.message)
            try:
                self._write(save, done)
            except ClosedError:
                pass  # too late to try: what was lost stays the reason
            except BaseException as again:  # noqa: BLE001 - the future carries it
                error = again
            else:
                return
        if isinstance(done, WriteFuture) and error is not None:
            self._process.abandon(done, error)
        self._finish(save, error, committed=getattr(done, "committed", error is None or None))

    def _finish(self, save: Save, error: BaseException | None, *, committed: bool | None = None) -> None:
        future = save.write_future
        future.finished_at, future.committed = time.monotonic(), committed
        warn = isinstance(error, LostWriterError) and self._config.on_failure == "warn"
        if warn or isinstance(error, AbortedError):
            logger.warning("%s was not saved: %s", future.path, error)
        if warn:
            future.seen = True
        elif error is not None:
            self._failures.add(future)
        done: Kind = "committed" if committed else "written"
        self._tell(done if error is None else "failed", future, error)
        self._forget(save)  # before the future is done: what is called then may save again
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)

    def _save_without_staging(self, save: Save, writer: CheckpointWriter, state_dict: STATE_DICT) -> None:
        """Save while the caller waits; constant memory."""
        self._tell("low_memory", save.write_future)
        self._wait_for_writes(save)
        committed = writer.carry_out(save.write_future.path, state_dict, save.arguments)
        self._staged(save, None)
        save.write_future.written_at = time.monotonic()
        self._finish(save, None, committed=committed or None)

    def _wait_for_writes(self, save: Save) -> None:
        """Wait for the saves before this one."""
        with self._changed:
            while self._saves[0] is not save:
                self._changed.wait(1.0)

    def _forget(self, save: Save) -> None:
        save.staged = None  # the arena may be used again
        with self._changed, suppress(ValueError):
            self._changed.notify_all()
            self._saves.remove(save)

    def on_progress(self, path: str, phase: str, done: int, size: int) -> None:
        """Called as a save advances."""
        with self._lock:
            future = next((save.write_future for save in self._saves if save.target == path), None)
        if future is not None and phase == "write":
            future.bytes_done = done
            self._tell("writing", future, size=size)
        elif future is not None and future.bytes_done and future.written_at is None:
            future.written_at = time.monotonic()

    def _tell(
        self, kind: Kind, future: SaveFuture, error: BaseException | None = None, size: int = 0
    ) -> None:
        step = future.step if isinstance(future.step, int) else None
        event = Event(kind, future.path, step, future.seconds, future.bytes_done, size, error)
        notify(self._config.observers, event)

    # -- the state and the training ----------------------------------------------------------------

    def prepare(self, state_dict: STATE_DICT) -> None:
        """Get memory for such a state ready in the background, so that the first save is not slower."""
        self._check_open()
        prepare = getattr(self._stager, "prepare", None)
        try:
            if prepare is not None:
                prepare(state_dict)
        except LowMemoryError as error:
            if self._fallback is None or self._config.on_low_memory == "raise":
                raise
            logger.warning("%s: saves will do without staging", error.message)

    def plan(self, state_dict: STATE_DICT) -> StagingPlan:
        """What staging such a state takes; nothing is allocated.

        Raises:
            ConfigError: The stager is not one that can tell.
        """
        plan = getattr(self._stager, "plan", None)
        if plan is None:
            raise ConfigError(f"{type(self._stager).__name__} has no plan method")
        return plan(state_dict)  # type: ignore[no-any-return]

    def wait_staged(self, timeout_seconds: float | None = None) -> None:
        """Returns when the state may change: nothing is being copied any more.

        Raises:
            TimeoutError: Not within the time.
        """
        with self._lock:
            futures = [save.stage_future for save in self._saves]
        for future in futures:
            if not future.done():
                wait([future], timeout_seconds)
                if not future.done():
                    raise TimeoutError(f"{future.path} is still being staged")

    def wait_committed(self, timeout_seconds: float | None = None) -> None:
        """Returns when every save is committed; raises the first failure that nobody has looked at."""
        with self._lock:
            futures = [save.write_future for save in self._saves]
        _, late = wait(futures, timeout_seconds)
        if late:
            raise TimeoutError(f"{len(late)} saves are still under way")
        self._raise_unseen()

    def guard(self, optimizer: Any) -> Any:
        """Make an optimizer wait, at each step, until nothing is being copied. Returns what removes it."""
        self._guards.append(guard_steps(optimizer, weakref.ref(self)))
        return self._guards[-1]

    def _check_guard(self) -> None:
        config = getattr(self._stager, "_config", None)
        if self._guards or not getattr(config, "use_async_staging", None):
            return
        if self._config.require_guard:
            raise ConfigError(f"asynchronous staging without a guard: {GUARD_ADVICE}")
        if not self._warned:
            self._warned = True
            logger.warning("%s", GUARD_ADVICE)

    # -- loading -----------------------------------------------------------------------------------

    def load(
        self,
        path: str,
        state_dict: STATE_DICT | None = None,
        *,
        default_map_location: Any = None,
        strict: bool = False,
        **kwargs: Any,
    ) -> STATE_DICT:
        """As `SyncCheckpointer.load`; waits for a save to this path that is under way."""
        self._check_open()
        target = os.path.abspath(path)
        with self._lock:
            futures = [save.write_future for save in self._saves if save.target == target]
        wait(futures)
        return load_with(
            self._reader, path, state_dict, map_location=default_map_location, strict=strict, options=kwargs
        )

    # -- ending ------------------------------------------------------------------------------------

    def close(self) -> None:
        """Finish the saves that were accepted and release everything, even when that fails. Idempotent.

        Raises:
            Exception: A save failed and nobody has looked at that.
        """
        if self._closed or not self.is_owned:
            return
        self._closed = True
        self._finalizer.detach()
        with ExitStack() as stack:
            if self._fallback is not None:
                stack.callback(self._fallback.close)
            stack.callback(self._stager.close)
            stack.callback(self._process.close)
            for guard in self._guards:
                stack.callback(guard.remove)
            drain(self._process, self._saves)
        self._hear_of_earlier()
        self._raise_unseen()

    def _check_open(self) -> None:
        self.check_owner("checkpointer")
        if self._closed:
            raise ClosedError("the checkpointer is closed", hint="make a new one")

    def _raise_unseen(self, *, aborted: bool = True) -> None:
        """Raise what failed and nobody has looked at; what failed on another rank only if asked for."""
        self._failures.raise_oldest(() if aborted else AbortedError)
