"""What thousands of ranks cost: reading their indexes, planning a load on half of them, and committing.

One machine stands for all ranks. Torch's fake process group makes a process any rank of any world, so the
first and the last rank save for real, and the last of them commits; the indexes in between are the first
one's with what differs from rank to rank filled in, which is compared with what the last rank really wrote.
Data files have the right size, but nothing is read from them here.
"""

from __future__ import annotations

import copy
import gc
import itertools
import json
import os
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import torch
from harness import MIB, Bar, Group, Row, in_worker, peak_private_bytes

from milepost.checkpoint_reader import CheckpointReader
from milepost.checkpoint_writer import CheckpointWriter, CheckpointWriterConfig
from milepost.commit import Attempt, Clock
from milepost.commit import begin as begin_attempt
from milepost.commit.marks import assemble
from milepost.format.boxes import cut
from milepost.format.index import Index, decode_index, encode_index
from milepost.format.names import data_name, index_name, join_hidden
from milepost.loading.renames import Names
from milepost.state.encode import StateEncoder
from milepost.storage import default_storage
from milepost.testing.faults import FaultyStorage
from milepost.types import RankInfo

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # where the helpers of the tests live
from support.disks import MemoryStorage
from support.ranks import as_rank

TENSORS = 1024
REAL_SHAPES = [(n,) for n in (1, 2, 3)] + [(a, b) for a in (1, 2, 3) for b in (2, 4, 8)]
"""A dozen shapes, as the layers of a model have; the first number is that of the rows on each rank."""


def local_shape(number: int, variant: str) -> tuple[int, ...]:
    """The shape of each rank's part of a tensor: in the worst case no two tensors are alike."""
    if variant == "worst":
        return (1 + number % 32, 1 + number // 32)
    return REAL_SHAPES[number % len(REAL_SHAPES)]


def sharded_state(size: int, variant: str, factor: int = 1) -> dict[str, dict[str, torch.Tensor]]:
    """This rank's state: DTensors with `factor` times the rows of `local_shape` on each of `size` ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (size,))
    made = {}
    for number in range(TENSORS):
        rows, *rest = local_shape(number, variant)
        local = torch.randn(rows * factor, *rest)
        shape = torch.Size((rows * factor * size, *rest))
        made[f"layers.{number // 8}.block.{number % 8}.weight"] = DTensor.from_local(
            local, mesh, [Shard(0)], run_check=False, shape=shape, stride=local.stride()
        )
    return {"model": made}


# -- a checkpoint of many ranks ----------------------------------------------------------------------


def writer(rank: int, size: int, storage: object = None, replicated: list[str] | None = None):
    config = CheckpointWriterConfig(start_id="bench", replicated=replicated or [])
    return CheckpointWriter(config, RankInfo(rank, size), storage=storage)


def make(path: str, size: int, variant: str) -> None:
    """A committed checkpoint of `size` ranks at `path`."""
    with as_rank(0, size):
        writer(0, size).write(path, sharded_state(size, variant))
    folder = hidden_folder(default_storage(), path)
    with open(os.path.join(folder, index_name(0)), "rb") as file:
        first = decode_index(file.read(), file.name)
    for rank in range(1, size - 1):
        index = index_of(first, rank)
        with open(os.path.join(folder, data_name(rank)), "wb") as file:
            file.truncate(index.files[0].size)
        with open(os.path.join(folder, index_name(rank)), "wb") as file:
            file.write(encode_index(index))
    with as_rank(size - 1, size):
        state = sharded_state(size, variant)
        writer(size - 1, size).write(path, state)
    with open(os.path.join(path, index_name(size - 1)), "rb") as file:
        last = decode_index(file.read(), file.name)
    assert described(last) == described(index_of(first, size - 1)), (
        "the indexes that were filled in are wrong"
    )


def index_of(first: Index, rank: int) -> Index:
    """The index of another rank: the first one's, other places, files and checksums."""
    index = copy.copy(first)
    index.rank, index.process, index.sequence = rank, f"{rank:016x}", 0  # rank 0 numbers the saves
    size = first.files[0].size + len(str(rank)) - len(str(first.rank))  # the file says whose it is
    index.files = [msgspec.structs.replace(first.files[0], name=data_name(rank), size=size, crc32=crc())]
    index.records = msgspec.structs.replace(first.records, crcs=[crc() for _ in first.records.crcs])
    shards = first.shards
    start, position = list(shards.start), 0
    for shape in shards.shape:
        start[position] = rank * shards.size[position]
        position += len(shape)
    index.shards = msgspec.structs.replace(shards, start=start)
    return index


def crc() -> int:
    return random.getrandbits(32)


def described(index: Index) -> object:
    """What an index says, but for checksums and the time."""
    plain = json.loads(encode_index(index))
    for name in ("time", "process", "writer"):
        del plain[name]
    del plain["records"]["crcs"], plain["files"][0]["crc32"]
    return plain


# -- what one rank does ------------------------------------------------------------------------------


def needed(path: str, size: int, rank: int) -> list[str]:
    """The JSON files that a rank of size / 2 ranks needs: its own index and those it reads from."""
    ranks = sorted({rank, 2 * rank, 2 * rank + 1})
    names = ["manifest.json", "shards.json", *map(index_name, ranks)]
    return [os.path.join(path, name) for name in names]


def planning(path: str, size: int, rank: int, template: dict) -> Callable[[], object]:
    """All that a load does before it reads tensors: find, decode, check and hash, match and plan."""

    def work() -> object:
        reader = CheckpointReader(RankInfo(rank, size // 2))
        source, found, _ = reader._prepared(path, template, None, True, Names(), alone=True)
        assert not found.misfits
        assert not found.missing
        assert len(found.fills) == TENSORS
        assert {*source._lookup._ranks} == {rank, 2 * rank, 2 * rank + 1}
        return source, found

    return work


def plan(path: str, size: int, variant: str, rounds: int) -> dict[str, float]:
    """In a process of its own: peak memory first, then rounds side by side with plain decoding."""
    rank = size // 4 + 1
    with as_rank(rank, size // 2):
        template = sharded_state(size // 2, variant, factor=2)
        work = planning(path, size, rank, template)
        kept: list[object] = []
        peak = peak_private_bytes(lambda: kept.append(work()))
        files = []
        for name in needed(path, size, rank):
            with open(name, "rb") as file:
                files.append(file.read())

        def decode() -> object:
            return [msgspec.json.decode(data) for data in files]

        ours, plain = [], []
        for turn in range(rounds):
            for seconds, run in ((ours, work), (plain, decode))[:: 1 if turn % 2 else -1]:
                _close(kept)
                gc.collect()
                gc.disable()  # for both: decoding without the collector is the harder baseline
                start = time.perf_counter()
                kept.append(run())
                seconds.append(time.perf_counter() - start)
                gc.enable()
        _close(kept)
    found = {"plan": statistics.median(ours), "decode": statistics.median(plain)}
    return found | {"plan memory": peak, "JSON": sum(map(len, files))}


def _close(kept: list[object]) -> None:
    for item in kept:
        if isinstance(item, tuple):
            item[0].__exit__(None, None, None)
    kept.clear()


def merge(path: str, size: int) -> dict[str, float]:
    """In a process of its own: what the last rank does with all indexes, which were just written."""
    with open(os.path.join(path, "manifest.json"), "rb") as file:
        attempt = json.load(file)["body"]["attempt"]
    seconds = []

    def work() -> None:
        folder = default_storage().open_folder(path)
        start = time.perf_counter()
        assembled = assemble(folder, attempt, set(range(size)), live=True)
        seconds.append(time.perf_counter() - start)
        folder.close()
        assert assembled is not None

    peak = peak_private_bytes(work)
    gc.collect()
    gc.disable()  # decoding without the collector is the harder baseline
    start = time.perf_counter()
    for rank in range(size):
        with open(os.path.join(path, index_name(rank)), "rb") as file:
            msgspec.json.decode(file.read())
    plain = time.perf_counter() - start
    gc.enable()
    return {"merge": seconds[0], "merge memory": peak, "read all": plain}


def planning_group(folder: str, variant: str, worlds: list[int], rounds: int) -> Group:
    def row(size: int) -> Row:
        def turn(limit: float) -> dict[str, float]:
            with tempfile.TemporaryDirectory(dir=folder) as inner:
                path = os.path.join(inner, "checkpoint")
                in_worker(make, path, size, variant, limit=limit)
                found = in_worker(plan, path, size, variant, rounds, limit=limit)
                return found | in_worker(merge, path, size, limit=limit)

        return Row(f"{size:,} ranks", turn)

    bars = [Bar("1,024 ranks", "plan", 3, "1,024 ranks", "decode")] if 1024 in worlds else []
    bars += [Bar("1,024 ranks", "plan memory", 1024 * MIB)] if 1024 in worlds else []
    for few, many in itertools.pairwise(worlds):
        for figure, growth in (("plan", 1.15), ("merge", 1.25), ("plan memory", 1.15)):
            bars.append(Bar(f"{many:,} ranks", figure, growth * many / few, f"{few:,} ranks", figure))
    shapes = {"worst": "no two of one shape", "real": f"{len(REAL_SHAPES)} shapes: the JSON is compact"}
    notes = (
        f"{TENSORS:,} sharded tensors, {shapes[variant]}. Plan: one rank of half as many finds, decodes, "
        "checks and plans its load; decode: the same JSON, plainly. Merge: what the last rank does to "
        "commit; read all: all indexes, plainly."
    )
    return Group(f"Many ranks, {shapes[variant]}", [row(size) for size in worlds], notes, bars, limit=900)


# -- dividing replicas -------------------------------------------------------------------------------


def divide(size: int) -> dict[str, object]:
    """In a process of its own: what one rank's first and second save do before any byte is written."""
    state = {"model": {f"layers.{n}.weight": torch.zeros(64, 64) for n in range(TENSORS)}}
    encoder = StateEncoder(RankInfo(size // 2, size), ["model.*"])
    seconds = []

    def work() -> None:
        start = time.perf_counter()
        encoder.take_apart(state)
        seconds.append(time.perf_counter() - start)

    peak = peak_private_bytes(work)
    work()
    return {"first save": seconds[0], "later": seconds[1], "memory": peak}


def division_group(worlds: list[int]) -> Group:
    rows = [
        Row(f"{size:,} ranks", lambda limit, n=size: in_worker(divide, n, limit=limit)) for size in worlds
    ]
    bars = [
        Bar(f"{many:,} ranks", "first save", 1.15 * many / few, f"{few:,} ranks", "first save")
        for few, many in itertools.pairwise(worlds)
    ]
    notes = f"One rank takes {TENSORS:,} tensors apart that all ranks hold alike, declared replicated"
    return Group("Dividing replicas", rows, notes, bars)


# -- arrivals ----------------------------------------------------------------------------------------

ARRIVALS = 20
"""How many ranks arrive for real, and are measured; the others' files are put there."""
POLLS = 40
"""How often a rank looks in vain in each of its two waits of a save with a barrier."""


def replicated_state() -> dict:
    generator = torch.Generator().manual_seed(1)
    return {"model": {f"layer.{n}": torch.randn(128, 128, generator=generator) for n in range(4)}, "step": 1}


class Kind:
    """A storage, and how files get into it without any of the library's code."""

    def __init__(self, name: str, path: str) -> None:
        self.memory = name == "memory"
        self.storage = MemoryStorage() if self.memory else default_storage()
        # A new name in each world: the process counts its saves to a path.
        self.path = f"/{os.path.basename(path)}" if self.memory else path

    def put(self, path: str, data: bytes, size: int = 0) -> None:
        if self.memory:
            file = self.storage.create(path)
            file.write(0, memoryview(data))
            file.finish(max(size, len(data)))
            return
        with open(path, "wb") as file:
            file.write(data)
            file.truncate(max(size, len(data)))

    def listing(self, folder: str) -> float:
        """Seconds for one plain listing."""
        opened = self.storage.open_folder(folder)
        start = time.perf_counter()
        names = opened.names() if self.memory else os.listdir(folder)
        seconds = time.perf_counter() - start
        opened.close()
        assert names
        return seconds


class Watched:
    """A storage that counts what one rank asks of it, and times the rank's listings.

    Attributes:
        storage: For the rank.
        listing_seconds: In listings and with the names they gave, until the rank asked for something else.
    """

    def __init__(self, inner: object) -> None:
        self.storage = FaultyStorage(inner, before=self._before)
        self.listing_seconds = 0.0
        self._since: float | None = None

    def _before(self, operation: str, _path: str) -> None:
        self.end_listing()
        if operation == "names":
            self._since = time.perf_counter()

    def end_listing(self) -> None:
        if self._since is not None:
            self.listing_seconds += time.perf_counter() - self._since
            self._since = None

    def asked(self, start: int = 0) -> dict[str, int]:
        """How much it has been asked for since its operation `start`."""
        done = self.storage.operations[start:]
        return {
            "operations": len(done),
            "listings": sum(line.startswith("names ") for line in done),
            "marks": sum(bool(re.fullmatch(r"(read|open|map) .*/index_\d+\.json", line)) for line in done),
        }


def real_indexes(kind: Kind, size: int) -> Callable[[int], Index]:
    """Has those ranks save for real that write some of the replicas, and one that writes none."""
    state = replicated_state()
    tensors = list(state["model"].values())
    boxes = cut([t.shape for t in tensors], [4] * len(tensors), size)
    owners = sorted({rank for shares in boxes for rank in shares})
    idle = next(rank for rank in range(size - 2, 0, -1) if rank not in owners)
    found = {}
    for rank in {0, idle, *owners}:
        # The last one's mark must not be there yet: it is made elsewhere.
        storage = kind.storage if rank < size - 1 else MemoryStorage()
        writer(rank, size, storage, ["model.*"]).write(kind.path, state)
        found[rank] = decode_index(read(storage, hidden_folder(storage, kind.path), index_name(rank)), "")

    def index(rank: int) -> Index:
        if rank in found:
            return found[rank]
        made = copy.copy(found[idle])
        made.rank, made.process = rank, f"{rank:016x}"
        made.files = [msgspec.structs.replace(made.files[0], name=data_name(rank))]
        return made

    index.real = set(found) - {size - 1}
    return index


def hidden_folder(storage: object, path: str) -> str:
    names = storage.open_folder(os.path.dirname(path)).names()
    return os.path.join(os.path.dirname(path), next(name for name in names if name.endswith("partial")))


def read(storage: object, folder: str, name: str) -> bytes:
    opened = storage.open_folder(folder)
    try:
        return opened.read(name, 1 << 30)
    finally:
        opened.close()


def put_ranks(kind: Kind, folder: str, index: Callable[[int], Index], ranks: set[int]) -> None:
    """Put there what these ranks leave when they arrive."""
    beacon = read(kind.storage, folder, "state_0.json")
    for rank in ranks:
        made = index(rank)
        kind.put(os.path.join(folder, index_name(rank)), encode_index(made))
        kind.put(os.path.join(folder, data_name(rank)), b"", made.files[0].size)
        kind.put(os.path.join(folder, f"state_{rank}.json"), beacon)


def begin(kind: Kind, storage: object, index: Index, clock: Clock | None = None) -> Attempt:
    return begin_attempt(
        storage,
        kind.path,
        attempt=index.attempt,
        rank=index.rank,
        world_size=index.world_size,
        process=index.process,
        clock=clock,
    )


def arrive(kind: Kind, index: Index) -> tuple[dict[str, float], dict[str, int]]:
    """One rank's part in the commit, timed in parts, and what it asked for.

    Its data file is put there in between.
    """
    watched = Watched(kind.storage)
    colder = bytearray(b"1") * (64 * MIB)  # more than the processor's caches hold
    data = encode_index(index)
    times = {}

    def timed(name: str, work: Callable[[], object]) -> object:
        colder.count(b"0")  # or else what follows a longer listing is slower, for its colder caches alone
        start = time.perf_counter()
        result = work()
        watched.end_listing()
        times[name] = time.perf_counter() - start
        return result

    attempt = timed("begin", lambda: begin(kind, watched.storage, index))
    kind.put(attempt.data_path, b"", index.files[0].size)
    timed("mark", lambda: attempt.mark(data))
    committed = timed("complete", attempt.complete)
    assert committed == (index.rank == index.world_size - 1)
    timed("close", attempt.close)
    times["all"] = sum(times.values())
    times["rest"] = times["all"] - watched.listing_seconds
    times["names"] = watched.listing_seconds
    return times, watched.asked()


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection in between, which would take as long as torch is large, once in a while."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@uncollected()
def arrivals(kind: Kind, size: int) -> dict[str, float]:
    """A world of this size without a barrier: the last ranks' arrivals, and the very last one's."""
    index = real_indexes(kind, size)
    folder = hidden_folder(kind.storage, kind.path)
    assert folder == join_hidden(kind.path, index(0).attempt)
    late = [rank for rank in range(size - 1, 0, -1) if rank not in index.real][: ARRIVALS + 1]
    put_ranks(kind, folder, index, set(range(size)) - set(late) - index.real)
    found, asked, plain = [], [], []
    for rank in late[:0:-1]:
        plain.append(kind.listing(folder))
        times, counts = arrive(kind, index(rank))
        found.append(times)
        asked.append(counts)
    opened = kind.storage.open_folder(folder)
    start = time.perf_counter()
    for rank in range(size - 1):
        msgspec.json.decode(opened.read(index_name(rank), 1 << 30))
    reading = time.perf_counter() - start
    opened.close()
    last, _ = arrive(kind, index(size - 1))
    result = {name: statistics.median(times[name] for times in found) for name in found[0]}
    result |= {"listing": statistics.median(plain), "reading": reading, **most(asked)}
    return result | {"last": last["all"], "commit": last["complete"]}


def most(asked: list[dict[str, int]]) -> dict[str, int]:
    return {name: max(counts[name] for counts in asked) for name in asked[0]}


@uncollected()
def barrier(kind: Kind, size: int) -> dict[str, float]:
    """A world of this size with a barrier: rank 0's part, and what another rank asks for while it waits.

    That rank's clock stands in for all the others: when it has looked for long enough, the last rank
    arrives and rank 0 finds that so; when it has looked for long enough again, rank 0 commits.
    """
    index = real_indexes(kind, size)
    folder = hidden_folder(kind.storage, kind.path)
    waiter = next(rank for rank in range(size - 2, 0, -1) if rank not in index.real)
    put_ranks(kind, folder, index, set(range(size - 1)) - {waiter} - index.real)
    lead = begin(kind, kind.storage, index(0))
    now, pauses, seconds = 1.0, 0, []

    def sleep(pause: float) -> None:
        nonlocal now, pauses
        now, pauses = now + pause, pauses + 1
        if pauses == POLLS:
            put_ranks(kind, folder, index, {size - 1})
        if pauses % POLLS == 0:
            start = time.perf_counter()
            lead.wait_for_marks(60) if pauses == POLLS else lead.complete()
            seconds.append(time.perf_counter() - start)

    watched = Watched(kind.storage)
    attempt = begin(kind, watched.storage, index(waiter), Clock(monotonic=lambda: now, sleep=sleep))
    kind.put(attempt.data_path, b"", index(waiter).files[0].size)
    attempt.mark(encode_index(index(waiter)))
    before = len(watched.storage.operations)
    attempt.wait_for_marks(60)
    attempt.wait_for_commit(60)
    asked = watched.asked(before)
    assert lead.committed
    assert pauses == 2 * POLLS
    attempt.close()
    lead.close()
    found = {"rank 0 waits": seconds[0], "rank 0 completes": seconds[1], "rank 0": sum(seconds)}
    return found | {f"a look's {name}": count / (2 * POLLS) for name, count in asked.items()}


def arrivals_group(folder: str, name: str, worlds: list[int]) -> Group:
    def row(size: int) -> Row:
        def turn(limit: float) -> dict[str, float]:
            found: dict[str, float] = {}
            for work in (arrivals, barrier):
                with tempfile.TemporaryDirectory(dir=folder) as inner:
                    path = os.path.join(inner, f"{work.__name__}-{size}")
                    found |= in_worker(lambda w=work, p=path: w(Kind(name, p), size), limit=limit)
            return found

        return Row(f"{size:,} ranks", turn)

    first, last = f"{worlds[0]:,} ranks", f"{worlds[-1]:,} ranks"
    linear = 1.25 * worlds[-1] / worlds[0]
    bars = [
        Bar(last, "listings", 1),
        Bar(last, "marks", 0),
        Bar(last, "operations", 1.0, first, "operations"),
    ]
    bars += [Bar(last, "rest", 1.5, first, "rest"), Bar(last, "a look's listings", 1)]
    bars += [Bar(last, figure, linear, first, figure) for figure in ("names", "last", "rank 0")]
    notes = (
        f"Medians of {ARRIVALS} ranks that arrive without a barrier, in parts; listing: one plain listing; "
        "names: a rank's listings and what it does with them; rest: all but these; reading: plain read and "
        "decode of all marks; last: the rank that commits. With a barrier: rank 0 when all marks are there, "
        f"and what another rank asks of the storage while it looks, a mean of {2 * POLLS} looks."
    )
    rows = [row(size) for size in worlds]
    return Group(f"Ranks that arrive, {name} storage", rows, notes, bars, limit=600)


def all_groups(folder: str, *, small: bool) -> dict[str, Callable[[], Group]]:
    worlds = [8, 16] if small else [64, 256, 1024, 4096]
    marks = [10, 20] if small else [1000, 3000, 10_000]
    rounds = 1 if small else 7
    return {
        "scale-worst": lambda: planning_group(folder, "worst", worlds, rounds),
        "scale-real": lambda: planning_group(folder, "real", worlds, rounds),
        "scale-division": lambda: division_group(worlds),
        "scale-arrivals": lambda: arrivals_group(folder, "local", marks),
        "scale-arrivals-memory": lambda: arrivals_group(folder, "memory", marks),
    }
