"""The calls to the operating system that Python's ``os`` lacks or makes awkward, in one place.

Linux (x86-64, arm64) is the home; on macOS each call has its nearest relative. What a kernel, libc or
file system cannot do is an ``OSError`` with the errno (`UNSUPPORTED` holds those that mean "not here"),
never a crash; the caller decides what to do instead.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import mmap
import os
import stat
import sys
import weakref
from contextlib import suppress
from functools import lru_cache

__all__ = [
    "O_DIRECT",
    "UNSUPPORTED",
    "address_of",
    "anonymous_file",
    "cached_fraction",
    "disable_direct",
    "enable_direct",
    "extend",
    "is_mount_point",
    "is_network_file_system",
    "lower_priority",
    "map_file_private",
    "memory_at",
    "populate",
    "private_memory",
    "rename_exchange",
    "rename_noreplace",
    "sync",
    "umask",
    "watch_process",
]

_logger = logging.getLogger(__name__)
_LINUX = sys.platform == "linux"
_LIBC = ctypes.CDLL(None, use_errno=True)
_HUGE_PAGE = 2 << 20
_PROBES = 6

O_DIRECT: int = getattr(os, "O_DIRECT", 0)
"""The flag for opening a file round the page cache; 0 where there is none."""

UNSUPPORTED = frozenset(
    {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, getattr(errno, "ENOTSUP", errno.EOPNOTSUPP), errno.ENOTTY}
)
"""The errnos by which kernels and file systems say that they do not know a call or a flag."""


def _fail() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


# ---------------------------------------------------------------------------- direct I/O


def enable_direct(descriptor: int) -> bool:
    """Make an open file go round the page cache; returns whether it now needs aligned reads and writes.

    On macOS it needs none. (The flag at ``open`` would do the same, but where it is refused a file that was
    to be created may or may not have been.)
    """
    try:
        if sys.platform == "darwin":
            fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)
        elif O_DIRECT:
            fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | O_DIRECT)
            return True
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    return False


def disable_direct(descriptor: int) -> None:
    """Make a descriptor of direct I/O an ordinary one; raises OSError if the kernel refuses."""
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~O_DIRECT)


def sync(descriptor: int) -> None:
    """Returns when a file or folder is durable; a plain ``fsync`` of macOS stops at the drive's cache."""
    if sys.platform == "darwin":
        with suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)


def cached_fraction(descriptor: int, offset: int, length: int) -> float:
    """How much of a range of a file is in the page cache, from 0 to 1, by a sample of a few pages.

    Waits for no disk. 1 where it cannot be known, as buffered reading is then the safe choice.
    """
    if length <= 0 or not hasattr(os, "RWF_NOWAIT"):
        return 1.0
    places = [offset + int.from_bytes(os.urandom(8), "little") % length for _ in range(_PROBES)]
    try:
        hits = sum(_is_cached(descriptor, place) for place in places)
        if not hits and _file_system(descriptor) == _OVERLAY:  # where the call above never finds any
            hits = sum(_can_be_read_at_once(descriptor, place) for place in places)
    except OSError:
        return 1.0
    return hits / _PROBES


def _is_cached(descriptor: int, offset: int) -> bool:
    """By ``cachestat`` (Linux 6.5), or else by a read that does not wait."""
    window = (ctypes.c_uint64 * 2)(offset, 1)
    counts = (ctypes.c_uint64 * 5)()
    if _LIBC.syscall(ctypes.c_long(451), ctypes.c_uint(descriptor), window, counts, ctypes.c_uint(0)) == 0:
        return counts[0] > 0
    return _can_be_read_at_once(descriptor, offset)


def _can_be_read_at_once(descriptor: int, offset: int) -> bool:
    """A read that does not wait, but may load the page: no place should be asked twice.

    On a fast disk it may find the page that it has just begun to load.
    """
    try:
        return os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) > 0
    except BlockingIOError:
        return False


# ---------------------------------------------------------------------------- names

_AT_FDCWD = -100 if _LINUX else -2


def _rename_flagged(source: str, target: str, linux_flag: int, darwin_flag: int) -> None:
    name, flag = ("renameat2", linux_flag) if _LINUX else ("renameatx_np", darwin_flag)
    call = getattr(_LIBC, name, None)
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    arguments = (_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), ctypes.c_uint(flag))
    while call(*arguments) != 0:
        error = _fail()
        if error.errno != errno.EINTR:
            raise error


def rename_noreplace(source: str, target: str) -> None:
    """Rename atomically if `target` does not exist; FileExistsError if it does."""
    _rename_flagged(source, target, 1, 4)


def rename_exchange(source: str, target: str) -> None:
    """Swap two existing entries atomically."""
    _rename_flagged(source, target, 2, 2)


def umask() -> int:
    """This process's file mode mask, read without changing it where the system can tell."""
    with suppress(OSError), open("/proc/self/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


# ---------------------------------------------------------------------------- file systems

_NETWORK: frozenset[int | bytes] = frozenset(
    {
        0x6969,  # nfs
        0x517B,  # smb
        0xFE534D42,  # smb2
        0xFF534D42,  # cifs
        0x0BD00BD0,  # lustre
        0x47504653,  # gpfs
        0x00C36400,  # ceph
        0x65735546,  # fuse
        0x01021997,  # 9p
        0x5346414F,  # afs
        0x19830326,  # beegfs (fhgfs)
        0x7461636F,  # ocfs2
        0x01161970,  # gfs2
        0xAAD7AAEA,  # panfs
        0x20030528,  # orangefs (pvfs2)
        0x73757245,  # coda
        *(b"nfs", b"smbfs", b"afpfs", b"webdav", b"macfuse", b"osxfuse"),
    }
)
_OVERLAY = 0x794C7630


def is_network_file_system(descriptor: int) -> bool:
    """Whether an open file lies on a network, cluster or FUSE file system; False where it is unknown."""
    return _file_system(descriptor) in _NETWORK


def _file_system(descriptor: int) -> int | bytes | None:
    """The number, or on macOS the name, of the kind of file system of an open file."""
    buffer = _bytes_type(4096)()
    if _LIBC.fstatfs(ctypes.c_int(descriptor), buffer) != 0:
        return None
    if _LINUX:
        return ctypes.c_uint32.from_buffer(buffer).value
    return buffer.raw[72:88].split(b"\0")[0]


def is_mount_point(path: str, dir_fd: int | None = None) -> bool:
    """Whether a folder is the root of a mount (bind mounts included, from Linux 5.8 on).

    Raises OSError if it cannot be examined.
    """
    statx = getattr(_LIBC, "statx", None) if _LINUX else None
    if statx is not None:
        buffer = ctypes.create_string_buffer(256)
        base = _AT_FDCWD if dir_fd is None else dir_fd
        if statx(base, os.fsencode(path), ctypes.c_int(0x100), ctypes.c_uint(0), buffer) == 0:
            attributes = ctypes.c_uint64.from_buffer(buffer, 8).value
            known = ctypes.c_uint64.from_buffer(buffer, 56).value
            if known & 0x2000:  # STATX_ATTR_MOUNT_ROOT
                return bool(attributes & 0x2000)
    here = os.stat(path, dir_fd=dir_fd, follow_symlinks=False)
    if not stat.S_ISDIR(here.st_mode):
        return False
    above = os.stat(os.path.join(path, ".."), dir_fd=dir_fd)
    return here.st_dev != above.st_dev or here.st_ino == above.st_ino


# ---------------------------------------------------------------------------- memory

if _LINUX or sys.platform == "darwin":
    _LIBC.mmap.restype = ctypes.c_void_p
    _LIBC.mmap.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int64,
    ]
    _LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def private_memory(size: int) -> memoryview:
    """Zeroed private memory, in huge pages where the system has them; aligned for direct I/O.

    Of a huge page or more nothing is touched yet: pages come with their first use. It is returned to the
    system when the last view of it is gone. (Python's ``mmap(-1, n)`` alone is *shared* memory, which
    writes far slower.)
    """
    huge = size >= _HUGE_PAGE
    if huge:
        region = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel without transparent huge pages: slower, not wrong
                region.madvise(mmap.MADV_HUGEPAGE)
    # The heap has pages that were used before; new ones would take longer than what is done with them.
    view = memoryview(region if huge else bytearray(size + mmap.PAGESIZE))
    start = -(address_of(view) or 0) % (_HUGE_PAGE if huge else mmap.PAGESIZE)
    return view[start : start + size]


def map_file_private(descriptor: int, size: int) -> memoryview:
    """The first `size` bytes of a file, mapped copy-on-write and writable. Holds no descriptor.

    Unmapped when the last view of it is gone, which never happens at interpreter exit: the system does
    it then. Raises OSError if the file system cannot map files.
    """
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    address = _LIBC.mmap(None, size, protection, mmap.MAP_PRIVATE, descriptor, 0)
    if address is None or address == ctypes.c_void_p(-1).value:
        raise _fail()
    array = _bytes_type(size).from_address(address)
    weakref.finalize(array, _LIBC.munmap, address, size).atexit = False
    return memoryview(array).cast("B")


def memory_at(address: int, length: int) -> memoryview:
    """A view of raw memory, which the caller keeps alive."""
    return memoryview(_bytes_type(length).from_address(address)).cast("B")


@lru_cache(maxsize=64)
def _bytes_type(length: int) -> type[ctypes.Array[ctypes.c_char]]:
    return ctypes.c_char * length  # a new class each time, which is a reference cycle


def address_of(view: memoryview) -> int | None:
    """The address of a view's first byte; None for an empty or read-only one."""
    if view.readonly or not view.nbytes:
        return None
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


# ---------------------------------------------------------------------------- memory to share


_MEMORY_FOLDER = "/dev/shm"  # noqa: S108 - the files in it have no names
_told: set[str] = set()


def anonymous_file(name: str, size: int = 0) -> int:
    """A descriptor of memory that has no name in any folder, of this size at least; it is not inherited.

    It is a memfd. Where the system refuses those, as containers may, it is a file without a name in the
    first folder that has room: /dev/shm, which is memory as well, else the one for temporary files. The log
    says which. Raises OSError if there is no room for it.
    """
    with suppress(OSError, AttributeError):  # macOS has none
        return _of_size(os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), size)
    try:
        return _nameless_file(_MEMORY_FOLDER, size)
    except OSError:
        return _nameless_file(None, size)


def _nameless_file(folder: str | None, size: int) -> int:
    import tempfile  # noqa: PLC0415 - only where there is no memfd

    with tempfile.TemporaryFile(dir=folder) as file:
        descriptor = _of_size(os.dup(file.fileno()), size)
    folder = folder or tempfile.gettempdir()
    if folder not in _told:
        _told.add(folder)
        _logger.warning("this system refuses memfd_create: shared memory is a nameless file in %s", folder)
    return descriptor


def _of_size(descriptor: int, size: int) -> int:
    try:
        extend(descriptor, size)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def extend(descriptor: int, size: int) -> None:
    """Make an `anonymous_file` this large at least, with room for all of it; raises OSError if there is none.

    From then on nobody can make a memfd smaller, and other files have their room: a mapping never faults.
    """
    if os.fstat(descriptor).st_size >= size:
        return
    is_memfd = False
    with suppress(OSError, AttributeError):
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        is_memfd = True
    if is_memfd or not hasattr(os, "posix_fallocate"):
        os.ftruncate(descriptor, size)
    else:
        os.posix_fallocate(descriptor, 0, size)


_MADV_POPULATE_WRITE = 23


def populate(address: int, length: int) -> None:
    """Touch every page of a mapping; Python's own ``madvise`` would hold the interpreter meanwhile."""
    if not _LINUX or _LIBC.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), _MADV_POPULATE_WRITE):
        for offset in range(0, length, mmap.PAGESIZE):
            page = ctypes.c_char.from_address(address + offset)
            page.value = page.value


def lower_priority(nice: int, *, idle_io: bool) -> None:
    """Run this process at lower CPU and I/O priority, as far as the system lets it."""
    with suppress(OSError):
        os.nice(nice)
    if idle_io and _LINUX:
        number = {"x86_64": 251, "aarch64": 30}.get(os.uname().machine)
        if number is not None:
            _LIBC.syscall(number, 1, 0, 3 << 13)  # ioprio_set(IOPRIO_WHO_PROCESS, 0, idle class)


def watch_process(pid: int) -> int | None:
    """A descriptor that can be read once the process has ended, or None where there is none."""
    try:
        return os.pidfd_open(pid) if hasattr(os, "pidfd_open") else None
    except OSError:
        return None
