"""Staging: what is copied, when, to where, and what becomes of the arenas."""

from __future__ import annotations

import gc
import logging
import os
import sys
import threading
import weakref

import numpy as np
import pytest
import torch
from support.background import Collect, arenas, error_of, make, parts, result, state_of
from support.processes import in_child
from support.saves import ONE, load
from support.states import (
    array_values,
    assert_same,
    bytes_tensor,
    native_values,
    object_values,
    savable_dtypes,
)

from milepost.background.slot import Slot
from milepost.background.staged import image_of
from milepost.checkpoint_writer import CheckpointWriter, CheckpointWriterConfig
from milepost.config import CheckpointStagerConfig
from milepost.errors import ClosedError, ConfigError, LowMemoryError, StateError
from milepost.staging import CheckpointStager, DefaultStager
from milepost.state import accelerator
from milepost.state.encode import StateEncoder
from milepost.types import RankInfo

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse:UserWarning"),
    pytest.mark.filterwarnings("ignore:ComplexHalf:UserWarning"),
]

ASYNC = CheckpointStagerConfig(use_async_staging=True)


@pytest.fixture
def checkpointer():
    with make() as made:
        yield made


@pytest.fixture
def stager():
    made = DefaultStager()
    yield made
    made.close()


def saved(checkpointer, path, state):
    """What loads after a save in the background."""
    result(checkpointer.save(str(path), state)[1])
    return load(path)


def every_tensor():
    base = torch.arange(24.0).reshape(2, 3, 4)
    tied = torch.randn(5, 7)
    return {
        "dtypes": {str(dtype): bytes_tensor(dtype, (3, 5)) for dtype in savable_dtypes()},
        "transposed": base.permute(2, 0, 1),
        "sliced": base[:, 1:, ::2],
        "expanded": torch.ones(1, 3).expand(4, 3),
        "empty": [torch.empty(0), torch.empty(3, 0, dtype=torch.int8)],
        "scalar": torch.tensor(3.5),
        "conj": torch.tensor([1 + 2j, 3 - 4j]).conj(),
        "neg": torch.tensor([1 + 2j]).conj().imag,
        "tied": [tied, tied, tied[1:3], tied.T],
        "two dtypes": [(mixed := torch.randn(4)), mixed.view(torch.int32)],
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "frozen": torch.nn.Parameter(torch.randn(3), requires_grad=False),
        "leaf": torch.randn(2, requires_grad=True),
        "channels last": torch.randn(1, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "big": torch.randn(600, 600),
    }


STATES = {
    "tensors": every_tensor,
    "natives": native_values,
    "arrays": array_values,
    "objects": object_values,
    "empty": dict,
}


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("config", [CheckpointStagerConfig(), ASYNC], ids=["copied at once", "copied beside"])
def test_what_is_staged_is_the_same_bit_for_bit(tmp_path, name, config):
    """Every kind of tensor and value comes back from the written file as it was, twice in a row."""
    state = STATES[name]()
    with make(staging=config) as checkpointer:
        for _ in range(2):
            assert_same(saved(checkpointer, tmp_path / "c", state), state)


@pytest.mark.parametrize("name", STATES)
def test_a_staged_state_dict_is_an_ordinary_one(stager, name):
    """What `stage` returns is equal to the state it was made from."""
    state = STATES[name]()
    staged = stager.stage(state)
    assert_same(staged, state)
    del staged


def test_staged_and_written_files_are_the_same_bytes(checkpointer, tmp_path):
    """A save in the background makes the very data file that a save in the foreground does."""
    state = {**every_tensor(), **native_values()}
    writer = CheckpointWriter(CheckpointWriterConfig(), ONE)
    writer.write(str(tmp_path / "sync"), state)
    writer.close()
    result(checkpointer.save(str(tmp_path / "async"), state)[1])
    files = [(tmp_path / name / "checkpoint_0.pt").read_bytes() for name in ("sync", "async")]
    same = [a for a, b in zip(*files, strict=True) if a == b]
    assert len(files[0]) - len(same) < 200, "but for the attempt's id and its checksum"


def test_tensors_are_copied_and_values_taken_at_save(checkpointer, tmp_path):
    """Whatever is done to the state after `save` has returned, the checkpoint has the values of before."""
    state = {
        "t": torch.zeros(100_000), "a": np.zeros(5), "words": np.array(["ab"]), "n": 1, "set": {1},
        "list": [1, {"x": torch.ones(3)}], "sparse": torch.eye(3).to_sparse(),
    }  # fmt: skip
    staged, written = checkpointer.save(str(tmp_path / "c"), state)
    assert staged.done()
    state["t"].fill_(9)
    state["a"].fill(9)
    state["words"][0] = "zz"
    state["set"].add(2)
    state["list"][1]["x"].fill_(9)
    state["list"].append(3)
    state["sparse"]._values().fill_(9)
    state["n"] = 2
    result(written)
    found = load(tmp_path / "c")
    expected = {
        "t": torch.zeros(100_000), "a": np.zeros(5), "words": np.array(["ab"]), "n": 1, "set": {1},
        "list": [1, {"x": torch.ones(3)}], "sparse": torch.eye(3).to_sparse(),
    }  # fmt: skip
    assert_same(found, expected)


def test_values_are_taken_at_save_with_async_staging_too(monkeypatch):
    """With asynchronous staging all but the tensors is taken before `stage` returns."""
    stager = DefaultStager(ASYNC)
    go, real = threading.Event(), accelerator.copy_tensors

    def later(*arguments, **options):
        assert go.wait(60)
        real(*arguments, **options)

    monkeypatch.setattr(accelerator, "copy_tensors", later)
    state = {"t": torch.zeros(3), "n": 1, "set": {1}, "list": [1], "words": np.array(["ab"])}
    future = stager.stage(state)
    state["n"], state["words"][0] = 2, "zz"
    state["set"].add(2)
    state["list"].append(2)
    go.set()
    expected = {"t": torch.zeros(3), "n": 1, "set": {1}, "list": [1], "words": np.array(["ab"])}
    assert_same(future.result(60), expected)
    del future
    stager.close()


def test_another_state_may_be_planned_while_one_is_copied(monkeypatch):
    """A copy that is under way is not misled by another state of the same structure."""
    stager = DefaultStager(ASYNC)
    go, real = threading.Event(), accelerator.copy_tensors

    def later(*arguments, **options):
        assert go.wait(60)
        real(*arguments, **options)

    monkeypatch.setattr(accelerator, "copy_tensors", later)
    one, two = ({"t": torch.full((4, 4), float(n))[:, 1:3]} for n in (1, 2))  # no dense ones: copied raw
    future = stager.stage(one)
    stager.plan(two)
    go.set()
    assert_same(future.result(60), one)
    del future
    stager.close()


def test_inference_tensors_can_be_staged(tmp_path):
    """Inference tensors, and a save within inference mode, are like any other."""
    with torch.inference_mode():
        state = {"t": torch.arange(5.0)}
    for config in (CheckpointStagerConfig(), ASYNC):
        with make(staging=config) as checkpointer:
            assert saved(checkpointer, tmp_path / "c", state)["t"].tolist() == [0, 1, 2, 3, 4]
            with torch.inference_mode():
                assert saved(checkpointer, tmp_path / "c", state)["t"].tolist() == [0, 1, 2, 3, 4]


# -- arenas ----------------------------------------------------------------------------------------


def slots(stager):
    return [(slot.arena.size, slot.arena.descriptor) for slot in stager._slots]


def test_an_arena_is_used_again(stager):
    """One save after the other of any structure that fits uses one arena, of one descriptor and mapping."""
    before = arenas()
    for step in range(5):
        gc.collect()  # changes no count by which it is known that nobody uses the arena
        staged = stager.stage(state_of(step))
        assert staged["w"][0] == step
        del staged
        staged = stager.stage({"other": torch.ones(step + 1), "more": torch.ones(3)})
        del staged
    assert len(slots(stager)) == 1
    assert arenas() - before <= 2  # the descriptor, and what Python's mapping keeps


def test_an_arena_grows_when_it_must(stager):
    """A larger state grows the arena; a smaller one leaves it as it is."""
    stager.stage(state_of(1))
    ((small, descriptor),) = slots(stager)
    large_state = {"w": torch.ones(2_000_000)}
    assert_same(stager.stage(large_state), large_state)
    ((large, same),) = slots(stager)
    assert same == descriptor
    assert large >= small + 8_000_000 - (2 << 20)
    assert_same(stager.stage(state_of(1)), state_of(1))
    assert slots(stager) == [(large, descriptor)]


@pytest.mark.parametrize(
    "keep",
    [
        lambda staged: staged,
        lambda staged: staged["w"],
        lambda staged: staged["w"][5:7],
        lambda staged: staged["w"].view(2, -1),
        lambda staged: staged["w"].detach(),
        lambda staged: staged["w"].numpy(),
        lambda staged: memoryview(staged["w"].numpy()),
        lambda staged: staged["w"].untyped_storage(),
    ],
    ids=["dict", "tensor", "slice", "view", "alias", "array", "memory", "storage"],
)
def test_what_the_user_keeps_keeps_its_bytes(stager, keep):
    """As long as anything shows an arena's memory, later saves go to another; then it is used again."""
    kept = keep(stager.stage({"w": torch.full((1000,), 1.0)}))
    first = slots(stager)[0][1]

    def value(kept):
        if isinstance(kept, dict):
            return float(kept["w"][0])
        if isinstance(kept, torch.UntypedStorage):
            return torch.tensor(kept, dtype=torch.uint8)[:4].view(torch.float32).item()
        return float(torch.as_tensor(kept).flatten()[0])

    for step in (2.0, 3.0):
        staged = stager.stage({"w": torch.full((1000,), step)})
        assert staged["w"][0] == step
        del staged
        assert value(kept) == 1.0
    assert len(slots(stager)) == 2
    del kept
    staged = stager.stage({"w": torch.full((1000,), 4.0)})
    assert {descriptor for _, descriptor in slots(stager)} >= {first}
    assert len(slots(stager)) == 2
    del staged


def test_close_releases_the_arenas():
    """After close no arena is left but for views that somebody kept, and no stage works."""
    before, stager = arenas(), DefaultStager()
    kept = stager.stage(state_of(3))
    stager.close()
    stager.close()
    assert kept["w"].sum() == 3000
    del kept
    assert arenas() == before
    for call in (stager.stage, stager.prepare, stager.stage_image):
        with pytest.raises(ClosedError):
            call(state_of(1))


def test_dropped_arenas_are_released_at_once():
    """Memory is not left to the garbage collector: without one, nothing stays after close."""
    before, stager = arenas(), DefaultStager()
    gc.collect()
    gc.disable()
    try:
        stager.stage(every_tensor())
        stager.close()
        del stager
        assert arenas() == before
    finally:
        gc.enable()


def test_a_forked_process_cannot_stage_into_its_parents_arena(stager):
    """In a forked child `stage` is refused, as it would write over what the parent is saving."""
    staged = stager.stage(state_of(1))

    def use_it():
        with pytest.raises(ClosedError, match="forked"):
            stager.stage(state_of(2))
        stager.close()

    assert in_child(use_it) == 0
    assert staged["w"][0] == 1
    del staged


# -- plan and prepare ------------------------------------------------------------------------------


def test_plan_tells_what_a_save_takes(stager):
    """`plan` tells the arena's size within 2 % and a fixed part, the tensors, and what is left."""
    base = torch.ones(1_000_000)
    plan = stager.plan({"a": base, "tied": base, "b": torch.ones(10), "n": 5})
    assert plan.tensor_bytes == 4_000_040
    assert plan.tensors == 2
    assert 4_000_040 <= plan.arena_bytes <= 4_000_040 * 1.02 + (2 << 20)
    assert plan.available_bytes > 0
    assert plan.fits
    assert slots(stager) == []


def test_plan_says_when_it_does_not_fit():
    """With less left than an arena takes, the plan does not fit; unknown memory is taken to suffice."""
    for left, fits in ((10, False), (None, True)):
        stager = DefaultStager(available=lambda left=left: left)
        assert stager.plan(state_of(1)).fits is fits
        stager.close()


def test_prepare_has_the_memory_ready(stager):
    """After `prepare` and `wait_prepared` an arena of the right size is there with all its pages."""
    state = {"w": torch.ones(4_000_000)}
    stager.prepare(state)
    assert stager.wait_prepared(60)
    ((size, descriptor),) = slots(stager)
    assert os.fstat(descriptor).st_blocks * 512 >= size
    staged = stager.stage(state)
    assert slots(stager) == [(size, descriptor)]
    assert_same(staged, state)
    del staged


def test_preparing_is_no_obstacle(stager, monkeypatch):
    """A save does not wait for a `prepare` that is under way; `wait_prepared` does."""
    begun, go = threading.Event(), threading.Event()

    def slow(address, length):
        begun.set()
        assert go.wait(60)

    monkeypatch.setattr("milepost.syscalls.populate", slow)
    state = {"w": torch.ones(20_000_000)}
    stager.prepare(state)
    assert begun.wait(60)
    assert stager.wait_prepared(0) is False
    staged = stager.stage(state)
    assert staged["w"][-1] == 1
    del staged
    go.set()
    stager.close()
    assert stager.wait_prepared(0)


# -- memory ----------------------------------------------------------------------------------------


class Memory:
    """A machine with so much memory left."""

    def __init__(self, left):
        self.left = left

    def __call__(self):
        return self.left


def test_what_does_not_fit_is_refused_before_anything_is_allocated():
    """`stage` and `prepare` raise LowMemoryError, with the bytes in the text; nothing is kept of it."""
    memory = Memory(1_000_000)
    stager, before = DefaultStager(available=memory), arenas()
    for call in (stager.stage, stager.prepare):
        with pytest.raises(LowMemoryError, match="1,000,000 are left") as caught:
            call(state_of(1))
        assert isinstance(caught.value, MemoryError)
    assert arenas() == before
    memory.left = 10_000_000
    stager.stage(state_of(1))
    memory.left = 0
    assert_same(stager.stage(state_of(2)), state_of(2))  # the arena is there already
    with pytest.raises(LowMemoryError):
        stager.stage({"w": torch.ones(1_000_000)})
    assert_same(stager.stage(state_of(3)), state_of(3))
    stager.close()


def test_saves_in_flight_count(stager):
    """A second arena is only made if there is memory for it beside the first."""
    memory = Memory(None)
    stager._available = memory
    kept = stager.stage(state_of(1))
    memory.left = 1000
    with pytest.raises(LowMemoryError):
        stager.stage(state_of(2))
    del kept


@pytest.mark.parametrize("staging", [CheckpointStagerConfig(), ASYNC])
def test_low_memory_saves_without_staging(tmp_path, staging, caplog):
    """By default a save that does not fit is written while the caller waits, with a warning and an event."""
    seen = Collect()
    with make(observers=[seen], staging=staging) as checkpointer:
        checkpointer.guard(torch.optim.SGD([torch.ones(1, requires_grad=True)]))
        checkpointer._stager._available = Memory(1000)
        checkpointer.prepare(state_of(1))
        staged, written = checkpointer.save(str(tmp_path / "c"), state_of(4), step=4)
        assert staged.done()
        assert written.done()
        assert written.exception() is None
        assert_same(load(tmp_path / "c"), state_of(4))
        checkpointer._stager._available = Memory(None)
        assert_same(saved(checkpointer, tmp_path / "c", state_of(5)), state_of(5))
    assert seen.kinds()[:4] == ["staging", "low_memory", "staged", "committed"]
    assert "without staging" in caplog.text


def test_low_memory_may_raise(tmp_path):
    """With on_low_memory="raise" such a save, and `prepare`, raise; the next save that fits works."""
    with make(on_low_memory="raise") as checkpointer:
        checkpointer._stager._available = Memory(1000)
        with pytest.raises(LowMemoryError):
            checkpointer.prepare(state_of(1))
        with pytest.raises(LowMemoryError):
            checkpointer.save(str(tmp_path / "c"), state_of(1))
        assert not (tmp_path / "c").exists()
        checkpointer._stager._available = Memory(None)
        assert_same(saved(checkpointer, tmp_path / "c", state_of(2)), state_of(2))


def test_a_checkpointer_without_a_writer_of_its_own_raises(tmp_path):
    """Put together by hand without a fallback, low memory is an error."""
    with parts(stager=DefaultStager(available=Memory(1000))) as checkpointer, pytest.raises(LowMemoryError):
        checkpointer.save(str(tmp_path / "c"), state_of(1))


# -- asynchronous staging --------------------------------------------------------------------------


@pytest.fixture
def held_copies(monkeypatch):
    """Copies wait for `go`, and tell by `begun`."""

    class Held:
        begun, go = threading.Event(), threading.Event()

    held, real = Held(), accelerator.copy_tensors
    held.begun, held.go = threading.Event(), threading.Event()

    def copy(*arguments, **options):
        held.begun.set()
        assert held.go.wait(60)
        real(*arguments, **options)

    monkeypatch.setattr(accelerator, "copy_tensors", copy)
    return held


def test_a_guarded_optimizer_waits_for_the_copy(tmp_path, held_copies):
    """With a guard, `step` changes nothing before the copy is done: each save has the values at its time."""
    weight = torch.zeros(1000, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    with make(staging=ASYNC, require_guard=True) as checkpointer:
        checkpointer.guard(optimizer)
        staged, written = checkpointer.save(str(tmp_path / "c"), {"w": weight, "step": 0.0})
        assert held_copies.begun.wait(60)
        assert not staged.done()
        stepped = threading.Thread(target=step, args=(optimizer, weight))
        stepped.start()
        stepped.join(0.05)
        assert weight[0] == 0, "the step has to wait"
        held_copies.go.set()
        stepped.join(60)
        assert weight[0] == -1
        result(written)
    assert_same(load(tmp_path / "c")["w"].detach(), torch.zeros(1000))


def step(optimizer, weight):
    weight.grad = torch.ones_like(weight)
    optimizer.step()


def test_wait_staged_returns_when_the_state_may_change(tmp_path, held_copies):
    """`wait_staged` waits for the copy and nothing else; with a limit it raises TimeoutError."""
    weight = torch.zeros(1000)
    with make(staging=ASYNC) as checkpointer:
        checkpointer.wait_staged()
        _, written = checkpointer.save(str(tmp_path / "c"), {"w": weight})
        with pytest.raises(TimeoutError, match="still being staged"):
            checkpointer.wait_staged(0.01)
        held_copies.go.set()
        checkpointer.wait_staged(60)
        weight.fill_(9)
        result(written)
    assert load(tmp_path / "c")["w"].sum() == 0


def test_torn_state_fails_that_save_and_names_the_key(tmp_path, held_copies):
    """A tensor that changes while it is copied fails this save, naming it; the next save works."""
    state = {"model": {"a": torch.zeros(10), "b": torch.zeros(10)}, "step": 1}
    with make(staging=ASYNC) as checkpointer:
        staged, written = checkpointer.save(str(tmp_path / "c"), state)
        assert held_copies.begun.wait(60)
        state["model"]["b"].add_(1)
        held_copies.go.set()
        error = error_of(written)
        assert isinstance(error, StateError)
        assert error.key == "model.b"
        assert "guard" in str(error)
        assert error_of(staged) is not None
        assert not (tmp_path / "c").exists()
        assert_same(saved(checkpointer, tmp_path / "c", state), state)
        assert len(checkpointer._stager._slots) == 1, "the failure keeps no arena"


def test_an_unguarded_checkpointer_says_so_once(tmp_path, caplog):
    """Asynchronous staging without a guard is one warning that says what to do; with one there is none."""
    with make(staging=ASYNC) as checkpointer:
        for number in range(3):
            result(checkpointer.save(str(tmp_path / "c"), state_of(number))[1])
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "checkpointer.guard(optimizer)" in warnings[0].message
    caplog.clear()
    with make(staging=ASYNC) as checkpointer:
        checkpointer.guard(torch.optim.SGD([torch.ones(1, requires_grad=True)]))
        result(checkpointer.save(str(tmp_path / "c"), state_of(1))[1])
    with make() as checkpointer:
        result(checkpointer.save(str(tmp_path / "c"), state_of(1))[1])
    assert caplog.records == []


def test_a_guard_can_be_required(tmp_path):
    """With require_guard a save without a guard is refused, and nothing is staged."""
    with make(staging=ASYNC, require_guard=True) as checkpointer:
        with pytest.raises(ConfigError, match="guard"):
            checkpointer.save(str(tmp_path / "c"), state_of(1))
        assert checkpointer._stager._slots == []


def test_a_guard_keeps_no_checkpointer_alive():
    """An optimizer outlives the checkpointer that guards it; closing removes the hook."""
    optimizer = torch.optim.SGD([weight := torch.ones(1, requires_grad=True)])
    with make(staging=ASYNC) as checkpointer:
        handle = checkpointer.guard(optimizer)
        assert optimizer._optimizer_step_pre_hooks
        handle.remove()
        checkpointer.guard(optimizer)
    assert not optimizer._optimizer_step_pre_hooks
    reference = weakref.ref(checkpointer)
    del checkpointer
    gc.collect()
    assert reference() is None
    step(optimizer, weight)


# -- stagers of the user's -------------------------------------------------------------------------


class Wrapping(CheckpointStager):
    """A user's stager around ours, which changes what ours returns."""

    def __init__(self, change):
        self.inner, self.change = DefaultStager(), change

    def stage(self, state_dict, **kwargs):
        return self.change(self.inner.stage(state_dict))

    def close(self):
        self.inner.close()


def drop(staged):
    del staged["drop"]
    return staged


def retensor(staged):
    del staged["w"]
    staged["w"] = torch.full((4,), 7.0)
    return staged


def reshape(staged):
    staged["w"] = staged["w"].reshape(2, 2)
    return staged


def point_elsewhere(staged):
    staged["w"].data = torch.full((4,), 8.0)
    return staged


def in_place(staged):
    staged["w"].mul_(2)
    return staged


def add_to_set(staged):
    staged["set"].add("new")
    return staged


def scalar(staged):
    del staged["np"]
    staged["np"] = np.float64(2.5)
    return staged


def words(staged):
    staged["words"][0] = "zz"
    return staged


def sparse(staged):
    staged["sparse"].add_(torch.ones(2, 2).to_sparse())
    return staged


CHANGES = {
    "nothing": lambda staged: staged,
    "another dict": lambda staged: {**staged},
    "adds a key": lambda staged: {**staged, "more": torch.ones(3), "n": 4},
    "removes a key": drop,
    "another order": lambda staged: dict(reversed(staged.items())),
    "replaces a tensor": retensor,
    "reshapes a tensor": reshape,
    "points a tensor elsewhere": point_elsewhere,
    "changes values in place": in_place,
    "changes a set": add_to_set,
    "replaces a number": scalar,
    "changes an array of words": words,
    "changes a sparse tensor": sparse,
    "casts": lambda staged: {**staged, "w": staged["w"].half()},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_stager_of_the_users_may_change_what_ours_returns(tmp_path, name):
    """Whatever a wrapping stager does to the staged state, exactly that is written."""
    state = {
        "w": torch.arange(4.0), "drop": torch.ones(2), "set": {1, 2}, "np": np.float64(1.5), "n": 3,
        "words": np.array(["ab", "cd"]), "sparse": torch.eye(2).to_sparse(), "array": np.arange(3),
    }  # fmt: skip
    copy = {key: value.copy() if hasattr(value, "copy") else value for key, value in state.items()}
    copy |= {key: value.clone() for key, value in state.items() if isinstance(value, torch.Tensor)}
    with parts(stager=Wrapping(CHANGES[name])) as checkpointer:
        for _ in range(2):
            result(checkpointer.save(str(tmp_path / "c"), state)[1])
    found, expected = load(tmp_path / "c"), CHANGES[name](copy)
    for one in (found, expected):
        one["sparse"] = one["sparse"].to_dense()
    assert_same(found, expected)


@pytest.mark.parametrize("name", ["nothing", "another dict"])
def test_what_was_staged_is_not_copied_again(stager, name):
    """A state dict whose leaves are the very objects that were staged is written from its arena."""
    staged = CHANGES[name](stager.stage(every_tensor()))
    assert image_of(staged) is not None
    del staged


def test_identities_that_are_used_again_do_not_deceive(stager):
    """A new object where a staged one was freed is noticed, though it may have the same address."""
    for _ in range(200):
        staged = stager.stage({"w": torch.ones(2), "np": np.float64(1), "words": np.array(["ab"])})
        assert image_of(staged) is not None
        for key, new in (("np", lambda: np.float64(2)), ("words", lambda: np.array(["zz"]))):
            del staged[key]
            staged[key] = new()
            assert image_of(staged) is None
        del staged


@pytest.mark.parametrize("more", [{}, {"own": torch.ones(2)}])
def test_a_staged_part_of_a_replica_does_not_pass_for_the_whole(more):
    """Tensors and arrays of which a rank stages a part are known, and refused where something changed."""
    stager = DefaultStager(encoder=StateEncoder(RankInfo(0, 2), ["m.*"]))
    for whole in (torch.ones(300, 300), np.ones((300, 300))):
        staged = stager.stage({"m": {"w": whole}, **more})
        assert len(staged["m"]["w"]) == 150
        assert image_of(staged) is not None
        staged["new"] = 1
        assert image_of(staged) is None
        for state in (staged, {"w": staged["m"]["w"]}):
            with pytest.raises(StateError, match=r"one rank's part of a global tensor.*w"):
                stager.stage(state)
        del staged, state
    stager.close()


def test_a_tensor_that_is_whole_again_is_no_share_any_more():
    """An arena's tensors, which serve one save after the other, are shares only while they hold some."""
    stager = DefaultStager(encoder=StateEncoder(RankInfo(1, 2), ["share"]))
    for whole in (torch.ones(3), np.ones(3)):
        staged = stager.stage({"share": whole})
        del staged
        staged = stager.stage({"own": whole[:0]})
        stager.stage({"again": staged["own"]})
        del staged
    stager.close()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_replica_that_changes_while_it_is_staged_is_named(monkeypatch, rank):
    """Though another rank saves it, a replica must not change while its checksum is taken."""
    stager = DefaultStager(ASYNC, encoder=StateEncoder(RankInfo(rank, 2), ["w"]))
    value = torch.zeros(3)

    def fill(slot, *arguments, **options):
        value.add_(1)
        return real(slot, *arguments, **options)

    real = Slot.fill
    monkeypatch.setattr(Slot, "fill", fill)
    assert "changed while it was being staged" in str(error_of(stager.stage({"w": value})))
    stager.close()


def test_states_without_tensors_have_no_image_to_find(stager):
    """A state without any tensor is staged and written as well."""
    assert image_of(stager.stage({"n": 1})) is None
    assert image_of({"w": torch.ones(1)}) is None


def test_non_blocking_copies_need_an_accelerator(monkeypatch):
    """use_non_blocking_copy=True where there is none is an AssertionError; left open it is off."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(AssertionError, match="accelerator"):
        DefaultStager(CheckpointStagerConfig(use_non_blocking_copy=True))
    for value in (None, False):
        DefaultStager(CheckpointStagerConfig(use_non_blocking_copy=value)).close()


def test_a_stager_of_the_users_may_return_futures(tmp_path):
    """A stager that returns a future of a plain state dict works, and one that fails says so."""
    from concurrent.futures import Future

    class Later(CheckpointStager):
        def stage(self, state_dict, **kwargs):
            future = Future()
            futures.append(future)
            return future

        def close(self):
            pass

    futures = []
    with parts(stager=Later()) as checkpointer:
        staged, written = checkpointer.save(str(tmp_path / "c"), {})
        assert not staged.done()
        futures[0].set_result(state_of(6))
        assert result(staged) is None
        result(written)
        staged, written = checkpointer.save(str(tmp_path / "d"), {})
        futures[1].set_exception(OSError("no such stage"))
        assert "no such stage" in str(error_of(written))
        with pytest.raises(OSError, match="no such stage"):
            result(staged)
    assert_same(load(tmp_path / "c"), state_of(6))


def test_staging_holds_few_references():
    """A staged state is no part of a cycle: its tensors go when the last reference goes."""
    stager = DefaultStager()
    staged = stager.stage({"w": torch.ones(5)})
    assert sys.getrefcount(staged["w"]) <= 5
    del staged
    stager.close()
