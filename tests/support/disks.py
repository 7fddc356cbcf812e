"""Disks of the tests: a file system in memory, storages that break off, and what is on a storage.

Imports no torch.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from milepost.errors import CorruptCheckpointError, EntryNotFoundError, StorageError
from milepost.storage import RenameMode, Stat, Storage
from milepost.testing import MUTATIONS, FaultyStorage


def _error(number: int, operation: str, path: str) -> StorageError:
    return StorageError.wrap(OSError(number, os.strerror(number)), operation, path)


def _corrupt(message: str, path: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(f"{message}: {path}", path=path)


@dataclass(eq=False)
class _Node:
    """A file or a folder, apart from its name."""

    kind: Literal["file", "folder"]
    guard: threading.RLock
    data: bytearray = field(default_factory=bytearray)
    entries: dict[str, _Node] = field(default_factory=dict)
    private: bool = False
    modified_seconds: float = field(default_factory=time.time)
    readers: int = 0
    writer: bool = False

    def stat(self) -> Stat:
        return Stat(self.kind, len(self.data), self.modified_seconds, mount_point=False, writable=True)


class _MemoryNewFile:
    def __init__(self, path: str, parent: _Node, name: str, node: _Node) -> None:
        self._path, self._parent, self._name, self._node = path, parent, name, node
        self._open = True

    def write(self, offset: int, data: memoryview) -> None:
        with self._node.guard:
            if not self._open:
                raise _error(errno.EBADF, "write", self._path)
            content = self._node.data
            content.extend(bytes(max(offset - len(content), 0)))
            content[offset : offset + len(data)] = data
            self._node.modified_seconds = time.time()

    def finish(self, size: int, *, sync: bool = True) -> None:
        with self._node.guard:
            if not self._open:
                raise _error(errno.EBADF, "finish", self._path)
            content = self._node.data
            content.extend(bytes(max(size - len(content), 0)))
            del content[size:]
            self._open = False

    def discard(self) -> None:
        with self._node.guard:
            if self._open and self._parent.entries.get(self._name) is self._node:
                del self._parent.entries[self._name]
            self._open = False


class _MemoryOpenFile:
    def __init__(self, path: str, node: _Node) -> None:
        self.path = path
        self.size = len(node.data)
        self._node = node
        self._open = True

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        with self._node.guard:
            self._check_open()
            wanted = offset + sum(map(len, buffers))
            if wanted > len(self._node.data):
                found = len(self._node.data)
                raise _corrupt(
                    f"the file ends too early: {wanted} bytes expected at least, {found} found", self.path
                )
            for buffer in buffers:
                buffer[:] = self._node.data[offset : offset + len(buffer)]
                offset += len(buffer)

    def read_direct(self, offset: int, buffer: memoryview) -> None:
        length = max(min(len(buffer), self.size - offset), 0)
        self.read_into(offset, [buffer[:length]])

    def cached(self, offset: int, length: int) -> bool:
        return True

    def map(self) -> memoryview | None:
        with self._node.guard:
            self._check_open()
            return memoryview(bytearray(self._node.data)) if self.size else None

    def _check_open(self) -> None:
        if not self._open:
            raise _error(errno.EBADF, "read", self.path)

    def close(self) -> None:
        self._open = False


class _MemoryFolder:
    def __init__(self, path: str, node: _Node) -> None:
        self.path = path
        self._node = node
        self._open = True

    def names(self) -> list[str]:
        with self._node.guard:
            self._check_open("list")
            return sorted(self._node.entries)

    def stat(self, name: str) -> Stat | None:
        with self._node.guard:
            node = self._find(name, "stat")
            return node.stat() if node else None

    def read(self, name: str, limit: int) -> bytes:
        file = self.open(name)
        if file.size > limit:
            raise _corrupt(f"the file has {file.size} bytes, more than the {limit} allowed", file.path)
        data = bytearray(file.size)
        file.read_into(0, [memoryview(data)])
        return bytes(data)

    def open(self, name: str) -> _MemoryOpenFile:
        path = f"{self.path.rstrip('/')}/{name}"
        with self._node.guard:
            node = self._find(name, "open")
            if node is None:
                raise _error(errno.ENOENT, "open", path)
            if node.kind != "file":
                raise _corrupt("not a regular file", path)
            return _MemoryOpenFile(path, node)

    def _find(self, name: str, operation: str) -> _Node | None:
        self._check_open(operation)
        parts = name.split("/")
        if "\0" in name or any(part in {"", ".", ".."} for part in parts):
            raise CorruptCheckpointError(
                f"the name {name!r} does not stay in its folder: {self.path}", path=self.path
            )
        node: _Node | None = self._node
        for part in parts:
            if node is None:
                return None
            if node.kind != "folder":
                raise _corrupt("not a regular file, or a link leads to it", f"{self.path}/{name}")
            node = node.entries.get(part)
        return node

    def _check_open(self, operation: str) -> None:
        if not self._open:
            raise _error(errno.EBADF, operation, self.path)

    def close(self) -> None:
        self._open = False


class _MemoryLock:
    def __init__(self, node: _Node, *, exclusive: bool) -> None:
        self._node = node
        self._exclusive = exclusive
        self._held = True

    def release(self) -> None:
        with self._node.guard:
            if self._held and self._exclusive:
                self._node.writer = False
            elif self._held:
                self._node.readers -= 1
            self._held = False


class MemoryStorage:
    """A file system in memory: the same contract as the local one, no disk. Thread-safe.

    It begins empty, with nothing but its root folder, ``/``. Two instances never compare equal. Open files
    and folders are the things themselves, whatever happens to their names.
    """

    def __init__(self) -> None:
        self._guard = threading.RLock()
        self._root = _Node("folder", self._guard)

    def create(self, path: str, *, direct: bool = False) -> _MemoryNewFile:
        node = _Node("file", self._guard)
        parent, name = self._add(path, node, "create")
        return _MemoryNewFile(path, parent, name, node)

    def open_folder(self, path: str) -> _MemoryFolder:
        with self._guard:
            node = self._get(path, "open")
            if node.kind != "folder":
                raise _error(errno.ENOTDIR, "open", path)
            return _MemoryFolder(path, node)

    def stat(self, path: str) -> Stat | None:
        with self._guard:
            try:
                return self._get(path, "stat").stat()
            except EntryNotFoundError:
                return None

    def make_folder(self, path: str, *, private: bool = False) -> None:
        self._add(path, _Node("folder", self._guard, private=private), "create folder")

    def make_public(self, path: str) -> None:
        with self._guard:
            self._get(path, "make public").private = False

    def rename(self, source: str, target: str, mode: RenameMode) -> None:
        with self._guard:
            old_parent, old_name = self._parent(source, "rename")
            new_parent, new_name = self._parent(target, "rename")
            moved = self._get(source, "rename")
            there = new_parent.entries.get(new_name)
            if mode == "exchange":
                if there is None:
                    raise _error(errno.ENOENT, "rename", target)
                old_parent.entries[old_name], new_parent.entries[new_name] = there, moved
                return
            if there is not None and mode == "create":
                raise _error(errno.EEXIST, "rename", target)
            if there is not None and there is not moved:
                if there.kind != moved.kind:
                    raise _error(errno.EISDIR if there.kind == "folder" else errno.ENOTDIR, "rename", target)
                if there.entries:
                    raise _error(errno.ENOTEMPTY, "rename", target)
            if moved.kind == "folder" and f"{target}/".startswith(f"{source}/") and there is not moved:
                raise _error(errno.EINVAL, "rename", target)
            del old_parent.entries[old_name]
            new_parent.entries[new_name] = moved

    def remove(self, path: str) -> None:
        with self._guard:
            parent, name = self._parent(path, "remove")
            if self._get(path, "remove").entries:
                raise _error(errno.ENOTEMPTY, "remove", path)
            del parent.entries[name]

    def sync_folder(self, path: str) -> None:
        with self._guard:
            if self._get(path, "sync folder").kind != "folder":
                raise _error(errno.ENOTDIR, "sync folder", path)

    def sync_file(self, path: str) -> None:
        with self._guard:
            self._get(path, "fsync")

    def is_network(self, path: str) -> bool:
        with self._guard:
            self._get(path, "statfs")
            return False

    def lock(self, path: str, *, exclusive: bool = False) -> _MemoryLock | None:
        with self._guard:
            node = self._get(path, "lock")
            if node.writer or (exclusive and node.readers):
                return None
            if exclusive:
                node.writer = True
            else:
                node.readers += 1
            return _MemoryLock(node, exclusive=exclusive)

    def _add(self, path: str, node: _Node, operation: str) -> tuple[_Node, str]:
        with self._guard:
            parent, name = self._parent(path, operation)
            if name in parent.entries:
                raise _error(errno.EEXIST, operation, path)
            parent.entries[name] = node
            return parent, name

    def _parent(self, path: str, operation: str) -> tuple[_Node, str]:
        folder, _, name = path.rstrip("/").rpartition("/")
        if not name:
            raise _error(errno.EBUSY, operation, path)
        node = self._get(folder, operation, path)
        if node.kind != "folder":
            raise _error(errno.ENOTDIR, operation, path)
        return node, name

    def _get(self, path: str, operation: str, named: str | None = None) -> _Node:
        node = self._root
        for part in path.split("/"):
            if not part:
                continue
            if node.kind != "folder":
                raise _error(errno.ENOTDIR, operation, named or path)
            if part not in node.entries:
                raise _error(errno.ENOENT, operation, named or path)
            node = node.entries[part]
        return node


def put(storage: Storage, path: str, data: bytes, *, sync: bool = True) -> None:
    """Write a file through a storage."""
    file = storage.create(path)
    try:
        file.write(0, memoryview(data))
    except BaseException:
        file.discard()
        raise
    file.finish(len(data), sync=sync)


def make_folders(storage: Storage, path: str) -> None:
    """Make a folder and those above it."""
    made = ""
    for part in path.strip("/").split("/"):
        made += f"/{part}"
        if storage.stat(made) is None:
            storage.make_folder(made)


def tree(storage: Storage, path: str, prefix: str = "") -> dict[str, bytes]:
    """All files below a folder, with their bytes; an empty folder as its name with a slash."""
    found = {}
    folder = storage.open_folder(path)
    try:
        for name in folder.names():
            stat = folder.stat(name)
            if stat.kind == "folder":
                inner = tree(storage, f"{path}/{name}", f"{prefix}{name}/")
                found |= inner or {f"{prefix}{name}/": b""}
            else:
                found[prefix + name] = folder.read(name, 1 << 20) if stat.kind == "file" else b""
    finally:
        folder.close()
    return found


def hidden(storage: Storage, path: str) -> list[str]:
    """The hidden entries beside a checkpoint."""
    folder = storage.open_folder(os.path.dirname(path))
    try:
        return [name for name in folder.names() if name.startswith(".")]
    finally:
        folder.close()


class Wrapper:
    """Passes everything on; tests override what they change."""

    def __init__(self, inner: Storage) -> None:
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)


class NoExchange(Wrapper):
    """A file system that cannot swap two names."""

    def rename(self, source, target, mode):
        if mode == "exchange":
            raise StorageError.wrap(OSError(errno.EOPNOTSUPP, "not supported"), "rename", target)
        self.inner.rename(source, target, mode)


class Killed(BaseException):
    """Stands for the death of the process: nothing that runs afterwards has an effect."""


class MortalStorage(FaultyStorage):
    """Passes on to a storage until operation `dies_at`; from there on nothing is done, and locks are free.

    It counts the operations that change something, and locks.
    """

    def __init__(self, inner: Storage, dies_at: float = float("inf"), before=None) -> None:
        super().__init__(_Buried(inner, self), before=self._live)
        self.dies_at, self.meanwhile = dies_at, before
        self._count, self._locks = 0, []

    @property
    def dead(self) -> bool:
        return self._count >= self.dies_at

    def _live(self, operation: str, path: str) -> None:
        if operation in MUTATIONS | {"lock"} - {"discard"}:
            if self.meanwhile:
                self.meanwhile(operation, path)
            self._count += 1
        if self.dead:
            for lock in self._locks:
                lock.release()
            raise Killed(f"{operation} {path}")

    def lock(self, path, *, exclusive=False):
        lock = super().lock(path, exclusive=exclusive)
        if lock is not None:
            self._locks.append(lock)
        return lock


class _Buried(Wrapper):
    """A storage whose files a dead `MortalStorage` does not discard."""

    def __init__(self, inner: Storage, mortal: MortalStorage) -> None:
        super().__init__(inner)
        self._mortal = mortal

    def create(self, path, *, direct=False):
        file = Wrapper(self.inner.create(path, direct=direct))
        file.discard = lambda: None if self._mortal.dead else file.inner.discard()
        return file
