"""The writer: hooks, attachments, labels, and what is visible when."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from memory_storage import MemoryStorage
from states import assert_same, data_file, index_of, load, manifest_of, save

from milepost import checkpoint_writer
from milepost.checkpoint_reader import CheckpointReader
from milepost.checkpoint_writer import (
    CheckpointWriter,
    CheckpointWriterConfig,
    WriterHook,
    partial_directory,
)
from milepost.errors import ClosedError, CommitError, MilepostError, PostCommitError, StateError, TargetError
from milepost.format.tree import TreeDecoder
from milepost.testing import FaultyStorage
from milepost.types import RankInfo

ONE = RankInfo(0, 1)
STATE = {"w": torch.arange(5.0), "n": 1}


class Log(WriterHook):
    """Notes each call; `on` maps the name of a hook to what it is to do."""

    def __init__(self, **on):
        self.calls, self.on = [], on

    def pre_commit(self, path, **kwargs):
        self.calls.append(("pre_commit", path, kwargs))
        self.on.get("pre_commit", lambda: None)()

    def post_commit(self, path, **kwargs):
        self.calls.append(("post_commit", path, kwargs))
        self.on.get("post_commit", lambda: None)()


@pytest.fixture
def writers():
    """Makes writers, and closes them at the end."""
    made = []

    def make(barrier=None, hook=None, rank_info=ONE, kind=CheckpointWriter, **options):
        made.append(kind(CheckpointWriterConfig(), rank_info, barrier, hook, **options))
        return made[-1]

    yield make
    for writer in made:
        writer.close()


class Barrier:
    """Any object with execute_barrier will do."""

    def __init__(self, log):
        self.log = log

    def execute_barrier(self):
        self.log.append(("barrier",))


def test_the_order_is_file_pre_commit_barrier_post_commit(tmp_path, writers):
    """The file is durable before pre_commit, the barrier comes next, then the commit, then post_commit."""
    path = str(tmp_path / "c")
    seen = []

    def look(name):
        def note():
            published = os.path.exists(f"{path}/manifest.json")
            data = name == "pre" and os.path.getsize(f"{partial_directory()}/checkpoint_0.pt") > 0
            seen.append((name, published, data))

        return note

    hook = Log(pre_commit=look("pre"), post_commit=look("post"))
    writers(Barrier(hook.calls), hook).write(path, STATE)
    assert [call[0] for call in hook.calls] == ["pre_commit", "barrier", "post_commit"]
    assert seen == [("pre", False, True), ("post", True, False)]


def test_hooks_get_the_path_as_given_and_all_arguments(tmp_path, writers, monkeypatch):
    """Both hooks get the very path and every keyword argument; unknown ones never raise."""
    monkeypatch.chdir(tmp_path)
    hook, marker = Log(), object()
    writers(hook=hook).write("./run/../c", STATE, step=5, metadata={"a": 1}, anything=marker, use_cache=True)
    arguments = {"step": 5, "metadata": {"a": 1}, "anything": marker, "use_cache": True}
    assert hook.calls == [("pre_commit", "./run/../c", arguments), ("post_commit", "./run/../c", arguments)]
    assert_same(STATE, load(tmp_path / "c"))


def test_a_hook_need_not_call_its_base_class(tmp_path, writers):
    """A hook whose __init__ does not call super().__init__, or that has none, works."""

    class Bare:
        def pre_commit(self, path, **kwargs):
            self.path = path

        def post_commit(self, path, **kwargs):
            self.path += "!"

    hook = Bare()
    writers(hook=hook).write(str(tmp_path / "c"), STATE)
    assert hook.path == str(tmp_path / "c") + "!"


@pytest.mark.timeout(60)
def test_a_hook_may_save_with_the_same_writer(tmp_path, writers):
    """A write within a write, from either hook, is a save of its own; the outer one goes on as it was."""

    class Nested(Log):
        def pre_commit(self, path, **kwargs):
            if path.endswith("outer"):
                writer.write(str(tmp_path / "pre"), {"w": torch.ones(3)})

        def post_commit(self, path, **kwargs):
            if path.endswith("outer"):
                writer.write(str(tmp_path / "post"), {"w": torch.ones(4)})

    writer = writers(hook=Nested())
    writer.write(str(tmp_path / "outer"), STATE)
    assert_same(STATE, load(tmp_path / "outer"))
    assert load(tmp_path / "pre")["w"].tolist() == [1] * 3
    assert load(tmp_path / "post")["w"].tolist() == [1] * 4


def test_a_hook_lacking_a_method_cannot_be_made():
    """WriterHook is abstract in both of its methods."""

    class Half(WriterHook):
        def pre_commit(self, path, **kwargs): ...

    with pytest.raises(TypeError, match="post_commit"):
        Half()


def test_pre_commit_that_raises_stops_the_commit(tmp_path, writers):
    """When pre_commit raises, its error comes out, nothing appears, and the old checkpoint still loads."""
    path = save(tmp_path / "c", {"old": 1})
    hook = Log(pre_commit=lambda: 1 / 0)
    writer = writers(hook=hook)
    with pytest.raises(ZeroDivisionError):
        writer.write(path, STATE)
    with pytest.raises(ZeroDivisionError):
        writer.write(str(tmp_path / "new"), STATE)
    assert [call[0] for call in hook.calls] == ["pre_commit"] * 2
    assert load(path) == {"old": 1}
    hook.on.clear()
    writer.write(path, STATE)
    assert_same(STATE, load(path))
    assert os.listdir(tmp_path) == ["c"]


def test_post_commit_that_raises_says_that_the_checkpoint_is_committed(tmp_path, writers):
    """When post_commit raises, the error says that the checkpoint is committed, and it loads."""
    path = str(tmp_path / "c")
    with pytest.raises(PostCommitError, match="is committed") as caught:
        writers(hook=Log(post_commit=lambda: 1 / 0)).write(path, STATE)
    assert isinstance(caught.value, CommitError)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert "ZeroDivisionError" in str(caught.value)
    assert (caught.value.path, caught.value.rank, caught.value.phase) == (path, 0, "post_commit")
    assert_same(STATE, load(path))


def test_a_barrier_that_raises_stops_the_commit(tmp_path, writers):
    """When the barrier raises, that is the cause of a CommitError with all facts, and nothing appears."""
    raised = OSError("no")

    class Broken:
        def execute_barrier(self):
            raise raised

    hook, path = Log(), str(tmp_path / "c")
    with pytest.raises(CommitError, match="the barrier failed: OSError: no") as caught:
        writers(Broken(), hook).write(path, STATE)
    assert caught.value.__cause__ is raised
    assert (caught.value.path, caught.value.rank, caught.value.phase) == (path, 0, "barrier")
    assert caught.value.hint
    assert [call[0] for call in hook.calls] == ["pre_commit"]
    assert not os.path.exists(tmp_path / "c")


def test_partial_directory_is_known_in_pre_commit_only(tmp_path, writers):
    """partial_directory() is the folder of the files during pre_commit, and a RuntimeError elsewhere."""
    found = []

    def look():
        try:
            found.append(sorted(os.listdir(partial_directory())))
        except RuntimeError:
            found.append(None)

    look()
    writers(hook=Log(pre_commit=look, post_commit=look)).write(str(tmp_path / "c"), STATE)
    look()
    assert found[0] is found[2] is found[3] is None
    assert "checkpoint_0.pt" in found[1]
    assert checkpoint_writer.partial_directory is partial_directory


def test_what_a_hook_adds_becomes_part_of_the_checkpoint(tmp_path, writers):
    """Files that pre_commit adds are attachments: listed with size and hash, published, replaced with it."""

    def add():
        folder = Path(partial_directory())
        (folder / "notes.txt").write_bytes(b"hello")
        (folder / "sub").mkdir()
        (folder / "sub" / "deep.bin").write_bytes(b"\0" * 1000)

    path = str(tmp_path / "c")
    writer = writers(hook=Log(pre_commit=add))
    writer.write(path, STATE)
    found = {file.name: file for file in manifest_of(path).attachments}
    assert set(found) == {"notes.txt", "sub/deep.bin"}
    assert found["notes.txt"].size == 5
    assert found["notes.txt"].sha256 == hashlib.sha256(b"hello").hexdigest()
    assert Path(path, "sub/deep.bin").read_bytes() == b"\0" * 1000
    assert index_of(path).attachments == manifest_of(path).attachments
    assert_same(STATE, load(path))
    save(path, STATE)
    assert sorted(os.listdir(path)) == ["checkpoint_0.pt", "index_0.json", "manifest.json"]


def test_step_and_metadata_are_recorded(tmp_path):
    """`step` and `metadata` are in the manifest and the index, whatever plain values the metadata hold."""
    metadata = {"run": "x", "loss": float("nan"), "nested": [1, (2, None)], 3: 2**80, "b": b"\0"}
    path = save(tmp_path / "c", STATE, step=np.int64(12), metadata=metadata)
    for part in (manifest_of(path), index_of(path)):
        assert part.step == 12
        assert_same(metadata, TreeDecoder().decode(part.metadata))
    assert manifest_of(save(tmp_path / "d", STATE)).step is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"step": "5"}, "step must be an integer"),
        ({"step": 1.5}, "step must be an integer"),
        ({"step": 2**70}, "64 bits"),
        ({"metadata": {"t": torch.ones(1)}}, "cannot hold a Tensor: metadata at t"),
        ({"metadata": [object()]}, r"metadata at \[0\]"),
    ],
)
def test_labels_that_cannot_be_recorded_are_refused(tmp_path, arguments, words):
    """A step that is no integer and metadata that are no plain values are refused; nothing is written."""
    with pytest.raises(StateError, match=words):
        save(tmp_path / "c", STATE, **arguments)
    assert os.listdir(tmp_path) == []


def test_the_result_opens_with_plain_torch_load(tmp_path):
    """The result of a write is <path>/checkpoint_<rank>.pt in a folder that is made if absent."""
    path = save(tmp_path / "a" / "b" / "c", STATE)
    assert_same(STATE, torch.load(data_file(path)))


def test_a_relative_path_means_the_folder_of_the_call(tmp_path, writers, monkeypatch):
    """A relative path is resolved when write is called, whatever a hook does to the working directory."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    hook = Log(pre_commit=lambda: os.chdir(tmp_path / "elsewhere"))
    writers(hook=hook).write("c", STATE)
    assert_same(STATE, load(tmp_path / "c"))
    assert os.listdir(tmp_path / "elsewhere") == []


def test_a_closed_writer_refuses_and_close_is_idempotent(tmp_path, writers):
    """After close, write is a ClosedError that touches nothing; closing twice is fine."""
    writer = writers()
    writer.write(str(tmp_path / "c"), STATE)
    writer.close()
    writer.close()
    with pytest.raises(ClosedError):
        writer.write(str(tmp_path / "d"), STATE)
    assert os.listdir(tmp_path) == ["c"]


@pytest.mark.parametrize("path", ["", "\0", 5, None])
def test_paths_that_are_none_are_refused(writers, path):
    """An empty path, one with a NUL, or something else than a path is refused with words."""
    with pytest.raises((MilepostError, TypeError), match=r"path|Path|NoneType"):
        writers().write(path, STATE)


def test_errors_know_path_rank_and_key(tmp_path, writers):
    """Errors of a save carry path, rank, key and phase; the text of a job of one rank has no rank."""
    with pytest.raises(StateError) as caught:
        writers().write(tmp_path / "c", {"a": {"b": object()}})
    error = caught.value
    assert (str(error.path), error.rank, error.key) == (str(tmp_path / "c"), 0, "a.b")
    assert all(part in str(error) for part in (str(tmp_path / "c"), "key a.b"))
    assert "rank 0" not in str(error)
    (tmp_path / "file").write_text("x")
    with pytest.raises(TargetError) as caught:
        writers().write(str(tmp_path / "file"), STATE)
    assert caught.value.phase == "check"
    assert (tmp_path / "file").read_text() == "x"


def test_any_storage_can_be_given(tmp_path, writers):
    """A writer and a reader over another storage never touch the local file system."""
    storage = MemoryStorage()
    storage.make_folder("/run")
    hook = Log()
    writers(hook=hook, storage=storage).write("/run/c", STATE, step=1)
    assert storage.open_folder("/run/c").names() == ["checkpoint_0.pt", "index_0.json", "manifest.json"]
    assert_same(STATE, CheckpointReader(ONE, storage=storage).read("/run/c")[0])
    assert not os.path.exists("/run/c")


def test_users_may_override_write(tmp_path, writers):
    """A subclass that overrides write is used as it is, by a checkpointer too."""
    from milepost.checkpointer import SyncCheckpointer

    class Doubling(CheckpointWriter):
        def write(self, path, state_dict, **kwargs):
            return super().write(path, {k: v * 2 for k, v in state_dict.items()}, **kwargs)

    writer = writers(kind=Doubling)
    checkpointer = SyncCheckpointer(writer, CheckpointReader(ONE))
    checkpointer.save(str(tmp_path / "c"), STATE, step=3)
    assert_same({"w": STATE["w"] * 2, "n": 2}, checkpointer.load(str(tmp_path / "c")))
    assert manifest_of(tmp_path / "c").step == 3


def test_threads_may_write_at_once(tmp_path, writers):
    """Writes of one writer from several threads follow one another; each checkpoint is whole."""
    writer = writers()
    states = [{"t": torch.full((100_000,), float(n)), "n": n} for n in range(6)]
    errors = []

    def work(number):
        try:
            for name in (str(number), "shared"):
                writer.write(str(tmp_path / name), states[number])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for number in range(6):
        assert_same(states[number], load(tmp_path / str(number)))
    assert load(tmp_path / "shared")["n"] in range(6)
    assert all(not name.startswith(".") for name in os.listdir(tmp_path))


def test_the_state_is_left_as_it_is(tmp_path):
    """A save changes nothing in the state: no value, no version counter, no gradient."""
    state = {"p": torch.nn.Parameter(torch.ones(3)), "t": torch.ones(3), "l": [1]}
    versions = [state[name]._version for name in "pt"]
    save(tmp_path / "c", state)
    assert [state[name]._version for name in "pt"] == versions
    assert_same({"p": torch.nn.Parameter(torch.ones(3)), "t": torch.ones(3), "l": [1]}, state)
    assert state["p"].grad is None


def test_who_wrote_it_is_recorded(tmp_path):
    """The manifest tells versions, host and process of the writer."""
    writer = manifest_of(save(tmp_path / "c", STATE)).writer
    assert writer["pid"] == str(os.getpid())
    assert writer["torch"] == torch.__version__
    assert {"milepost", "python", "host"} <= set(writer)


def test_a_rank_that_does_not_commit_lists_its_folder_once_and_reads_no_marks():
    """What the commit costs one rank out of several does not depend on what the others have put there."""
    memory, config = MemoryStorage(), CheckpointWriterConfig(start_id="lists")
    memory.make_folder("/run")
    asked = []
    for rank in range(4):
        storage = FaultyStorage(memory)
        CheckpointWriter(config, RankInfo(rank, 5), storage=storage).write("/run/c", {"w": torch.ones(3)})
        asked.append([line for line in storage.operations if "/.c." in line])
    for operations in asked[1:]:
        assert len([line for line in operations if line.startswith("names ")]) == 1
        assert not [line for line in operations if line.startswith("read ") and "index_" in line]
        assert len(operations) == len(asked[1])
