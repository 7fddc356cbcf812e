"""Every operation of the storage failing, or killing the process, in turn."""

from __future__ import annotations

import errno
import os
import pickle
import resource

import pytest
from support.disks import MemoryStorage
from support.processes import KILLED, in_child

from milepost import syscalls
from milepost.errors import StorageError
from milepost.storage.local import LocalStorage
from milepost.storage.writing import Ring, publish_bytes, write_bytes, write_stream
from milepost.testing import MUTATIONS, FaultyStorage

BLOCK = 4096
DATA = bytes(range(256)) * 16 * 5 + b"tail"


def save(storage, folder):
    """A small save: data aside in a folder of its own, a mark, one exchange with the old folder."""
    aside = f"{folder}/.aside"
    storage.make_folder(aside, private=True)
    file = storage.create(f"{aside}/data", direct=True)
    try:
        write_stream(file, len(DATA), fill, Ring(BLOCK))
    except BaseException:
        file.discard()
        raise
    file.finish(len(DATA))
    publish_bytes(storage, f"{aside}/mark", b"new", "create")
    storage.sync_folder(aside)
    storage.make_public(aside)
    storage.rename(aside, f"{folder}/current", "exchange")
    storage.sync_folder(folder)
    for name in ("data", "mark"):
        storage.remove(f"{aside}/{name}")
    storage.remove(aside)


def fill(view, offset):
    view[:] = DATA[offset : offset + len(view)]


def prepare(storage, folder):
    storage.make_folder(f"{folder}/current")
    write_bytes(storage, f"{folder}/current/data", b"old data")
    write_bytes(storage, f"{folder}/current/mark", b"old")


def current(storage, folder):
    opened = storage.open_folder(f"{folder}/current")
    found = {name: opened.read(name, 1 << 20) for name in opened.names()}
    opened.close()
    return found


OLD = {"data": b"old data", "mark": b"old"}
NEW = {"data": DATA, "mark": b"new"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("times", [1, None])
def test_each_operation_failing_in_turn(tmp_path, number, times):
    """Whichever operation fails, once or for good, the error says so and no half of a save is seen."""
    failed = 0
    for at in range(1, 100):
        folder = str(tmp_path / str(at))
        os.mkdir(folder)
        prepare(LocalStorage(), folder)
        faulty = FaultyStorage(LocalStorage()).fail_at(at, OSError(number, "injected"), times=times)
        error = None
        try:
            save(faulty, folder)
        except StorageError as caught:
            error = caught
        if len(faulty.operations) < at:
            break
        operation, _, path = faulty.operations[at - 1].partition(" ")
        if error or operation != "discard":
            failed += 1
            assert (error.errno, error.operation, error.path) == (number, operation, path)
        assert current(LocalStorage(), folder) in (OLD, NEW)
    assert error is None
    assert failed > 15
    assert current(LocalStorage(), folder) == NEW


@pytest.mark.parametrize("way", ["kill", "torn"])
def test_a_kill_at_each_operation(tmp_path, way):
    """Killed by SIGKILL before, or in the middle of, any operation, a process leaves old or new, whole."""
    for at in range(1, 100):
        folder = str(tmp_path / str(at))
        os.mkdir(folder)
        prepare(LocalStorage(), folder)
        faulty = FaultyStorage(LocalStorage(), counts=MUTATIONS).fail_at(at, way)
        code = in_child(lambda faulty=faulty, folder=folder: save(faulty, folder))
        assert current(LocalStorage(), folder) in (OLD, NEW)
        if code == 0:
            break
        assert code == KILLED
    assert at > 15
    assert current(LocalStorage(), folder) == NEW


def test_a_full_disk(tmp_path):
    """A write beyond what the system allows is an error that names the file, which is then removed."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    storage = LocalStorage()
    view = syscalls.private_memory(1 << 20)
    for direct in (True, False):
        file = storage.create(f"{tmp_path}/f", direct=direct)
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, limits[1]))
        try:
            with pytest.raises(StorageError) as caught:
                file.write(0, view)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert (caught.value.errno, caught.value.path) == (errno.EFBIG, f"{tmp_path}/f")
        file.discard()
        assert os.listdir(tmp_path) == []


def test_faults_have_numbers_and_names():
    """Operations are counted over everything made from the storage; only the chosen ones, where chosen."""
    memory = MemoryStorage()
    faulty = FaultyStorage(memory)
    publish_bytes(faulty, "/f", b"x", "create")
    folder = faulty.open_folder("/")
    folder.read("f", 1)
    file = folder.open("f")
    file.read_into(0, [memoryview(bytearray(1))])
    file.map()
    file.cached(0, 1)
    file.close()
    names = [operation.split()[0] for operation in faulty.operations]
    assert names == ["create", "write", "finish", "rename", "open_folder", "read", "open", "read", "map"]
    counted = FaultyStorage(memory, counts={"remove"}).fail_at(1, OSError(errno.EIO, "injected"))
    counted.make_folder("/d")
    with pytest.raises(StorageError):
        counted.remove("/d")
    counted.remove("/d")
    assert counted.operations == ["remove /d", "remove /d"]


def test_pickled_faults_start_anew():
    """A copy in another process has the same faults and a count of its own."""
    faulty = FaultyStorage(LocalStorage()).fail_at(2, OSError(errno.EIO, "injected"))
    faulty.stat("/")
    copy = pickle.loads(pickle.dumps(faulty))
    copy.stat("/")
    with pytest.raises(StorageError):
        copy.stat("/")


def test_the_caller_can_wait_before_each_operation():
    """`before` sees every operation first, so that a test can order, or slow down, what happens."""
    seen = []
    faulty = FaultyStorage(MemoryStorage(), before=lambda *step: seen.append(step))
    faulty.make_folder("/d", private=True)
    faulty.make_public("/d")
    faulty.sync_folder("/d")
    assert seen == [("make_folder", "/d"), ("make_public", "/d"), ("sync_folder", "/d")]
