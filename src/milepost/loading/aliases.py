"""Tensors of a template that share memory: whether all of them can hold what was saved for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from operator import mul
from typing import Any

import torch

from milepost.format.index import Tensors
from milepost.format.tree import Node, paths_of
from milepost.loading.template import Fill, copy_into
from milepost.state.decode import dtype_of, tensor_over
from milepost.state.memory import is_dense, reach

__all__ = ["hold_together", "raw_bytes", "sharing_misfits"]


def sharing_misfits(
    fills: Sequence[Fill],
    tensors: Tensors,
    tree: Node,
    same_bytes: Callable[[int, int], bool],
    fit_together: Callable[..., bool] = lambda *_: False,
) -> list[str]:
    """A sentence for each tensor that would overwrite what another one is filled with.

    Tensors without gaps are compared with each other, and those with gaps where they are the very same view.
    Of others, whose elements may lie between those of each other, the later is right.

    Args:
        fills: What goes where.
        tensors: The saved tensors.
        tree: The tree that refers to them.
        same_bytes: Whether two saved tensors of one shape and stride have the same bytes.
        fit_together: Whether two targets can hold what was saved for them, where descriptions cannot tell.
    """
    targets = [fill.target for fill in fills]
    starts = map(torch.Tensor.data_ptr, targets)
    sizes = map(mul, map(torch.Tensor.numel, targets), map(torch.Tensor.element_size, targets))
    extents = sorted(
        [(start, start + size, n) for n, (start, size) in enumerate(zip(starts, sizes, strict=True))]
    )
    if all(end <= start for (_, end, _), (start, _, _) in pairwise(extents)):
        return []
    conflicts = []
    last: tuple[int, int] | None = None  # end and number of the one that reaches farthest
    with_gaps: dict[Any, int] = {}
    for start, end, number in extents:
        target = targets[number]
        if start == end:
            continue
        other, dense = None, is_dense(target)
        if not dense:
            view = (start, target.dtype, target.shape, target.stride(), target.device)
            other = with_gaps.setdefault(view, number)
        elif last is not None and start < last[0] and target.device == targets[last[1]].device:
            other = last[1]
        if other is not None and other != number:
            pair = fills[other], fills[number]
            if not _agree(*pair, tensors, same_bytes) and not fit_together(*pair):
                conflicts.append(pair)
        if dense and (last is None or end > last[0]):
            last = end, number
    if not conflicts:
        return []
    paths = paths_of(tree, "tensor")
    return [
        f"{paths[later.number]}: expected the values of {paths[first.number]}, with which it shares memory, "
        "found others"
        for first, later in conflicts
    ]


def _agree(first: Fill, later: Fill, tensors: Tensors, same_bytes: Callable[[int, int], bool]) -> bool:
    """Whether two tensors that share memory can both hold what was saved for them."""
    a, b = first.number, later.number
    if _turned(first, tensors) != _turned(later, tensors):
        return False
    if (first.pieces or later.pieces) and first.parts() != later.parts():
        return False
    distance = later.target.data_ptr() - first.target.data_ptr()
    if (_converted(first, tensors) or _converted(later, tensors)) and (
        distance or first.target.dtype != later.target.dtype or tensors.dtype[a] != tensors.dtype[b]
    ):
        return False
    as_saved = (
        tensors.record[a] == tensors.record[b]
        and tensors.byte_offset[b] - tensors.byte_offset[a] == distance
        and _has_steps(first.target, tensors.stride[a])
        and _has_steps(later.target, tensors.stride[b])
    )
    return as_saved or (
        distance == 0
        and first.target.dtype == later.target.dtype
        and first.target.shape == later.target.shape
        and _has_steps(first.target, list(later.target.stride()))
        and tensors.stride[a] == tensors.stride[b]
        and (a == b or same_bytes(a, b))
    )


def _turned(fill: Fill, tensors: Tensors) -> tuple[bool, bool]:
    """Whether one of a target and what was saved for it stands for conjugate, or negative, values alone."""
    return (
        fill.target.is_conj() != (fill.number in tensors.conj),
        fill.target.is_neg() != (fill.number in tensors.neg),
    )


def _converted(fill: Fill, tensors: Tensors) -> bool:
    """Whether the target has another dtype than what was saved for it."""
    return fill.target.dtype != dtype_of(tensors.dtype[fill.number])


def _has_steps(tensor: torch.Tensor, stride: Sequence[int]) -> bool:
    steps = zip(tensor.shape, tensor.stride(), stride, strict=True)
    return all(n == 1 or step == other for n, step, other in steps)


def raw_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor's values, in the order of its elements."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)


def hold_together(fills: Sequence[Fill], load: Callable[[Sequence[Fill]], None]) -> bool:
    """Whether targets that share memory, with each other or in themselves, can hold their saved values.

    The values are loaded aside, copied into such memory one after the other, and compared afterwards.

    Args:
        fills: The targets, which stay as they are.
        load: Fills targets with what was saved.
    """
    targets = [fill.target for fill in fills]
    start = min(target.data_ptr() for target in targets)
    end = max(target.data_ptr() + reach(target) * target.element_size() for target in targets)
    memory = torch.zeros(end - start, dtype=torch.uint8, device="cpu").untyped_storage()
    values, views = [], []
    for target in targets:
        offset, bits = target.data_ptr() - start, (target.is_conj(), target.is_neg())
        if offset % target.element_size():
            return False
        values.append(torch.empty(target.shape, dtype=target.dtype, device="cpu"))
        views.append(tensor_over(memory, offset, target.dtype, target.shape, target.stride(), bits))
    load([Fill(value, fill.number, fill.parts()) for value, fill in zip(values, fills, strict=True)])
    pairs = list(zip(views, values, strict=True))
    for view, value in pairs:
        copy_into(view, value)
    return all(torch.equal(raw_bytes(view), raw_bytes(value)) for view, value in pairs)
