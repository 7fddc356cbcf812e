"""Saves and loads of one rank, the scenarios of a save that is disturbed, and what must load after it."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import torch

from milepost.checkpoint_reader import CheckpointReader
from milepost.checkpoint_writer import (
    CheckpointWriter,
    CheckpointWriterConfig,
    WriterHook,
    partial_directory,
)
from milepost.errors import CheckpointNotFoundError, IncompleteCheckpointError
from milepost.format.index import decode_index
from milepost.format.manifest import decode_manifest
from milepost.health.verify import verify
from milepost.storage import Storage, default_storage
from milepost.storage.writing import write_bytes
from milepost.testing import FaultyStorage
from milepost.types import RankInfo
from support.disks import make_folders, put, tree
from support.processes import KILLED, in_child
from support.states import make_state, same

ONE = RankInfo(0, 1)


def save(
    path: Any, state: Any, storage: Storage | None = None, *, attach: bool = False, **arguments: Any
) -> str:
    """Save a state dict, or the `make_state` of a step, with a writer of its own; the path as text."""
    if isinstance(state, int):
        state, arguments["step"] = make_state(state), state
    hook = AddsFiles(storage) if attach else None
    writer = CheckpointWriter(CheckpointWriterConfig(), ONE, commit_hook=hook, storage=storage)
    try:
        writer.write(str(path), state, **arguments)
    finally:
        writer.close()
    return str(path)


def load(path: Any, template: Any = None, storage: Storage | None = None, **options: Any) -> Any:
    """Load what is at a path."""
    return CheckpointReader(ONE, storage=storage).read(str(path), template, **options)[0]


def round_trip(folder, state, **arguments):
    return load(save(Path(folder) / "checkpoint", state), **arguments)


def data_file(path, rank=0):
    return f"{path}/checkpoint_{rank}.pt"


def manifest_of(path):
    return decode_manifest(Path(path, "manifest.json").read_bytes(), str(path))


def index_of(path, rank=0):
    return decode_index(Path(path, f"index_{rank}.json").read_bytes(), str(path))


def raw_index_of(path, rank=0):
    return json.loads(Path(path, f"index_{rank}.json").read_bytes())


def torch_load(path, **arguments):
    return torch.load(data_file(path), **arguments)


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


OURS = ["checkpoint_0.pt", "index_0.json", "manifest.json"]
ATTACHED = ["logs/loss.csv", "vocabulary.txt"]
MINE = ["README", "plots/loss.svg"]


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
            make_folders(storage, os.path.dirname(f"{path}/{name}"))
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
        folder.close()
        assert set(tree(storage, path)) == {*OURS, *(ATTACHED if self.attach else ()), *self.mine}
        self.check_mine(path, storage)

    def check_mine(self, path: str, storage: Storage | None = None) -> None:
        """The user's files are in the folder, as they were."""
        found = tree(default_storage() if storage is None else storage, path) if self.mine else {}
        assert all(found.get(name) == b"mine: " + name.encode() for name in self.mine)


PLAIN_STATE = {"plain": torch.arange(5), "epoch": 3}

SCENARIOS = [
    Scenario("fresh", before=None),
    Scenario("nested", before=None, path="runs/first/step"),
    Scenario("replace"),
    Scenario("replace-plain", plain=True),
    Scenario("replace-all", attach=True, mine=True),
]


def torch_save(storage: Storage, path: str, state: Any) -> None:
    """Plain ``torch.save``, to any storage."""
    stream = io.BytesIO()
    torch.save(state, stream)
    put(storage, path, stream.getvalue())


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
