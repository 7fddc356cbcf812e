"""Reading: private mappings, map_location, verification, plain torch files, and what is not there."""

from __future__ import annotations

import logging
import os
import resource
import shutil
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from support.disks import MemoryStorage
from support.processes import descriptors, in_child
from support.saves import data_file, index_of, load, round_trip, save
from support.states import assert_same, bytes_tensor, native_values, object_values, sharing, tensors_in

from milepost import make_sync_checkpointer
from milepost.checkpoint_reader import CheckpointReader
from milepost.checkpoint_writer import CheckpointWriter, CheckpointWriterConfig
from milepost.errors import (
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    IncompleteCheckpointError,
    MismatchError,
)
from milepost.types import RankInfo

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning")


def state():
    return {
        "a": torch.arange(100_000.0),
        "b": [torch.ones(3), {"c": torch.arange(4).view(2, 2).t()}],
        "n": np.arange(5),
        "raw": np.array(["x", "yz"]),
        "step": 3,
    }


def flip(path, offset):
    data = bytearray(Path(path).read_bytes())
    data[offset] ^= 1
    Path(path).write_bytes(data)


# -- without a template ----------------------------------------------------------------------------


@pytest.mark.parametrize("verify", [True, False, "first"])
def test_loaded_tensors_are_private(tmp_path, verify):
    """Writing to what was loaded changes neither the file nor what is loaded next."""
    path = save(tmp_path / "c", state())
    before = Path(data_file(path)).read_bytes()
    loaded = load(path, verify=verify)
    for tensor in tensors_in(loaded):
        tensor[...] = "zz" if tensor.dtype == np.dtype("U2") else 99
    assert Path(data_file(path)).read_bytes() == before
    assert_same(state(), load(path))


def test_loaded_tensors_outlive_their_checkpoint(tmp_path):
    """What was loaded stays as it is when the checkpoint is replaced, removed or overwritten."""
    path = save(tmp_path / "c", state())
    loaded = load(path)
    save(path, {"a": torch.zeros(100_000)})
    assert_same(state(), loaded)
    loaded = load(path)
    shutil.rmtree(path)
    assert loaded["a"].eq(0).all()


def test_a_save_may_replace_the_checkpoint_that_is_loaded(tmp_path):
    """Tensors that were loaded without a copy can be changed and saved over their own file."""
    path = save(tmp_path / "c", {"a": torch.arange(50_000.0), "b": torch.ones(3)})
    for step in range(3):
        loaded = load(path)
        loaded["a"] += 1
        save(path, loaded)
        assert_same({"a": torch.arange(50_000.0) + step + 1, "b": torch.ones(3)}, load(path))


def test_no_descriptor_stays_open(tmp_path):
    """Loading in every way, failing ones included, leaves no descriptor open."""
    path = save(tmp_path / "c", state())
    count = len(os.listdir("/proc/self/fd"))
    loaded = [load(path), load(path, verify=False), load(path, state())]
    with pytest.raises(MismatchError):
        load(path, {"a": torch.ones(1)})
    with pytest.raises(CheckpointNotFoundError):
        load(tmp_path / "nothing")
    damaged = shutil.copytree(path, tmp_path / "damaged")
    flip(data_file(damaged), index_of(path).records.offset[0])
    for template in (None, state()):
        with pytest.raises(CorruptCheckpointError):
            load(damaged, template)
    assert len(os.listdir("/proc/self/fd")) == count
    assert_same(state(), loaded[0])


def test_one_rank_loads_what_it_saved_from_memory_storage(tmp_path):
    """A storage that cannot map files loads the same values, with and without a template."""
    from milepost.checkpoint_writer import CheckpointWriter
    from milepost.config import CheckpointWriterConfig

    storage = MemoryStorage()
    storage.make_folder("/run")
    writer = CheckpointWriter(CheckpointWriterConfig(), RankInfo(0, 1), storage=storage)
    everything = {**state(), **native_values(), "objects": object_values()}
    writer.write("/run/c", everything)
    writer.close()
    reader = CheckpointReader(RankInfo(0, 1), storage=storage)
    for verify in (True, False, "first"):
        loaded, missing = reader.read("/run/c", verify=verify)
        assert missing == []
        assert_same(everything, loaded)
    assert_same(everything, reader.read("/run/c", loaded)[0])
    assert not (tmp_path / "run").exists()


# -- map_location ----------------------------------------------------------------------------------


def everywhere(storage, location):
    return storage if location == "cpu" else None


@pytest.mark.parametrize(
    "map_location",
    [None, "cpu", torch.device("cpu"), {"cpu": "cpu"}, {"cuda:0": "cpu"}, {}, everywhere, lambda *_: None],
    ids=["none", "name", "device", "dict", "other dict", "empty dict", "function", "function of none"],
)
def test_map_location_takes_what_torch_load_takes(tmp_path, map_location):
    """None, a name, a device, a dict and a function are taken, by the reader and the checkpointer."""
    path = save(tmp_path / "c", state())
    assert_same(state(), load(path, map_location=map_location))
    with make_sync_checkpointer() as checkpointer:
        assert_same(state(), checkpointer.load(path, default_map_location=map_location))
        template = checkpointer.load(path, {"a": None, "step": 0}, default_map_location=map_location)
    assert_same({"a": state()["a"], "step": 3}, template)


def test_map_location_moves_new_tensors(tmp_path):
    """Tensors go to the device that is asked for; aliases stay aliases; filled tensors stay in place."""
    base = torch.arange(10.0)
    path = save(tmp_path / "c", {"a": base, "v": base[2:5], "p": torch.nn.Parameter(torch.ones(2))})
    for where in ("meta", torch.device("meta"), {"cpu": "meta"}):
        loaded = load(path, map_location=where)
        assert {tensor.device.type for tensor in loaded.values()} == {"meta"}
        assert loaded["v"].stride() == (1,)
        assert loaded["v"].shape == (3,)
        assert loaded["p"].requires_grad
    template = load(path, {"a": torch.zeros(10), "v": None}, map_location="meta")
    assert torch.equal(template["a"], base)
    assert template["v"].device.type == "meta"


def test_arrays_stay_on_the_cpu_wherever_tensors_go(tmp_path):
    """A numpy array has no device, nor has a tensor that shares its memory one other than the array's."""
    array = np.arange(4.0)
    state = {"array": array, "tensor": torch.ones(2), "shared": torch.from_numpy(array)}
    with make_sync_checkpointer() as checkpointer:
        checkpointer.save(str(tmp_path / "c"), state)
    loaded = load(tmp_path / "c", map_location="meta")
    assert np.array_equal(loaded["array"], array)
    assert loaded["tensor"].is_meta
    loaded["shared"][0] = 7
    assert loaded["array"][0] == 7


def test_a_map_location_function_sees_each_memory_once(tmp_path):
    """A function is called with each storage, on the CPU, and the location that was saved."""
    base = torch.arange(10.0)
    path = save(tmp_path / "c", {"a": base, "v": base[2:5], "b": torch.ones(2, dtype=torch.float64)})
    calls = []

    def note(storage, location):
        calls.append((storage.nbytes(), location))
        return storage

    loaded = load(path, map_location=note)
    assert sorted(calls) == [(16, "cpu"), (40, "cpu")]
    assert sharing(loaded) == [(0, 1, 8)]


@pytest.mark.parametrize("wrong", [5, lambda *_: "cpu"], ids=["number", "function"])
def test_a_wrong_map_location_is_refused(tmp_path, wrong):
    """A map_location of a wrong type, or a function that returns one, is a ConfigError."""
    path = save(tmp_path / "c", state())
    with pytest.raises(ConfigError, match="map_location"):
        load(path, map_location=wrong)


def test_a_device_that_is_not_here_names_the_way_out(tmp_path):
    """Tensors of a device that this machine lacks are an error that suggests map_location."""
    path = save(tmp_path / "c", {"a": torch.ones(2)})
    with pytest.raises(ConfigError, match="map_location"):
        load(path, map_location="cuda:7")
    assert load(path, map_location=lambda storage, _: storage)["a"].tolist() == [1, 1]


# -- verification ----------------------------------------------------------------------------------


@pytest.mark.parametrize("verify", [True, "first"])
def test_damage_is_found_and_named(tmp_path, verify):
    """A flipped byte is an error naming file, key, offset and both checksums; "first" touches nothing."""
    path = save(tmp_path / "c", state())
    records = index_of(path).records
    flip(data_file(path), records.offset[0] + 262_144 + 5)
    with pytest.raises(CorruptCheckpointError) as caught:
        load(path, verify=verify)
    text = str(caught.value)
    assert data_file(path) in text
    assert f"a at byte {records.offset[0] + 262_144}" in text
    assert f"{records.crcs[1]:08x} expected" in text
    assert not caught.value.targets_modified
    template = {**state(), "a": torch.zeros(100_000)}
    with pytest.raises(CorruptCheckpointError, match="a at byte") as caught:
        load(path, template, verify=verify)
    assert caught.value.targets_modified is (verify is True)
    if verify == "first":
        assert not template["a"].any()
    assert isinstance(caught.value, RuntimeError)


def test_every_damaged_key_of_a_shared_record_is_named(tmp_path):
    """Damage in memory that several keys share names them all."""
    base = torch.arange(10.0)
    path = save(tmp_path / "c", {"model": {"w": base}, "tied": [base[1:]]})
    flip(data_file(path), index_of(path).records.offset[0] + 8)
    with pytest.raises(CorruptCheckpointError, match=r"model\.w = tied\[0\] at byte"):
        load(path)


def test_damage_outside_the_template_is_not_looked_at(tmp_path):
    """Only what a template asks for is read: damage elsewhere does not stop the load."""
    path = save(tmp_path / "c", {"good": torch.ones(1000), "bad": torch.ones(1000)})
    flip(data_file(path), index_of(path).records.offset[1])
    assert load(path, {"good": torch.zeros(1000)})["good"].eq(1).all()
    with pytest.raises(CorruptCheckpointError, match="bad"):
        load(path, {"bad": torch.zeros(1000)})


def test_an_object_that_cannot_be_read_is_named(tmp_path):
    """A type that was allowed when it was saved, and is not now: the error has its key; the rest loads."""
    with torch.serialization.safe_globals([PurePosixPath]):
        path = save(tmp_path / "c", {"w": torch.ones(2), "cfg": [1, PurePosixPath("/a")]})
    with pytest.raises(CorruptCheckpointError, match="PurePosixPath") as caught:
        load(path)
    assert caught.value.key == "cfg[1]"
    assert load(path, {"w": torch.zeros(2)})["w"].tolist() == [1, 1]


def test_damaged_objects_are_found(tmp_path):
    """A flipped byte in an object, a raw array or long bytes is found, with and without a template."""
    values = {"object": torch.eye(3).to_sparse(), "array": np.array(["abc"]), "bytes": b"x" * 100_000}
    path = save(tmp_path / "c", values)
    index = index_of(path)
    for node in index.tree[1]:
        flip(data_file(path), index.records.offset[node[1][1]] + 3)
        for template in (None, {node[0][1]: values[node[0][1]]}):
            with pytest.raises(CorruptCheckpointError, match=f"damaged: {node[0][1]} at byte"):
                load(path, template)
        flip(data_file(path), index.records.offset[node[1][1]] + 3)
    assert_same(values, load(path))


def test_verify_false_reads_what_is_there(tmp_path):
    """verify=False is a choice: a flipped byte arrives, with and without a template."""
    path = save(tmp_path / "c", {"a": torch.zeros(8, dtype=torch.uint8)})
    flip(data_file(path), index_of(path).records.offset[0] + 2)
    for template in (None, {"a": torch.zeros(8, dtype=torch.uint8)}):
        assert load(path, template, verify=False)["a"].tolist() == [0, 0, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("verify", [None, 2, "last"])
def test_a_wrong_verify_is_refused(tmp_path, verify):
    """Anything but True, False and "first" for verify is a ConfigError."""
    path = save(tmp_path / "c", state())
    with pytest.raises(ConfigError, match="verify"):
        load(path, verify=verify)


def test_arguments_of_torch_load_are_accepted(tmp_path, caplog):
    """weights_only and mmap are accepted and change nothing; other unknown arguments are a warning."""
    path = save(tmp_path / "c", state())
    assert_same(state(), load(path, weights_only=True, mmap=True))
    assert not caplog.records
    assert_same(state(), load(path, speed=11))
    assert [(r.levelno, "speed" in r.getMessage()) for r in caplog.records] == [(logging.WARNING, True)]


# -- plain files -----------------------------------------------------------------------------------


@pytest.fixture(params=["zip", "legacy"])
def plain(request, tmp_path):
    """A folder with a file of plain torch.save in either of its formats."""
    folder = tmp_path / "plain"
    folder.mkdir()
    torch.save(
        plain_state(), folder / "checkpoint_0.pt", _use_new_zipfile_serialization=request.param == "zip"
    )
    return str(folder)


def plain_state():
    base = torch.arange(12.0)
    return {
        "model": {"w": base.view(3, 4), "t": base.view(3, 4).t(), "p": torch.nn.Parameter(torch.ones(2))},
        "list": [1, (2.5, torch.zeros(0))],
        "sparse": torch.eye(2).to_sparse(),
        "step": 7,
    }


def test_plain_torch_files_load(plain):
    """A checkpoint_<rank>.pt of plain torch.save, new or legacy, loads whole."""
    for options in ({}, {"verify": False}, {"verify": "first"}, {"map_location": "cpu"}):
        assert_same(plain_state(), load(plain, **options))


def test_plain_torch_files_load_into_templates(plain, caplog):
    """A plain file fills a template by the same rules as a checkpoint."""
    template = plain_state()
    for tensor in (template["model"]["w"], template["model"]["p"].data):
        tensor.zero_()
    kept = template["model"]["w"]
    template["step"], template["new"] = 0, {"x": 1}
    del template["list"]
    loaded, missing = CheckpointReader(RankInfo(0, 1)).read(plain, template)
    assert missing == ["new"]
    assert loaded["model"]["w"] is kept
    assert_same({**plain_state()["model"]}, loaded["model"])
    assert loaded["step"] == 7
    assert "list" not in loaded
    assert len(caplog.records) == 1
    with pytest.raises(MismatchError, match=r"model\.w"):
        load(plain, {"model": {"w": torch.zeros(4)}})
    with pytest.raises(RuntimeError, match="missing keys"), make_sync_checkpointer() as checkpointer:
        checkpointer.load(plain, {"nothing": 1}, strict=True)


@pytest.mark.parametrize("where", ["meta", torch.device("meta"), {"cpu": "meta"}], ids=repr)
@pytest.mark.parametrize("legacy", [False, True])
def test_plain_files_map_to_devices(tmp_path, where, legacy):
    """map_location works for plain files as in torch.load."""
    dense = {key: value for key, value in plain_state().items() if key != "sparse"}
    torch.save(dense, tmp_path / "checkpoint_0.pt", _use_new_zipfile_serialization=not legacy)
    loaded = load(tmp_path, map_location=where)
    assert {tensor.device.type for tensor in tensors_in(loaded)} == {"meta"}
    assert loaded["model"]["t"].stride() == (1, 4)
    assert loaded["step"] == 7


def test_what_torch_cannot_map_is_refused_with_a_way_out(plain):
    """A plain file that this torch loads, but not to that device, is a ConfigError: it is not damaged."""
    try:  # sparse tensors on meta devices: versions of torch differ
        torch.load(f"{plain}/checkpoint_0.pt", map_location="meta")
    except (NotImplementedError, RuntimeError):
        with pytest.raises(ConfigError, match=rf"torch {torch.__version__[:3]}.*'meta'.*\n?.*\"cpu\""):
            load(plain, map_location="meta")
    else:
        assert load(plain, map_location="meta")["sparse"].device.type == "meta"

    def refuses(storage, location):
        raise LookupError("no such place")

    with pytest.raises(ConfigError, match="no such place"):
        load(plain, map_location=refuses)
    with pytest.raises(ConfigError, match="nowhere"):
        load(plain, map_location="nowhere")


def test_sparse_tensors_load_in_a_forked_process(tmp_path):
    """A forked process saves and loads sparse tensors: it waits for no thread that it lacks."""
    sparse = {"coo": torch.eye(3).to_sparse(), "csr": torch.eye(3).to_sparse_csr()}
    torch.ones(1 << 22).sum()  # starts these threads
    assert in_child(lambda: round_trip(tmp_path, sparse), 60) == 0


def test_sparse_tensors_load_to_meta_devices(tmp_path):
    """A sparse tensor of a checkpoint has no indices to validate on a meta device, and loads there."""
    loaded = round_trip(tmp_path, {"coo": torch.eye(3).to_sparse()}, map_location="meta")
    assert (loaded["coo"].device.type, loaded["coo"].shape) == ("meta", (3, 3))


def test_a_plain_file_that_holds_no_dict(tmp_path):
    """A plain file of a bare tensor loads as it is; into a template it is a misfit."""
    torch.save(torch.ones(2), tmp_path / "checkpoint_0.pt")
    assert load(tmp_path).tolist() == [1, 1]
    with pytest.raises(MismatchError, match="not a dict"):
        load(tmp_path, {"a": 1})


class Anything:
    pass


def test_code_in_a_plain_file_does_not_run(tmp_path):
    """A plain file with a class that torch does not allow is refused, with the way to allow it."""
    torch.save({"a": Anything()}, tmp_path / "checkpoint_0.pt")
    with pytest.raises(CorruptCheckpointError, match="add_safe_globals"):
        load(tmp_path)
    with torch.serialization.safe_globals([Anything]):
        assert type(load(tmp_path)["a"]) is Anything


@pytest.mark.parametrize("content", [b"", b"PK\3\4", b"\x80\x02}q\x00.", bytes(range(200))], ids=len)
def test_a_file_that_torch_cannot_read_is_damage(tmp_path, content):
    """A checkpoint_0.pt that is no torch file is a CorruptCheckpointError that names it."""
    (tmp_path / "checkpoint_0.pt").write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match=r"checkpoint_0\.pt"):
        load(tmp_path)


# -- what is not there -----------------------------------------------------------------------------


def test_a_missing_checkpoint_names_the_nearest(tmp_path):
    """A path without checkpoint is a FileNotFoundError that suggests existing names."""
    for name in ("step-100", "step-200", "other"):
        save(tmp_path / name, {"a": 1})
    with pytest.raises(FileNotFoundError) as caught:
        load(tmp_path / "step-20")
    assert isinstance(caught.value, CheckpointNotFoundError)
    text = str(caught.value)
    assert str(tmp_path / "step-20") in text
    assert text.index("step-200") < text.index("other")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load(tmp_path / "no" / "such" / "folder")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointNotFoundError):
        load(tmp_path / "empty")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointNotFoundError, match="file"):
        load(tmp_path / "file")


@pytest.mark.parametrize("kept", [["checkpoint_0.pt"], ["index_0.json"], ["checkpoint_0.pt", "index_0.json"]])
def test_a_folder_without_manifest_is_incomplete(tmp_path, kept):
    """Our files without a manifest are a save that never committed, never read as plain files."""
    path = save(tmp_path / "c", state())
    for name in os.listdir(path):
        if name not in kept:
            os.remove(f"{path}/{name}")
    for template in (None, state()):
        with pytest.raises(IncompleteCheckpointError) as caught:
            load(path, template)
    assert isinstance(caught.value, RuntimeError)


@pytest.mark.parametrize("gone", ["checkpoint_0.pt", "index_0.json"])
def test_a_missing_file_is_damage(tmp_path, gone):
    """A file that the manifest lists and that is not there is a CorruptCheckpointError naming it."""
    path = save(tmp_path / "c", state())
    os.remove(f"{path}/{gone}")
    with pytest.raises(CorruptCheckpointError, match=gone):
        load(path)


@pytest.mark.parametrize("name", ["manifest.json", "index_0.json", "checkpoint_0.pt"])
def test_a_shortened_file_is_damage(tmp_path, name):
    """A file that lost its last byte is a CorruptCheckpointError, with and without verification."""
    path = save(tmp_path / "c", state())
    os.truncate(f"{path}/{name}", os.path.getsize(f"{path}/{name}") - 1)
    for verify in (True, False):
        with pytest.raises(CorruptCheckpointError):
            load(path, verify=verify)


def test_another_rank_than_those_that_saved(tmp_path, caplog):
    """A rank beyond those that saved takes what is each rank's own from rank r % N, with a warning."""
    path = save(tmp_path / "c", {"a": 1})
    assert CheckpointReader(RankInfo(1, 2)).read(path) == ({"a": 1}, [])
    assert "rank 1 loads per-rank values from rank 0" in caplog.text
    caplog.clear()
    assert CheckpointReader(RankInfo(0, 2)).read(path) == ({"a": 1}, [])
    assert not caplog.text
    torch.save({"a": 1}, tmp_path / "checkpoint_0.pt")
    with pytest.raises(FileNotFoundError, match=r"checkpoint_3\.pt"):
        CheckpointReader(RankInfo(3, 4)).read(str(tmp_path))


def test_errors_know_path_rank_and_phase(tmp_path):
    """Errors of a load carry the path, the rank and the phase as attributes."""
    with pytest.raises(CheckpointNotFoundError) as caught:
        CheckpointReader(RankInfo(0, 1)).read(str(tmp_path / "c"))
    assert (caught.value.path, caught.value.rank, caught.value.phase) == (str(tmp_path / "c"), 0, "load")


def test_paths_may_be_path_objects_links_and_relative(tmp_path, monkeypatch):
    """A pathlib path, a relative path, one with a trailing slash and a link to a checkpoint all load."""
    path = save(tmp_path / "c", state())
    os.symlink(path, tmp_path / "link")
    monkeypatch.chdir(tmp_path)
    for way in (Path(path), "c", "./c/", "link", tmp_path / "link"):
        assert_same(state(), CheckpointReader(RankInfo(0, 1)).read(way)[0])


def test_readers_hold_nothing_between_reads(tmp_path):
    """One reader reads many checkpoints, and one that changes, from several threads at once."""
    from concurrent.futures import ThreadPoolExecutor

    paths = [save(tmp_path / str(n), {"a": bytes_tensor(torch.uint8, (200_000,), n)}) for n in range(4)]
    reader = CheckpointReader(RankInfo(0, 1))
    with ThreadPoolExecutor(4) as pool:
        loaded = [*pool.map(lambda path: reader.read(path)[0], paths * 5)]
    for number, one in enumerate(loaded):
        assert_same({"a": bytes_tensor(torch.uint8, (200_000,), number % 4)}, one)


def test_more_ranks_than_files_that_may_be_open(tmp_path):
    """One process loads what more ranks saved than it may have files open."""
    path, ranks = str(tmp_path / "c"), 60
    state = {"m": {str(n): torch.full((100,), float(n)) for n in range(ranks)}}
    for rank in range(ranks):
        config = CheckpointWriterConfig(start_id="start", replicated=["m.*"])
        writer = CheckpointWriter(config, RankInfo(rank, ranks))
        writer.write(path, state)
        writer.close()

    def load_with_few():
        most = descriptors() + ranks // 2
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        for verify in (True, "first"):
            template = {"m": {key: torch.zeros(100) for key in state["m"]}}
            assert_same(CheckpointReader(RankInfo(0, 1)).read(path, template, verify=verify)[0], state)
        assert_same(CheckpointReader(RankInfo(0, 1)).read(path)[0], state)

    assert in_child(load_with_few) == 0
