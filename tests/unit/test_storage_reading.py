"""The parallel reader: every byte in its place, every damage found, in each of its three ways."""

from __future__ import annotations

import os
import threading
import zlib
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.disks import MemoryStorage

from milepost import syscalls
from milepost.errors import CorruptCheckpointError, StorageError
from milepost.storage.local import LocalStorage
from milepost.storage.reading import Damage, Part, check_mapped, default_threads, read_parts, scan_file
from milepost.storage.writing import Ring

CHUNK = 4096
WAYS = ["warm", "cold", "mixed"]


class Seen:
    """An open file that says of its regions what the test wants, and counts the reads."""

    def __init__(self, inner, way, fail_at=None, error=None):
        self.path, self.size = inner.path, inner.size
        self.buffered, self.direct = [], []
        self._inner, self._way, self._fail_at, self._error = inner, way, fail_at, error

    def cached(self, offset, length):
        return self._way == "warm" or (self._way == "mixed" and (offset // 65536) % 2 == 0)

    def _step(self, reads, offset, length):
        reads.append((offset, length))
        if len(self.buffered) + len(self.direct) == self._fail_at:
            raise self._error

    def read_into(self, offset, buffers):
        self._step(self.buffered, offset, sum(map(len, buffers)))
        self._inner.read_into(offset, buffers)

    def read_direct(self, offset, buffer):
        assert offset % 4096 == len(buffer) % 4096 == syscalls.address_of(buffer) % 4096 == 0
        self._step(self.direct, offset, len(buffer))
        self._inner.read_direct(offset, buffer)


@pytest.fixture(autouse=True)
def _small_regions(monkeypatch):
    """Sizes at which a small file has many regions, windows and pieces."""
    for name, size in {
        "_REGION_BYTES": 65536,
        "_PIECE_BYTES": 16384,
        "_GROUP_BYTES": 65536,
        "_WARM_GAP_BYTES": 1024,
        "_COLD_GAP_BYTES": 4096,
        "_WINDOW_BYTES": 32768,
        "_SCAN_BYTES": 8192,
        "_INLINE_BYTES": 16384,
    }.items():
        monkeypatch.setattr(f"milepost.storage.reading.{name}", size)


def stored(data, way, **faults):
    storage = MemoryStorage()
    file = storage.create("/f")
    file.write(0, memoryview(data))
    file.finish(len(data))
    return Seen(storage.open_folder("/").open("f"), way, **faults)


def crcs_of(data, chunk=CHUNK):
    return [zlib.crc32(data[start : start + chunk]) for start in range(0, len(data), chunk)]


class Targets:
    """Memory for parts, with a guard byte on each side of every one."""

    def __init__(self, data, extents, *, only_checked=(), unverified=()):
        self._data, self._places = data, []
        self._memory = bytearray(b"\xaa" * (sum(length + 2 for _, length in extents) + 1))
        base = syscalls.address_of(memoryview(self._memory))
        position = 1
        self.parts = []
        for tag, (offset, length) in enumerate(extents):
            self.parts.append(
                Part(
                    offset,
                    None if tag in only_checked else base + position,
                    length,
                    None if tag in unverified else crcs_of(data[offset : offset + length]),
                    tag,
                )
            )
            self._places.append((position, offset, length, tag in only_checked))
            position += length + 2

    def check(self):
        expected = bytearray(b"\xaa" * len(self._memory))
        for position, offset, length, untouched in self._places:
            if not untouched:
                expected[position : position + length] = self._data[offset : offset + length]
        assert self._memory == expected


@st.composite
def extents(draw, size=300_000):
    """Sorted ranges of a file, small and large, with gaps and overlaps."""
    found = []
    position = 0
    for _ in range(draw(st.integers(0, 25))):
        position += draw(st.sampled_from([-500, 0, 0, 1, 64, 1000, 1025, 4096, 5000, 70_000]))
        position = max(position, found[-1][0] if found else 0)
        length = draw(st.sampled_from([0, 1, 100, 4095, 4096, 4097, 16_384, 33_000, 100_000]))
        if position + length <= size:
            found.append((position, length))
            position += length
    return found


DATA = os.urandom(300_000)


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=40)
@given(extents=extents(), threads=st.integers(1, 4), which=st.randoms(use_true_random=False))
def test_every_byte_arrives(way, extents, threads, which):
    """Whatever the parts, each gets its bytes, nothing beside them is touched, and nothing is damaged."""
    numbers = range(len(extents))
    targets = Targets(
        DATA,
        extents,
        only_checked={number for number in numbers if which.random() < 0.2},
        unverified={number for number in numbers if which.random() < 0.3},
    )
    file = stored(DATA, way)
    report = read_parts(file, targets.parts, chunk_bytes=CHUNK, threads=threads)
    assert report.damaged == []
    targets.check()
    assert not (file.direct if way == "warm" else file.buffered if way == "cold" else ())
    assert report.cached_bytes == sum(length for _, length in file.buffered)


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=40)
@given(
    extents=extents(),
    flips=st.sets(st.integers(0, len(DATA) - 1), max_size=5),
    only_checked=st.booleans(),
)
def test_every_damage_is_found(way, extents, flips, only_checked):
    """Each chunk with a changed byte is reported with its part, its place and both CRCs, and no other."""
    damaged = bytearray(DATA)
    for flip in flips:
        damaged[flip] ^= 0x10
    targets = Targets(DATA, extents, only_checked=range(len(extents)) if only_checked else ())
    report = read_parts(stored(bytes(damaged), way), targets.parts, chunk_bytes=CHUNK)
    expected = []
    for part in targets.parts:
        found = crcs_of(damaged[part.offset : part.offset + part.length])
        for chunk, (good, bad) in enumerate(zip(part.crcs, found, strict=True)):
            if good != bad:
                expected.append(Damage(part.tag, chunk, part.offset + chunk * CHUNK, good, bad))
    key = lambda damage: (damage.offset, damage.tag)  # noqa: E731
    assert sorted(report.damaged, key=key) == sorted(expected, key=key)
    assert [damage.offset for damage in report.damaged] == sorted(damage.offset for damage in expected)


@pytest.mark.parametrize("way", WAYS)
def test_a_file_that_ends_too_early_is_damaged(way):
    """A part beyond the end is a CorruptCheckpointError with both sizes, before anything is read."""
    file = stored(DATA, way)
    targets = Targets(DATA + b"xx", [(0, 100), (len(DATA) - 10, 12)])
    with pytest.raises(
        CorruptCheckpointError, match=f"{len(DATA) + 2} bytes expected .* {len(DATA)} found: /f"
    ):
        read_parts(file, targets.parts, chunk_bytes=CHUNK)
    assert file.buffered == file.direct == []


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("error", [StorageError("bad", errno=5), KeyboardInterrupt(), MemoryError()])
def test_an_error_ends_every_thread(way, error):
    """What a read raises in any thread reaches the caller as it is, whenever it comes."""
    extents = [(start, 9000) for start in range(0, 280_000, 10_000)]
    for fail_at in range(1, 30):
        file = stored(DATA, way, fail_at=fail_at, error=error)
        targets = Targets(DATA, extents)
        ring = Ring(65536, 2)
        try:
            read_parts(file, targets.parts, chunk_bytes=CHUNK, ring=ring)
        except type(error):
            continue
        else:
            break
    assert fail_at > 3
    targets.check()


def test_parts_that_nobody_wants_are_not_read():
    """A part without an address and without CRCs costs nothing."""
    file = stored(DATA, "cold")
    assert read_parts(file, [Part(0, None, 100_000)], chunk_bytes=CHUNK).direct_bytes == 0
    assert read_parts(file, [], chunk_bytes=CHUNK).damaged == []
    assert file.direct == []


def test_crcs_must_fit_the_part():
    """Too few or too many CRCs for a part are a ValueError, not a part that is checked by half."""
    for crcs in ([], [1, 2]):
        with pytest.raises(ValueError, match="CRCs for 100 bytes"):
            read_parts(stored(DATA, "warm"), [Part(0, None, 100, crcs)], chunk_bytes=CHUNK)


def test_many_small_parts_share_one_read():
    """Small neighbours are read by one call, and far ones are not."""
    file = stored(DATA, "warm")
    targets = Targets(DATA, [(start, 64) for start in range(0, 64_000, 128)] + [(200_000, 10)])
    read_parts(file, targets.parts, chunk_bytes=CHUNK)
    assert (
        file.buffered == [(0, 255 * 128 + 64), (256 * 128, 243 * 128 + 64), (200_000, 10)]
        or len(file.buffered) == 3
    )
    targets.check()


def test_large_parts_are_read_in_pieces_by_several_threads():
    """A part of many pieces is divided between at least two threads."""
    met = threading.Barrier(2, timeout=20)

    class Meeting(Seen):
        def read_into(self, offset, buffers):
            if len(self.buffered) < 2:
                self.buffered.append(offset)
                met.wait()
            super().read_into(offset, buffers)

    file = stored(DATA, "warm")
    targets = Targets(DATA, [(0, 262_144)])
    read_parts(Meeting(file, "warm"), targets.parts, chunk_bytes=CHUNK, threads=2)
    targets.check()


@pytest.mark.parametrize("way", ["warm", "cold"])
def test_small_files_start_no_thread(monkeypatch, way):
    """The caller's thread reads, scans and checks a few kibibytes, of a small file through the cache."""
    monkeypatch.setattr(threading, "Thread", None)
    targets = Targets(DATA, [(0, 100), (5000, 2000)])
    read_parts(stored(DATA, way), targets.parts, chunk_bytes=CHUNK)
    targets.check()
    told, small = [], stored(DATA[:16_000], way)
    assert scan_file(small, [(0, 9000), (9000, 7000)], progress=told.append) == [
        zlib.crc32(DATA[:9000]),
        zlib.crc32(DATA[9000:16_000]),
    ]
    assert (told, small.direct) == ([8192, 16_000 - 8192], [])
    assert check_mapped(memoryview(DATA), targets.parts, chunk_bytes=CHUNK) == []


@pytest.mark.parametrize("size", [9000, len(DATA)])
def test_damage_in_a_mapped_file_is_found(size):
    """Each chunk of a mapped file that changed is reported with its part and place, in the file's order."""
    damaged = bytearray(DATA[:size])
    for flip in (0, 4096, size - 1):
        damaged[flip] ^= 1
    parts = [Part(0, None, 4096, crcs_of(DATA[:4096]), "a")]
    parts.append(Part(4096, None, size - 4096, crcs_of(DATA[4096:size]), "b"))
    found = check_mapped(memoryview(damaged), parts, chunk_bytes=CHUNK)
    last = (size - 1) // CHUNK
    assert [(damage.tag, damage.chunk, damage.offset) for damage in found] == [
        ("a", 0, 0),
        ("b", 0, 4096),
        ("b", last - 1, last * CHUNK),
    ]


def test_a_ring_too_small_is_not_used():
    """A ring whose blocks cannot hold a window is left alone; the read makes one of its own."""
    ring = Ring(4096, 2)
    targets = Targets(DATA, [(3, 200_000)])
    read_parts(stored(DATA, "cold"), targets.parts, chunk_bytes=CHUNK, ring=ring)
    targets.check()
    assert ring._memory is None


@pytest.mark.parametrize("chunk", [4096, 65536, 262_144])
def test_chunks_larger_than_a_window_are_read(chunk):
    """An operation always holds a whole chunk, however large."""
    target = bytearray(len(DATA))
    address = syscalls.address_of(memoryview(target))
    part = Part(0, address, len(DATA), crcs_of(DATA, chunk))
    for way in WAYS:
        assert read_parts(stored(DATA, way), [part], chunk_bytes=chunk).damaged == []
        assert target == DATA
        target[:] = bytes(len(DATA))


def test_threads_are_between_two_and_eight(monkeypatch):
    """However many processors there are, two to eight threads read."""
    for processors, expected in ((1, 2), (4, 4), (64, 8)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, count=processors: set(range(count)))
        assert default_threads() == expected


# ---------------------------------------------------------------------------- scanning


@st.composite
def tilings(draw):
    """Pieces that cover the file."""
    size = len(DATA)
    cuts = sorted([0, size, *draw(st.lists(st.integers(0, size), max_size=40))])
    return [(start, end - start) for start, end in pairwise(cuts)]


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=40)
@given(pieces=tilings())
def test_scans_give_the_crc_of_every_piece(way, pieces):
    """Whatever the pieces, small, empty, or larger than a window, each gets its own CRC, in order."""
    told = []
    crcs = scan_file(stored(DATA, way), iter(pieces), progress=told.append)
    assert crcs == [zlib.crc32(DATA[offset : offset + length]) for offset, length in pieces]
    assert sum(told) == len(DATA)


def test_empty_files_are_scanned():
    """A file of no bytes has no pieces, or empty ones."""
    assert scan_file(stored(b"", "cold"), []) == []
    assert scan_file(stored(b"", "cold"), [(0, 0), (0, 0)]) == [0, 0]


@pytest.mark.parametrize("pieces", [[(1, 5)], [(0, 5), (6, 1)], [(0, 5), (4, 2)], [(0, 5), (5, -1)]])
def test_pieces_must_follow_each_other(pieces):
    """Gaps and overlaps between pieces are a ValueError."""
    with pytest.raises(ValueError, match="piece"):
        scan_file(stored(DATA, "warm"), pieces)


@pytest.mark.parametrize(("size", "words"), [(len(DATA) + 1, "too early"), (len(DATA) - 1, "too long")])
def test_scans_want_the_files_exact_size(size, words):
    """A file that is longer or shorter than its pieces is damaged."""
    with pytest.raises(CorruptCheckpointError, match=words):
        scan_file(stored(DATA, "warm"), [(0, size)])


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError()])
def test_progress_may_stop_a_scan(error):
    """What `progress` raises ends the scan and all its threads, and reaches the caller as it is."""

    def stop(_):
        assert threading.current_thread() is caller
        raise error

    caller = threading.current_thread()
    with pytest.raises(type(error)):
        scan_file(stored(DATA, "cold"), [(0, len(DATA))], progress=stop)


def test_real_files_are_read_round_the_cache(tmp_path, monkeypatch):
    """A file that is not in the page cache is not there after it was read or scanned, either."""
    monkeypatch.undo()  # regions and windows of their real size
    storage = LocalStorage()
    file = storage.create(f"{tmp_path}/f", direct=True)
    if not file._direct:
        pytest.skip("no direct I/O here")
    data = DATA * 50
    file.write(0, memoryview(data))
    file.finish(len(data))
    folder = storage.open_folder(str(tmp_path))
    opened = folder.open("f")
    targets = Targets(data, [(17, 250_000), (260_001, 10_000_000)])
    report = read_parts(opened, targets.parts, chunk_bytes=CHUNK)
    assert (report.damaged, report.cached_bytes) == ([], 0)
    targets.check()
    assert scan_file(opened, [(0, len(data))]) == [zlib.crc32(data)]
    assert not opened.cached(0, len(data))
    opened.close()
    folder.close()
