"""Checkpoints made by an attacker, with true checksums: an error that names the file, never more."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import resource
import shutil
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.forge import Forge, dump, write
from support.processes import in_child
from support.saves import load, save
from support.states import make_state, same

from milepost.errors import (
    ConfigError,
    CorruptCheckpointError,
    IncompleteCheckpointError,
    LoadError,
    MismatchError,
    UnsupportedFormatError,
)
from milepost.format import pickle_scan
from milepost.format.index import decode_index
from milepost.health.outline import MOST_LINES, outline
from milepost.health.verify import verify
from milepost.storage import default_storage

MEMORY_BYTES = 1 << 30
BIG, TOO_BIG = (1 << 63) - 1, 1 << 63


@pytest.fixture(scope="module")
def pattern(tmp_path_factory):
    """A checkpoint that is copied for each test."""
    path = str(tmp_path_factory.mktemp("hostile") / "step")
    save(path, 1, attach=True)
    return path


@pytest.fixture
def forge(pattern, tmp_path):
    """A fresh copy of the checkpoint, ready to be changed."""
    path = f"{tmp_path}/step"
    shutil.copytree(pattern, path)
    return Forge(path)


def refused(path, *kinds, match=None, verified=True):
    """Both ways of loading raise one of these errors, naming the file; `verify` finds it too."""
    kinds = kinds or (CorruptCheckpointError,)
    template = make_state(2)
    for target in (None, template):
        with pytest.raises(kinds, match=match) as caught:
            load(path, target)
        assert path in str(caught.value) or os.path.basename(path) in str(caught.value)
    assert same(template, make_state(2)), "the template was touched"
    if verified:
        with contextlib.suppress(LoadError):
            assert verify(default_storage(), path).problems


def test_a_checkpoint_that_is_only_signed_again_loads(forge):
    """The tool of these tests makes valid checkpoints, so that it is the attack that is refused."""
    forge.sign()
    assert same(load(forge.path), make_state(1))
    assert not verify(default_storage(), forge.path).problems


# ---------------------------------------------------------------------------- file names

NAMES = [
    "../secret",
    "/etc/passwd",
    "a/../../secret",
    "./checkpoint_0.pt",
    "a//b",
    "checkpoint_0.pt/",
    "",
    ".",
    "..",
    "checkpoint\0_0.pt",
    "..\\secret",
    "x" * 5000,
    "manifest.json",
    "index_0.json",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_data_file_may_not_have_a_name_that_leaves_the_folder(forge, tmp_path, name):
    """Names with `..`, absolute ones, and others that are not plain are refused before anything is opened."""
    write(f"{tmp_path}/secret", bytes(forge.data))
    forge.index["files"][0]["name"] = forge.body["files"][0]["name"] = name
    forge.sign()
    refused(forge.path)


@pytest.mark.parametrize("name", NAMES)
def test_an_attachment_may_not_have_a_name_that_leaves_the_folder(forge, tmp_path, name):
    """The same for attachments."""
    write(f"{tmp_path}/secret", b"secret")
    forge.body["attachments"][0]["name"] = name
    forge.sign()
    refused(forge.path)


@pytest.mark.parametrize("name", [*NAMES[:-1], "index_1.json", "INDEX_0.JSON"])
def test_an_index_may_not_have_another_name(forge, name):
    """The same for the index, which has one name only."""
    forge.sign()
    forge.body["indexes"][0]["name"] = name
    forge.sign_manifest(dump(forge.body))
    refused(forge.path)


# ---------------------------------------------------------------------------- what is no regular file

FILES = ["manifest.json", "index_0.json", "checkpoint_0.pt"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("absolute", [True, False])
def test_a_link_in_place_of_a_file_is_not_followed(forge, tmp_path, name, absolute):
    """A symbolic link is refused though it leads to the very file."""
    os.rename(f"{forge.path}/{name}", f"{tmp_path}/moved")
    os.symlink(f"{tmp_path}/moved" if absolute else "../moved", f"{forge.path}/{name}")
    refused(forge.path, CorruptCheckpointError, IncompleteCheckpointError)


def test_a_link_in_place_of_a_folder_of_attachments_is_not_followed(forge, tmp_path):
    """A folder of the checkpoint that is a link to elsewhere is refused."""
    os.rename(f"{forge.path}/logs", f"{tmp_path}/moved")
    os.symlink(f"{tmp_path}/moved", f"{forge.path}/logs")
    refused(forge.path)


@pytest.mark.parametrize("name", [*FILES, "vocabulary.txt"])
@pytest.mark.parametrize("kind", ["fifo", "folder", "socket", "device"])
def test_what_is_no_regular_file_is_not_waited_for(forge, name, kind):
    """A pipe, a folder, a socket or a device in place of a file is an error at once."""
    path = f"{forge.path}/{name}"
    os.remove(path)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        os.mkdir(path)
    elif kind == "socket":
        os.chdir(forge.path)  # socket paths are short
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(name)
    else:
        os.symlink("/dev/zero", path)
    refused(forge.path, CorruptCheckpointError, IncompleteCheckpointError)


# ---------------------------------------------------------------------------- numbers

RECORDS = [
    ("offset", -64),
    ("offset", BIG),
    ("offset", TOO_BIG),
    ("offset", 2**64 - 64),
    ("offset", 1.5),
    ("offset", "64"),
    ("offset", None),
    ("offset", True),
    ("length", -1),
    ("length", BIG),
    ("length", TOO_BIG),
    ("length", 10**30),
    ("length", 1 << 40),
    ("file", -1),
    ("file", 1),
    ("file", BIG),
    ("encoding", "zstd"),
    ("encoding", "RAW"),
    ("encoding", ""),
    ("encoding", None),
]


@pytest.mark.parametrize(("column", "value"), RECORDS)
def test_records_are_held_to_the_file(forge, column, value):
    """A record with a number that is no range of the file, or an unknown encoding, is refused."""
    forge.index["records"][column][1] = value
    forge.sign_index(dump(forge.index))
    refused(forge.path)


@pytest.mark.parametrize("number", [0, 1])
def test_records_may_not_overlap(forge, number):
    """Two records over the same bytes are refused."""
    records = forge.index["records"]
    records["offset"][number + 1] = records["offset"][number]
    records["length"][number + 1] = max(records["length"][number : number + 2])
    forge.sign()
    refused(forge.path, match="overlap")


def test_a_record_may_not_reach_beyond_the_file(forge):
    """One byte too many is refused."""
    records = forge.index["records"]
    records["length"][-1] = len(forge.data) - records["offset"][-1] + 1
    forge.sign_index(dump(forge.index))
    refused(forge.path, match="beyond")


@pytest.mark.parametrize("crc", [-1, 1 << 32, 1.5, None, "0"])
def test_a_checksum_is_a_checksum(forge, crc):
    """A CRC that is none is refused."""
    forge.index["records"]["crcs"][0] = crc
    forge.sign_index(dump(forge.index))
    refused(forge.path)


TENSORS = [
    ("record", -1),
    ("record", 1000),
    ("record", BIG),
    ("byte_offset", -4),
    ("byte_offset", 2),
    ("byte_offset", BIG - 3),
    ("byte_offset", 1 << 40),
    ("dtype", "float31"),
    ("dtype", "load"),
    ("dtype", "qint8"),
    ("dtype", ""),
    ("dtype", None),
    ("shape", [3, 5]),
    ("shape", [-3, -4]),
    ("shape", [3, BIG]),
    ("shape", [TOO_BIG]),
    ("shape", [1 << 32, 1 << 32]),
    ("shape", [3]),
    ("shape", [True, 4]),
    ("shape", [3.0, 4]),
    ("shape", None),
    ("shape", [[3, 4]]),
    ("stride", [4, -1]),
    ("stride", [BIG, 1]),
    ("stride", [TOO_BIG, 1]),
    ("stride", [4, 1 << 61]),
    ("stride", []),
    ("kind", "code"),
    ("kind", None),
    ("device", "nowhere"),
    ("device", "meta"),
    ("device", ""),
    ("device", "cpu:x"),
    ("device", "c" * 100_000),
    ("device", None),
]


def test_an_array_is_of_a_dtype_that_numpy_has(forge):
    """A tensor that is said to be a numpy array, of a dtype that numpy lacks, is refused."""
    tensors, number = forge.index["tensors"], forge.node("weight")[1]
    tensors["kind"][number], tensors["dtype"][number] = "ndarray", "bfloat16"
    forge.sign()
    refused(forge.path, match="numpy")


@pytest.mark.parametrize(("column", "value"), TENSORS)
def test_tensors_are_held_to_their_record(forge, column, value):
    """A tensor that reaches outside of its record, or is of no known kind, is refused."""
    forge.index["tensors"][column][forge.node("weight")[1]] = value
    forge.sign()
    known_to_torch_alone = column == "device" or value == "float31"
    refused(forge.path, verified=not known_to_torch_alone)


@pytest.mark.parametrize("shape", [[1 << 62, 4], [1 << 40], [1 << 62] * 3, [BIG], [1] * 65])
def test_a_huge_shape_that_shares_memory_is_no_danger(forge, shape):
    """A stride of 0 makes a huge tensor of few bytes: it costs no memory, or is refused."""
    number = forge.node("weight")[1]
    forge.index["tensors"]["shape"][number] = shape
    forge.index["tensors"]["stride"][number] = [0] * len(shape)
    forge.sign()

    def work():
        resource.setrlimit(resource.RLIMIT_AS, (_used() + MEMORY_BYTES,) * 2)
        try:
            found = load(forge.path)["weight"]
            assert list(found.shape) == shape
            assert found.untyped_storage().nbytes() < 1000
        except CorruptCheckpointError:
            pass
        with pytest.raises((MismatchError, CorruptCheckpointError)):
            load(forge.path, {"weight": torch.zeros(3, 4)})

    assert in_child(work) == 0


def _used():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


@pytest.mark.parametrize("numbers", [[0, 0], [5, 1], [-1], [1000], [1.0], [True], None, "0"])
@pytest.mark.parametrize("column", ["requires_grad", "conj", "neg"])
def test_lists_of_tensor_numbers_are_checked(forge, column, numbers):
    """Numbers that are no tensors, or come twice or in another order, are refused."""
    forge.index["tensors"][column] = numbers
    forge.sign()
    refused(forge.path)


def test_a_real_tensor_has_no_conjugate(forge):
    """The conjugate bit on a tensor that is not complex is refused."""
    forge.index["tensors"]["conj"] = [forge.node("weight")[1]]
    forge.sign()
    refused(forge.path, match="conj")


@pytest.mark.parametrize("column", ["requires_grad", "neg"])
def test_bits_that_torch_refuses_are_an_error_about_the_file(forge, column):
    """A gradient of integers, or a negative bit that a dtype cannot have, does not crash."""
    weight = forge.node("weight")[1]
    forge.index["tensors"]["dtype"][weight] = "int32" if column == "requires_grad" else "bool"
    forge.index["tensors"]["stride"][weight] = [4, 1]
    forge.index["tensors"][column] = [weight]
    forge.sign()
    try:
        load(forge.path)
    except CorruptCheckpointError as error:
        assert forge.path in str(error)  # noqa: PT017 - it may also load


@pytest.mark.parametrize("columns", ["records", "tensors"])
@pytest.mark.parametrize("change", ["shorter", "longer", "empty", "missing", "no list", "no object"])
def test_columns_have_one_length(forge, columns, change):
    """A column that is shorter, longer, missing or no list is refused."""
    for name in list(forge.index[columns]):
        if columns == "tensors" and name in ("requires_grad", "conj", "neg"):
            continue
        index = json.loads(dump(forge.index))
        column = index[columns][name]
        index[columns][name] = {
            "shorter": column[:-1],
            "longer": [*column, column[-1]],
            "empty": [],
            "no list": {"0": column[0]},
        }.get(change)
        if change == "missing":
            del index[columns][name]
        elif change == "no object":
            index[columns] = column
        forge.sign_index(dump(index))
        refused(forge.path)


def test_a_tensor_of_another_size_than_its_record_reads_only_its_own_bytes(forge):
    """A smaller tensor within a larger record loads its own bytes, and no others."""
    number = forge.node("weight")[1]
    for column, value in (("shape", [2]), ("stride", [1]), ("byte_offset", 8)):
        forge.index["tensors"][column][number] = value
    forge.sign()
    assert load(forge.path)["weight"].tolist() == make_state(1)["weight"].reshape(-1)[2:4].tolist()
    target = torch.zeros(2)
    load(forge.path, {"weight": target})
    assert target.tolist() == [102.0, 103.0]


@pytest.mark.parametrize("field", ["size", "crc32"])
@pytest.mark.parametrize("value", [-1, TOO_BIG, 1 << 70, None, 1.5, "1", BIG])
@pytest.mark.parametrize("where", ["manifest", "index", "both"])
def test_sizes_of_files_are_checked(forge, field, value, where):
    """A size or checksum of a data file that is none, or a false one, is refused."""
    forge.sign()
    if where != "manifest":
        forge.index["files"][0][field] = value
    if where != "index":
        forge.body["files"][0][field] = value
    forge.sign_index(dump(forge.index))
    refused(forge.path)


@pytest.mark.parametrize("size", [1 << 40, BIG, 0, -1])
@pytest.mark.parametrize("listed", ["indexes", "attachments"])
def test_a_declared_size_takes_no_memory(forge, listed, size):
    """A file that is declared to be huge is compared with what is there before anything is read."""
    forge.sign()
    forge.body[listed][0]["size"] = size
    forge.sign_manifest(dump(forge.body))
    assert in_child(lambda: (_limit_memory(), refused(forge.path))) == 0


def _limit_memory():
    resource.setrlimit(resource.RLIMIT_AS, (_used() + MEMORY_BYTES,) * 2)


@pytest.mark.parametrize("name", FILES)
def test_a_huge_file_takes_no_memory(forge, name):
    """A manifest, index or data file blown up to 4 TiB (with holes) is refused unread."""
    os.truncate(f"{forge.path}/{name}", 1 << 42)
    assert in_child(lambda: (_limit_memory(), refused(forge.path))) == 0


def test_a_huge_data_file_that_is_declared_is_read_in_pieces(forge):
    """A record of a terabyte of holes, signed by its size, fails its checksum without memory for it."""
    number = len(forge.index["records"]["length"]) - 1
    grown = 64 << 20
    forge.sign()
    forge.index["records"]["length"][number] += grown
    forge.index["records"]["crcs"] += [0] * (grown // 262144)
    forge.index["files"][0]["size"] += grown
    forge.body["files"][0]["size"] += grown
    os.truncate(f"{forge.path}/checkpoint_0.pt", len(forge.data) + grown)
    forge.sign_index(dump(forge.index))
    assert in_child(lambda: (_limit_memory(), refused(forge.path))) == 0


# ---------------------------------------------------------------------------- JSON


@pytest.mark.parametrize("name", ["records", "tensors", "tree", "attempt", "files", "rank", "requires"])
def test_a_field_of_the_index_may_not_be_repeated(forge, name):
    """Two fields of one name, of which readers may take either, are refused."""
    data = dump(forge.index)
    field = dump({name: forge.index[name]})[1:-1]
    forge.sign()
    for repeated in (b"{" + field + b"," + data[1:], data[:-1] + b"," + field + b"}"):
        forge.sign_index(repeated)
        refused(forge.path)


@pytest.mark.parametrize("columns", ["records", "tensors"])
def test_a_column_may_not_be_repeated(forge, columns):
    """The same for columns."""
    name, column = next(iter(forge.index[columns].items()))
    field = dump({name: column})[1:-1]
    data = dump(forge.index)
    inner = dump(forge.index[columns])
    forge.sign()
    forge.sign_index(data.replace(inner, b"{" + field + b"," + inner[1:]))
    refused(forge.path)


@pytest.mark.parametrize("name", ["files", "indexes", "attempt", "version", "world_size"])
def test_a_field_of_the_manifest_may_not_be_repeated(forge, name):
    """The same for the manifest."""
    forge.sign()
    forge.sign_manifest(dump(forge.body)[:-1] + b"," + dump({name: forge.body[name]})[1:])
    refused(forge.path)


@pytest.mark.parametrize("place", ["shape", "offset", "version", "rank", "step", "int"])
@pytest.mark.parametrize("text", [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"1e1", b"0x10", b"-0", b"01"])
def test_numbers_are_plain_integers(forge, place, text):
    """NaN, infinity, floats and odd spellings where integers belong are refused (or, for -0, are 0)."""
    forge.sign()
    marker = 123456789
    if place == "shape":
        forge.index["tensors"]["shape"][0][0] = marker
    elif place == "offset":
        forge.index["records"]["offset"][0] = marker
    elif place == "int":
        forge.set("numbers", ["int", marker])
    elif place == "version":
        forge.index["version"][1] = marker
    else:
        forge.index[place] = marker
    forge.sign_index(dump(forge.index).replace(b"123456789", text))
    if text == b"-0" or (text == b"1e1" and place in ("version", "step")):
        with contextlib.suppress(CorruptCheckpointError, UnsupportedFormatError):
            load(forge.path)
        return
    refused(forge.path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"{",
        b'"' * 100,
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"\xff\xfe{}",
        b"\0" * 64,
    ],
    ids=lambda data: str(data[:8]),
)
def test_an_index_or_manifest_that_is_no_json_is_refused(forge, data):
    """Whatever the bytes are, an error says so."""
    forge.sign()
    forge.sign_index(data)
    refused(forge.path)
    forge.sign_manifest(data)
    refused(forge.path)
    write(f"{forge.path}/manifest.json", data)
    refused(forge.path)


@pytest.mark.parametrize("gap", [b" ", b"\n", b"\t"])
def test_white_space_between_fields_is_refused(forge, gap):
    """What could hide a difference between readers is refused."""
    forge.sign()
    forge.sign_index(dump(forge.index).replace(b'"records"', gap + b'"records"'))
    refused(forge.path)


@pytest.mark.parametrize("form", ["list", "dict", "tuple", "set", "ordered", "default", "key", "metadata"])
@pytest.mark.parametrize("depth", [202, 1000, 100_000])
def test_deep_nesting_is_refused(forge, form, depth):
    """Trees deeper than 200 are refused, however deep, and do not exhaust the stack."""
    forge.sign()
    if form in ("dict", "ordered", "default"):
        close = b"],null]" if form != "dict" else b"]]"
        nest = b'["' + form.encode() + b'",[[["str","a"],', b"]" + close
    else:
        nest = b'["' + (form if form in ("list", "set") else "tuple").encode() + b'",[', b"]]"
    node = nest[0] * depth + b'["none"]' + nest[1] * depth
    if form == "metadata":
        data = dump({**forge.index, "metadata": "@"}).replace(b'"@"', node)
    else:
        forge.index["tree"][1].append(["@", ["none"]] if form == "key" else [["str", "deep"], "@"])
        data = dump(forge.index).replace(b'"@"', node)
    forge.sign_index(data)
    refused(forge.path)


# ---------------------------------------------------------------------------- trees

EQUAL_KEYS = [
    [["int", 1], ["int", 1]],
    [["int", 1], ["bool", True]],
    [["int", 1], ["float", 1.0]],
    [["int", 1], ["float", 1]],
    [["int", 1], ["int", "0x1"]],
    [["int", 0], ["float", -0.0]],
    [["int", 0], ["int", "-0x0"]],
    [["float", 1.0], ["complex", ["float", 1.0], ["float", 0.0]]],
    [["int", 1], ["scalar", "<i8", "0100000000000000"]],
    [["str", "a"], ["str", "a"]],
    [["str", "a"], ["str", None, "61"]],
    [["bytes", "YQ=="], ["bytes", "YQ=="]],
    [["none"], ["none"]],
    [["tuple", [["int", 1]]], ["tuple", [["bool", True]]]],
    [["tuple", [["int", 1]]], ["size", [1]]],
    [["dtype", "float32"], ["dtype", "float"]],
    [["device", "cpu"], ["device", "cpu"]],
]


@pytest.mark.parametrize("keys", EQUAL_KEYS, ids=str)
@pytest.mark.parametrize("tag", ["dict", "ordered", "default", "set", "top"])
def test_a_dict_may_not_have_equal_keys(forge, keys, tag):
    """Keys that are equal as Python sees them would hide one another: refused."""
    forge.sign()
    if tag == "set":
        forge.set("numbers", ["set", keys])
    elif tag == "top":
        forge.index["tree"][1] += [[key, ["none"]] for key in keys]
    else:
        extra = [] if tag == "dict" else [None]
        forge.set("numbers", [tag, [[key, ["int", n]] for n, key in enumerate(keys)], *extra])
    forge.sign_index(dump(forge.index))
    refused(forge.path, CorruptCheckpointError, MismatchError, verified=False)


EMPTY = "the empty record"
NODES = [
    ["unknown"],
    ["none", 1],
    [],
    {},
    "none",
    None,
    5,
    ["bool", 1],
    ["int", 1.0],
    ["int", TOO_BIG],
    ["int", "12"],
    ["int", "0x"],
    ["int", "--0x1"],
    ["int", "0x_1"],
    ["int", True],
    ["float", "0"],
    ["float", "7FF0000000000000"],
    ["float", None],
    ["float", True],
    ["complex", ["float", 1.0]],
    ["complex", ["int", 1], ["float", 1.0]],
    ["str", 5],
    ["str", None, "ff"],
    ["str", None, "6"],
    ["bytes", "a"],
    ["bytes", "YQ==\n"],
    ["bytes", "é"],
    ["list", {}],
    ["list", "abc"],
    ["list", [1]],
    ["dict", [[["str", "a"]]]],
    ["dict", [["str", "a"], ["none"]]],
    ["dict", {"a": 1}],
    ["dict", [[["list", []], ["none"]]]],
    ["dict", [[["dict", []], ["none"]]]],
    ["dict", [[["tensor", 0], ["none"]]]],
    ["dict", [[["tuple", [["list", []]]], ["none"]]]],
    ["set", [["list", []]]],
    ["set", [["tensor", 0]]],
    ["ordered", []],
    ["ordered", [], ["list", []]],
    ["ordered", [], 5],
    ["ordered", [], ["dict", [[["int", 1], ["none"]]]]],
    ["default", [], "eval"],
    ["default", [], "exec"],
    ["default", [], ["list"]],
    ["size", [-1]],
    ["size", [1.5]],
    ["size", [TOO_BIG]],
    ["dtype", "load"],
    ["dtype", "float31"],
    ["dtype", "__name__"],
    ["dtype", "a" * 1000],
    ["dtype", "_inductor"],
    ["dtype", "Tensor"],
    ["device", "nowhere:0"],
    ["device", ""],
    ["device", "cpu:99999999999999999999"],
    ["device", "hpu:128"],
    ["device", "cpu:007"],
    ["tensor", -1],
    ["tensor", 1000],
    ["tensor", True],
    ["tensor", 0.0],
    ["scalar", "<f8", "00"],
    ["scalar", "|O", "0000000000000000"],
    ["scalar", "<q9", "00"],
    ["scalar", "[('a','|O')]", "0000000000000000"],
    ["scalar", "[", "00"],
    ["scalar", "[" * 10_000, "00"],
    ["scalar", "__import__('os').system('true')", "00"],
    ["scalar", "<M8[ns/0]", "00" * 8],
    ["scalar", "<M8[0s]", "00" * 8],
    ["scalar", "<M8[99999999999s]", "00" * 8],
    ["scalar", "=f4", "00" * 4],
    ["scalar", "<U1", "ff" * 4],
    ["scalar", "f4,f4", "00" * 8],
    ["scalar", "(1000000,1000000)f4", "00"],
    ["scalar", "<U2000000000", ""],
    ["scalar", "[" + "('a','<f4')," * 180_000 + "]", "00"],
    ["scalar", "[('a'," * 1000 + "'<f4'" + ")]" * 1000, "00"],
    ["scalar", "[('a', " + "-" * 60_000 + "1)]", "00"],
    ["scalar", "[('a', '<f4', (2000000000, 2000000000))]", "00"],
    ["float", 10**30],
    ["array", 0, "<f4", [1 << 62]],
    ["array", 0, "<f4", [1 << 32, 1 << 32]],
    ["array", 0, "|O", [1]],
    ["array", 0, "<f4", [5]],
    ["array", 0, "|V0", [1 << 40]],
    ["array", 0, "<U0", [1 << 40]],
    ["array", 1000, "<f4", [1]],
    ["array", 0, "<f4", [1] * 100],
    ["array", 0, "<f4", [1] * 64 + [12]],
    ["array", EMPTY, "<f4", [0] + [1] * 64],
    ["array", EMPTY, "<f4", [0, 1 << 62]],
    ["array", EMPTY, "<f4", [0, TOO_BIG]],
    ["array", EMPTY, "<f4", [0, BIG, BIG]],
    ["array", EMPTY, "|S0", [1 << 33]],
    ["array", EMPTY, "<U0", [1 << 33]],
    ["array", EMPTY, "|S2000000000", [0]],
    ["blob", -1],
    ["blob", 1000],
    ["object", 0, "os.system"],
    ["object", 1000, "os.system"],
    ["object", 0, 5],
]


@pytest.mark.parametrize("node", NODES, ids=[f"{n}-{str(node)[:30]}" for n, node in enumerate(NODES)])
def test_malformed_nodes_are_refused(forge, node):
    """A value of no known kind, of a wrong form, or that names what is not there, is refused."""
    forge.sign()
    if isinstance(node, list) and EMPTY in node:
        node = [forge.empty_record() if part is EMPTY else part for part in node]
    forge.set("numbers", node)
    forge.sign_index(dump(forge.index))
    assert in_child(lambda: (_limit_memory(), _refused_anew(forge.path))) == 0


PRIME = (1 << 61) - 1
"""Python's hash of an integer is its remainder by this."""

MANY = range(20_000)
CROWDS = {
    "int": [["int", hex(n * PRIME)] for n in MANY],
    "tuple": [["tuple", [["int", hex(n * PRIME)]]] for n in MANY],
    "complex": [["complex", ["float", 1_000_003 * n], ["float", -n]] for n in MANY],
    "numpy": [["scalar", "<c16", struct.pack("<dd", 1_000_003 * n, -n).hex()] for n in MANY],
}


@pytest.mark.parametrize("tag", ["dict", "set"])
@pytest.mark.parametrize("kind", CROWDS)
def test_keys_of_one_hash_are_refused(forge, kind, tag):
    """A dict or set of very many keys that Python gives one hash is refused, before it takes minutes."""
    forge.sign()
    forge.set("numbers", [tag, [[key, ["none"]] for key in CROWDS[kind]] if tag == "dict" else CROWDS[kind]])
    forge.sign_index(dump(forge.index))
    if kind != "numpy":
        refused(forge.path, match="one hash")
    else:  # only numpy knows these hashes
        with pytest.raises(CorruptCheckpointError, match="one hash"):
            load(forge.path)


def test_a_structure_of_numpy_is_no_key(forge):
    """A structured scalar, which has no hash, is refused as a key."""
    forge.sign()
    for descr in ("|V2", "[('a', '|i1'), ('b', '|i1')]"):
        forge.set("numbers", ["dict", [[["scalar", descr, "0000"], ["none"]]]])
        forge.sign_index(dump(forge.index))
        refused(forge.path, match="key of kind 'scalar'")


DEVICES = ["hpu", "hpu:3", "privateuseone", "privateuseone:7", "vulkan", "xla", "lazy", "mtia", "fpga"]
LOADS = """
import sys
from support.forge import Forge
from support.saves import load
from support.states import make_state, same
from milepost.errors import ConfigError
forge = Forge(sys.argv[1])
for device in sys.argv[2:]:
    forge.index["tensors"]["device"] = [device] * len(forge.index["tensors"]["device"])
    forge.sign()
    try:
        load(forge.path)
    except ConfigError as error:
        assert "map_location" in str(error) and forge.path in str(error)
    assert same(load(forge.path, map_location="cpu"), make_state(1))
    print(device)
"""


def test_a_device_that_is_not_here_is_an_error_with_a_way_out(forge):
    """Torch may look for a module of the device's name: still an error of Milepost's, and the CPU helps."""
    done = subprocess.run(  # not forked: torch begins a device's work with threads of its own
        [sys.executable, "-c", LOADS, forge.path, *DEVICES],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.stdout.split() == DEVICES, done.stderr[-2000:]


def test_the_place_of_a_malformed_node_is_named(forge):
    """The error about a node says which value of the state dict it is."""
    forge.sign()
    for leaf in (["dtype", "LOAD"], ["dtype", "load"]):  # the second could be the name of a dtype
        forge.set("numbers", ["list", [["none"], ["dict", [[["str", "deep"], leaf]]]]])
        forge.sign_index(dump(forge.index))
        with pytest.raises(CorruptCheckpointError, match=r"numbers\[1\]\.deep"):
            load(forge.path)


@pytest.mark.parametrize("kind", ["list", "dict", "nested"])
def test_very_many_values_are_shown_in_seconds(forge, kind):
    """`milepost show` describes some of very many values, and says how many it leaves out."""
    node = {
        "list": ["list", [["none"]] * 300_000],
        "dict": ["dict", [[["int", n], ["none"]] for n in range(150_000)]],
        "nested": ["list", [["list", []]] * 150_000],
    }[kind]
    forge.sign()
    forge.set("numbers", node)
    forge.sign_index(dump(forge.index))
    index = decode_index(Path(f"{forge.path}/index_0.json").read_bytes(), forge.path)
    lines = outline(index)
    assert len(lines) + sum(line.left_out for line in lines) > len(node[1])
    assert len(lines) <= MOST_LINES
    assert sum(line.size_bytes for line in lines if line.depth == 1) == lines[0].size_bytes > 0


def _refused_anew(path):
    with pytest.raises((CorruptCheckpointError, ConfigError)) as caught:
        load(path)
    assert path in str(caught.value)
    for template in ({"numbers": None}, {"numbers": [1, 2]}, {"numbers": {}}, {"numbers": torch.zeros(2)}):
        try:
            load(path, template)
        except (CorruptCheckpointError, MismatchError, ConfigError) as error:
            assert path in str(error)  # noqa: PT017 - it may also load
    with contextlib.suppress(LoadError):
        verify(default_storage(), path)


@pytest.mark.parametrize("kind", ["array", "blob", "object"])
def test_a_record_is_read_for_one_value(forge, kind):
    """A tree that names a record very often would make very many copies of it: refused."""
    number = forge.node("sparse")[1]
    rest = {"array": ["|V1", [forge.index["records"]["length"][number]]], "object": ["torch.Tensor"]}
    forge.set("numbers", ["list", [[kind, number, *rest.get(kind, [])]] * 2])
    forge.sign()
    refused(forge.path, match="two values")


@pytest.mark.parametrize("root", [["list", []], ["tensor", 0], ["none"], ["int", 1], ["set", []]])
def test_the_state_must_be_a_dict(forge, root):
    """An index whose tree is no dict is refused."""
    forge.sign()
    forge.index["tree"] = root
    forge.sign_index(dump(forge.index))
    refused(forge.path, CorruptCheckpointError, MismatchError, verified=False)


def test_a_tree_that_doubles_itself_stays_small(forge):
    """The nodes of a tree are what is in the file: there are no references that could multiply them."""
    forge.sign()
    forge.set("numbers", ["list", [["tensor", 0]] * 100_000])
    forge.sign_index(dump(forge.index))
    found = load(forge.path)["numbers"]
    assert len(found) == 100_000
    assert len({id(item) for item in found}) == 1


# ---------------------------------------------------------------------------- pickles


class _Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


class _Run:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("maker", [_Touch, _Run])
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_pickle_that_would_run_code_does_not(forge, tmp_path, maker, protocol):
    """An object record whose pickle calls a function is refused, and nothing has been called."""
    sentinel = f"{tmp_path}/sentinel"
    forge.put_object("sparse", pickle.dumps(maker(sentinel), protocol))
    refused(forge.path, verified=False)
    verify(default_storage(), forge.path)
    assert not os.path.exists(sentinel)


def test_code_in_the_view_for_torch_is_never_looked_at(forge, tmp_path):
    """`data.pkl` is for torch: whatever is in it, Milepost reads the index."""
    sentinel = f"{tmp_path}/sentinel"
    evil = pickle.dumps(_Touch(sentinel), 2)
    start = forge.data.index(b"archive/data.pkl") + len(b"archive/data.pkl")
    forge.data[start + 64 : start + 64 + len(evil)] = evil
    forge.sign()
    assert same(load(forge.path), make_state(1))
    load(forge.path, make_state(2))
    assert not verify(default_storage(), forge.path).problems
    assert not os.path.exists(sentinel)


class _WithId:
    """Stands for a persistent id."""

    def __init__(self, identity):
        self.identity = identity


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj):
        return obj.identity if isinstance(obj, _WithId) else None


def with_ids(value):
    import io

    out = io.BytesIO()
    _Pickler(out, 2).dump(value)
    return out.getvalue()


IDS = [
    None,
    5,
    "storage",
    (),
    ("storage",),
    ("storage", torch.FloatStorage, "0", "cpu"),
    ("storage", torch.FloatStorage, "-1", "cpu", 4),
    ("storage", torch.FloatStorage, "1000", "cpu", 4),
    ("storage", torch.FloatStorage, "x", "cpu", 4),
    ("storage", torch.FloatStorage, None, "cpu", 4),
    ("storage", torch.FloatStorage, "9" * 5000, "cpu", 4),
    ("storage", "FloatStorage", "0", "cpu", 4),
    ("storage", torch.FloatStorage, [0], "cpu", 4),
    ("module", "0", "x", "y", "z"),
]


@pytest.mark.parametrize("identity", IDS, ids=[f"{n}-{str(identity)[:40]}" for n, identity in enumerate(IDS)])
def test_bad_storage_ids_in_an_object_are_refused(forge, identity):
    """An object whose pickle names a storage that is not there, or names it wrongly, is refused."""
    forge.put_object("sparse", with_ids([_WithId(identity)]))
    refused(forge.path, verified=False)


def rebuilt(number, *, offset=0, size=(2,), stride=(1,), dtype=torch.float32, count=4):
    """A pickle of a tensor over the storage of tensor `number`."""

    class Rebuilt:
        def __reduce__(self):
            identity = ("storage", torch.UntypedStorage, str(number), "cpu", count)
            return (
                torch._utils._rebuild_tensor_v3,
                (
                    _WithId(identity),
                    offset,
                    size,
                    stride,
                    False,
                    __import__("collections").OrderedDict(),
                    dtype,
                ),
            )

    return with_ids(Rebuilt())


@pytest.mark.parametrize(
    "options",
    [
        {"size": (1000,)},
        {"size": (1 << 40,)},
        {"size": (1 << 62,), "stride": (0,)},
        {"offset": 1000},
        {"offset": -1},
        {"size": (2, 2), "stride": (1 << 40, 1)},
        {"size": (-1,)},
        {"stride": (-1,)},
        {"dtype": torch.complex128, "size": (100,)},
        {"offset": 1 << 62},
        {"count": 1 << 40, "size": (1 << 30,)},
    ],
    ids=str,
)
def test_a_tensor_in_an_object_stays_in_its_storage(forge, options):
    """A pickle that asks for more of a storage than is there gets an error and no foreign bytes."""
    forge.put_object("sparse", rebuilt(forge.node("weight")[1], **options))

    def work():
        _limit_memory()
        for template in (None, {"sparse": None}, {"sparse": torch.zeros(2)}):
            try:
                found = load(forge.path, template)["sparse"]
            except (CorruptCheckpointError, MismatchError) as error:
                assert forge.path in str(error)  # noqa: PT017 - it may also load
            else:
                assert options.get("stride") == (0,)
                assert found.untyped_storage().nbytes() <= 48

    assert in_child(work) == 0


def test_a_sparse_tensor_whose_indices_are_out_of_range_is_refused(forge):
    """Indices that a later use of the tensor would follow out of its memory are found as it is loaded."""
    tensors = forge.index["tensors"]
    number = next(n for n, record in enumerate(tensors["record"]) if tensors["shape"][n] == [2, 2])
    assert tensors["dtype"][number] == "int64"
    place = forge.record(tensors["record"][number])
    forge.data[place] = (1 << 40).to_bytes(8, "little") * ((place.stop - place.start) // 8)
    forge.sign()
    refused(forge.path, match="sparse", verified=False)


def test_a_sparse_tensor_may_not_have_very_many_indices_in_one_place(forge):
    """Indices of a stride of 0, which need memory only when they are compared, are refused before that."""
    number = forge.node("weight")[1]
    indices = rebuilt(number, dtype=torch.int64, size=(1, 1 << 28), stride=(0, 0))[2:-1]
    values = rebuilt(number, size=(1 << 28,), stride=(0,))[2:-1]
    layout = b"ctorch.serialization\n_get_layout\n" + _pushed(("torch.sparse_coo",)) + b"R"
    parts = b"(" + indices + values + _pushed((10,)) + b"\x89t"
    data = b"ctorch._utils\n_rebuild_sparse_tensor\n(" + layout + parts + b"tR"
    forge.put_object("sparse", b"\x80\x02" + data + b".")
    refused(forge.path, match="very many indices", verified=False)


def test_a_tensor_in_an_object_that_fits_loads(forge):
    """The tool of these tests makes objects that load, so that it is the range that is refused."""
    forge.put_object("sparse", rebuilt(forge.node("weight")[1]))
    assert load(forge.path)["sparse"].tolist() == [100.0, 101.0]


@pytest.mark.parametrize(
    "data", [b"", b"\x80\x02.", b"\x80\x02N", b"garbage", b"\x80\xff.", b"\x80\x02" + b"(" * 100_000]
)
def test_a_broken_pickle_is_an_error(forge, data):
    """Bytes that are no pickle are refused."""
    forge.put_object("sparse", data)
    refused(forge.path, verified=False)


def _pushed(value):
    """The opcodes that put a value onto the stack of an unpickler."""
    return pickle.dumps(value, 2)[2:-1]


def _keys(kind):
    return b"".join(kind(n) + b"N" for n in MANY)


_NESTED = b")" + b"\x85" * 1_000_000
_DOUBLED = b")q\0" + b"".join(bytes((*b"h", n, *b"h", n, 0x86, *b"q", n + 1)) for n in range(60))
_SIZED = b"c__builtin__\nbytearray\n" + _pushed((1 << 33,))
_STRIDED = b"ctorch._utils\n_rebuild_tensor_v2\n(N" + _pushed(0) + _pushed((1 << 62,)) + b"N\x89NtR"
_ORDERED = b"ccollections\nOrderedDict\n)R"
_PAIRS = b"(" + _pushed(("a", "b")) * 3 + b"".join(_pushed((n * PRIME, str(n))) for n in MANY)
BOMBS = {
    "a deep tuple as a key": b"}" + _NESTED + b"Ns",
    "a deep tuple": _NESTED,
    "a tuple that doubles as a key": b"}" + _DOUBLED + b"Ns",
    "a tuple that doubles as a function": b"N" + _DOUBLED + b"}R",
    "a tuple that doubles as a class": _DOUBLED + b")\x81",
    "a tuple that doubles in a set": b"c__builtin__\nset\n](" + _DOUBLED + b"e\x85R",
    "a tuple that doubles in a list that is a key's part": b"}]" + _DOUBLED + b"a\x85Ns",
    "a large bytearray": _SIZED + b"R",
    "a large bytearray, made by another function": (
        b"ctorch._tensor\n_rebuild_from_type_v2\n(c__builtin__\nbytearray\nN" + _pushed((1 << 33,)) + b"NtR"
    ),
    "a large bytearray by another name": _SIZED.replace(b"__builtin__", b"builtins") + b"R",
    "a bytearray of a tensor": b"c__builtin__\nbytearray\n" + _STRIDED + b"\x85R",
    "a set of a tensor": b"c__builtin__\nset\n" + _STRIDED + b"\x85R",
    "a size of a tensor": b"ctorch\nSize\n" + _STRIDED + b"\x85R",
    "a tensor of very many elements": _STRIDED,
    "integers of one hash": b"}(" + _keys(lambda n: _pushed(n * PRIME)) + b"u",
    "integers of one hash in a set": (
        b"c__builtin__\nset\n](" + b"".join(_pushed(n * PRIME) for n in MANY) + b"e\x85R"
    ),
    "pairs of one hash": b"}(" + _keys(lambda n: _pushed((n * PRIME, 1))) + b"u",
    "complex numbers of one hash": (
        b"}(" + _keys(lambda n: b"c__builtin__\ncomplex\n" + _pushed((1_000_003.0 * n, -n)) + b"R") + b"u"
    ),
    "one text made into bytes again and again": (
        _pushed("a" * 1_000_000) + b"q\7]("
        + (b"c_codecs\nencode\nh\7" + _pushed("latin1") + b"\x86R") * 2000 + b"e"
    ),
    "sizes of one hash": (
        b"}(" + _keys(lambda n: b"ctorch\nSize\n" + _pushed(((n * PRIME, 1),)) + b"R") + b"u"
    ),
    "pairs of one hash as the state of an ordered dict": _ORDERED + b"]" + _PAIRS + b"eb",
    "pairs of one hash as one part of a state": (
        b"ccollections\nCounter\n)R]" + _PAIRS + b"eN\x86b"
    ),
    "a set of pairs as a state": _ORDERED + b"c__builtin__\nset\n]" + _PAIRS + b"e\x85Rb",
    "a list that holds itself very often": b"]q\7(" + b"h\7" * 1_000_000 + b"e",
    "an encoding that takes long": b"c_codecs\nencode\n" + _pushed(("é" * 500_000, "idna")) + b"R",
    "a name of a megabyte": b"c" + b"a" * 1_000_000 + b"\nb\n",
    "an opcode that torch does not read": b"\x95" + bytes(8) + b"N",
}  # fmt: skip


def test_names_are_those_that_torch_looks_up():
    """No old name of a module leads torch to what the scan of a pickle knows by another."""
    from torch import _utils

    for old, new in _utils.NAME_MAPPING.items():
        assert ".".join(new) not in pickle_scan._CALLED or pickle_scan.NAME_MAPPING.get(old) == new
    for old, new in _utils.IMPORT_MAPPING.items():
        known = any(name.startswith(f"{new}.") for name in pickle_scan._CALLED)
        assert not known or pickle_scan.IMPORT_MAPPING.get(old) == new


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_pickle_that_would_kill_its_reader_is_refused(forge, bomb):
    """An object that would overflow the stack, or take gigabytes or hours, is refused before it is built."""
    forge.put_object("sparse", b"\x80\x02" + BOMBS[bomb] + b".")
    assert in_child(lambda: (_limit_memory(), refused(forge.path, match="sparse", verified=False))) == 0


@pytest.mark.parametrize(
    "opcode",
    [
        b"X\xff\xff\xff\x7f",
        b"\x8a\xff",
        b"\x8b\xff\xff\xff\x7f",
        b"T\xff\xff\xff\x7f",
        b"r\xff\xff\xff\x7f",
        b"\x8d" + b"\xff" * 8,
    ],
)
def test_huge_lengths_in_a_pickle_take_no_memory(forge, opcode):
    """A pickle that announces gigabytes is refused without memory for them."""
    forge.put_object("sparse", b"\x80\x02" + opcode + b"a.")
    assert in_child(lambda: (_limit_memory(), refused(forge.path, verified=False))) == 0


# ---------------------------------------------------------------------------- versions and belonging


@pytest.mark.parametrize("where", ["index", "manifest"])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", [2, 0]),
        ("version", [0, 9]),
        ("version", [BIG, 0]),
        ("version", [-1, 0]),
        ("requires", ["deltas"]),
    ],
)
def test_a_later_format_is_said_to_be_one(forge, where, field, value):
    """Another major version, or an unknown feature, is an UnsupportedFormatError naming the way out."""
    forge.sign()
    (forge.index if where == "index" else forge.body)[field] = value
    forge.sign_index(dump(forge.index))
    refused(forge.path, UnsupportedFormatError, match="update Milepost")


def test_what_a_file_repeats_in_an_error_is_short(forge):
    """A format or features of a megabyte are not repeated whole in the error about them."""
    for change in ({"format": "x" * 1_000_000}, {"requires": [f"x{n}" for n in range(100_000)]}):
        forge.sign()
        forge.sign_manifest(dump({**forge.body, **change}))
        with pytest.raises((CorruptCheckpointError, UnsupportedFormatError)) as caught:
            load(forge.path)
        assert len(str(caught.value)) < 1000


def test_a_later_minor_version_loads(forge):
    """Unknown fields, and a later minor version, are accepted."""
    for part in (forge.index, forge.body):
        part["version"] = [1, 7]
        part["novelty"] = {"a": [1, 2.5, None]}
    forge.sign()
    assert same(load(forge.path), make_state(1))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", [1]),
        ("version", [1, 0, 0]),
        ("version", "1.0"),
        ("version", None),
        ("requires", None),
        ("requires", [5]),
        ("requires", "x"),
        ("format", "milepost.other"),
        ("format", None),
        ("attempt", None),
        ("attempt", 5),
        ("world_size", 0),
        ("world_size", -1),
        ("world_size", 2),
        ("world_size", BIG),
        ("time", "now"),
        ("metadata", ["unknown"]),
        ("metadata", ["tensor", 0]),
        ("metadata", 5),
        ("writer", {"a": 1}),
        ("step", 1.5),
        ("files", []),
        ("files", None),
        ("attachments", [5]),
    ],
    ids=str,
)
@pytest.mark.parametrize("where", ["index", "manifest"])
def test_the_head_is_checked(forge, where, field, value):
    """Every field of the head of index and manifest that is not as it must be is refused."""
    forge.sign()
    (forge.index if where == "index" else forge.body)[field] = value
    forge.sign_index(dump(forge.index))
    refused(forge.path)


@pytest.mark.parametrize(
    ("field", "value"), [("attempt", "other"), ("rank", 1), ("rank", -1), ("world_size", 2)]
)
def test_the_index_of_another_checkpoint_is_refused(forge, field, value):
    """An index that says that it belongs elsewhere is refused, though its hash is right."""
    forge.sign()
    forge.index[field] = value
    forge.sign_index(dump(forge.index))
    refused(forge.path)


@pytest.mark.parametrize("change", ["two", "other", "none"])
def test_the_index_and_the_manifest_list_the_same_data_file(forge, change):
    """An index that describes no file, two, or another one than the manifest lists, is refused."""
    forge.sign()
    files = forge.index["files"]
    forge.index["files"] = {"two": files * 2, "other": [{**files[0], "name": "vocabulary.txt"}], "none": []}[
        change
    ]
    forge.sign_index(dump(forge.index))
    refused(forge.path)


def test_a_file_may_not_be_listed_twice(forge):
    """A manifest that lists a file twice, or as two kinds of file, is refused."""
    forge.sign()
    for kind in ("files", "attachments"):
        for entry in (forge.body[kind][0],):
            body = json.loads(dump(forge.body))
            body[kind].append(entry)
            forge.sign_manifest(dump(body))
            refused(forge.path, match="twice")
    body = json.loads(dump(forge.body))
    body["attachments"].append({**body["indexes"][0], "name": "checkpoint_0.pt"})
    forge.sign_manifest(dump(body))
    refused(forge.path, match="twice")


def test_a_manifest_with_a_million_files_is_refused_quickly(forge):
    """A manifest that lists very many files that are not there ends in one short error."""
    forge.sign()
    entry = forge.body["attachments"][0]
    forge.body["attachments"] = [{**entry, "name": f"f{n}"} for n in range(100_000)]
    forge.sign_manifest(dump(forge.body))
    with pytest.raises(CorruptCheckpointError) as caught:
        load(forge.path)
    assert len(str(caught.value)) < 2000


# ---------------------------------------------------------------------------- folders without a manifest


def test_a_data_file_of_ours_without_a_manifest_is_never_taken_for_a_plain_one(forge):
    """With the manifest gone, with or without the index, the checkpoint is incomplete."""
    os.remove(f"{forge.path}/manifest.json")
    refused(forge.path, IncompleteCheckpointError)
    os.remove(f"{forge.path}/index_0.json")
    refused(forge.path, IncompleteCheckpointError)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_plain_file_that_would_run_code_does_not(tmp_path):
    """A plain `checkpoint_0.pt` is read with `weights_only`: a pickle that calls a function is refused."""
    sentinel = f"{tmp_path}/sentinel"
    for number, save_ in enumerate((torch.save, lambda value, path: write(path, pickle.dumps(value)))):
        path = f"{tmp_path}/{number}"
        os.mkdir(path)
        save_({"a": _Touch(sentinel)}, f"{path}/checkpoint_0.pt")
        refused(path, verified=False)
    assert not os.path.exists(sentinel)


@pytest.mark.parametrize(
    "data", [b"", b"PK", b"PK\3\4" + bytes(100), b"PK\5\6" + bytes(18), bytes(1000), b"\x80\x02."]
)
def test_a_plain_file_that_is_none_is_an_error(tmp_path, data):
    """Whatever a `checkpoint_0.pt` without a manifest holds, an error names it."""
    path = f"{tmp_path}/step"
    os.mkdir(path)
    write(f"{path}/checkpoint_0.pt", data)
    for template in (None, {"a": 1}):
        with pytest.raises((CorruptCheckpointError, MismatchError), match="checkpoint_0"):
            load(path, template)
