"""The checkpointer, the builder, the config and the small helpers."""

from __future__ import annotations

import dataclasses
import pickle
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from background import Diary
from states import assert_same, load, manifest_of

import milepost
from milepost import errors
from milepost.builder import make_async_checkpointer, make_sync_checkpointer
from milepost.checkpoint_reader import CheckpointReader
from milepost.checkpoint_writer import CheckpointWriter, CheckpointWriterConfig, WriterHook
from milepost.checkpointer import AsyncCheckpointer, Checkpointer, SyncCheckpointer
from milepost.config import (
    BarrierConfig,
    CheckpointerConfig,
    CheckpointProcessConfig,
    CheckpointStagerConfig,
)
from milepost.errors import ClosedError, ConfigError, MilepostError
from milepost.staging import DefaultStager
from milepost.types import STATE_DICT, RankInfo
from milepost.utils import gc_paused, wrap_future

STATE = {"w": torch.arange(5.0), "n": 1}


# -- the checkpointer ------------------------------------------------------------------------------


def test_save_load_close(tmp_path):
    """A checkpointer saves, loads whole and into a template, replaces, and is a context manager."""
    path = str(tmp_path / "c")
    with make_sync_checkpointer() as checkpointer:
        assert isinstance(checkpointer, Checkpointer)
        assert checkpointer.save(path, STATE, step=1) is None
        assert_same(STATE, checkpointer.load(path))
        template = {"w": torch.zeros(5), "n": 0}
        assert checkpointer.load(path, template) is template
        assert_same(STATE, template)
        checkpointer.save(path, {"new": 2}, step=2)
        assert checkpointer.load(path) == {"new": 2}
        assert manifest_of(path).step == 2


def test_a_closed_checkpointer_refuses(tmp_path):
    """After close, save and load are ClosedErrors; close is idempotent."""
    checkpointer = make_sync_checkpointer()
    checkpointer.close()
    checkpointer.close()
    for call in (lambda: checkpointer.save(str(tmp_path / "c"), STATE), lambda: checkpointer.load("c")):
        with pytest.raises(ClosedError) as caught:
            call()
        assert isinstance(caught.value, RuntimeError)


def test_load_passes_its_arguments_to_the_reader(tmp_path):
    """default_map_location and further keyword arguments of load reach the reader."""
    path = str(tmp_path / "c")
    with make_sync_checkpointer() as checkpointer:
        checkpointer.save(path, STATE)
        assert checkpointer.load(path, default_map_location="meta")["w"].device.type == "meta"
        with pytest.raises(ConfigError, match="verify"):
            checkpointer.load(path, verify="wrong")


class OtherReader:
    """A reader that has nothing but `read`."""

    def __init__(self, missing):
        self.missing = missing

    def read(self, path, state_dict=None, *, map_location=None, **kwargs):
        self.seen = (path, state_dict, map_location, kwargs)
        return {"loaded": 1}, self.missing


def test_parts_are_used_by_their_methods_alone():
    """Any objects with write, close and read make a checkpointer; a future that write returns is awaited."""

    class OtherWriter:
        closed = 0

        def write(self, path, state_dict, **kwargs):
            self.seen = (path, state_dict, kwargs)
            future = Future()
            future.set_exception(OSError("full"))
            return future

        def close(self):
            self.closed += 1

    writer, reader = OtherWriter(), OtherReader([])
    checkpointer = SyncCheckpointer(writer, reader)
    with pytest.raises(OSError, match="full"):
        checkpointer.save("p", STATE, step=1, other=2)
    assert writer.seen == ("p", STATE, {"step": 1, "other": 2})
    assert checkpointer.load("p", None, default_map_location="cpu", strict=True, x=1) == {"loaded": 1}
    assert reader.seen == ("p", None, "cpu", {"x": 1})
    checkpointer.close()
    assert writer.closed == 1


class Ignoring(WriterHook):
    """A hook, which gets all keywords."""

    def pre_commit(self, path, **kwargs):
        self.seen = path, kwargs

    def post_commit(self, path, **kwargs):
        pass


class OwnStager(DefaultStager):
    pass


class OwnWriter(CheckpointWriter):
    pass


@pytest.mark.parametrize("make", [make_sync_checkpointer, make_async_checkpointer])
def test_keywords_that_nobody_uses_are_refused(tmp_path, make):
    """Without a hook, writer, stager or reader of the user's own, save and load refuse unknown keywords."""
    path = tmp_path / "c"
    with make() as checkpointer:
        checkpointer.save(path, STATE, step=3, metadata={"a": 1})
        getattr(checkpointer, "wait_committed", int)()
        with pytest.raises(TypeError, match=r"save has no argument 'stpe'\nhint: did you mean step\?"):
            checkpointer.save(path, STATE, stpe=5)
        with pytest.raises(TypeError, match=r"load has no argument 'strct'\nhint: did you mean strict\?"):
            checkpointer.load(path, strct=True)
        checkpointer.load(path, map_location="cpu", weights_only=True, mmap=True)
    assert manifest_of(path).step == 3


def test_keywords_pass_where_somebody_may_use_them(tmp_path):
    """A hook, writer, stager or reader of the user's own gets all keywords that were given."""
    hook, path = Ignoring(), tmp_path / "c"
    with make_sync_checkpointer(commit_hook=hook) as checkpointer:
        checkpointer.save(path, STATE, stpe=5)
        assert hook.seen == (str(path), {"stpe": 5})
        checkpointer.save(path, STATE, step=5, metadata={"x": 1}, anything=1)
        assert hook.seen[1] == {"step": 5, "metadata": {"x": 1}, "anything": 1}
    reader = OtherReader([])
    with SyncCheckpointer(OwnWriter(CheckpointWriterConfig(), RankInfo(0, 1)), reader) as checkpointer:
        checkpointer.save(path, STATE, anything=1)
        checkpointer.load(path, verfy=False, verify=False, rename={"a": "b"})
        assert reader.seen == (str(path), None, None, {"verfy": False, "verify": False, "rename": {"a": "b"}})
    with (
        make_async_checkpointer(commit_hook=Diary(tmp_path / "diary")) as hooked,
        AsyncCheckpointer(OwnStager(), hooked._process, CheckpointReader(RankInfo(0, 1))) as staged,
    ):
        hooked.save(path, STATE, anything=1)[1].result(60)
        staged.save(path, STATE, anything=1)[1].result(60)


def test_writers_and_readers_refuse_no_keyword(tmp_path, caplog):
    """`CheckpointWriter.write` and `CheckpointReader.read` take any keyword; a read logs those."""
    writer = CheckpointWriter(CheckpointWriterConfig(), RankInfo(0, 1))
    writer.write(str(tmp_path / "c"), STATE, stpe=5)
    writer.close()
    loaded, _ = CheckpointReader(RankInfo(0, 1)).read(tmp_path / "c", verfy=False)
    assert loaded.keys() == STATE.keys()
    assert "verfy" in caplog.text


@pytest.mark.parametrize("path", [Path, str])
def test_a_path_may_be_any_path(tmp_path, monkeypatch, path):
    """Every path may be text or a pathlib.Path, relative or not; a hook gets it as text."""
    monkeypatch.chdir(tmp_path)
    hook = Ignoring()
    with make_sync_checkpointer(commit_hook=hook) as sync, make_async_checkpointer() as background:
        sync.save(path("run/a"), STATE)
        assert hook.seen[0] == "run/a"
        assert background.save(path("run/b"), STATE)[1].path == "run/b"
        assert background.load(path("run/b")).keys() == sync.load(path("run/a")).keys() == STATE.keys()


def test_strict_works_with_any_reader():
    """Missing keys that a reader of another kind reports are a RuntimeError when strict."""
    checkpointer = SyncCheckpointer(None, OtherReader(["a.b", "c"]))
    with pytest.raises(RuntimeError, match=r"missing keys.*a\.b, c"):
        checkpointer.load("p", {"a": 1}, strict=True)
    assert checkpointer.load("p", {"a": 1}) == {"loaded": 1}


def test_a_reader_may_be_subclassed(tmp_path):
    """A subclass of our reader that overrides read with the plain signature works, strict too."""

    class Renaming(CheckpointReader):
        def read(self, path, state_dict=None, *, map_location=None, **kwargs):
            loaded, missing = super().read(path, state_dict, map_location=map_location, **kwargs)
            return {f"x.{key}": value for key, value in loaded.items()}, missing

    writer = CheckpointWriter(CheckpointWriterConfig(), RankInfo(0, 1))
    checkpointer = SyncCheckpointer(writer, Renaming(RankInfo(0, 1)))
    checkpointer.save(str(tmp_path / "c"), {"a": 1})
    assert checkpointer.load(str(tmp_path / "c"), strict=True) == {"x.a": 1}
    with pytest.raises(RuntimeError, match="missing keys"):
        checkpointer.load(str(tmp_path / "c"), {"b": 1}, strict=True)
    checkpointer.close()


def test_checkpointer_is_abstract():
    """Checkpointer names what every checkpointer has: save, load and close."""
    assert Checkpointer.__abstractmethods__ == {"save", "load", "close"}


# -- the builder -----------------------------------------------------------------------------------


def test_the_builder_needs_nothing():
    """make_sync_checkpointer() without arguments is rank 0 of 1, without a barrier."""
    checkpointer = make_sync_checkpointer()
    assert checkpointer._writer._rank_info == RankInfo(0, 1)
    assert checkpointer._writer._ranks._options.barrier is None
    checkpointer.close()


def test_the_builder_takes_the_default_groups_rank(monkeypatch):
    """Without rank_info the rank and size of the default process group are taken."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 3)
    monkeypatch.setattr(dist, "get_world_size", lambda: 8)
    monkeypatch.setattr(dist, "get_backend", lambda: "fake")  # there is no store to meet at
    checkpointer = make_sync_checkpointer(config=CheckpointerConfig())
    assert checkpointer._writer._rank_info == RankInfo(3, 8)
    assert checkpointer._reader._rank_info == RankInfo(3, 8)
    checkpointer.close()


def test_the_builder_wires_barrier_and_hook(tmp_path, monkeypatch):
    """The barrier of the config and the hook are those that a save uses; the config may be changed before."""
    calls = []

    class Noting(milepost.barriers.Barrier):
        barrier_type = "noting"

        def __init__(self, **kwargs):
            calls.append(kwargs)

        def execute_barrier(self):
            calls.append("barrier")

    class Hook(WriterHook):
        def pre_commit(self, path, **kwargs):
            calls.append("pre")

        def post_commit(self, path, **kwargs):
            calls.append("post")

    monkeypatch.setitem(milepost.barriers.BARRIER_REGISTRY, "noting", Noting)
    config = CheckpointerConfig()
    config.barrier_config = BarrierConfig("noting", {"x": 1})
    with make_sync_checkpointer(config, RankInfo(0, 1), Hook()) as checkpointer:
        checkpointer.save(str(tmp_path / "c"), STATE)
    assert calls == [{"x": 1}, "pre", "barrier", "post"]
    assert_same(STATE, load(tmp_path / "c"))


@pytest.mark.parametrize(
    "rank_info",
    [RankInfo(1, 1), RankInfo(-1, 2), RankInfo(0, 0), RankInfo(True, 2), RankInfo("0", 1), (0, 1), "0"],
    ids=str,
)
def test_a_rank_that_cannot_be_is_refused(rank_info):
    """A rank that is not below the world size, or no integer, is a ConfigError that shows it."""
    with pytest.raises(ConfigError, match="global_rank"):
        make_sync_checkpointer(rank_info=rank_info)


@pytest.mark.parametrize("make", [make_sync_checkpointer, make_async_checkpointer])
def test_a_rank_without_its_process_group_is_refused(make, monkeypatch):
    """In a job of several ranks, no process group and no rank_info is a ConfigError with both ways out."""
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="this is rank 2 of 4, but there is no process group") as caught:
        make()
    assert caught.value.rank == 2
    for way_out in ("init_process_group", "RankInfo(2, 4)", "RankInfo(0, 1)"):
        assert way_out in caught.value.hint
    make(rank_info=RankInfo(0, 1)).close()
    monkeypatch.setenv("WORLD_SIZE", "1")
    make().close()


@pytest.mark.parametrize("make", [make_sync_checkpointer, make_async_checkpointer])
def test_a_hook_that_is_none_is_refused(make):
    """What lacks a hook's methods is refused when the checkpointer is made, not when it has saved."""
    with pytest.raises(ConfigError, match="commit_hook must have the methods pre_commit and post_commit"):
        make(commit_hook=print)


def test_an_unknown_barrier_is_refused_when_built():
    """An unknown barrier type is a ValueError when the checkpointer is built."""
    with pytest.raises(ValueError, match="Unknown barrier type: x"):
        make_sync_checkpointer(CheckpointerConfig(barrier_config=BarrierConfig("x")))


# -- the config ------------------------------------------------------------------------------------


def test_configs_are_mutable_with_fresh_defaults():
    """Each part of a config has a default of its own, and may be assigned."""
    one, two = CheckpointerConfig(), CheckpointerConfig()
    one.barrier_config.barrier_args["x"] = 1
    one.staging_config = CheckpointStagerConfig(use_pinned_memory=False)
    one.writer_config.write_barrier_timeout_secs = 5
    assert two.barrier_config.barrier_args == {}
    assert two == CheckpointerConfig()
    assert one != two
    assert CheckpointWriterConfig().write_barrier_timeout_secs == 600
    assert CheckpointProcessConfig() == CheckpointProcessConfig(30, 60)
    assert set(dataclasses.asdict(CheckpointStagerConfig()).values()) == {None}


@pytest.mark.parametrize(
    ("part", "field", "value", "words"),
    [
        ("writer_config", "write_barrier_timeout_secs", 0, "positive number of seconds, not 0"),
        ("writer_config", "write_barrier_timeout_secs", "5", "positive number of seconds, not '5'"),
        ("writer_config", "write_barrier_timeout_secs", True, "positive number"),
        ("writer_config", "write_barrier_timeout_secs", float("nan"), "positive number"),
        ("writer_config", "start_id", "", "text that is not empty"),
        ("writer_config", "start_id", 5, "text that is not empty"),
        ("barrier_config", "barrier_type", 5, "text that is not empty"),
        ("barrier_config", "barrier_args", [1], "dict with text keys"),
        ("barrier_config", "barrier_args", {1: 2}, "dict with text keys"),
        ("staging_config", "use_pinned_memory", 1, "True, False or None"),
        ("staging_config", "use_async_staging", "yes", "True, False or None"),
        ("process_config", "subprocess_init_timeout_secs", -1, "positive number"),
        ("process_config", "subprocess_shutdown_timeout_secs", None, "positive number"),
    ],
)
def test_each_wrong_option_is_named(part, field, value, words):
    """A wrong option is a ValueError that names part, field, value and what would be right."""
    config = CheckpointerConfig()
    setattr(getattr(config, part), field, value)
    with pytest.raises(ValueError, match=words) as caught:
        make_sync_checkpointer(config)
    assert isinstance(caught.value, ConfigError)
    assert f"{part}.{field}" in str(caught.value)


@pytest.mark.parametrize("part", ["writer_config", "barrier_config", "staging_config", "process_config"])
def test_each_wrong_part_is_named(part):
    """A part of a wrong type is a ConfigError that names it."""
    with pytest.raises(ConfigError, match=f"{part} must be a"):
        make_sync_checkpointer(CheckpointerConfig(**{part: {"a": 1}}))


def test_a_config_of_a_wrong_type_is_refused():
    """Something else than a CheckpointerConfig is a ConfigError that says what to pass."""
    with pytest.raises(ConfigError, match="CheckpointerConfig, not dict"):
        make_sync_checkpointer({"barrier_config": None})


# -- helpers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("result", [None, 5, "x", [Future()]], ids=["None", "int", "str", "list"])
def test_what_is_no_future_is_done_at_once(result):
    """wrap_future of anything but a future is done, with None."""
    wrapped = wrap_future(result)
    assert wrapped.done()
    assert wrapped.result() is None


def test_a_future_is_done_when_the_original_is():
    """wrap_future is done when the original is, with None or the same exception."""
    one, two, three = Future(), Future(), Future()
    wrapped = [wrap_future(future) for future in (one, two, three)]
    assert not any(future.done() for future in wrapped)
    one.set_result("value")
    error = OSError("x")
    two.set_exception(error)
    three.cancel()
    three.set_running_or_notify_cancel()
    assert wrapped[0].result(0) is None
    assert wrapped[1].exception(0) is error
    with pytest.raises(CancelledError):
        wrapped[2].result(0)
    assert wrap_future(one).result(0) is None


def test_collection_pauses_and_goes_on():
    """gc_paused turns collection off inside, on again after, and leaves it off where it was off."""
    import gc

    assert gc.isenabled()
    with gc_paused():
        assert not gc.isenabled()
        with gc_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_rank_info_is_a_plain_dataclass():
    """RankInfo has the two documented fields, compares by them, and STATE_DICT is a dict."""
    assert dataclasses.asdict(RankInfo(1, 2)) == {"global_rank": 1, "global_world_size": 2}
    assert dict[str, Any] == STATE_DICT


# -- errors ----------------------------------------------------------------------------------------

LEAVES = [
    getattr(errors, name) for name in errors.__all__ if isinstance(getattr(errors, name), type)
]  # every class of the tree


@pytest.mark.parametrize("kind", LEAVES, ids=lambda kind: kind.__name__)
def test_errors_cross_processes_whole(kind):
    """Each error keeps its class, text and facts when it is pickled."""
    error = kind("it failed", path="/p", rank=3, key="a.b", phase="write", hint="do this")
    if isinstance(error, errors.StorageError):
        error.errno, error.operation = 28, "fsync"
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)
    assert getattr(copy, "errno", None) == getattr(error, "errno", None)


@pytest.mark.parametrize("kind", LEAVES, ids=lambda kind: kind.__name__)
def test_errors_say_what_where_and_what_to_do(kind):
    """The text of each error is its message, the facts that are not in it, and the hint."""
    error = kind("it failed: /p", path="/p", rank=3, key="a", phase="write", hint="do this")
    assert isinstance(error, MilepostError)
    assert str(error) == "it failed: /p (key a, rank 3, phase write)\nhint: do this"
    assert str(kind("it failed")) == "it failed"


def test_the_tree_is_drawn_as_it_is():
    """The drawing at the top of the module names every class, its parent and the built-in it is."""
    drawing = errors.__doc__.splitlines()
    for kind in LEAVES:
        (line,) = [text for text in drawing if text.strip(" │├└─").split(" ")[0] == kind.__name__]
        builtins_ = [base for base in kind.__bases__ if base.__module__ == "builtins"]
        if kind is not MilepostError and builtins_:
            assert f"({builtins_[0].__name__})" in line, kind


def test_a_failed_operation_keeps_number_and_way_out():
    """StorageError.wrap keeps errno, names operation and path, and knows the way out of a full disk."""
    error = errors.StorageError.wrap(OSError(28, "No space left on device"), "write", "/d/f")
    assert (error.errno, error.operation, error.path) == (28, "write", "/d/f")
    assert "write failed: No space left on device: /d/f" in str(error)
    assert "free space" in str(error)
    assert isinstance(errors.StorageError.wrap(FileNotFoundError(2, "x"), "open", "p"), FileNotFoundError)
    assert isinstance(errors.StorageError.wrap(FileExistsError(17, "x"), "open", "p"), FileExistsError)


def test_the_first_fact_wins():
    """error_context fills in facts that are missing, and never changes one that is known."""
    outer, inner = {"path": "/outer", "rank": 1, "phase": "p"}, {"path": "/inner"}
    with (
        pytest.raises(MilepostError) as caught,
        errors.error_context(**outer),
        errors.error_context(**inner),
    ):
        raise MilepostError("x")
    assert (caught.value.path, caught.value.rank, caught.value.phase) == ("/inner", 1, "p")
    with pytest.raises(KeyError), errors.error_context(path="/p"):
        raise KeyError("untouched")
