"""The merge of what all ranks hold: what it refuses, by name, and what malformed columns cannot do."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
from collections import OrderedDict
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.disks import MemoryStorage
from support.forge import Forge, dump, write
from support.ranks import as_rank
from support.states import raw_bytes
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from milepost.checkpoint_reader import CheckpointReader
from milepost.checkpoint_writer import CheckpointWriter
from milepost.commit import Checkpoint, merge
from milepost.config import CheckpointWriterConfig
from milepost.errors import CommitError, CorruptCheckpointError, MismatchError
from milepost.format.shards import decode_shard_map
from milepost.loading import rank_file as sources
from milepost.storage.local import LocalStorage
from milepost.types import RankInfo

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning")

X = torch.arange(12.0).reshape(4, 3)
BIG = torch.arange(60000.0).reshape(300, 200)

_paths = itertools.count()


def save(size, state_of, replicated=(), *, storage=None, path=None):
    """Be each rank in turn and save what it has; returns how to load it."""
    if storage is None:
        storage = MemoryStorage()
        storage.make_folder("/run")
    path = path or f"/run/merge{next(_paths)}"
    config = CheckpointWriterConfig(start_id="start", replicated=list(replicated))
    for rank in range(size):
        with as_rank(rank, size):
            writer = CheckpointWriter(config, RankInfo(rank, size), storage=storage)
            try:
                writer.write(path, state_of(rank))
            finally:
                writer.close()

    def load(rank=0, size=1, template=None, **arguments):
        return CheckpointReader(RankInfo(rank, size), storage=storage).read(path, template, **arguments)[0]

    return load


def mesh(*ranks):
    return DeviceMesh("cpu", list(ranks))


def part_of(full, held_by, *layout):
    """A rank's DTensor of a whole tensor."""
    local, coordinate = full, held_by.get_coordinate()
    for dim, placement in enumerate(layout):
        if not isinstance(placement, Replicate):
            parts = placement._split_tensor(local, held_by.size(dim), with_padding=False)[0]
            local = parts[coordinate[dim]]
    return DTensor.from_local(
        local.clone(), held_by, layout, run_check=False, shape=full.shape, stride=full.stride()
    )


def grid():
    return DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("outer", "inner"))


# -- replicas that differ --------------------------------------------------------------------------


def test_declared_replicas_that_differ_are_named():
    """A declared tensor that differs on one rank stops the commit, which names it and the ranks."""
    with pytest.raises(CommitError, match="tensors differ between ranks") as caught:
        save(4, lambda rank: {"m": {"same": X, "w": X + (rank == 2)}}, ["m.*"])
    assert "m.w (ranks 0, 1, 3 vs. rank 2)" in str(caught.value)
    assert "m.same" not in str(caught.value)


def test_one_bit_makes_replicas_differ():
    """Negative zero on one rank is another value, though it compares equal."""
    with pytest.raises(CommitError, match="tensors differ between ranks"):
        save(2, lambda rank: {"m": torch.tensor([-0.0 if rank else 0.0])}, ["m"])


def test_equal_nans_are_replicas():
    """A NaN of the same bits on all ranks is one value."""
    load = save(2, lambda _: {"m": torch.tensor([float("nan")])}, ["m"])
    assert load()["m"].isnan().all()


def test_a_difference_is_found_in_what_any_replica_saves():
    """In a tensor that is divided between replicas a difference anywhere, on any rank, is found."""
    for rank_of, row in ((0, 299), (1, 0), (0, 0), (1, 299)):
        changed = BIG.clone()
        changed[row, 7] += 1

        def state(rank, changed=changed, rank_of=rank_of):
            return {"m": changed if rank == rank_of else BIG}

        with pytest.raises(CommitError, match=r"m \(rank 0 vs. rank 1\)"):
            save(2, state, ["m"])


def test_the_replicas_of_hybrid_shards_are_compared():
    """Where two rows of a mesh hold the same shards, the ranks whose shard differs are named."""

    def state(rank):
        return {"w": part_of(X + (rank == 3), grid(), Replicate(), Shard(0))}

    with pytest.raises(CommitError, match=r"w \(rank 1 vs. rank 3\)"):
        save(4, state)


def test_many_differences_are_counted():
    """The first five tensors that differ are named, and how many more there are."""
    with pytest.raises(CommitError, match=r"m\.4.* and 4 more"):
        save(2, lambda rank: {"m": {str(n): X + rank for n in range(9)}}, ["m.*"])


# -- ranks that disagree ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("states", "message"),
    [
        ([{"w": X}, {"w": X, "b": X, "a": X}], "first: m.a, which rank 1 has and rank 0 has not"),
        ([{"w": X, "b": X}, {"w": X}], "first: m.b, which rank 0 has and rank 1 has not"),
        ([{"w": X}, {"w": X[:3]}], r"m.w, float32 \[4, 3\] replicated on rank 0, float32 \[3, 3\]"),
        ([{"w": X}, {"w": X.double()}], r"m.w, float32 .* on rank 0, float64 .* on rank 1"),
        ([{"w": X}, {}], "first: m.w, which rank 0 has and rank 1 has not"),
        ([{"w": X, "v": X}, {"w": X, "v": X.clone()}], "the same, but not how they share memory"),
    ],
)
def test_the_first_difference_in_structure_is_named(states, message):
    """Ranks whose declared tensors differ in number, shape or dtype are told the first key that does."""
    with pytest.raises(CommitError, match=message):
        save(2, lambda rank: {"m": states[rank]}, ["m.*"])


def test_a_declaration_on_one_rank_alone_is_a_disagreement():
    """A tensor that is a DTensor on one rank and another's own plain one is named."""

    def state(rank):
        return {"w": part_of(X, mesh(0, 1), Shard(0)) if rank == 0 else X}

    with pytest.raises(CommitError, match="w, which rank 0 has and rank 1 has not"):
        save(2, state)


def test_a_different_placement_is_a_disagreement():
    """A key that is placed otherwise on another rank is named with both placements."""

    def state(rank):
        return {"w": part_of(X, mesh(0, 1), Shard(rank))}

    with pytest.raises(CommitError, match=r"w, .*Shard\(0\).* on rank 0, .*Shard\(1\).* on rank 1"):
        save(2, state)


def test_a_part_that_no_rank_saved_is_missed():
    """If a rank of a mesh does not save its part, the commit says how much of which key is missing."""

    def state(rank):
        return {"w": part_of(X, mesh(0, 1), Shard(0))} if rank == 0 else {"other": rank}

    with pytest.raises(CommitError, match=r"hold 6 elements of w, which has 12: \[Shard\(0\)\]"):
        save(3, state)


def test_a_world_of_one_cannot_save_a_part():
    """A writer that was told of one rank refuses a tensor of which it has a part only."""
    storage = MemoryStorage()
    storage.make_folder("/run")
    writer = CheckpointWriter(CheckpointWriterConfig(), RankInfo(0, 1), storage=storage)
    with as_rank(0, 4), pytest.raises(CommitError, match="hold 3 elements of w, which has 12"):
        writer.write("/run/one", {"w": part_of(X, mesh(0, 1, 2, 3), Shard(0))})
    writer.close()


# -- several meshes --------------------------------------------------------------------------------


@pytest.mark.parametrize("declared", [(), ("w",)])
def test_a_tensor_of_several_meshes_is_kept_once(declared):
    """What each row of a mesh holds for itself comes back, whether it was declared to be the same or not."""
    load = save(4, lambda _: {"w": part_of(X, grid()["inner"], Shard(0))}, declared)
    assert torch.equal(load()["w"], X)
    assert torch.equal(load(3, 4)["w"], X)


def test_bytes_that_are_saved_twice_are_told_of_once(monkeypatch, caplog):
    """Large tensors that each slice of a mesh saves for itself are in the log, once, with the way out."""
    monkeypatch.setattr(merge, "_MANY_BYTES", 100)
    monkeypatch.setattr(merge, "_told", False)
    for declared in (("*",), (), ()):
        save(
            4,
            lambda _: {
                "n": part_of(X[0], grid()["inner"], Shard(0)),
                "w": part_of(BIG, grid()["inner"], Shard(0)),
            },
            declared,
        )
    assert len(caplog.messages) == 1
    assert "several slices of a mesh saved the same 0 MiB, most of them of w" in caplog.text


@pytest.mark.parametrize("declared", [(), ("w",)])
def test_several_meshes_that_differ_are_named(declared):
    """If the rows of a mesh hold one key with other values, the ranks of both are named."""

    def state(rank):
        return {"w": part_of(X + (rank >= 2), grid()["inner"], Shard(0))}

    with pytest.raises(CommitError, match=r"w \(rank 0 vs. rank 2\); w \(rank 1 vs. rank 3\)"):
        save(4, state, declared)


@pytest.mark.parametrize(
    ("meshes", "layouts"),
    [
        ([(0, 1), (0, 1), (2, 3), (2, 3)], [0, 0, 1, 1]),
        ([(0,), (1, 2, 3), (1, 2, 3), (1, 2, 3)], [0, 0, 0, 0]),
    ],
)
def test_one_key_on_unlike_meshes_is_refused(meshes, layouts):
    """Two meshes of other sizes, or with other placements, may not hold one key; both are described."""

    def state(rank):
        return {"w": part_of(X, mesh(*meshes[rank]), Shard(layouts[rank]))}

    with pytest.raises(
        CommitError, match=r"different tensors under one key: w: .* on an earlier rank, .* on rank"
    ):
        save(4, state)


def test_ranks_outside_of_a_mesh_hold_nothing():
    """A rank that is not in a DTensor's mesh may have it in its state: it saves nothing of it."""

    def state(rank):
        if rank < 2:
            return {"w": part_of(X, mesh(0, 1), Shard(0))}
        empty = torch.empty(0, 3)
        held_by = mesh(0, 1)
        return {
            "w": DTensor.from_local(
                empty, held_by, [Shard(0)], run_check=False, shape=X.shape, stride=X.stride()
            )
        }

    load = save(3, state)
    for rank in range(3):
        assert torch.equal(load(rank, 3)["w"], X)


# -- tied tensors ----------------------------------------------------------------------------------


def test_tied_tensors_are_written_once_and_come_back_tied():
    """DTensors and declared tensors that are one object come back as one, and take their bytes once."""

    def state(_):
        shard = part_of(BIG, mesh(0, 1), Shard(0))
        return {"a": shard, "b": shard, "m": {"x": BIG, "y": BIG}}

    storage = MemoryStorage()
    storage.make_folder("/run")
    loaded = save(2, state, ["m.*"], storage=storage, path="/run/tied")()
    assert loaded["a"] is loaded["b"]
    assert loaded["m"]["x"] is loaded["m"]["y"]
    assert torch.equal(loaded["a"], BIG)
    assert torch.equal(loaded["m"]["x"], BIG)
    folder = storage.open_folder("/run/tied")
    try:
        written = sum(folder.stat(f"checkpoint_{rank}.pt").size_bytes for rank in range(2))
    finally:
        folder.close()
    assert written < 2.1 * BIG.nbytes


def test_tied_parameters_come_back_with_their_kinds():
    """Of tied entries those that are parameters come back as one parameter, all on the same memory."""

    def state(_):
        # No operation on a DTensor: torch keeps what it made of the mesh of the rank before.
        weight = part_of(X, mesh(0, 1), Shard(0)).requires_grad_()
        weight._is_param = True
        plain = weight._local_tensor.detach()
        return {
            "a": weight,
            "b": weight,
            "c": DTensor.from_local(plain, mesh(0, 1), [Shard(0)], run_check=False),
        }

    loaded = save(2, state)()
    assert loaded["a"] is loaded["b"]
    assert type(loaded["a"]) is torch.nn.Parameter
    assert type(loaded["c"]) is torch.Tensor
    assert not loaded["c"].requires_grad
    assert loaded["a"].data_ptr() == loaded["c"].data_ptr()


def test_one_tensor_declared_at_one_of_its_paths_comes_back_at_both():
    """A tied DTensor of a slice of a mesh, or a tied plain one, may be declared at one of its paths only."""

    def state(_):
        tied = part_of(BIG, grid()["inner"], Shard(0))
        return {"own": tied, "m": {"w": tied, "x": X}, "x": X}

    load = save(4, state, ["m.*"])
    for rank in (0, 3):
        loaded = load(rank, 4)
        for found in (loaded["own"], loaded["m"]["w"]):
            assert torch.equal(found, BIG)
        assert torch.equal(loaded["m"]["x"], X)
        assert torch.equal(loaded["x"], X)


@pytest.mark.parametrize("tied_on", [0, 1])
def test_replicas_of_several_meshes_of_which_one_ties_them_are_compared(tied_on):
    """Where one mesh has tied what another one has not, the values of all of them are compared."""

    def state(rank, differ=0):
        inner = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("pp", "dp"))["dp"]
        one = part_of(BIG, inner, Shard(0))
        return {"a": one, "b": one if rank // 2 == tied_on else part_of(BIG + differ, inner, Shard(0))}

    loaded = save(4, state)()
    assert torch.equal(loaded["b"], BIG)
    with pytest.raises(CommitError, match=r"b \(rank 0 vs. rank 2\)"):
        save(4, lambda rank: state(rank, 1))


def test_replicas_that_share_memory_in_part_come_back_into_such_a_template():
    """A view, a transposed and a reinterpreted tensor fill a template that ties them likewise."""

    def state(values):
        return {"w": values, "view": values[10:20], "t": values.t(), "bits": values.view(torch.int32)}

    load = save(2, lambda _: state(BIG.clone()), ["*"])
    template = state(torch.zeros_like(BIG))
    load(1, 2, template)
    for key, value in state(BIG).items():
        assert torch.equal(template[key], value)
    other = save(2, lambda _: state(BIG.clone()) | {"t": BIG.t() + 1}, ["*"])
    template = state(torch.zeros_like(BIG))
    with pytest.raises(MismatchError, match=r"t: expected the values of w, with which it shares memory"):
        other(1, 2, template)
    assert not template["w"].any()


NUMBERS = torch.arange(20_000.0).reshape(2, 10_000) * (1 + 2j)

FOLDED = {
    "expanded": lambda values: values[:1, :6].expand(3, 6),
    "number": lambda values: values[0, 1].expand(3, 4),
    "windows": lambda values: values.view(-1)[:12].unfold(0, 3, 2),
    "expanded windows": lambda values: values.view(-1)[:6].unfold(0, 3, 1)[None].expand(2, 4, 3),
    "array": lambda values: values.view(-1)[:12].unfold(0, 3, 1).numpy(),
    "real": lambda values: values.real[:, :1].expand(2, 5),
    "conjugate": lambda values: values.conj()[1:, :6].expand(4, 6),
    "negative": lambda values: values.conj().imag.view(-1)[:12].unfold(0, 3, 1),
    "divided": lambda values: values[1:].expand(9, 10_000),
    "divided windows": lambda values: values.view(-1)[:12_000].unfold(0, 9_000, 300),
}


def plain(value):
    return torch.as_tensor(value).resolve_conj().resolve_neg()


@pytest.mark.parametrize("name", FOLDED)
def test_replicas_whose_elements_share_memory_fill_such_a_template(name):
    """Expanded tensors and windows are filled, but only if what was saved agrees where they share memory."""
    fold = FOLDED[name]
    load = save(2, lambda _: {"x": fold(NUMBERS.clone()), "w": X}, ["*"])
    template = {"x": fold(torch.zeros_like(NUMBERS)), "w": torch.zeros_like(X)}
    load(1, 2, template, strict=True)
    wanted = plain(fold(NUMBERS))
    assert torch.equal(plain(template["x"]), wanted)
    assert torch.equal(template["w"], X)
    other = wanted.clone()
    other[(-1, *[0] * (other.ndim - 1))] += 1
    load = save(2, lambda _: {"x": other.numpy() if name == "array" else other, "w": X}, ["*"])
    template = {"x": fold(torch.zeros_like(NUMBERS)), "w": torch.zeros_like(X)}
    with pytest.raises(MismatchError, match="x: expected elements that share memory"):
        load(1, 2, template)
    assert not plain(template["x"]).any()
    assert not template["w"].any()


def test_parts_of_dtensors_whose_elements_share_memory_are_filled():
    """A DTensor whose local tensor is expanded comes back into such a one, whoever saved its parts."""

    def expanded(row, ranks, layout, times=2):
        return DTensor.from_local(row.expand(times, 6), mesh(*ranks), [layout], run_check=False)

    def state(rank, row):
        layouts = {"x": ([0, 1], Replicate()), "s": ([0, 1], Shard(0)), "own": ([rank], Replicate())}
        return {key: expanded(row, *layout) for key, layout in layouts.items()}

    row = torch.arange(6.0)
    load = save(2, lambda rank: state(rank, row) | {"own": row.expand(2, 6).contiguous()})
    apart = save(2, lambda rank: {"s": expanded(row + rank, [0, 1], Shard(0))})
    with as_rank(1, 2):
        template = state(1, torch.zeros(6))
        load(1, 2, template, strict=True, together=False)
        for value in template.values():
            assert torch.equal(value._local_tensor, row.expand(2, 6))
        template = {"s": expanded(torch.zeros(6), [1], Shard(0), 4)}
        with pytest.raises(MismatchError, match="s: expected elements that share memory"):
            apart(1, 2, template, together=False)
        assert not template["s"]._local_tensor.any()


def test_replicas_that_share_memory_as_conjugates_come_back_into_such_a_template():
    """A tensor and its conjugate on one memory are filled together, unless other values were saved."""

    def state(values):
        return {"x": values, "y": values.conj(), "i": values.conj().imag}

    load = save(2, lambda _: state(NUMBERS.clone()), ["*"])
    template = state(torch.zeros_like(NUMBERS))
    load(1, 2, template, strict=True)
    for key, value in state(NUMBERS).items():
        assert torch.equal(plain(template[key]), plain(value))
    load = save(2, lambda _: state(NUMBERS.clone()) | {"y": NUMBERS}, ["*"])
    template = state(torch.zeros_like(NUMBERS))
    with pytest.raises(MismatchError, match="y: expected the values of x, with which it shares memory"):
        load(1, 2, template)
    assert not template["x"].any()


def test_parts_of_tied_tensors_that_differ_do_not_go_into_one_memory():
    """A template that ties DTensors which want other parts of a tied tensor is refused, and untouched."""
    whole = torch.arange(16.0).reshape(4, 4)
    load = save(2, lambda _: {"a": whole, "b": whole}, ["*"])
    with as_rank(1, 4):
        local = torch.zeros(2, 2)
        template = {
            key: DTensor.from_local(local, grid(), layout, run_check=False)
            for key, layout in (("a", [Shard(0), Shard(1)]), ("b", [Shard(1), Shard(0)]))
        }
        with pytest.raises(MismatchError, match="b: expected the values of a, with which it shares memory"):
            load(1, 4, template, together=False)
        assert not local.any()
        template["b"] = template["a"]
        load(1, 4, template, together=False)
        assert local.tolist() == [[2, 3], [6, 7]]


def test_of_tied_tensors_only_those_that_did_require_gradients():
    """A detached alias of a tensor that requires a gradient, and an array on it, come back as they were."""

    def state(_):
        a = X.clone().requires_grad_()
        return {"m": {"a": a, "b": a.detach(), "n": a.detach().numpy()}}

    loaded = save(2, state, ["m.*"])()["m"]
    assert [loaded["a"].requires_grad, loaded["b"].requires_grad] == [True, False]
    assert loaded["b"].data_ptr() == loaded["a"].data_ptr() == loaded["n"].ctypes.data


@pytest.mark.parametrize("what", ["own", "global", "bytes", "conj"])
def test_all_is_checked_before_the_first_byte_is_written(tmp_path, what):
    """With verify="first" damage in anything that is loaded leaves the template as it was."""
    values = {
        "own": torch.full((4,), 7.0),
        "global": torch.full((4,), 7.0),
        "bytes": b"7" * 100_000,
        "conj": torch.full((4,), 7 + 7j).conj(),
    }
    load = save(
        2,
        lambda _: {"a": X, "x": values[what]},
        ["a", "x"] if what == "global" else ["a"],
        storage=LocalStorage(),
        path=str(tmp_path / "c"),
    )
    for file in tmp_path.glob("c/checkpoint_*.pt"):
        wanted = b"7" * 1000 if what == "bytes" else raw_bytes(torch.full((4,), 7.0))
        data = file.read_bytes()
        file.write_bytes(data.replace(wanted, b"9" + wanted[1:]))
    template = {"a": torch.zeros(4, 3), "x": None}
    with as_rank(0, 2) if what == "conj" else nullcontext(), pytest.raises(CorruptCheckpointError) as caught:
        if what == "conj":
            template["x"] = part_of(torch.zeros(4, dtype=torch.complex64), mesh(0, 1), Shard(0))
        load(0, 2, template, verify="first", together=False)
    assert not caught.value.targets_modified
    assert not template["a"].any()


def test_a_template_with_a_conjugate_or_negative_bit_gets_the_values():
    """Whatever bits source and target have, the values are those that were saved."""
    numbers = torch.tensor([[1 + 2j, 3 - 4j], [5j, 6]])
    for saved in (numbers, numbers.conj()):
        load = save(2, lambda _, saved=saved: {"c": saved}, ["c"])
        for empty in (torch.zeros(2, 2, dtype=numbers.dtype), torch.zeros(2, 2, dtype=numbers.dtype).conj()):
            assert torch.equal(load(1, 2, {"c": empty})["c"].resolve_conj(), saved.resolve_conj())
        negative = torch.zeros(2, 2, dtype=numbers.dtype).conj().imag
        assert negative.is_neg()
        load = save(2, lambda _: {"n": numbers.imag.contiguous()}, ["n"])
        assert torch.equal(load(1, 2, {"n": negative})["n"].resolve_neg(), numbers.imag)


def test_tensors_that_are_tied_on_one_rank_alone_are_not_mixed_up():
    """What one rank of a mesh has tied and another has not comes back as each saved it, or is refused."""

    def state(rank, held_by=(0, 1)):
        if rank not in held_by:
            return {"x": 1}
        a = torch.full((1, 2), 1.0 + rank)
        parts = {"a": a, "b": a if rank == 0 else a + 10}
        return {
            key: DTensor.from_local(part, mesh(*held_by), [Shard(0)], run_check=False)
            for key, part in parts.items()
        }

    loaded = save(3, state)()
    assert loaded["a"].tolist() == [[1, 1], [2, 2]]
    assert loaded["b"].tolist() == [[1, 1], [12, 12]]
    with pytest.raises(
        CommitError, match="b: rank 1 and an earlier one differ in what shares memory with it"
    ):
        save(2, state)


@pytest.mark.parametrize("tied_on", [0, 1])
def test_replicas_of_which_one_has_tied_what_another_has_not_say_so(tied_on):
    """Replicas divide the bytes that they hold: it is said why the parts contradict each other."""
    one, big = torch.ones(100, 100), torch.ones(100, 100)

    def state(rank):
        a = part_of(one, grid(), Replicate(), Shard(0))
        return {"a": a, "b": a if rank // 2 == tied_on else part_of(big, grid(), Replicate(), Shard(0))}

    with pytest.raises(CommitError, match=r"(?s)\bb\b.*shares memory"):
        save(4, state)


def test_empty_parts_on_one_memory_are_not_tied():
    """Empty parts that were cut from one buffer, as optimizers do, say nothing of what is tied."""

    def state(rank):
        flat = torch.arange(4.0)
        parts = [flat[:2].view(1, 2), flat[2:].view(1, 2)] if rank == 0 else [flat[:0].view(0, 2)] * 2
        return {
            str(n): DTensor.from_local(
                part, mesh(*order), [Shard(0)], run_check=False, shape=(1, 2), stride=(2, 1)
            )
            for n, part in enumerate(parts)
        }

    for size, order in ((2, (0, 1)), (3, (0, 1))):
        loaded = save(size, lambda rank, o=order: state(rank) if rank in o else {"x": 1})()
        assert loaded["0"].tolist() == [[0, 1]]
        assert loaded["1"].tolist() == [[2, 3]]


def test_attributes_of_an_ordered_dict_are_put_together():
    """Replicas and DTensors in an OrderedDict's attributes come back whole, and keys of that name too."""

    def state(_):
        ordered = OrderedDict(w=BIG, __dict__=BIG + 2)
        ordered.ema = BIG + 1
        ordered.shard = part_of(X, mesh(0, 1), Shard(0))
        return {"m": ordered}

    load = save(2, state, ["m.*"])
    for rank in range(2):
        loaded = load(rank, 2)["m"]
        assert [*loaded] == ["w", "__dict__"]
        assert torch.equal(loaded["__dict__"], BIG + 2)
        assert torch.equal(loaded.ema, BIG + 1)
        assert torch.equal(loaded.shard, X)


@pytest.mark.parametrize(
    "key", [torch.float32, torch.device("cpu"), torch.Size([1]), (torch.int8, 1), np.int8(3)]
)
def test_keys_of_any_kind_come_back(key):
    """A replica may have any key that a state dict may have."""
    load = save(2, lambda _: {"m": {key: X}}, ["m*"])
    assert [*load(1, 2)["m"]] == [key]
    assert torch.equal(load(1, 2, {"m": {key: torch.zeros(4, 3)}})["m"][key], X)


@pytest.mark.parametrize("key", [1.0, True, np.int64(1), np.float32(1)])
def test_an_own_key_that_is_equal_to_anothers_stays(key):
    """Where another rank's DTensor has a key that is equal to one of the rank's own, the own one counts."""
    load = save(2, lambda rank: {"l": {key: "mine"} if rank else {1: part_of(X, mesh(0), Replicate())}})
    assert load(1, 2) == {"l": {1: "mine"}}
    assert torch.equal(load(0, 2)["l"][1], X)


def test_a_scalar_of_a_mesh_without_this_rank():
    """A DTensor without dimensions whose mesh lacks this rank is saved and loaded."""

    def state(_, value=3.0):
        return {"s": distribute_tensor(torch.tensor(value), mesh(0, 1), [Replicate()], src_data_rank=None)}

    load = save(4, state)
    assert load() == {"s": torch.tensor(3.0)}
    with as_rank(3, 4):
        load(3, 4, state(3, 0.0), together=False)


@pytest.mark.parametrize(("dp", "tp"), [(2, 2), (4, 2), (2, 4)])
def test_uneven_shards_of_fsdp_on_tensor_parallelism(dp, tp):
    """FSDP2 divides what tensor parallelism has left it; torch's own strided shards, only if it is even."""
    for rows in range(1, 14):
        whole = torch.arange(rows * 2.0).reshape(rows, 2)

        def state(rank, whole=whole):
            held_by = DeviceMesh("cpu", torch.arange(dp * tp).view(dp, tp), mesh_dim_names=("dp", "tp"))
            local = chunk(chunk(whole, tp, rank % tp), dp, rank // tp)
            layout = [_StridedShard(0, split_factor=tp), Shard(0)]
            return {
                "w": DTensor.from_local(
                    local, held_by, layout, run_check=False, shape=whole.shape, stride=whole.stride()
                )
            }

        assert torch.equal(save(dp * tp, state)()["w"], whole)


def chunk(tensor, parts, index):
    """A chunk as FSDP2 makes them: those that are missing are empty."""
    found = tensor.chunk(parts)
    return found[index] if index < len(found) else tensor[:0]


# -- states that contradict each other ----------------------------------------------------------------


def test_ranks_that_hold_the_same_rows_twice_do_not_commit(monkeypatch):
    """As many elements as the tensor has are not enough: none may be held twice, and so none be missing."""
    monkeypatch.setattr(DeviceMesh, "get_coordinate", lambda _: [0])  # each takes itself for the first
    monkeypatch.setattr(DeviceMesh, "get_local_rank", lambda *_: 0)
    with pytest.raises(CommitError, match="some of them twice, of w"):
        save(2, lambda _: {"w": part_of(X, mesh(0, 1), Shard(0))})


def test_what_a_rank_has_of_its_own_is_not_replaced_by_anothers_tensor():
    """Where a rank saved something else under the key of another rank's DTensor, it gets its own back."""
    for own in (torch.zeros(3), None, {"y": 1}, 5):
        load = save(2, lambda rank, own=own: {"x": part_of(X, mesh(1), Replicate()) if rank else own})
        loaded = load(0, 2)["x"]
        assert torch.equal(loaded, own) if isinstance(own, torch.Tensor) else loaded == own
        assert torch.equal(load(1, 2)["x"], X)


def test_keys_that_cannot_be_in_one_state_do_not_commit():
    """A tensor on the way to another one, and keys that Python takes for equal, stop the commit."""
    with pytest.raises(CommitError, match="contradict each other"):
        save(
            2,
            lambda r: {
                "x": part_of(X, mesh(r), Replicate()) if r else {"a": part_of(X, mesh(r), Replicate())}
            },
        )
    with pytest.raises(CommitError, match="is equal to one of"):
        save(2, lambda r: {True if r else 1: part_of(X, mesh(r), Replicate())})


def test_a_list_that_only_another_rank_holds_keeps_its_places():
    """What lies between the tensors of such a list is another rank's own, and stands as None."""
    load = save(2, lambda rank: {"l": [5, part_of(X, mesh(1), Replicate())]} if rank else {})
    assert load(0, 2)["l"][0] is None
    assert torch.equal(load(0, 2)["l"][1], X)
    assert load(1, 2)["l"][0] == 5


def stages(kind=list):
    """Each of two ranks saves a list of its own that holds a tensor; returns how to load it."""
    return save(2, lambda rank: {f"s{rank}": kind([100 + rank, part_of(X, mesh(rank), Replicate()), "last"])})


@pytest.mark.parametrize("kind", [list, tuple])
def test_what_another_rank_had_in_a_list_beside_its_tensors_is_missing(kind):
    """Items that are another rank's own are missing and keep the template's value; strict refuses them."""
    load = stages(kind)
    template = {"s1": kind([7, torch.zeros(4, 3), "mine"])}
    with pytest.raises(MismatchError, match=r"missing keys \(2\): s1\[0\]; s1\[2\]\. "):
        load(0, 1, template, strict=True)
    assert not template["s1"][1].any()
    load(0, 1, template, strict=True, allow_missing=["s1[0]", "s1[2]"])
    assert type(template["s1"]) is kind
    assert (template["s1"][0], template["s1"][2]) == (7, "mine")
    assert torch.equal(template["s1"][1], X)
    with pytest.raises(MismatchError, match="s1: expected 1 items, found 2"):
        load(0, 1, {"s1": kind([torch.zeros(4, 3)])})


def test_nothing_is_renamed_from_a_place_that_is_not_known():
    """What another rank had in its list beside its tensors has no old name, and is not left over either."""
    load = stages()
    template = {"x": 7, "t": torch.zeros(4, 3)}
    with pytest.raises(MismatchError) as caught:
        load(0, 1, template, rename={"s1[0]": "x", "s1[1]": "t"}, strict=True)
    assert "missing keys (1): x" in str(caught.value)
    assert "unexpected keys in the checkpoint (1): s0. " in str(caught.value)


def test_memory_is_shared_only_where_the_placement_is_the_same():
    """Two DTensors over one local tensor that are divided along different dimensions are two tensors."""

    def state(rank):
        local = torch.arange(9.0).reshape(3, 3) + rank
        return {
            key: DTensor.from_local(local, mesh(0, 1), [Shard(dim)], run_check=False)
            for dim, key in enumerate("xy")
        }

    loaded = save(2, state)()
    locals_ = [torch.arange(9.0).reshape(3, 3) + rank for rank in (0, 1)]
    assert torch.equal(loaded["x"], torch.cat(locals_, 0))
    assert torch.equal(loaded["y"], torch.cat(locals_, 1))


def test_tensors_of_part_meshes_are_divided_alike_whatever_else_a_mesh_holds():
    """A large tensor that two meshes hold commits, though one of them holds another one beside it."""

    def state(rank):
        inner = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("pp", "dp"))["dp"]
        own = {"a": part_of(torch.ones(700, 100), inner, Replicate())} if rank < 2 else {}
        return {"x": part_of(BIG, inner, Replicate()), **own}

    loaded = save(4, state)()
    assert torch.equal(loaded["x"], BIG)
    assert torch.equal(loaded["a"], torch.ones(700, 100))


def test_tied_tensors_of_which_a_rank_holds_nothing():
    """Tied DTensors are tied on all ranks alike, on those whose part is empty as well."""

    def state(_):
        tied = part_of(torch.arange(6.0).reshape(3, 2), mesh(0, 1, 2, 3), Shard(0))
        return {"a": tied, "b": tied}

    loaded = save(4, state)()
    assert loaded["a"] is loaded["b"]
    assert torch.equal(loaded["a"], torch.arange(6.0).reshape(3, 2))


@pytest.mark.parametrize("damaged", [True, False])
def test_a_save_that_was_not_published_counts_only_with_its_shard_map(tmp_path, damaged):
    """A save that died before it was published is loaded if its shard map is right, else what was there."""
    path, newer = tmp_path / "c", tmp_path / "d"
    for where, number in ((path, 0), (newer, 0), (newer, 1)):
        save(2, lambda _, n=number: {"m": X + n}, ["m"], storage=LocalStorage(), path=str(where))
    attempt = json.loads((newer / "manifest.json").read_text())["body"]["attempt"]
    hidden = newer.rename(tmp_path / f".c.{attempt}.partial")
    if damaged:
        data = (hidden / "shards.json").read_bytes()
        (hidden / "shards.json").write_bytes(data.replace(b"replicated", b"replicateD"))
    reader = CheckpointReader(RankInfo(0, 1))
    assert torch.equal(reader.read(str(path))[0]["m"], X + (not damaged))


@pytest.mark.parametrize(("before", "after"), [((1, 2), (True, 2)), (0.0, -0.0)])
def test_a_division_is_not_kept_for_keys_that_are_only_equal(before, after):
    """What one writer planned for a key is not used for another one that is equal to it."""
    storage = MemoryStorage()
    storage.make_folder("/run")
    writers = [
        CheckpointWriter(
            CheckpointWriterConfig(start_id="s", replicated=["*"]), RankInfo(rank, 2), storage=storage
        )
        for rank in (0, 1)
    ]
    for key, path in ((before, "/run/a"), (after, "/run/b")):
        for writer in writers:
            writer.write(path, {key: BIG.clone()})
    for writer in writers:
        writer.close()
    loaded = CheckpointReader(RankInfo(0, 1), storage=storage).read("/run/b", {after: torch.zeros(300, 200)})[
        0
    ]
    assert torch.equal(loaded[after], BIG)


# -- malformed shards ------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [True, False])
def test_a_branch_that_the_template_leaves_open_is_read_in_one_go(monkeypatch, own):
    """None for a whole model does not read tensor by tensor, be they a rank's own or all ranks'."""
    calls = []

    def counted(file, parts, **arguments):
        calls.extend([len(parts)] if parts else [])
        return original(file, parts, **arguments)

    original = sources.read_parts
    state = {"model": {str(n): {"w": torch.full((3,), float(n)), "t": [X + n]} for n in range(20)}}
    load = save(1 if own else 2, lambda _: state, ["*"])
    monkeypatch.setattr(sources, "read_parts", counted)
    template = {"model": None}
    load(0, 1, template)
    assert len(calls) <= 2
    assert all(torch.equal(part["t"][0], X + int(key)) for key, part in template["model"].items())
    assert all(torch.equal(part["w"], torch.full((3,), float(k))) for k, part in template["model"].items())


@pytest.mark.parametrize("moment", ["_opened", "data", "_judge"])
@pytest.mark.parametrize("with_template", [True, False])
def test_a_save_may_replace_what_is_being_loaded(tmp_path, monkeypatch, moment, with_template):
    """All of the old one is loaded, if its files were open by then, or else all of the new one."""

    def write(values):
        return save(2, lambda _: {"b": values}, ["b"], storage=LocalStorage(), path=str(tmp_path / "c"))

    load = write(BIG)
    owner = Checkpoint if moment == "data" else CheckpointReader
    original, calls = getattr(owner, moment), []

    def replaced_before(*args, **arguments):
        calls.append(args)
        if len(calls) == (2 if moment == "data" else 1):  # the first file is this rank's own
            write(-BIG)
        return original(*args, **arguments)

    monkeypatch.setattr(owner, moment, replaced_before)
    loaded = load(0, 1, {"b": torch.zeros_like(BIG)} if with_template else None)
    assert torch.equal(loaded["b"], BIG if moment == "_judge" else -BIG)


def odd_ones():
    """Replicas of odd kinds: under a key of numpy's, tied ones, without gradients, arrays."""
    tied = torch.ones(3, 2)
    return {
        np.float32(1.5): torch.ones(2),
        "a": tied,
        "b": tied,
        "c": torch.arange(6.0).reshape(2, 3),
        "h": torch.ones(2, dtype=torch.bfloat16),
        "array": np.arange(4, dtype=np.float32),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }


def saved_on_disk(folder, *, odd=False):
    def state(rank):
        return {
            **({"odd": odd_ones()} if odd else {}),
            "w": part_of(X, mesh(0, 1), Shard(0)),
            "v": part_of(X.t().contiguous(), mesh(0, 1), Shard(1)),
            "m": {"s": torch.tensor(7), 3: X + 1},
            "own": torch.full((2,), float(rank)),
        }

    path = str(folder / "c")
    save(2, state, ["m.*", "odd.*"], storage=LocalStorage(), path=path)
    return path


@pytest.fixture(scope="module", params=["plain", "odd"])
def on_disk(tmp_path_factory, request):
    """A checkpoint of two ranks, with its shard map and the first rank's index as they were written."""
    path = saved_on_disk(tmp_path_factory.mktemp("hostile"), odd=request.param == "odd")
    files = {name: Path(path, name).read_bytes() for name in ("shards.json", "index_0.json", "manifest.json")}
    return path, files


def load_or_refuse(path):
    """Load with and without a template: what was loaded, where it was not refused."""
    for template in (
        None,
        {
            "w": torch.zeros(4, 3),
            "v": torch.zeros(3, 4),
            "m": {"s": torch.tensor(0), 3: torch.zeros(4, 3)},
            "own": torch.zeros(2),
            "odd": odd_ones(),
        },
    ):
        try:
            loaded = CheckpointReader(RankInfo(0, 1)).read(path, template)[0]
        except (CorruptCheckpointError, MismatchError):
            continue
        yield loaded


def mutations(value, path=()):
    """Every way to spoil one thing in a JSON value: (where, what instead)."""
    instead = [None, True, -1, 1 << 62, 1 << 70, 0.5, "x", [], {}, ["item", -1], [["str", 1]], [[]]]
    for other in instead:
        if other != value or type(other) is not type(value):
            yield path, other
    if isinstance(value, list):
        yield path, value[:-1]
        yield path, [*value, value[-1]] if value else [0]
        for n, item in enumerate(value[:3]):
            yield from mutations(item, (*path, n))
    elif isinstance(value, int):
        yield path, value + 1


def spoiled(value, path, other):
    value = copy.deepcopy(value)
    if not path:
        return other
    inner = value
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = other
    return value


MAP_FIELDS = ["format", "version", "attempt", "world_size", "key", "dtype", "kind", "shape", "placement"]
MAP_FIELDS += ["alias", "requires_grad", "table", "tables"]


@pytest.mark.parametrize("name", MAP_FIELDS)
def test_a_malformed_shard_map_is_refused_as_it_is_decoded(on_disk, name):
    """Whatever stands in a field of shards.json, it is a CorruptCheckpointError or well-formed."""
    data = on_disk[1]["shards.json"]
    whole = json.loads(data)
    facts = {"attempt": whole["attempt"], "world_size": 2}
    assert len(decode_shard_map(data, "p", **facts).key) in (4, 4 + len(odd_ones()))
    passed = 0
    for where, other in mutations(whole[name]):
        try:
            found = decode_shard_map(dump({**whole, name: spoiled(whole[name], where, other)}), "p", **facts)
            for number in range(len(found.key)):
                found.where(number)
            passed += 1
        except CorruptCheckpointError:
            pass
    without = {key: value for key, value in whole.items() if key != name}
    if name in (
        "attempt",
        "world_size",
        "key",
        "dtype",
        "kind",
        "shape",
        "placement",
        "alias",
        "table",
        "tables",
    ):
        with pytest.raises(CorruptCheckpointError):
            decode_shard_map(dump(without), "p", **facts)
    if name in ("attempt", "world_size", "dtype", "kind"):
        assert not passed


@pytest.mark.parametrize("junk", [b"", b"{", b"[]", b"null", b'{"key": ' + b"[" * 5000, b"\xff\xfe", b"{}"])
def test_a_shard_map_that_is_no_json_is_refused(junk):
    """Bytes that are no shard map at all are a CorruptCheckpointError with the path."""
    with pytest.raises(CorruptCheckpointError, match="where/it/is"):
        decode_shard_map(junk, "where/it/is", attempt="a", world_size=1)


HARMLESS = {"version", "placement", "requires_grad", "kind", "alias"}
"""What of the map may be changed so that it is well-formed, and then the tensors are described otherwise."""


@pytest.mark.parametrize("name", MAP_FIELDS)
def test_a_forged_shard_map_cannot_do_harm(on_disk, name):
    """A shard map that was changed and signed is refused, or what is loaded are tensors that were saved."""
    path, files = on_disk
    whole = json.loads(files["shards.json"])
    try:
        for where, other in mutations(whole[name]):
            data = dump({**whole, name: spoiled(whole[name], where, other)})
            sign_map(path, data)
            for loaded in load_or_refuse(path):
                check_loaded(
                    loaded, exact=name not in {*HARMLESS, "key", "shape", "dtype", "table", "tables"}
                )
    finally:
        for file, data in files.items():
            write(f"{path}/{file}", data)


def test_shared_arrays_stay_on_the_cpu_wherever_tensors_go():
    """As with an array of one rank's own."""
    loaded = save(2, lambda _: {"array": np.arange(4.0), "tensor": X}, ["*"])(map_location="meta")
    assert np.array_equal(loaded["array"], np.arange(4.0))
    assert loaded["tensor"].is_meta


FORGERIES = {
    "a key with a digit less": lambda shards, at: shards["key"][at["scalar"]][-1].__setitem__(2, "0000c0"),
    "a key of another size": lambda shards, at: shards["key"][at["scalar"]][-1].__setitem__(2, "00" * 8),
    "a tie of other shapes": lambda shards, at: shards["alias"].__setitem__(at["c"], at["a"]),
    "a tie of other dtypes": lambda shards, at: shards["alias"].__setitem__(at["h"], at["scalar"]),
    "a gradient of integers": lambda shards, at: shards["requires_grad"].append(at["s"]),
    "an array of bfloat16": lambda shards, at: shards["kind"].__setitem__(at["h"], "ndarray"),
    "a smaller shape": lambda shards, at: shards["shape"][at["a"]].__setitem__(0, 2),
    "a larger shape": lambda shards, at: shards["shape"][at["a"]].__setitem__(0, 4),
    "a huge shape": lambda shards, at: shards["shape"][at["c"]].__setitem__(0, 1 << 40),
    "a huge box": lambda shards, at: enlarge(shards, at["c"]),
    "an empty tensor of huge rows": lambda shards, at: empty(shards, at["c"]),
}
"""What may be wrong with a shard map whose fields are each well-formed; `at` has the number of each key."""


def enlarge(shards, number):
    shards["shape"][number][0] = 1 << 40
    table = copy.deepcopy(shards["tables"][shards["table"][number]])
    table["size"][-2] = (1 << 40) - table["start"][-2]
    shards["table"][number] = len(shards["tables"])
    shards["tables"].append(table)


def empty(shards, number):
    shards["shape"][number] = [0, 1 << 62, 1 << 62]
    shards["table"][number] = len(shards["tables"])
    shards["tables"].append({"rank": [], "start": [], "size": []})


@pytest.mark.parametrize("on_disk", ["odd"], indirect=True)
@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_shard_map_that_contradicts_itself_or_the_files_is_refused(on_disk, forgery):
    """A map that was changed and signed, and says what cannot be, is refused without a template as well."""
    path, files = on_disk
    shards = json.loads(files["shards.json"])
    at = {key[-1] if isinstance(key[-1], str) else key[-1][0]: n for n, key in enumerate(shards["key"])}
    FORGERIES[forgery](shards, at)
    try:
        sign_map(path, dump(shards))
        with pytest.raises(CorruptCheckpointError):
            CheckpointReader(RankInfo(0, 1)).read(path)
    finally:
        for file, data in files.items():
            write(f"{path}/{file}", data)


def sign_map(path, data):
    write(f"{path}/shards.json", data)
    forge = Forge(path)
    forge.body["shards"].update(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    forge.sign_manifest(dump(forge.body))


def check_loaded(loaded, *, exact):
    assert isinstance(loaded, dict)
    if exact:
        assert raw_bytes(loaded["w"]) == raw_bytes(X)
        assert raw_bytes(loaded["v"]) == raw_bytes(X.t())


INDEX_FIELDS = ["tensor", "key", "dtype", "kind", "shape", "placement", "alias", "copies", "crcs"]
INDEX_FIELDS += ["requires_grad", "pieces", "start", "local", "size"]


@pytest.mark.parametrize("name", INDEX_FIELDS)
def test_forged_shards_of_an_index_cannot_do_harm(on_disk, name):
    """Columns of an index that were changed and signed are refused, or what is loaded was saved."""
    path, files = on_disk
    whole = json.loads(files["index_0.json"])
    column = whole["shards"].get(name, [])
    try:
        for where, other in mutations(column):
            forge = Forge(path)
            forge.sign_index(
                dump({**whole, "shards": {**whole["shards"], name: spoiled(column, where, other)}})
            )
            for loaded in load_or_refuse(path):
                exact = name in ("kind", "placement", "alias", "copies", "crcs", "requires_grad")
                check_loaded(loaded, exact=exact)
    finally:
        for file, data in files.items():
            write(f"{path}/{file}", data)


@settings(max_examples=100, suppress_health_check=[*HealthCheck])
@given(data=st.data())
def test_a_flipped_byte_in_the_map_is_found(on_disk, data):
    """Any byte of shards.json that changes, without being signed, is made good or refused, never believed."""
    path, files = on_disk
    original = files["shards.json"]
    place = data.draw(st.integers(0, len(original) - 1))
    changed = bytearray(original)
    changed[place] ^= data.draw(st.integers(1, 255))
    write(f"{path}/shards.json", bytes(changed))
    try:
        for loaded in load_or_refuse(path):
            check_loaded(loaded, exact=True)
    finally:
        write(f"{path}/shards.json", original)
