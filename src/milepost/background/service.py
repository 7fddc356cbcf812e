"""The service in the checkpoint process: it carries out the requests of one trainer.

It imports torch only for a writer, a hook or a storage of the user's that needs it.

It outlives its trainer: it ignores the signals meant for the job, and sees the trainer's end through a pidfd.
It carries out every request that the trainer sent before this process ends.
"""

from __future__ import annotations

import importlib
import logging
import os
import pickle
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec
from msgspec.structs import replace

from milepost import syscalls
from milepost.background.arena import Arena
from milepost.background.messages import (
    Arrived,
    Attached,
    Channel,
    Exit,
    Finished,
    Go,
    Init,
    Logged,
    Message,
    Moved,
    Ready,
    Write,
    decode_path,
    read_blob,
)
from milepost.background.remote_errors import Failure, describe_error, printable, rebuild_error
from milepost.commit import News, Outcome
from milepost.commit.save import InPlace, SaveOptions, save_snapshot
from milepost.errors import CommitTimeoutError
from milepost.format.snapshot import Snapshot, decode_snapshot

__all__ = ["Service", "serve"]

_REPORT_SECONDS = 0.1


class Service:
    """Carries out the requests of one trainer, in their order.

    Args:
        channel: The line to the trainer.
        trainer: The trainer's pid.
        ready: The trainer was told already that this process is ready.
    """

    def __init__(self, channel: Channel, trainer: int, *, ready: bool = False) -> None:
        self._channel = channel
        self._trainer = trainer
        self._ready = ready
        self._pidfd = syscalls.watch_process(trainer)
        if self._pidfd is not None and self._trainer_gone():  # then it may show another process
            os.close(self._pidfd)
            self._pidfd = None
        self._inbox: deque[tuple[Message, list[int]]] = deque()
        self._attached: dict[int, list[int]] = {}
        self._line_ended = False
        self._arena: Arena | None = None
        self._inode: tuple[int, ...] = ()
        self._write: Callable[[Write, Snapshot, Arena, list[int]], Outcome | None] = self._write_lean

    def run(self) -> None:
        """Serve until the trainer says `Exit`, or has gone and all it had asked for is done."""
        first, descriptors = self._next(None)
        if not isinstance(first, Init):
            return
        self._init = first
        threading.Thread(target=self._watch_trainer, daemon=True).start()
        try:
            syscalls.lower_priority(first.nice, idle_io=first.idle_io)
            self._start(read_blob(descriptors[0]))
        except BaseException as error:  # noqa: BLE001 - whatever the user's functions raise is reported
            self._channel.send(Finished(-1, describe_error(error)))
            return
        if not self._ready:
            self._channel.send(Ready())
        while True:
            request, descriptors = self._next(None)
            if request is None or isinstance(request, Exit):
                break
            if isinstance(request, Write):
                self._serve(request, descriptors)
        self._close()

    def _close(self) -> None:
        """Replaced where there is a writer of the user's to close."""

    def _start(self, blob: bytes) -> None:
        self._setup = msgspec.msgpack.decode(blob, type=Setup)
        if self._setup.argv:  # before a module of the user's is imported: it may read it
            sys.argv = pickle.loads(self._setup.argv)  # noqa: S301 - from our own trainer
        self._prepare_main(self._setup.parts + self._setup.custom)
        storage, hook = pickle.loads(self._setup.parts)  # noqa: S301 - from our own trainer
        init = self._init
        self._options = SaveOptions(
            *(storage, init.rank, init.world_size, init.timeout_seconds), process=init.process, hook=hook
        )
        if self._setup.custom:
            custom = importlib.import_module("milepost.background.custom_writer")
            self._write, self._close = custom.start(self._setup.custom)  # type: ignore[method-assign]

    def _prepare_main(self, pickled: bytes) -> None:
        """Import the trainer's main module, once, if a pickle refers to it."""
        if b"__main__" in pickled and self._setup.main:
            from multiprocessing import spawn  # noqa: PLC0415 - only for functions of __main__

            spawn.prepare(pickle.loads(self._setup.main))  # noqa: S301 - from our own trainer
            self._setup.main = b""

    # -- the line ----------------------------------------------------------------------------------

    def _next(
        self, timeout_seconds: float | None, kind: type | None = None
    ) -> tuple[Message | None, list[int]]:
        """The next message (of a kind: others wait their turn), or None when no more can come."""
        end = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        while True:
            for position, (waiting, descriptors) in enumerate(self._inbox):
                if kind is None or isinstance(waiting, kind):
                    del self._inbox[position]
                    return waiting, descriptors
            if self._line_ended:
                return None, []
            left = 1.0 if end is None else min(1.0, max(end - time.monotonic(), 0.0))
            ready = self._channel.wait(left, *([self._pidfd] if self._pidfd is not None else []))
            if self._channel.fileno() in ready:
                message, descriptors = self._channel.receive()
                if message is None:
                    self._line_ended = True
                elif isinstance(message, Attached):
                    self._attached.setdefault(message.number, []).extend(descriptors)
                else:
                    self._inbox.append((message, descriptors))
            elif self._trainer_gone():
                self._line_ended = True  # the line is empty, and nobody is left to fill it
            elif end is not None and time.monotonic() >= end:
                return None, []

    def _trainer_gone(self) -> bool:
        return os.getppid() != self._trainer

    def _watch_trainer(self) -> None:
        """When the trainer has gone: what was accepted is finished within the timeout, or given up."""
        if self._pidfd is None:
            while not self._trainer_gone():
                time.sleep(1.0)
        else:
            self._poll_pidfd()
        time.sleep(self._init.timeout_seconds)
        os._exit(3)

    def _poll_pidfd(self) -> None:
        import select  # noqa: PLC0415 - beside its only use

        poll = select.poll()
        poll.register(self._pidfd or 0, select.POLLIN)
        poll.poll()

    # -- saves -------------------------------------------------------------------------------------

    def _serve(self, request: Write, descriptors: list[int]) -> None:
        attached = self._attached.pop(request.number, [])
        self._meeting: _Meeting | None = None
        outcome: Outcome | None = None
        failure: Failure | None = None
        try:
            snapshot = decode_snapshot(read_blob(descriptors.pop()))
            arena = self._map(descriptors.pop())
            self._prepare_main(snapshot.arguments)
            outcome = self._write(request, snapshot, arena, attached)
        except BaseException as error:  # noqa: BLE001 - a failed save never ends the service
            failure = describe_error(error)
            outcome = getattr(self._meeting, "outcome", None)
        finally:
            for descriptor in (*descriptors, *attached):
                os.close(descriptor)
        outcome = outcome or Outcome(committed=failure is None and self._init.world_size == 1)
        self._channel.send(Finished(request.number, failure, **msgspec.structs.asdict(outcome)))

    def _map(self, descriptor: int) -> Arena:
        """The arena behind a descriptor, which this takes over.

        The mapping of the last one is kept, with its page tables: most saves come in the same arena.
        """
        inode = os.stat(descriptor)[1:3]  # with its file system
        if self._arena is not None and inode == self._inode:
            os.close(descriptor)
            self._arena.grow(os.fstat(self._arena.descriptor).st_size)
            return self._arena
        if self._arena is not None:
            self._arena.close()
        self._arena, self._inode = Arena(0, descriptor), inode
        return self._arena

    def _write_lean(self, request: Write, snapshot: Snapshot, arena: Arena, _: list[int]) -> Outcome:
        if request.meets:
            self._meeting = _Meeting(request.number, self._channel.send, lambda: self._next(0, Go)[0])
        options = replace(
            self._options,
            attempt=request.attempt,
            private=request.private,
            target=decode_path(request.target),
            barrier=(lambda: self._barrier(request)) if self._init.has_barrier else None,
            meeting=self._meeting,
            report=_Reporter(self._channel, request.number),
        )
        pickled = snapshot.arguments
        arguments = pickle.loads(pickled) if pickled else {}  # noqa: S301 - from our own trainer
        path = decode_path(request.path)
        return save_snapshot(path, snapshot, InPlace(arena.first), options, arguments)

    def _barrier(self, request: Write) -> None:
        """Meet the other ranks through the trainer; without a trainer the marks alone decide."""
        if request.barrier_done or self._trainer_gone() or not self._channel.send(Arrived(request.number)):
            return
        message, _ = self._next(self._init.timeout_seconds, Go)
        while isinstance(message, Go) and message.number != request.number:  # of a save that gave up
            message, _ = self._next(self._init.timeout_seconds, Go)
        # A trainer that dies hangs up before its children see that they have another parent.
        if message is None and not self._line_ended and not self._trainer_gone():
            raise CommitTimeoutError(
                f"the barrier was not passed within {self._init.timeout_seconds} seconds",
                rank=self._init.rank,
                phase="barrier",
            )
        if isinstance(message, Go) and message.failure is not None:
            raise rebuild_error(message.failure)


class _Meeting:
    """The meeting that the trainer holds: what it hears there comes through the line.

    Attributes:
        outcome: What is known if the save has been committed, even if a hook raises after that.
    """

    def __init__(self, number: int, send: Callable[[Message], bool], receive: Callable[[], Any]) -> None:
        self._number, self._send, self._receive = number, send, receive
        self._news = News()
        self.outcome: Outcome | None = None

    def arrive(self) -> None:
        self._send(Arrived(self._number))

    def poll(self) -> News:
        while isinstance(message := self._receive(), Go):
            if message.number == self._number:  # else it is of a save that gave up
                failure = rebuild_error(message.failure) if message.failure is not None else None
                self._news = News(message.arrived, message.identity, failure)
        return self._news

    def end(self, outcome: Outcome) -> None:
        self.outcome = outcome


class Setup(msgspec.Struct):
    """The blob of an `Init`: pickles of the user's own functions and objects, and of what they need."""

    parts: bytes
    main: bytes = b""
    custom: bytes = b""
    argv: bytes = b""


class _Reporter:
    """Tells the trainer how far a save is, not too often."""

    def __init__(self, channel: Channel, number: int) -> None:
        self._channel = channel
        self._number = number
        self._phase = ""
        self._last = 0.0

    def __call__(self, phase: str, done: int, size: int) -> None:
        now = time.monotonic()
        if phase != self._phase or now - self._last >= _REPORT_SECONDS or done == size:
            self._phase, self._last = phase, now
            self._channel.send(Moved(self._number, phase, done, size))


class _ToTrainer(logging.Handler):
    """Hands what Milepost logs here to the trainer."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(logging.WARNING)
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        self._channel.send(Logged(record.name, record.levelno, printable(self.format(record))))


def serve(line: socket.socket, trainer: int, *, ready: bool) -> None:
    """Serve the trainer at the other end of the line until it has gone; the arguments are as in `Service`."""
    channel = Channel(line)
    logging.getLogger("milepost").addHandler(_ToTrainer(channel))
    Service(channel, trainer, ready=ready).run()
