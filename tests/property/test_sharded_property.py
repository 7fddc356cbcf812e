"""Any layout into any layout: DTensors of every placement, replicas and each rank's own, in one process.

Torch's fake process group makes this process any rank of any world; what a rank holds of a tensor is told by
torch's own ``_split_tensor``, never by the code under test.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.disks import MemoryStorage
from support.ranks import as_rank
from support.states import bytes_tensor, raw_bytes, torch_parts
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from milepost.checkpoint_reader import CheckpointReader
from milepost.checkpoint_writer import CheckpointWriter
from milepost.config import CheckpointWriterConfig
from milepost.errors import CorruptCheckpointError
from milepost.format.index import decode_index
from milepost.health.verify import verify
from milepost.storage.local import LocalStorage
from milepost.types import RankInfo

DTYPES = [torch.float32, torch.bfloat16, torch.bool, torch.int64, torch.float64, torch.uint8, torch.complex64]

_paths = itertools.count()

# -- worlds ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mesh:
    """The ranks of a mesh: row by row, those of `order`."""

    shape: tuple[int, ...]
    order: tuple[int, ...]

    def make(self):
        names = tuple("abc"[: len(self.shape)])
        return DeviceMesh("cpu", torch.tensor(self.order).reshape(self.shape), mesh_dim_names=names)

    def coordinate(self, rank):
        place = self.order.index(rank)
        found = []
        for n in reversed(self.shape):
            found.insert(0, place % n)
            place //= n
        return tuple(found)


def local_of(full, mesh, placements, rank):
    """What a rank holds, as torch splits it: one placement after the other, in the order of the mesh."""
    local = full
    for n, index, placement in zip(mesh.shape, mesh.coordinate(rank), placements, strict=True):
        if not isinstance(placement, Replicate):
            local = torch_parts(placement, local, n)[index]
    return local.clone(memory_format=torch.contiguous_format)


def dtensor(local, mesh, placements, full):
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=full.shape, stride=full.stride()
    )


def odd(tensor):
    """The same values in memory that is laid out backwards and has gaps."""
    base = torch.zeros((*reversed(tensor.shape), 2), dtype=tensor.dtype)[..., 1]
    view = base.permute(tuple(reversed(range(tensor.ndim))))
    view.copy_(tensor)
    return view


# -- what hypothesis draws -------------------------------------------------------------------------

SHAPES = [(size,) for size in range(1, 9)]
SHAPES += [(a, b) for a in range(1, 5) for b in range(1, 5) if a * b <= 8]
SHAPES += [(2, 2, 2), (1, 2, 3), (2, 1, 2), (3, 2, 1)]


@st.composite
def meshes(draw):
    shape = draw(st.sampled_from(SHAPES))
    size = 1
    for n in shape:
        size *= n
    ranks = np.array(draw(st.permutations(range(size)))).reshape(shape)
    for dim in range(len(shape)):
        ranks.sort(dim)  # torch itself contradicts itself about others: `placed` refuses them
    return Mesh(shape, tuple(ranks.flatten().tolist()))


@st.composite
def placements(draw, shape, ndim):
    """Any placements on a mesh of this shape of a tensor with so many dimensions."""
    if ndim == 0:
        return (Replicate(),) * len(shape)
    if len(shape) > 1 and draw(st.integers(0, 3)) == 0:  # FSDP2 on top of TP
        left = draw(st.integers(0, len(shape) - 2))
        dim = draw(st.integers(0, ndim - 1))
        rest = [draw(st.sampled_from([Replicate(), Shard(dim)])) for _ in shape]
        rest[left] = _StridedShard(dim, split_factor=shape[left + 1])
        rest[left + 1] = Shard(dim)
        return tuple(rest)
    one = st.one_of(
        st.just(Replicate()),
        st.integers(0, ndim - 1).map(Shard),
        st.builds(
            lambda dim, n: _StridedShard(dim, split_factor=n), st.integers(0, ndim - 1), st.integers(2, 3)
        ),
    )
    return tuple(draw(one) for _ in shape)


@dataclass(frozen=True)
class Tensor:
    """A tensor of a state: how it was saved, and how it is loaded."""

    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    seed: int
    saved_as: tuple
    loaded_as: tuple | None
    odd: bool

    def full(self, rank):
        """The whole of it; if each rank has its own, that of this rank."""
        return bytes_tensor(self.dtype, self.shape, self.seed * 100 + (rank if self.kind == "own" else 0))


@st.composite
def tensors(draw, before, after):
    shape = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
    return Tensor(
        draw(st.sampled_from(["sharded", "sharded", "sharded", "replicated", "own"])),
        shape,
        draw(st.sampled_from(DTYPES)),
        draw(st.integers(0, 50)),
        draw(placements(before.shape, len(shape))),
        draw(st.none() | placements(after.shape, len(shape))),
        draw(st.booleans()),
    )


@st.composite
def cases(draw):
    before, after = draw(meshes()), draw(meshes())
    return before, after, draw(st.lists(tensors(before, after), min_size=1, max_size=5))


def key_of(number, tensor):
    return f"{tensor.kind}{number}"


def state_of(rank, size, mesh, found):
    """The state of a rank, as it is saved; needs the process group."""
    made = mesh.make()
    state = {"rank": rank, "deep": [{}, {}]}
    for number, tensor in enumerate(found):
        full = tensor.full(rank)
        if tensor.kind == "sharded":
            local = local_of(full, mesh, tensor.saved_as, rank)
            value = dtensor(odd(local) if tensor.odd else local, made, tensor.saved_as, full)
        else:
            value = odd(full) if tensor.odd else full
        state["deep"][number % 2][key_of(number, tensor)] = value
    return state


def save(storage, mesh, found, path=None, order=None):
    """Save a state as every rank of a mesh in turn; returns the path."""
    size = len(mesh.order)
    path = path or f"/run/{next(_paths)}"
    config = CheckpointWriterConfig(start_id="start", replicated=["*.replicated*"])
    for rank in order or range(size):
        with as_rank(rank, size):
            writer = CheckpointWriter(config, RankInfo(rank, size), storage=storage)
            try:
                writer.write(path, state_of(rank, size, mesh, found))
            finally:
                writer.close()
    return path


def template_of(rank, mesh, found, saved_size):
    """A template of zeros for a rank; with it, for each tensor, what is to be filled, and with what."""
    made = mesh.make()
    state, expected = {"rank": None, "deep": [{}, {}]}, []
    for number, tensor in enumerate(found):
        full = tensor.full(rank % saved_size)
        local = full if tensor.loaded_as is None else local_of(full, mesh, tensor.loaded_as, rank)
        target = torch.zeros_like(local)
        target = odd(target) if tensor.odd else target
        value = target if tensor.loaded_as is None else dtensor(target, made, tensor.loaded_as, full)
        state["deep"][number % 2][key_of(number, tensor)] = value
        expected.append((key_of(number, tensor), target, local))
    return state, expected


def storage_of_memory():
    storage = MemoryStorage()
    storage.make_folder("/run")
    return storage


slow_ok = settings(suppress_health_check=[*HealthCheck])


@settings(slow_ok, max_examples=80)
@given(cases(), st.sampled_from([True, "first", False]))
def test_any_layout_loads_into_any_other(case, verified):
    """Whatever world, mesh and placements a tensor was saved from, each rank of another gets its part."""
    before, after, found = case
    storage = storage_of_memory()
    path = save(storage, before, found)
    size = len(after.order)
    for rank in range(size):
        with as_rank(rank, size):
            template, expected = template_of(rank, after, found, len(before.order))
            reader = CheckpointReader(RankInfo(rank, size), storage=storage)
            loaded, missing = reader.read(path, template, verify=verified, together=False)
            assert missing == []
            assert loaded is template
            assert loaded["rank"] == rank % len(before.order)
            for key, target, wanted in expected:
                assert raw_bytes(target) == raw_bytes(wanted), (rank, key)


@settings(slow_ok, max_examples=40)
@given(cases(), st.integers(1, 9), st.booleans())
def test_any_layout_loads_whole_without_a_process_group(case, size, verified):
    """Without a template and without torch.distributed every tensor comes whole, as plain tensors."""
    before, _, found = case
    storage = storage_of_memory()
    path = save(storage, before, found)
    for rank in range(size):
        reader = CheckpointReader(RankInfo(rank, size), storage=storage)
        loaded, _ = reader.read(path, verify=verified)
        source = rank % len(before.order)
        assert loaded["rank"] == source
        for number, tensor in enumerate(found):
            value = loaded["deep"][number % 2][key_of(number, tensor)]
            full = tensor.full(source)
            assert type(value) is torch.Tensor
            assert (value.dtype, value.shape) == (full.dtype, full.shape)
            assert raw_bytes(value) == raw_bytes(full), (rank, tensor)


@settings(slow_ok, max_examples=25)
@given(cases(), st.randoms(use_true_random=False))
def test_any_order_of_ranks_makes_the_same_checkpoint(case, order):
    """The rank that comes last commits, whichever it is, and what is loaded does not depend on it."""
    before, _, found = case
    ranks = list(range(len(before.order)))
    order.shuffle(ranks)
    storage = storage_of_memory()
    path = save(storage, before, found, order=ranks)
    assert verify(storage, path).problems == []
    loaded, _ = CheckpointReader(RankInfo(0, 1), storage=storage).read(path)
    for number, tensor in enumerate(found):
        assert raw_bytes(loaded["deep"][number % 2][key_of(number, tensor)]) == raw_bytes(tensor.full(0))


@settings(slow_ok, max_examples=25)
@given(cases())
def test_plain_torch_opens_every_ranks_file(tmp_path_factory, case):
    """torch.load opens the file of each rank, and verify finds every byte as it was written."""
    before, _, found = case
    path = save(LocalStorage(), before, found, str(tmp_path_factory.mktemp("run") / "c"))
    report = verify(LocalStorage(), path)
    assert report.problems == []
    assert report.warnings == []
    for rank in range(len(before.order)):
        plain = torch.load(f"{path}/checkpoint_{rank}.pt")
        assert plain["rank"] == rank
        for number, tensor in enumerate(found):
            held = plain["deep"][number % 2][key_of(number, tensor)]
            assert held.dtype == tensor.dtype
            if tensor.kind == "own":
                assert raw_bytes(held) == raw_bytes(tensor.full(rank))


# -- each byte once --------------------------------------------------------------------------------


@settings(slow_ok, max_examples=15)
@given(
    meshes(),
    st.lists(st.tuples(st.integers(1, 400), st.integers(1, 600), st.booleans()), min_size=1, max_size=4),
)
def test_replicas_are_saved_once(mesh, shapes):
    """What all ranks hold alike takes its own size in all files together, and a few KiB for each rank."""
    found = []
    for number, (rows, columns, declared) in enumerate(shapes):
        kind = "replicated" if declared else "sharded"
        everywhere = (Replicate(),) * len(mesh.shape)
        found.append(Tensor(kind, (rows, columns), torch.float32, number, everywhere, None, False))
    storage = storage_of_memory()
    path = save(storage, mesh, found)
    size = len(mesh.order)
    folder = storage.open_folder(path)
    try:
        written = sum(folder.stat(f"checkpoint_{rank}.pt").size_bytes for rank in range(size))
    finally:
        folder.close()
    state = sum(rows * columns * 4 for rows, columns, _ in shapes)
    assert written <= 1.02 * state + size * (8 << 10)


# -- damage ----------------------------------------------------------------------------------------


@settings(slow_ok, max_examples=40)
@given(cases(), st.integers(0, 2**32))
def test_damage_is_found_or_does_not_matter(tmp_path_factory, case, seed):
    """A flipped byte in any record of any rank is an error that names the key, or was not to be loaded."""
    before, after, found = case
    random_ = random.Random(seed)
    path = save(LocalStorage(), before, found, str(tmp_path_factory.mktemp("run") / "c"))
    damaged = random_.randrange(len(before.order))
    index = decode_index(Path(path, f"index_{damaged}.json").read_bytes(), path)
    records = [n for n, length in enumerate(index.records.length) if length]
    if not records:
        return
    record = random_.choice(records)
    place = index.records.offset[record] + random_.randrange(index.records.length[record])
    name = f"{path}/checkpoint_{damaged}.pt"
    with open(name, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ (1 << random_.randrange(8))]))
    assert verify(LocalStorage(), path).problems
    size = len(after.order)
    for rank in range(size):
        with as_rank(rank, size):
            template, expected = template_of(rank, after, found, len(before.order))
            how = random_.choice([True, "first"])
            error = None
            try:
                CheckpointReader(RankInfo(rank, size)).read(path, template, together=False, verify=how)
            except CorruptCheckpointError as caught:
                error = caught
        if error is None:
            for key, target, wanted in expected:
                assert raw_bytes(target) == raw_bytes(wanted), (rank, key)
            continue
        assert any(key_of(n, tensor) in str(error) for n, tensor in enumerate(found)), str(error)
        assert f"checkpoint_{damaged}" in str(error)
        if how == "first":
            assert not error.targets_modified
            assert not any(target.any() for _, target, _ in expected)
    reader = CheckpointReader(RankInfo(damaged, len(before.order)))
    with pytest.raises(CorruptCheckpointError):
        reader.read(path)
