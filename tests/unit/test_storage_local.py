"""What the local storage does beyond the contract: refusals, failures, links, forks and locks."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from support.processes import ended, fork, in_child

from milepost import syscalls
from milepost.errors import CorruptCheckpointError, EntryExistsError, EntryNotFoundError, StorageError
from milepost.storage.local import LocalStorage
from milepost.testing import short_writes, signal_storm

STORAGE = LocalStorage()


def failing(number, when=lambda *_: True):
    """A stand-in for an os function that fails."""

    def fail(*arguments, **_):
        if when(*arguments):
            raise OSError(number, os.strerror(number))

    return fail


def aligned(data: bytes) -> memoryview:
    view = syscalls.private_memory(max(len(data), 1))[: len(data)]
    view[:] = data
    return view


# ---------------------------------------------------------------------------- writing


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, (16 << 20) - 1, 16 << 20, (16 << 20) + 1])
def test_direct_files_have_their_exact_size(tmp_path, size):
    """A file written round the page cache holds its bytes to the last one, and no more."""
    data = os.urandom(size)
    file = STORAGE.create(f"{tmp_path}/f", direct=True)
    if size:
        file.write(0, aligned(data))
    file.finish(size)
    assert (tmp_path / "f").read_bytes() == data


needs_direct = pytest.mark.skipif(not syscalls.O_DIRECT, reason="this system has no O_DIRECT")


def test_direct_writes_are_direct(tmp_path):
    """Where the file system allows it, what was written is not in the page cache."""
    file = STORAGE.create(f"{tmp_path}/f", direct=True)
    if not file._direct:
        pytest.skip("no direct I/O here")
    file.write(0, aligned(bytes(1 << 20)))
    assert file._direct
    file.finish(1 << 20)
    opened = STORAGE.open_folder(str(tmp_path)).open("f")
    assert not opened.cached(0, 1 << 20)
    opened.read_into(0, [memoryview(bytearray(1 << 20))])
    assert opened.cached(0, 1 << 20)
    opened.close()


@needs_direct
def test_a_refused_write_goes_on_buffered(tmp_path, monkeypatch):
    """Direct I/O refused in the middle of a file costs speed, nothing else."""
    data = os.urandom(3 * 4096 + 5)
    file = STORAGE.create(f"{tmp_path}/f", direct=True)
    real, calls = os.pwrite, []

    def refuse_the_second(descriptor, view, offset):
        calls.append(offset)
        if len(calls) == 2:
            raise OSError(errno.EINVAL, "refused")
        return real(descriptor, view, offset)

    monkeypatch.setattr(os, "pwrite", refuse_the_second)
    file.write(0, aligned(data[:4096]))
    file.write(4096, aligned(data[4096:]))
    file.finish(len(data))
    assert calls[:3] == [0, 4096, 4096]
    assert (tmp_path / "f").read_bytes() == data


def test_refused_buffered_writes_are_errors(tmp_path, monkeypatch):
    """EINVAL for an ordinary write is raised, not retried for ever."""
    file = STORAGE.create(f"{tmp_path}/f")
    monkeypatch.setattr(os, "pwrite", failing(errno.EINVAL))
    with pytest.raises(StorageError) as caught:
        file.write(0, memoryview(b"x"))
    assert (caught.value.operation, caught.value.errno) == ("write", errno.EINVAL)
    file.discard()


@pytest.mark.parametrize("limit", [1, 100, 4096, 5000])
@pytest.mark.parametrize("direct", [True, False])
def test_short_writes_are_continued(tmp_path, limit, direct):
    """A write that the system cuts short is continued where it stopped."""
    data = os.urandom(10_001)
    file = STORAGE.create(f"{tmp_path}/f", direct=direct)
    with short_writes(limit):
        file.write(0, aligned(data))
    file.finish(len(data))
    assert (tmp_path / "f").read_bytes() == data


def test_signals_interrupt_nothing(tmp_path):
    """EINTR never gets out of any operation."""
    with signal_storm(0.0002):
        for number in range(20):
            path = f"{tmp_path}/{number}"
            STORAGE.make_folder(path)
            file = STORAGE.create(f"{path}/f", direct=True)
            file.write(0, aligned(bytes(1 << 20)))
            file.finish(1 << 20)
            STORAGE.rename(f"{path}/f", f"{path}/g", "create")
            STORAGE.sync_folder(path)
            lock = STORAGE.lock(f"{path}/g", exclusive=True)
            assert lock
            lock.release()
            assert len(STORAGE.open_folder(path).read("g", 1 << 20)) == 1 << 20
            STORAGE.remove(f"{path}/g")
            STORAGE.remove(path)


def test_a_disk_that_takes_nothing_is_full(tmp_path, monkeypatch):
    """A write of no bytes at all is ENOSPC, not a loop without an end."""
    file = STORAGE.create(f"{tmp_path}/f")
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    with pytest.raises(StorageError) as caught:
        file.write(0, memoryview(b"x"))
    assert caught.value.errno == errno.ENOSPC
    assert "free space" in str(caught.value)
    file.discard()


@pytest.mark.parametrize("call", ["ftruncate", "fsync", "close"])
def test_a_file_that_cannot_be_finished_is_removed(tmp_path, monkeypatch, call):
    """After a failed fsync (or truncate, or close) nothing of the file is trusted, and nothing is left."""
    file = STORAGE.create(f"{tmp_path}/f")
    descriptor = file._descriptor
    file.write(0, memoryview(b"x"))
    real_close = os.close
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(errno.EIO, lambda number, *_: number == descriptor))
        with pytest.raises(StorageError) as caught:
            file.finish(1)
    assert caught.value.errno == errno.EIO
    assert caught.value.path == f"{tmp_path}/f"
    if call == "close":
        real_close(descriptor)
    assert os.listdir(tmp_path) == []
    file.discard()


def test_an_interrupted_fsync_removes_the_file(tmp_path, monkeypatch):
    """Ctrl-C in the middle of finish() leaves neither a file nor a descriptor."""
    file = STORAGE.create(f"{tmp_path}/f")

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        file.finish(0)
    assert os.listdir(tmp_path) == []


def test_discard_spares_the_file_of_somebody_else(tmp_path):
    """A name that now belongs to another file is not removed with the one that was created."""
    file = STORAGE.create(f"{tmp_path}/f")
    os.rename(tmp_path / "f", tmp_path / "moved")
    (tmp_path / "f").write_bytes(b"theirs")
    file.discard()
    assert (tmp_path / "f").read_bytes() == b"theirs"


def test_a_forgotten_file_is_discarded(tmp_path):
    """A new file that is collected before it was finished leaves nothing."""
    file = STORAGE.create(f"{tmp_path}/f")
    del file
    assert os.listdir(tmp_path) == []


def test_ended_files_take_no_more(tmp_path):
    """write() and finish() after the end are errors."""
    file = STORAGE.create(f"{tmp_path}/f")
    file.finish(0)
    for use in (lambda: file.write(0, memoryview(b"x")), lambda: file.finish(0)):
        with pytest.raises(StorageError) as caught:
            use()
        assert caught.value.errno == errno.EBADF


def test_create_follows_no_link(tmp_path):
    """A dangling link at the path is a taken name, not a way to somewhere else."""
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EntryExistsError):
        STORAGE.create(f"{tmp_path}/link", direct=True)
    assert not (tmp_path / "elsewhere").exists()


@needs_direct
def test_a_failure_to_go_direct_leaves_nothing(tmp_path, monkeypatch):
    """An unexpected error on the way to direct I/O is raised, and the new file removed."""
    monkeypatch.setattr(fcntl, "fcntl", failing(errno.EIO))
    with pytest.raises(StorageError):
        STORAGE.create(f"{tmp_path}/f", direct=True)
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------------------- reading


def test_short_reads_are_continued(tmp_path, monkeypatch):
    """Reads that the system cuts short are continued, over the borders of buffers."""
    data = os.urandom(20_000)
    (tmp_path / "f").write_bytes(data)
    file = STORAGE.open_folder(str(tmp_path)).open("f")
    real = os.preadv

    def short(descriptor, buffers, offset, *flags):
        first = next(buffer for buffer in buffers if len(buffer))
        return real(descriptor, [first[: max(len(first) // 2, 1)]], offset, *flags)

    monkeypatch.setattr(os, "preadv", short)
    buffers = [memoryview(bytearray(size)) for size in (100, 0, 7000, 1, 12_899)]
    file.read_into(0, buffers)
    assert b"".join(buffers) == data
    view = syscalls.private_memory(20_480)
    file.read_direct(0, view)
    assert view[:20_000] == data
    file.close()


def test_reads_of_more_than_a_gibibyte_are_split(tmp_path, monkeypatch):
    """No single call asks for more than the system reads at once."""
    monkeypatch.setattr("milepost.storage.files._READ_BYTES", 1000)
    data = os.urandom(5000)
    (tmp_path / "f").write_bytes(data)
    file = STORAGE.open_folder(str(tmp_path)).open("f")
    buffers = [memoryview(bytearray(size)) for size in (10, 2500, 900, 200, 1390)]
    file.read_into(0, buffers)
    assert b"".join(buffers) == data
    file.close()


def test_direct_reads_refused_are_buffered(tmp_path, monkeypatch):
    """Where the file cannot be opened again for direct reads, it is read as it is."""
    (tmp_path / "f").write_bytes(b"x" * 5000)
    file = STORAGE.open_folder(str(tmp_path)).open("f")
    monkeypatch.setattr(os, "open", failing(errno.EACCES))
    view = syscalls.private_memory(8192)
    file.read_direct(0, view)
    assert view[:5000] == b"x" * 5000
    file.close()


def test_a_file_that_shrinks_is_damaged(tmp_path):
    """A file that was cut after it was opened is a CorruptCheckpointError with both sizes."""
    (tmp_path / "f").write_bytes(b"x" * 9000)
    file = STORAGE.open_folder(str(tmp_path)).open("f")
    os.truncate(tmp_path / "f", 100)
    for read in (
        lambda: file.read_into(0, [memoryview(bytearray(9000))]),
        lambda: file.read_direct(0, syscalls.private_memory(12_288)),
    ):
        with pytest.raises(CorruptCheckpointError, match="9000 bytes expected at least, 100 found"):
            read()
    file.close()


def test_closed_files_are_not_read(tmp_path):
    """Reading after close() is an error, never another file that got the descriptor."""
    (tmp_path / "f").write_bytes(b"x" * 4096)
    folder = STORAGE.open_folder(str(tmp_path))
    file = folder.open("f")
    file.close()
    folder.close()
    view = syscalls.private_memory(4096)
    for use in (
        lambda: file.read_into(0, [view]),
        lambda: file.read_direct(0, view),
        lambda: folder.open("f"),
        lambda: folder.stat("f"),
        folder.names,
    ):
        with pytest.raises(StorageError) as caught:
            use()
        assert caught.value.errno == errno.EBADF


def test_maps_hold_no_descriptor(tmp_path):
    """However many files are mapped, none of them keeps a descriptor open."""
    (tmp_path / "f").write_bytes(b"x" * 5000)
    before = len(os.listdir("/proc/self/fd"))
    views = []
    for _ in range(50):
        folder = STORAGE.open_folder(str(tmp_path))
        file = folder.open("f")
        views.append(file.map())
        file.close()
        folder.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert all(view[4999] == ord("x") for view in views)


def test_maps_go_with_their_last_view(tmp_path):
    """A mapping is given back when nobody looks at it any more."""
    (tmp_path / "mapped-file").write_bytes(b"x" * 5000)
    folder = STORAGE.open_folder(str(tmp_path))
    file = folder.open("mapped-file")
    part = file.map()[10:20]
    assert b"mapped-file" in Path("/proc/self/maps").read_bytes()
    assert bytes(part) == b"x" * 10
    del part
    assert b"mapped-file" not in Path("/proc/self/maps").read_bytes()
    file.close()
    folder.close()


def test_network_files_are_not_mapped(tmp_path, monkeypatch):
    """A mapping of a file that another machine may cut would kill the process; there is none."""
    (tmp_path / "f").write_bytes(b"x")
    file = STORAGE.open_folder(str(tmp_path)).open("f")
    monkeypatch.setattr(syscalls, "is_network_file_system", lambda _: True)
    assert file.map() is None
    file.close()


@pytest.mark.parametrize(("number", "is_none"), [(errno.ENODEV, True), (errno.ENOMEM, False)])
def test_maps_that_fail(tmp_path, monkeypatch, number, is_none):
    """A file system without mappings gives None; any other failure is raised."""
    (tmp_path / "f").write_bytes(b"x")
    file = STORAGE.open_folder(str(tmp_path)).open("f")
    monkeypatch.setattr(syscalls, "map_file_private", failing(number))
    if is_none:
        assert file.map() is None
    else:
        with pytest.raises(StorageError):
            file.map()
    file.close()


# ---------------------------------------------------------------------------- folders


def test_links_lead_nowhere(tmp_path):
    """A symbolic link is refused as a folder, as a file, and on the way to a file."""
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_bytes(b"x")
    (tmp_path / "real" / "link").symlink_to("file")
    (tmp_path / "link").symlink_to("real")
    for path in (f"{tmp_path}/link", f"{tmp_path}/link/"):
        with pytest.raises(StorageError) as caught:
            STORAGE.open_folder(path)
        assert caught.value.errno == errno.ENOTDIR
    folder = STORAGE.open_folder(str(tmp_path))
    for name in ("link/file", "real/link", "link"):
        with pytest.raises(CorruptCheckpointError):
            folder.open(name)
    assert folder.stat("link").kind == "symlink"
    assert STORAGE.stat(f"{tmp_path}/link").kind == "symlink"
    with pytest.raises(CorruptCheckpointError):
        folder.stat("link/file")
    assert folder.open("real/file").size == 1
    folder.close()


def test_pipes_sockets_and_devices_are_no_files(tmp_path):
    """What is no regular file is refused at once, without waiting for a writer."""
    os.mkfifo(tmp_path / "fifo")
    server = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(tmp_path)  # the path of a socket is limited to 107 bytes
    server.bind("socket")
    os.chdir(here)
    folder = STORAGE.open_folder(str(tmp_path))
    for name in ("fifo", "socket"):
        assert folder.stat(name).kind == "other"
        with pytest.raises(CorruptCheckpointError):
            folder.open(name)
        with pytest.raises(CorruptCheckpointError):
            folder.read(name, 100)
    folder.close()
    server.close()
    with pytest.raises(CorruptCheckpointError):
        STORAGE.open_folder("/dev").open("null")


def test_failing_opens_leak_nothing(tmp_path, monkeypatch):
    """A folder or a file that fails half-way through being opened keeps no descriptor."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "f").write_bytes(b"x")
    folder = STORAGE.open_folder(str(tmp_path))
    before = len(os.listdir("/proc/self/fd"))
    for name in ("a/none/f", "a/b/none", "a/b/f/g", "none/b/f"):
        with pytest.raises((CorruptCheckpointError, EntryNotFoundError)):
            folder.open(name)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", failing(errno.EIO))
        with pytest.raises(StorageError):
            folder.open("a/b/f")
    assert len(os.listdir("/proc/self/fd")) == before
    folder.close()


def test_mount_points_are_seen(tmp_path):
    """Stat.mount_point tells roots of file systems from ordinary folders."""
    assert STORAGE.stat("/proc").mount_point
    assert STORAGE.stat("/").mount_point
    assert not STORAGE.stat(str(tmp_path)).mount_point
    assert STORAGE.open_folder("/").stat("proc").mount_point


def test_read_only_entries_are_not_writable(tmp_path):
    """Stat.writable is false where this process may not write."""
    assert not STORAGE.open_folder("/proc").stat("version").writable or os.geteuid() == 0
    (tmp_path / "f").write_bytes(b"")
    (tmp_path / "f").chmod(0o400)
    assert STORAGE.stat(f"{tmp_path}/f").writable == (os.geteuid() == 0)


# ---------------------------------------------------------------------------- names


def test_folders_get_the_mode_of_any_new_folder(tmp_path):
    """A private folder is 0700; made public it is as if it had never been private."""
    (tmp_path / "group").mkdir()
    (tmp_path / "group").chmod(0o2775)
    for parent in (tmp_path, tmp_path / "group"):
        (parent / "plain").mkdir()
        STORAGE.make_folder(f"{parent}/private", private=True)
        assert stat.S_IMODE((parent / "private").stat().st_mode) & 0o777 == 0o700
        STORAGE.make_public(f"{parent}/private")
        assert (parent / "private").stat().st_mode == (parent / "plain").stat().st_mode


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP])
def test_folders_whose_mode_is_fixed_stay_private(tmp_path, monkeypatch, caplog, number):
    """Where no mode can be changed a folder stays private, and the log says so; real errors are raised."""
    STORAGE.make_folder(f"{tmp_path}/f", private=True)
    monkeypatch.setattr(os, "chmod", failing(number))
    STORAGE.make_public(f"{tmp_path}/f")
    assert f"others may not read it: {tmp_path}/f" in caplog.text
    monkeypatch.setattr(os, "chmod", failing(errno.EIO))
    with pytest.raises(StorageError):
        STORAGE.make_public(f"{tmp_path}/f")


def refuse_rename_flags(monkeypatch):
    monkeypatch.setattr(syscalls, "rename_exchange", failing(errno.ENOSYS))
    monkeypatch.setattr(syscalls, "rename_noreplace", failing(errno.EINVAL))


def test_exchange_refused_is_said(tmp_path, monkeypatch):
    """Where two names cannot be exchanged the error is EOPNOTSUPP and both are as they were."""
    refuse_rename_flags(monkeypatch)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with pytest.raises(StorageError) as caught:
        STORAGE.rename(f"{tmp_path}/a", f"{tmp_path}/b", "exchange")
    assert caught.value.errno == errno.EOPNOTSUPP


def test_create_without_links_still_refuses_a_taken_name(tmp_path, monkeypatch):
    """Without rename flags and hard links, mode "create" checks, then renames."""
    refuse_rename_flags(monkeypatch)
    monkeypatch.setattr(os, "link", failing(errno.EPERM))
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "b").write_bytes(b"b")
    with pytest.raises(EntryExistsError):
        STORAGE.rename(f"{tmp_path}/a", f"{tmp_path}/b", "create")
    STORAGE.rename(f"{tmp_path}/a", f"{tmp_path}/c", "create")
    assert sorted(os.listdir(tmp_path)) == ["b", "c"]


def test_a_create_that_ended_halfway_is_finished(tmp_path, monkeypatch):
    """A file that has both names loses the old one; two files of one content stay two."""
    refuse_rename_flags(monkeypatch)
    for name in "abc":
        (tmp_path / name).mkdir()
        (tmp_path / name / "f").write_bytes(b"f")
    os.unlink(tmp_path / "b" / "f")
    os.link(tmp_path / "a" / "f", tmp_path / "b" / "f")
    for source in "ac":
        with suppress(EntryExistsError):
            STORAGE.rename(f"{tmp_path}/{source}/f", f"{tmp_path}/b/f", "create")
    assert [os.listdir(tmp_path / name) for name in "abc"] == [[], ["f"], ["f"]]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_folders_without_fsync_are_left_alone(tmp_path, monkeypatch, number):
    """File systems that cannot fsync a folder are taken as they are; real errors are raised."""
    monkeypatch.setattr(os, "fsync", failing(number))
    STORAGE.sync_folder(str(tmp_path))
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(StorageError) as caught:
        STORAGE.sync_folder(str(tmp_path))
    assert (caught.value.operation, caught.value.errno) == ("sync folder", errno.EIO)


# ---------------------------------------------------------------------------- locks


def test_a_lock_ends_with_its_process(tmp_path):
    """The lock of a process that died is free."""
    (tmp_path / "f").write_bytes(b"")

    def take():
        assert STORAGE.lock(f"{tmp_path}/f")

    assert in_child(take) == 0
    lock = STORAGE.lock(f"{tmp_path}/f", exclusive=True)
    assert lock
    assert in_child(take) == 1
    lock.release()


def test_forked_children_do_not_keep_a_lock(tmp_path):
    """A child forked while a lock is held neither holds it nor can release it."""
    (tmp_path / "f").write_bytes(b"")
    lock = STORAGE.lock(f"{tmp_path}/f", exclusive=True)
    ready, tell = os.pipe()
    wait, end = os.pipe()

    def child_lets_go():
        lock.release()
        os.write(tell, b"x")
        os.close(end)
        os.read(wait, 1)

    pid = fork(child_lets_go)
    os.read(ready, 1)
    assert STORAGE.lock(f"{tmp_path}/f") is None
    os.close(lock._descriptor)  # what the system does when the owner is killed
    lock._descriptor = -1
    other = STORAGE.lock(f"{tmp_path}/f")
    assert other
    other.release()
    os.close(end)
    assert ended(pid) == 0
    for descriptor in (ready, tell, wait):
        os.close(descriptor)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_systems_without_locks(tmp_path, monkeypatch, number):
    """Where locks are unknown a shared one is granted and an exclusive one never."""
    (tmp_path / "f").write_bytes(b"")
    monkeypatch.setattr(fcntl, "flock", failing(number))
    lock = STORAGE.lock(f"{tmp_path}/f")
    assert lock
    lock.release()
    assert STORAGE.lock(f"{tmp_path}/f", exclusive=True) is None


def test_locks_that_fail_leak_nothing(tmp_path, monkeypatch):
    """An unexpected error of flock is raised."""
    (tmp_path / "f").write_bytes(b"")
    monkeypatch.setattr(fcntl, "flock", failing(errno.EIO))
    for exclusive in (False, True):
        with pytest.raises(StorageError):
            STORAGE.lock(f"{tmp_path}/f", exclusive=exclusive)


def test_exclusive_locks_need_no_permission_to_write(tmp_path, monkeypatch):
    """A file that may only be read can still be locked."""
    (tmp_path / "f").write_bytes(b"")
    real = os.open

    def read_only(path, flags, *arguments, **options):
        if flags & os.O_RDWR:
            raise OSError(errno.EACCES, "denied")
        return real(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", read_only)
    lock = STORAGE.lock(f"{tmp_path}/f", exclusive=True)
    assert lock
    lock.release()


# ---------------------------------------------------------------------------- forks


def test_a_forked_child_leaves_the_parents_files_alone(tmp_path):
    """Closing, discarding and collecting in a child changes nothing for the parent."""
    (tmp_path / "old").write_bytes(b"content")
    folder = STORAGE.open_folder(str(tmp_path))
    opened = folder.open("old")
    new = STORAGE.create(f"{tmp_path}/new")

    def child_ends_everything():
        new.discard()
        new.__del__()
        opened.close()
        folder.close()
        with pytest.raises(StorageError):
            new.finish(0)

    assert in_child(child_ends_everything) == 0
    new.write(0, memoryview(b"x"))
    new.finish(1)
    buffer = bytearray(7)
    opened.read_into(0, [memoryview(buffer)])
    assert bytes(buffer) == b"content"
    assert folder.names() == ["new", "old"]
    opened.close()
    folder.close()


def test_many_threads_may_read_one_file(tmp_path):
    """Direct reads from many threads at once share one descriptor, opened once."""
    data = os.urandom(1 << 20)
    (tmp_path / "f").write_bytes(data)
    folder = STORAGE.open_folder(str(tmp_path))
    file = folder.open("f")
    before = len(os.listdir("/proc/self/fd"))
    results = []
    start = threading.Barrier(8)

    def read():
        view = syscalls.private_memory(1 << 20)
        start.wait()
        file.read_direct(0, view)
        results.append(view == data)

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 8
    assert len(os.listdir("/proc/self/fd")) <= before + 1
    file.close()
    folder.close()
