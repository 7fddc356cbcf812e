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

from milepost.background.child import Child, Handle, Orders, Request, WriteFuture
from milepost.background.futures import Failures
from milepost.background.messages import Channel, Init, Write, encode_path
from milepost.background.staged import StagedImage, image_of
from milepost.barriers import barrier_store
from milepost.commit import absolute_path, check_target, given_path, process_id
from milepost.commit.save import SaveOptions, telling_others
from milepost.config import CheckpointProcessConfig, CheckpointWriterConfig
from milepost.errors import (
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
from milepost.format.snapshot import Labels, Snapshot
from milepost.ranks.save_meeting import Ranks
from milepost.staging import DefaultStager
from milepost.state.encode import StateEncoder
from milepost.storage import Storage, default_storage
from milepost.types import STATE_DICT, RankInfo, StrPath
from milepost.utils import OwnedByProcess, gc_paused

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
    """Milepost's own writer in the checkpoint process; with it the child imports no torch.

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

    tells = True
    leaves_shared = False

    @property
    def stall_seconds(self) -> float:
        """How long a save may show no sign of life."""
        return 2 * self.config.write_barrier_timeout_secs + _STALL_SECONDS

    @property
    def wants_arguments(self) -> bool:
        """Whether the child needs the keyword arguments of a save."""
        return self.commit_hook is not None

    def pickles(self) -> tuple[bytes, bytes]:
        """The storage and the hook for the child, and no writer of the user's."""
        return _pickled((self.storage, self.commit_hook)), b""

    def labels(self, request: Request) -> Labels:
        """Check a request; return what is recorded with it."""
        labels = Labels.of(request.arguments, {"torch": str(torch.__version__), "pid": str(os.getpid())})
        check_target(self.storage, request.options.target or "")
        return labels

    def check(self, snapshot: Snapshot) -> None:
        """Milepost's writer takes every snapshot."""


class _CustomWriter:
    """A writer of the user's own in the checkpoint process.

    Args:
        functions: The init function, its arguments, the function that makes the writer, its arguments.
    """

    tells = False
    leaves_shared = wants_arguments = True
    stall_seconds = None

    def __init__(self, *functions: Any) -> None:
        self.config = CheckpointWriterConfig(write_barrier_timeout_secs=_PATIENCE_SECONDS)
        self.storage, self.barrier, self.meets = default_storage(), None, False
        self._functions = functions

    def pickles(self) -> tuple[bytes, bytes]:
        """No storage and no hook, and the user's functions for the child."""
        return _pickled((None, None)), _pickled(self._functions)

    def labels(self, request: Request) -> Labels:  # noqa: ARG002 - the user's writer checks its arguments
        """The user's writer records what it likes."""
        return Labels()

    def check(self, snapshot: Snapshot) -> None:
        """Refuse a part of a global tensor."""
        if snapshot.shares is not None:
            raise StateError(
                "a writer of your own would take this rank's part of a DTensor or replica for the whole",
                key=path_text(decode_key(snapshot.shares.decoded().key[0])),
                hint="leave out checkpoint_writer_init_fn and subprocess_init_fn, or save full tensors",
            )


class CheckpointProcess(OwnedByProcess):
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
        arguments = {"rank_info": rank_info, **(checkpoint_writer_init_args or {})}
        writer = lean or _CustomWriter(
            subprocess_init_fn, subprocess_init_args, checkpoint_writer_init_fn, arguments
        )
        rank, size = rank_info.global_rank, rank_info.global_world_size
        timeout = writer.config.write_barrier_timeout_secs
        self._make_encoder = encoder or (lambda: StateEncoder(rank_info))
        self._rank, self._config, self._writer = rank, config, writer
        # Made here, in the caller's thread, which alone may know the process group.
        self._ranks = Ranks(
            SaveOptions(writer.storage, rank, size, timeout),
            writer.config.start_id,
            store=barrier_store(writer.barrier),
            meets=writer.meets and writer.barrier is None,
        )
        parts, custom = writer.pickles()
        self._main = _main_module() if writer.wants_arguments else b""
        self._check_main(parts + custom)
        argv = pickle.dumps([*map(str, getattr(sys, "argv", ()))])
        has_barrier = writer.barrier is not None
        self._orders = Orders(
            Init(rank, size, process_id(), timeout, has_barrier, config.nice, config.idle_io),
            msgspec.msgpack.encode({"parts": parts, "main": self._main, "custom": custom, "argv": argv}),
            config.subprocess_init_timeout_secs,
            writer.barrier,
            on_progress or (lambda *_: None),
            writer.stall_seconds,
            plain=parts == _pickled((default_storage(), None))
            and not (custom or config.nice or config.idle_io),
        )
        self._stager: DefaultStager | None = None
        self._lock = threading.RLock()
        self._submitted = threading.Condition(self._lock)
        self._awaited: set[int] = set()
        self._numbers = 0
        self._failures = Failures()
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

    @property
    def takes_keywords(self) -> bool:
        """Whether a hook or a writer of the user's gets the keyword arguments of `write`."""
        return self._writer.wants_arguments or type(self) is not CheckpointProcess

    def write(
        self, state_dict: STATE_DICT | Future[STATE_DICT], path: StrPath, **kwargs: Any
    ) -> Future[None]:
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
        request = self._request(given_path(path), kwargs)
        with self._ending(request):
            future = self._accept(request)
            if isinstance(state_dict, Future):
                with self._lock:
                    self._awaited.add(future.number)
                state_dict.add_done_callback(lambda done: self._submit_later(done, future))
            else:
                self._submit(future, state_dict)
        return future

    def write_again(self, lost: WriteFuture) -> Future[None]:
        """As `write`, of a request whose writer was lost, as the same attempt of all ranks.

        Args:
            lost: The result of `write`, which has failed with `LostWriterError`.
        """
        future = self._accept(lost.request)
        with self._ending(future.request):
            self._submit(future)
        return future

    def abandon(self, lost: WriteFuture, error: BaseException) -> None:
        """Do not write a request again whose writer was lost; its memory is free on return."""
        if lost.request.held is not None:
            self._end(lost.request, error)

    def give_up(self, path: str, error: BaseException) -> None:
        """A save failed before `write` was called. It counts as one."""
        with suppress(TargetError):  # an attempt needs a path
            self._end(self._request(path, {}), error)

    def _request(self, path: str, arguments: dict[str, Any]) -> Request:
        """Count a save to a path, even if it fails: that is how the ranks find each other."""
        target = absolute_path(path) if self._writer.tells else os.path.abspath(path)
        return Request(path, arguments, *self._ranks.next(target))

    def _accept(self, request: Request) -> WriteFuture:
        with self._lock:
            self._check_open()
            # What failed because another rank did is kept: `close` raises it.
            self._failures.raise_oldest(refused=request.options.target)
            self._numbers += 1
            future = WriteFuture(request, self._numbers)
        future.set_running_or_notify_cancel()  # an accepted request is carried out: nobody can cancel it
        future.add_done_callback(self._note_end)  # no closure over it: that would keep all of this alive
        return future

    def _submit_later(self, done: Future[STATE_DICT], future: WriteFuture) -> None:
        try:
            with self._ending(future.request):
                self._submit(future, done.result())
        except BaseException as error:  # noqa: BLE001 - the future carries it
            if not future.done():
                future.set_exception(error)
        finally:
            with self._submitted:
                self._awaited.discard(future.number)
                self._submitted.notify_all()

    def _submit(self, future: WriteFuture, state_dict: STATE_DICT | None = None) -> None:
        """Send a request to the child, with the image of a state dict, or with the one that it holds."""
        request = future.request
        alone = request.options.world_size == 1
        with error_context(path=request.path, rank=self._rank, alone=alone), gc_paused():
            labels = self._writer.labels(request)
            arguments = _pickled(request.arguments) if self._writer.wants_arguments else b""
            self._check_main(arguments)
            if request.held is None and state_dict is not None:
                image = image_of(state_dict)
                request.held = self._stage(state_dict) if image is None else (state_dict, image)
            assert request.held is not None
            image = request.held[1]
            self._writer.check(image.snapshot)
        snapshot = msgspec.structs.replace(image.snapshot, labels=labels, arguments=arguments)
        options = request.options
        message = Write(
            number=future.number,
            path=encode_path(request.path),
            target=encode_path(options.target or ""),
            attempt=options.attempt,
            private=options.private,
            barrier_done=request.met,
            meets=request.meeting is not None,
        )
        with self._lock:
            self._check_open()
            if not self._child.usable():
                self._child.handle.kill()  # its own thread sees to the rest
                self._child = Child(self._orders)
            self._child.send(future, message, snapshot, image)

    @contextmanager
    def _ending(self, request: Request) -> Iterator[None]:
        """End the request's attempt if the context raises."""
        try:
            yield
        except BaseException as error:
            self._end(request, error)
            raise

    def _end(self, request: Request, error: BaseException) -> None:
        """End an attempt in an error: its memory is free on return, and the other ranks are told."""
        request.held = None
        options = request.options
        if isinstance(error, MilepostError):
            error.located(path=request.path, rank=self._rank, alone=options.world_size == 1)
        if request.meeting is not None:
            request.meeting.close(None, error)
        if self._writer.tells and options.world_size > 1:
            with suppress(type(error)), telling_others(request.path, options):
                raise error

    def _stage(self, state_dict: STATE_DICT) -> tuple[STATE_DICT, StagedImage]:
        """Copy a state dict that no `DefaultStager` has staged."""
        with self._lock:
            self._check_open()
            if self._stager is None:
                self._stager = DefaultStager(encoder=self._make_encoder())
            return self._stager.stage_image(state_dict, leave_shared=self._writer.leaves_shared)

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
            self._failures.add(future)
        elif not future.committed and self._writer.tells:
            options = future.request.options
            self._ranks.wrote(options.target or "", options.attempt)

    def failures(self) -> list[CommitError]:
        """The writes that were not known to be committed, and have failed since; each is returned once."""
        return self._ranks.failures()

    def close(self) -> None:
        """Finish the writes that were accepted, and end the child; it is gone on return.

        Waits as long as bytes advance; a stall longer than ``subprocess_shutdown_timeout_secs`` ends the
        child. Idempotent.

        Raises:
            Exception: A failure of a write that nobody has looked at.
        """
        if not self.is_owned:
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
        self._failures.raise_oldest()

    def stalled(self) -> bool:
        """Whether nothing has moved for so long that `close` would not wait any more."""
        return self._child.stalled(self._config.subprocess_shutdown_timeout_secs)

    def _check_open(self) -> None:
        self.check_owner("checkpoint process", "a checkpointer")
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
