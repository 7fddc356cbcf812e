"""The checkpointers: what a training loop holds, with save, load and close."""

from __future__ import annotations

import abc
import difflib
import logging
import os
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, wait
from contextlib import ExitStack
from typing import Any, Literal, Self, SupportsIndex

from milepost.background.saves import (
    GUARD_ADVICE,
    Save,
    SaveFuture,
    UnderWay,
    drain,
    finish_abandoned,
    guard_steps,
)
from milepost.background.staged import staged_bytes
from milepost.checkpoint_process import CheckpointProcess, WriteFuture
from milepost.checkpoint_reader import CheckpointReader, load_with
from milepost.checkpoint_writer import CheckpointWriter
from milepost.commit import given_path
from milepost.config import AsyncConfig
from milepost.errors import (
    AbortedError,
    CheckpointNotFoundError,
    ClosedError,
    ConfigError,
    LostWriterError,
    LowMemoryError,
    UnknownArgumentError,
)
from milepost.staging import CheckpointStager, DefaultStager, StagingPlan
from milepost.telemetry import Kind
from milepost.types import STATE_DICT, StrPath
from milepost.utils import OwnedByProcess

__all__ = ["AsyncCheckpointer", "Checkpointer", "SaveFuture", "SyncCheckpointer"]

logger = logging.getLogger(__name__)


class Checkpointer(abc.ABC):
    """Saves and loads training state. As a context manager, it closes itself at the end of the block."""

    def __enter__(self) -> Self:
        """The checkpointer itself."""
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Close it. If the block raised, that error stays: what `close` raises becomes a note on it."""
        try:
            self.close()
        except Exception as failure:
            if error is None or (isinstance(error, SystemExit) and not error.code):
                raise
            logger.exception("the checkpointer could not be closed without a failure")
            error.add_note(f"The checkpointer that was closed then has failed, too: {failure}")

    @abc.abstractmethod
    def save(
        self,
        path: StrPath,
        state_dict: STATE_DICT,
        *,
        step: SupportsIndex | None = None,
        metadata: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Save a state dict as the checkpoint at `path`; what holds on return is up to the subclass."""

    @abc.abstractmethod
    def load(
        self,
        path: StrPath,
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


class _Loading(Checkpointer):
    """What our checkpointers have in common: `load`."""

    _reader: CheckpointReader

    def load(
        self,
        path: StrPath,
        state_dict: STATE_DICT | None = None,
        *,
        default_map_location: Any = None,
        strict: bool = False,
        map_location: Any = None,
        verify: bool | Literal["first"] = True,
        cast: bool = False,
        rename: Mapping[str, str] | None = None,
        allow_missing: Sequence[str] | None = None,
        together: bool = True,
        **kwargs: Any,
    ) -> STATE_DICT:
        """Load what this rank needs of the checkpoint at `path`; a save to it that is under way comes first.

        On return every byte that was loaded has been verified. If it raises, the template is as it was
        (`CheckpointReader.read` names the one exception). With a process group, all ranks must call it.

        Args:
            path: The checkpoint's folder.
            state_dict: A template, whose tensors are filled in place; None to get all that was saved.
            default_map_location: Where new tensors go, as ``map_location`` of ``torch.load``.
            strict: Refuse, before anything is changed, keys of the template that were not saved. Without a
                template there are none.
            map_location: Another name of `default_map_location`.
            verify: False to skip the checksums; "first" to check everything before the template is touched.
            cast: Convert what was saved to the dtypes of the template, as ``load_state_dict`` does.
            rename: From the path at which something was saved to its path in the template, such as
                ``{"model.old.*": "model.new.*"}``.
            allow_missing: Patterns of paths in the template that need not have been saved.
            together: False to load on this rank alone although there is a process group.
            kwargs: For a reader of your own. Ours knows no other arguments; ``weights_only`` and ``mmap`` of
                ``torch.load`` are ignored.

        Returns:
            The template, filled; or the state dict that was saved.

        Raises:
            CheckpointNotFoundError: There is none; the message names the nearest.
            CorruptCheckpointError: A file is damaged; the message says which, and which key.
            MismatchError: The template does not fit, or (if strict) "… missing keys …"; nothing was changed.
            UnknownArgumentError: No argument has this name; the message has the nearest.
            ConfigError: An argument does not make sense.

        Example:
            >>> import milepost, torch
            >>> with milepost.make_sync_checkpointer() as checkpointer:
            ...     checkpointer.save("run/step-1", {"w": torch.ones(2)})
            ...     checkpointer.load("run/step-1", {"w": torch.zeros(2, dtype=torch.half)}, cast=True)
            {'w': tensor([1., 1.], dtype=torch.float16)}
        """
        path = given_path(path, CheckpointNotFoundError)
        self._ready_to_load(path)
        if type(self._reader) is CheckpointReader:
            _refuse_unknown("load", kwargs.keys() - {"weights_only", "mmap"}, _LOAD_ARGUMENTS)
        if map_location is not None and default_map_location is not None:
            raise ConfigError("map_location and default_map_location are one option: give one of them")
        given = {"verify": verify, "cast": cast, "rename": rename, "allow_missing": allow_missing}
        usual = {"verify": True, "cast": False, "rename": None, "allow_missing": None, "together": True}
        options = {k: v for k, v in (given | {"together": together}).items() if v is not usual[k]}
        location = default_map_location if map_location is None else map_location
        return load_with(
            self._reader, path, state_dict, map_location=location, strict=strict, options=options | kwargs
        )

    @abc.abstractmethod
    def _ready_to_load(self, path: str) -> None:
        """Returns when the checkpoint at `path` may be loaded."""


_LOAD_ARGUMENTS = (
    "default_map_location", "strict", "map_location", "verify", "cast", "rename", "allow_missing", "together"
)  # fmt: skip


def _refuse_unknown(method: str, given: Iterable[str], known: Sequence[str]) -> None:
    for name in sorted(given):
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(known)}"
        raise UnknownArgumentError(f"{method} has no argument {name!r}", hint=hint)


def _labels(step: SupportsIndex | None, metadata: Any) -> dict[str, Any]:
    """Those of the two that were given: they are passed on like all other keyword arguments."""
    return {k: v for k, v in (("step", step), ("metadata", metadata)) if v is not None}


class SyncCheckpointer(_Loading):
    """Saves while the caller waits. As a context manager, it closes itself at the end of the block.

    Args:
        writer: Writes this rank's part.
        reader: Reads it.
    """

    def __init__(self, writer: CheckpointWriter, reader: CheckpointReader) -> None:
        self._writer = writer
        self._reader = reader
        self._closed = False

    def save(
        self,
        path: StrPath,
        state_dict: STATE_DICT,
        *,
        step: SupportsIndex | None = None,
        metadata: Any = None,
        **kwargs: Any,
    ) -> None:
        """Save a state dict.

        On return the checkpoint is durable. It is committed on all ranks, unless they do not meet. If this
        raises, `path` is as it was.

        Args:
            path: A folder that does not exist, is empty, or holds a checkpoint to replace.
            state_dict: What to save. It is read during the call only.
            step: The training step. The checkpoint records it.
            metadata: Plain values in dicts and lists. The checkpoint records them.
            kwargs: For a commit hook or a writer of your own, which get all of these arguments that were
                given. Without one, no others are accepted.

        Raises:
            StateError: The state dict, step or metadata cannot be saved; nothing was written.
            TargetError: The path may not be written to or replaced; nothing was touched.
            StorageError: An operation of the file system failed, such as on a full disk.
            CommitError: Another rank failed or did not come; see `CheckpointWriter.write`.
            UnknownArgumentError: No argument has this name; nothing was written.

        Example:
            >>> import milepost, torch
            >>> with milepost.make_sync_checkpointer() as checkpointer:
            ...     checkpointer.save("run/step-2", {"w": torch.ones(2)}, step=2, metadata={"loss": 0.5})
        """
        self._check_open()
        if not getattr(self._writer, "takes_keywords", True):
            _refuse_unknown("save", kwargs, ("step", "metadata"))
        kwargs |= _labels(step, metadata)
        result: object = self._writer.write(path, state_dict, **kwargs)  # type: ignore[func-returns-value]
        if isinstance(result, Future):  # a writer of the user's own may work in the background
            result.result()

    def _ready_to_load(self, path: str) -> None:  # noqa: ARG002 - saves are over when they return
        self._check_open()

    def close(self) -> None:
        """Release the writer; idempotent. Later calls raise `ClosedError`."""
        self._closed = True
        self._writer.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the checkpointer is closed", hint="make a new one")


class AsyncCheckpointer(OwnedByProcess, _Loading):
    """Saves in a process beside the training. As a context manager, it closes itself at the block's end.

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
        self._under_way = UnderWay(self._config.observers)
        self._guards: list[Any] = []
        self._warned = False
        self._closed = False
        parts = (checkpoint_process, checkpoint_stager, self._under_way, self._owner)
        self._finalizer = weakref.finalize(self, finish_abandoned, *parts)

    # -- saving ------------------------------------------------------------------------------------

    def save(
        self,
        path: StrPath,
        state_dict: STATE_DICT,
        *,
        step: SupportsIndex | None = None,
        metadata: Any = None,
        **kwargs: Any,
    ) -> tuple[SaveFuture, SaveFuture]:
        """Save a state dict in the background.

        On return all values but tensors are taken, and (unless staging is asynchronous) the tensors are
        copied: the state may change. The save goes on if this process dies from then on. Waits while
        ``max_in_flight`` saves are under way.

        Args:
            path: A folder that does not exist, is empty, or holds a checkpoint to replace.
            state_dict: What to save.
            step: The training step. The checkpoint records it.
            metadata: Plain values in dicts and lists. The checkpoint records them.
            kwargs: For a commit hook, writer or stager of your own; hooks and writers get all of these
                arguments that were given. Without one, no others are accepted.

        Returns:
            Two futures of None: the first is done when the state may change, the second when the checkpoint
            is committed and durable. Their figures are those of `SaveFuture`.

        Raises:
            Exception: An earlier save failed and nobody has looked at that. It is raised here, once, and
                says which save it was. This save was not made: call again. With several ranks this call
                counts as a save, and the others are told: go on with the next one on all ranks. What failed
                because another rank did is a warning in the log instead.
            StateError: The state dict cannot be saved.
            TargetError: The path may not be written to or replaced.
            ConfigError: Asynchronous staging without a guard, and ``require_guard``.
            UnknownArgumentError: No argument has this name; nothing was staged.

        Example:
            >>> import milepost, torch
            >>> with milepost.make_async_checkpointer() as checkpointer:
            ...     staged, written = checkpointer.save("run/step-3", {"w": torch.ones(2)}, step=3)
            ...     written.result()
        """
        self._check_open()
        path = given_path(path)
        if type(self._stager) is DefaultStager and not getattr(self._process, "takes_keywords", True):
            _refuse_unknown("save", kwargs, ("step", "metadata"))
        kwargs |= _labels(step, metadata)
        self._under_way.keep_failures_of(self._process)
        started = time.monotonic()
        stage_future, write_future = SaveFuture(path, step, started), SaveFuture(path, step, started)
        try:
            self._under_way.failures.raise_oldest(refused=path)
            self._check_guard()
            skip = self._config.when_busy == "skip"
            its_turn = self._under_way.wait_below(self._config.max_in_flight, skip=skip)
            self._under_way.failures.raise_oldest(refused=path)
        except BaseException as error:
            self._give_up(path, error)
            raise
        if not its_turn:
            stage_future.skip()
            write_future.skip()
            self._under_way.tell("skipped", write_future)
            return stage_future, write_future
        save = Save(os.path.abspath(path), None, kwargs, stage_future, write_future, self._config.retries)
        self._under_way.add(save)
        try:
            self._start(save, state_dict)
        except BaseException as error:
            self._under_way.remove(save)
            write_future.finished_at = time.monotonic()
            self._under_way.tell("failed", write_future, error)
            raise
        return stage_future, write_future

    def _start(self, save: Save, state_dict: STATE_DICT) -> None:
        """Stage the state, and hand it over or have it handed over."""
        self._under_way.tell("staging", save.stage_future)
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

    def _staged(self, save: Save, done: Future[Any] | None) -> None:
        future = save.stage_future
        future.finished_at = time.monotonic()
        error = done.exception() if done is not None else None
        if error is None:
            staged = done.result() if done is not None else save.staged
            future.bytes_done = staged_bytes(staged) if isinstance(staged, dict) else 0
            self._under_way.tell("staged", future)
            future.set_result(None)
        else:
            future.seen = True  # the write's future carries the same failure
            future.set_exception(error)

    def _write(self, save: Save, lost: Future[Any] | None = None) -> None:
        if isinstance(lost, WriteFuture):
            written = self._process.write_again(lost)
        else:
            written = self._process.write(save.staged, save.write_future.path, **save.arguments)
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
            self._under_way.failures.add(future)
        done: Kind = "committed" if committed else "written"
        self._under_way.tell(done if error is None else "failed", future, error)
        self._under_way.remove(save)  # before the future is done: what is called then may save again
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)

    def _save_without_staging(self, save: Save, writer: CheckpointWriter, state_dict: STATE_DICT) -> None:
        """Save while the caller waits; constant memory."""
        self._under_way.tell("low_memory", save.write_future)
        self._under_way.wait_for_earlier(save)
        committed = writer.carry_out(save.write_future.path, state_dict, save.arguments)
        self._staged(save, None)
        save.write_future.written_at = time.monotonic()
        self._finish(save, None, committed=committed or None)

    def on_progress(self, path: str, phase: str, done: int, size: int) -> None:
        """Called as a save advances."""
        self._under_way.on_progress(path, phase, done, size)

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
        for future in self._under_way.staging():
            if not future.done():
                wait([future], timeout_seconds)
                if not future.done():
                    raise TimeoutError(f"{future.path} is still being staged")

    def wait_committed(self, timeout_seconds: float | None = None) -> None:
        """Returns when every save is committed; raises the first failure that nobody has looked at."""
        _, late = wait(self._under_way.writing(), timeout_seconds)
        if late:
            raise TimeoutError(f"{len(late)} saves are still under way")
        self._under_way.failures.raise_oldest()

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

    def _ready_to_load(self, path: str) -> None:
        self._check_open()
        wait(self._under_way.writing(os.path.abspath(path)))

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
            drain(self._process, self._under_way.saves)
        self._under_way.keep_failures_of(self._process)
        self._under_way.failures.raise_oldest()

    def _check_open(self) -> None:
        self.check_owner("checkpointer")
        if self._closed:
            raise ClosedError("the checkpointer is closed", hint="make a new one")
