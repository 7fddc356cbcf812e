"""A FUSE file system that passes everything on to a folder and lies as network file systems do.

Started as ``python lying.py FOLDER MOUNT_POINT LOOKS``; each such process is one client of the folder.

- A name that was looked up in vain, or a folder that was listed, stays as it was seen for so many
  looks of this client, whatever other clients have made there since. Its own changes show at
  once, except in a listing through a descriptor that was opened before them.
- A file that is removed or replaced while it is open stays as ``.nfs<number>``, which cannot be removed
  until it is closed.
- Everything belongs to nobody, modes and owners cannot be changed, and flagged renames are unknown.
- ``setxattr(MOUNT_POINT, "user.fail", b"fsync 2 EIO")`` lets the second fsync from then on fail ("any" for
  an operation of any kind, "flush" for close); ``getxattr`` of it gives how many were still to come.
"""

from __future__ import annotations

import errno
import os
import sys
from ctypes.util import find_library
from dataclasses import dataclass

os.environ.setdefault("FUSE_LIBRARY_PATH", find_library("fuse3") or "")
from mfusepy import FUSE, Operations

NOBODY = 65534
_NEVER_FAIL = {"init", "destroy", "release", "releasedir", "setxattr", "getxattr", "listxattr", "removexattr"}


@dataclass
class _Listing:
    """What a folder held when it was read, and how often that is still told."""

    names: set[str]
    left: int


class Lies(Operations):
    use_ns = True

    def __init__(self, root: str, looks: int) -> None:
        self.root, self._looks = root, looks
        self._missing: dict[str, int] = {}
        self._listed: dict[str, _Listing] = {}
        self._open_files: dict[int, str] = {}
        self._open_folders: dict[int, _Listing] = {}
        self._silly = 0
        self._fault = ("", 0, 0)

    def fault(self, operation: str) -> int:
        """The errno that this operation fails with, or 0."""
        kind, left, number = self._fault
        if operation in _NEVER_FAIL or not left or kind not in (operation, "any"):
            return 0
        self._fault = (kind, left - 1, number)
        return number if left == 1 else 0

    def init_with_config(self, conn_info, config) -> None:
        config.entry_timeout = config.attr_timeout = config.negative_timeout = 0
        config.hard_remove = config.use_ino = 1

    # -- what this client believes

    def _real(self, path: str) -> str:
        return self.root + path

    def _appeared(self, path: str) -> None:
        above, name = os.path.split(path)
        for known in [known for known in self._missing if known == path or known.startswith(f"{path}/")]:
            del self._missing[known]
        if above in self._listed:
            self._listed[above].names.add(name)

    def _vanished(self, path: str) -> None:
        above, name = os.path.split(path)
        for known in [known for known in self._listed if known == path or known.startswith(f"{path}/")]:
            del self._listed[known]
        if above in self._listed:
            self._listed[above].names.discard(name)

    def _is_open(self, path: str) -> bool:
        return path in self._open_files.values()

    def _keep_open_file(self, path: str) -> bool:
        """Give an open file that is to go a ``.nfs`` name; False if it is not open."""
        if not self._is_open(path):
            return False
        above, name = os.path.split(path)
        if name.startswith(".nfs"):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        self._silly += 1
        kept = os.path.join(above, f".nfs{self._silly:024x}")
        os.rename(self._real(path), self._real(kept))
        self._moved(path, kept)
        return True

    def _moved(self, old: str, new: str) -> None:
        for handle, path in self._open_files.items():
            if path == old or path.startswith(f"{old}/"):
                self._open_files[handle] = new + path[len(old) :]
        self._vanished(old)
        self._appeared(new)

    # -- names

    def getattr(self, path, fh=None):
        if fh is None and self._missing.get(path, 0):
            self._missing[path] -= 1
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        try:
            found = os.lstat(self._real(path)) if fh is None else os.fstat(fh)
        except FileNotFoundError:
            self._missing[path] = self._looks
            raise
        shown = ("st_mode", "st_ino", "st_nlink", "st_size", "st_blocks")
        times = {f"st_{kind}time": getattr(found, f"st_{kind}time_ns") for kind in "amc"}
        return {name: getattr(found, name) for name in shown} | times | {"st_uid": NOBODY, "st_gid": NOBODY}

    def opendir(self, path):
        listing = self._listed.get(path)
        if listing is None or not listing.left:
            listing = self._listed[path] = _Listing(set(os.listdir(self._real(path))), self._looks)
        else:
            listing.left -= 1
        handle = os.open(self._real(path), os.O_RDONLY | os.O_DIRECTORY)
        self._open_folders[handle] = _Listing(set(listing.names), self._looks)
        return handle

    def readdir(self, path, fh):
        listing = self._open_folders[fh]
        if not listing.left:
            listing = self._open_folders[fh] = _Listing(set(os.listdir(fh)), self._looks)
        listing.left -= 1
        return [(name, {"st_ino": 1}, 0) for name in (".", "..", *sorted(listing.names))]  # 0 would hide it

    def releasedir(self, path, fh):
        del self._open_folders[fh]
        os.close(fh)

    def mkdir(self, path, mode):
        os.mkdir(self._real(path), mode)
        self._appeared(path)

    def rmdir(self, path):
        os.rmdir(self._real(path))
        self._vanished(path)

    def unlink(self, path):
        if not self._keep_open_file(path):
            os.unlink(self._real(path))
            self._vanished(path)

    def rename(self, old, new):
        if old != new:
            self._keep_open_file(new)
        os.rename(self._real(old), self._real(new))
        self._moved(old, new)

    def link(self, target, source):
        os.link(self._real(source), self._real(target), follow_symlinks=False)
        self._appeared(target)

    def symlink(self, target, source):
        os.symlink(source, self._real(target))
        self._appeared(target)

    def readlink(self, path):
        return os.readlink(self._real(path))

    def chmod(self, path, mode):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    def chown(self, path, uid, gid):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    def utimens(self, path, times=None):
        os.utime(self._real(path), ns=times)

    def statfs(self, path):
        found = os.statvfs(self._real(path))
        return {name: getattr(found, name) for name in dir(found) if name.startswith("f_")}

    # -- files

    def create(self, path, mode, flags=0):
        handle = os.open(self._real(path), (flags | os.O_CREAT) & ~os.O_DIRECT, mode)
        self._open_files[handle] = path
        self._appeared(path)
        return handle

    def open(self, path, flags):
        handle = os.open(self._real(path), flags & ~(os.O_DIRECT | os.O_NOFOLLOW))
        self._open_files[handle] = path
        return handle

    def read(self, path, size, offset, fh):
        return os.pread(fh, size, offset)

    def write(self, path, data, offset, fh):
        return os.pwrite(fh, data, offset)

    def truncate(self, path, length, fh=None):
        os.truncate(self._real(path) if fh is None else fh, length)

    def flush(self, path, fh):
        return 0

    def fsync(self, path, datasync, fh):
        os.fsync(fh)

    def fsyncdir(self, path, datasync, fh):
        os.fsync(fh)

    def release(self, path, fh):
        path = self._open_files.pop(fh)
        os.close(fh)
        if os.path.basename(path).startswith(".nfs") and not self._is_open(path):
            os.unlink(self._real(path))
            self._vanished(path)

    # -- commands

    def setxattr(self, path, name, value, options, position=0):
        if (path, name) != ("/", "user.fail"):
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        operation, number, error = value.decode().split()
        self._fault = (operation, int(number), getattr(errno, error))

    def getxattr(self, path, name, position=0):
        if (path, name) != ("/", "user.fail"):
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
        return str(self._fault[1]).encode()


class _Client(FUSE):
    """Answers with the fault that is due, and refuses the flags of a rename, which `FUSE` drops."""

    def _wrapper(self, func, *args, **kwargs):
        number = self.operations.fault(func.__name__.removesuffix("_fuse_3"))
        return -number if number else super()._wrapper(func, *args, **kwargs)

    def rename_fuse_3(self, old, new, flags):
        if flags:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return super().rename_fuse_3(old, new, flags)


if __name__ == "__main__":
    _Client(
        Lies(sys.argv[1], int(sys.argv[3])), sys.argv[2], foreground=True, nothreads=True, allow_other=True
    )
