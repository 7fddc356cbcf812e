"""Ranks in processes of their own that load as one job: all load, or none does."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.ranks import WORLD

from milepost import RankInfo
from milepost.checkpoint_reader import CheckpointReader
from milepost.checkpoint_writer import CheckpointWriter, CheckpointWriterConfig
from milepost.errors import (
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    MismatchError,
    PeerLoadError,
)
from milepost.ranks import load_meeting
from milepost.ranks.load_meeting import Meeting, Report, Verdict, refuse
from milepost.ranks.start import Start

WAYS = ["group", "store"]

# -- jobs --------------------------------------------------------------------------------------------


@pytest.fixture
def start(launcher, tmp_path):
    """Starts a job of ranks that load."""

    def run(way, *calls):
        """What became of a load: for each rank `Loaded` of its calls (one for all, or one for each)."""
        return launcher.run(tmp_path, work, way, calls * WORLD if len(calls) == 1 else calls)

    return run


class Loaded:
    """What became of one rank's load.

    Attributes:
        error: What it raised.
        missing: What it returned as missing.
        text: What it said in the log.
        values: The first number of each tensor in the template, by path.
    """


def work(way, calls):
    """Load as a rank: with the default process group, with a store only, or with neither.

    Of several calls, one after the other, the last counts. None is a load in which this rank takes no part:
    it waits until the others have done with it.
    """
    import io
    import logging

    log = io.StringIO()
    logging.getLogger("milepost").addHandler(logging.StreamHandler(log))
    del os.environ["MILEPOST_START_ID"]
    rank, store = int(os.environ["RANK"]), None
    if way == "group":
        dist.init_process_group("gloo")
        meeting = dist.distributed_c10d._get_default_store()
    else:
        meeting = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=False)
        store = meeting if way == "store" else None
    meeting.set(f"here/{rank}", b"")
    meeting.wait([f"here/{other}" for other in range(WORLD)])
    result = Loaded()
    result.error, result.missing, result.values, result.text = None, None, {}, ""
    calls = calls[rank] if isinstance(calls[rank], list) else [calls[rank]]
    for number, now in enumerate(calls):
        if now is None:
            if len(calls) > 1:
                meeting.wait([f"did/{number}/{other}" for other in range(WORLD) if other != rank])
            continue
        path, template, options = now
        template = None if template is None else template_of(way, rank, template)
        seconds, world = options.pop("timeout_seconds", 60), options.pop("world", WORLD)
        ready = options.pop("ready", [])  # ranks that a slow machine must not make late
        load_meeting.GRACE_SECONDS = 1 if ready else 5
        at = store if world == WORLD else dist.PrefixStore("some", meeting)
        reader = CheckpointReader(RankInfo(rank, world), store=at, timeout_seconds=seconds)
        result.error = None
        meeting.set(f"ready/{number}/{rank}", b"")
        meeting.wait([f"ready/{number}/{other}" for other in ready])
        try:
            loaded, result.missing = reader.read(path, template, **options)
        except Exception as error:
            result.error = error
            loaded = template
        result.values = firsts(loaded) if isinstance(loaded, dict) else {}
        result.text = log.getvalue()
        meeting.set(f"did/{number}/{rank}", b"")
    return result


def firsts(state):
    found = {}
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            found[key] = float(getattr(value, "_local_tensor", value).flatten()[0])
    return found


def template_of(way, rank, keys):
    """A template of these keys, full of -1: shards of "w" where there is a group, else all of it."""
    state = {}
    for key in keys.split():
        name, _, size = key.partition(":")
        if name != "w":
            state[name] = torch.full((int(size or 4),), -1.0)
        elif way == "group":
            from torch.distributed.device_mesh import DeviceMesh
            from torch.distributed.tensor import DTensor, Shard

            local = torch.full(((3, 3, 1)[rank], 1000), -1.0)
            state[name] = DTensor.from_local(
                local, DeviceMesh("cpu", range(WORLD)), [Shard(0)], shape=(7, 1000), stride=(1000, 1)
            )
        else:
            state[name] = torch.full((7, 1000), -1.0)
    return state


# -- what is loaded ------------------------------------------------------------------------------------


def saved(path, base=10, start_id=None):
    """A checkpoint of three ranks: "w" is divided between them, "own" is each one's, "only<r>" rank r's."""
    config = CheckpointWriterConfig(replicated=["w", "b"], start_id=start_id or os.path.basename(path))
    for rank in range(WORLD):
        writer = CheckpointWriter(config, RankInfo(rank, WORLD))
        state = {
            "w": torch.full((7, 1000), float(base)),
            "b": torch.full((4,), float(base + 1)),
            "own": torch.full((4,), float(base + 2 + rank)),
            f"only{rank}": torch.full((4,), 1.0),
        }
        writer.write(path, state, step=base)
        writer.close()
    return path


@pytest.fixture
def path(tmp_path):
    return saved(str(tmp_path / "c"))


ALL = "w b own"


def untouched(results):
    """Whether no template was changed."""
    return all(set(result.values.values()) <= {-1.0} for result in results)


def kinds(results):
    return [type(result.error) for result in results]


@pytest.mark.parametrize("way", WAYS)
def test_ranks_that_agree_load(start, path, way):
    """With a process group or a store only, ranks load their own values, and parts of what others hold."""
    for rank, result in enumerate(start(way, (path, ALL, {"strict": True}))):
        assert result.error is None
        assert result.values == {"w": 10.0, "b": 11.0, "own": 12.0 + rank}
        assert result.missing == []


@pytest.mark.parametrize("way", WAYS)
def test_reports_are_the_same_on_every_rank(start, path, way):
    """Missing keys of any rank are missing on all, and unexpected is what no rank's template has."""
    results = start(way, (path, "w own x", {}), (path, "w own y", {}), (path, "w own", {}))
    for result in results:
        assert result.error is None
        assert result.missing == ["x", "y"]
        assert "missing keys in the checkpoint (2): x; y" in result.text
        assert "unexpected keys in the checkpoint (1): b" in result.text


def test_a_key_is_unexpected_below_what_others_lack():
    """A key that no template has is unexpected whether ranks lack just it or also what is above it."""
    lists = [["a", "b.c", "d"], ["a.x", "b", "e[0]"], ["a.x", "a.y[3]", "b.c", "a.z"], ["a", "b"]]
    verdict = Verdict.of([Report("", unexpected=keys) for keys in lists])
    assert verdict.unexpected == ["b.c", "a.x"]


def test_a_rank_that_is_late_in_the_middle_of_a_load_does_not_slip_into_the_next():
    """A rank whose reading takes too long hears that, though the others are at their next load by then."""
    store, report, results = dist.HashStore(), Report("a"), []
    starts = [Start(store, rank, 2) for rank in range(2)]

    def load(rank, work, seconds=60):
        meeting = Meeting(starts[rank], seconds)
        refuse(meeting.hold(Report("a")), modified=False)
        meeting.agree(report, work, modifies=True)

    def rank_0():
        with pytest.raises(
            PeerLoadError, match="rank 1 could not load: it did not call load within 1 seconds"
        ):
            load(0, lambda: None, 1)
        load(0, lambda: None)
        results.append("loaded")

    thread = threading.Thread(target=rank_0)
    thread.start()
    with pytest.raises(PeerLoadError, match="rank 1 could not load: it did not call load within 1 seconds"):
        load(1, lambda: store.wait([f"milepost/{starts[0].id}/load/2/0/0"]))  # rank 0 is at its next load
    load(1, lambda: None)
    thread.join()
    assert results == ["loaded"]


@pytest.mark.parametrize("way", WAYS)
def test_misfits_are_told_on_every_rank(start, path, way):
    """A tensor that does not fit one rank's template is refused on all ranks, with that rank, untouched."""
    results = start(way, (path, ALL, {}), (path, "w b own:5", {}), (path, ALL, {}))
    assert kinds(results) == [MismatchError] * WORLD
    for result in results:
        assert "own" in str(result.error)
        assert "(on rank 1)" in str(result.error)
        assert not result.error.targets_modified
    assert untouched(results)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_missing_on_one_rank_is_refused_on_all_if_strict(start, path, way):
    """A key of one rank's template that was not saved makes a strict load fail on all ranks, untouched."""
    options = {"strict": True}
    results = start(way, (path, ALL, options), (path, ALL, options), (path, f"{ALL} x", options))
    assert kinds(results) == [MismatchError] * WORLD
    assert all("missing keys (1): x" in str(result.error) for result in results)
    assert untouched(results)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("odd", [0, 1, 2])
def test_no_such_path_on_one_rank_stops_all(start, path, way, odd):
    """A rank that finds no checkpoint raises that, the others name it, and no template is changed."""
    results = start(way, *((f"{path}-not" if rank == odd else path, ALL, {}) for rank in range(WORLD)))
    assert kinds(results) == [
        CheckpointNotFoundError if rank == odd else PeerLoadError for rank in range(WORLD)
    ]
    for rank, result in enumerate(results):
        if rank != odd:
            assert f"rank {odd} could not load: CheckpointNotFoundError" in str(result.error)
            assert result.error.rank == odd
        assert not result.error.targets_modified
    assert untouched(results)


@pytest.mark.parametrize("way", WAYS)
def test_ranks_that_load_different_paths_are_told(start, path, tmp_path, way):
    """Ranks that load different checkpoints load none: each is told who loads what."""
    other = saved(str(tmp_path / "d"), 20)
    options = {}
    results = start(way, (path, ALL, options), (path, ALL, options), (other, ALL, options))
    for result in results:
        assert isinstance(result.error, PeerLoadError), result.error
        assert f"it loads {other}, but rank 0" in str(result.error)
    assert other in str(results[0].error)
    assert untouched(results)


def test_ranks_that_load_two_steps_of_one_start_are_told(start, tmp_path):
    """Attempts are numbered for each path: the ids of two checkpoints of one start can be the same."""
    one, two = (saved(str(tmp_path / name), start_id="same") for name in ("step-1", "step-2"))
    results = start("store", (one, ALL, {}), (two, ALL, {}), (one, ALL, {}))
    for result in results:
        assert isinstance(result.error, PeerLoadError), result.error
        assert f"it loads {two}, but rank 0" in str(result.error)
    assert untouched(results)


def test_ranks_that_load_plain_files_of_two_folders_are_told(start, tmp_path):
    """Plain files say nothing of where they belong: their folder tells."""
    folders = [tmp_path / name for name in ("step-1", "step-2")]
    for folder in folders:
        folder.mkdir()
        for rank in range(WORLD):
            torch.save({"own": torch.zeros(4)}, folder / f"checkpoint_{rank}.pt")
    one, two = map(str, folders)
    results = start("store", (one, "own", {}), (two, "own", {}), (one, "own", {}))
    for result in results:
        assert isinstance(result.error, PeerLoadError), result.error
        assert f"it loads {two}, but rank 0" in str(result.error)
    assert untouched(results)
    assert kinds(start("store", (one, "own", {}))) == [type(None)] * WORLD


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("verify", [True, "first"])
def test_damage_on_one_rank_is_told_to_all(start, path, way, verify):
    """Damage in what one rank alone reads raises on all, and says whether targets were written to."""
    damage(path, 1)
    results = start(way, (path, "own", {"verify": verify}))
    assert kinds(results) == [PeerLoadError, CorruptCheckpointError, PeerLoadError]
    assert "damaged: own" in str(results[1].error)
    assert results[1].error.targets_modified is (results[1].values != {"own": -1.0}) is (verify is True)
    for rank in (0, 2):
        assert "rank 1 could not load: CorruptCheckpointError" in str(results[rank].error)
        # If all is verified first, no rank begins to write before all have done so.
        assert results[rank].error.targets_modified is (verify is True)
        assert results[rank].values == {"own": 12.0 + rank if verify is True else -1.0}


def damage(path, rank):
    """Change a bit of a rank's own tensor."""
    file = Path(f"{path}/checkpoint_{rank}.pt")
    data = bytearray(file.read_bytes())
    value = torch.full((4,), 12.0 + rank).numpy().tobytes()
    at = data.index(value)
    data[at] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("absent", [0, 2])
def test_a_rank_that_never_comes_is_named(start, path, way, absent):
    """Ranks wait for another no longer than their timeout, and each names the one that did not come."""
    others = [rank for rank in range(WORLD) if rank != absent]
    call = (path, ALL, {"timeout_seconds": 3, "ready": others})
    results = start(way, *(call if rank in others else None for rank in range(WORLD)))
    assert results[absent].error is None
    for rank in range(WORLD):
        if rank != absent:
            assert isinstance(results[rank].error, PeerLoadError), results[rank].error
            assert f"rank {absent} could not load: it did not call load within 3" in str(results[rank].error)
            assert results[rank].error.rank == absent
    assert untouched(results)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("late", [0, 1])
def test_a_rank_that_missed_a_load_takes_part_in_the_next(start, path, way, late):
    """Ranks that waited in vain, and the one that did not come, load together the next time."""
    call = (path, ALL, {})
    others = [rank for rank in range(WORLD) if rank != late]
    calls = [[(path, ALL, {"timeout_seconds": 2, "ready": others}), call] for _ in range(WORLD)]
    calls[late] = [None, call]
    for rank, result in enumerate(start(way, *calls)):
        assert result.error is None, result.error
        assert result.values == {"w": 10.0, "b": 11.0, "own": 12.0 + rank}


def test_some_ranks_may_load_together_before_all_do(start, path):
    """Ranks that load as a smaller world at a store of theirs are in step with the others afterwards."""
    some = (path, "own", {"world": 2})
    calls = [[some, (path, ALL, {})], [some, (path, ALL, {})], [(path, ALL, {})]]
    for rank, result in enumerate(start("store", *calls)):
        assert result.error is None, result.error
        assert result.values == {"w": 10.0, "b": 11.0, "own": 12.0 + rank}


@pytest.mark.parametrize("way", WAYS)
def test_an_argument_that_is_wrong_on_one_rank_stops_all(start, path, way):
    """What a rank refuses before it looks at any file is told to the others like anything else."""
    good, bad = (path, ALL, {}), (path, ALL, {"verify": "last"})
    results = start(way, good, bad, good)
    assert kinds(results) == [PeerLoadError, ConfigError, PeerLoadError]
    assert "rank 1 could not load: ConfigError: verify must be" in str(results[0].error)
    assert untouched(results)


@pytest.mark.parametrize("way", WAYS)
def test_verified_first_on_one_rank_is_so_on_all(start, path, way):
    """If one rank has all verified before anything is written, no rank writes until then."""
    damage(path, 1)
    calls = (path, None, {}), (path, "own", {}), (path, "own", {"verify": "first"})
    results = start(way, *calls)
    assert kinds(results) == [PeerLoadError, CorruptCheckpointError, PeerLoadError]
    assert not any(result.error.targets_modified for result in results)
    assert untouched(results)
    for result in start(way, (path, None, {}), (path, "b", {"verify": False}), calls[2]):
        assert result.error is None


@pytest.mark.parametrize("way", WAYS)
def test_strict_on_one_rank_is_strict_on_all(start, path, way):
    """If one rank refuses missing keys, all do."""
    options = [{}, {"strict": True}, {}]
    results = start(way, *((path, "w x", option) for option in options))
    assert kinds(results) == [MismatchError] * WORLD
    assert untouched(results)


@pytest.mark.parametrize("way", [*WAYS, "neither"])
def test_a_rank_may_load_alone(start, path, way):
    """With together=False, or with neither group nor store, each rank loads and raises for itself."""
    options = {} if way == "neither" else {"together": False}
    bad = (f"{path}-not", ALL, options)
    first, second, third = start(way, (path, ALL, options), bad, (path, f"{ALL} x", options))
    assert first.values == {"w": 10.0, "b": 11.0, "own": 12.0}
    assert first.missing == []
    assert type(second.error) is CheckpointNotFoundError
    assert third.missing == ["x"]
    assert third.values == {"w": 10.0, "b": 11.0, "own": 14.0, "x": -1.0}


@pytest.mark.parametrize("way", WAYS)
def test_what_may_be_missing_and_new_names(start, path, way):
    """What allow_missing and rename let pass on some ranks is missing on none, and unexpected on none."""
    options = {"strict": True, "allow_missing": ["x*"], "rename": {"own": "mine", "b": "bias"}}
    templates = ["w bias mine x1", "w bias mine", "w mine x2 x3"]
    results = start(way, *((path, template, options) for template in templates))
    for rank, result in enumerate(results):
        assert result.error is None, result.error
        assert result.missing == []
        assert result.values["mine"] == 12.0 + rank
        assert "unexpected" not in result.text
        assert "own -> mine" in result.text
