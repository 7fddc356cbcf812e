"""What a disk may hold after a power cut: recorded operations, and the states they allow.

The model is the weakest that file systems promise. Data that was not fsynced may be lost in any subset of
its 4 KiB blocks, and so may the length. A name that was created, renamed or removed may be as before until
its folder is fsynced; the fsync of a file does not save its name. A rename, or an exchange, happens whole
or not at all; across folders it is safe when both were fsynced.
"""

from __future__ import annotations

import itertools
import os
import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from milepost.storage import Folder, Lock, NewFile, RenameMode, Stat, Storage
from milepost.storage.writing import publish_bytes
from support.disks import MemoryStorage, put

__all__ = ["Event", "RecordingStorage", "copy_out", "disk_states"]

_BLOCK_BYTES = 4096


@dataclass(frozen=True)
class Event:
    """One operation that changed the disk, or made a change durable.

    Attributes:
        kind: What was done. ``finish`` is "size", then "fsync".
        path: To what, as it was called then.
        target: The new name, for "rename" and "exchange".
        file: Which file, for those that concern an open one: a number of its own.
        offset: Where, for "write"; the length, for "size".
        data: What, for "write".
    """

    kind: Literal[
        "make_folder", "create", "write", "size", "fsync", "rename", "exchange", "remove", "sync_folder"
    ]
    path: str
    target: str = ""
    file: int = 0
    offset: int = 0
    data: bytes = field(default=b"", repr=False)


class RecordingStorage:
    """Passes everything on to another storage and notes what changed.

    Attributes:
        log: The events so far, each noted after it succeeded.
    """

    def __init__(self, inner: Storage) -> None:
        self.inner = inner
        self.log: list[Event] = []
        self._guard = threading.Lock()
        self._files = 0

    def create(self, path: str, *, direct: bool = False) -> NewFile:
        """See `Storage.create`."""
        inner = self.inner.create(path, direct=direct)
        with self._guard:
            self._files += 1
            self.log.append(Event("create", path, file=self._files))
            return _RecordedFile(self.log, path, self._files, inner)

    def make_folder(self, path: str, *, private: bool = False) -> None:
        """See `Storage.make_folder`."""
        self.inner.make_folder(path, private=private)
        self.log.append(Event("make_folder", path))

    def rename(self, source: str, target: str, mode: RenameMode) -> None:
        """See `Storage.rename`."""
        self.inner.rename(source, target, mode)
        self.log.append(Event("exchange" if mode == "exchange" else "rename", source, target))

    def remove(self, path: str) -> None:
        """See `Storage.remove`."""
        self.inner.remove(path)
        self.log.append(Event("remove", path))

    def sync_folder(self, path: str) -> None:
        """See `Storage.sync_folder`."""
        self.inner.sync_folder(path)
        self.log.append(Event("sync_folder", path))

    def sync_file(self, path: str) -> None:
        """Write the file anew, so that the events say what is durable."""
        folder = self.inner.open_folder(os.path.dirname(path))
        try:
            data = folder.read(os.path.basename(path), 1 << 30)
        finally:
            folder.close()
        publish_bytes(self, path, data, "replace")

    def is_network(self, path: str) -> bool:
        """See `Storage.is_network`."""
        return self.inner.is_network(path)

    def make_public(self, path: str) -> None:
        """See `Storage.make_public`."""
        self.inner.make_public(path)

    def open_folder(self, path: str) -> Folder:
        """See `Storage.open_folder`."""
        return self.inner.open_folder(path)

    def stat(self, path: str) -> Stat | None:
        """See `Storage.stat`."""
        return self.inner.stat(path)

    def lock(self, path: str, *, exclusive: bool = False) -> Lock | None:
        """See `Storage.lock`."""
        return self.inner.lock(path, exclusive=exclusive)


class _RecordedFile:
    def __init__(self, log: list[Event], path: str, number: int, inner: NewFile) -> None:
        self._log, self._path, self._number, self._inner = log, path, number, inner
        self._ended = False

    def write(self, offset: int, data: memoryview) -> None:
        self._inner.write(offset, data)
        self._log.append(Event("write", self._path, file=self._number, offset=offset, data=bytes(data)))

    def finish(self, size: int, *, sync: bool = True) -> None:
        try:
            self._inner.finish(size, sync=sync)
        except BaseException:
            self._gone()
            raise
        self._ended = True
        self._log.append(Event("size", self._path, file=self._number, offset=size))
        if sync:
            self._log.append(Event("fsync", self._path, file=self._number))

    def discard(self) -> None:
        self._inner.discard()
        self._gone()

    def _gone(self) -> None:
        if not self._ended:
            self._ended = True
            self._log.append(Event("remove", self._path, file=self._number))


# ---------------------------------------------------------------------------- the model

_ROOT = 0
_Name = tuple[int, str]


@dataclass
class _Change:
    """A change of names: each node goes to its new name, or nowhere.

    It concerns these nodes, and those that lose their names by it. Durable when no folder's fsync is awaited.
    """

    moves: list[tuple[int, _Name | None]]
    concerns: set[int]
    awaited: set[int]


@dataclass
class _Content:
    """The writes to a file, block by block, as (offset, bytes), and its lengths, as (length, None)."""

    writes: list[tuple[int, bytes | None]] = field(default_factory=list)
    durable: int = 0

    def after(self, kept: set[int]) -> bytes:
        content = bytearray()
        for number, (offset, data) in enumerate(self.writes):
            if number >= self.durable and number not in kept:
                continue
            end = offset if data is None else offset + len(data)
            content.extend(bytes(max(end - len(content), 0)))
            if data is None:
                del content[end:]
            else:
                content[offset:end] = data
        return bytes(content)


class _Disk:
    """Names and contents, each with what may still be lost."""

    def __init__(self) -> None:
        self.contents: dict[int, _Content] = {}
        self.changes: list[_Change] = []
        self._names: dict[_Name, int] = {}
        self._open: dict[int, int] = {}
        self._nodes = _ROOT

    def apply(self, event: Event) -> None:
        kind, path = event.kind, event.path
        if kind in {"create", "make_folder"}:
            name = self._name(path)
            node = self._new()
            if kind == "create":
                self.contents[node] = _Content()
                self._open[event.file] = node
            self._change([(node, name)], name)
        elif kind == "write":
            writes = self.contents[self._open[event.file]].writes
            step = _BLOCK_BYTES
            for start in range(0, len(event.data), step):
                writes.append((event.offset + start, event.data[start : start + step]))
        elif kind == "size":
            self.contents[self._open[event.file]].writes.append((event.offset, None))
        elif kind == "fsync":
            content = self.contents[self._open[event.file]]
            content.durable = len(content.writes)
        elif kind == "remove":
            name = self._name(path)
            node = self._open[event.file] if event.file else self._names[name]
            self._change([(node, None)], name)
        elif kind == "sync_folder":
            folder = self._folder(path)
            for change in self.changes:
                change.awaited.discard(folder)
        else:
            source, target = self._name(path), self._name(event.target)
            moves: list[tuple[int, _Name | None]] = [(self._names[source], target)]
            if kind == "exchange":
                moves.append((self._names[target], source))
            self._change(moves, source, target)

    def settle(self) -> None:
        """Everything so far is durable."""
        for change in self.changes:
            change.awaited.clear()
        for content in self.contents.values():
            content.durable = len(content.writes)

    def loose(self) -> list[tuple[int, int]]:
        """What may be lost: (-1, number of a change), or (node, number of a write)."""
        found = [(-1, number) for number, change in enumerate(self.changes) if change.awaited]
        seen = set(self._names.values())
        for change in self.changes:
            seen |= change.concerns if change.awaited else set()
        for node, content in self.contents.items():
            if node in seen:
                found += [(node, number) for number in range(content.durable, len(content.writes))]
        return found

    def tree(self, kept: frozenset[tuple[int, int]]) -> dict[str, bytes | None]:
        """What is there when, of all that may be lost, `kept` is: files with their bytes, and folders."""
        names: dict[_Name, int] = {}
        places: dict[int, _Name] = {}
        for number, change in enumerate(self.changes):
            if not change.awaited or (-1, number) in kept:
                _move(names, places, change.moves)
        found: dict[str, bytes | None] = {}
        self._list(found, names, _ROOT, "", kept)
        return found

    def _list(
        self,
        found: dict[str, bytes | None],
        names: dict[_Name, int],
        folder: int,
        path: str,
        kept: frozenset[tuple[int, int]],
    ) -> None:
        for (parent, name), node in names.items():
            if parent != folder:
                continue
            if node in self.contents:
                data = self.contents[node].after({number for owner, number in kept if owner == node})
                found[f"{path}/{name}"] = data
            else:
                found[f"{path}/{name}"] = None
                self._list(found, names, node, f"{path}/{name}", kept)

    def _new(self) -> int:
        self._nodes += 1
        return self._nodes

    def _change(self, moves: list[tuple[int, _Name | None]], *names: _Name) -> None:
        concerns = {node for node, _ in moves} | {self._names.get(name, _ROOT) for name in names}
        self.changes.append(_Change(moves, concerns, {folder for folder, _ in names}))
        _move(self._names, {node: name for name, node in self._names.items()}, moves)

    def _name(self, path: str) -> _Name:
        folder, _, name = path.rstrip("/").rpartition("/")
        return self._folder(folder), name

    def _folder(self, path: str) -> int:
        """The folder at `path`; what the log does not create was there before, and is durable."""
        node = _ROOT
        for part in filter(None, path.split("/")):
            name = (node, part)
            if name not in self._names:
                self._names[name] = self._new()
                self.changes.append(_Change([(self._names[name], name)], set(), set()))
            node = self._names[name]
        return node


def _move(names: dict[_Name, int], places: dict[int, _Name], moves: list[tuple[int, _Name | None]]) -> None:
    for node, target in moves:
        before = places.pop(node, None)
        if before is not None and names.get(before) == node:
            del names[before]
        if target is not None:
            names[target] = node
            places[node] = target


def _disk_of(tree: dict[str, bytes | None]) -> MemoryStorage:
    storage = MemoryStorage()
    for path, data in tree.items():
        if data is None:
            storage.make_folder(path)
        else:
            put(storage, path, data)
    return storage


def disk_states(
    log: Sequence[Event],
    upto: int | None = None,
    *,
    settled: int = 0,
    seed: int = 0,
    limit: int = 64,
    seen: set[Any] | None = None,
) -> Iterator[MemoryStorage]:
    """The disks that may be found after a power cut when the first `upto` events had happened.

    All of them, if there are no more than `limit`. Otherwise: everything that may be lost is lost, or kept;
    all names kept and all data lost, and the reverse; the data of each single file lost, or kept; each
    single change of names lost, or kept; and, as many as `limit` allows and chosen by `seed`, each single
    block lost, or kept, and random subsets. Folders that the log uses but does not create were there before.

    Args:
        log: The events, as recorded.
        upto: How many of them had happened; by default all.
        settled: How many of them had become durable in any case.
        seed: For the random choices.
        limit: About how many disks at most.
        seen: Disks that need not be given again, as former calls with this set have given them.
    """
    disk = _Disk()
    for number, event in enumerate(log[:upto]):
        if number == settled:
            disk.settle()
        disk.apply(event)
    if settled >= len(log[:upto]):
        disk.settle()
    subsets = dict.fromkeys(_subsets(disk.loose(), random.Random(seed), limit))
    for tree in map(disk.tree, subsets):
        if seen is not None:
            before = len(seen)
            seen.add(frozenset(tree.items()))
            if len(seen) == before:
                continue
        yield _disk_of(tree)


def _subsets(
    loose: list[tuple[int, int]], choose: random.Random, limit: int
) -> Iterator[frozenset[tuple[int, int]]]:
    if 2 ** min(len(loose), 30) <= limit:
        for count in range(len(loose) + 1):
            yield from map(frozenset, itertools.combinations(loose, count))
        return
    everything = frozenset(loose)
    names = frozenset(item for item in loose if item[0] == -1)
    data = everything - names
    owners = sorted({owner for owner, _ in data})
    groups = [frozenset(item for item in data if item[0] == owner) for owner in owners]
    single = [frozenset({item}) for item in sorted(names)]
    blocks = [frozenset({item}) for item in sorted(data)]
    room = max(limit // 2 - len(groups) - len(single), 0) // 2
    if len(blocks) > room:
        blocks = choose.sample(blocks, room)
    yield frozenset()
    yield everything
    for group in [names, *groups, *single, *blocks]:
        yield group
        yield everything - group
    for _ in range(max(limit // 4, 4) if len(loose) > 1 else 0):
        share = choose.random()
        yield frozenset(item for item in loose if choose.random() < share)


def copy_out(storage: Storage, path: str, folder: str) -> None:
    """Copy the folder `path` of a storage to `folder` of the real file system, which must not exist."""
    os.mkdir(folder)
    opened = storage.open_folder(path)
    try:
        for name in opened.names():
            found = opened.stat(name)
            if found is not None and found.kind == "folder":
                copy_out(storage, f"{path.rstrip('/')}/{name}", f"{folder}/{name}")
            elif found is not None:
                with open(f"{folder}/{name}", "xb") as file:
                    file.write(opened.read(name, found.size_bytes))
    finally:
        opened.close()
