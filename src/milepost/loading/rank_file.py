"""Where loaded values come from: a data file with its index, or a file of plain ``torch.save``.

A source gives the whole state, or matches a template and fills its tensors. It is a context manager that
holds one open file.
"""

from __future__ import annotations

import ctypes
import io
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, Self

import torch
from isal import isal_zlib

from milepost.errors import ConfigError, CorruptCheckpointError, MilepostError, MismatchError
from milepost.format.boxes import Box
from milepost.format.index import CHUNK_BYTES, Index
from milepost.format.nodes import place_of
from milepost.format.shards import dtype_bytes
from milepost.format.tree import Node, numbers_of, paths_of
from milepost.loading.aliases import raw_bytes, sharing_misfits
from milepost.loading.renames import Names
from milepost.loading.template import Fill, Match, copy_into, is_dense, match
from milepost.state.decode import TensorBuilder, device_of, first_line
from milepost.state.encode import StateEncoder
from milepost.state.placements import narrowed
from milepost.storage import OpenFile
from milepost.storage.reading import Damage, Part, default_threads, read_parts
from milepost.storage.stream import FileStream
from milepost.types import STATE_DICT
from milepost.utils import gc_paused

__all__ = ["IndexedSource", "PlainSource", "Verify"]

Verify = bool | Literal["first"]
_ASIDE_BYTES = 64 << 20
_SHOWN = 20
_STREAM_BYTES = 1 << 20


class PlainSource:
    """A file of plain ``torch.save``."""

    def __init__(self, file: OpenFile, map_location: Any) -> None:
        with closing_file(file):
            self._state = _torch_load(file, map_location)
        self._path = file.path
        self.filling = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to release: torch holds the mapping."""

    def whole(self) -> STATE_DICT:
        """All of it, as ``torch.load`` returns it."""
        state: STATE_DICT = self._state
        return state

    def match(self, template: STATE_DICT, names: Names | None = None) -> Match:
        """Take the loaded state apart as if it were to be saved, and match that."""
        if not isinstance(self._state, dict):
            raise MismatchError(f"the file holds a {type(self._state).__name__}, not a dict: {self._path}")
        self._taken = StateEncoder().take_apart(self._state)
        tree, tensors, saved = self._taken.tree, self._taken.plan.tensors, self._taken.walk.tensors

        def same_bytes(first: int, second: int) -> bool:
            return torch.equal(raw_bytes(saved[first]), raw_bytes(saved[second]))

        found = match(template, tree, tensors, self._taken.decode, names)
        found.misfits += sharing_misfits(found.fills, tensors, tree, same_bytes)
        return found

    def check(self, fills: Sequence[Fill]) -> None:
        """Nothing to do: all has been read, and there are no checksums."""

    def fill(self, fills: Sequence[Fill]) -> None:
        """Copy the tensors."""
        self.filling = True
        for fill in fills:
            for piece in fill.parts():
                source = narrowed(self._taken.walk.tensors[fill.number], piece.box)
                copy_into(narrowed(fill.target, Box(piece.local, piece.size)), source)


def _torch_load(file: OpenFile, map_location: Any) -> Any:
    """Read through the descriptor: a save may have put something else at the path by now."""
    descriptor: Callable[[], int] | None = getattr(file, "fileno", None)
    sources: list[tuple[Any, bool]] = [(io.BufferedReader(FileStream(file), _STREAM_BYTES), False)]
    if descriptor is not None:
        sources.insert(0, (f"/proc/self/fd/{descriptor()}", True))  # a path, as torch maps nothing else
    for source, mmap in sources:
        try:
            return torch.load(source, map_location=map_location, mmap=mmap, weights_only=True)
        except (MilepostError, MemoryError):
            raise
        except pickle.UnpicklingError as error:
            raise CorruptCheckpointError(
                f"torch.load refuses {file.path}: {str(error).splitlines()[:1]}",
                path=file.path,
                hint="allow your own types with torch.serialization.add_safe_globals, and load again",
            ) from error
        except Exception as error:
            if mmap:  # files of old versions of torch cannot be mapped
                continue
            if map_location != "cpu":
                _torch_load(file, "cpu")  # raises if it is the file that torch cannot read
                raise ConfigError(
                    f"torch {torch.__version__} cannot load {file.path} with map_location="
                    f"{map_location!r}: {(str(error) or type(error).__name__).splitlines()[0]}",
                    hint='load it with "cpu" as map location, and move what you need to the device',
                    path=file.path,
                ) from error
            raise CorruptCheckpointError(
                f"torch.load cannot read {file.path}: {str(error).splitlines()[:1]}", path=file.path
            ) from error
    raise AssertionError("unreachable")


class IndexedSource:
    """A data file with its index."""

    def __init__(
        self,
        index: Index,
        file: OpenFile,
        map_location: Any,
        verify: Verify,
        *,
        beyond: Callable[[int], Any] | None = None,
    ) -> None:
        self._index = index
        self.file = file
        self._verify = verify
        self._relocate = _relocation(map_location)
        self._chunks = index.records.chunks()
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._pending: list[int] = []
        self._located: dict[int, str] = {}
        for device in set(index.tensors.device):
            if device_of(device).type == "meta":
                raise CorruptCheckpointError("a tensor is said to have been saved on the device meta")
        for record, device in zip(index.tensors.record, index.tensors.device, strict=True):
            self._located.setdefault(record, device)
        kinds = zip(index.tensors.record, index.tensors.kind, strict=True)
        self._of_arrays = {record for record, kind in kinds if kind == "ndarray"}
        self._builder = TensorBuilder(
            index.tensors,
            self._storage_of,
            self._bytes_of,
            partial(place_of, index.tree),
            beyond,
        )
        self._map: memoryview | None = None
        self.filling = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    # -- without a template ------------------------------------------------------------------------

    def whole(self, tree: Node | None = None) -> STATE_DICT:
        """The whole state, over a private mapping of the file where that can be.

        Args:
            tree: What it consists of, by default the index's tree.
        """
        self._map = self.file.map()
        if self._map is not None and self._verify:
            self._check_mapping(self._map)
        elif self._map is None:
            self._read_records(range(len(self._chunks) - 1))
        state: STATE_DICT = self._builder.decode(self._index.tree if tree is None else tree)
        if not isinstance(state, dict):
            raise CorruptCheckpointError(
                f"the index holds no state dict: {self.file.path}", path=self.file.path
            )
        return state

    def _check_mapping(self, memory: memoryview) -> None:
        """Check every chunk of every record in place, with several threads."""
        records = self._index.records
        jobs = [
            (record, first, min(first + 64, self._chunks[record + 1]))
            for record in range(len(self._chunks) - 1)
            for first in range(self._chunks[record], self._chunks[record + 1], 64)
        ]

        def check(share: Sequence[tuple[int, int, int]]) -> list[Damage]:
            damaged = []
            for record, first, end in share:
                stop = records.offset[record] + records.length[record]
                offset = records.offset[record] + (first - self._chunks[record]) * CHUNK_BYTES
                for chunk in range(first, end):
                    found = isal_zlib.crc32(memory[offset : min(offset + CHUNK_BYTES, stop)])
                    if found != records.crcs[chunk]:
                        place = chunk - self._chunks[record]
                        damaged.append(Damage(record, place, offset, records.crcs[chunk], found))
                    offset += CHUNK_BYTES
            return damaged

        threads = default_threads()
        with ThreadPoolExecutor(threads, "milepost-check") as pool:
            shares = [jobs[start::threads] for start in range(threads)]
            self._refuse([damage for found in pool.map(check, shares) for damage in found])

    # -- into a template ---------------------------------------------------------------------------

    def match(self, template: STATE_DICT, names: Names | None = None) -> Match:
        """Compare with the template; objects are read here, all else later."""
        tree, tensors = self._index.tree, self._index.tensors
        found = match(template, tree, tensors, self.decode, names)
        found.misfits += sharing_misfits(found.fills, tensors, tree, self.same_bytes)
        return found

    def decode(self, node: Node) -> Any:
        """The value of a node; what it holds of tensors is read in one go."""
        known = len(self._index.tensors.record)
        self.read_aside([number for number in numbers_of(node, "tensor") if number < known])
        return self._builder.decode(node)

    def relocated(self, tensor: torch.Tensor, location: str) -> torch.Tensor:
        """A new tensor on the CPU, moved to where ``map_location`` says."""
        storage = self._relocate(tensor.untyped_storage(), location)
        if storage.device == tensor.device:
            return tensor
        moved = torch.empty(0, dtype=tensor.dtype, device=storage.device)
        return moved.set_(storage, 0, tensor.shape, tensor.stride())

    def read_aside(self, numbers: Iterable[int]) -> None:
        """Read tensors, of which `copy_pieces` then copies parts."""
        records = {self._index.tensors.record[number] for number in numbers}
        self._read_records(sorted(records - self._storages.keys()))

    def copy_pieces(self, fill: Fill) -> None:
        """Copy those parts that are wanted of a tensor that was read aside."""
        source = self._builder.tensor(fill.number)
        for piece in fill.parts():
            copy_into(narrowed(fill.target, Box(piece.local, piece.size)), narrowed(source, piece.box))

    def same_bytes(self, first: int, second: int) -> bool:
        """Whether two tensors lie at the same place of records that have the same checksums."""
        tensors, lengths, chunks = self._index.tensors, self._index.records.length, self._chunks
        a, b = tensors.record[first], tensors.record[second]
        return (
            lengths[a] == lengths[b]
            and tensors.byte_offset[first] == tensors.byte_offset[second]
            and all((first in bits) == (second in bits) for bits in (tensors.conj, tensors.neg))
            and self._index.records.crcs[chunks[a] : chunks[a + 1]]
            == self._index.records.crcs[chunks[b] : chunks[b + 1]]
        )

    def check(self, fills: Sequence[Fill]) -> None:
        """Read and verify what `fill` will read; nothing is written to."""
        records = {self._index.tensors.record[fill.number] for fill in fills}
        self.read([self._part(record, None) for record in sorted(records)])

    def fill(self, fills: Sequence[Fill]) -> None:
        """Read the tensors into their targets; verified as asked."""
        with gc_paused():
            direct, copies, aside = self._sort(fills)
            parts = [self._part(record, direct[record].target.data_ptr()) for record in sorted(direct)]
        self.filling = True
        self.read(parts)
        for fill, source in copies:  # the same bytes, even where shape or dtype differ
            length = self._index.records.length[self._index.tensors.record[fill.number]]
            ctypes.memmove(fill.target.data_ptr(), source.target.data_ptr(), length)
        for records in self._batches(sorted(aside)):
            self._read_records(records)
            for record in records:
                for fill in aside[record]:
                    copy_into(fill.target, self._builder.tensor(fill.number))
                del self._storages[record]

    def _sort(
        self, fills: Sequence[Fill]
    ) -> tuple[dict[int, Fill], list[tuple[Fill, Fill]], dict[int, list[Fill]]]:
        """By record: what is read straight into place, what is copied from that, what is read aside."""
        direct: dict[int, Fill] = {}
        copies: list[tuple[Fill, Fill]] = []
        aside: dict[int, list[Fill]] = {}
        for fill in fills:
            record = self._index.tensors.record[fill.number]
            if not self._lands_directly(fill):
                aside.setdefault(record, []).append(fill)
            elif record in direct:
                if direct[record].target.data_ptr() != fill.target.data_ptr():
                    copies.append((fill, direct[record]))
            else:
                direct[record] = fill
        return direct, copies, aside

    def _lands_directly(self, fill: Fill) -> bool:
        """Whether a record's bytes are the target's memory: they can be read straight into it."""
        columns, number, target = self._index.tensors, fill.number, fill.target
        length = self._index.records.length[columns.record[number]]
        return (
            target.is_cpu
            and length == target.numel() * dtype_bytes(columns.dtype[number])
            and is_dense(target)
            and columns.byte_offset[number] == 0
            and list(target.stride()) == columns.stride[number]
            and target.is_conj() == (number in columns.conj)
            and target.is_neg() == (number in columns.neg)
        )

    def _batches(self, records: Sequence[int]) -> Iterator[list[int]]:
        batch: list[int] = []
        size = 0
        for record in records:
            if batch and size + self._index.records.length[record] > _ASIDE_BYTES:
                yield batch
                batch, size = [], 0
            batch.append(record)
            size += self._index.records.length[record]
        if batch:
            yield batch

    # -- records -----------------------------------------------------------------------------------

    def _part(self, record: int, address: int | None) -> Part:
        return self.part(record, 0, self._index.records.length[record], address)

    def part(self, record: int, start: int, end: int, address: int | None) -> Part:
        """The bytes of a record from `start` to `end`, which lie between chunks or at the record's end."""
        records, first = self._index.records, self._chunks[record]
        crcs = None
        if self._verify:
            crcs = records.crcs[first + start // CHUNK_BYTES : first + -(-end // CHUNK_BYTES)]
        return Part(records.offset[record] + start, address, end - start, crcs, record)

    def read(self, parts: Sequence[Part]) -> None:
        """Read parts, sorted by offset, to where they go; CorruptCheckpointError names what is damaged."""
        report = read_parts(self.file, parts, chunk_bytes=CHUNK_BYTES)
        self._refuse(report.damaged)

    def _read_records(self, records: Sequence[int]) -> None:
        """Read records into new memory, on their devices."""
        memory = {record: _memory(self._index.records.length[record]) for record in records}
        self.read(
            [self._part(record, storage.data_ptr() or None) for record, storage in sorted(memory.items())]
        )
        for record, storage in memory.items():
            self._storages[record] = self._moved(record, storage)

    def _storage_of(self, record: int) -> torch.UntypedStorage:
        if record not in self._storages:
            length = self._index.records.length[record]
            if self._map is None:
                self._read_records([record])
            elif length == 0:
                self._storages[record] = _memory(0)
            else:
                start = self._index.records.offset[record]
                data = torch.frombuffer(self._map[start : start + length], dtype=torch.uint8)
                self._storages[record] = self._moved(record, data.untyped_storage())
        return self._storages[record]

    def _moved(self, record: int, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        """The storage where it is to be; one that an array lies in stays on the CPU."""
        if record in self._of_arrays:
            return storage
        return self._relocate(storage, self._located.get(record, "cpu"))

    def _bytes_of(self, record: int) -> bytes:
        offset, length = self._index.records.offset[record], self._index.records.length[record]
        if self._map is not None:
            return bytes(self._map[offset : offset + length])
        data = bytearray(length)
        if length:
            address = ctypes.addressof(ctypes.c_char.from_buffer(data))
            self.read([self._part(record, address)])
        return bytes(data)

    def _refuse(self, damaged: Sequence[Damage]) -> None:
        """Raise for chunks that failed their check, naming the keys they belong to."""
        if not damaged:
            return
        keys = paths_of(self._index.tree, "tensor")
        objects = paths_of(self._index.tree, "array", "blob", "object")
        where = []
        for damage in damaged[:_SHOWN]:
            names = [
                keys.get(number, f"tensor {number}")
                for number, record in enumerate(self._index.tensors.record)
                if record == damage.tag
            ] + [path for record, path in objects.items() if record == damage.tag]
            where.append(
                f"{' = '.join(names[:3])} at byte {damage.offset} "
                f"(CRC-32 {damage.expected:08x} expected, {damage.found:08x} found)"
            )
        raise CorruptCheckpointError(
            f"{self.file.path} is damaged: {'; '.join(where)}"
            + (f" and {len(damaged) - _SHOWN} more" if len(damaged) > _SHOWN else ""),
            targets_modified=self.filling,
            path=self.file.path,
            hint="load another checkpoint; `milepost ls` on the folder above lists them",
        )


@contextmanager
def closing_file(file: OpenFile) -> Iterator[None]:
    try:
        yield
    finally:
        file.close()


def _memory(length: int) -> torch.UntypedStorage:
    return torch.empty(length, dtype=torch.uint8, device="cpu").untyped_storage()


Relocate = Callable[[torch.UntypedStorage, str], torch.UntypedStorage]


def _relocation(map_location: Any) -> Relocate:
    """A function that moves a storage from the CPU to where `map_location` says, as ``torch.load`` does."""

    def move(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
        device = torch.device(location)
        if device.type == "cpu":
            return storage
        try:
            moved: torch.UntypedStorage = (
                torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage).to(device).untyped_storage()
            )
        except Exception as error:  # torch may look for a module of the device's name
            raise ConfigError(
                f"tensors were saved on {location}, which is not here: {first_line(error)}",
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
        return lambda storage, _: move(storage, str(map_location))
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
