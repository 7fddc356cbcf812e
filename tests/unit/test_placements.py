"""What each rank holds and saves: what cannot be saved is refused by name, before anything is written."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from contextlib import ExitStack

import pytest
import torch
from support.disks import MemoryStorage
from support.ranks import as_rank
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from milepost.checkpoint_reader import CheckpointReader
from milepost.checkpoint_writer import CheckpointWriter
from milepost.config import CheckpointWriterConfig
from milepost.errors import CheckpointNotFoundError, ConfigError, MismatchError, StateError
from milepost.format.boxes import Piece
from milepost.format.index import decode_index
from milepost.state.placements import Replicated, placed, ranges
from milepost.types import RankInfo

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning")

X = torch.arange(12.0).reshape(4, 3)

_paths = itertools.count()


@pytest.fixture
def be():
    """Makes this process a rank of a world, until the end or the next call."""
    with ExitStack() as stack:

        def enter(rank, size):
            stack.close()
            stack.enter_context(as_rank(rank, size))

        yield enter


@pytest.fixture
def storage():
    memory = MemoryStorage()
    memory.make_folder("/run")
    return memory


def write(storage, state, rank, size, path, replicated=()):
    config = CheckpointWriterConfig(start_id="start", replicated=list(replicated))
    writer = CheckpointWriter(config, RankInfo(rank, size), storage=storage)
    try:
        writer.write(path, state)
    finally:
        writer.close()


def new_path():
    return f"/run/placements{next(_paths)}"


def wrapped(local, *layout, ranks=(0, 1), **arguments):
    mesh = DeviceMesh("cpu", torch.tensor(ranks))
    return DTensor.from_local(local, mesh, layout, run_check=False, **arguments)


# -- DTensors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ["sum", "avg", "max"])
def test_partial_values_are_refused_by_key(be, storage, operation):
    """A DTensor whose values are not summed up yet is refused with its key and the way out."""
    be(0, 2)
    state = {"model": {"w": wrapped(X, Partial(operation))}}
    path = new_path()
    with pytest.raises(StateError, match="not summed up yet") as caught:
        write(storage, state, 0, 2, path)
    assert caught.value.key == "model.w"
    assert "redistribute" in caught.value.hint
    with pytest.raises(CheckpointNotFoundError):
        CheckpointReader(RankInfo(0, 2), storage=storage).read(path, together=False)


def test_a_mesh_whose_ranks_do_not_ascend_is_refused_by_key(be, storage):
    """Collectives go by the rank in the group, placements by the place in the mesh: rows would be swapped."""
    be(0, 2)
    value = wrapped(X[:2], Shard(0), ranks=(1, 0))
    with pytest.raises(StateError, match="do not ascend") as caught:
        write(storage, {"w": value}, 0, 2, new_path())
    assert caught.value.key == "w"
    path = new_path()
    write(storage, {"w": X}, 0, 1, path)
    reader = CheckpointReader(RankInfo(0, 2), storage=storage)
    with pytest.raises(MismatchError, match="do not ascend"):
        reader.read(path, {"w": value}, together=False)
    write(storage, {"w": wrapped(X, Replicate(), ranks=(1, 0))}, 0, 2, new_path())  # nothing to swap


def test_a_template_with_partial_values_does_not_fit(be, storage):
    """A DTensor with partial values cannot be loaded into; its key is named, nothing is changed."""
    path = new_path()
    write(storage, {"w": X}, 0, 1, path)
    be(0, 2)
    local = torch.zeros(4, 3)
    reader = CheckpointReader(RankInfo(0, 2), storage=storage)
    with pytest.raises(MismatchError, match=r"w: .*not summed up"):
        reader.read(path, {"w": wrapped(local, Partial())}, together=False)
    assert not local.any()


def test_a_part_of_another_shape_is_refused_by_key(be, storage):
    """A DTensor whose local tensor is not what its placements say is refused with both shapes and its key."""
    be(0, 2)
    value = wrapped(X, Shard(0), shape=(5, 3), stride=(3, 1))
    with pytest.raises(StateError, match=r"shape \(4, 3\), but .* means \(3, 3\)") as caught:
        write(storage, {"a": [value]}, 0, 2, new_path())
    assert caught.value.key == "a[0]"


def test_a_rank_info_that_contradicts_the_mesh_is_refused(be, storage):
    """A replica that says it is a rank that the mesh does not have there is refused with the key."""
    be(3, 4)
    value = DTensor.from_local(
        X[:2], DeviceMesh("cpu", [[0, 1], [2, 3]]), [Replicate(), Shard(1)], run_check=False
    )
    with pytest.raises(StateError, match="held by ranks 1,3, but this is rank 0") as caught:
        write(storage, {"w": value}, 0, 4, new_path())
    assert caught.value.key == "w"


def test_a_rank_outside_of_the_mesh_holds_nothing(be):
    """A rank that is not in the mesh has no pieces, and the placement still names the mesh's ranks."""
    be(2, 3)
    value = wrapped(torch.empty(0, 3), Shard(0), shape=(4, 3), stride=(3, 1))
    found = placed(value)
    assert found.pieces == ()
    assert found.copies == ()
    assert found.ranks == (0, 1)


def test_placements_say_who_holds_what(be):
    """Pieces, copies and ranks of a hybrid shard are those of its row and column of the mesh."""
    be(2, 4)
    mesh = DeviceMesh("cpu", [[0, 1], [2, 3]])
    value = DTensor.from_local(X[:2], mesh, [Replicate(), Shard(0)], run_check=False)
    found = placed(value)
    assert found.pieces == (Piece((0, 0), (0, 0), (2, 3)),)
    assert found.copies == (0, 2)
    assert found.ranks == (0, 1, 2, 3)
    assert found.text == "[Replicate(), Shard(0)] on 2x2 ranks 0-3"


@pytest.mark.parametrize(
    ("ranks", "text"),
    [([], ""), ([3], "3"), ([0, 1, 2], "0-2"), ([0, 2, 3, 7], "0,2-3,7"), ([1, 2, 4, 5], "1-2,4-5")],
)
def test_ranks_are_written_as_ranges(ranks, text):
    """Consecutive ranks are written as their first and last."""
    assert ranges(tuple(ranks)) == text


# -- declarations ----------------------------------------------------------------------------------


def test_a_pattern_that_fits_nothing_warns_once(storage, caplog):
    """A pattern that matches no tensor is named in the log at the first save, and not again."""
    config = CheckpointWriterConfig(start_id="start", replicated=["model.*", "modal.*", "o?tim"])
    writer = CheckpointWriter(config, RankInfo(0, 2), storage=storage)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            writer.write(new_path(), {"model": {"w": X}})
    writer.close()
    warned = [record.getMessage() for record in caplog.records if "matches no tensor" in record.getMessage()]
    assert len(warned) == 2
    assert "'modal.*'" in warned[0]
    assert "'o?tim'" in warned[1]


def test_a_world_of_one_has_no_replicas(storage, caplog):
    """With one rank declarations mean nothing: no warning, no shard map, and the state comes back."""
    path = new_path()
    with caplog.at_level(logging.WARNING):
        write(storage, {"m": X}, 0, 1, path, ["nothing.*", "m"])
    assert "matches no tensor" not in caplog.text
    assert "shards.json" not in storage.open_folder(path).names()
    assert torch.equal(CheckpointReader(RankInfo(0, 1), storage=storage).read(path)[0]["m"], X)


@pytest.mark.parametrize("declared", [torch.nn.Linear(1, 1), 3, None, torch.zeros(1)])
def test_only_patterns_and_ddp_modules_can_be_declared(declared):
    """Anything but a pattern or a DistributedDataParallel module is a ConfigError that names its type."""
    with pytest.raises(ConfigError, match=type(declared).__name__):
        Replicated([declared], 2)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)
        self.norm = torch.nn.BatchNorm1d(2)


def test_a_ddp_module_declares_its_parameters(be, storage):
    """Parameters of a DDP module are replicas; its buffers, which a forward pass changes, are not."""
    be(0, 1)
    torch.manual_seed(1)
    module = torch.nn.parallel.DistributedDataParallel(Net())
    path = new_path()

    def state(rank):
        model = module.state_dict()
        model["module.norm.running_mean"] = model["module.norm.running_mean"] + rank
        return {"model": model}

    for rank in range(2):
        write(storage, state(rank), rank, 2, path, [module])
    for rank in range(2):
        loaded, _ = CheckpointReader(RankInfo(rank, 2), storage=storage).read(path, together=False)
        for key, value in state(rank)["model"].items():
            assert torch.equal(loaded["model"][key], value)
    folder = storage.open_folder(path)
    index = decode_index(folder.read("index_0.json", 1 << 20), path)
    declared = {".".join(key[1:]) for key in index.shards.key}
    assert declared == {f"module.{name}" for name, _ in module.module.named_parameters()}


def test_rows_that_could_be_others_are_refused(be, storage):
    """Where torch and FSDP2 mean other rows by the same placements and shape, neither is guessed."""
    be(10, 12)
    held_by = DeviceMesh("cpu", torch.arange(12).view(3, 4), mesh_dim_names=("dp", "tp"))
    layout = [_StridedShard(0, split_factor=4), Shard(0)]
    state = {
        "w": DTensor.from_local(torch.ones(1), held_by, layout, run_check=False, shape=(27,), stride=(1,))
    }
    with pytest.raises(StateError, match=r"does not say which rows this rank holds .*key w,"):
        write(storage, state, 10, 12, "/run/rows")


def test_a_dtensor_in_an_opaque_object_is_refused(be, storage):
    """In an object that is pickled a DTensor would pass for all of the tensor."""
    be(0, 2)
    shard = DTensor.from_local(X, DeviceMesh("cpu", [0, 1]), [Shard(0)], run_check=False)
    with pytest.raises(StateError, match=r"a DTensor in an object .*key s,"):
        write(storage, {"s": Counter({"a": shard})}, 0, 2, "/run/c")


def test_declared_arrays_numbers_and_empty_tensors_come_back(storage):
    """Declared arrays, numbers, empty, conjugate and expanded tensors come back as they were."""
    import numpy as np

    state = {
        "array": np.arange(4.0),
        "number": torch.tensor(3),
        "empty": torch.empty(0, 3),
        "conj": torch.tensor([1 + 2j]).conj(),
        "wide": torch.ones(1, 1).expand(300, 300),
    }
    path = new_path()
    for rank in range(3):
        write(storage, {"m": state}, rank, 3, path, ["m.*"])
    loaded = CheckpointReader(RankInfo(1, 2), storage=storage).read(path)[0]["m"]
    assert type(loaded["array"]) is np.ndarray
    assert (loaded["array"] == state["array"]).all()
    for key in ("number", "empty", "conj", "wide"):
        assert torch.equal(loaded[key], state[key])
