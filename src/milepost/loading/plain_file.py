"""A file of plain ``torch.save`` as a source of values."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch

from milepost.errors import ConfigError, CorruptCheckpointError, MilepostError, MismatchError
from milepost.format.boxes import Box
from milepost.loading.aliases import raw_bytes, sharing_misfits
from milepost.loading.renames import Names
from milepost.loading.template import Fill, Match, copy_into, match
from milepost.state.encode import StateEncoder
from milepost.state.placements import narrowed
from milepost.storage import OpenFile
from milepost.storage.stream import FileStream
from milepost.types import STATE_DICT

__all__ = ["PlainSource"]

_STREAM_BYTES = 1 << 20


class PlainSource:
    """A file of plain ``torch.save``, which is read whole. A context manager, as `CheckpointSource` is."""

    def __init__(self, file: OpenFile, map_location: Any) -> None:
        try:
            self._state = _torch_load(file, map_location)
        finally:
            file.close()
        self._path = file.path
        self._fills: Sequence[Fill] = ()
        self.filling = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to release: torch holds the mapping."""

    def open_all(self) -> None:
        """Nothing to do: the file has been read."""

    def whole(self) -> STATE_DICT:
        """The whole state, as ``torch.load`` returns it."""
        state: STATE_DICT = self._state
        return state

    def match(self, template: STATE_DICT, names: Names | None = None) -> Match:
        """Take the loaded state apart as if it were to be saved, and compare that with the template."""
        if not isinstance(self._state, dict):
            raise MismatchError(f"the file holds a {type(self._state).__name__}, not a dict: {self._path}")
        self._taken = StateEncoder().take_apart(self._state)
        tree, tensors, saved = self._taken.tree, self._taken.plan.tensors, self._taken.walk.tensors

        def same_bytes(first: int, second: int) -> bool:
            return torch.equal(raw_bytes(saved[first]), raw_bytes(saved[second]))

        found = match(template, tree, tensors, self._taken.decode, names)
        found.misfits += sharing_misfits(found.fills, tensors, tree, same_bytes)
        self._fills = found.fills
        return found

    def check(self) -> None:
        """Nothing to do: all has been read, and there are no checksums."""

    def fill(self) -> None:
        """Copy the tensors that `match` found into their targets."""
        self.filling = True
        for fill in self._fills:
            for piece in fill.parts():
                source = narrowed(self._taken.walk.tensors[fill.number], piece.box)
                copy_into(narrowed(fill.target, Box(piece.local, piece.size)), source)


def _torch_load(file: OpenFile, map_location: Any) -> Any:
    """Load through the descriptor: by now a save may have replaced the file at the path."""
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
