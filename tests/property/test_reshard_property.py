"""The geometry of shards: what each rank holds is what torch says, every element is somewhere, and once."""

from __future__ import annotations

import itertools
from math import prod

import msgspec
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.states import differences, torch_parts
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import _StridedShard

from milepost.format.boxes import (
    MIN_CUT_BYTES,
    Box,
    Run,
    Split,
    cut,
    intersection,
    is_run,
    pieces_of,
    runs_of,
    span,
    split_for_reading,
    steps_of,
    whole,
)
from milepost.format.keys import decode_key, encode_key
from milepost.format.paths import Item
from milepost.format.shards import Table

shapes = st.lists(st.integers(0, 7), max_size=4).map(tuple)


@st.composite
def mesh_splits(draw, ndim, *, most=3):
    """The dimensions of a mesh: for each its size, the dimension of the tensor that it splits, the factor."""
    found = []
    for _ in range(draw(st.integers(0, most))):
        dim = draw(st.integers(0, ndim - 1)) if ndim else None
        found.append((draw(st.integers(1, 4)), dim, draw(st.sampled_from([1, 1, 2, 3, 5]))))
    return found


@st.composite
def layouts(draw):
    shape = draw(shapes)
    return shape, draw(mesh_splits(len(shape)))


def by_torch(tensor, mesh, coordinate):
    """What a rank holds, split by torch, one dimension of the mesh after the other."""
    for (parts, dim, factor), index in zip(mesh, coordinate, strict=True):
        if dim is not None:
            placement = Shard(dim) if factor == 1 else _StridedShard(dim, split_factor=factor)
            tensor = torch_parts(placement, tensor, parts)[index]
    return tensor


def splits_of(shape, mesh, coordinate):
    splits = [[] for _ in shape]
    for (parts, dim, factor), index in zip(mesh, coordinate, strict=True):
        if dim is not None:
            splits[dim].append(Split(parts, index, factor))
    return splits


def coordinates_of(mesh):
    return itertools.product(*(range(parts) for parts, _, _ in mesh))


def numbered(shape):
    return torch.arange(prod(shape)).reshape(shape)


def part(tensor, start, size):
    for dim, (first, n) in enumerate(zip(start, size, strict=True)):
        tensor = tensor.narrow(dim, first, n)
    return tensor


# -- what a rank holds -----------------------------------------------------------------------------


@settings(max_examples=300, suppress_health_check=[HealthCheck.filter_too_much])
@given(st.integers(0, 60), mesh_splits(1, most=4))
def test_runs_are_what_torch_splits(length, mesh):
    """However often a dimension is split, strided or not, a rank holds the indices that torch gives it."""
    for coordinate in coordinates_of(mesh):
        runs = runs_of(length, splits_of((length,), mesh, coordinate)[0])
        held = [index for run in runs for index in range(run.start, run.start + run.size)]
        assert held == by_torch(torch.arange(length), mesh, coordinate).tolist()


@given(st.integers(0, 60), mesh_splits(1, most=4))
def test_runs_are_as_few_as_can_be(length, mesh):
    """No run is empty (but for that of an empty dimension), and none goes on where the one before ends."""
    for coordinate in coordinates_of(mesh):
        runs = runs_of(length, splits_of((length,), mesh, coordinate)[0])
        if mesh:
            assert all(run.size > 0 for run in runs)
        assert all(a.start + a.size != b.start for a, b in itertools.pairwise(runs))


def test_uneven_strided_shards_are_what_torch_splits():
    """A rank holds the indices that torch gives it where a strided shard does not divide evenly."""
    for length, coordinate in itertools.product(range(8), [(0,), (1,), (2,)]):
        mesh = [(3, 0, 2)]
        runs = runs_of(length, splits_of((length,), mesh, coordinate)[0])
        held = [index for run in runs for index in range(run.start, run.start + run.size)]
        assert held == by_torch(torch.arange(length), mesh, coordinate).tolist()


@settings(max_examples=200, suppress_health_check=[HealthCheck.filter_too_much])
@given(layouts())
def test_pieces_are_what_torch_splits(layout):
    """The pieces, put where they say in a tensor of the local shape, make exactly torch's local tensor."""
    shape, mesh = layout
    full = numbered(shape)
    for coordinate in coordinates_of(mesh):
        expected = by_torch(full, mesh, coordinate)
        pieces, local = pieces_of(shape, splits_of(shape, mesh, coordinate))
        made = torch.full(local, -1)
        assert made.numel() == expected.numel()
        for piece in pieces:
            assert piece.box.volume > 0
            part(made, piece.local, piece.size).copy_(part(full, piece.start, piece.size))
        if expected.numel():
            assert torch.equal(made, expected)
        else:
            assert pieces == []


@settings(max_examples=200)
@given(layouts())
def test_the_pieces_of_all_ranks_tile_the_tensor(layout):
    """Every element is in exactly one piece of one coordinate, for the mesh dimensions that split."""
    shape, mesh = layout
    count = torch.zeros(shape, dtype=torch.int64)
    for coordinate in coordinates_of(mesh):
        for piece in pieces_of(shape, splits_of(shape, mesh, coordinate))[0]:
            part(count, piece.start, piece.size).add_(1)
    copies = prod(parts for parts, dim, _ in mesh if dim is None)
    assert (count == copies).all()


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 12))
def test_fsdp_on_top_of_tp_is_one_run(replicas, parts, rows):
    """An even dimension split by TP and then by FSDP2, with a strided shard, is one run on each rank."""
    length = replicas * parts * rows
    for left, right in itertools.product(range(replicas), range(parts)):
        runs = runs_of(length, [Split(replicas, left, parts), Split(parts, right)])
        assert runs == [Run((right * replicas + left) * rows, rows)]


# -- boxes -----------------------------------------------------------------------------------------


@st.composite
def boxes(draw, ndim, *, least=0):
    start = draw(st.lists(st.integers(0, 5), min_size=ndim, max_size=ndim))
    size = draw(st.lists(st.integers(least, 5), min_size=ndim, max_size=ndim))
    return Box(tuple(start), tuple(size))


def indices(box):
    return set(itertools.product(*(range(a, a + n) for a, n in zip(box.start, box.size, strict=True))))


@settings(max_examples=300)
@given(st.integers(0, 3).flatmap(lambda ndim: st.tuples(boxes(ndim), boxes(ndim))))
def test_an_intersection_is_that_of_the_indices(pair):
    """Two boxes have in common the indices that are in both; None stands for no index."""
    common = intersection(*pair)
    expected = indices(pair[0]) & indices(pair[1])
    assert (set() if common is None else indices(common)) == expected
    assert (common is None) == (not expected)
    assert common == intersection(*reversed(pair))


@given(shapes)
def test_the_whole_is_one_piece(shape):
    """The piece of a whole tensor starts at the origin, of both tensors, and has its shape."""
    piece = whole(shape)
    assert piece.start == piece.local == (0,) * len(shape)
    assert piece.box == Box((0,) * len(shape), shape)
    assert piece.box.volume == prod(shape)


@given(shapes)
def test_steps_are_the_strides_of_a_contiguous_tensor(shape):
    """The steps of a shape are torch's strides of a new tensor of it."""
    assert steps_of(shape) == torch.empty(shape, device="meta").stride()


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(0, 9)), max_size=4))
def test_a_span_reaches_from_the_first_to_the_last_element(dims):
    """A span goes from the lowest to behind the highest element of a box, whatever the strides."""
    start, size, stride = ([dim[n] for dim in dims] for n in range(3))
    places = [
        sum(i * step for i, step in zip(index, stride, strict=True))
        for index in itertools.product(*(range(a, a + n) for a, n in zip(start, size, strict=True)))
    ]
    assert span(start, size, stride) == (min(places), max(places) + 1)


@given(shapes.filter(all), st.data())
def test_a_run_of_memory_is_recognised(shape, data):
    """A box is one run of memory if its elements, in order, follow one another in each tensor."""
    start = [data.draw(st.integers(0, n - 1)) for n in shape]
    size = [data.draw(st.integers(1, n - first)) for n, first in zip(shape, start, strict=True)]
    order = data.draw(st.permutations(range(len(shape))))
    tensor = numbered(shape)
    moved = numbered([shape[n] for n in order]).permute([order.index(n) for n in range(len(shape))])
    for held in (tensor, moved):
        found = part(held, start, size).flatten().tolist()
        consecutive = found == list(range(found[0], found[0] + len(found)))
        assert is_run(size, held.stride()) == consecutive
    assert is_run(size, tensor.stride(), moved.stride()) == (
        is_run(size, tensor.stride()) and is_run(size, moved.stride())
    )


# -- who writes what -------------------------------------------------------------------------------


big_shapes = st.one_of(
    shapes,
    st.lists(st.integers(1, 600), min_size=1, max_size=2).map(tuple),
    st.tuples(st.integers(1, 3), st.integers(1, 500), st.integers(1, 200)),
)
plans = st.tuples(
    st.lists(st.tuples(big_shapes, st.sampled_from([1, 2, 4, 8, 16])), max_size=12), st.integers(1, 9)
)


def row_bytes(shape, itemsize):
    dim = next((d for d, n in enumerate(shape) if n > 1), None)
    return prod(shape) * itemsize // (shape[dim] if dim is not None else 1)


@settings(max_examples=300)
@given(plans)
def test_the_shares_of_all_replicas_tile_each_tensor(plan):
    """A tensor is divided along one dimension, of which each index is in exactly one box."""
    tensors, parts = plan
    found = cut([shape for shape, _ in tensors], [size for _, size in tensors], parts)
    assert len(found) == len(tensors)
    for (shape, _), shares in zip(tensors, found, strict=True):
        assert list(shares) == sorted(shares)
        assert all(part in range(parts) for part in shares)
        assert all(box.volume for box in shares.values())
        held = list(shares.values())
        assert sum(box.volume for box in held) == prod(shape)
        if shape and held:
            dims = [d for d in range(len(shape)) if any(box.size[d] != shape[d] for box in held)]
            assert len(dims) <= 1
            dim = dims[0] if dims else 0
            position = 0
            for box in held:
                assert box.start == (0,) * dim + (position,) + (0,) * (len(shape) - dim - 1)
                position += box.size[dim]
            assert position == shape[dim]
        elif not shape:
            assert held == [Box((), ())]


@settings(max_examples=300)
@given(plans)
def test_the_shares_are_even(plan):
    """Each replica's bytes are what is fair, but for one row and two of the smallest boxes that are cut."""
    tensors, parts = plan
    found = cut([shape for shape, _ in tensors], [size for _, size in tensors], parts)
    loads = [0] * parts
    for (_, itemsize), shares in zip(tensors, found, strict=True):
        for replica, box in shares.items():
            loads[replica] += box.volume * itemsize
    total = sum(loads)
    assert total == sum(prod(shape) * size for shape, size in tensors)
    row = max((row_bytes(shape, size) for shape, size in tensors), default=0)
    for load in loads:
        assert abs(load - total / parts) <= row + 2 * MIN_CUT_BYTES + 1


@settings(max_examples=300)
@given(plans)
def test_few_tensors_are_divided(plan):
    """At most one tensor less than there are replicas is divided, none into boxes that are too small."""
    tensors, parts = plan
    found = cut([shape for shape, _ in tensors], [size for _, size in tensors], parts)
    divided = 0
    for (_, itemsize), shares in zip(tensors, found, strict=True):
        held = [box.volume * itemsize for box in shares.values()]
        if len(held) > 1:
            divided += 1
            assert min(held) >= MIN_CUT_BYTES
    assert divided <= parts - 1


@given(plans)
def test_every_replica_derives_the_same_shares(plan):
    """Shapes as lists or as torch.Size, asked for again: the shares are the same."""
    tensors, parts = plan
    sizes = [size for _, size in tensors]
    first = cut([shape for shape, _ in tensors], sizes, parts)
    assert first == cut([list(shape) for shape, _ in tensors], sizes, parts)
    assert first == cut([torch.Size(shape) for shape, _ in tensors], sizes, parts)


# -- reading ---------------------------------------------------------------------------------------


@st.composite
def reads(draw):
    shape = draw(shapes.filter(all))
    start = tuple(draw(st.integers(0, n - 1)) for n in shape)
    size = tuple(draw(st.integers(1, n - first)) for n, first in zip(shape, start, strict=True))
    order = draw(st.permutations(range(len(shape))))
    stride = numbered([shape[n] for n in order]).permute([order.index(n) for n in range(len(shape))]).stride()
    small = draw(st.integers(0, 40))
    return Box(start, size), stride, small, draw(st.integers(small, 400))


@settings(max_examples=300)
@given(reads())
def test_the_parts_of_a_read_tile_the_box(read):
    """Every index of the box is in exactly one part, and no part is empty."""
    box, stride, small, large = read
    parts = list(split_for_reading(box, stride, small=small, large=large))
    found = [index for part_ in parts for index in itertools.product(*map(_range, *part_))]
    assert len(found) == box.volume
    assert set(found) == indices(box)
    assert all(part_.volume for part_ in parts)


def _range(start, size):
    return range(start, start + size)


@settings(max_examples=300)
@given(reads())
def test_the_parts_of_a_read_are_worth_it(read):
    """No part reaches too far, unless it is one element; a long one is at least half full."""
    box, stride, small, large = read
    for part_ in split_for_reading(box, stride, small=small, large=large):
        first, end = span(part_.start, part_.size, stride)
        if part_.volume > 1:
            assert end - first <= large
            assert end - first <= small or 2 * part_.volume >= end - first


# -- the table of who holds what -------------------------------------------------------------------


@settings(max_examples=200)
@given(
    st.integers(1, 3).flatmap(
        lambda ndim: st.tuples(st.lists(st.tuples(st.integers(0, 5), boxes(ndim)), max_size=8), boxes(ndim))
    )
)
def test_a_table_finds_what_lies_within_a_box(case):
    """The parts of a box that files hold are found, each with its rank, in the table's order."""
    rows, wanted = case
    table = Table(
        [rank for rank, _ in rows],
        [n for _, box in rows for n in box.start],
        [n for _, box in rows for n in box.size],
    )
    table.sort(len(wanted.start))
    rows.sort(key=lambda row: row[1].start[0])
    expected = [(rank, intersection(wanted, box)) for rank, box in rows]
    assert list(table.within(wanted)) == [(rank, box) for rank, box in expected if box is not None]


@settings(max_examples=300)
@given(st.integers(0, 3).flatmap(lambda ndim: st.lists(boxes(ndim), max_size=6)))
def test_a_table_knows_its_volume_and_whether_boxes_meet(held):
    """Both are those of the single elements, for boxes side by side, one behind the other, or overlapping."""
    held = [box for box in held if box.volume]
    dims = len(held[0].start) if held else 1
    numbers = [[n for box in held for n in box[part]] for part in (0, 1)]
    table = Table([0] * len(held), *numbers)
    table.sort(dims)
    elements = [place for box in held for place in indices(box)]
    assert table.volume(dims) == len(elements)
    assert table.is_disjoint(dims) == (len(set(elements)) == len(elements))


def test_a_table_of_a_number_names_one_rank():
    """A tensor without dimensions is read from one rank, whichever ranks hold it."""
    assert list(Table([3, 4], [], []).within(Box((), ()))) == [(3, Box((), ()))]
    assert list(Table([], [], []).within(Box((), ()))) == []


# -- keys ------------------------------------------------------------------------------------------


steps = st.one_of(
    st.text(st.characters(exclude_categories=()), max_size=6),
    st.sampled_from([1, "1", True, False, 0, "0", Item(1), Item(0), 1.0, None, "None", b"1", "item"]),
    st.integers(0, 2**40).map(Item),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False),
    st.booleans(),
    st.binary(max_size=4),
    st.tuples(st.integers(), st.text(max_size=3)),
)
paths = st.lists(steps, max_size=5).map(tuple)


@settings(max_examples=300)
@given(paths)
def test_a_key_comes_back_as_it_was(path):
    """A typed path survives JSON: text, numbers, positions and the rest come back, each of its type."""
    key = msgspec.json.decode(msgspec.json.encode(encode_key(path)))
    back = decode_key(key)
    assert not differences(path, back)
    assert [type(step) for step in back] == [type(step) for step in path]


@given(paths, paths)
def test_different_paths_have_different_keys(one, other):
    """Two paths have the same key only if each step is equal and of the same type."""
    same = not differences(one, other)
    keys = [msgspec.json.encode(encode_key(path)) for path in (one, other)]
    assert (keys[0] == keys[1]) == same


def test_like_steps_are_told_apart():
    """1, "1", True, 1.0, b"1" and position 1 are six keys."""
    keys = {msgspec.json.encode(encode_key((step,))) for step in (1, "1", True, 1.0, b"1", Item(1))}
    assert len(keys) == 6


def test_thousands_of_replicas_do_not_make_crumbs():
    """With more replicas than there are boxes worth writing, some replicas write nothing."""
    found = cut([(1024, 64)] * 4, [4] * 4, 10_000)
    assert [len(boxes) for boxes in found] == [4] * 4
    assert all(box.volume * 4 == MIN_CUT_BYTES for boxes in found for box in boxes.values())
