"""`data.pkl`: what plain ``torch.load`` sees of a rank's file, emitted from the index without torch.

The bytes are a pickle of protocol 2 in the dialect that ``torch.load(weights_only=True)`` accepts, and
without a memo: a tensor's part depends on nothing but its own description, so it is built once for each
layout and reused at every save, while all other values are written afresh.

It is a view. Kinds that torch's restricted unpickler refuses have a plain stand-in: a numpy scalar is a
number (or its bytes), a numpy array a tensor or bytes, a defaultdict a dict, an object its raw pickle.
The index is the truth.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable, Sequence
from typing import Any

from milepost.format.index import Tensors
from milepost.format.shards import dtype_bytes
from milepost.format.tree import Node, TreeDecoder, scalar_value

__all__ = ["emit", "tensor_fragments"]

# Opcodes of protocol 2, as in the documentation of CPython's pickletools.
_PROTO, _STOP, _MARK = b"\x80\x02", b".", b"("
_NONE, _TRUE, _FALSE = b"N", b"\x88", b"\x89"
_EMPTY_DICT, _EMPTY_LIST, _EMPTY_TUPLE = b"}", b"]", b")"
_SETITEMS, _APPENDS, _TUPLE, _TUPLE1, _TUPLE2 = b"u", b"e", b"t", b"\x85", b"\x86"
_REDUCE, _BUILD, _PERSISTENT = b"R", b"b", b"Q"

_LEGACY_STORAGE = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
    "complex128": "ComplexDoubleStorage",
    "complex64": "ComplexFloatStorage",
}
"""The storage classes of torch's older dtypes; newer ones are written as UntypedStorage and a dtype."""


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


_MAX_BYTES = 1 << 30
"""Longer bytes would not fit the one form of text that the restricted unpickler knows."""

_ORDERED_DICT = _global("collections", "OrderedDict") + _EMPTY_TUPLE + _REDUCE


def _int(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + bytes((value,))
    if 0 <= value < 65536:
        return b"M" + value.to_bytes(2, "little")
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + value.to_bytes(4, "little", signed=True)
    data = value.to_bytes((value.bit_length() >> 3) + 1, "little", signed=True)
    if len(data) > 255:  # the restricted unpickler knows no longer form
        return _str(hex(value))
    return b"\x8a" + bytes((len(data),)) + data


def _float(value: float) -> bytes:
    return b"G" + struct.pack(">d", value)


def _str(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + len(data).to_bytes(4, "little") + data


def _bytes(value: bytes) -> bytes:
    if len(value) > _MAX_BYTES:
        return _str(f"<{len(value)} bytes, which this view leaves out>")
    arguments = _str(value.decode("latin1")) + _str("latin1") + _TUPLE2
    return _global("_codecs", "encode") + arguments + _REDUCE


def _ints(values: Sequence[int]) -> bytes:
    return _MARK + b"".join([_int(value) for value in values]) + _TUPLE


def tensor_fragments(tensors: Tensors, lengths: Sequence[int]) -> list[bytes]:
    """The pickle of each tensor, as ``torch.save`` would describe it.

    Args:
        tensors: The columns of the index.
        lengths: Bytes of each record; record n is the storage with key ``str(n)``.
    """
    dtypes: dict[int, set[str]] = {}
    for record, dtype in zip(tensors.record, tensors.dtype, strict=True):
        dtypes.setdefault(record, set()).add(dtype)
    gradients, conjugates, negatives = set(tensors.requires_grad), set(tensors.conj), set(tensors.neg)
    fragments = []
    for number, (record, dtype) in enumerate(zip(tensors.record, tensors.dtype, strict=True)):
        size = dtype_bytes(dtype)
        length = lengths[record]
        plain = len(dtypes[record]) == 1 and length % size == 0
        legacy = _LEGACY_STORAGE.get(dtype) if plain else None
        parameter = tensors.kind[number] == "parameter"
        storage = (
            _MARK
            + _str("storage")
            + _global("torch" if legacy else "torch.storage", legacy or "UntypedStorage")
            + _str(str(record))
            + _str(tensors.device[number])
            + _int(length // size if legacy else length)
            + _TUPLE
            + _PERSISTENT
        )
        bits = [
            _str(name) + _TRUE for name, has in (("conj", conjugates), ("neg", negatives)) if number in has
        ]
        fragment = (
            _global("torch._utils", "_rebuild_tensor_v2" if legacy else "_rebuild_tensor_v3")
            + _MARK
            + storage
            + _int(tensors.byte_offset[number] // size)
            + _ints(tensors.shape[number])
            + _ints(tensors.stride[number])
            + (_TRUE if number in gradients and legacy and not parameter else _FALSE)  # v3 fails with True
            + _ORDERED_DICT
            + (b"" if legacy else _global("torch", dtype))
            + (_EMPTY_DICT + _MARK + b"".join(bits) + _SETITEMS if bits else b"")
            + _TUPLE
            + _REDUCE
        )
        if parameter:
            fragment = (
                _global("torch._utils", "_rebuild_parameter")
                + _MARK
                + fragment
                + (_TRUE if number in gradients else _FALSE)
                + _ORDERED_DICT
                + _TUPLE
                + _REDUCE
            )
        fragments.append(fragment)
    return fragments


def emit(tree: Node, fragments: Sequence[bytes], record_bytes: Callable[[int], bytes]) -> bytes:
    """The pickle of a whole tree.

    Args:
        tree: A tree as the index holds it.
        fragments: What `tensor_fragments` returned.
        record_bytes: Returns the bytes of a record that is no tensor.
    """
    return _PROTO + b"".join(_Emitter(fragments, record_bytes).value(tree, [])) + _STOP


class _Emitter:
    def __init__(self, fragments: Sequence[bytes], record_bytes: Callable[[int], bytes]) -> None:
        self._fragments = fragments
        self._keys: dict[str, bytes] = {}
        self._leaves: dict[str, Callable[[Node], bytes]] = {
            **_LEAVES,
            "array": lambda node: _bytes(record_bytes(node[1])),
            "blob": lambda node: _bytes(record_bytes(node[1])),
            "object": lambda node: _bytes(record_bytes(node[1])),
        }

    def value(self, node: Node, out: list[bytes]) -> list[bytes]:
        """Append the pickle of one node to `out`, and return `out`."""
        tag = node[0]
        if tag == "tensor":
            out.append(self._fragments[node[1]])
        elif tag in ("dict", "ordered", "default"):
            out.append(_ORDERED_DICT if tag == "ordered" else _EMPTY_DICT)
            out.append(_MARK)
            for key, value in node[1]:
                self.value(key, out)
                self.value(value, out)
            out.append(_SETITEMS)
            if tag == "ordered" and node[2] is not None:
                self.value(node[2], out)
                out.append(_BUILD)
        elif tag == "list":
            out += (_EMPTY_LIST, _MARK)
            for item in node[1]:
                self.value(item, out)
            out.append(_APPENDS)
        elif tag == "tuple":
            out.append(_MARK)
            for item in node[1]:
                self.value(item, out)
            out.append(_TUPLE)
        elif tag == "set":
            out += (_global("__builtin__", "set"), _EMPTY_LIST, _MARK)
            for item in node[1]:
                self.value(item, out)
            out += (_APPENDS, _TUPLE1, _REDUCE)
        elif tag == "str" and node[1] is not None:
            text = node[1]
            data = self._keys.get(text)
            if data is None:
                data = self._keys[text] = _str(text)
            out.append(data)
        else:
            out.append(self._leaves[tag](node))
        return out


_NATIVE = TreeDecoder()


def _scalar(node: Node) -> bytes:
    value = scalar_value(node)
    if isinstance(value, bytes):
        return _bytes(value)
    if isinstance(value, float):
        return _float(value)
    return (_TRUE if value else _FALSE) if isinstance(value, bool) else _int(value)


def _complex(node: Node) -> bytes:
    value: complex = _NATIVE.decode(node)
    parts = _float(value.real) + _float(value.imag) + _TUPLE2
    return _global("__builtin__", "complex") + parts + _REDUCE


def _device(node: Node) -> bytes:
    kind, _, number = node[1].partition(":")
    arguments = _str(kind) + _int(int(number)) + _TUPLE2 if number else _str(kind) + _TUPLE1
    return _global("torch", "device") + arguments + _REDUCE


_LEAVES: dict[str, Callable[[Any], bytes]] = {
    "none": lambda _: _NONE,
    "bool": lambda node: _TRUE if node[1] else _FALSE,
    "int": lambda node: _int(_NATIVE.decode(node)),
    "float": lambda node: _float(_NATIVE.decode(node)),
    "complex": _complex,
    "str": lambda node: _str(_NATIVE.decode(node)),
    "bytes": lambda node: _bytes(base64.b64decode(node[1])),
    "size": lambda node: _global("torch", "Size") + _ints(node[1]) + _TUPLE1 + _REDUCE,
    "dtype": lambda node: _global("torch", node[1]),
    "device": _device,
    "scalar": _scalar,
}
