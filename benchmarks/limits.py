"""What the machine can do at best: plain copies, direct writes and reads, cached reads, checksums."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from isal import isal_zlib
from workloads import Workload, unique

from milepost import syscalls

MIB = 1 << 20
WRITES = (8, 16, 32)
READERS = (1, 2, 4)
DISK = 1 << 30
"""Bytes of the largest file that the limits write and read; times of more bytes are computed from it."""
_buffers: dict[int, memoryview] = {}


def warm_buffer(size: int, number: int = 0) -> memoryview:
    """Memory on huge pages that has been touched."""
    key = size * 16 + number
    if key not in _buffers:
        _buffers[key] = syscalls.private_memory(size)
        ctypes.memset(syscalls.address_of(_buffers[key]), 1, size)
    return _buffers[key]


def direct_write(path: str, size: int, block: int) -> None:
    """Plain O_DIRECT writes of one warm buffer into a new file, one thread, then fsync."""
    view, whole = warm_buffer(block), size - size % 4096
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | syscalls.O_DIRECT, 0o600)
    try:
        for offset in range(0, whole, block):
            os.pwrite(descriptor, view[: min(block, whole - offset)], offset)
        os.ftruncate(descriptor, size)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: str, threads: int, *, direct: bool) -> None:
    """Read a file in blocks of 16 MiB into warm buffers."""
    size, block = os.path.getsize(path), 16 * MIB

    def part(number: int) -> None:
        view = warm_buffer(block, number)
        descriptor = os.open(path, os.O_RDONLY | (syscalls.O_DIRECT if direct else 0))
        try:
            for offset in range(number * block, size, threads * block):
                os.preadv(descriptor, [view], offset)
        finally:
            os.close(descriptor)

    for number in range(threads):
        warm_buffer(block, number)
    together([lambda n=number: part(n) for number in range(threads)])


def together(works: list[Callable[[], object]]) -> None:
    threads = [threading.Thread(target=work) for work in works[1:]]
    for thread in threads:
        thread.start()
    works[0]()
    for thread in threads:
        thread.join()


def files_in(path: str) -> list[str]:
    if os.path.isfile(path):
        return [path]
    return sorted(os.path.join(above, name) for above, _, names in os.walk(path) for name in names)


def bytes_in(path: str) -> int:
    return sum(os.lstat(file).st_blocks * 512 for file in files_in(path))


def sync(path: str) -> None:
    """Make the files at `path` and the folders that name them durable."""
    for name in [*files_in(path), *{os.path.dirname(file) for file in files_in(path)}]:
        descriptor = os.open(name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def drop_cache(path: str) -> None:
    """Push files out of this machine's page cache; the host of a virtual machine may still hold them."""
    sync(path)
    for name in files_in(path):
        descriptor = os.open(name, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def cached_share(path: str) -> float:
    """Which part of the files at `path` lies in the page cache; looking changes nothing."""
    libc = ctypes.CDLL(None, use_errno=True)
    held = pages = 0
    for name in files_in(path):
        size = os.path.getsize(name)
        if not size:
            continue
        with open(name, "rb") as file, mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE) as memory:
            view = (ctypes.c_char * size).from_buffer(memory)
            found = bytearray(-(-size // mmap.PAGESIZE))
            vector = (ctypes.c_ubyte * len(found)).from_buffer(found)
            if libc.mincore(ctypes.byref(view), ctypes.c_size_t(size), vector):
                raise OSError(ctypes.get_errno(), "mincore")
            del view, vector
            held += sum(byte & 1 for byte in found)
            pages += len(found)
    return held / max(pages, 1)


class Limits:
    """In a process of its own: the same bytes as a workload's, as fast as they go."""

    def __init__(self, workload: Workload, folder: str) -> None:
        self.path = os.path.join(folder, "limit")
        self.sources = unique(workload.build())
        self.targets = [torch.empty_like(value).copy_(value) for value in self.sources]
        self.size = sum(value.nbytes for value in self.sources)

    def take(self) -> dict[str, float]:
        found: dict[str, float] = {}

        def timed(name: str, work: Callable[[], Any], times: float = 1.0) -> None:
            start = time.perf_counter()
            work()
            found[name] = (time.perf_counter() - start) * times

        torch._foreach_copy_(self.targets, self.sources)  # the views and the threads are there
        timed("copy", lambda: torch._foreach_copy_(self.targets, self.sources))
        timed("copy loop", self._loop)
        if 3 * self.size < 0.8 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
            fresh = [torch.empty_like(value) for value in self.sources]
            timed("copy into untouched memory", lambda: torch._foreach_copy_(fresh, self.sources))
            del fresh
        timed("shared memory, first touch", self._touch_shared)
        found["first touch and copy"] = found["shared memory, first touch"] + found["copy"]
        timed("checksum", self._checksum)
        size = min(self.size, DISK)
        times = self.size / size
        for block in WRITES:
            with suppress(FileNotFoundError):
                os.remove(self.path)
            timed(f"direct write, {block} MiB", lambda b=block: direct_write(self.path, size, b * MIB), times)
        found["copy and direct write"] = found["copy"] + found["direct write, 16 MiB"]
        drop_cache(self.path)
        for threads in READERS:
            timed(f"direct read, {threads} threads", lambda t=threads: read(self.path, t, direct=True), times)
        read(self.path, max(READERS), direct=False)  # into the page cache
        for threads in READERS[:2]:
            timed(
                f"cached read, {threads} threads", lambda t=threads: read(self.path, t, direct=False), times
            )
        os.remove(self.path)
        if self.size < 16 * MIB:
            timed("three files and fsync", self._three_files)
        return found

    def _loop(self) -> None:
        for target, source in zip(self.targets, self.sources, strict=True):
            target.copy_(source)

    def _checksum(self) -> None:
        for value in self.sources:
            isal_zlib.crc32(memoryview(value.detach().flatten().view(torch.uint8).numpy()))

    def _touch_shared(self) -> None:
        descriptor = syscalls.anonymous_file("bench")
        os.ftruncate(descriptor, self.size)
        torch.frombuffer(mmap.mmap(descriptor, self.size), dtype=torch.uint8).zero_()
        os.close(descriptor)

    def _three_files(self) -> None:
        """What a checkpoint of one rank is made of, without what makes it appear whole."""
        os.mkdir(self.path)
        for name, size in (("data", self.size), ("index", 4096), ("manifest", 1024)):
            with open(os.path.join(self.path, name), "wb", buffering=0) as file:
                file.write(bytes(size))
                os.fsync(file.fileno())
        for file in files_in(self.path):
            os.remove(file)
        os.rmdir(self.path)
