"""What is saved is what is loaded: every kind of value and tensor, bit for bit."""

from __future__ import annotations

import os
import warnings
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from support.saves import data_file, index_of, load, round_trip, save, torch_load
from support.states import (
    all_dtypes,
    array_values,
    assert_same,
    bytes_tensor,
    native_values,
    object_values,
    savable_dtypes,
    sharing,
)

from milepost.errors import StateError
from milepost.format.shards import dtype_bytes

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore:.*:UserWarning")


def quantised():
    plain = torch.tensor([[0.1, -0.2], [0.3, 4.0]])
    return {
        "per tensor": torch.quantize_per_tensor(plain, 0.1, 10, torch.quint8),
        "signed": torch.quantize_per_tensor(plain, 0.1, 0, torch.qint8),
        "wide": torch.quantize_per_tensor(plain, 0.1, 0, torch.qint32),
        "per channel": torch.quantize_per_channel(
            plain, torch.tensor([0.1, 0.2]), torch.tensor([0, 1]), 0, torch.qint8
        ),
    }


def nested():
    return {
        "nested": torch.nested.nested_tensor([torch.arange(3.0), torch.arange(5.0)]),
        "matrices": torch.nested.nested_tensor([torch.ones(2, 3), torch.zeros(1, 3)]),
    }


def blocks():
    plain = torch.arange(16.0).reshape(4, 4)
    return {"bsr": plain.to_sparse_bsr((2, 2)), "bsc": plain.to_sparse_bsc((2, 2))}


@pytest.mark.parametrize("verify", [True, False, "first"])
@pytest.mark.parametrize(
    "make", [native_values, array_values, object_values, nested, blocks], ids=lambda make: make.__name__
)
def test_values_of_every_kind_come_back(tmp_path, make, verify):
    """Every native kind, array and readable object loads as it was saved: type, order and each bit."""
    state = make()
    assert_same(make(), round_trip(tmp_path, state, verify=verify))
    assert_same(make(), state)


def test_quantised_tensors_come_back_if_torch_saves_them(tmp_path):
    """Quantised tensors are saved exactly where torch's own save and load can do it."""
    for name, tensor in quantised().items():
        try:
            torch.save(tensor, tmp_path / "plain")
            torch.load(tmp_path / "plain")
        except Exception:
            continue
        assert_same({"q": tensor}, round_trip(tmp_path / name, {"q": tensor}))


def test_every_dtype_that_torch_saves_comes_back(tmp_path):
    """A tensor of each dtype that torch.save takes loads bit for bit, of any number of dimensions."""
    dtypes = savable_dtypes()
    assert {torch.float8_e4m3fn, torch.bfloat16, torch.complex32, torch.uint64, torch.bits16} <= {*dtypes}
    shapes = [(), (1,), (7,), (3, 5), (2, 0, 3), (0,)]
    state = {
        str(dtype): [bytes_tensor(dtype, shape, seed) for seed, shape in enumerate(shapes)]
        for dtype in dtypes
    }
    loaded = round_trip(tmp_path, state)
    assert_same(state, loaded)
    assert_same(state, torch_load(tmp_path / "checkpoint"))
    assert_same(state, torch_load(tmp_path / "checkpoint", mmap=True))


def test_gradients_and_conjugates_of_every_dtype_come_back(tmp_path):
    """What requires a gradient or is conjugated does so again; torch.load reads these files too."""
    numbers = [dtype for dtype in savable_dtypes() if dtype.is_floating_point or dtype.is_complex]
    state = {
        "gradients": [bytes_tensor(dtype, (3,)).requires_grad_() for dtype in numbers],
        "parameters": [torch.nn.Parameter(bytes_tensor(dtype, (3,))) for dtype in numbers],
        "conjugates": [bytes_tensor(dtype, (3,)).conj() for dtype in numbers if dtype.is_complex],
    }
    floats = torch.arange(8.0)
    state["two dtypes"] = [floats.view(torch.int32), floats.requires_grad_()]
    assert_same(state, round_trip(tmp_path, state))
    plain = torch_load(tmp_path / "checkpoint")
    for name, tensors in state.items():  # torch.load fails on gradients of newer dtypes
        assert_same([t.detach() for t in tensors], [t.detach() for t in plain[name]])
    assert all(parameter.requires_grad for parameter in plain["parameters"])


@pytest.mark.parametrize("dtype", all_dtypes(), ids=str)
def test_a_dtype_is_refused_only_if_torch_cannot_save_it(dtype, tmp_path):
    """Of each dtype of this torch a tensor is saved exactly if torch.save takes it."""
    tensor = torch.zeros(16, dtype=torch.uint8).view(dtype)
    if dtype in savable_dtypes():
        assert_same(tensor, round_trip(tmp_path, {"t": tensor})["t"])
        assert dtype_bytes(str(dtype).removeprefix("torch.")) == dtype.itemsize
    else:
        with pytest.raises(StateError, match="cannot save"):
            save(tmp_path / "c", {"t": tensor})


def test_nan_payloads_survive(tmp_path):
    """Every bit pattern of a NaN in a tensor, array or float is kept."""
    bits = torch.tensor([0x7FC00001, 0x7F800001, -0x3FFFFF, 0x7FFFFFFF], dtype=torch.int32)
    state = {"tensor": bits.view(torch.float32), "array": bits.numpy().view(np.float32)}
    assert_same(state, round_trip(tmp_path, state))


def views():
    base = torch.arange(24.0).reshape(4, 6)
    flat = torch.arange(100)
    values = torch.tensor([1 + 2j, 3 - 4j])
    return {
        "base": base,
        "transposed": base.t(),
        "column": base[:, 2],
        "gaps": base[::2, ::3],
        "expanded": torch.arange(3.0).expand(5, 3),
        "scalar expanded": torch.tensor(2.5).expand(4, 4),
        "overlapping": flat.as_strided((4, 5), (2, 1), 3),
        "window": torch.arange(10.0).unfold(0, 3, 1),
        "alone": torch.arange(1000)[500:510:3],
        "conjugate": values.conj(),
        "imaginary": torch.view_as_real(torch.tensor([1 + 1j])),
        "negative": torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
        "channels last": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "permuted": torch.rand(2, 3, 4).permute(2, 0, 1),
        "one": torch.rand(1, 3, 1).transpose(0, 2),
        "empty view": flat[50:50],
        "empty strided": torch.empty(0, 4).t(),
    }


@pytest.mark.parametrize("verify", [True, False])
def test_views_keep_shape_strides_and_values(tmp_path, verify):
    """Transposed, expanded, overlapping, gapped, conjugate and negative views load with their strides."""
    state = views()
    loaded = round_trip(tmp_path, state, verify=verify)
    assert_same(state, loaded)
    assert sharing(loaded) == sharing(state)
    assert loaded["conjugate"].is_conj()
    assert loaded["negative"].is_neg()


def test_tied_and_overlapping_tensors_stay_tied(tmp_path):
    """Tensors that share memory share it after loading, in the same places; others do not."""
    base = torch.arange(20.0)
    state = {
        "whole": base,
        "again": base,
        "head": base[:10],
        "middle": base[5:15],
        "other": base.clone(),
        "apart": [torch.arange(9)[:3], torch.arange(9)[6:]],
    }
    loaded = round_trip(tmp_path, state)
    assert_same(state, loaded)
    assert sharing(loaded) == sharing(state)
    loaded["middle"].fill_(-1)
    assert loaded["whole"][5:15].eq(-1).all()
    assert loaded["head"][5:].eq(-1).all()
    assert not loaded["other"].eq(-1).any()


def test_the_same_object_stays_one_object(tmp_path):
    """A tensor, parameter or array that occurs twice is one object after loading."""
    weight = torch.nn.Parameter(torch.ones(2))
    frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    array, tensor = np.ones(3), torch.zeros(2, requires_grad=True)
    state = {"a": [weight, frozen, array, tensor], "b": {"w": weight, "f": frozen, "n": array, "t": tensor}}
    loaded = round_trip(tmp_path, state)
    assert_same(state, loaded)
    for one, two in zip(loaded["a"], loaded["b"].values(), strict=True):
        assert one is two


def test_parts_of_one_storage_that_do_not_touch_are_saved_apart(tmp_path):
    """Two views of one storage that do not overlap are records of their own, without what lies between."""
    base = torch.zeros(1 << 20)
    path = save(tmp_path / "c", {"a": base[:4], "b": base[-4:]})
    assert sorted(index_of(path).records.length) == [16, 16]
    assert os.path.getsize(data_file(path)) < 8000


def test_a_view_of_a_large_storage_is_a_small_file(tmp_path):
    """A one-element view of a 4 MB storage is saved as one element, not as its storage."""
    state = {"view": torch.arange(1 << 20, dtype=torch.float32)[77_777:77_778]}
    path = save(tmp_path / "c", state)
    assert os.path.getsize(data_file(path)) < 8000
    assert_same(state, load(path))
    assert_same(state, torch_load(path))


def test_one_storage_under_several_dtypes(tmp_path):
    """Views of one storage under two dtypes, also ones of odd lengths, load as views of one storage."""
    base = torch.arange(32, dtype=torch.uint8)
    state = {
        "bytes": base,
        "ints": base.view(torch.int32),
        "floats": base.view(torch.float32)[2:4],
        "odd": [base[16:31].clone(), base[3:17]],
    }
    loaded = round_trip(tmp_path, state)
    assert_same(state, loaded)
    assert sharing(loaded) == sharing(state)
    loaded["bytes"].zero_()
    assert not loaded["ints"].any()
    plain = torch_load(tmp_path / "checkpoint")
    assert_same(state, plain)
    assert sharing(plain) == sharing(state)


def test_views_that_start_off_their_elements_boundary(tmp_path):
    """A wide view whose extent begins within another's narrow bytes keeps its alignment in the record."""
    base = torch.arange(64, dtype=torch.uint8)
    state = {"wide": base[8:40].view(torch.float64), "narrow": base[11:20], "tail": base[39:43]}
    loaded = round_trip(tmp_path, state)
    assert_same(state, loaded)
    assert sharing(loaded) == sharing(state)
    assert_same(state, torch_load(tmp_path / "checkpoint"))


def test_parameters_and_gradients(tmp_path):
    """Parameters stay parameters, and requires_grad is kept, for tensors and parameters alike."""
    state = {
        "p": torch.nn.Parameter(torch.ones(2)),
        "f": torch.nn.Parameter(torch.ones(2), requires_grad=False),
        "t": torch.ones(2, requires_grad=True),
        "of a view": torch.nn.Parameter(torch.arange(6.0).reshape(2, 3).t()),
        "computed": torch.ones(2, requires_grad=True) * 2,
    }
    loaded = round_trip(tmp_path, state)
    assert_same(state, loaded)
    assert loaded["computed"].is_leaf
    assert_same({**state, "computed": loaded["computed"]}, torch_load(tmp_path / "checkpoint"))


def train(optimizer_class, **options):
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
    optimizer = optimizer_class(model.parameters(), **options)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, np.float64(0.5))
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()
        scheduler.step()
    return model, optimizer, scheduler


@pytest.mark.parametrize(
    ("optimizer_class", "options"),
    [
        (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
        (torch.optim.Adagrad, {}),
        (torch.optim.LBFGS, {"lr": torch.tensor(0.1)}),
    ],
    ids=["AdamW", "SGD", "Adagrad", "LBFGS"],
)
def test_real_modules_and_optimizers(tmp_path, optimizer_class, options):
    """A trained module, its optimizer and its scheduler load into new ones and continue bit for bit."""
    if optimizer_class is torch.optim.LBFGS:
        model = torch.nn.Linear(3, 1)
        optimizer = optimizer_class(model.parameters(), **options)

        def closure():
            optimizer.zero_grad()
            loss = model(torch.ones(2, 3)).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        assert_same(state, round_trip(tmp_path, state))
        return
    model, optimizer, scheduler = train(optimizer_class, **options)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    state = {name: part.state_dict() for name, part in parts.items()}
    loaded = round_trip(tmp_path, state)
    assert_same(state, loaded)
    assert loaded["model"]._metadata == state["model"]._metadata
    fresh_model, fresh_optimizer, fresh_scheduler = train(optimizer_class, **options)
    for part, name in zip((fresh_model, fresh_optimizer, fresh_scheduler), parts, strict=True):
        part.load_state_dict(loaded[name])
    data = torch.randn(5, 4)
    for one_model, one_optimizer in ((model, optimizer), (fresh_model, fresh_optimizer)):
        one_optimizer.zero_grad()
        one_model(data).square().mean().backward()
        one_optimizer.step()
    assert_same(model.state_dict(), fresh_model.state_dict())
    assert_same(optimizer.state_dict(), fresh_optimizer.state_dict())


def test_random_states_continue_the_same_numbers(tmp_path):
    """The states of torch's, numpy's and Python's generators load to continue with the same numbers."""
    import random

    generator, legacy = np.random.default_rng(3), np.random.RandomState(4)
    state = {
        "torch": torch.get_rng_state(),
        "numpy": generator.bit_generator.state,
        "legacy": legacy.get_state(),
        "python": random.getstate(),
    }
    loaded = round_trip(tmp_path, state)
    expected = (torch.rand(3), generator.random(3), legacy.rand(3), random.random())
    torch.set_rng_state(loaded["torch"])
    generator.bit_generator.state = loaded["numpy"]
    legacy.set_state(loaded["legacy"])
    random.setstate(loaded["python"])
    assert_same(expected, (torch.rand(3), generator.random(3), legacy.rand(3), random.random()))


def test_numpy_views_and_read_only_arrays(tmp_path):
    """Strided, reversed, Fortran-ordered, read-only and shared numpy arrays load with equal values."""
    base = np.arange(24.0).reshape(4, 6)
    read_only = np.arange(3)
    read_only.flags.writeable = False
    state = {
        "base": base,
        "columns": base[:, ::2],
        "reversed": base[::-1],
        "fortran": np.asfortranarray(base),
        "read only": read_only,
        "broadcast": np.broadcast_to(np.float32(2), (3, 3)),
        "big": base.astype(">f8")[:, 1:3],
    }
    loaded = round_trip(tmp_path, state)
    for name, array in state.items():
        assert loaded[name].dtype == array.dtype
        assert np.array_equal(loaded[name], array)
        assert loaded[name].flags.writeable
    loaded["base"][0, 0] = -1
    assert loaded["columns"][0, 0] == -1


def test_a_numpy_array_over_a_tensors_memory_stays_over_it(tmp_path):
    """A numpy array and a tensor over the same memory share it after loading."""
    tensor = torch.arange(4.0)
    loaded = round_trip(tmp_path, {"t": tensor, "n": tensor.numpy()})
    loaded["t"][0] = 9
    assert loaded["n"][0] == 9


def test_large_bytes_are_kept_out_of_the_index(tmp_path):
    """Bytes of more than 64 KiB get a record of their own and come back equal."""
    data = os.urandom(300_000)
    path = save(tmp_path / "c", {"data": data, "again": [data, b"small"]})
    assert os.path.getsize(f"{path}/index_0.json") < 4000
    assert load(path) == {"data": data, "again": [data, b"small"]}


def test_empty_texts_of_numpy_come_back(tmp_path):
    """Scalars of text without a character, of which numpy gives one byte or four, are saved and load."""
    state = {"texts": [np.str_(""), np.bytes_(b""), np.array(["", "a"])[0]]}
    assert_same(state, round_trip(tmp_path, state))


def test_an_empty_state_dict(tmp_path):
    """An empty state dict, and one without tensors, are checkpoints like any other."""
    assert round_trip(tmp_path, {}) == {}
    assert round_trip(tmp_path, {"a": 1}) == {"a": 1}
    assert torch_load(tmp_path / "checkpoint") == {"a": 1}


def test_top_level_ordered_dicts_keep_their_type(tmp_path):
    """A state dict that is an OrderedDict or a defaultdict itself loads as one."""
    for number, state in enumerate([OrderedDict(b=1, a=2), defaultdict(list, a=[1])]):
        assert_same(state, round_trip(tmp_path / str(number), state))


def test_many_tensors_of_many_sizes(tmp_path):
    """Hundreds of tensors whose sizes straddle chunks, blocks and alignments load bit for bit."""
    sizes = [0, 1, 63, 64, 65, 4095, 4096, 4097, 262143, 262144, 262145, (1 << 20) - 1, 1 << 20, 3_000_001]
    state = {str(size): bytes_tensor(torch.uint8, (size,), size) for size in sizes}
    state["many"] = [bytes_tensor(torch.int16, (n % 37,), n) for n in range(400)]
    assert_same(state, round_trip(tmp_path, state))
    assert_same(state, torch_load(tmp_path / "checkpoint"))


def test_files_larger_than_the_ring_of_blocks(tmp_path):
    """A state of several times the writer's block size, cut at odd places, loads bit for bit."""
    state = {
        "a": bytes_tensor(torch.uint8, (17_000_003,), 1),
        "b": bytes_tensor(torch.int32, (13_000_001,), 2),
    }
    assert_same(state, round_trip(tmp_path, state))


def as_plain_torch(value):
    """What plain torch.load is documented to show of a value."""
    if isinstance(value, np.generic):
        kind = value.dtype.kind
        if value.dtype.isnative and (kind in "biu" or (kind == "f" and value.dtype.itemsize <= 8)):
            return value.item()
        return value.tobytes()
    if isinstance(value, np.ndarray):
        try:
            return torch.from_numpy(value.copy())
        except (TypeError, ValueError):
            return value.tobytes()
    if isinstance(value, int) and abs(value).bit_length() > 2039:
        return hex(value)
    if isinstance(value, OrderedDict):
        plain = OrderedDict((as_plain_torch(k), as_plain_torch(v)) for k, v in value.items())
        vars(plain).update(vars(value))
        return plain
    if isinstance(value, dict):
        return {as_plain_torch(k): as_plain_torch(v) for k, v in value.items()}
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(as_plain_torch(item) for item in value)
    return value


@pytest.mark.parametrize("options", [{}, {"mmap": True}, {"weights_only": False}], ids=str)
@pytest.mark.parametrize("make", [native_values, array_values, views], ids=lambda make: make.__name__)
def test_plain_torch_load_shows_equal_values(tmp_path, make, options):
    """torch.load, restricted, mapped or not, opens the file and shows equal values or their stand-ins."""
    warnings.simplefilter("ignore")
    state = make()
    plain = torch_load(save(tmp_path / "c", state), **options)
    assert_same(as_plain_torch(state), plain)


def test_plain_torch_load_shows_objects_as_their_pickle(tmp_path):
    """In torch.load's view an object is the bytes of its pickle, and the rest of the state is whole."""
    plain = torch_load(save(tmp_path / "c", {"sparse": torch.eye(2).to_sparse(), "t": torch.ones(2)}))
    assert isinstance(plain["sparse"], bytes)
    assert plain["sparse"].startswith(b"\x80\x02")
    assert plain["t"].tolist() == [1, 1]


def test_objects_hold_tensors_that_share_with_the_state(tmp_path):
    """A tensor inside an object loads with its values, also when it is a view of one outside it."""
    base = torch.arange(6.0)
    sparse = torch.sparse_coo_tensor(torch.tensor([[0, 2]]), base[1:3], (4,), is_coalesced=True)
    state = {"base": base, "sparse": sparse, "again": sparse}
    assert_same(state, round_trip(tmp_path, state))


def test_tensor_subclasses_never_lose_their_class_in_silence(tmp_path):
    """A tensor subclass that is allowed loads as its class; one that is not allowed is refused."""
    buffer = torch.nn.Buffer(torch.ones(2))
    loaded = round_trip(tmp_path, {"b": torch.nn.Module().state_dict(), "buffer": buffer})
    assert type(loaded["buffer"]) is type(buffer)
