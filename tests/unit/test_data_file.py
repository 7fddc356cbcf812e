"""The bytes of a data file: a true zip archive, aligned, without gaps, the same for the same values."""

from __future__ import annotations

import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from support.saves import data_file, index_of, manifest_of, raw_index_of, save
from support.states import array_values, bytes_tensor, native_values, object_values

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning")

LOCAL, CENTRAL = struct.Struct("<4sHHHHHIIIHH"), struct.Struct("<4sHHHHHHIIIHHHHHII")


def everything():
    return {
        **native_values(),
        "arrays": array_values(),
        "objects": object_values(),
        "sizes": [
            bytes_tensor(torch.uint8, (size,), size)
            for size in (0, 1, 63, 64, 65, 4097, 262_143, 262_145, (1 << 20) - 1, 1 << 20, 2_500_001)
        ],
        "tied": [(t := torch.arange(10.0)), t[3:5]],
    }


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save(tmp_path_factory.mktemp("file") / "c", everything())


def parts_of(data):
    """The entries as (name, start of the data, data, CRC in the descriptor, padding), and where they end."""
    position, entries = 0, []
    while data[position : position + 4] == b"PK\3\4":
        _, need, flags, method, _, _, crc, small, full, name_len, extra_len = LOCAL.unpack_from(
            data, position
        )
        assert (need, flags, method, crc) == (45, 8, 0, 0)
        assert (small, full) == (0xFFFFFFFF, 0xFFFFFFFF)
        position += LOCAL.size
        name = data[position : position + name_len].decode()
        extra = data[position + name_len : position + name_len + extra_len]
        tag, length, size, stored = struct.unpack_from("<HHQQ", extra)
        assert (tag, length, size) == (1, 16, stored)
        position += name_len + extra_len
        content = data[position : position + size]
        signature, crc, a, b = struct.unpack_from("<4sIQQ", data, position + size)
        assert (signature, a, b) == (b"PK\7\10", size, size)
        entries.append((name, position, content, crc, extra[20:]))
        position += size + 24
    return entries, position


def test_every_header_holds_the_true_crc(path):
    """The CRC-32 in each descriptor and in the central directory is that of the entry's bytes."""
    data = Path(data_file(path)).read_bytes()
    entries, position = parts_of(data)
    starts = []
    for name, start, content, crc, _ in entries:
        assert crc == zlib.crc32(content), name
        fields = CENTRAL.unpack_from(data, position)
        assert fields[0] == b"PK\1\2"
        assert fields[7] == crc
        extra = position + CENTRAL.size + len(name)
        assert data[position + CENTRAL.size : extra].decode() == name
        _, _, size, stored, offset = struct.unpack_from("<HHQQQ", data, extra)
        assert size == stored == len(content)
        assert data[offset : offset + 4] == b"PK\3\4"
        starts.append(start)
        position = extra + 28
    assert len(data) == position + 56 + 20 + 22
    assert starts == sorted(starts)


def test_records_are_aligned(path):
    """Entries begin at multiples of 64, records of 1 MiB and more at multiples of 4,096."""
    entries, _ = parts_of(Path(data_file(path)).read_bytes())
    for name, start, content, _, _ in entries:
        large = name.startswith("archive/data/") and len(content) >= 1 << 20
        assert start % (4096 if large else 64) == 0, name
    assert {len(content) >= 1 << 20 for _, _, content, _, _ in entries} == {True, False}


def test_padding_is_zero_and_there_are_no_gaps(path):
    """Between entries there is nothing but headers, and their padding is zero: no old memory gets out."""
    data = Path(data_file(path)).read_bytes()
    entries, _ = parts_of(data)
    for name, _, _, _, padding in entries:
        tag, length = struct.unpack_from("<HH", padding)
        assert (tag, length) == (0x504D, len(padding) - 4), name
        assert not any(padding[4:])
    covered = sum(len(content) for _, _, content, _, _ in entries)
    headers = sum(30 + len(name) + 20 + len(padding) + 24 for name, _, _, _, padding in entries)
    directory = sum(46 + len(name) + 28 for name, *_ in entries)
    assert covered + headers + directory + 56 + 20 + 22 == len(data)


def test_no_old_memory_gets_into_a_file(tmp_path):
    """A save after one of secret values holds nothing of them, neither in gaps nor between elements."""
    from milepost import make_sync_checkpointer

    secret = b"\xa5SECRET\x5a" * 500_000
    hidden = torch.frombuffer(bytearray(secret), dtype=torch.uint8)
    with make_sync_checkpointer() as checkpointer:
        checkpointer.save(str(tmp_path / "a"), {"s": hidden})
        checkpointer.save(
            str(tmp_path / "b"),
            {"few": [torch.ones(n) for n in range(50)], "large": torch.zeros(1 << 19), "x": hidden[:1]},
        )
    for file in (tmp_path / "b").iterdir():
        assert b"SECRET" not in file.read_bytes()


def test_the_entries_are_those_of_the_format(path):
    """Entries come in the documented order, with torch's names, and without a format version record."""
    names = [name for name, *_ in parts_of(Path(data_file(path)).read_bytes())[0]]
    index = index_of(path)
    tensors = max(index.tensors.record) + 1
    objects = len(index.records.length) - tensors
    assert names == [
        *(f"archive/data/{n}" for n in range(tensors)),
        *(f"archive/objects/{n}" for n in range(objects)),
        *("archive/data.pkl", "archive/byteorder", "archive/version", "archive/.milepost"),
    ]


def test_the_index_names_the_ranges_and_checksums(path):
    """Offsets, lengths and chunk CRCs in the index are those of the file; so is the CRC in the manifest."""
    data = Path(data_file(path)).read_bytes()
    records = index_of(path).records
    crcs = iter(records.crcs)
    for offset, length in zip(records.offset, records.length, strict=True):
        for start in range(offset, offset + length, 262_144):
            assert next(crcs) == zlib.crc32(data[start : min(start + 262_144, offset + length)])
    assert next(crcs, None) is None
    (file,) = manifest_of(path).files
    assert (file.name, file.size, file.crc32) == ("checkpoint_0.pt", len(data), zlib.crc32(data))


def test_zipfile_finds_no_fault(path):
    """`python -m zipfile -t` passes, and zipfile reads every entry."""
    run = [sys.executable, "-m", "zipfile", "-t", data_file(path)]
    result = subprocess.run(run, capture_output=True, text=True, check=False)
    assert result.returncode == 0
    assert "Done testing" in result.stdout
    with zipfile.ZipFile(data_file(path)) as archive:
        assert archive.testzip() is None
        assert archive.comment == b""


def fixed_attempt(monkeypatch):
    monkeypatch.setattr("milepost.commit.ids.new_attempt_id", lambda: "0123456789abcdef")


def test_the_same_values_give_the_same_bytes(tmp_path, monkeypatch):
    """Two saves of equal values by two writers differ in nothing but the attempt and the time."""
    fixed_attempt(monkeypatch)
    one, two = (save(tmp_path / name, everything(), step=3) for name in "ab")
    assert Path(data_file(one)).read_bytes() == Path(data_file(two)).read_bytes()
    indexes = [raw_index_of(path) for path in (one, two)]
    for index in indexes:
        assert index.pop("time") > 0
    assert indexes[0] == indexes[1]


def test_attempts_have_ids_of_their_own(tmp_path):
    """Each save has another attempt id, which the manifest, the index and the data file agree on."""
    paths = [save(tmp_path / name, {"a": 1}) for name in "ab"]
    attempts = [manifest_of(path).attempt for path in paths]
    assert attempts[0] != attempts[1]
    for path, attempt in zip(paths, attempts, strict=True):
        assert index_of(path).attempt == attempt
        with zipfile.ZipFile(data_file(path)) as archive:
            identity = archive.read("archive/.milepost").decode()
        assert identity == f'{{"format":"milepost","version":[1,0],"attempt":"{attempt}","rank":0}}'


def test_a_view_of_a_strided_run_saves_its_extent_once(tmp_path):
    """A gapped view is saved with its strides; the bytes in its gaps are those of the same storage."""
    base = torch.arange(100, dtype=torch.uint8)
    path = save(tmp_path / "c", {"v": base[10:91:20]})
    assert index_of(path).records.length == [81]
    offset = index_of(path).records.offset[0]
    assert Path(data_file(path)).read_bytes()[offset : offset + 81] == base[10:91].numpy().tobytes()


def test_files_beyond_four_gigabytes_are_laid_out_in_64_bits():
    """Offsets, sizes and the directory of a layout of many gigabytes use zip64 throughout."""
    from milepost.format.image import Image, Layout

    lengths = [5 << 30, 3, 1 << 33]
    layout = Layout(lengths)
    assert layout.offsets[2] > 5 << 30
    assert all(offset % 64 == 0 for offset in layout.offsets)
    image = Image(layout, [("data.pkl", b"x")])
    image.chunk_crcs = [0] * layout.chunks[-1]
    for record in range(3):
        image._glue(record)
    tail = image.seal()
    assert image.size == layout.end + len(tail)
    assert image.size > 13 << 30
    assert struct.pack("<Q", layout.offsets[2] - len(layout.glue(2, 0)) + 24) in tail


def test_numpy_and_torch_agree_on_the_values_of_the_file(path):
    """numpy, reading at the offset of the index, finds the values that torch saved."""
    index = index_of(path)
    number = next(n for n, shape in enumerate(index.tensors.shape) if shape == [2_500_001])
    offset = index.records.offset[index.tensors.record[number]]
    found = np.fromfile(data_file(path), np.uint8, 2_500_001, offset=offset)
    assert np.array_equal(found, bytes_tensor(torch.uint8, (2_500_001,), 2_500_001).numpy())
