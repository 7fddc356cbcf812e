"""A user of torch.distributed.checkpoint._experimental switches by changing the import prefix."""

from __future__ import annotations

import dataclasses
import importlib
import inspect

import pytest
import torch

THEIRS = "torch.distributed.checkpoint._experimental"
pytest.importorskip(THEIRS, reason=f"torch {torch.__version__} has no {THEIRS}, whose names these are")
MODULES = [
    "barriers", "builder", "checkpoint_process", "checkpoint_reader", "checkpoint_writer", "checkpointer",
    "config", "staging", "types", "utils",
]  # fmt: skip
LATER = {
    "checkpoint_process": ...,
    "staging": ...,
    "checkpointer": {"AsyncCheckpointer"},
    "builder": {"make_async_checkpointer", "default_subprocess_init_fn", "default_writer_init_fn"},
}
"""What comes with asynchronous checkpoints; checked as soon as it is there."""

BETTER_DEFAULTS = {
    ("config", "CheckpointerConfig"): "parts have the same names; their defaults work without an accelerator",
    ("staging", "DefaultStager"): "a config is optional",
    ("staging", "CheckpointStagerConfig"): "None: what this machine can do",
    ("builder", "make_sync_checkpointer"): "a config of its own for each checkpointer, not one for all",
    ("builder", "make_async_checkpointer"): "as above",
}


def pairs():
    """(module, name, their object, ours) for each public function and class that they define."""
    found = []
    for module in MODULES:
        theirs = importlib.import_module(f"{THEIRS}.{module}")
        try:
            ours = importlib.import_module(f"milepost.{module}")
        except ModuleNotFoundError:
            assert LATER.get(module) is ...
            continue
        for name, thing in vars(theirs).items():
            public = not name.startswith("_") and getattr(thing, "__module__", None) == theirs.__name__
            if public and (inspect.isclass(thing) or inspect.isfunction(thing)):
                if not hasattr(ours, name) and name in LATER.get(module, ()):
                    continue
                found.append(pytest.param(module, name, thing, ours, id=f"{module}.{name}"))
    return found


def parameters(function):
    return [
        (p.name, p.kind, p.default)
        for p in inspect.signature(function).parameters.values()
        if p.kind not in {p.VAR_KEYWORD, p.VAR_POSITIONAL}
    ]


def assert_fits(where, theirs, ours, *, same_defaults=True):
    """Every call that fits their function fits ours: names, order, kinds and defaults."""
    wanted, offered = parameters(theirs), parameters(ours)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(theirs).parameters.values())
    also = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(ours).parameters.values())
    assert also or not takes_any, where
    for (name, kind, default), (our_name, our_kind, our_default) in zip(wanted, offered, strict=False):
        assert (our_name, our_kind) == (name, kind), where
        assert (our_default is inspect.Parameter.empty) <= (default is inspect.Parameter.empty), where
        if same_defaults and not callable(default) and default is not inspect.Parameter.empty:
            assert repr(our_default) == repr(default), (where, name)
    assert len(offered) >= len(wanted), where
    for name, kind, default in offered[len(wanted) :]:
        assert default is not inspect.Parameter.empty, (where, name)
        assert kind is inspect.Parameter.KEYWORD_ONLY or (
            dataclasses.is_dataclass(theirs) or name == "commit_hook"
        ), (where, name)


@pytest.mark.parametrize(("module", "name", "theirs", "ours"), pairs())
def test_every_public_name_takes_the_same_calls(module, name, theirs, ours):
    """Each class, constructor, method and function that they offer is offered with the same signature."""
    assert hasattr(ours, name), f"milepost.{module} lacks {name}"
    mine = getattr(ours, name)
    assert inspect.isclass(mine) == inspect.isclass(theirs)
    if not inspect.isclass(theirs):
        assert_fits(name, theirs, mine, same_defaults=(module, name) not in BETTER_DEFAULTS)
        return
    if inspect.isabstract(theirs):
        assert mine.__abstractmethods__ >= theirs.__abstractmethods__ - {"__init__"}
    elif issubclass(theirs, __import__("enum").Enum):
        assert {item.name: item.value for item in mine} == {item.name: item.value for item in theirs}
    else:
        assert_fits(name, theirs, mine, same_defaults=(module, name) not in BETTER_DEFAULTS)
    for method, function in vars(theirs).items():
        if inspect.isfunction(function) and not method.startswith("_"):
            assert_fits(f"{name}.{method}", function, getattr(mine, method))


def test_the_root_offers_their_names():
    """Each name of the root of theirs is at our root, the same object as in our module of the same name."""
    import milepost

    theirs = importlib.import_module(THEIRS)
    assert set(theirs.__all__) <= set(milepost.__all__)
    for name in theirs.__all__:
        homes = {module for module in MODULES if hasattr(importlib.import_module(f"{THEIRS}.{module}"), name)}
        ours = [vars(importlib.import_module(f"milepost.{module}")).get(name) for module in homes]
        assert any(getattr(milepost, name) is thing for thing in ours), name


def test_the_registry_knows_the_same_types():
    """The barrier types of theirs are known to ours."""
    from milepost.barriers import BARRIER_REGISTRY

    theirs = importlib.import_module(f"{THEIRS}.barriers").BARRIER_REGISTRY
    assert theirs.keys() <= BARRIER_REGISTRY.keys()


@pytest.fixture(params=[THEIRS, "milepost"])
def package(request):
    """Either package, so that each usage below is proven to be common to both."""

    def module(name):
        return importlib.import_module(f"{request.param}.{name}")

    module.ours = request.param == "milepost"
    return module


pytestmark = pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")


@pytest.fixture
def parts(package):
    """A sync checkpointer put together by hand."""
    rank_info = package("types").RankInfo(global_rank=0, global_world_size=1)
    calls = []

    class Hook(package("checkpoint_writer").WriterHook):
        def __init__(self):
            pass

        def pre_commit(self, path, **kwargs):
            calls.append(("pre", path, kwargs))

        def post_commit(self, path, **kwargs):
            calls.append(("post", path, kwargs))

    class Meeting(package("barriers").Barrier):
        def __init__(self, **kwargs):
            super().__init__()

        def execute_barrier(self):
            calls.append(("barrier",))

    writer = package("checkpoint_writer").CheckpointWriter(
        config=package("checkpoint_writer").CheckpointWriterConfig(),
        rank_info=rank_info,
        barrier=Meeting(),
        commit_hook=Hook(),
    )
    reader = package("checkpoint_reader").CheckpointReader(rank_info)
    checkpointer = package("checkpointer").SyncCheckpointer(writer, reader)
    yield checkpointer, reader, calls
    checkpointer.close()


def test_save_and_load_by_hand_made_parts(parts, tmp_path):
    """Parts put together by hand save, call hooks and barrier with the same arguments, and load."""
    checkpointer, reader, calls = parts
    path = str(tmp_path / "step")
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU())
    state = {"model": model.state_dict(), "epoch": 5, "name": "run"}
    result = checkpointer.save(path, state, flag="x")
    assert result is None or result[1].result() is None
    assert [call[0] for call in calls] == ["pre", "barrier", "post"]
    assert all(call[1:] == (path, {"flag": "x"}) for call in calls if call[0] != "barrier")
    loaded = checkpointer.load(path)
    assert loaded["epoch"] == 5
    assert all(torch.equal(loaded["model"][k], v) for k, v in state["model"].items())
    assert torch.equal(torch.load(tmp_path / "step" / "checkpoint_0.pt")["model"]["0.bias"], model[0].bias)
    whole, missing = reader.read(path)
    assert missing == []
    assert whole.keys() == state.keys()


def test_a_partial_load_fills_what_is_asked_for(parts, tmp_path):
    """A template of some keys gets them alone, its tensors in place; unknown keys are reported missing."""
    checkpointer, reader, _ = parts
    path = str(tmp_path / "c")
    checkpointer.save(path, {"a": torch.ones(2), "deep": {"x": torch.arange(3), "y": 4}, "list": [1, 2]})
    target = torch.zeros(2)
    template = {"a": target, "deep": {"x": torch.zeros(3, dtype=torch.int64)}, "absent": torch.zeros(1)}
    loaded, missing = reader.read(path, template, map_location="cpu")
    assert missing == ["absent"]
    assert loaded["a"] is target
    assert target.tolist() == [1, 1]
    assert loaded["deep"]["x"].tolist() == [0, 1, 2]
    assert "list" not in loaded
    with pytest.raises(RuntimeError, match="missing keys"):
        checkpointer.load(path, {"absent": torch.zeros(1)}, strict=True)
    _, missing = reader.read(path, {"deep": {"x": torch.zeros(3, dtype=torch.int64), "z": 1}})
    assert missing == ["deep.z"]


def test_what_does_not_fit_is_a_runtime_error(parts, tmp_path):
    """A template tensor of another shape is a RuntimeError; a path without checkpoint a FileNotFoundError."""
    checkpointer, _, _ = parts
    path = str(tmp_path / "c")
    checkpointer.save(path, {"a": torch.ones(2, 3)})
    with pytest.raises(RuntimeError):
        checkpointer.load(path, {"a": torch.ones(7, 5)})
    with pytest.raises(FileNotFoundError):
        checkpointer.load(str(tmp_path / "none"))


def test_the_builder_makes_working_checkpointers(package, tmp_path):
    """The builder's defaults, a rank, a hook and a barrier config are taken by the same names."""
    builder, config = package("builder"), package("config")
    checkpointer = builder.make_sync_checkpointer(
        config=config.CheckpointerConfig(barrier_config=package("barriers").BarrierConfig(barrier_type=None)),
        rank_info=package("types").RankInfo(0, 1),
        commit_hook=None,
    )
    checkpointer.save(str(tmp_path / "c"), {"a": torch.ones(1)})
    loaded = checkpointer.load(str(tmp_path / "c"), default_map_location="cpu")
    assert loaded["a"].tolist() == [1]
    checkpointer.close()


def test_wrong_barrier_types_read_alike(package):
    """The text of the error for an unknown barrier begins alike."""
    barriers = package("barriers")
    with pytest.raises(ValueError, match="Unknown barrier type: nope"):
        barriers.create_barrier_from_config(barriers.BarrierConfig(barrier_type="nope"))
    with pytest.raises(AssertionError):
        barriers.create_barrier_from_config(barriers.BarrierConfig(barrier_type="dist_barrier"))


def test_their_files_are_read(tmp_path):
    """A checkpoint that their writer made loads with our reader, whole and into a template."""
    from milepost import make_sync_checkpointer

    theirs = importlib.import_module(f"{THEIRS}.builder").make_sync_checkpointer(
        rank_info=importlib.import_module(f"{THEIRS}.types").RankInfo(0, 1)
    )
    state = {"w": torch.arange(6.0).view(2, 3), "deep": {"n": 1}}
    theirs.save(str(tmp_path / "c"), state)
    theirs.close()
    with make_sync_checkpointer() as checkpointer:
        assert torch.equal(checkpointer.load(str(tmp_path / "c"))["w"], state["w"])
        template = {"w": torch.zeros(2, 3), "deep": {"n": 0}}
        assert checkpointer.load(str(tmp_path / "c"), template)["deep"] == {"n": 1}
        checkpointer.save(str(tmp_path / "c"), state)
        assert (tmp_path / "c" / "manifest.json").exists()
