"""What a stager hands to the checkpoint process: the image behind a staged state dict.

A staged state dict is an ordinary one. `image_of` tells whether it still is what was staged, leaf by leaf;
if so the image is written as it is, and if not the state dict is staged again.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from milepost.background.arena import Arena
from milepost.format.snapshot import Snapshot
from milepost.state.encode import Parts
from milepost.types import STATE_DICT

__all__ = ["SharedRecords", "StagedImage", "descriptor_of", "image_of", "staged_bytes"]


@dataclass
class SharedRecords:
    """Records that were not copied, as they lie in memory that other processes can map as well.

    Attributes:
        storages: That memory.
        records: For each record: its number, which storage holds it, where that storage begins in its
            file and how long it is, and where the record begins in the storage.
    """

    storages: list[torch.UntypedStorage] = field(default_factory=list)
    records: list[tuple[int, int, int, int, int]] = field(default_factory=list)

    @classmethod
    def of(cls, parts: Parts) -> SharedRecords:
        """Those among a state's records."""
        found, numbers = cls(), dict[int, tuple[int, int] | None]()
        for record, (number, start) in enumerate(parts.plan.firsts):
            tensor: Any = parts.walk.tensors[number]
            if not tensor.is_cpu or not tensor.is_shared() or not parts.plan.layout.lengths[record]:
                continue
            storage = tensor.untyped_storage()
            address = storage.data_ptr()
            if address not in numbers:
                opened = descriptor_of(storage)
                numbers[address] = None if opened is None else (len(found.storages), opened[1])
                if opened is not None:
                    os.close(opened[0])
                    found.storages.append(storage)
            place = numbers[address]
            if place is not None:
                offset = int(tensor.storage_offset()) * tensor.element_size() + start
                found.records.append((record, *place, int(storage.nbytes()), offset))
        return found

    @contextmanager
    def opened(self) -> Iterator[list[int]]:
        """Descriptors of the storages, for the time of the context."""
        with ExitStack() as stack:
            descriptors = []
            for storage in self.storages:
                opened = descriptor_of(storage)
                assert opened is not None
                stack.callback(os.close, opened[0])
                descriptors.append(opened[0])
            yield descriptors


def descriptor_of(storage: Any) -> tuple[int, int] | None:
    """A new descriptor of the memory that a storage shares with other processes, and where in it that is.

    None if there is none.

    The storage is left as it is. (torch's own functions would move one that they do not know to memory
    of another kind, away from whoever shares it: so it is first found out which kind it is.)
    """
    if not storage.is_shared() or not storage.nbytes():
        return None
    file, offset = _mapped_file(storage.data_ptr())
    with suppress(OSError, RuntimeError):
        if file.endswith(" (deleted)"):  # as torch's strategy "file_descriptor" does
            descriptor, _ = storage._share_fd_cpu_()
            return (os.dup(descriptor), offset) if descriptor >= 0 else None
        if file.startswith("/dev/shm/"):  # noqa: S108 - as torch's strategy "file_system" does
            return os.open(file, os.O_RDWR | os.O_CLOEXEC), offset
    return None


def _mapped_file(address: int) -> tuple[str, int]:
    """The file that is mapped at an address, and the place in it; "" if that is not known."""
    with suppress(OSError), open("/proc/self/maps", errors="surrogateescape") as maps:
        for line in maps:
            fields = line.rstrip("\n").split(maxsplit=5)
            start, _, end = fields[0].partition("-")
            if int(start, 16) <= address < int(end, 16):
                place = int(fields[2], 16) + address - int(start, 16)
                return (fields[5], place) if len(fields) == 6 else ("", 0)
    return "", 0


@dataclass
class StagedImage:
    """A state dict staged into an arena: all that the checkpoint process needs to write it.

    Attributes:
        arena: Holds the records, each at its place in the file.
        snapshot: Everything else.
        shared: The records that are not in the arena.
    """

    arena: Arena
    snapshot: Snapshot
    shared: SharedRecords

    def recognise(self, staged: STATE_DICT, views: list[Any]) -> None:
        """Remember what was staged, for `image_of`.

        Args:
            staged: The staged state dict.
            views: Its tensors and arrays over the arena. They are not counted as used by this: their
                owner's list is kept, whose items stay alive as long as somebody has the image.
        """
        self._views = views
        self._keep: list[Any] = []
        self._others: list[tuple[Callable[[], Any], Any]] = []
        known = set(map(id, views))
        items = list(_walk(staged))
        for item in items:
            if id(item) in known:
                continue
            if type(item) in _IMMUTABLE or isinstance(item, type):
                self._keep.append(item)
            else:
                self._others.append((_reference(item), _content(item)))
        self._identities = list(map(id, items))
        self._geometry = _geometry(views)
        tensor = next((value for value in views if isinstance(value, torch.Tensor)), None)
        if tensor is not None:
            setattr(tensor, _IMAGE, weakref.ref(self))
        elif views:
            _images_of_arrays[id(views[0])] = self

    def describes(self, state_dict: STATE_DICT) -> bool:
        """Whether a state dict is what was staged: the very same objects, none of which was changed.

        All that was staged is alive, or noticed to be gone, so that no identity can have been given anew.
        """
        return (
            list(map(id, _walk(state_dict))) == self._identities
            and _geometry(self._views) == self._geometry
            and all(_content(reference()) == content for reference, content in self._others)
        )


def image_of(state_dict: STATE_DICT) -> StagedImage | None:
    """The image behind a staged state dict, if each of its leaves is the very object that was staged."""
    image = _image_behind(state_dict)
    return image if image is not None and image.describes(state_dict) else None


def staged_bytes(state_dict: STATE_DICT) -> int:
    """How many bytes of tensors were staged into the image behind a state dict; 0 if there is none."""
    image = _image_behind(state_dict)
    return 0 if image is None else sum(image.snapshot.plan.layout.lengths)


def _image_behind(state_dict: STATE_DICT) -> StagedImage | None:
    """The image of which a leaf was staged; what else is in the state dict may be something else."""
    for leaf in _walk(state_dict):
        image: StagedImage | None = None
        if isinstance(leaf, torch.Tensor):
            image = getattr(leaf, _IMAGE, lambda: None)()
        elif isinstance(leaf, np.ndarray):
            image = _images_of_arrays.get(id(leaf))
        if image is not None:
            return image
    return None


_IMAGE = "_milepost_image"
_images_of_arrays: weakref.WeakValueDictionary[int, StagedImage] = weakref.WeakValueDictionary()
"""By the id of an array; it says nothing once that has gone."""

_IMMUTABLE = (str, int, float, bool, type(None), bytes, complex, torch.Size, torch.dtype, torch.device)


def _reference(item: Any) -> Callable[[], Any]:
    """A weak reference, as the item may hold a view of the arena; where there can be none, a strong one."""
    try:
        return weakref.ref(item)
    except TypeError:
        return lambda: item


def _content(item: Any) -> Any:
    """Something that differs if a value that is no view of the arena was changed."""
    if isinstance(item, torch.Tensor):
        return item._version  # noqa: SLF001 - torch's own counter of changes
    if isinstance(item, np.ndarray):
        return item.dtype, item.shape, item.tobytes()
    return item is None


def _geometry(views: list[Any]) -> list[Any]:
    """Something that differs if one of the views was made to show other memory, or was written to."""
    tensors = [value for value in views if isinstance(value, torch.Tensor)]
    return [[value.data_ptr() for value in tensors], [value._version for value in tensors]]  # noqa: SLF001


def _walk(value: Any) -> Iterator[Any]:
    """Every key and leaf of nested dicts, lists, tuples and sets, and the types of these, in order."""
    stack = [value]
    while stack:
        item = stack.pop()
        kind = type(item)
        if isinstance(item, dict):
            yield kind
            yield from item
            stack += reversed(item.values())
        elif kind is list or kind is tuple:
            yield kind
            stack += reversed(item)
        elif kind is set:
            yield kind
            yield from item
        else:
            yield item
