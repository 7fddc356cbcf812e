"""The checkpoint process, seen from the trainer: started, fed, watched, replaced."""

from __future__ import annotations

import logging
import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from multiprocessing import spawn
from typing import Any

import msgspec
import torch

from milepost.background.child import Child, Handle, Job, Orders, WriteAttempt, WriteFuture
from milepost.background.futures import TrackedFuture, raise_unseen
from milepost.background.messages import Channel, Init, Write, encode_path
from milepost.background.staged import StagedImage, image_of
from milepost.barriers import barrier_store
from milepost.commit import absolute_path, check_target, process_id
from milepost.commit.save import SaveOptions, telling_others
from milepost.config import CheckpointProcessConfig, CheckpointWriterConfig
from milepost.errors import (
    AbortedError,
    ClosedError,
    CommitError,
    ConfigError,
    MilepostError,
    StateError,
    TargetError,
    error_context,
)
from milepost.format.keys import decode_key
from milepost.format.paths import path_text
from milepost.format.snapshot import Labels
from milepost.ranks.save_meeting import Ranks
from milepost.staging import DefaultStager
from milepost.state.encode import StateEncoder
from milepost.storage import Storage, default_storage
from milepost.types import STATE_DICT, RankInfo
from milepost.utils import gc_paused

__all__ = [
    "CheckpointProcess",
    "CheckpointProcessConfig",
    "LeanWriter",
    "RequestType",
    "WorkerRequest",
    "WorkerResponse",
    "WriteFuture",
]

logger = logging.getLogger(__name__)

_PATIENCE_SECONDS = 600
"""How long a writer of the user's own may go on after the trainer has gone."""

_STALL_SECONDS = 60
"""How much longer than it may wait for other ranks a writer of ours may show no sign of life."""


class RequestType(Enum):
    """What a checkpoint process can be asked for."""

    PING = "ping"
    WRITE_CHECKPOINT = "write_checkpoint"
    TERMINATE_PROCESS = "exit"


@dataclass
class WorkerRequest:
    """A request to a checkpoint process."""

    request_type: RequestType
    payload: dict[str, Any]


@dataclass
class WorkerResponse:
    """The answer to a `WorkerRequest`."""

    request_type: RequestType
    success: bool
    error_msg: str | None = None
    payload: dict[str, Any] | None = None


@dataclass
class LeanWriter:
    """What Milepost's own writer in the checkpoint process is to do; with it the child imports no torch.

    Attributes:
        config: Options of the writer.
        barrier: Any object with ``execute_barrier()``; it is executed here, in a thread of its own.
        commit_hook: Called in the child.
        storage: Where checkpoints live.
        meets: Meet the other ranks at the store of the default process group, where there is no barrier.
    """

    config: CheckpointWriterConfig = field(default_factory=CheckpointWriterConfig)
    barrier: Any = None
    commit_hook: Any = None
    storage: Storage = field(default_factory=default_storage)
    meets: bool = False


class CheckpointProcess:
    """A child process that writes checkpoints, one after the other.

    The constructor does not wait for the child; `process_creation_future` is done when it is ready.

    Args:
        rank_info: Which rank this is, of how many.
        config: Options.
        subprocess_init_fn: Called in the child first, with `subprocess_init_args`.
        subprocess_init_args: Its arguments.
        checkpoint_writer_init_fn: Called in the child with `checkpoint_writer_init_args` by keyword, and
            ``rank_info`` added if it is not among them; returns the writer.
        checkpoint_writer_init_args: Its arguments.
        lean: Use Milepost's own writer instead, without these functions.
        on_progress: Called with the absolute path of a save, its phase, bytes written and bytes in all.
        encoder: Makes what takes apart the state dicts that no `DefaultStager` has staged.

    Raises:
        ConfigError: A function cannot be handed to another process, or there is no interpreter to start.
    """

    def __init__(
        self,
        rank_info: RankInfo,
        config: CheckpointProcessConfig,
        subprocess_init_fn: Callable[..., Any] | None = None,
        subprocess_init_args: tuple[Any, ...] = (),
        checkpoint_writer_init_fn: Callable[..., Any] | None = None,
        checkpoint_writer_init_args: dict[str, Any] | None = None,
        *,
        lean: LeanWriter | None = None,
        on_progress: Callable[[str, str, int, int], None] | None = None,
        encoder: Callable[[], StateEncoder] | None = None,
    ) -> None:
        if not sys.executable:
            raise ConfigError(
                "the checkpoint process cannot be started: sys.executable does not name a Python interpreter",
                hint="set sys.executable to one that has Milepost, or use make_sync_checkpointer",
            )
        self._make_encoder = encoder or (lambda: StateEncoder(rank_info))
        self._rank_info = rank_info
        self._config = config
        self._lean = lean
        # Made here, in the caller's thread, which alone may know the process group.
        self._ranks = Ranks(
            rank_info,
            lean.config.start_id if lean else None,
            lean.config.write_barrier_timeout_secs if lean else _PATIENCE_SECONDS,
            lean.storage if lean else default_storage(),
            store=barrier_store(lean.barrier if lean else None),
            meets=lean is not None and lean.meets and lean.barrier is None,
        )
        custom = b""
        if lean is None:
            arguments = {"rank_info": rank_info, **(checkpoint_writer_init_args or {})}
            custom = _pickled(
                (subprocess_init_fn, subprocess_init_args, checkpoint_writer_init_fn, arguments)
            )
        hook = lean.commit_hook if lean else None
        parts = _pickled((lean.storage if lean else None, hook))
        self._wants_arguments = lean is None or hook is not None
        self._main = _main_module() if self._wants_arguments else b""
        self._check_main(parts + custom)
        init = Init(
            rank=rank_info.global_rank,
            world_size=rank_info.global_world_size,
            process=process_id(),
            timeout_seconds=lean.config.write_barrier_timeout_secs if lean else _PATIENCE_SECONDS,
            has_barrier=lean is not None and lean.barrier is not None,
            nice=config.nice,
            idle_io=config.idle_io,
        )
        self._orders = Orders(
            init,
            msgspec.msgpack.encode({"parts": parts, "main": self._main, "custom": custom}),
            config.subprocess_init_timeout_secs,
            lean.barrier if lean else None,
            on_progress or (lambda *_: None),
            2 * lean.config.write_barrier_timeout_secs + _STALL_SECONDS if lean else None,
        )
        self._stager: DefaultStager | None = None
        self._lock = threading.RLock()
        self._submitted = threading.Condition(self._lock)
        self._awaited: set[int] = set()
        self._numbers = 0
        self._unseen: list[TrackedFuture[None]] = []
        self._owner = os.getpid()
        self._closed = False
        self._child = Child(self._orders)

    # -- what stays reachable ----------------------------------------------------------------------

    @property
    def process(self) -> Handle:
        """The child process: ``processes[0].is_alive()``, ``join(timeout)``."""
        return self._child.handle

    @property
    def process_creation_future(self) -> Future[None]:
        """Done when the child is ready; raises RuntimeError with its traceback, or TimeoutError."""
        return self._child.ready

    @property
    def _parent_end(self) -> Channel:
        return self._child.channel

    # -- writing -----------------------------------------------------------------------------------

    def write(self, state_dict: STATE_DICT | Future[STATE_DICT], path: str, **kwargs: Any) -> Future[None]:
        """Have the child write a state dict; returns at once, with a future that is done when it has.

        On return (for a future: when that is done) the request is in the child's hands, and is carried out
        even if this process dies. A state dict that `DefaultStager` staged is written from its arena; of
        any other a copy is made before this returns, but for tensors in shared memory.

        Args:
            state_dict: What to write, or a future of it.
            path: The checkpoint's folder; a relative path means the folder at the time of this call.
            kwargs: For the writer and its hooks; ``step`` and ``metadata`` are recorded.

        Raises:
            ClosedError: The process was closed.
            Exception: A failure of an earlier write that nobody has looked at. With several ranks this call
                counts as a write, of which the others are told.
        """
        self._check_open()
        future = WriteFuture(self._next_attempt(path))
        with self._telling(path, future.attempt):
            number = self._accept(future)
            if isinstance(state_dict, Future):
                with self._lock:
                    self._awaited.add(number)
                state_dict.add_done_callback(
                    lambda done: self._submit_later(done, number, future, path, kwargs)
                )
            else:
                self._submit(state_dict, number, future, path, kwargs)
        return future

    def write_again(self, lost: WriteFuture, path: str, **kwargs: Any) -> Future[None]:
        """As `write`, of what a lost writer was to write to this path, as the same attempt of all ranks.

        Args:
            lost: What `write` returned, which has failed with `LostWriterError`.
            path: As it was.
            kwargs: As they were.
        """
        assert lost.held is not None
        future = WriteFuture(lost.attempt)
        number = self._accept(future)
        (staged, image), lost.held = lost.held, None
        with self._telling(path, future.attempt):
            self._submit(staged, number, future, path, kwargs, image)
        return future

    def abandon(self, lost: WriteFuture, path: str, error: BaseException) -> None:
        """Do without what a lost writer was to write: its memory is free, and the other ranks are told."""
        if lost.held is not None:
            lost.held = None
            self._tell_others(path, lost.attempt, error)

    def _next_attempt(self, path: str) -> WriteAttempt:
        """Count a save to a path, whatever becomes of it: that is how the ranks find each other."""
        target = absolute_path(path) if self._lean else os.path.abspath(path)
        name = self._ranks.next(target)
        return WriteAttempt(target, name.attempt, name.private, name.meeting)

    def _accept(self, future: WriteFuture) -> int:
        with self._lock:
            self._check_open()
            raise_unseen(self._unseen, AbortedError)  # of what another rank failed in, `close` tells
            self._numbers += 1
            number = self._numbers
        future.set_running_or_notify_cancel()  # what was accepted is carried out: nobody can cancel it
        future.add_done_callback(self._note_end)  # no closure over it: that would keep all of this alive
        return number

    def _submit_later(self, done: Future[STATE_DICT], *rest: Any) -> None:
        future: WriteFuture = rest[1]
        number, _, path, *_ = rest
        try:
            with self._telling(path, future.attempt):
                self._submit(done.result(), *rest)
        except BaseException as error:  # noqa: BLE001 - the future carries it
            if not future.done():
                future.set_exception(error)
        finally:
            with self._submitted:
                self._awaited.discard(number)
                self._submitted.notify_all()

    def _submit(
        self,
        state_dict: STATE_DICT,
        number: int,
        future: WriteFuture,
        path: str,
        kwargs: dict[str, Any],
        image: StagedImage | None = None,
    ) -> None:
        lean, attempt = self._lean, future.attempt
        with error_context(path=path, rank=self._rank_info.global_rank), gc_paused():
            facts = {"torch": str(torch.__version__), "pid": str(os.getpid())}
            labels = Labels.of(kwargs, facts) if lean else Labels()
            if lean:
                check_target(lean.storage, attempt.target)
            arguments = _pickled(kwargs) if self._wants_arguments else b""
            self._check_main(arguments)
            image = image or image_of(state_dict)
            if image is None:
                state_dict, image = self._stage(state_dict)
            shares = image.snapshot.shares
            if not lean and shares is not None:
                raise StateError(
                    "a writer of your own would take this rank's part of a DTensor or replica for the whole",
                    key=path_text(decode_key(shares.decoded().key[0])),
                    hint="leave out checkpoint_writer_init_fn and subprocess_init_fn, or save full tensors",
                )
        snapshot = msgspec.structs.replace(image.snapshot, labels=labels, arguments=arguments)
        job = Job(number, future, (state_dict, image))
        request = Write(
            number=number,
            path=encode_path(path),
            target=encode_path(attempt.target),
            attempt=attempt.id,
            private=attempt.private,
            barrier_done=attempt.met,
            meets=attempt.meeting is not None,
        )
        with self._lock:
            self._check_open()
            if not self._child.usable():
                self._child.handle.kill()  # its own thread sees to the rest
                self._child = Child(self._orders)
            self._child.send(job, request, snapshot, image)

    @contextmanager
    def _telling(self, path: str, attempt: WriteAttempt) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._tell_others(path, attempt, error)
            raise

    def give_up(self, path: str, error: BaseException) -> None:
        """A save failed before `write` was called: it counts as one, and the other ranks are told."""
        with suppress(TargetError):  # where the path is none, there is nowhere to tell them
            self._tell_others(path, self._next_attempt(path), error)

    def _tell_others(self, path: str, attempt: WriteAttempt, error: BaseException) -> None:
        rank, size = self._rank_info.global_rank, self._rank_info.global_world_size
        if isinstance(error, MilepostError):
            error.located(path=path, rank=rank)
        if attempt.meeting is not None:
            attempt.meeting.close(None, error)
        if size == 1 or self._lean is None:
            return
        timeout = self._lean.config.write_barrier_timeout_secs
        options = SaveOptions(
            *(self._lean.storage, rank, size, attempt.id, timeout),
            private=attempt.private,
            target=attempt.target,
        )
        with suppress(type(error)), telling_others(path, options):
            raise error

    def _stage(self, state_dict: STATE_DICT) -> tuple[STATE_DICT, StagedImage]:
        """Copy a state dict that no `DefaultStager` has staged."""
        with self._lock:
            self._check_open()
            if self._stager is None:
                self._stager = DefaultStager(encoder=self._make_encoder())
            return self._stager.stage_image(state_dict, leave_shared=self._lean is None)

    def _check_main(self, pickled: bytes) -> None:
        """Refuse what the child could not find."""
        if b"__main__" in pickled and not self._main:
            raise ConfigError(
                "a function or class given to the checkpoint process is defined in __main__, and there is no "
                "file to find it in",
                hint="put it into a module and import it from there",
            )

    # -- failures ----------------------------------------------------------------------------------

    def _note_end(self, future: Future[None]) -> None:
        assert isinstance(future, WriteFuture)
        if future.failure() is not None:
            with self._lock:
                self._unseen.append(future)
        elif not future.committed and self._lean is not None:
            self._ranks.wrote(future.attempt.target, future.attempt.id)

    def failures(self) -> list[CommitError]:
        """What was written, not known to be committed, and is known to have failed since; told once."""
        return self._ranks.failures()

    def raise_unseen(self) -> None:
        """Raise the oldest failure of a write that nobody has looked at; each is raised once."""
        with self._lock:
            raise_unseen(self._unseen)

    def close(self) -> None:
        """Finish the writes that were accepted, and end the child; it is gone on return.

        Waits as long as bytes advance; a stall longer than ``subprocess_shutdown_timeout_secs`` ends the
        child. Idempotent.

        Raises:
            Exception: A failure of a write that nobody has looked at.
        """
        if self._owner != os.getpid():
            return
        with self._submitted:
            self._submitted.wait_for(lambda: not self._awaited, self._config.subprocess_shutdown_timeout_secs)
            if self._closed:
                return
            self._closed = True
        try:
            self._child.finish(self._config.subprocess_shutdown_timeout_secs)
        finally:
            self._child.stop()
            if self._stager is not None:
                self._stager.close()
        self.raise_unseen()

    def stalled(self) -> bool:
        """Whether nothing has moved for so long that `close` would not wait any more."""
        return self._child.stalled(self._config.subprocess_shutdown_timeout_secs)

    def _check_open(self) -> None:
        if self._owner != os.getpid():
            raise ClosedError(
                f"the checkpoint process belongs to process {self._owner}, from which this one was forked",
                hint="make a checkpointer in this process",
            )
        if self._closed:
            raise ClosedError("the checkpoint process is closed", hint="make a new checkpointer")


def _pickled(value: Any) -> bytes:
    try:
        return pickle.dumps(value)
    except Exception as error:
        raise ConfigError(
            f"cannot be handed to the checkpoint process: {error}",
            hint="define functions and hooks at the top level of a module, and pass plain arguments",
        ) from error


def _main_module() -> bytes:
    """What the child needs to find functions of ``__main__``, as `multiprocessing` does it, if it can."""
    data = spawn.get_preparation_data("milepost-writer")
    found = {name: data[name] for name in ("init_main_from_name", "init_main_from_path") if name in data}
    return pickle.dumps(found) if found else b""
