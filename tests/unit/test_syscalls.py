"""The calls to the operating system."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import re
from pathlib import Path

import pytest

from milepost import syscalls


def test_private_memory_is_private_and_aligned():
    """Memory comes zeroed, at addresses for direct I/O and huge pages, and is no shared memory."""
    for size in (1, 4096, 5000, 2 << 20, (16 << 20) + 4096):
        view = syscalls.private_memory(size)
        address = syscalls.address_of(view)
        assert len(view) == size
        assert address % (4096 if size < 2 << 20 else 2 << 20) == 0
        assert view[0] == view[size - 1] == 0
        (line,) = (line for line in maps() if line[0] <= address < line[1])
        assert line[2][3] == "p"


def maps():
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end, mode = re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+)", line).groups()
        yield int(start, 16), int(end, 16), mode


def test_private_memory_is_not_touched_before_its_use():
    """Asking for memory takes none; giving up its last view gives it back."""

    def virtual_and_resident():
        return [int(pages) * 4096 for pages in Path("/proc/self/statm").read_text().split()[:2]]

    gc.collect()
    before = virtual_and_resident()
    view = syscalls.private_memory(1 << 30)
    after = virtual_and_resident()
    assert after[0] - before[0] >= 1 << 30
    assert after[1] - before[1] < 16 << 20
    part = view[10:20]
    del view
    assert virtual_and_resident()[0] - before[0] >= 1 << 30
    del part
    assert virtual_and_resident()[0] - before[0] < 1 << 29


def test_raw_memory_can_be_seen():
    """memory_at() is the memory at an address, and address_of() the way back."""
    array = (ctypes.c_char * 10)(*b"0123456789")
    view = syscalls.memory_at(ctypes.addressof(array) + 2, 3)
    assert bytes(view) == b"234"
    view[0:1] = b"x"
    assert array.raw == b"01x3456789"
    assert syscalls.address_of(view) == ctypes.addressof(array) + 2
    assert syscalls.address_of(memoryview(b"constant")) is None
    assert syscalls.address_of(memoryview(bytearray())) is None


def test_the_mask_is_read_and_kept(monkeypatch):
    """umask() gives this process's mask and leaves it as it is, with or without /proc."""
    before = os.umask(0o027)
    try:
        assert syscalls.umask() == 0o027

        def no_proc(*_, **__):
            raise FileNotFoundError

        monkeypatch.setattr("builtins.open", no_proc)
        assert syscalls.umask() == 0o027
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)


@pytest.mark.parametrize(
    ("magic", "expected"), [(0x6969, True), (0xFF534D42, True), (0x65735546, True), (0xEF53, False)]
)
def test_network_file_systems_are_known_by_their_number(monkeypatch, magic, expected):
    """NFS, CIFS, FUSE and their like are told from ext4."""

    class Libc:
        @staticmethod
        def fstatfs(_, buffer):
            ctypes.c_uint64.from_buffer(buffer).value = magic
            return 0

    monkeypatch.setattr(syscalls, "_LIBC", Libc)
    assert syscalls.is_network_file_system(0) is expected


def test_an_unknown_file_system_is_local(tmp_path):
    """The file system of the tests is local, and so is one that cannot be examined."""
    descriptor = os.open(tmp_path, os.O_RDONLY)
    assert not syscalls.is_network_file_system(descriptor)
    os.close(descriptor)
    assert not syscalls.is_network_file_system(-1)


def test_mount_points_are_known_without_statx(monkeypatch, tmp_path):
    """Where the kernel does not tell, the device of the folder above does."""

    class Libc:
        statx = None

    for libc in (syscalls._LIBC, Libc):
        monkeypatch.setattr(syscalls, "_LIBC", libc)
        assert syscalls.is_mount_point("/proc")
        assert syscalls.is_mount_point("/")
        assert not syscalls.is_mount_point(str(tmp_path))
        (tmp_path / "f").touch()
        assert not syscalls.is_mount_point(f"{tmp_path}/f")


def test_missing_calls_are_errors(monkeypatch, tmp_path):
    """A libc without renameat2 gives ENOSYS."""
    monkeypatch.setattr(syscalls, "_LIBC", object())
    with pytest.raises(OSError) as caught:
        syscalls.rename_exchange(f"{tmp_path}/a", f"{tmp_path}/b")
    assert caught.value.errno == errno.ENOSYS


def test_interrupted_renames_are_repeated(monkeypatch):
    """EINTR from a call that Python does not wrap is retried."""
    numbers = [errno.EINTR, errno.EINTR, errno.EEXIST]

    class Libc:
        @staticmethod
        def renameat2(*_):
            ctypes.set_errno(numbers.pop(0))
            return -1

    monkeypatch.setattr(syscalls, "_LIBC", Libc)
    with pytest.raises(FileExistsError):
        syscalls.rename_noreplace("/a", "/b")
    assert numbers == []


@pytest.mark.parametrize("cachestat", [True, False])
def test_the_cache_is_sampled(tmp_path, monkeypatch, cachestat):
    """Reading brings a file into the cache, whichever call tells so."""
    if not cachestat:
        monkeypatch.setattr(syscalls, "_is_cached", syscalls._can_be_read_at_once)
    path = tmp_path / "f"
    path.write_bytes(os.urandom(1 << 20))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        syscalls.cached_fraction(file.fileno(), 0, 1 << 20)  # a file system may ignore the advice
        file.read()
        assert syscalls.cached_fraction(file.fileno(), 0, 1 << 20) == 1


def test_overlays_are_asked_in_another_way(tmp_path, monkeypatch):
    """On overlayfs, whose files have no pages of their own, "nothing is cached" is not believed."""
    monkeypatch.setattr(syscalls, "_is_cached", lambda *_: False)
    monkeypatch.setattr(syscalls, "_can_be_read_at_once", lambda *_: True)
    descriptor = os.open(tmp_path, os.O_RDONLY)
    monkeypatch.setattr(syscalls, "_file_system", lambda _: syscalls._OVERLAY)
    assert syscalls.cached_fraction(descriptor, 0, 100) == 1
    monkeypatch.setattr(syscalls, "_file_system", lambda _: 0xEF53)
    assert syscalls.cached_fraction(descriptor, 0, 100) == 0
    os.close(descriptor)


def test_what_cannot_be_known_counts_as_cached(tmp_path, monkeypatch):
    """Where no call tells, and for a range of nothing, reading through the cache is the choice."""

    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, "refused")

    monkeypatch.setattr(syscalls, "_is_cached", refuse)
    descriptor = os.open(tmp_path, os.O_RDONLY)
    assert syscalls.cached_fraction(descriptor, 0, 100) == 1
    assert syscalls.cached_fraction(descriptor, 0, 0) == 1
    os.close(descriptor)
