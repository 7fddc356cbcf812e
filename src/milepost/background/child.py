"""One checkpoint process, from its start to its end, and the thread that listens to it."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from milepost import syscalls
from milepost.background.futures import TrackedFuture
from milepost.background.messages import (
    MAX_DESCRIPTORS,
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
    write_blob,
)
from milepost.background.remote_errors import Failure, describe_error, rebuild_error
from milepost.background.staged import StagedImage
from milepost.commit import News, Outcome
from milepost.commit.save import SaveOptions
from milepost.errors import LostWriterError
from milepost.format.snapshot import Snapshot, encode_snapshot
from milepost.ranks.save_meeting import SaveMeeting

__all__ = ["Child", "Handle", "Orders", "Request", "WriteFuture"]

logger = logging.getLogger(__name__)

_HOOKS = ("pre_commit", "post_commit")
_GUARD_HINT = (
    "the writer process imports your script: put the code that starts training under "
    'if __name__ == "__main__":'
)


@dataclass
class Request:
    """One write, whichever writers carry it out.

    Attributes:
        path: The checkpoint's folder, as it was given.
        arguments: The keyword arguments of the save.
        options: The attempt that it is for all ranks.
        meeting: Where the ranks meet, if they do so without a barrier.
        met: Its barrier has been executed.
        held: The staged state and its image. Their memory stays in use until this is None: when the write
            is done, or has ended in an error.
    """

    path: str
    arguments: dict[str, Any]
    options: SaveOptions
    meeting: SaveMeeting | None = None
    met: bool = False
    held: tuple[Any, StagedImage] | None = None


class WriteFuture(TrackedFuture[None]):
    """The future of a request, as one writer carries it out.

    If that writer is lost, the request is to be written again or abandoned.

    Attributes:
        request: The request.
        number: Its number in the messages to the writer.
        phase: How far the writer is.
        committed: True if the checkpoint is known to be committed; None if it is not, or not yet.
    """

    def __init__(self, request: Request, number: int) -> None:
        super().__init__()
        self.request = request
        self.what = f"the save to {request.options.target}"
        self.number = number
        self.phase = ""
        self.committed: bool | None = None


@dataclass
class Orders:
    """What every child of one `CheckpointProcess` is started with.

    Attributes:
        init: The first message to it.
        setup: The blob of that message.
        start_seconds: How long its start may take.
        barrier: Any object with ``execute_barrier()``, or None.
        on_progress: Called with the absolute path of a save, its phase, bytes written and bytes in all.
        stall_seconds: How long a save may show no sign of life, unless a hook of the user's is running;
            None for any time.
        plain: Nothing of the user's runs at its start, so that it cannot fail.
    """

    init: Init
    setup: bytes
    start_seconds: float
    barrier: Any
    on_progress: Callable[[str, str, int, int], None]
    stall_seconds: float | None = None
    plain: bool = False


class Handle:
    """A child process with the interface that `multiprocessing` users know."""

    def __init__(self, process: subprocess.Popen[bytes] | None) -> None:
        self._process = process
        self.processes = [self]

    @property
    def pid(self) -> int | None:
        """Its process id."""
        return self._process.pid if self._process else None

    @property
    def exitcode(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self._process.poll() if self._process else None

    def is_alive(self) -> bool:
        """Whether it runs."""
        return self._process is not None and self._process.poll() is None

    def join(self, timeout: float | None = None) -> bool:
        """Wait for its end; whether it has ended."""
        if self._process is not None:
            try:
                self._process.wait(timeout)
            except subprocess.TimeoutExpired:
                return False
        return True

    def terminate(self) -> None:
        """End it at once (it ignores SIGTERM)."""
        if self.is_alive() and self._process is not None:
            self._process.kill()

    kill = terminate


class Child:
    """A child process. Starting it does not wait for it; `ready` is done when it is.

    Args:
        orders: What it is to do.
    """

    def __init__(self, orders: Orders) -> None:
        self._orders = orders
        self._writes: dict[int, WriteFuture] = {}
        self._lock = threading.Lock()
        self._moved = time.monotonic()
        self._gone = False
        self.ready: Future[None] = Future()
        self.ready.set_running_or_notify_cancel()  # nobody can cancel it
        self._log = syscalls.anonymous_file("milepost-writer-log")
        self.channel, theirs = Channel.pair()
        process = None
        try:
            with theirs, _signals_held_back():
                process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                    [
                        sys.executable,
                        "-P",
                        "-c",
                        "from milepost.background.writer_main import main; main()",
                        str(theirs.fileno()),
                        str(os.getpid()),
                        *(["plain"] if orders.plain else []),
                    ],
                    pass_fds=(theirs.fileno(),),
                    env={
                        **os.environ,
                        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
                    },
                    stdin=subprocess.DEVNULL,
                    stdout=self._log,
                    stderr=self._log,
                    start_new_session=True,
                )
        except OSError as error:
            self.ready.set_exception(RuntimeError(f"the checkpoint process could not be started: {error}"))
        self.handle = Handle(process)
        self._pidfd = None if process is None else syscalls.watch_process(process.pid)
        self._say_init()
        self._deadline = time.monotonic() + orders.start_seconds
        self._thread = threading.Thread(target=self._listen, name="milepost-process", daemon=True)
        self._thread.start()

    def _say_init(self) -> None:
        blob = write_blob(self._orders.setup)
        try:
            self.channel.send(self._orders.init, [blob])
        finally:
            os.close(blob)

    def usable(self) -> bool:
        """Whether a request that is sent now can be carried out."""
        return not self._gone and (not self.ready.done() or self.ready.exception() is None)

    def stalled(self, seconds: float) -> bool:
        """Whether nothing has moved for so long."""
        return time.monotonic() - self._moved >= seconds

    def send(self, future: WriteFuture, message: Write, snapshot: Snapshot, image: StagedImage) -> None:
        """Hand a request over.

        Args:
            future: Done when the request is.
            message: The message for it.
            snapshot: What to write.
            image: Holds the bytes of its records.
        """
        number, meeting = future.number, future.request.meeting
        blob = write_blob(encode_snapshot(snapshot))
        with self._lock:
            self._writes[number] = future
            self._moved = time.monotonic()
            gone = self._gone
        try:
            with image.shared.opened() as attached:
                parts = range(0, len(attached), MAX_DESCRIPTORS)
                sent = not gone and all(
                    self.channel.send(Attached(number), attached[start : start + MAX_DESCRIPTORS])
                    for start in parts
                )
                sent = sent and self.channel.send(message, [image.arena.descriptor, blob])
            if sent and meeting is not None:
                meeting.listen(lambda news: self._pass_news(number, news))
        finally:
            os.close(blob)
        if not sent:  # its end is closed: it is about to end
            self._gone = True
            self._lose(future)

    # -- listening ---------------------------------------------------------------------------------

    def _listen(self) -> None:
        """Until the child has ended (a process of its own may hold the line open), or is given up."""
        others = () if self._pidfd is None else (self._pidfd,)
        try:
            while True:
                ready = self.channel.wait(self._patience(), *others)
                if self.channel.fileno() in ready:
                    message, _ = self.channel.receive()
                    if message is None:
                        break
                    self._take(message)
                elif not self.handle.is_alive():
                    break
                elif self._is_given_up():
                    self.handle.kill()
                    break
        except Exception:
            logger.exception("the checkpoint process cannot be understood")
        self._end()

    def _patience(self) -> float | None:
        """How long to wait for a message, in seconds."""
        if not self.ready.done():
            return max(self._deadline - time.monotonic(), 0.0)
        if self._pidfd is None:
            return 1.0
        stall = self._orders.stall_seconds
        return 60.0 if stall is None else max(min(stall, 60.0), 0.1)

    def _is_given_up(self) -> bool:
        if not self.ready.done():
            seconds = self._orders.start_seconds
            if time.monotonic() < self._deadline:
                return False
            self.ready.set_exception(
                TimeoutError(f"Timed out after {seconds} seconds waiting for the checkpoint process to start")
            )
            return True
        stall = self._orders.stall_seconds
        with self._lock:
            in_hook = any(future.phase in _HOOKS for future in self._writes.values())
            return bool(self._writes) and not in_hook and stall is not None and self.stalled(stall)

    def _end(self) -> None:
        """The child is gone or has to go: whoever waits for it is told, and what it took is released."""
        if not self.handle.join(5):
            self.handle.kill()
            self.handle.join(5)
        with self._lock:
            self._gone = True
            lost = list(self._writes.values())
        if not self.ready.done():
            self.ready.set_exception(RuntimeError(f"the checkpoint process ended at once:\n{self._output()}"))
        for future in lost:
            self._lose(future)
        self.channel.close()
        log, pidfd = self._log, self._pidfd
        self._log, self._pidfd = -1, None
        os.close(log)
        if pidfd is not None:
            os.close(pidfd)

    def _take(self, message: Message) -> None:
        self._moved = time.monotonic()
        if isinstance(message, Ready):
            self.ready.set_result(None)
        elif isinstance(message, Arrived):
            self._arrive(message.number)
        elif isinstance(message, Logged):
            logging.getLogger(message.logger).log(message.level, "%s", message.text)
        elif isinstance(message, Moved):
            self._pass_on(message)
        elif isinstance(message, Finished):
            if message.number >= 0:
                self._finish_write(message)
            elif message.failure is not None and not self.ready.done():
                self.ready.set_exception(_start_error(message.failure))

    def _pass_on(self, message: Moved) -> None:
        future = self._writes.get(message.number)
        if future is None:
            return
        future.phase = message.phase
        target = future.request.options.target
        try:
            self._orders.on_progress(target or "", message.phase, message.bytes_done, message.size_bytes)
        except Exception:
            logger.exception("reporting the progress of a save failed")

    def _arrive(self, number: int) -> None:
        future = self._writes.get(number)
        if future is not None and future.request.meeting is not None:
            future.request.meeting.arrive()
        else:
            threading.Thread(
                target=self._meet, args=(number, future), name="milepost-barrier", daemon=True
            ).start()

    def _pass_news(self, number: int, news: News) -> None:
        failure = describe_error(news.failure) if news.failure is not None else None
        self.channel.send(Go(number, failure, news.arrived, news.identity))

    def _meet(self, number: int, future: WriteFuture | None) -> None:
        """Execute the barrier for a save, at most once however often its writer is replaced."""
        failure = None
        try:
            if future is not None and not future.request.met:
                future.request.met = True
                self._orders.barrier.execute_barrier()
        except BaseException as error:  # noqa: BLE001 - the child reports it as the save's failure
            failure = describe_error(error)
        self.channel.send(Go(number, failure))

    def _finish_write(self, message: Finished) -> None:
        with self._lock:
            future = self._writes.pop(message.number, None)
        if future is None:
            return
        request = future.request
        request.held = None
        error = rebuild_error(message.failure) if message.failure is not None else None
        future.committed = message.committed or None
        if request.meeting is not None:
            request.meeting.close(Outcome(message.committed, message.identity, message.hidden), error)
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)

    def _lose(self, future: WriteFuture) -> None:
        with self._lock:
            if self._writes.pop(future.number, None) is None:
                return
        code = self.handle.exitcode
        error = LostWriterError(
            f"Child process terminated unexpectedly (exit code {code})",
            phase="write",
            hint=_GUARD_HINT
            if code == 0
            else "the staged state is intact: saving again works, with a new child",
        )
        output = self._output()
        if output:
            error.add_note(f"its last output:\n{output}")
        if self.ready.done() and self.ready.exception() is not None:
            error.add_note(f"it failed to start: {self.ready.exception()}")
        future.set_exception(error)

    def _output(self) -> str:
        try:
            size = os.fstat(self._log).st_size
            return os.pread(self._log, 8192, max(size - 8192, 0)).decode(errors="replace").strip()
        except OSError:
            return ""

    # -- ending ------------------------------------------------------------------------------------

    def finish(self, stall_seconds: float) -> None:
        """Ask the child to end when it is done, and wait for it as long as it gets on."""
        self.channel.send(Exit())
        if not self._writes:
            self._moved = time.monotonic()
        while self.handle.is_alive() and not self.stalled(stall_seconds):
            self.handle.join(0.05 if self._writes else 0.01)

    def stop(self) -> None:
        """End the child in any case, and wait until everything is released."""
        self.handle.kill()
        self.handle.join(10)
        if threading.current_thread() is not self._thread:  # as in a callback: then that goes on to the end
            self._thread.join(10)


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """A process started inside begins with these signals blocked, until it has said that it ignores them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_error(failure: Failure) -> RuntimeError:
    return RuntimeError(
        f"the checkpoint process could not start: {failure.name}: {failure.message}\n{failure.trace}"
    )
