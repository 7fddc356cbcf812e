"""Loading into a template: filled in place, everything that does not fit found before anything is touched."""

from __future__ import annotations

import copy
import logging
from collections import Counter, OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from states import (
    assert_same,
    bytes_tensor,
    load,
    object_values,
    raw_bytes,
    savable_dtypes,
    save,
    tensors_in,
)

from milepost import make_sync_checkpointer
from milepost.checkpoint_reader import CheckpointReader
from milepost.checkpoint_writer import CheckpointWriter, CheckpointWriterConfig
from milepost.errors import MismatchError, UnsupportedTypeError
from milepost.types import RankInfo

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning")


def read(path, template, **arguments):
    return CheckpointReader(RankInfo(0, 1)).read(str(path), template, **arguments)


def warnings_in(caplog):
    return [record for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize("verify", [True, False, "first"])
def test_tensors_are_filled_in_place(tmp_path, caplog, verify):
    """Tensors and arrays of a template are the same objects afterwards, with the saved values."""
    state = {
        "model": OrderedDict(weight=torch.rand(3, 4), bias=torch.rand(3)),
        "list": [torch.arange(3), {"x": torch.tensor(2.5)}],
        "tuple": (torch.ones(2), (torch.zeros(0), 5)),
        "array": np.arange(4.0),
        "structured": np.array([(1, 2.0)], dtype="i4,f8"),
        "step": 7,
        "name": "run",
        "large": bytes_tensor(torch.uint8, (3_000_000,)),
    }
    path = save(tmp_path / "c", state)
    template = copy.deepcopy(state)
    kept = tensors_in(template)
    for tensor in kept:
        tensor[...] = 0 if tensor.dtype != np.dtype("i4,f8") else (0, 0)
    template["step"], template["name"] = 0, ""
    pointers = [t.data_ptr() if isinstance(t, torch.Tensor) else t.ctypes.data for t in kept]
    inner = template["list"]
    loaded, missing = read(path, template, verify=verify)
    assert loaded is template
    assert missing == []
    assert template["list"] is inner
    assert all(a is b for a, b in zip(kept, tensors_in(template), strict=True))
    assert pointers == [t.data_ptr() if isinstance(t, torch.Tensor) else t.ctypes.data for t in kept]
    assert_same(state, template)
    assert warnings_in(caplog) == []


def test_none_stands_for_the_whole_subtree(tmp_path):
    """None in a template stands for whatever was saved there; keys that are not in it are not added."""
    state = {
        "model": {"w": torch.ones(2), "deep": [1, {"k": torch.zeros(3)}]},
        "value": 5,
        "none": None,
        "more": 1,
    }
    path = save(tmp_path / "c", state)
    template = {"model": None, "value": None, "none": None}
    assert read(path, template) == (template, [])
    del state["more"]
    assert_same(state, template)


def test_missing_keys_are_reported_by_their_topmost_path(tmp_path, caplog):
    """Keys that were not saved are reported as `a.b` and `a[0].b`, once for each missing subtree."""
    path = save(tmp_path / "c", {"a": {"x": 1}, "list": [{"x": torch.ones(1)}], "t": ({},)})
    template = {
        "a": {"x": 0, "b": {"c": {"d": torch.ones(1)}}},
        "list": [{"x": torch.zeros(1), "b": torch.ones(1)}],
        "t": ({"k": 1},),
        "new": {"deep": torch.ones(1)},
        3: 4,
    }
    before = copy.deepcopy(template)
    loaded, missing = read(path, template)
    assert missing == ["a.b", "list[0].b", "t[0].k", "new", "3"]
    assert loaded["a"]["x"] == 1
    before["a"]["x"], before["list"][0]["x"] = 1, torch.ones(1)
    assert_same(before, loaded)


def test_missing_and_unexpected_keys_are_one_warning(tmp_path, caplog):
    """When not strict, missing and unexpected keys are one warning that lists both."""
    path = save(tmp_path / "c", {"a": {"x": 1, "gone": 2}, "unexpected": torch.ones(1)})
    read(path, {"a": {"x": 0, "lacking": 0}})
    (warning,) = warnings_in(caplog)
    assert warning.name == "milepost.checkpoint_reader"
    text = warning.getMessage()
    assert all(name in text for name in ("a.lacking", "a.gone", "unexpected", path, "missing keys"))


def test_strict_refuses_missing_keys_before_anything_is_touched(tmp_path, caplog):
    """A strict load with missing keys is a RuntimeError that names them all; the template is as it was."""
    path = save(tmp_path / "c", {"a": torch.ones(2), "c": 1, "more": 1})
    template = {"a": torch.zeros(2), "b": torch.zeros(1), "c": 5, "d": {"e": 1}}
    before = copy.deepcopy(template)
    checkpointer = make_sync_checkpointer()
    with pytest.raises(RuntimeError, match="missing keys") as caught:
        checkpointer.load(path, template, strict=True)
    assert "b; d" in str(caught.value)
    assert isinstance(caught.value, MismatchError)
    assert_same(before, template)
    assert warnings_in(caplog) == []
    assert checkpointer.load(path, template)["c"] == 1
    assert checkpointer.load(path, {"a": torch.zeros(2)}, strict=True)["a"].tolist() == [1, 1]
    checkpointer.close()


def test_a_template_of_one_part_is_no_warning(tmp_path, caplog):
    """Whole parts that the template leaves out are not worth a warning; a top-level tensor is."""
    path = save(tmp_path / "c", {"model": {"w": torch.ones(1)}, "optimizer": {}, "epoch": 3})
    with caplog.at_level(logging.INFO, "milepost"):
        read(path, {"model": {"w": torch.zeros(1)}})
    assert warnings_in(caplog) == []
    assert "does not ask for optimizer; epoch" in caplog.text
    path = save(tmp_path / "flat", {"0.w": torch.ones(1), "1.w": torch.ones(1)})
    read(path, {"0.w": torch.zeros(1)})
    assert "1.w" in warnings_in(caplog)[0].message


def test_a_strict_load_with_unexpected_keys_only_warns(tmp_path, caplog):
    """Saved keys that the template lacks are a warning also when the load is strict."""
    path = save(tmp_path / "c", {"a": 1, "b": 2})
    assert read(path, {"a": 0}, strict=True) == ({"a": 1}, [])
    assert len(warnings_in(caplog)) == 1


MISFITS = {
    "shape": (torch.ones(2, 3), torch.ones(3, 2)),
    "dtype": (torch.ones(2), torch.ones(2, dtype=torch.float64)),
    "rank": (torch.ones(()), torch.ones(1)),
    "number for a tensor": (torch.ones(()), 1.0),
    "tensor for a number": (1.0, torch.ones(())),
    "array for a tensor": (torch.ones(2), np.ones(2, dtype="f4")),
    "tensor for an array": (np.ones(2, dtype="f4"), torch.ones(2)),
    "array shape": (np.ones(2), np.ones(3)),
    "array dtype": (np.ones(2), np.ones(2, dtype="f4")),
    "array order": (np.ones(2), np.ones(2, dtype=">f8")),
    "array of texts": (np.array(["a"]), np.array(["a", "b"])),
    "array of another dtype": (np.array(["a"]), np.array([1.0])),
    "reversed array": (np.ones(2), np.ones(2)[::-1]),
    "text for a number": (1, "1"),
    "number for a text": ("1", 1),
    "bytes for a text": ("1", b"1"),
    "list for a dict": ({"a": 1}, [1]),
    "dict for a list": ([1], {"a": 1}),
    "list for a tuple": ((1,), [1]),
    "list of tensors": ([torch.ones(1)] * 2, [torch.ones(1)] * 3),
    "fewer tensors": ([torch.ones(1)] * 3, [torch.ones(1)] * 2),
    "dtype value": (torch.float32, torch.device("cpu")),
    "set": ({1}, [1]),
    "size": (torch.Size([1]), (1,)),
    "sparse for dense": (torch.ones(2, 2), torch.ones(2, 2).to_sparse()),
    "dense for sparse": (torch.ones(2, 2).to_sparse(), torch.ones(2, 2)),
    "sparse shape": (torch.ones(2, 2).to_sparse(), torch.ones(3, 2).to_sparse()),
    "object": (Counter("a"), {"a": 1}),
    "meta": (torch.ones(2), torch.empty(2, device="meta")),
    "expanded over values": (torch.arange(6.0).reshape(2, 3), torch.zeros(3).expand(2, 3)),
    "overlapping": (torch.zeros(4, 3), torch.zeros(6).unfold(0, 3, 1)),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_refused_by_key(tmp_path, name):
    """A shape, dtype or type that does not fit is a RuntimeError naming the key; nothing is touched."""
    saved, wanted = MISFITS[name]
    path = save(tmp_path / "c", {"first": torch.ones(2), "model": {"part": [saved]}, "number": 1})
    template = {"first": torch.zeros(2), "model": {"part": [wanted]}, "number": 0}
    with pytest.raises(RuntimeError, match=r"model\.part") as caught:
        read(path, template)
    assert isinstance(caught.value, MismatchError)
    assert template["first"].tolist() == [0, 0]
    assert template["number"] == 0
    assert template["model"]["part"][0] is wanted


def save_plain(path, state):
    path.mkdir()
    torch.save(state, path / "checkpoint_0.pt")


def save_replicas(path, state):
    for rank in range(2):
        config = CheckpointWriterConfig(start_id="cast", replicated=["*"])
        writer = CheckpointWriter(config, RankInfo(rank, 2))
        writer.write(str(path), state)
        writer.close()


@pytest.mark.parametrize("verify", [True, "first"])
@pytest.mark.parametrize("way", [save, save_plain, save_replicas])
def test_cast_converts_as_load_state_dict_does(tmp_path, way, verify):
    """With cast=True the template keeps its dtypes and gets what copy_ makes of the saved values."""
    wide, whole = torch.randn(70, 9, dtype=torch.float64) * 50, torch.arange(1000, dtype=torch.int32)
    way(tmp_path / "c", {"w": wide, "tied": wide, "turned": wide.T, "n": whole, "same": whole})
    tied = torch.zeros(70, 9, dtype=torch.bfloat16)
    template = {
        "w": tied, "tied": tied, "turned": torch.zeros(9, 70).T.contiguous().T, "same": whole * 0,
        "n": torch.zeros(1000),  # as many bytes as was saved
    }  # fmt: skip
    with pytest.raises(MismatchError, match="cast=True"):
        read(tmp_path / "c", template)
    assert not tied.any()
    read(tmp_path / "c", template, cast=True, verify=verify)
    assert torch.equal(template["w"], wide.to(torch.bfloat16))
    assert torch.equal(template["turned"], wide.T.float())
    assert torch.equal(template["n"], whole.float())
    assert torch.equal(template["same"], whole)


def test_cast_fills_elements_that_share_memory(tmp_path):
    """An expanded target of another dtype gets the saved values; targets that would disagree are refused."""
    path = save(tmp_path / "c", {"a": torch.full((4, 3), 1.5), "b": torch.full((12,), 1.5)})
    target = torch.zeros(3, dtype=torch.float16).expand(4, 3)
    with pytest.raises(MismatchError, match="share memory"):
        read(save(tmp_path / "d", {"a": torch.rand(4, 3)}), {"a": target}, cast=True)
    save(tmp_path / "e", {"a": torch.full((3,), 1.5).expand(4, 3)})
    assert (read(tmp_path / "e", {"a": target}, cast=True)[0]["a"] == 1.5).all()
    memory = torch.zeros(12, dtype=torch.int32)
    with pytest.raises(MismatchError, match="shares memory"):
        read(path, {"a": memory.view(4, 3), "b": memory.view(torch.float32)}, cast=True)
    assert not memory.any()


@pytest.mark.parametrize("wanted", [torch.zeros(2), torch.zeros(2, dtype=torch.int64)])
def test_cast_drops_no_imaginary_parts(tmp_path, wanted):
    """Complex values are not converted to real ones; real ones become complex."""
    path = save(tmp_path / "c", {"z": torch.ones(2, dtype=torch.complex64), "x": torch.ones(2)})
    with pytest.raises(MismatchError, match="complex64"):
        read(path, {"z": wanted, "x": torch.zeros(2)}, cast=True)
    assert read(path, {"x": torch.zeros(2, dtype=torch.complex128)}, cast=True)[0]["x"].tolist() == [1, 1]


def test_cast_needs_a_template_and_a_bool(tmp_path):
    """Without a template there is no dtype to convert to, and a dtype is no bool: both are refused."""
    path = save(tmp_path / "c", {"a": torch.ones(2)})
    with pytest.raises(ValueError, match="cast needs a template"):
        read(path, None, cast=True)
    with pytest.raises(ValueError, match=r"cast must be True or False, not torch\.float16"):
        read(path, {"a": torch.zeros(2)}, cast=torch.float16)


def test_everything_that_does_not_fit_is_listed_at_once(tmp_path):
    """One error lists every misfit, the missing and the unexpected keys; no tensor is touched."""
    path = save(tmp_path / "c", {"a": torch.ones(2), "b": "x", "c": [torch.ones(1)], "good": torch.ones(1)})
    template = {"a": torch.zeros(3), "b": 5, "c": [torch.zeros(2)], "good": torch.zeros(1), "extra": 1}
    with pytest.raises(MismatchError) as caught:
        read(path, template)
    text = str(caught.value)
    assert all(f"{name}: expected" in text for name in ("a", "b", "c[0]"))
    assert "extra" in text
    assert "nothing was changed" in text
    assert template["good"].tolist() == [0]


def test_a_read_only_array_in_a_template_is_refused(tmp_path):
    """A read-only numpy array in a template is a misfit, not a crash."""
    path = save(tmp_path / "c", {"n": np.ones(2), "s": np.array(["a"])})
    for key, array in (("n", np.zeros(2)), ("s", np.array(["b"]))):
        array.flags.writeable = False
        with pytest.raises(MismatchError, match="written to"):
            read(path, {key: array})


@pytest.mark.parametrize("template", [[1], "x", torch.ones(1)], ids=repr)
def test_a_template_must_be_a_dict(tmp_path, template):
    """A template that is no dict is refused with words."""
    path = save(tmp_path / "c", {"a": 1})
    with pytest.raises(MismatchError, match="must be a dict"):
        read(path, template)


def test_numbers_and_none_stand_for_each_other(tmp_path):
    """int, float, bool, None and numpy scalars in a template take whichever of them was saved."""
    values = [1, 2.5, True, None, np.float64(0.1), np.int32(3)]
    path = save(tmp_path / "c", {"values": values, "none": None})
    for stand_in in (0, 0.0, False, None, np.float32(0)):
        template = {"values": [stand_in] * len(values), "none": stand_in}
        assert_same({"values": values, "none": None}, read(path, template)[0])


def test_lists_without_tensors_may_differ_in_length(tmp_path):
    """A list of plain values takes the saved length; lists that hold tensors must agree in it."""
    path = save(tmp_path / "c", {"milestones": [1, 2, 3], "betas": (0.9, 0.99), "empty": []})
    template = {"milestones": [0], "betas": (0.0,), "empty": [5]}
    assert read(path, template)[0] == {"milestones": [1, 2, 3], "betas": (0.9, 0.99), "empty": []}


def test_dict_kinds_stand_for_each_other(tmp_path):
    """A plain dict takes a saved OrderedDict and the reverse; the template keeps its type and order."""
    path = save(
        tmp_path / "c",
        {"a": OrderedDict(x=1, y=torch.ones(1)), "b": {"x": 1}, "c": defaultdict(list, x=[1])},
    )
    template = {"a": {"y": torch.zeros(1), "x": 0}, "b": OrderedDict(x=0), "c": {"x": None}}
    loaded = read(path, template)[0]
    assert type(loaded["a"]) is dict
    assert list(loaded["a"]) == ["y", "x"]
    assert type(loaded["b"]) is OrderedDict
    assert loaded == {"a": {"y": torch.ones(1), "x": 1}, "b": {"x": 1}, "c": {"x": [1]}}


def test_tuples_are_replaced_and_their_tensors_filled(tmp_path):
    """Tensors inside tuples are filled in place, other values in them are replaced."""
    path = save(tmp_path / "c", {"t": (torch.ones(2), 5, ("a", [torch.ones(1)]))})
    inner, list_ = torch.zeros(2), [torch.zeros(1)]
    loaded = read(path, {"t": (inner, 0, ("", list_))})[0]
    assert loaded["t"][0] is inner
    assert loaded["t"][2][1] is list_
    assert_same({"t": (torch.ones(2), 5, ("a", [torch.ones(1)]))}, loaded)


TARGETS = {
    "transposed": lambda dtype: bytes_tensor(dtype, (5, 3), 7).t(),
    "gaps": lambda dtype: bytes_tensor(dtype, (6, 15), 7)[::2, ::3],
    "inside": lambda dtype: bytes_tensor(dtype, (10, 5), 7)[4:7],
    "contiguous": lambda dtype: bytes_tensor(dtype, (3, 5), 7),
}


@pytest.mark.parametrize("target", TARGETS)
def test_every_dtype_loads_into_every_layout(tmp_path, target):
    """Contiguous, transposed and gapped targets of each dtype get the saved bytes from any saved layout."""
    for number, dtype in enumerate(savable_dtypes()):
        base = bytes_tensor(dtype, (5, 3), 1)
        state = {"plain": bytes_tensor(dtype, (3, 5), 2), "transposed": base.t(), "again": base.t()[:, :]}
        path = save(tmp_path / str(number), state)
        template = {name: TARGETS[target](dtype) for name in state}
        whole = {name: torch.empty(0).set_(t.untyped_storage()) for name, t in template.items()}
        outside = {name: t.clone() for name, t in whole.items()}
        read(path, template)
        for name, tensor in state.items():
            assert raw_bytes(template[name]) == raw_bytes(tensor), (dtype, name)
            if target == "inside":
                size = template[name].element_size() * 20
                data = whole[name].untyped_storage().tolist()
                assert data[:size] == outside[name].untyped_storage().tolist()[:size], dtype


def test_every_dtype_loads_into_targets_that_share_memory_with_themselves(tmp_path):
    """Expanded and overlapping targets of each dtype get the saved values where their layouts agree."""
    for number, dtype in enumerate(savable_dtypes()):
        state = {
            "expanded": bytes_tensor(dtype, (3, 4), 1)[:, :1].expand(3, 4),
            "overlapping": bytes_tensor(dtype, (12,), 2).as_strided((4, 3), (2, 1)),
            "one": bytes_tensor(dtype, (1,), 3).expand(5),
        }
        path = save(tmp_path / str(number), state)
        template = {
            "expanded": bytes_tensor(dtype, (3, 1), 4).expand(3, 4),
            "overlapping": bytes_tensor(dtype, (12,), 5).as_strided((4, 3), (2, 1)),
            "one": bytes_tensor(dtype, (1,), 6).expand(5),
        }
        read(path, template)
        for name, tensor in state.items():
            assert raw_bytes(template[name]) == raw_bytes(tensor), (dtype, name)


def test_an_expanded_tensor_loads_into_a_dense_one(tmp_path):
    """A saved expanded, overlapping or one-element tensor fills a target with memory for each element."""
    state = {
        "e": torch.arange(3.0).expand(4, 3),
        "o": torch.arange(6).unfold(0, 3, 1),
        "s": torch.tensor(5.0).expand(2, 2),
    }
    path = save(tmp_path / "c", state)
    template = {"e": torch.zeros(4, 3), "o": torch.zeros(4, 3, dtype=torch.int64), "s": torch.zeros(2, 2)}
    read(path, template)
    assert all(torch.equal(template[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("values", "other"),
    [(torch.tensor([1 + 2j, 3 - 4j]), torch.conj), (torch.tensor([1.0, 2.0]), torch._neg_view)],
)
def test_tied_targets_of_which_one_stands_for_other_values_are_refused(tmp_path, values, other):
    """Tied targets hold what was saved only if they stand for conjugate and negative values as that did."""
    ways = {"same": lambda t: {"a": t, "b": t}, "other": lambda t: {"a": t, "b": other(t)}}
    for saved, make_saved in ways.items():
        path, state = str(tmp_path / saved), make_saved(values)
        save(path, state)
        for way, make in ways.items():
            template = make(torch.zeros_like(values))
            if way == saved:
                load(path, template)
                assert all(torch.equal(template[key], state[key]) for key in state)
            else:
                with pytest.raises(MismatchError, match="shares memory"):
                    load(path, template)
                assert not template["a"].any()


class Wrapper(torch.Tensor):
    """A tensor that stands for others and has no memory of its own."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {})) if func is not torch.ops.aten.detach.default else args[0]


def without_memory(kind):
    tensor = torch.zeros(4, 4)
    if kind == "freed":
        tensor.untyped_storage().resize_(0)
    elif kind == "cut short":
        tensor.untyped_storage().resize_(32)
    elif kind == "wrapper":
        tensor = Wrapper(tensor)
    return tensor


@pytest.mark.parametrize("replicated", [[], ["a"]])
@pytest.mark.parametrize("kind", ["freed", "cut short", "wrapper"])
def test_targets_without_memory_are_refused(tmp_path, kind, replicated):
    """A tensor that was freed, or has no memory of its own, cannot be filled; the error names it."""
    for rank in range(2):
        writer = CheckpointWriter(
            CheckpointWriterConfig(start_id="start", replicated=replicated), RankInfo(rank, 2)
        )
        writer.write(str(tmp_path / "c"), {"a": torch.ones(4, 4), "b": torch.ones(4)})
        writer.close()
    template = {"a": without_memory(kind), "b": torch.zeros(4)}
    with pytest.raises(MismatchError, match="a: expected a tensor with memory to fill"):
        CheckpointReader(RankInfo(0, 2)).read(str(tmp_path / "c"), template)
    assert not template["b"].any()


def test_the_same_view_with_gaps_cannot_hold_two_values(tmp_path):
    """Two targets that are one view with gaps are filled only with the same values."""
    path = str(tmp_path / "c")
    save(path, {"a": torch.ones(4, 2), "b": torch.full((4, 2), 2.0), "c": torch.ones(4, 2)})
    base = torch.zeros(4, 4)
    with pytest.raises(MismatchError, match="b: expected the values of a, with which it shares memory"):
        load(path, {"a": base[:, :2], "b": base[:, :2]})
    assert not base.any()
    load(path, {"a": base[:, :2], "c": base[:, :2], "b": base[:, 2:]})
    assert base.tolist() == [[1, 1, 2, 2]] * 4


def test_conjugate_and_negative_targets_get_the_saved_values(tmp_path):
    """Values, not bits, decide: any mix of conjugate and negative views on both sides loads equal values."""
    values = torch.tensor([1 + 2j, 3 - 4j, 5j])
    state = {"plain": values, "conj": values.clone().conj(), "neg": values.clone().conj().imag}
    path = save(tmp_path / "c", state)
    template = {
        "plain": torch.zeros(3, dtype=torch.complex64).conj(),
        "conj": torch.zeros(3, dtype=torch.complex64),
        "neg": torch.zeros(3),
    }
    read(path, template)
    assert all(torch.equal(template[name], state[name]) for name in state)
    same = {"conj": torch.zeros(3, dtype=torch.complex64).conj(), "neg": torch._neg_view(torch.zeros(3))}
    read(path, same)
    assert all(torch.equal(same[name], state[name]) for name in same)
    assert same["conj"].is_conj()


def square():
    return torch.arange(16.0).reshape(4, 4)


ALIASES = {
    "transposed": (lambda base: base.t(), lambda: torch.zeros(4, 4).t()),
    "transposed to plain": (lambda base: base.t(), lambda: torch.zeros(4, 4)),
    "flat": (lambda base: base.view(16), lambda: torch.zeros(16)),
    "other dtype": (lambda base: base.view(torch.int32), lambda: torch.zeros(4, 4, dtype=torch.int32)),
    "bytes": (lambda base: base.view(torch.uint8), lambda: torch.zeros(4, 16, dtype=torch.uint8)),
    "negative": (torch._neg_view, lambda: torch._neg_view(torch.zeros(4, 4))),
    "negative to plain": (torch._neg_view, lambda: torch.zeros(4, 4)),
    "row": (lambda base: base[1], lambda: torch.zeros(4)),
    "same": (lambda base: base, lambda: torch.zeros(4, 4)),
}


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("name", ALIASES)
def test_tensors_that_shared_memory_load_into_ones_that_do_not(tmp_path, name, order):
    """Two saved views of one memory, whatever their shapes and dtypes, fill two separate targets rightly."""
    view, target = ALIASES[name]
    state = dict([("base", square()), ("view", None)][::order])
    state["view"] = view(square())
    state["base"], state["view"] = (base := square()), view(base)
    template = {key: square() * 0 if key == "base" else target() for key in state}
    read(save(tmp_path / "c", state), template)
    assert torch.equal(template["base"], state["base"])
    assert torch.equal(template["view"], state["view"])


def test_tied_templates_take_tied_and_untied_checkpoints(tmp_path):
    """Tensors tied in the template stay tied, whether they were tied when saved or merely equal."""
    for number, state in enumerate(
        [{"a": (t := torch.ones(3)), "b": t}, {"a": torch.ones(3), "b": torch.ones(3)}]
    ):
        path = save(tmp_path / str(number), state)
        tied = torch.zeros(3)
        template = read(path, {"a": tied, "b": tied})[0]
        assert template["a"] is template["b"] is tied
        assert tied.tolist() == [1, 1, 1]
        views = torch.zeros(3)
        read(path, {"a": views[:], "b": views.view(3)})
        assert views.tolist() == [1, 1, 1]


def saved(path, state, *, plain):
    """A checkpoint of ours, or one of plain ``torch.save``; its path."""
    if plain:
        path.mkdir()
        torch.save(state, path / "checkpoint_0.pt")
    else:
        save(path, state)
    return path


@pytest.mark.parametrize("plain", [False, True])
def test_tied_templates_refuse_different_values(tmp_path, plain):
    """Tensors that share memory in the template cannot hold two values: nothing is written."""
    state = {"a": torch.zeros(300_000), "b": torch.ones(300_000), "c": torch.zeros(300_000)}
    path = saved(tmp_path / "c", state, plain=plain)
    tied, views = torch.full((300_000,), 5.0), torch.full((300_100,), 5.0)
    for template in ({"a": tied, "b": tied}, {"a": views[100:], "c": views[:-100]}):
        with pytest.raises(MismatchError, match="shares memory"):
            read(path, template)
    assert torch.all(tied == 5)
    assert torch.all(views == 5)
    read(path, {"a": tied, "c": tied})
    assert not tied.any()


@pytest.mark.parametrize("plain", [False, True])
def test_inference_tensors_are_filled(tmp_path, plain):
    """Tensors made in inference mode are filled, in it and outside, whatever their strides."""
    state = {"a": torch.rand(3, 4), "b": torch.rand(3, 4), "c": torch.rand(4).expand(3, 4)}
    path = saved(tmp_path / "c", state, plain=plain)
    for inside in (False, True):
        with torch.inference_mode():
            template = {"a": torch.zeros(3, 4), "b": torch.zeros(4, 3).t(), "c": torch.zeros(4).expand(3, 4)}
        with torch.inference_mode(inside):
            read(path, template)
            assert all(torch.equal(template[key], value) for key, value in state.items())


def test_tied_expanded_tensors_of_plain_torch_save(tmp_path):
    """One number that stands for a whole tensor fills tied templates, if it was saved as the same for all."""
    (tmp_path / "c").mkdir()
    numbers = {key: torch.tensor(number) for key, number in (("a", 1.0), ("b", 1.0), ("c", 2.0))}
    state = {key: number.expand(3, 4) for key, number in numbers.items()}
    torch.save(state, tmp_path / "c" / "checkpoint_0.pt")
    tied = torch.tensor(0.0).expand(3, 4)
    with pytest.raises(MismatchError, match="c: expected the values of a, with which it shares memory"):
        read(tmp_path / "c", {"a": tied, "c": tied})
    read(tmp_path / "c", {"a": tied, "b": tied})
    assert torch.equal(tied, torch.ones(3, 4))


def test_columns_of_one_matrix_are_filled_apart(tmp_path):
    """Targets whose elements lie between one another's share no memory: each gets its own values."""
    path = save(tmp_path / "c", {"a": torch.zeros(40, 3), "b": torch.ones(40, 5)})
    matrix = torch.full((40, 8), 5.0)
    read(path, {"a": matrix[:, :3], "b": matrix[:, 3:]})
    assert not matrix[:, :3].any()
    assert torch.all(matrix[:, 3:] == 1)


def test_empty_tensors_and_empty_templates(tmp_path):
    """Tensors without elements fit by shape and dtype; an empty template loads nothing."""
    path = save(tmp_path / "c", {"a": torch.zeros(0, 3), "b": torch.zeros(3, 0).t(), "c": np.zeros((0, 2))})
    template = {"a": torch.ones(0, 3), "b": torch.ones(0, 3), "c": np.ones((0, 2))}
    read(path, template)
    assert read(path, {}) == ({}, [])
    with pytest.raises(MismatchError):
        read(path, {"a": torch.ones(3, 0)})


def test_the_version_counter_of_filled_tensors_moves(tmp_path):
    """Autograd notices that a tensor or parameter was filled: its version counter moves."""
    path = save(tmp_path / "c", {"p": torch.ones(2), "t": torch.ones(2)})
    parameter = torch.nn.Parameter(torch.full((2,), 3.0))
    tensor = torch.zeros(2)
    product = (parameter * parameter).sum()
    before = parameter._version, tensor._version
    read(path, {"p": parameter, "t": tensor})
    assert parameter._version > before[0]
    assert tensor._version > before[1]
    assert parameter.requires_grad
    assert parameter.tolist() == [1, 1]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_a_models_own_state_dict_is_a_template(tmp_path):
    """Loading into model.state_dict() changes the model itself, parameters, buffers and tied weights."""
    torch.manual_seed(0)

    def build():
        model = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 4), "b": torch.nn.Linear(4, 4)})
        model["b"].weight = model["a"].weight
        model["norm"] = torch.nn.BatchNorm1d(4)
        return model

    one, two = build(), build()
    path = save(tmp_path / "c", {"model": one.state_dict()})
    read(path, {"model": two.state_dict()}, strict=True)
    assert_same(one.state_dict(), two.state_dict())
    assert two["b"].weight is two["a"].weight
    parameters = dict(build().named_parameters())
    read(save(tmp_path / "p", dict(one.named_parameters())), parameters)
    assert_same(dict(one.named_parameters()), parameters)


def test_objects_are_replaced_by_equal_ones(tmp_path):
    """Sparse tensors, counters and scheduler states of a template are replaced by the saved ones."""
    state = object_values()
    template = object_values()
    template["counter"].clear()
    template["scheduler"]["last_epoch"] = 77
    assert_same(state, read(save(tmp_path / "c", state), template)[0])


def test_inference_tensors_can_be_filled(tmp_path):
    """A template made in inference mode can be loaded into."""
    path = save(tmp_path / "c", {"a": torch.ones(3)})
    with torch.inference_mode():
        template = {"a": torch.zeros(3)}
        read(path, template)
    assert template["a"].tolist() == [1, 1, 1]


def test_a_default_device_does_not_matter(tmp_path):
    """Saving and loading do not depend on torch's default device (a meta device, say)."""
    state = {
        "a": torch.arange(12.0).reshape(3, 4),
        "e": torch.zeros(0),
        "n": np.ones(2),
        "o": torch.arange(6).unfold(0, 3, 1),
        "r": torch.ones(2, requires_grad=True),
    }
    template = {
        "a": torch.zeros(4, 3).t(),
        "e": torch.zeros(0),
        "n": np.zeros(2),
        "o": torch.zeros(6, dtype=torch.int64).unfold(0, 3, 1),
        "r": torch.zeros(2),
    }
    with torch.device("meta"):
        path = save(tmp_path / "c", state)
        loaded = load(path)
        read(path, template)
    assert_same(state, loaded)
    assert all(torch.equal(torch.as_tensor(template[k]), torch.as_tensor(state[k])) for k in state)


def test_plain_values_of_a_template_may_be_of_other_exact_types(tmp_path):
    """Complex numbers, texts, bytes, sizes, dtypes and devices are replaced by those that were saved."""
    state = {
        "c": 1j, "s": "b", "b": b"x", "z": torch.Size([2]), "d": torch.float16, "v": torch.device("cuda:1"),
        "set": {1}, "long": b"x" * 100_000, "raw": np.array(["ab", "c"]),
    }  # fmt: skip
    template = {
        "c": 2j, "s": "", "b": b"", "z": torch.Size([]), "d": torch.int8, "v": torch.device("cpu"),
        "set": set(), "long": b"", "raw": np.array(["", "xy"]),
    }  # fmt: skip
    assert_same(state, read(save(tmp_path / "c", state), template)[0])


def test_tensors_that_cannot_be_saved_may_stand_in_no_template(tmp_path):
    """A template whose key could never have been saved simply reports it missing."""
    path = save(tmp_path / "c", {"a": 1})
    assert read(path, {"a": 0, ("x", 1): 5, object: 5})[1] == ["('x', 1)", str(object)]
    with pytest.raises(UnsupportedTypeError):
        save(tmp_path / "d", {object: 1})
