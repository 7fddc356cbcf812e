"""The line between a trainer and its writer: messages, descriptors, errors, and the ends of it."""

from __future__ import annotations

import builtins
import os
import struct
import subprocess
import sys
import threading

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from milepost import errors
from milepost.background import remote_errors
from milepost.background.messages import (
    MAX_DESCRIPTORS,
    Arrived,
    Attached,
    Channel,
    Exit,
    Finished,
    Go,
    Init,
    Moved,
    Ready,
    Write,
    encode_path,
    read_blob,
    write_blob,
)
from milepost.background.remote_errors import Failure, describe_error, rebuild_error
from milepost.background.service import Service
from milepost.background.writer_main import READY
from milepost.errors import MilepostError, RemoteError, StorageError


@pytest.fixture
def line():
    ours, theirs = Channel.pair()
    other = Channel(theirs)
    yield ours, other
    ours.close()
    other.close()


MESSAGES = [
    Init(1, 2, "process", 3.5, has_barrier=True, nice=5, idle_io=False),
    Write(1, b"p", b"/p", "a-1", private=True, barrier_done=False),
    Write(2, encode_path("\udcff"), b"/\xff", "a-1", private=False, barrier_done=True),
    Attached(3),
    Go(1),
    Go(1, Failure("m", "n", "text", {"rank": 1, "path": None, "flag": True}, "trace")),
    Exit(),
    Ready(),
    Moved(1, "write", 2**40, 2**41),
    Arrived(1),
    Finished(-1, Failure("m", "n", "text")),
]


def test_every_message_arrives_as_it_was_sent_and_in_order(line):
    """Messages keep their type, content, boundaries and order."""
    ours, theirs = line
    for message in MESSAGES:
        assert ours.send(message)
    for message in MESSAGES:
        assert theirs.receive() == (message, [])


def test_descriptors_travel_with_a_message(line):
    """The receiver gets descriptors of its own of the same files, not inherited by its children."""
    ours, theirs = line
    blobs = [write_blob(b"number %d" % n) for n in range(MAX_DESCRIPTORS)]
    assert ours.send(Attached(1), blobs)
    for blob in blobs:
        os.close(blob)
    message, received = theirs.receive()
    assert message == Attached(1)
    assert not any(os.get_inheritable(descriptor) for descriptor in received)
    assert [read_blob(descriptor) for descriptor in received] == [b"number %d" % n for n in range(64)]


@pytest.mark.parametrize("size", [0, 1, 70_000, 5_000_000])
def test_a_blob_is_read_whole_and_closed(size):
    """A blob of any size comes back, wherever the descriptor's position is; its descriptor is closed."""
    data = os.urandom(size)
    blob = write_blob(data)
    assert read_blob(blob) == data
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(blob)


def test_waiting_tells_what_can_be_read(line):
    """`wait` returns nothing when the time is up, and the descriptors that are ready otherwise."""
    ours, theirs = line
    reader, writer = os.pipe()
    assert ours.wait(0) == set()
    assert ours.wait(0.01, reader) == set()
    os.write(writer, b"x")
    assert ours.wait(10, reader) == {reader}
    theirs.send(Ready())
    assert ours.wait(10, reader) == {reader, ours.fileno()}
    os.close(reader)
    os.close(writer)


def test_the_end_of_the_line_is_seen_on_both_sides(line):
    """When the other side has hung up, receiving says None and sending False; messages sent before arrive."""
    ours, theirs = line
    theirs.send(Arrived(4))
    theirs.close()
    theirs.close()
    assert ours.receive() == (Arrived(4), [])
    assert ours.receive() == (None, [])
    assert ours.send(Ready()) is False
    assert theirs.send(Ready()) is False
    assert theirs.receive() == (None, [])


def test_a_peer_that_dies_with_an_unread_message_loses_none_of_its_own(line):
    """ECONNRESET, by which such a death shows, hides no request that was sent before it."""
    ours, theirs = line
    for number in range(3):
        assert ours.send(Arrived(number))
    assert theirs.send(Ready())  # which ours never reads
    ours.close()
    assert [theirs.receive()[0] for _ in range(4)] == [Arrived(0), Arrived(1), Arrived(2), None]


def test_a_writer_that_has_imported_nothing_yet_can_say_that_it_is_ready():
    """The bytes that the writer process sends first are the message Ready."""
    assert msgspec.msgpack.encode(Ready()) == READY


def test_a_writer_starts_though_its_trainer_has_gone_already():
    """A writer that cannot say that it is ready goes on to read what the trainer has sent before its end."""
    ours, theirs = Channel.pair()
    ours.close()
    script = "from milepost.background.writer_main import main; main()"
    command = [sys.executable, "-c", script, str(theirs.fileno()), str(os.getpid()), "plain"]
    with theirs:
        done = subprocess.run(
            command, check=False, pass_fds=[theirs.fileno()], capture_output=True, timeout=60
        )
    assert (done.returncode, done.stderr) == (0, b"")


# -- errors ----------------------------------------------------------------------------------------


def test_a_trainer_that_hangs_up_while_its_writer_waits_for_the_barrier(line):
    """The end of the line ends the wait without a failure, whatever else tells of the trainer."""
    service, trainer = Service(line[0], os.getppid()), line[1]
    service._init = msgspec.structs.replace(MESSAGES[0], timeout_seconds=60)

    def hang_up():
        assert trainer.receive()[0] == Arrived(1)
        trainer.close()

    thread = threading.Thread(target=hang_up)
    thread.start()
    service._barrier(MESSAGES[1])
    thread.join()
    os.close(service._pidfd)


def cross(error):
    """An error, after it has been raised here and has crossed the line."""
    try:
        raise error
    except BaseException as raised:
        failure = describe_error(raised)
    ours, theirs = Channel.pair()
    other = Channel(theirs)
    assert other.send(Finished(1, failure))
    message, _ = ours.receive()
    ours.close()
    other.close()
    return rebuild_error(message.failure)


@pytest.mark.parametrize("kind", [getattr(errors, name) for name in errors.__all__ if name.endswith("Error")])
def test_our_errors_cross_with_their_type_facts_and_traceback(kind):
    """Each error of ours arrives as its own class, as a RemoteError too, with every fact and a note."""
    error = kind("what happened", path="/p", rank=3, key="a.b", phase="write", hint="try this")
    back = cross(error)
    assert isinstance(back, kind)
    assert isinstance(back, RemoteError)
    assert str(back) == str(error)
    assert (back.path, back.rank, back.key, back.phase, back.hint) == ("/p", 3, "a.b", "write", "try this")
    assert "test_channel.py" in "".join(back.__notes__)


def test_a_storage_error_crosses_with_its_errno():
    """The errno and operation of a failed file operation survive the way."""
    back = cross(StorageError.wrap(OSError(28, "No space left on device"), "write", "/p/file"))
    assert isinstance(back, OSError)
    assert (back.errno, back.operation, back.path) == (28, "write", "/p/file")
    assert "free space" in str(back)


@pytest.mark.parametrize("name", sorted(dir(builtins)))
def test_built_in_errors_cross_with_their_type(name):
    """Any exception of Python's arrives as an error with its name and text, of its type where that can be."""
    kind = getattr(builtins, name)
    if not (isinstance(kind, type) and issubclass(kind, BaseException)):
        return
    name = kind.__name__  # some have two
    if kind is UnicodeDecodeError:
        error = kind("utf-8", b"\xff", 0, 1, "bad")
    elif kind is UnicodeEncodeError:
        error = kind("utf-8", "x", 0, 1, "bad")
    elif kind is UnicodeTranslateError:
        error = kind("x", 0, 1, "bad")
    elif issubclass(kind, BaseExceptionGroup):
        error = kind("several", [ValueError("one")])
    else:
        error = kind("some text")
    back = cross(error)
    assert isinstance(back, RemoteError)
    assert str(error) in str(back)
    assert type(back).__name__ == name or name in str(back) or issubclass(kind, BaseExceptionGroup)
    if kind in (OSError, ValueError, KeyError, MemoryError, FileNotFoundError, PermissionError):
        assert isinstance(back, kind)


class TheirsError(Exception):
    """An error of a user's module."""


def test_errors_of_other_modules_are_named():
    """A user's own class, which the trainer may not have, arrives as a RemoteError that names it."""
    back = cross(TheirsError("something"))
    assert isinstance(back, RemoteError)
    assert "test_channel.TheirsError: something" in str(back)
    assert type(back).__name__ == "TheirsError"


def test_errors_of_any_size_fit_into_a_message():
    """Megabytes of text, facts or traceback are cut, and do not end the process that reports them."""
    huge = "ü" * 3_000_000
    back = cross(ValueError(huge))
    assert isinstance(back, ValueError)
    assert str(back).startswith("üüü")
    assert len(str(back)) < 20_000
    assert len(cross(StorageError("short", path=huge, key=huge, hint=huge)).path) < 20_000
    names = {"x" * 30_000: None}
    assert "TypeError" in type(cross(TypeError(names))).__name__


def test_errors_with_any_text_can_cross():
    """Lone surrogates, as in names of files that are no UTF-8, and errors that cannot tell their text."""

    class MuteError(Exception):
        def __str__(self):
            raise RuntimeError("no text")

    assert "\\udcff" in str(cross(ValueError("\udcff")))
    assert cross(StorageError("m", path="/\udcff")).path == "/\\udcff"
    assert "could not be had: RuntimeError" in str(cross(MuteError()))


@given(st.text(max_size=50), st.none() | st.text(max_size=20), st.none() | st.integers(0, 2**62))
def test_any_facts_cross(message, path, rank):
    """Whatever the facts of an error are, they arrive (with what UTF-8 lacks written as escapes)."""
    back = cross(MilepostError(message, path=path, rank=rank))
    assert back.rank == rank
    assert back.message == message.encode("utf-8", "backslashreplace").decode()
    assert back.path == (None if path is None else path.encode("utf-8", "backslashreplace").decode())


def test_messages_of_a_full_line_wait():
    """The module's largest message fits the line, so that no send is refused for its size."""
    text = "x" * remote_errors._MAX_TEXT_BYTES
    fact = "x" * remote_errors._MAX_FACT_BYTES
    facts = dict.fromkeys(("path", "key", "phase", "hint", "operation"), fact)
    largest = Finished(1, Failure(fact, fact, text, facts, "x" * remote_errors._MAX_TRACE_BYTES))
    ours, theirs = Channel.pair()
    other = Channel(theirs)
    assert ours.send(largest)
    assert other.receive()[0] == largest
    assert struct.calcsize("i") * MAX_DESCRIPTORS < 4096
    ours.close()
    other.close()
