"""Storage on the file systems of this machine, written and read round the page cache where they allow it.

Everything belongs to the process that made it: in a forked child, closing, discarding or collecting an
object does nothing to the parent's file.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat as stat_modes
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import msgspec

from milepost import syscalls
from milepost.errors import CorruptCheckpointError, EntryNotFoundError, StorageError
from milepost.storage import RenameMode, Stat
from milepost.storage.files import LocalNewFile, LocalOpenFile, wrapped
from milepost.utils import OwnedByProcess

__all__ = ["LocalStorage"]

_logger = logging.getLogger(__name__)
_O_PATH: int = getattr(os, "O_PATH", os.O_RDONLY)
_FOLDER_FLAGS = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NO_SUCH_KIND = frozenset({errno.ELOOP, errno.ENOTDIR, errno.ENXIO, errno.ENODEV})


class _LocalFolder(OwnedByProcess):
    def __init__(self, path: str, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor

    def names(self) -> list[str]:
        with wrapped("list", self.path):
            # Opened anew: btrfs lists through a descriptor only what was there when that was opened.
            fresh = os.open(".", os.O_RDONLY | _FOLDER_FLAGS, dir_fd=self._descriptor)
            try:
                return sorted(os.listdir(fresh))
            finally:
                os.close(fresh)

    def stat(self, name: str) -> Stat | None:
        try:
            with self._parent(name) as (parent, last), wrapped("stat", self._join(name)):
                return _stat(last, parent)
        except EntryNotFoundError:
            return None

    def read(self, name: str, limit: int) -> bytes:
        file = self.open(name)
        try:
            if file.size > limit:
                raise CorruptCheckpointError(
                    f"the file has {file.size} bytes, more than the {limit} allowed: {file.path}",
                    path=file.path,
                )
            data = bytearray(file.size)
            file.read_into(0, [memoryview(data)])
            return bytes(data)
        finally:
            file.close()

    def open(self, name: str) -> LocalOpenFile:
        path = self._join(name)
        with self._parent(name) as (parent, last), wrapped("open", path):
            try:
                descriptor = os.open(last, _FILE_FLAGS, dir_fd=parent)
            except OSError as error:
                if error.errno in _NO_SUCH_KIND:
                    raise _no_regular_file(path) from error
                raise
        try:
            with wrapped("stat", path):
                found = os.fstat(descriptor)
            if not stat_modes.S_ISREG(found.st_mode):
                raise _no_regular_file(path)
            return LocalOpenFile(path, descriptor, found.st_size)
        except BaseException:
            os.close(descriptor)
            raise

    def _join(self, name: str) -> str:
        return f"{self.path.rstrip('/')}/{name}"

    @contextmanager
    def _parent(self, name: str) -> Iterator[tuple[int, str]]:
        """The descriptor of the folder that `name` lies in, and its last component."""
        *folders, last = plain_components(name, self.path)
        descriptor = self._descriptor
        try:
            for folder in folders:
                above = descriptor
                try:
                    with wrapped("open", self._join(name)):
                        descriptor = os.open(folder, _O_PATH | _FOLDER_FLAGS, dir_fd=above)
                except StorageError as error:
                    if error.errno in _NO_SUCH_KIND:
                        raise _no_regular_file(self._join(name)) from error
                    raise
                finally:
                    if above not in {self._descriptor, descriptor}:
                        os.close(above)
            yield descriptor, last
        finally:
            if descriptor != self._descriptor:
                os.close(descriptor)

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0 and self.is_owned:
            with suppress(OSError):
                os.close(descriptor)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            self.close()


def _no_regular_file(path: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(f"no regular file, or a link on the way to it: {path}", path=path)


def plain_components(name: str, folder: str) -> list[str]:
    """The components of a relative path; CorruptCheckpointError if it could lead out of `folder`."""
    parts = name.split("/")
    if "\0" in name or any(part in {"", ".", ".."} for part in parts):
        raise CorruptCheckpointError(f"the name {name!r} does not stay in its folder: {folder}", path=folder)
    return parts


def _stat(path: str, dir_fd: int | None = None) -> Stat:
    found = os.stat(path, dir_fd=dir_fd, follow_symlinks=False)
    mode = found.st_mode
    if stat_modes.S_ISLNK(mode):
        return Stat("symlink", 0, found.st_mtime, mount_point=False, writable=False)
    effective = os.access in os.supports_effective_ids
    if stat_modes.S_ISDIR(mode):
        writable = os.access(path, os.W_OK | os.X_OK, dir_fd=dir_fd, effective_ids=effective)
        mounted = syscalls.is_mount_point(path, dir_fd)
        return Stat("folder", 0, found.st_mtime, mount_point=mounted, writable=writable)
    writable = os.access(path, os.W_OK, dir_fd=dir_fd, effective_ids=effective)
    regular = stat_modes.S_ISREG(mode)
    size = found.st_size if regular else 0
    return Stat("file" if regular else "other", size, found.st_mtime, mount_point=False, writable=writable)


# ---------------------------------------------------------------------------- locks


class _LocalLock(OwnedByProcess):
    """A `flock`. A forked child gives its copy of the descriptor up, or it would outlive its owner."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        _locks.add(self)

    def release(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with suppress(OSError):
                if self.is_owned:
                    fcntl.flock(descriptor, fcntl.LOCK_UN)
            with suppress(OSError):
                os.close(descriptor)

    def __del__(self) -> None:
        self.release()


_locks: weakref.WeakSet[_LocalLock] = weakref.WeakSet()


def _forget_locks() -> None:
    for lock in list(_locks):
        lock.release()


os.register_at_fork(after_in_child=_forget_locks)


# ---------------------------------------------------------------------------- the storage


class LocalStorage(msgspec.Struct, frozen=True):
    """The file systems of this machine.

    ``lock`` is ``flock``. Where a file system does not know it, a shared lock is granted (it protects
    nothing), and an exclusive one never: nobody can tell there whether the others are gone.
    """

    def create(self, path: str, *, direct: bool = False) -> LocalNewFile:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with wrapped("create", path):
            file = LocalNewFile(path, os.open(path, flags, 0o666))
            if direct:
                try:
                    file.go_direct()
                except BaseException:
                    file.discard()
                    raise
            return file

    def open_folder(self, path: str) -> _LocalFolder:
        try:
            descriptor = os.open(path.rstrip("/") or "/", os.O_RDONLY | _FOLDER_FLAGS)
        except OSError as error:
            if error.errno == errno.ELOOP:
                error = OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            raise StorageError.wrap(error, "open", path) from error
        return _LocalFolder(path, descriptor)

    def stat(self, path: str) -> Stat | None:
        try:
            with wrapped("stat", path):
                return _stat(path)
        except EntryNotFoundError:
            return None

    def make_folder(self, path: str, *, private: bool = False) -> None:
        with wrapped("create folder", path):
            os.mkdir(path, 0o700 if private else 0o777)

    def make_public(self, path: str) -> None:
        with wrapped("make public", path):
            special = stat_modes.S_IMODE(os.stat(path, follow_symlinks=False).st_mode) & 0o7000
            try:
                os.chmod(path, special | (0o777 & ~syscalls.umask()))
            except OSError as error:
                if error.errno != errno.EPERM and error.errno not in syscalls.UNSUPPORTED:
                    raise
                _logger.warning("this file system keeps the folder's mode, others may not read it: %s", path)

    def rename(self, source: str, target: str, mode: RenameMode) -> None:
        with wrapped("rename", target):
            if mode == "replace":
                os.rename(source, target)
            elif mode == "create":
                _rename_to_free_name(source, target)
            else:
                try:
                    syscalls.rename_exchange(source, target)
                except OSError as error:
                    if error.errno not in syscalls.UNSUPPORTED:
                        raise
                    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP)) from error

    def remove(self, path: str) -> None:
        with wrapped("remove", path):
            try:
                os.unlink(path)
            except OSError:
                if not stat_modes.S_ISDIR(os.lstat(path).st_mode):
                    raise
                os.rmdir(path)

    def sync_folder(self, path: str) -> None:
        with wrapped("sync folder", path):
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                syscalls.sync(descriptor)
            except OSError as error:
                if error.errno not in syscalls.UNSUPPORTED:  # network file systems without folder fsync
                    raise
            finally:
                os.close(descriptor)

    def sync_file(self, path: str) -> None:
        with wrapped("fsync", path):
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                syscalls.sync(descriptor)
            finally:
                os.close(descriptor)

    def is_network(self, path: str) -> bool:
        with wrapped("statfs", path):
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                return syscalls.is_network_file_system(descriptor)
            finally:
                os.close(descriptor)

    def lock(self, path: str, *, exclusive: bool = False) -> _LocalLock | None:
        with wrapped("lock", path):
            try:
                # Over NFS an exclusive lock needs a descriptor open for writing.
                descriptor = os.open(path, _FILE_FLAGS | (os.O_RDWR if exclusive else 0))
            except OSError as error:
                if not exclusive or error.errno not in {errno.EACCES, errno.EROFS}:
                    raise
                descriptor = os.open(path, _FILE_FLAGS)
            try:
                fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                return None
            except OSError as error:
                if error.errno != errno.ENOLCK and error.errno not in syscalls.UNSUPPORTED:
                    os.close(descriptor)
                    raise
                if exclusive:
                    os.close(descriptor)
                    return None
            except BaseException:
                os.close(descriptor)
                raise
            return _LocalLock(descriptor)


def _rename_to_free_name(source: str, target: str) -> None:
    try:
        try:
            syscalls.rename_noreplace(source, target)
        except OSError as error:
            if error.errno not in syscalls.UNSUPPORTED:
                raise
            _rename_without_flags(source, target)
    except FileExistsError:
        if not _has_both_names(source, target):
            raise
        os.unlink(source)


def _has_both_names(source: str, target: str) -> bool:
    """Whether `_rename_without_flags` ended halfway here: a file has both names, in two folders."""
    found = os.lstat(source)
    folders = {os.path.realpath(os.path.dirname(path)) for path in (source, target)}
    is_file = not stat_modes.S_ISDIR(found.st_mode)
    return len(folders) == 2 and is_file and os.path.samestat(found, os.lstat(target))


def _rename_without_flags(source: str, target: str) -> None:
    """Rename to a name that is not taken, on a file system that cannot do so in one step.

    A file gets its second name before it loses the first; a folder replaces an empty one made for it. What
    ends between the two steps leaves the file with two names, or the empty folder.
    Where there are no hard links either, the check and the rename are two steps.
    """
    if stat_modes.S_ISDIR(os.lstat(source).st_mode):
        os.mkdir(target)
        os.rename(source, target)
        return
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno != errno.EPERM and error.errno not in syscalls.UNSUPPORTED:
            raise
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from error
        os.rename(source, target)
        return
    os.unlink(source)
