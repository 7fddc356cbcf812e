"""States of every kind, and a comparison that misses no bit."""

from __future__ import annotations

import io
import struct
import warnings
from collections import Counter, OrderedDict, defaultdict
from contextlib import suppress
from functools import cache
from typing import Any

import numpy as np
import torch


def make_state(number: int) -> dict[Any, Any]:
    """A state dict of every storage form in a few hundred bytes: tensors, arrays, objects, values."""
    weight = torch.arange(12, dtype=torch.float32).reshape(3, 4) + 100 * number
    return {
        "weight": weight,
        "tied": weight,
        "row": weight[1],
        "transposed": weight.T,
        "bfloat": torch.full((5,), number, dtype=torch.bfloat16),
        "conj": torch.tensor([1 + 2j, 3 - 4j]).conj() * number,
        "empty": torch.zeros(0, 3),
        "sparse": torch.eye(2).to_sparse() * number,
        "array": np.arange(4, dtype=np.int16) * number,
        "words": np.array(["ab", f"{number:04}"]),
        "numbers": [number, number / 3, 2**70 + number, float("nan"), None, (True, b"\0\xff")],
        1: {"text": f"état {number}", None: -0.0},
    }


def raw_bytes(tensor):
    """The bytes of each element of a strided tensor, in order of index, whatever its dtype and bits."""
    if tensor.numel() == 0:
        return b""
    size = tensor.element_size()
    storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    elements = storage.as_strided(
        (*tensor.shape, size),
        (*(step * size for step in tensor.stride()), 1),
        tensor.storage_offset() * size,
    )
    return elements.clone(memory_format=torch.contiguous_format).numpy().tobytes()


def differences(a, b, where="state"):
    """Where two values differ in type, structure, order or any bit; an empty list if nowhere."""
    if type(a) is not type(b):
        return [f"{where}: {type(a)} and {type(b)}"]
    if isinstance(a, torch.Tensor):
        return _tensor_differences(a, b, where)
    if isinstance(a, np.ndarray | np.generic):
        facts = [(x.dtype, x.dtype.str, x.shape, x.tobytes()) for x in (a, b)]
        return [] if facts[0] == facts[1] else [f"{where}: {facts}"]
    if isinstance(a, dict):
        found = []
        if isinstance(a, defaultdict) and a.default_factory is not b.default_factory:
            found.append(f"{where}: factories {a.default_factory} and {b.default_factory}")
        if isinstance(a, OrderedDict):
            found += differences(dict(vars(a)), dict(vars(b)), f"{where}.__dict__")
        if len(a) != len(b):
            return [*found, f"{where}: keys {list(a)} and {list(b)}"]
        for (key, one), (other_key, other) in zip(a.items(), b.items(), strict=True):
            found += differences(key, other_key, f"{where} key {key!r}")
            found += differences(one, other, f"{where}[{key!r}]")
        return found
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [f"{where}: {len(a)} and {len(b)} items"]
        return [
            text
            for n, pair in enumerate(zip(a, b, strict=True))
            for text in differences(*pair, f"{where}[{n}]")
        ]
    if isinstance(a, float):
        return [] if struct.pack(">d", a) == struct.pack(">d", b) else [f"{where}: {a!r} and {b!r}"]
    if isinstance(a, complex):
        same = struct.pack(">dd", a.real, a.imag) == struct.pack(">dd", b.real, b.imag)
        return [] if same else [f"{where}: {a!r} and {b!r}"]
    return [] if a == b else [f"{where}: {a!r} and {b!r}"]


def _tensor_differences(a, b, where):
    facts = [(x.dtype, x.layout, x.is_quantized, x.is_nested, x.requires_grad, str(x.device)) for x in (a, b)]
    if facts[0] != facts[1]:
        return [f"{where}: {facts[0]} and {facts[1]}"]
    a, b = a.detach(), b.detach()
    if hasattr(a, "to_local"):  # DTensors: what this rank holds
        a, b = a.to_local(), b.to_local()
    if a.is_nested:
        return differences(list(a.unbind()), list(b.unbind()), where)
    if a.shape != b.shape:
        return [f"{where}: shapes {a.shape} and {b.shape}"]
    if a.layout is torch.sparse_coo:
        parts = [(x._indices(), x._values(), x.is_coalesced()) for x in (a, b)]
        return differences(*parts, where)
    if a.layout in (torch.sparse_csr, torch.sparse_bsr):
        return differences(*[(x.crow_indices(), x.col_indices(), x.values()) for x in (a, b)], where)
    if a.layout in (torch.sparse_csc, torch.sparse_bsc):
        return differences(*[(x.ccol_indices(), x.row_indices(), x.values()) for x in (a, b)], where)
    if a.is_quantized:
        schemes = [
            (x.qscheme(), x.q_scale(), x.q_zero_point())
            if x.qscheme() is torch.per_tensor_affine
            else (x.qscheme(), x.q_per_channel_scales().tolist(), x.q_per_channel_zero_points().tolist())
            for x in (a, b)
        ]
        found = [] if schemes[0] == schemes[1] else [f"{where}: {schemes}"]
        return found + differences(a.int_repr(), b.int_repr(), where)
    bits = [(x.is_conj(), x.is_neg()) for x in (a, b)]
    if bits[0] != bits[1]:
        return [f"{where}: conj and neg {bits}"]
    if a.numel() and a.stride() != b.stride():
        return [f"{where}: strides {a.stride()} and {b.stride()}"]
    return [] if raw_bytes(a) == raw_bytes(b) else [f"{where}: other values"]


def same(a, b):
    """Whether two values are the same, bit for bit."""
    return not differences(a, b)


def assert_same(a, b):
    found = differences(a, b)
    assert not found, "; ".join(found[:10])


def tensors_in(value):
    """All tensors and arrays of a state dict in order, repeated objects included."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return []
    return [tensor for item in value for tensor in tensors_in(item)]


def sharing(value):
    """For each pair of dense tensors whose memory overlaps: their numbers, and how far apart they start."""
    spans = []
    for number, tensor in enumerate(tensors_in(value)):
        if isinstance(tensor, np.ndarray) or tensor.layout is not torch.strided or tensor.is_nested:
            continue
        if tensor.numel():
            reach = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            start = tensor.data_ptr()
            spans.append((number, start, start + reach * tensor.element_size()))
    return [
        (a, b, start_b - start_a)
        for a, start_a, end_a in spans
        for b, start_b, end_b in spans
        if a < b and start_a < end_b and start_b < end_a
    ]


def all_dtypes():
    """Each dtype of this torch but the quantised ones, by name."""
    found = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    return [found[name] for name in sorted(found) if not name.startswith("torch.q")]


@cache
def savable_dtypes():
    """Those of which torch.save can save a tensor, and torch.load load it."""
    found = []
    for dtype in all_dtypes():
        file = io.BytesIO()
        with suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of dtypes that torch calls experimental
            torch.save(torch.zeros(16, dtype=torch.uint8).view(dtype), file)
            file.seek(0)
            torch.load(file)
            found.append(dtype)
    return found


def torch_parts(placement, tensor, count):
    """What torch gives each of `count` ranks of a tensor.

    Torch 2.7 divides strided shards only if that is even. Others are no examples there, for hypothesis, and
    a skip for a test without it.
    """
    import pytest
    from hypothesis import currently_in_test_context, reject

    try:
        return placement._split_tensor(tensor, count, with_padding=False, contiguous=True)[0]
    except AssertionError as error:
        if "only allows even sharding" not in str(error):
            raise
        if currently_in_test_context():
            reject()
        pytest.skip(f"torch {torch.__version__}: {error}")


def bytes_tensor(dtype, shape, seed=0):
    """A tensor of a dtype with arbitrary bytes (for bool: with 0 and 1)."""
    generator = torch.Generator().manual_seed(seed)
    count = int(np.prod(shape, dtype=int))
    data = torch.randint(0, 2 if dtype is torch.bool else 256, (count * 16,), generator=generator)
    data = data.to(torch.uint8)[: count * dtype.itemsize]
    return data.view(dtype).as_strided(shape, torch.empty(shape, device="meta").stride())


def native_values():
    """A value of each native kind, and the difficult ones of each."""
    nan = struct.unpack(">d", bytes.fromhex("7ff8dead00beef01"))[0]
    ordered = OrderedDict([("b", 1), ("a", 2)])
    ordered._metadata = OrderedDict([("", {"version": 1}), ("layer", {"version": 2})])
    return {
        "none": None,
        "bools": [True, False],
        "ints": [0, -1, 255, 256, 65535, 65536, 2**31 - 1, -(2**31), 2**31, 2**63 - 1, -(2**63)],
        "wide": [2**63, -(2**63) - 1, 2**64, 1 << 2000, -(1 << 2032), 1 << 2040],
        "long": [10**5000, -(10**5000)],
        "floats": [0.0, -0.0, 0.1, 1e308, 5e-324, float("inf"), float("-inf"), float("nan"), nan, -nan],
        "complexes": [1 + 2j, complex(float("nan"), float("-inf")), complex(-0.0, 0.0)],
        "texts": ["", "ä🙂\x00\u2028", "x" * 70000],
        "surrogates": ["\ud800", "a\udfff\ud800z"],
        "bytes": [b"", bytes(range(256)), b"\xff" * 70000],
        "list": [[], [1, [2, [3]]]],
        "tuple": ((), (1, (2, [3]))),
        "set": [set(), {1, "a", (2, None), 2.5}],
        "dict": {"b": 1, "a": {}, "": {"": 2}},
        "keys": {
            1: "int", "1": "text", None: "none", (1, ("a", None)): "tuple", False: "false", 2**70: "wide",
            2.5: "float", 1j: "complex", b"k": "bytes", "\udc80": "surrogate",
            torch.float32: "dtype", torch.device("cpu"): "device", torch.Size([1, 2]): "size",
        },
        "ordered": ordered,
        "plain ordered": OrderedDict([(2, "two"), (1, "one")]),
        "defaults": [defaultdict(list, {"a": [1]}), defaultdict(None, {"b": 2}), defaultdict(int)],
        "size": torch.Size([2, 0, 3]),
        "dtypes": [torch.float32, torch.bfloat16, torch.complex64, torch.uint16, torch.bool],
        "devices": [torch.device("cpu"), torch.device("cuda", 1), torch.device("meta")],
        "scalars": [
            np.float64(0.1), np.float32("nan"), np.float16(1.5), np.int8(-3), np.uint64(2**64 - 1),
            np.bool_(True), np.complex64(1 + 2j), np.complex128(1j), np.longdouble(0.1),
            np.datetime64("2024-01-02T03:04:05", "ns"), np.timedelta64(5, "s"), np.str_("tëxt"),
            np.bytes_(b"ab"), np.float64("-inf"), np.array((1, 2.5), dtype="i4,f8")[()],
        ],
    }  # fmt: skip


def array_values():
    """Numpy arrays of every sort that can be saved."""
    structured = np.dtype([("id", "<i4"), ("at", "<f8", (2,)), ("name", "U3")])
    return {
        "plain": [
            np.arange(6, dtype=name).reshape(2, 3)
            for name in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16")
        ],
        "bool": np.array([True, False]),
        "empty": np.zeros((3, 0), dtype="f4"),
        "point": np.array(3.5),
        "structured": np.array([(1, (2.0, 3.0), "ab"), (4, (5.0, 6.0), "ç")], dtype=structured),
        "times": np.array(["2024-01-02", "NaT"], dtype="M8[D]"),
        "spans": np.array([1, 2], dtype="m8[us]"),
        "texts": np.array(["a", "bcd"]),
        "bytes": np.array([b"a", b"bcd"]),
        "big-endian": np.arange(4, dtype=">f4"),
        "long double": np.array([0.1, 0.2], dtype=np.longdouble),
        "void": np.zeros(3, dtype="V5"),
        "no texts": np.zeros((0, 2), dtype="U4"),
    }


def object_values():
    """Values that are no native kind, but can be read back without running code."""
    layer = torch.nn.Linear(2, 2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD(layer.parameters(), lr=0.1), 5)
    scheduler.base_lrs = [np.float64(0.1)]
    return {
        "counter": Counter("hello"),
        "scheduler": scheduler.state_dict(),
        "random": np.random.default_rng(1).bit_generator.state,
        "legacy random": np.random.RandomState(2).get_state(),
        "coo": torch.eye(3).to_sparse(),
        "coo unsorted": torch.sparse_coo_tensor([[1, 0, 1]], [1.0, 2.0, 3.0], (2,), check_invariants=True),
        "csr": torch.eye(3, dtype=torch.float64).to_sparse_csr(),
        "csc": torch.eye(3).to_sparse_csc(),
    }
