"""Limits on what a checkpoint may hold, and the forms of the texts in it. Torch-free.

A save checks what it is about to write with these functions, and a load checks what it has read with the
same ones. So a state that can be saved can be loaded, and a file that somebody has forged reaches numpy,
torch and Python's hash tables only within these limits.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Collection, Sequence
from functools import lru_cache
from math import prod
from typing import Any

__all__ = [
    "MAX_DEPTH",
    "MAX_DIMS",
    "MAX_EQUAL_HASHES",
    "MAX_INDEX_BYTES",
    "MAX_INT",
    "MAX_METADATA_BYTES",
    "MAX_NAME",
    "MAX_OBJECT_DEPTH",
    "MAX_OBJECT_WORK",
    "crowded",
    "excess",
    "is_array",
    "is_device",
    "is_dtype",
    "is_hex",
    "is_int",
    "numpy_size",
    "sizes_fit",
]

MAX_DEPTH = 200
"""Containers may be nested this deep."""

MAX_INDEX_BYTES = 1 << 30
"""An index has no more bytes."""

MAX_METADATA_BYTES = 1 << 26
"""The metadata of a save have no more bytes: every index has them, and the manifest."""

MAX_NODES = 1 << 26
"""An index has no more JSON arrays, which is what the nodes of a tree are."""

MAX_DIMS = 64
"""Arrays and tensors have no more dimensions, as in numpy and torch."""

MAX_INT = (1 << 63) - 1

MAX_NAME = 1024
"""The name of the class of an object has no more characters."""

MAX_EQUAL_HASHES = 100
"""So many keys of one dict or set may have the same hash: each is compared with all the others."""

MAX_OBJECT_DEPTH = 1000
"""What an object holds is nested no deeper."""

MAX_OBJECT_WORK = 1 << 27
"""So many values may be visited to hash what an object holds; what occurs twice counts twice."""

_HASHES = (1 << 61) - 1
_MAX_DESCR = 1 << 16
_MAX_ITEM = (1 << 31) - 1
_EMPTY_ITEM = 1 << 16
_MAX_STRUCTURES = 16

_DTYPE = re.compile(r"[a-z][a-z0-9_]{0,31}")
_DEVICE = re.compile(r"[a-z][a-z0-9_]{0,31}(?::(?:0|[1-9][0-9]{0,2}))?")
_MAX_DEVICE = 127  # torch keeps the index in a byte


def is_int(value: Any) -> bool:
    """Whether a value is an integer of 64 bits, and no bool."""
    return type(value) is int and -(1 << 63) <= value < 1 << 63


def is_hex(value: Any, size: int | None = None) -> bool:
    """Whether a value is lower-case hexadecimal text of whole bytes: of `size` bytes, if that is given."""
    if not isinstance(value, str) or (size is not None and len(value) != 2 * size):
        return False
    return len(value) % 2 == 0 and set(value) <= set("0123456789abcdef")


def is_dtype(name: Any) -> bool:
    """Whether a value has the form of the name of a torch dtype: ``float32``."""
    return isinstance(name, str) and _DTYPE.fullmatch(name) is not None


def is_device(name: Any) -> bool:
    """Whether a value has the form of a device: its type and, perhaps, an index up to 127: ``cuda:0``."""
    if not isinstance(name, str) or len(name) > 40 or _DEVICE.fullmatch(name) is None:
        return False
    return int(name.partition(":")[2] or 0) <= _MAX_DEVICE


def crowded(keys: Collection[Any]) -> bool:
    """Whether more than MAX_EQUAL_HASHES of these keys have one hash, which would make a dict of them slow.

    Python salts the hash of text, but not those of numbers: all multiples of 2^61 - 1 have the hash 0.
    """
    kinds = set(map(type, keys)) if len(keys) > MAX_EQUAL_HASHES else {str}
    if kinds == {str} or (kinds == {int} and min(keys) > -_HASHES and max(keys) < _HASHES):
        return False
    return max(Counter(map(hash, keys)).values()) > MAX_EQUAL_HASHES


def excess(data: bytes, limit: int | None = None) -> str | None:
    """Why these bytes of JSON are too large to be decoded, None if they are not."""
    limit = limit or MAX_INDEX_BYTES
    if len(data) > limit:
        return f"{len(data):,} bytes of JSON, where {limit:,} can be read"
    nodes = data.count(b"[")
    if nodes > MAX_NODES:  # perhaps text has them
        nodes = re.sub(rb'"(?:[^"\\]|\\.)*"', b"", data).count(b"[")
    return f"{nodes:,} values, where {MAX_NODES:,} can be read" if nodes > MAX_NODES else None


# -- numpy -----------------------------------------------------------------------------------------

_UNITS = "Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as"
_KIND = re.compile(
    r"[<>|](?:(b1|i[1248]|u[1248]|f(?:2|4|8|12|16)|c(?:8|16|24|32))|([SUV])(0|[1-9][0-9]{0,9})"
    rf"|[mM]8(?:\[(?:[1-9][0-9]{{0,9}})?(?:{_UNITS})\])?)"
)
_STRUCTURE = re.compile(r"""(?:[\[\](),\s]|[0-9]{1,10}|'(?:[^'\\]|\\[^N])*'|"(?:[^"\\]|\\[^N])*")*""")


@lru_cache(maxsize=256)
def numpy_size(descr: str) -> int:
    """Bytes of one element of a numpy dtype, which is given as in the ``.npy`` format.

    Raises:
        ValueError: numpy writes no dtype like that, or it holds Python objects, or is far too large.
    """
    if len(descr) > _MAX_DESCR:
        raise ValueError(f"the text of a numpy dtype has {len(descr)} characters")
    if not descr.startswith("["):
        return _item_size(descr)
    # What ast sees has literals and brackets only, and those are nested less deep than it allows.
    if _STRUCTURE.fullmatch(descr) is None or _nesting(descr) > 4 * _MAX_STRUCTURES:
        raise ValueError(f"unknown numpy dtype {descr[:80]!r}")
    try:
        parsed = ast.literal_eval(descr)
    except (SyntaxError, MemoryError, RecursionError):
        raise ValueError(f"unknown numpy dtype {descr[:80]!r}") from None
    return _structure_size(parsed, 0)


def _nesting(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += (character in "[(") - (character in ")]")
        deepest = max(deepest, depth)
    return deepest


def _item_size(descr: Any) -> int:
    found = _KIND.fullmatch(descr) if isinstance(descr, str) else None
    if found is None:
        raise ValueError(f"unknown numpy dtype {str(descr)[:80]!r}")
    number, text, length = found.groups()
    size = int(number[1:]) if number else 8 if text is None else int(length) * (4 if text == "U" else 1)
    return _bounded(size)


def _bounded(size: int) -> int:
    if size > _MAX_ITEM:
        raise ValueError(f"an element of a numpy dtype has {size} bytes")
    return size


def _structure_size(fields: Any, depth: int) -> int:
    if not isinstance(fields, list):
        return _item_size(fields)
    size = 0
    if depth >= _MAX_STRUCTURES:
        raise ValueError(f"structures of numpy are nested more than {_MAX_STRUCTURES} deep")
    for field in fields:
        if not isinstance(field, tuple) or not 2 <= len(field) <= 3 or not _is_title(field[0]):
            raise ValueError(f"a field of a numpy dtype is malformed: {str(field)[:80]}")
        shape = field[2] if len(field) == 3 else ()
        if not isinstance(shape, tuple) or len(shape) > 32 or not all(map(is_int, shape)):
            raise ValueError(f"a field of a numpy dtype has shape {str(shape)[:80]}")
        size += _structure_size(field[1], depth + 1) * prod(shape)
        _bounded(size)
    return size


def _is_title(name: Any) -> bool:
    """Whether this names a field: text, or a pair of a title and a name."""
    if isinstance(name, tuple):
        return len(name) == 2 and all(isinstance(part, str) for part in name)
    return isinstance(name, str)


def sizes_fit(shape: Sequence[int], size: int) -> bool:
    """Whether numpy and torch can count the bytes of such an array, leaving out dimensions of length 0."""
    return len(shape) <= MAX_DIMS and size * prod(length or 1 for length in shape) <= MAX_INT


def is_array(descr: str, shape: Sequence[int], length: int) -> bool:
    """Whether a record of this length is a numpy array of this dtype and shape; ValueError for the dtype."""
    size = numpy_size(descr)
    if not sizes_fit(shape, max(size, 1)) or size > max(length, _EMPTY_ITEM):
        return False
    # An array of empty text has one byte for each element in numpy, whatever its dtype says.
    return size * prod(shape) == length and (size > 0 or descr[1] not in "SU")
