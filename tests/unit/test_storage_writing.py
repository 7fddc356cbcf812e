"""The streaming writer, its ring, and the small files that are written whole."""

from __future__ import annotations

import gc
import os
import threading
import weakref

import pytest
from support.disks import MemoryStorage
from support.processes import in_child

from milepost import syscalls
from milepost.errors import EntryExistsError, StorageError
from milepost.storage.writing import Ring, join, publish_bytes, write_bytes, write_stream
from milepost.testing import MUTATIONS, FaultyStorage

BLOCK = 4096


class Sink:
    """A new file that keeps what was written, or fails at a certain write."""

    def __init__(self, fail_at=None, error=None):
        self.writes = []
        self.threads = set()
        self._fail_at, self._error = fail_at, error

    def write(self, offset, data):
        self.threads.add(threading.current_thread())
        if len(self.writes) == self._fail_at:
            raise self._error
        self.writes.append((offset, bytes(data)))

    @property
    def content(self):
        assert [offset for offset, _ in self.writes] == [
            sum(len(data) for _, data in self.writes[:number]) for number in range(len(self.writes))
        ]
        return b"".join(data for _, data in self.writes)


def source(data):
    def fill(view, offset):
        view[:] = data[offset : offset + len(view)]

    return fill


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 9 * BLOCK + 7])
@pytest.mark.parametrize("blocks", [2, 4])
def test_blocks_are_written_in_order_and_whole(size, blocks):
    """Every byte that was filled in is written once, in order, in blocks of the ring's size."""
    data, sink, told = os.urandom(size), Sink(), []
    write_stream(sink, size, source(data), Ring(BLOCK, blocks), told.append)
    assert sink.content == data
    assert all(len(block) == BLOCK for _, block in sink.writes[:-1])
    assert told == [len(block) for _, block in sink.writes]


def test_files_of_one_block_start_no_thread(monkeypatch):
    """A file that fits into a block is written by the caller's thread."""
    monkeypatch.setattr(threading, "Thread", None)
    sink = Sink()
    write_stream(sink, BLOCK, source(b"x" * BLOCK), Ring(BLOCK))
    assert sink.threads == {threading.current_thread()}


def test_larger_files_are_written_by_one_other_thread():
    """Writes happen in one thread, apart from the caller's, while the caller fills the next block."""
    sink, filled_by = Sink(), set()

    def fill(view, offset):
        filled_by.add(threading.current_thread())

    write_stream(sink, 10 * BLOCK, fill, Ring(BLOCK))
    assert filled_by == {threading.current_thread()}
    assert len(sink.threads) == 1
    assert not sink.threads & filled_by


@pytest.mark.parametrize("error", [RuntimeError("fill"), KeyboardInterrupt(), SystemExit(3)])
@pytest.mark.parametrize("at", [0, 1, 5, 9])
def test_an_error_while_filling_stops_the_write(error, at):
    """What `fill` raises reaches the caller as it is; nothing after it is written, and the ring is free."""
    sink, ring = Sink(), Ring(BLOCK)

    def fill(view, offset):
        if offset == at * BLOCK:
            raise error

    with pytest.raises(type(error)) as caught:
        write_stream(sink, 10 * BLOCK, fill, ring)
    assert caught.value is error
    assert len(sink.writes) <= at
    write_stream(Sink(), 10 * BLOCK, lambda *_: None, ring)


@pytest.mark.parametrize("at", [0, 1, 5, 9])
def test_an_error_while_writing_stops_the_filling(at):
    """What the file raises reaches the caller as it is, after at most a ring of further blocks."""
    error = StorageError("full", errno=28)
    sink, ring, filled = Sink(at, error), Ring(BLOCK, 3), []
    with pytest.raises(StorageError) as caught:
        write_stream(sink, 10 * BLOCK, lambda _, offset: filled.append(offset), ring)
    assert caught.value is error
    assert len(filled) <= at + 3
    write_stream(Sink(), 10 * BLOCK, lambda *_: None, ring)


def test_an_error_in_progress_stops_both():
    """What `progress` raises reaches the caller as it is."""
    with pytest.raises(ZeroDivisionError):
        write_stream(Sink(), 10 * BLOCK, lambda *_: None, Ring(BLOCK), lambda count: 1 // 0)


def test_ctrl_c_waits_for_the_thread():
    """Ctrl-C while a thread is joined is raised once the thread has ended, and tells it to stop."""
    release = threading.Event()

    class Impatient(threading.Thread):
        def join(self, timeout=None):
            if not release.is_set():
                raise KeyboardInterrupt
            super().join(timeout)

    thread = Impatient(target=release.wait)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        join(thread, stop=release.set)
    assert not thread.is_alive()


def test_a_ring_needs_no_memory_until_it_is_used():
    """A ring costs nothing before its first use and after close(), which may be repeated."""
    ring = Ring()
    assert ring._memory is None
    with ring.lease() as blocks:
        assert len(blocks) == 4
        assert all(len(block) == 16 << 20 for block in blocks)
        assert all(syscalls.address_of(block) % 4096 == 0 for block in blocks)
    ring.close()
    ring.close()
    assert ring._memory is None


def test_a_ring_keeps_its_memory_between_uses():
    """The second use finds the memory of the first, with no fresh pages to touch."""
    ring = Ring(BLOCK)
    with ring.lease() as blocks:
        first = syscalls.address_of(blocks[0])
        blocks[0][0] = 7
    with ring.lease() as blocks:
        assert syscalls.address_of(blocks[0]) == first
        assert blocks[0][0] == 7


def test_a_ring_closed_in_use_stays_valid_for_its_user():
    """close() does not take the memory from under somebody who uses it."""
    ring = Ring(BLOCK)
    with ring.lease() as blocks:
        ring.close()
        blocks[3][:] = b"x" * BLOCK
        assert blocks[3][BLOCK - 1] == ord("x")
    with ring.lease() as blocks:
        assert blocks[0][0] == 0


def test_the_memory_goes_with_the_ring():
    """Collecting a ring gives its memory back."""
    ring = Ring(BLOCK)
    with ring.lease():
        memory = weakref.ref(ring._memory)
    del ring
    gc.collect()
    assert memory() is None


def test_one_user_at_a_time():
    """A second user of a ring waits until the first has finished."""
    ring, order = Ring(BLOCK), []

    def second():
        with ring.lease():
            order.append("second")

    thread = threading.Thread(target=second)
    with ring.lease():
        thread.start()
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_a_forked_child_has_a_ring_of_its_own():
    """A child forked while the ring is in use can use it, and gets other memory."""
    ring = Ring(BLOCK)
    with ring.lease() as blocks:
        blocks[0][0] = 7

        def uses_it():
            with ring.lease() as own:
                assert own[0][0] == 0

        assert in_child(uses_it) == 0
        assert blocks[0][0] == 7


@pytest.mark.parametrize(("block_bytes", "blocks"), [(0, 4), (4095, 4), (-4096, 4), (4096, 1)])
def test_rings_that_cannot_work_are_refused(block_bytes, blocks):
    """Blocks that cannot be written directly, or alone, are a ValueError."""
    with pytest.raises(ValueError, match="a ring needs"):
        Ring(block_bytes, blocks)


@pytest.fixture
def memory():
    storage = MemoryStorage()
    storage.make_folder("/f")
    return storage


def names(storage):
    return storage.open_folder("/f").names()


def content(storage, name):
    return storage.open_folder("/f").read(name, 1000)


@pytest.mark.parametrize("mode", ["create", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "full"), KeyboardInterrupt()])
def test_publishing_fails_whole(memory, mode, error):
    """Whichever operation of publish_bytes() fails, the old content stands and nothing is left beside it."""
    if mode == "replace":
        write_bytes(memory, "/f/a", b"old")
    before = names(memory)
    for number in range(1, 10):
        faulty = FaultyStorage(memory, counts=MUTATIONS).fail_at(number, error)
        try:
            publish_bytes(faulty, "/f/a", b"new", mode)
        except (StorageError, KeyboardInterrupt):
            assert names(memory) == before
            assert mode == "create" or content(memory, "a") == b"old"
        else:
            break
    assert number == 5  # create, write, finish and rename can fail
    assert content(memory, "a") == b"new"


def test_a_lost_race_leaves_nothing(memory):
    """Publishing a name that somebody else took first leaves theirs, and nothing of ours."""
    write_bytes(memory, "/f/a", b"theirs")
    with pytest.raises(EntryExistsError):
        publish_bytes(memory, "/f/a", b"ours", "create")
    assert names(memory) == ["a"]
    assert content(memory, "a") == b"theirs"


def test_what_is_aside_is_hidden(memory):
    """The name under which a file is written aside is hidden, and tells which file it will be."""
    seen = []
    faulty = FaultyStorage(memory, before=lambda operation, path: seen.append((operation, path)))
    publish_bytes(faulty, "/f/state.json", b"x", "create")
    (created,) = (path for operation, path in seen if operation == "create")
    folder, _, name = created.rpartition("/")
    assert folder == "/f"
    assert name.startswith(".state.json.")
    assert name.endswith(".tmp")
