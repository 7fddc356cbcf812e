"""What the pickle of an object may do, found out without unpickling it. Torch-free.

torch's restricted unpickler runs no code of a file, but it builds whatever the file says: tuples so deep that
to hash them overflows the stack, dicts whose keys all have one hash, a ``bytearray`` of any size. `scan`
follows the opcodes with stand-ins for the values, and refuses such pickles before anything is built.

Source of the opcodes: the documentation of CPython's pickletools; those here are the ones that the
restricted unpickler knows.
"""

from __future__ import annotations

import struct
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import Counter
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from milepost.format.limits import MAX_EQUAL_HASHES, MAX_NAME, MAX_OBJECT_DEPTH, MAX_OBJECT_WORK

__all__ = ["scan"]


class _Stand:
    """Stands for a value.

    Attributes:
        value: What has the hash of the value, where equal hashes can be made on purpose; bytes for text.
        depth: How deep it is nested.
        work: How many values must be visited to hash it; those that it holds twice count twice.
        parts: What is in it, if it is a tuple or list.
        name: The name of a class or function; of what they made, "dict", "set" or the like, or "the user's".
    """

    __slots__ = ("depth", "name", "parts", "value", "work")

    def __init__(self, value: Any, parts: list[_Stand] | None, name: str = "") -> None:
        self.value = self if value is None else value
        self.depth, self.work, self.parts, self.name = 0, 1, parts, name

    def hold(self, parts: Sequence[_Stand]) -> None:
        """Take more values in."""
        for part in parts:
            self.depth = max(self.depth, part.depth + 1)
            self.work += part.work
            if self.depth > MAX_OBJECT_DEPTH:  # at once: a list that holds itself doubles its work each time
                raise ValueError(f"it is nested more than {MAX_OBJECT_DEPTH} deep")
        if self.parts is not None:
            self.parts += parts


class _Hash:
    """Has the hash of a tuple, without its parts."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def __hash__(self) -> int:
        return self.number


def _hash_of(parts: Sequence[_Stand]) -> _Hash:
    return _Hash(hash(tuple([part.value for part in parts])))


_CALLED = {
    "builtins.set": "set",
    "builtins.bytearray": "bytearray",
    "builtins.complex": "complex",
    "collections.Counter": "Counter",
    "collections.OrderedDict": "OrderedDict",
    "_codecs.encode": "encode",
    "torch.Size": "Size",
}
"""What the unpickler may call that is no tensor's, by the name that is used here."""


def scan(data: bytes) -> None:
    """Check the pickle of an object.

    Raises:
        ValueError: It does what torch's restricted unpickler does not know, or is beyond a limit of
            `limits`. IndexError and KeyError: it takes what is not there.
    """
    _Scan(data).run()


class _Scan:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        self._stack: list[_Stand] = []
        self._outer: list[list[_Stand]] = []
        self._memo: dict[int, _Stand] = {}
        self._work_left = max(MAX_OBJECT_WORK, 4 * len(data))
        self._hashes: dict[_Stand, Counter[int]] = {}

    def run(self) -> None:
        """Follow the opcodes up to the end."""
        while (code := self._data[self._at]) != _STOP:
            self._at += 1
            step = _STEPS.get(code)
            if step is None:
                raise ValueError(f"the opcode {code:#04x} is none that torch reads")
            step(self)

    # -- reading -----------------------------------------------------------------------------------

    def take(self, size: int) -> bytes:
        """The next bytes."""
        data = self._data[self._at : self._at + size]
        if len(data) != size:
            raise ValueError("the pickle is cut off")
        self._at += size
        return data

    def skip(self, size: int) -> None:
        """Leave out bytes that change nothing."""
        self.take(size)

    def number(self, size: int, *, signed: bool = False) -> int:
        """The next number."""
        return int.from_bytes(self.take(size), "little", signed=signed)

    def _line(self) -> str:
        end = self._data.index(b"\n", self._at, self._at + MAX_NAME)
        text = self._data[self._at : end].decode()
        self._at = end + 1
        return text

    # -- opcodes -----------------------------------------------------------------------------------

    def push(self, value: Any = None, parts: list[_Stand] | None = None, name: str = "") -> None:
        """Put a new value onto the stack."""
        self._stack.append(_Stand(value, parts, name))

    def mark(self) -> None:
        """Begin a list of operands."""
        self._outer.append(self._stack)
        self._stack = []

    def marked(self) -> list[_Stand]:
        """End a list of operands."""
        items, self._stack = self._stack, self._outer.pop()
        return items

    def top(self, count: int) -> list[_Stand]:
        """Take operands from the stack."""
        return [self._stack.pop() for _ in range(count)][::-1]

    def tuple_of(self, parts: list[_Stand]) -> None:
        """Put a tuple onto the stack."""
        self.push(_hash_of(parts), [])
        self._stack[-1].hold(parts)

    def get(self, number: int) -> None:
        """Put a value onto the stack again."""
        self._stack.append(self._memo[number])

    def put(self, number: int) -> None:
        """Remember the top of the stack."""
        self._memo[number] = self._stack[-1]

    def hold(self, items: list[_Stand]) -> None:
        """Put values into what is on top of the stack, such as a list."""
        self._stack[-1].hold(items)

    def set_items(self, items: list[_Stand]) -> None:
        """Put keys and values into a dict."""
        self._hash(self._stack[-1], items[::2])
        self.hold(items)

    def global_(self) -> None:
        """Put a class or function onto the stack."""
        module, name = self._line(), self._line()
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        self.push(name=f"{module}.{name}")

    def storage(self) -> None:
        """Put a storage onto the stack, whose identity is there."""
        self.top(1)
        self.push()

    def _named(self) -> tuple[_Stand, _Stand]:
        """A class or function and its arguments: of any other value torch would make text or a hash."""
        kind, arguments = self.top(2)
        if "." not in kind.name:
            raise ValueError("it calls what is no class and no function")
        return kind, arguments

    def call(self) -> None:
        """Call a function."""
        function, arguments = self._named()
        users = function.name not in _CALLED and not function.name.startswith("torch.")
        self.push(name="the user's" if users else _CALLED.get(function.name, ""))
        self._check_call(function.name, arguments.parts or [], self._stack[-1])
        self._give(arguments)

    def make(self) -> None:
        """Make an object of a class, without calling the class."""
        kind, arguments = self._named()
        if kind.name in _CALLED:
            raise ValueError(f"it makes a {kind.name} in an unknown way")
        self.push(name="" if kind.name.startswith("torch.") else "the user's")
        self._give(arguments)

    def build(self) -> None:
        """Give an object its state, which torch may make a dict of: keys in pairs are not checked as such."""
        (state,) = self.top(1)
        if self._stack[-1].name != "the user's":
            for part in (state, *(state.parts or [])[:2]):
                if part.name == "set" or len(part.parts or []) > MAX_EQUAL_HASHES:
                    raise ValueError("the state of an object has an unknown form")
        self._count_elements(state.parts or [])
        self._give(state)

    # -- limits ------------------------------------------------------------------------------------

    def _check_call(self, name: str, parts: list[_Stand], result: _Stand) -> None:
        kind = _CALLED.get(name)
        values: list[Any] = [part.value for part in parts]
        fits = True
        if kind == "bytearray":
            fits = all(type(value) is bytes for value in values)
        elif kind == "encode":
            fits = len(values) == 2 and type(values[0]) is bytes and values[1] == b"latin1"
            result.value = values[0] if fits else result
        elif kind == "complex":
            fits = len(values) == 2 and all(isinstance(value, int | float) for value in values)
            result.value = complex(*values) if fits else result
        elif kind == "set":
            fits = len(parts) <= 1 and all(part.parts is not None for part in parts)
            for part in parts if fits else ():
                self._hash(result, part.parts or [])
        elif kind == "Counter":
            fits = len(parts) <= 1 and all(part.name == "dict" for part in parts)
        elif kind == "OrderedDict":
            fits = not parts
        elif kind == "Size":
            fits = len(parts) == 1 and parts[0].parts is not None
            for part in parts if fits else ():
                result.value = _hash_of(part.parts or [])
        elif name == "torch._tensor._rebuild_from_type_v2":
            fits = len(parts) == 4 and parts[2].parts is not None and parts[0].name != name
            if fits:
                self._check_call(parts[0].name, parts[2].parts or [], _Stand(None, None))
        elif name.startswith(("torch._utils._rebuild_tensor", "torch._utils._rebuild_qtensor")):
            self._count_elements(parts)
        if not fits:
            raise ValueError(f"it calls {name} in an unknown way")
        if kind is not None:
            self._spend(sum([len(value) for value in values if type(value) is bytes]))

    def _count_elements(self, parts: list[_Stand]) -> None:
        """Count those of a tensor, whose arguments these are: with strides of 0 there may be very many."""
        if len(parts) > 3 and parts[2].parts:
            shape = [part.value for part in parts[2].parts]
            self._spend(abs(prod(length for length in shape if isinstance(length, int))) >> 10)

    def _give(self, stand: _Stand) -> None:
        """Make a value part of the object on top of the stack, which may hash all that is in it."""
        self._spend(stand.work)
        self._stack[-1].hold([stand])

    def _hash(self, target: _Stand, keys: list[_Stand]) -> None:
        """Refuse very many keys of one hash in one dict or set."""
        hashes = self._hashes.setdefault(target, Counter())
        for key in keys:
            self._spend(key.work)
            number = hash(key.value)
            hashes[number] += 1
            if hashes[number] > MAX_EQUAL_HASHES:
                raise ValueError("very many keys of a dict or set have one hash")

    def _spend(self, work: int) -> None:
        self._work_left -= work
        if self._work_left < 0:
            raise ValueError("it holds the same values so often that to read it would take too long")


_STOP = ord(".")
_STEPS: dict[int, Callable[[_Scan], None]] = {
    0x80: lambda scan: scan.skip(1),
    ord("N"): lambda scan: scan.push(),
    0x88: lambda scan: scan.push(1),
    0x89: lambda scan: scan.push(0),
    ord("K"): lambda scan: scan.push(scan.number(1)),
    ord("M"): lambda scan: scan.push(scan.number(2)),
    ord("J"): lambda scan: scan.push(scan.number(4, signed=True)),
    0x8A: lambda scan: scan.push(scan.number(scan.number(1), signed=True)),
    ord("G"): lambda scan: scan.push(struct.unpack(">d", scan.take(8))[0]),
    ord("X"): lambda scan: scan.push(scan.take(scan.number(4))),
    ord("U"): lambda scan: scan.push(scan.take(scan.number(1))),
    ord("]"): lambda scan: scan.push(parts=[]),
    ord("}"): lambda scan: scan.push(name="dict"),
    0x8F: lambda scan: scan.push(),
    ord("("): _Scan.mark,
    ord("t"): lambda scan: scan.tuple_of(scan.marked()),
    ord(")"): lambda scan: scan.tuple_of([]),
    0x85: lambda scan: scan.tuple_of(scan.top(1)),
    0x86: lambda scan: scan.tuple_of(scan.top(2)),
    0x87: lambda scan: scan.tuple_of(scan.top(3)),
    ord("a"): lambda scan: scan.hold(scan.top(1)),
    ord("e"): lambda scan: scan.hold(scan.marked()),
    ord("s"): lambda scan: scan.set_items(scan.top(2)),
    ord("u"): lambda scan: scan.set_items(scan.marked()),
    ord("h"): lambda scan: scan.get(scan.number(1)),
    ord("j"): lambda scan: scan.get(scan.number(4)),
    ord("q"): lambda scan: scan.put(scan.number(1)),
    ord("r"): lambda scan: scan.put(scan.number(4)),
    ord("c"): _Scan.global_,
    ord("R"): _Scan.call,
    0x81: _Scan.make,
    ord("b"): _Scan.build,
    ord("Q"): _Scan.storage,
}
