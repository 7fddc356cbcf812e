"""New tensors and other values of a checkpoint, over a mapping of the file or read into new memory."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from typing import Any

import torch

from milepost.errors import ConfigError, CorruptCheckpointError
from milepost.format.boxes import whole
from milepost.format.nodes import place_of
from milepost.format.tree import Node, numbers_of
from milepost.loading.read_plan import ReadPlan
from milepost.loading.shard_lookup import ShardLookup
from milepost.state.decode import TensorBuilder, device_of, dtype_of, finished, first_line
from milepost.utils import gc_paused

__all__ = ["NewValues", "Relocate", "relocation"]

Relocate = Callable[[torch.UntypedStorage, str], torch.UntypedStorage]


class NewValues:
    """Makes the values of a tree, of which tensors of this rank's own file share memory as when saved.

    Args:
        lookup: The files.
        relocate: Moves storages from the CPU to the device where they are to be.
    """

    def __init__(self, lookup: ShardLookup, relocate: Relocate) -> None:
        self._lookup, self._relocate = lookup, relocate
        self._file = lookup.own.file
        tensors = self._file.index.tensors
        for device in set(tensors.device):
            if device_of(device).type == "meta":
                raise CorruptCheckpointError("a tensor is said to have been saved on the device meta")
        shards = lookup.shards
        self._arrays = {shards.alias[n] for n, kind in enumerate(shards.kind) if kind == "ndarray"}
        self._gradients = set(shards.requires_grad)
        self._map: memoryview | None = None
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._globals: dict[int, torch.Tensor] = {}
        self._made: dict[tuple[int, str, bool], Any] = {}
        self._builder = TensorBuilder(
            tensors,
            self._storage_of,
            self._bytes_of,
            partial(place_of, self._file.index.tree),
            lambda number: self._global(number - lookup.first),
        )

    def forget(self) -> None:
        """Drop all values: only their users keep them alive."""
        self._builder.forget()
        for known in (self._storages, self._globals, self._made):
            known.clear()
        self._map = None

    @gc_paused()  # very many small objects, none of which is garbage
    def whole(self, tree: Node) -> Any:
        """The value of a whole tree, over a private mapping of this rank's file where that can be."""
        self._make_globals(range(len(self._lookup.shards.key)))
        self._map = self._file.map()
        if self._map is None:
            self._read_records(range(len(self._file.index.records.length)))
        return self._builder.decode(tree)

    def decode(self, node: Node) -> Any:
        """The value of a node; all tensors in it are read in one go."""
        first, record = self._lookup.first, self._file.index.tensors.record
        numbers = numbers_of(node, "tensor")
        if numbers:
            self._make_globals(sorted(number - first for number in numbers if number >= first))
            own = {record[number] for number in numbers if number < first}
            self._read_records(sorted(own - self._storages.keys()))
        return self._builder.decode(node)

    # -- tensors of this rank's own file ---------------------------------------------------------------

    def _read_records(self, records: Sequence[int]) -> None:
        """Read records into new memory, on their devices."""
        lengths = self._file.index.records.length
        memory = {record: _memory(lengths[record]) for record in records}
        self._file.read(
            [self._file.record(record, storage.data_ptr() or None) for record, storage in memory.items()]
        )
        for record, storage in memory.items():
            self._storages[record] = self._moved(record, storage)

    def _storage_of(self, record: int) -> torch.UntypedStorage:
        if record not in self._storages:
            length = self._file.index.records.length[record]
            if self._map is None or not length:
                self._read_records([record])
            else:
                start = self._file.index.records.offset[record]
                data = torch.frombuffer(self._map[start : start + length], dtype=torch.uint8)
                self._storages[record] = self._moved(record, data.untyped_storage())
        return self._storages[record]

    @cached_property
    def _devices(self) -> dict[int, str | None]:
        """The device of each record; None if an array shares its memory, which stays on the CPU."""
        tensors, devices = self._file.index.tensors, dict[int, str | None]()
        for record, device, kind in zip(tensors.record, tensors.device, tensors.kind, strict=True):
            if kind == "ndarray":
                devices[record] = None
            else:
                devices.setdefault(record, device)
        return devices

    def _moved(self, record: int, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        device = self._devices.get(record, "cpu")
        return storage if device is None else self._relocate(storage, device)

    def _bytes_of(self, record: int) -> bytes:
        records = self._file.index.records
        if self._map is not None:
            return bytes(self._map[records.offset[record] : records.offset[record] + records.length[record]])
        data = bytearray(records.length[record])
        if data:
            address = ctypes.addressof(ctypes.c_char.from_buffer(data))
            self._file.read([self._file.record(record, address)])
        return bytes(data)

    # -- global tensors --------------------------------------------------------------------------------

    def _global(self, number: int) -> Any:
        """A global tensor, as it was saved: tied ones of one kind are one object."""
        self._make_globals([number])
        shards = self._lookup.shards
        made = (shards.alias[number], shards.kind[number], number in self._gradients)
        if made not in self._made:
            # Detached: if it requires a gradient, others on its memory must not.
            self._made[made] = finished(self._globals[made[0]].detach(), made[1], made[2])
        return self._made[made]

    def _make_globals(self, numbers: Iterable[int]) -> None:
        """Read global tensors whole into new memory, all in one go."""
        shards = self._lookup.shards
        roots = dict.fromkeys(shards.alias[number] for number in numbers)
        missing = [root for root in roots if root not in self._globals]
        if not missing:
            return
        plan = ReadPlan(self._lookup)
        made: dict[int, torch.Tensor] = {}
        for root in missing:
            piece = whole(shards.shape[root])
            parts = list(self._lookup.parts(root, piece.box))  # the files hold all of it: now ask for memory
            made[root] = torch.empty(piece.size, dtype=dtype_of(shards.dtype[root]), device="cpu")
            plan.add_parts(made[root], piece, parts)
        plan.carry_out()
        for root, tensor in made.items():
            self._globals[root] = tensor if root in self._arrays else self._relocated(tensor, root)

    def _relocated(self, tensor: torch.Tensor, number: int) -> torch.Tensor:
        """A tensor on the device where this rank had it."""
        storage = self._relocate(tensor.untyped_storage(), self._lookup.location(number))
        if storage.device == tensor.device:
            return tensor
        moved = torch.empty(0, dtype=tensor.dtype, device=storage.device)
        return moved.set_(storage, 0, tensor.shape, tensor.stride())


def _memory(length: int) -> torch.UntypedStorage:
    return torch.empty(length, dtype=torch.uint8, device="cpu").untyped_storage()


def relocation(map_location: Any) -> Relocate:
    """A function that moves a storage from the CPU to where `map_location` says, as ``torch.load`` does."""

    def move(
        storage: torch.UntypedStorage, location: str, what: str = "tensors were saved on"
    ) -> torch.UntypedStorage:
        device = torch.device(location)
        if device.type == "cpu":
            return storage
        try:
            moved: torch.UntypedStorage = (
                torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage).to(device).untyped_storage()
            )
        except Exception as error:  # torch may look for a module of the device's name
            raise ConfigError(
                f"{what} {location}, which is not available here: {first_line(error)}",
                hint='pass default_map_location="cpu" to load, or map_location="cpu" to read',
            ) from error
        return moved

    if map_location is None:
        return move
    if isinstance(map_location, str | torch.device):
        try:
            torch.device(map_location)
        except RuntimeError as error:
            raise ConfigError(f"map_location: {str(error).splitlines()[0]}") from error
        return lambda storage, _: move(storage, str(map_location), "map_location is")
    if isinstance(map_location, dict):
        return lambda storage, location: move(storage, str(map_location.get(location, location)))
    if not callable(map_location):
        raise ConfigError(f"map_location must be a device, a dict or a function, not {map_location!r}")

    def call(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
        moved = map_location(storage, location)
        if moved is None:
            return move(storage, location)
        untyped = getattr(moved, "_untyped_storage", moved)
        if not isinstance(untyped, torch.UntypedStorage):
            raise ConfigError(f"map_location must return a storage or None, not {type(moved).__name__}")
        return untyped

    return call
