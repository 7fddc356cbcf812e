"""The runs of memory that tensors reach, which become the records of a file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from milepost.errors import StateError
from milepost.format.paths import Path, path_text

__all__ = ["check_memory", "end_of", "is_dense", "partition", "reach", "refuse_meta"]


def check_memory(
    tensors: Sequence[torch.Tensor], paths: Sequence[Path], offsets: list[int], sizes: list[int]
) -> None:
    """Refuse tensors that reach beyond their storage: its memory was released (``resize_(0)``)."""
    for tensor, path, offset, size in zip(tensors, paths, offsets, sizes, strict=True):
        end = end_of(tensor, offset)
        if end > size:
            raise StateError(
                f"a tensor of shape {tuple(tensor.shape)} reaches {end} bytes into a storage of {size}",
                key=path_text(path),
                hint="its memory was released or resized: gather or restore it before saving",
            )


def end_of(tensor: torch.Tensor, offset: int) -> int:
    """Where a tensor ends in its storage, in bytes, if it begins at this element of it; 0 if it is empty."""
    elements = tensor.numel()
    if elements and not tensor.is_contiguous():
        elements = reach(tensor)
    return (offset + elements) * tensor.element_size() if elements else 0


def reach(tensor: torch.Tensor) -> int:
    """How many elements lie between the first and the end of the last, in memory."""
    return 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill a run of memory without gaps and without sharing any of it."""
    if tensor.is_contiguous():
        return tensor.numel() > 0
    step = 1
    for stride, n in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if n > 1 and stride != step:
            return False
        step *= n
    return step > 0


def refuse_meta(tensors: Sequence[torch.Tensor], paths: Sequence[Path]) -> None:
    """Refuse tensors without data."""
    for tensor, path in zip(tensors, paths, strict=True):
        if tensor.is_meta:
            raise StateError(
                "a meta tensor has no data to save",
                key=path_text(path),
                hint="materialise it first, for instance with module.to_empty()",
            )


def partition(
    tensors: list[torch.Tensor], pointers: list[int], offsets: list[int]
) -> tuple[tuple[list[int], list[int], list[int]], list[tuple[int, int]]]:
    """Which record each tensor lies in.

    A record is a run of bytes that tensors reach in one storage; runs that overlap are one record.

    Returns:
        (record of each tensor, its byte offset in the record, length of each record), and for each
        record a tensor in it and where the record starts, in bytes from that tensor's first element.
    """
    extents = []
    for number, (tensor, pointer, offset) in enumerate(zip(tensors, pointers, offsets, strict=True)):
        size = tensor.element_size()
        if tensor.numel() == 0:
            # One empty record for each empty tensor: the number makes the storage its own.
            extents.append((str(tensor.device), -number - 1, 0, 0, size, number))
            continue
        base = pointer - offset * size
        start = pointer - base
        extents.append((str(tensor.device), base, start, start + reach(tensor) * size, size, number))
    extents.sort()
    runs: list[list[Any]] = []  # [device, base, start, end, largest element, tensors]
    for device, base, start, end, size, number in extents:
        if runs and runs[-1][0] == device and runs[-1][1] == base and start < runs[-1][3]:
            run = runs[-1]
            run[3], run[4] = max(run[3], end), max(run[4], size)
            run[5].append((number, start))
        else:
            runs.append([device, base, start, end, size, [(number, start)]])
    runs.sort(key=lambda run: min(run[5]))
    record_of, byte_offsets = [0] * len(tensors), [0] * len(tensors)
    lengths, firsts = [], []
    for record, (_, _, first, end, largest, members) in enumerate(runs):
        start = first - first % largest  # so that every member lies at a multiple of its element size
        for number, position in members:
            record_of[number], byte_offsets[number] = record, position - start
        lengths.append(end - start)
        firsts.append((members[0][0], start - members[0][1]))
    return (record_of, byte_offsets, lengths), firsts
