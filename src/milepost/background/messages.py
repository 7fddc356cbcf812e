"""The line between a trainer and its writer process: an unnamed socket pair for small messages.

Whatever is large, and memory to share, travels as a file descriptor. Pickle crosses it for the user's own
functions, hooks and their arguments alone; errors cross as facts (`remote_errors`).
"""

from __future__ import annotations

import array
import errno
import os
import select
import socket
from collections.abc import Sequence
from contextlib import suppress

import msgspec

from milepost import syscalls
from milepost.background.remote_errors import Failure
from milepost.errors import StorageError

__all__ = [
    "MAX_DESCRIPTORS",
    "Arrived",
    "Attached",
    "Channel",
    "Exit",
    "Finished",
    "Go",
    "Init",
    "Logged",
    "Message",
    "Moved",
    "Ready",
    "Write",
    "decode_path",
    "encode_path",
    "read_blob",
    "write_blob",
]

_MAX_MESSAGE_BYTES = 128 * 1024
MAX_DESCRIPTORS = 64
"""How many descriptors a message can carry."""


class Init(msgspec.Struct, tag=True):
    """Trainer to writer, first of all: what to do. Functions and arguments are in its blob."""

    rank: int
    world_size: int
    process: str
    timeout_seconds: float
    has_barrier: bool
    nice: int
    idle_io: bool


class Write(msgspec.Struct, tag=True):
    """Trainer to writer: write this. Carries the arena and a blob; paths may be no text."""

    number: int
    path: bytes
    target: bytes
    attempt: str
    private: bool
    barrier_done: bool
    meets: bool = False


class Attached(msgspec.Struct, tag=True):
    """Trainer to writer, before a `Write`: descriptors of memory that its tensors lie in already."""

    number: int


class Go(msgspec.Struct, tag=True):
    """Trainer to writer: the barrier was passed, or failed; or what a meeting knows, as `News` has it."""

    number: int
    failure: Failure | None = None
    arrived: bool = False
    identity: str = ""


class Exit(msgspec.Struct, tag=True):
    """Trainer to writer: finish what was accepted, then end."""


class Ready(msgspec.Struct, tag=True):
    """Writer to trainer: started."""


class Moved(msgspec.Struct, tag=True):
    """Writer to trainer: a save has come this far."""

    number: int
    phase: str
    bytes_done: int
    size_bytes: int


class Arrived(msgspec.Struct, tag=True):
    """Writer to trainer: all ranks have arrived, meet at the barrier now."""

    number: int


class Logged(msgspec.Struct, tag=True):
    """Writer to trainer: a warning or an error, for the trainer's log. Nobody reads the writer's own."""

    logger: str
    level: int
    text: str


class Finished(msgspec.Struct, tag=True):
    """Writer to trainer: a save is over; its `Outcome`. Also sent with number -1 when the start failed."""

    number: int
    failure: Failure | None = None
    committed: bool = True
    identity: str = ""
    hidden: bool = False


Message = Failure | Init | Write | Attached | Go | Exit | Ready | Moved | Arrived | Logged | Finished
_decoder = msgspec.msgpack.Decoder(Message)


class Channel:
    """One end of the line. Sends may come from any thread, receives from one."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    @classmethod
    def pair(cls) -> tuple[Channel, socket.socket]:
        """This process's end, and the one for the child."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(ours), theirs

    def fileno(self) -> int:
        """The descriptor, for waiting."""
        return self._socket.fileno()

    def send(self, message: Message, descriptors: Sequence[int] = ()) -> bool:
        """Send a message and duplicates of descriptors; False when the other side is gone.

        Blocks while the line is full.
        """
        ancillary = (
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        )
        data = msgspec.msgpack.encode(message)
        try:
            self._socket.sendmsg([data], ancillary)
        except (BrokenPipeError, ConnectionResetError):
            return False
        except OSError as error:
            if error.errno in (errno.EBADF, errno.ENOTCONN):
                return False
            raise
        return True

    def receive(self) -> tuple[Message | None, list[int]]:
        """The next message with its descriptors, which the caller must close; None if there is no other side.

        A peer that died with messages of ours unread shows as ECONNRESET once; what it had sent before is
        still there to be read, so reading goes on until the line is empty.
        """
        resets = 0
        while True:
            try:
                data, ancillary, _, _ = self._socket.recvmsg(
                    _MAX_MESSAGE_BYTES,
                    socket.CMSG_SPACE(4 * MAX_DESCRIPTORS),
                    getattr(socket, "MSG_CMSG_CLOEXEC", 0),
                )
            except ConnectionResetError:
                resets += 1
                if resets > 2:
                    return None, []
                continue
            except OSError as error:
                if error.errno == errno.EBADF:
                    return None, []
                raise
            descriptors = array.array("i")
            for level, kind, content in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
            if not data:
                return None, []
            return _decoder.decode(data), list(descriptors)

    def wait(self, timeout_seconds: float | None, *others: int) -> set[int]:
        """Wait until this end or one of the other descriptors can be read; returns those that can."""
        poll = select.poll()
        for descriptor in (self.fileno(), *others):
            poll.register(descriptor, select.POLLIN)
        ready = poll.poll(None if timeout_seconds is None else timeout_seconds * 1000)
        return {descriptor for descriptor, _ in ready}

    def close(self) -> None:
        """Hang up; idempotent."""
        with suppress(OSError):
            self._socket.close()


def encode_path(path: str) -> bytes:
    """A path as bytes, whatever it holds."""
    return path.encode("utf-8", "surrogatepass")


def decode_path(path: bytes) -> str:
    """What `encode_path` was given."""
    return path.decode("utf-8", "surrogatepass")


def write_blob(data: bytes) -> int:
    """A descriptor of anonymous memory that holds `data`; the caller closes it."""
    descriptor = -1
    try:
        descriptor = syscalls.anonymous_file("milepost-message", len(data))
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
    except OSError as error:
        if descriptor >= 0:
            os.close(descriptor)
        raise StorageError.wrap(error, "write", "shared memory") from error
    return descriptor


def read_blob(descriptor: int) -> bytes:
    """All that a blob holds; closes it."""
    try:
        size = os.fstat(descriptor).st_size
        data = b""
        while len(data) < size:
            part = os.pread(descriptor, size - len(data), len(data))
            if not part:
                break
            data += part
        return data
    finally:
        os.close(descriptor)
