"""A small save in steps, the judgement of what a storage holds, clocks and turns."""

from __future__ import annotations

import hashlib
import itertools
import threading
import zlib

from milepost.commit import Attempt, Clock, begin, check_target, locate, new_attempt_id
from milepost.errors import CheckpointNotFoundError, EntryNotFoundError
from milepost.format.index import DataFile, Index, Records, Tensors, encode_index
from milepost.format.names import MANIFEST_NAME, data_name, is_own
from milepost.storage import Storage
from support.disks import hidden, put, tree

_times = itertools.count(1.0)


def content(step: int, rank: int = 0) -> bytes:
    """The data of a rank: more than two blocks, and no byte like that of another step or rank."""
    return f"step {step} rank {rank} ".encode().ljust(16) * 600


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


def let_die(attempt: Attempt) -> None:
    """Leave an attempt as the death of its process does: nothing is written or removed, its lock is free."""
    attempt._release()


def assert_clean(storage: Storage, path: str) -> None:
    """Nothing is left of any save but the checkpoint itself."""
    assert hidden(storage, path) == []
    ours = [name for name in tree(storage, path) if is_own(name) and name != MANIFEST_NAME]
    assert ours == []


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
