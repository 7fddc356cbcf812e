"""Background saves where the system gives no memfd, little room in /dev/shm, or a limit of file sizes."""

from __future__ import annotations

import ctypes
import errno
import inspect
import logging
import os
import platform
import resource
import struct
import tempfile
from unittest import mock

import pytest
import torch
from support.background import error_of, make, result
from support.processes import in_child
from support.states import assert_same

from milepost import syscalls
from milepost.background.arena import Arena
from milepost.background.messages import read_blob, write_blob
from milepost.background.service import Service
from milepost.errors import LowMemoryError, StorageError

LIBC = ctypes.CDLL(None, use_errno=True)
MEMFD_CREATE = {"x86_64": 319, "aarch64": 279}
NOT_HERE = 77
MIB = 1 << 20


def refuse_memfd(number):
    """Have the kernel answer memfd_create with an errno, here and in all children, as containers do."""
    instructions = b"".join(
        struct.pack("<HBBI", *instruction)
        for instruction in (
            (0x20, 0, 0, 0),  # load the number of the call
            (0x15, 0, 1, MEMFD_CREATE[platform.machine()]),  # skip the next one if it is another
            (0x06, 0, 0, 0x00050000 | number),  # answer with the errno
            (0x06, 0, 0, 0x7FFF0000),  # allow
        )
    )
    code = ctypes.create_string_buffer(instructions, len(instructions))
    program = ctypes.create_string_buffer(struct.pack("@HP", 4, ctypes.addressof(code)))
    refused = not inspect.isbuiltin(os.memfd_create)  # in Python, by a session without memfd
    if (
        refused or LIBC.prctl(38, 1, 0, 0, 0) or LIBC.prctl(22, 2, program, 0, 0)
    ):  # no filter: in Python alone
        os.memfd_create = mock.Mock(side_effect=OSError(number, os.strerror(number)))
    with pytest.raises(OSError, match=os.strerror(number)):
        os.memfd_create("x")


def mount_tmpfs(folder, options):
    """Mount a file system in memory, for this process and its children alone."""
    if (
        LIBC.unshare(0x20000)
        or LIBC.mount(b"none", b"/", None, 0x44000, None)
        or LIBC.mount(b"tmpfs", folder, b"tmpfs", 0, options)
    ):
        os._exit(NOT_HERE)


def run_or_skip(work):
    """Run a test in a child; skip it where the system does not let the child mount what it needs."""
    code = in_child(work)
    if code == NOT_HERE:
        pytest.skip("this process may not mount file systems")
    assert code == 0


def saves_and_loads(folder, sizes):
    """Save states of these sizes in the background and load each; returns what the log has warned of."""
    torch.set_num_threads(1)
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("milepost").addHandler(handler)
    syscalls._told.clear()
    with make(on_low_memory="raise") as checkpointer:
        for step, size in enumerate(sizes):
            state = {"w": torch.full((size // 4,), float(step)), "step": step}
            result(checkpointer.save(f"{folder}/c", state, step=step)[1])
            assert_same(checkpointer.load(f"{folder}/c"), state)
    return records


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM])
def test_saves_work_without_memfd(tmp_path, number):
    """Where the kernel refuses memfd_create, saves are staged in /dev/shm, which the log says once."""

    def work():
        refuse_memfd(number)
        records = saves_and_loads(tmp_path, [100, 3 * MIB, 100])
        assert records == [
            "this system refuses memfd_create: shared memory is a nameless file in /dev/shm"
        ], records

    run_or_skip(work)


def test_saves_work_without_memfd_and_with_a_small_dev_shm(tmp_path):
    """What has no room in the /dev/shm of a container is staged in the folder for temporary files."""

    def work():
        mount_tmpfs(b"/dev/shm", b"size=2m")
        refuse_memfd(errno.EPERM)
        records = saves_and_loads(tmp_path, [100, 3 * MIB, 100])
        assert [record.rpartition(" ")[2] for record in records] == ["/dev/shm", tempfile.gettempdir()]

    run_or_skip(work)


def test_a_growing_arena_without_memfd_never_lacks_room():
    """An arena that cannot grow where it lies is as it was, and the error is one of memory, no SIGBUS."""

    def work():
        mount_tmpfs(b"/dev/shm", b"size=2m")
        refuse_memfd(errno.EPERM)
        arena = Arena(MIB)
        arena.view[:3] = b"old"
        with pytest.raises(LowMemoryError, match="3,145,728 bytes of shared memory: No space"):
            arena.grow(3 * MIB)
        assert (arena.size, bytes(arena.view[:3])) == (MIB, b"old")
        other = Arena(3 * MIB)
        other.view[:] = b"x" * (3 * MIB)
        blob = write_blob(b"y" * (3 * MIB))
        assert read_blob(blob) == b"y" * (3 * MIB)

    run_or_skip(work)


def test_arenas_of_one_inode_number_are_told_apart(tmp_path):
    """A writer tells an arena from one on another file system that has the same inode number."""

    def work():
        refuse_memfd(errno.EPERM)
        made = []
        for name in (b"a", b"b"):
            folder = os.fsencode(tmp_path) + b"/" + name
            os.mkdir(folder)
            mount_tmpfs(folder, b"size=1m")
            syscalls._MEMORY_FOLDER = os.fsdecode(folder)
            made.append(Arena(1))
            made[-1].view[:1] = name
        first, second = (os.fstat(arena.descriptor) for arena in made)
        assert first.st_ino == second.st_ino
        service = Service(None, os.getppid())
        seen = [bytes(service._map(os.dup(arena.descriptor)).view[:1]) for arena in made]
        assert seen == [b"a", b"b"]

    run_or_skip(work)


def limited(size, work):
    """Run something in a child whose files, and so its shared memory, may not be larger."""

    def run():
        torch.set_num_threads(1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        work()

    assert in_child(run) == 0


def test_a_limit_of_file_sizes_is_a_storage_error(tmp_path):
    """Where a file may not become as large as the checkpoint, the save fails with EFBIG and the way out."""

    def work():
        with make() as checkpointer:
            result(checkpointer.save(str(tmp_path / "small"), {"w": torch.ones(10)})[1])
            with pytest.raises(StorageError, match="File too large") as caught:
                checkpointer.save(str(tmp_path / "c"), {"w": torch.ones(MIB)})
            assert caught.value.errno == errno.EFBIG
            assert "ulimit -f" in caught.value.hint
            result(checkpointer.save(str(tmp_path / "small"), {"w": torch.ones(10)})[1])

    limited(2 * MIB, work)
    assert os.listdir(tmp_path) == ["small"]


def test_a_limit_of_the_writers_file_sizes_fails_that_save(tmp_path):
    """Where only the writer may not write so large a file, that the future tells it; the next save works."""
    with make() as checkpointer:
        pid = checkpointer._process.process.pid
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (2 * MIB, 2 * MIB))
        error = error_of(checkpointer.save(str(tmp_path / "c"), {"w": torch.ones(MIB)})[1])
        assert isinstance(error, StorageError)
        assert error.errno == errno.EFBIG
        assert "ulimit -f" in error.hint
        result(checkpointer.save(str(tmp_path / "c"), {"w": torch.ones(10)})[1])
    assert os.listdir(tmp_path) == ["c"]


def test_a_limit_of_file_sizes_is_told_where_nothing_may_go_on_without_staging(tmp_path):
    """With on_low_memory="raise", the error says that the limit holds for shared memory as well."""

    def work():
        with make(on_low_memory="raise") as checkpointer, pytest.raises(LowMemoryError) as caught:
            checkpointer.save(str(tmp_path / "c"), {"w": torch.ones(MIB)})
        assert "ulimit -f" in caught.value.hint

    limited(2 * MIB, work)
