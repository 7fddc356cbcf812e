"""Only structure is kept between saves, and what changes in it is noticed; values are never kept."""

from __future__ import annotations

import pytest
import torch
from support.saves import index_of, load, torch_load
from support.states import assert_same, sharing

from milepost.checkpoint_writer import CheckpointWriter
from milepost.config import CheckpointWriterConfig
from milepost.state.encode import _KEPT_PLANS, StateEncoder
from milepost.types import RankInfo


@pytest.fixture
def saves(tmp_path):
    """Saves with one writer and compares what both readers find, each time it is called."""
    writer = CheckpointWriter(CheckpointWriterConfig(), RankInfo(0, 1))

    def check(state):
        path = str(tmp_path / "c")
        writer.write(path, state)
        for loaded in (load(path), torch_load(path)):
            assert_same(state, loaded)
            assert sharing(loaded) == sharing(state)
        return path

    yield check
    writer.close()


def test_values_are_never_cached(saves):
    """When only `step` and `lr` change between saves, the new ones are found; so are tensors' values."""
    state = {
        "step": 1,
        "lr": 0.1,
        "name": "a",
        "w": torch.zeros(3),
        "group": [{"lr": 0.5, "betas": (0.9, 1)}],
    }
    for step in range(5):
        state["step"], state["lr"] = step, 0.1 / (step + 1)
        state["name"] = f"run {step}"
        state["group"][0]["lr"] = step * 1.5
        state["group"][0]["betas"] = (step, None)
        state["w"] += 1
        saves(state)


def test_keys_that_change_are_found(saves):
    """Added, removed, renamed and reordered keys and values of other kinds are found at the next save."""
    w, v = torch.ones(2), torch.zeros(2)
    for state in (
        {"w": w, "v": v},
        {"v": v, "w": w},
        {"w": v, "v": w},
        {"x": w, "v": v},
        {"x": [w, v]},
        {"x": (w, v)},
        {"w": w},
        {1: w, "1": v},
        {"w": w, "v": 5},
    ):
        saves(state)


def change_data(t):
    t.data = torch.full((6,), 9.0)


def change_shape(t):
    t.data = torch.full((2, 3), 8.0)


def change_dtype(t):
    t.data = torch.full((6,), 7, dtype=torch.float64)


def set_elsewhere(t):
    t.set_(torch.arange(20.0).untyped_storage(), 4, (6,), (2,))


def resize(t):
    t.resize_(9).fill_(3)


def transpose_in_place(t):
    t.set_(t.untyped_storage(), 0, (2, 3), (1, 2))


def grow_storage(t):
    t.untyped_storage().resize_(4000)
    t.fill_(2)


def want_gradient(t):
    t.requires_grad_(not t.requires_grad)


def conjugate(t):
    t.data = torch.full((6,), 1 + 2j).conj()


@pytest.mark.parametrize(
    "change",
    [
        change_data, change_shape, change_dtype, set_elsewhere, resize, transpose_in_place, grow_storage,
        want_gradient, conjugate,
    ],
)  # fmt: skip
def test_structure_changed_in_place_is_noticed(saves, change):
    """A tensor whose memory, shape, strides, dtype or bits change in place is saved as it is now."""
    tensor = torch.arange(6.0)
    state = {"t": tensor, "other": torch.ones(3), "view": tensor[2:4]}
    saves(state)
    saves(state)
    with torch.no_grad():
        change(tensor)
    saves(state)
    saves(state)


def test_views_that_are_bound_anew_are_noticed(saves):
    """A view that moves within its base, or to another base, is saved from where it is now."""
    base, other = torch.arange(10.0), torch.arange(10.0) * 2
    for view in (base[2:5], base[3:6], base[7:], other[2:5], base[2:5].clone(), base[2:5]):
        saves({"base": base, "view": view})


def test_aliasing_added_and_removed_is_noticed(saves):
    """Ties made and cut between tensors of unchanged shapes are found, whatever their addresses."""
    a, b, c = torch.ones(4), torch.full((4,), 2.0), torch.full((4,), 3.0)
    for state in (
        {"a": a, "b": b, "c": c},
        {"a": a, "b": a, "c": c},
        {"a": a, "b": b, "c": b},
        {"a": a, "b": a[:], "c": a.view(4)},
        {"a": c, "b": b, "c": a},
    ):
        saves(state)


def test_aliasing_that_changes_at_the_same_addresses_is_noticed(saves):
    """Tensors that keep their addresses while their storages are joined or parted are partitioned anew."""
    base = torch.arange(16.0)
    memory = base.numpy()
    apart = {"a": torch.from_numpy(memory[:8]), "b": torch.from_numpy(memory[8:])}
    joined = {"a": base[:8], "b": base[8:]}
    overlapping = {"a": base[:8], "b": base[4:12]}
    for state in (joined, apart, overlapping, joined, apart):
        saves(state)
    assert apart["a"].data_ptr() == joined["a"].data_ptr()
    assert apart["b"].data_ptr() == joined["b"].data_ptr()


def test_memory_that_is_reused_at_once_is_read_anew(saves):
    """A new tensor at the address of a dead one is saved with its own values."""
    for value in range(4):
        saves({"t": torch.full((100,), float(value))})


def test_an_unchanged_structure_keeps_its_plan():
    """Saves of one structure share one plan, also when the tensors move in memory."""
    encoder = StateEncoder()
    one = encoder.take_apart({"a": torch.ones(3), "step": 1}).plan
    assert encoder.take_apart({"a": torch.zeros(3), "step": 2}).plan is one
    assert encoder.take_apart({"b": [torch.zeros(3)]}).plan is one
    assert encoder.take_apart({"a": torch.zeros(4)}).plan is not one
    assert encoder.take_apart({"a": torch.zeros(3)}).plan is one


def test_kept_plans_are_few():
    """However many structures are saved, only a few plans and no tensors are kept."""
    import gc
    import weakref

    encoder = StateEncoder()
    tensors = []
    for size in range(1, 30):
        tensor = torch.ones(size)
        tensors.append(weakref.ref(tensor))
        encoder.take_apart({"t": tensor, "o": torch.ones(size).to_sparse()})
    del tensor
    gc.collect()
    assert len(encoder._plans) <= _KEPT_PLANS
    assert not any(reference() is not None for reference in tensors)


def test_kept_key_texts_are_bounded(monkeypatch):
    """Ever new keys do not make the encoder's memory grow without limit."""
    monkeypatch.setattr("milepost.format.tree._MAX_CACHED_KEYS", 10)
    encoder = StateEncoder()
    for number in range(100):
        encoder.take_apart({f"key {number}": 1})
    assert len(encoder._encoder._keys) <= 10


def test_a_failed_save_does_not_poison_the_next(saves):
    """After a refused state the same writer saves a good one whole."""
    good = {"a": torch.ones(3), "n": 1}
    saves(good)
    for bad in (
        {"a": torch.ones(3), "n": object()},
        {"a": torch.empty(3, device="meta")},
        {"a": {object: 1}},
    ):
        with pytest.raises(ValueError, match=r"type|meta"):
            saves(bad)
        saves(good)


def test_records_follow_the_order_of_the_state(saves):
    """Records are numbered in the order in which their first tensors occur in the state."""
    path = saves({"z": torch.ones(1), "a": torch.ones(2), "m": torch.ones(3)})
    assert index_of(path).records.length == [4, 8, 12]
