"""What the tests of faults, of several processes, and of damage have in common: states, saves, and checks."""

from __future__ import annotations

import os
import select
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from milepost.checkpoint_reader import CheckpointReader
from milepost.checkpoint_writer import (
    CheckpointWriter,
    CheckpointWriterConfig,
    WriterHook,
    partial_directory,
)
from milepost.errors import CheckpointNotFoundError, IncompleteCheckpointError
from milepost.health.verify import verify
from milepost.storage import Storage, default_storage
from milepost.storage.writing import write_bytes
from milepost.testing import FaultyStorage
from milepost.types import RankInfo

SINGLE = RankInfo(0, 1)


def make_state(number: int) -> dict[Any, Any]:
    """A state dict of every storage form in a few hundred bytes: tensors, arrays, objects, values."""
    weight = torch.arange(12, dtype=torch.float32).reshape(3, 4) + 100 * number
    return {
        "weight": weight,
        "tied": weight,
        "row": weight[1],
        "transposed": weight.T,
        "bfloat": torch.full((5,), number, dtype=torch.bfloat16),
        "conj": torch.tensor([1 + 2j, 3 - 4j]).conj() * number,
        "empty": torch.zeros(0, 3),
        "sparse": torch.eye(2).to_sparse() * number,
        "array": np.arange(4, dtype=np.int16) * number,
        "words": np.array(["ab", f"{number:04}"]),
        "numbers": [number, number / 3, 2**70 + number, float("nan"), None, (True, b"\0\xff")],
        1: {"text": f"état {number}", None: -0.0},
    }


def same(left: Any, right: Any) -> bool:
    """Whether two values are the same, bit for bit."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        if left.layout is not torch.strided:
            return same(left.coalesce().indices(), right.coalesce().indices()) and same(
                left.coalesce().values(), right.coalesce().values()
            )
        return (left.dtype, left.shape, left.is_conj()) == (right.dtype, right.shape, right.is_conj()) and (
            left.resolve_conj().contiguous().reshape(-1).view(torch.uint8).tolist()
            == right.resolve_conj().contiguous().reshape(-1).view(torch.uint8).tolist()
        )
    if isinstance(left, np.ndarray):
        return (left.dtype, left.shape) == (right.dtype, right.shape) and left.tobytes() == right.tobytes()
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return repr(left) == repr(right)


class AddsFiles(WriterHook):
    """A hook that attaches two files, written without any fsync, as users do."""

    def __init__(self, storage: Storage | None = None) -> None:
        self.storage = default_storage() if storage is None else storage

    def pre_commit(self, path: str, **kwargs: Any) -> None:
        folder = partial_directory()
        self.storage.make_folder(f"{folder}/logs")
        for name in ("vocabulary.txt", "logs/loss.csv"):
            data = f"{name} of step {kwargs.get('step')}".encode()
            write_bytes(self.storage, f"{folder}/{name}", data, sync=False)

    def post_commit(self, path: str, **kwargs: Any) -> None:
        pass


def save(
    path: str, number: int, storage: Storage | None = None, *, attach: bool = False, **options: Any
) -> None:
    """Save state `number` with a writer of its own."""
    writer = CheckpointWriter(
        CheckpointWriterConfig(),
        SINGLE,
        commit_hook=AddsFiles(storage) if attach else None,
        storage=storage,
    )
    try:
        writer.write(path, options.get("state") or make_state(number), step=number)
    finally:
        writer.close()


def load(path: str, template: Any = None, storage: Storage | None = None, **options: Any) -> Any:
    """Load what is at a path."""
    return CheckpointReader(SINGLE, storage=storage).read(path, template, **options)[0]


def which(path: str, storage: Storage | None = None, *, verified: bool = True) -> int | None:
    """The number of the state at a path, which must be whole and as it was saved; None if there is none."""
    storage = default_storage() if storage is None else storage
    try:
        found = load(path, storage=storage)
    except (CheckpointNotFoundError, IncompleteCheckpointError):
        return None
    number = found["numbers"][0]
    assert same(found, make_state(number)), "a wrong value was loaded"
    if verified:
        report = verify(storage, path)
        assert not report.problems, report.problems
    return number


def names_in(storage: Storage, path: str) -> list[str]:
    """The files below a folder, as relative paths."""
    folder = storage.open_folder(path)
    try:
        found = []
        for name in folder.names():
            stat = folder.stat(name)
            if stat is not None and stat.kind == "folder":
                found += [f"{name}/", *(f"{name}/{inner}" for inner in names_in(storage, f"{path}/{name}"))]
            else:
                found.append(name)
        return sorted(found)
    finally:
        folder.close()


OURS = ["checkpoint_0.pt", "index_0.json", "manifest.json"]
ATTACHED = ["logs/", "logs/loss.csv", "vocabulary.txt"]
MINE = ["README", "plots/", "plots/loss.svg"]


class Scenario:
    """A save over something that is there already.

    Attributes:
        name: Its name.
        before: The number of the state that loads before the save, None for none.
        attach: Whether hooks attach files.
        path: Of the checkpoint, below the folder that the scenario happens in.
        mine: The user's own files in the checkpoint's folder.
    """

    def __init__(
        self,
        name: str,
        *,
        before: int | None = 1,
        plain: bool = False,
        attach: bool = False,
        mine: bool = False,
        path: str = "step",
    ) -> None:
        self.name, self.before, self.plain, self.attach, self.path = name, before, plain, attach, path
        self.mine = MINE if mine else []

    def __repr__(self) -> str:
        return self.name

    def prepare(self, root: str, storage: Storage | None = None) -> str:
        """Make what is there before; returns the checkpoint's path."""
        storage = default_storage() if storage is None else storage
        path = f"{root}/{self.path}"
        if self.plain:
            storage.make_folder(path)
            for rank in (0, 1):
                torch_save(storage, f"{path}/checkpoint_{rank}.pt", PLAIN_STATE)
        elif self.before is not None:
            save(path, self.before, storage, attach=self.attach)
        for name in self.mine:
            if name.endswith("/"):
                storage.make_folder(f"{path}/{name[:-1]}")
            else:
                put(storage, f"{path}/{name}", b"mine: " + name.encode())
        return path

    def save(self, path: str, number: int, storage: Storage | None = None) -> None:
        """The save that is to be disturbed."""
        save(path, number, storage, attach=self.attach)

    def found(self, path: str, storage: Storage | None = None, *, verified: bool = True) -> int | None:
        """What loads at the path: the number of a whole state, -1 for the plain one, None for none."""
        if self.plain:
            try:
                loaded = load(path, storage=storage)
            except (CheckpointNotFoundError, IncompleteCheckpointError):
                return None
            if "plain" in loaded:
                assert same(loaded, PLAIN_STATE)
                return -1
        return which(path, storage, verified=verified)

    @property
    def old(self) -> int | None:
        """What `found` returns before the save."""
        return -1 if self.plain else self.before

    def check_tidy(self, path: str, storage: Storage | None = None) -> None:
        """Nothing but the checkpoint and the user's files is there, and those are as they were."""
        storage = default_storage() if storage is None else storage
        parent, name = os.path.split(path)
        folder = storage.open_folder(parent)
        assert folder.names() == [name]
        assert names_in(storage, path) == sorted(OURS + (ATTACHED if self.attach else []) + self.mine)
        folder.close()
        self.check_mine(path, storage)

    def check_mine(self, path: str, storage: Storage | None = None) -> None:
        """The user's files are in the folder, as they were."""
        storage = default_storage() if storage is None else storage
        folder = storage.open_folder(path)
        for name in self.mine:
            if not name.endswith("/"):
                assert folder.read(name, 1000) == b"mine: " + name.encode()
        folder.close()


PLAIN_STATE = {"plain": torch.arange(5), "epoch": 3}

SCENARIOS = [
    Scenario("fresh", before=None),
    Scenario("nested", before=None, path="runs/first/step"),
    Scenario("replace"),
    Scenario("replace-plain", plain=True),
    Scenario("replace-all", attach=True, mine=True),
]


def put(storage: Storage, path: str, data: bytes) -> None:
    """Write a file."""
    file = storage.create(path)
    file.write(0, memoryview(data))
    file.finish(len(data))


def torch_save(storage: Storage, path: str, state: Any) -> None:
    """Plain ``torch.save``, to any storage."""
    import io

    stream = io.BytesIO()
    torch.save(state, stream)
    put(storage, path, stream.getvalue())


def in_child(work: Callable[[], Any], seconds: float | None = None) -> int:
    """Run `work` in a forked child; its exit code, negative for a signal. Torch must stay single-threaded.

    A child that takes longer than `seconds` is killed, and that is a failure.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    try:
        if seconds is not None:
            with open(os.pidfd_open(pid), "rb") as ended:
                in_time = select.select([ended], [], [], seconds)[0]
            assert in_time, f"the child had not ended after {seconds} s, and was killed"
        _, status = os.waitpid(pid, 0)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    return os.waitstatus_to_exitcode(status)


def descriptors() -> int:
    """How many descriptors this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


KILLED = -signal.SIGKILL


def killed_saves(scenario, root, kind="kill", counts=None, stride=1):
    """Kill a save at its operation 1, 1 + `stride`, … until one gets through; yields number and path."""
    number = 1
    while True:
        folder = f"{root}/{number}"
        os.mkdir(folder)
        path = scenario.prepare(folder)
        storage = FaultyStorage(default_storage(), counts=counts).fail_at(number, kind)
        code = in_child(lambda path=path, storage=storage: scenario.save(path, 2, storage))
        if code == 0:
            assert number > (4 if counts else 40), "there were too few operations to believe"
            assert scenario.found(path) == 2
            scenario.check_tidy(path)
            return
        assert code == KILLED
        yield number, path
        number += stride


def check_recovery(scenario, path, number):
    """A save after the kill gets through and leaves nothing of the killed one behind.

    On a network file system it may leave what is not a day old; then that is made so, and a second one saves.
    """
    newest = 3
    scenario.save(path, newest)
    if default_storage().is_network(path):
        assert scenario.found(path) == newest, f"killed at operation {number}"
        make_old(os.path.dirname(path))
        newest = 4
        scenario.save(path, newest)
    assert scenario.found(path) == newest, f"killed at operation {number}"
    scenario.check_tidy(path)


def make_old(folder):
    """Make everything in a folder more than a day older than it is."""
    for above, folders, files in os.walk(folder, topdown=False):
        for name in (*folders, *files):
            then = os.lstat(f"{above}/{name}").st_mtime - 25 * 3600
            os.utime(f"{above}/{name}", (then, then), follow_symlinks=False)
