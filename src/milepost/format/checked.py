"""How the JSON files of a checkpoint are decoded: everything in them comes from outside and is checked."""

from __future__ import annotations

from typing import NoReturn, TypeVar

import msgspec

from milepost.errors import CorruptCheckpointError, UnsupportedFormatError
from milepost.format.limits import excess
from milepost.format.shards import SHARDS_FEATURE

__all__ = ["VERSION", "Checker", "decode_object"]

VERSION = (1, 0)
"""Format version (major, minor). A reader refuses another major version and accepts any minor one."""

FEATURES: frozenset[str] = frozenset({SHARDS_FEATURE})
"""The optional features that this version of the library can read."""

_T = TypeVar("_T")


class Checker:
    """Raises CorruptCheckpointError with the file's path when a condition does not hold."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, condition: object, message: str) -> None:
        """Raise with this message unless the condition holds."""
        if not condition:
            self.fail(message)

    def fail(self, message: str) -> NoReturn:
        """Raise; loops call it themselves, so that no message is made up for what is right."""
        raise CorruptCheckpointError(f"{message}: {self.path}", path=self.path)


def decode_object(kind: type[_T], data: bytes, name: str, path: str, *, columns: tuple[str, ...] = ()) -> _T:
    """Decode one JSON object; version and features first, so that later formats get the right error.

    What is not the exact bytes that Milepost writes for such an object is looked at more closely: its
    fields, and those of the objects in `columns`.
    """
    problem = excess(data)
    Checker(path)(problem is None, f"the file is too large: {problem}")
    try:
        head = msgspec.json.decode(data, type=_Head)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError, ValueError) as error:
        raise CorruptCheckpointError(f"not valid {name} JSON ({error}): {path}", path=path) from None
    Checker(path)(head.format == name, f"the format is {head.format[:80]!r}, not {name!r}")
    unknown = sorted(set(head.requires) - FEATURES)
    if head.version[0] != VERSION[0] or unknown:
        needs = f"features {str(unknown)[:200]}" if unknown else f"format version {head.version[0]}"
        raise UnsupportedFormatError(
            f"{path} needs {needs}, which this version of Milepost cannot read",
            path=path,
            hint="update Milepost: pip install -U milepost",
        )
    try:
        decoded = msgspec.json.decode(data, type=kind)
        if msgspec.json.encode(decoded) != data:
            fields = _fields(data)
            for column in columns:
                _fields(bytes(fields.get(column, b"")))
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError, ValueError) as error:
        raise CorruptCheckpointError(f"not valid {name} JSON ({error}): {path}", path=path) from None
    return decoded


class _Head(msgspec.Struct):
    format: str
    version: tuple[int, int]
    requires: list[str]


def _fields(data: bytes) -> dict[str, msgspec.Raw]:
    """The fields of a JSON object, refusing repeated names and white space.

    A decoder keeps the last of two fields of one name, another may keep the first; so that all
    readers see the same, the fields must make up the whole object again.
    """
    fields = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
    if msgspec.json.encode(fields) != data:
        raise ValueError("a field is repeated, or there is white space between the fields")
    return fields
