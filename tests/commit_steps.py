"""What the tests of the commit share: a small save in steps, the judgement of what a disk holds, storages."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import threading
import zlib

from milepost.commit import Attempt, Clock, begin, check_target, locate, new_attempt_id
from milepost.errors import CheckpointNotFoundError, EntryNotFoundError, StorageError
from milepost.format.index import DataFile, Index, Records, Tensors, encode_index
from milepost.format.names import MANIFEST_NAME, data_name, is_own
from milepost.storage import Storage

_times = itertools.count(1.0)


def content(step: int, rank: int = 0) -> bytes:
    """The data of a rank: more than two blocks, and no byte like that of another step or rank."""
    return f"step {step} rank {rank} ".encode().ljust(16) * 600


def put(storage: Storage, path: str, data: bytes, *, sync: bool = True) -> None:
    """Write a file through the storage."""
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


def index_of(attempt: Attempt, step: int, fields=None, **more) -> Index:
    """What a rank says of itself."""
    data = content(step, attempt.rank)
    known = {
        "attempt": attempt.id,
        "process": attempt.process,
        "rank": attempt.rank,
        "world_size": attempt.world_size,
        "time": next(_times),
        "step": step,
        "files": [DataFile(data_name(attempt.rank), len(data), zlib.crc32(data))],
        "records": Records(),
        "tensors": Tensors(),
        "tree": ("none",),
    }
    return Index(**(known | more | (fields or {})))


def arrive(
    storage: Storage,
    path: str,
    step: int,
    *,
    attempt=None,
    rank=0,
    world_size=1,
    hook=None,
    fields=None,
    **kwargs,
) -> Attempt:
    """One rank's part of a save, up to its mark."""
    target = check_target(storage, path)
    begun = begin(
        storage, target.path, attempt=attempt or new_attempt_id(), rank=rank, world_size=world_size, **kwargs
    )
    try:
        if begun.marked:
            return begun
        put(storage, begun.data_path, content(step, rank))
        if hook:
            hook(begun.folder)
        more = {"attachments": begun.attachments(), "sequence": begun.sequence()}
        begun.mark(encode_index(index_of(begun, step, fields, **more)))
    except Exception as error:
        begun.abort(error)
        begun.close()
        raise
    except BaseException:
        begun.close()
        raise
    return begun


def save(storage: Storage, path: str, step: int, **kwargs) -> bool:
    """One rank's part of a save, with the commit if it is the last; whether it made the manifest."""
    attempt = arrive(storage, path, step, **kwargs)
    try:
        return attempt.complete()
    except Exception as error:
        attempt.abort(error)
        raise
    finally:
        attempt.close()


def loaded_step(storage: Storage, path: str) -> int | None:
    """The step of the checkpoint that a load of `path` finds, every byte compared; None if none is there.

    When a save replaces the folder between the look and the reading, looks again.
    """
    while True:
        try:
            found = locate(storage, path)
        except CheckpointNotFoundError:
            return None
        try:
            return _compare(found)
        except EntryNotFoundError:
            continue
        finally:
            found.folder.close()


def _compare(found) -> int:
    folder, manifest = found.folder, found.manifest
    if manifest is None:
        data = folder.read("checkpoint_0.pt", 1 << 20)
        assert data == content(0)
        return 0
    assert len(manifest.files) == manifest.world_size
    for file in manifest.files:
        data = folder.read(file.name, 1 << 20)
        rank = int(file.name.removeprefix("checkpoint_").removesuffix(".pt"))
        assert data == content(manifest.step, rank), f"{file.name} is not what step {manifest.step} wrote"
        assert zlib.crc32(data) == file.crc32
    for file in (*manifest.indexes, *manifest.attachments):
        data = folder.read(file.name, 1 << 20)
        assert hashlib.sha256(data).hexdigest() == file.sha256, f"{file.name} is damaged"
    return manifest.step


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


def assert_clean(storage: Storage, path: str) -> None:
    """Nothing is left of any save but the checkpoint itself."""
    assert hidden(storage, path) == []
    ours = [name for name in tree(storage, path) if is_own(name) and name != MANIFEST_NAME]
    assert ours == []


class Killed(BaseException):
    """Stands for the death of the process: nothing that runs afterwards has an effect."""


class MortalStorage:
    """Passes on to a storage until operation `dies_at`; from there on nothing is done, and locks are free.

    It counts the operations that change something, and locks.
    """

    def __init__(self, inner: Storage, dies_at: float = float("inf"), before=None) -> None:
        self.inner, self.dies_at, self.before = inner, dies_at, before
        self.operations: list[str] = []
        self._locks: list = []

    def step(self, operation: str, path: str) -> None:
        if self.before:
            self.before(operation, path)
        self.operations.append(f"{operation} {path}")
        if len(self.operations) >= self.dies_at:
            for lock in self._locks:
                lock.release()
            raise Killed(self.operations[-1])

    @property
    def dead(self) -> bool:
        return len(self.operations) >= self.dies_at

    def create(self, path, *, direct=False):
        self.step("create", path)
        return _MortalFile(self, path, self.inner.create(path, direct=direct))

    def make_folder(self, path, *, private=False):
        self.step("make_folder", path)
        self.inner.make_folder(path, private=private)

    def make_public(self, path):
        self.step("make_public", path)
        self.inner.make_public(path)

    def rename(self, source, target, mode):
        self.step("rename", target)
        self.inner.rename(source, target, mode)

    def remove(self, path):
        self.step("remove", path)
        self.inner.remove(path)

    def sync_folder(self, path):
        self.step("sync_folder", path)
        self.inner.sync_folder(path)

    def sync_file(self, path):
        self.step("sync_file", path)
        self.inner.sync_file(path)

    def is_network(self, path):
        return self.inner.is_network(path)

    def lock(self, path, *, exclusive=False):
        self.step("lock", path)
        lock = self.inner.lock(path, exclusive=exclusive)
        if lock is not None:
            self._locks.append(lock)
        return lock

    def open_folder(self, path):
        if self.dead:
            raise Killed(path)
        return self.inner.open_folder(path)

    def stat(self, path):
        if self.dead:
            raise Killed(path)
        return self.inner.stat(path)


class _MortalFile:
    def __init__(self, storage: MortalStorage, path: str, inner) -> None:
        self._storage, self._path, self._inner = storage, path, inner

    def write(self, offset, data):
        self._storage.step("write", self._path)
        self._inner.write(offset, data)

    def finish(self, size, *, sync=True):
        self._storage.step("finish", self._path)
        self._inner.finish(size, sync=sync)

    def discard(self):
        if not self._storage.dead:
            self._inner.discard()


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


class StepClock:
    """A clock that stands still but for the sleeps; `on_sleep` is called at each of them."""

    def __init__(self, on_sleep=None) -> None:
        self.now = 1000.0
        self.on_sleep = on_sleep
        self.clock = Clock(time=lambda: self.now, monotonic=lambda: self.now, sleep=self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.on_sleep:
            self.on_sleep()


class Turns:
    """Lets threads run one operation at a time, in an order that `choose` decides.

    Args:
        choose: Given the names of the threads that want to go on, the one that may.
    """

    def __init__(self, choose) -> None:
        self._choose = choose
        self._change = threading.Condition()
        self._waiting: dict[str, bool] = {}
        self._running = 0
        self.order: list[str] = []

    def wait(self, name: str) -> None:
        """Called by a thread before each of its operations."""
        with self._change:
            self._waiting[name] = False
            self._running -= 1
            self._next()
            self._change.wait_for(lambda: self._waiting[name])
            del self._waiting[name]

    def _next(self) -> None:
        if self._running == 0 and self._waiting:
            name = self._choose(sorted(self._waiting))
            self.order.append(name)
            self._waiting[name] = True
            self._running += 1
            self._change.notify_all()

    def run(self, **programs) -> dict[str, object]:
        """Run each program in a thread of its name; their results, or the exceptions they raised."""
        results: dict[str, object] = {}

        def main(name, program):
            try:
                self.wait(name)
                results[name] = program()
            except BaseException as error:
                results[name] = error
            finally:
                with self._change:
                    self._running -= 1
                    self._next()

        threads = [threading.Thread(target=main, args=item, daemon=True) for item in programs.items()]
        self._running = len(threads)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive(), f"stuck after {self.order[-10:]}"
        return results
