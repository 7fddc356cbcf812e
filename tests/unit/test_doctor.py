"""`milepost doctor`: what it says of whole, damaged and partial checkpoints, and what --repair does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from commit_steps import StepClock, arrive, save, tree
from typer.testing import CliRunner

import milepost
from milepost import commit
from milepost.checkpoint_writer import CheckpointWriter
from milepost.cli import app
from milepost.cli.doctor import advice, words
from milepost.commit.by_rename.discard import discard_emptied
from milepost.config import CheckpointWriterConfig
from milepost.errors import AbortedError, CheckpointNotFoundError, CommitError, StorageError
from milepost.format.index import digest
from milepost.format.manifest import decode_manifest, encode_manifest
from milepost.format.names import join_hidden
from milepost.health.diagnosis import diagnose
from milepost.health.repair import repair
from milepost.storage.local import LocalStorage
from milepost.types import RankInfo

STORAGE = LocalStorage()
BY_SIZE = "; its data were compared by size alone: --deep compares every byte"


@pytest.fixture
def run(tmp_path):
    """The path of an empty folder for checkpoints."""
    folder = tmp_path / "run"
    folder.mkdir()
    return str(folder)


def invoke(*arguments):
    return CliRunner().invoke(app, ["doctor", *(str(argument) for argument in arguments)])


def begin(path, rank, world_size, attempt="job-1", **kwargs):
    return commit.begin(STORAGE, path, attempt=attempt, rank=rank, world_size=world_size, **kwargs)


def die(*attempts):
    """What the end of their processes does to attempts, an hour ago."""
    for attempt in attempts:
        attempt._release()
        for name in os.listdir(attempt.folder):
            os.utime(f"{attempt.folder}/{name}", (time.time() - 3600,) * 2)


def partial(path, arrived, world_size, step=5, attempt="job-1"):
    """Ranks that have arrived, still alive."""
    return [
        arrive(STORAGE, path, step, attempt=attempt, rank=rank, world_size=world_size) for rank in arrived
    ]


def only(path, **kwargs):
    """The only finding at a path."""
    (finding,) = diagnose(STORAGE, path, **kwargs).findings
    return finding


def save_real(path, step, value=1.0):
    """A checkpoint with tensors, as users save it."""
    with milepost.make_sync_checkpointer() as checkpointer:
        state = {"model": {"weight": torch.full((64, 8), value), "bias": torch.zeros(8)}}
        checkpointer.save(path, state, step=step)


# ---------------------------------------------------------------------------- what it says


def test_a_run_of_whole_checkpoints(run):
    """Each whole checkpoint is named with its step and ranks, then the newest by step; exit code 0."""
    die(*partial(f"{run}/step-9", (0, 1, 2, 3), 4, step=9))
    save(STORAGE, f"{run}/step-10", 10)
    save(STORAGE, f"{run}/step-8", 8)
    assert invoke(run, "--repair").exit_code == 0
    result = invoke(run)
    assert (result.exit_code, result.stderr) == (0, "")
    assert sorted(result.stdout.splitlines()) == [
        f"newest loadable is step 10 ({run}/step-10){BY_SIZE}",
        "step-10: whole by size: step 10, 1 rank",
        "step-8: whole by size: step 8, 1 rank",
        "step-9: whole by size: step 9, 4 ranks",
    ]


def test_without_steps_the_newest_is_so_by_time(run):
    """Where no step was recorded the later save is the newest; a step that was recorded comes first."""
    save(STORAGE, f"{run}/b", None)
    save(STORAGE, f"{run}/a", None)
    assert diagnose(STORAGE, run).newest.name == "a"
    assert "a: whole by size: 1 rank" in invoke(run).stdout
    assert invoke(run).stdout.splitlines()[-1] == f"newest loadable is {run}/a{BY_SIZE}"
    save(STORAGE, f"{run}/a", 1)
    save(STORAGE, f"{run}/b", None)
    assert diagnose(STORAGE, run).newest.name == "a"


def test_a_missing_rank_is_told_with_its_last_words(run):
    """Of a dead partial it says who arrived, what the missing rank did last and when, and who never began."""
    path = f"{run}/step-5"
    save(STORAGE, f"{run}/step-4", 4)
    clock = StepClock()
    arrived = partial(path, (0, 1), 4)
    late = begin(path, 3, 4, clock=clock.clock)
    late.progress("write", 1_258_291)
    die(*arrived, late)
    finding = only(path)
    assert (finding.state, finding.alive, finding.is_wrong) == ("incomplete", False, True)
    assert words(finding, clock.now + 200) == (
        "incomplete: rank 3 never arrived (last seen writing, 1.2 MiB, 3 minutes ago); "
        "rank 2 never began; arrived: 0, 1"
    )
    result = invoke(path)
    assert result.exit_code == 1
    first, todo, last = result.stdout.splitlines()
    assert first.startswith("step-5: incomplete: rank 3 never arrived (last seen writing, 1.2 MiB, ")
    assert f"--repair`, removes it; load step 4 ({run}/step-4) instead" in todo
    assert last == f"newest loadable is step 4 ({run}/step-4){BY_SIZE}"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(-5, "0 seconds"), (1, "1 second"), (60, "1 minute"), (7300, "2 hours"), (1e6, "11 days")],
)
def test_ages_are_told_in_words(run, seconds, said):
    """The age of a last word is given in the largest unit that fits, and is never negative."""
    clock = StepClock()
    attempt = begin(f"{run}/step-5", 0, 2, clock=clock.clock)
    die(attempt)
    assert f"(last seen beginning, {said} ago)" in words(only(f"{run}/step-5"), clock.now + seconds)


def test_an_abort_is_told_with_its_error(run):
    """A rank that failed is named with phase and error, also while others still live: exit code 1."""
    path = f"{run}/step-5"
    (alive,) = partial(path, (0,), 3)
    failing = begin(path, 2, 3)
    failing.progress("write", 10)
    failing.abort(StorageError("no space left", phase="write"))
    die(failing)
    finding = only(path)
    assert (finding.alive, finding.aborted, finding.ranks[2].state) == (True, True, "failed")
    assert words(finding, 0) == (
        "incomplete: rank 2 failed in write with StorageError: no space left; rank 1 never began; "
        "arrived: 0; other ranks have not given up yet"
    )
    result = invoke(path)
    assert result.exit_code == 1
    assert "look at that rank's log" in result.stdout
    assert result.stdout.splitlines()[-1] == "none is loadable"
    die(alive)


def test_a_cause_is_told_once(run):
    """Ranks that stopped for another's failure are named after its cause; equal causes are told together."""
    path = f"{run}/step-5"
    clock = StepClock()
    attempts = [begin(path, rank, 5, clock=clock.clock) for rank in range(5)]
    stopped = AbortedError("rank 2 failed in write with StorageError: no space left", phase="write")
    attempts[1].abort(stopped)
    assert words(only(path), 0).startswith(
        "incomplete: rank 1 failed in write with AbortedError: rank 2 failed in write with StorageError: "
        "no space left; rank 0 never arrived"
    )
    for rank, error in ((0, stopped), (4, StorageError("no space left", phase="write"))):
        attempts[rank].abort(error)
    attempts[2].abort(StorageError("no space left", phase="write"))
    attempts[3].abort(CommitError("the ranks disagree", phase="commit"))
    die(*attempts)
    assert words(only(path), 0) == (
        "incomplete: ranks 2, 4 failed in write with StorageError: no space left; "
        "rank 3 failed in commit with CommitError: the ranks disagree; ranks 0, 1 stopped because of it"
    )
    result = CliRunner().invoke(app, ["ls", run])
    assert result.stdout.splitlines()[-1].endswith(
        "  ranks 2, 4 failed: StorageError: no space left; rank 3 failed too; "
        "ranks 0, 1 stopped because of it; 0 of 5 ranks arrived"
    )


def test_a_save_that_is_under_way_is_no_damage(run):
    """While its lock is held an attempt is under way, exit code 0, and --repair leaves it alone."""
    path = f"{run}/step-5"
    attempts = [*partial(path, (0,), 3), begin(path, 1, 3, clock=StepClock().clock)]
    before = tree(STORAGE, run)
    assert words(only(path), 1002) == (
        "under way: rank 1 has not arrived yet (beginning, 2 seconds ago); "
        "rank 2 has not begun yet; arrived: 0"
    )
    for arguments in ([run], [path], [path, "--repair"]):
        result = invoke(*arguments)
        assert result.exit_code == 0
        assert "step-5: under way" in result.stdout
        assert "wait for it" in result.stdout
    assert tree(STORAGE, run) == before
    die(*attempts)


def test_ranks_that_may_still_come_are_waited_for(run):
    """While ranks that have not begun may still come, for some minutes, a repair leaves the attempt alone."""
    path = f"{run}/step-5"
    (attempt,) = partial(path, (1,), 2)
    attempt._release()
    before = tree(STORAGE, run)
    for arguments in ([run], [path], [path, "--repair"], [run, "--repair"]):
        result = invoke(*arguments)
        assert result.exit_code == 0
        assert result.stdout.startswith("step-5: incomplete: rank 0 never began; arrived: 1\n")
        assert "other ranks may still come" in result.stdout
    assert tree(STORAGE, run) == before
    die(attempt)
    assert invoke(path).exit_code == 1
    assert invoke(path, "--repair").exit_code == 0


def test_a_wrong_clock_does_not_give_up_ranks_that_may_still_come(run, monkeypatch):
    """A repair on a host whose clock is a day ahead leaves an attempt that was begun just now alone."""
    path = f"{run}/step-5"
    (attempt,) = partial(path, (1,), 2)
    attempt._release()
    before = tree(STORAGE, run)
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now + 86_400)
    invoke(path, "--repair")
    assert tree(STORAGE, run) == before
    die(attempt)


def test_a_save_that_died_as_it_began(run):
    """A folder in which attempt.json has not got its name yet is given up when it is minutes old."""
    folder = join_hidden(f"{run}/step-5", "job-1")
    os.mkdir(folder)
    aside = f"{folder}/.attempt.json.{'0' * 16}.tmp"
    with open(aside, "wb") as file:
        file.write(b"")
    assert only(run).alive is None
    os.utime(aside, (0, 0))
    assert words(only(run), 0) == "incomplete: no rank has left a word"
    assert f"removed {folder}" in invoke(run, "--repair").stdout


def test_a_lost_attempt_json_is_made_up_for_by_the_marks(run):
    """After a power cut took attempt.json, the number of ranks comes from a mark, and nobody is alive."""
    path = f"{run}/step-5"
    attempts = partial(path, (0,), 3)
    die(*attempts)
    os.remove(f"{attempts[0].folder}/attempt.json")
    finding = only(path)
    assert (finding.world_size, finding.alive) == (3, False)
    assert [rank.state for rank in finding.ranks] == ["arrived", "silent", "silent"]
    assert "ranks 1, 2 never began" in words(finding, 0)


def test_all_ranks_arrived_but_a_file_is_gone(run):
    """A full set of marks without its data is incomplete, and it says which file is missing."""
    path = f"{run}/step-5"
    attempts = partial(path, (0, 1), 2)
    die(*attempts)
    os.remove(f"{attempts[0].folder}/checkpoint_1.pt")
    assert words(only(path), 0) == "incomplete: all ranks arrived, but checkpoint_1.pt is missing"
    os.remove(f"{attempts[0].folder}/index_1.json")
    shutil.copy(f"{attempts[0].folder}/index_0.json", f"{attempts[0].folder}/index_1.json")
    assert "says it is rank 0's" in words(only(path), 0)


def test_a_file_that_is_cut_is_told_with_rank_and_keys(run):
    """Without reading data, a short file names its rank, the values beyond its end, and what to load."""
    for step in (4, 5):
        save_real(f"{run}/step-{step}", step)
    size = os.path.getsize(f"{run}/step-5/checkpoint_0.pt")
    os.truncate(f"{run}/step-5/checkpoint_0.pt", 100)
    result = invoke(f"{run}/step-5")
    assert result.exit_code == 1
    what = f"checkpoint_0.pt of rank 0 has 100 bytes instead of {size}; affected: model.weight, model.bias"
    assert result.stdout.splitlines() == [
        f"step-5: damaged: {what}",
        f"  -> load step 4 ({run}/step-4) instead",
        f"newest loadable is step 4 ({run}/step-4){BY_SIZE}",
    ]
    os.remove(f"{run}/step-5/index_0.json")
    result = invoke(f"{run}/step-5")
    assert "step-5: damaged: 2 problems\n  index_0.json of rank 0 is missing\n  checkpoint_0" in result.stdout


def test_deep_finds_what_sizes_do_not_show(run):
    """A flipped byte is found with --deep alone, in the tensor that it is in."""
    for step in (4, 5):
        save_real(f"{run}/step-{step}", step, float(step))
    file = f"{run}/step-5/checkpoint_0.pt"
    with open(file, "rb+") as data:
        position = data.read().find(torch.full((64, 8), 5.0).numpy().tobytes())
        data.seek(position)
        data.write(b"\xff")
    result = invoke(run)
    assert result.exit_code == 0
    assert "step-5: whole by size: step 5, 1 rank\n" in result.stdout
    assert result.stdout.splitlines()[-1] == f"newest loadable is step 5 ({run}/step-5){BY_SIZE}"
    result = invoke(run, "--deep")
    assert result.exit_code == 1
    assert "step-4: whole: step 4, 1 rank\n" in result.stdout
    assert (
        "step-5: damaged: checkpoint_0.pt of rank 0: damaged: the CRC-32 is wrong; affected: model.weight\n"
        in result.stdout
    )
    assert result.stdout.splitlines()[-1] == f"newest loadable is step 4 ({run}/step-4)"


def flip(path):
    """Change a byte in the middle of a file."""
    with open(path, "rb+") as file:
        data = bytearray(file.read())
        data[len(data) // 2] ^= 1
        file.seek(0)
        file.write(data)


@pytest.mark.parametrize(("file", "whose"), [("index_1.json", "of rank 1: "), ("shards.json", "")])
def test_a_flipped_byte_in_an_index_or_the_shard_map_is_damage(run, file, whose):
    """What `load` refuses whole for a flipped byte is damaged without --deep too, and not recommended."""
    for rank in range(3):
        for step in (4, 5):
            save(STORAGE, f"{run}/step-{step}", step, attempt="job-1", rank=rank, world_size=3)
    path = f"{run}/step-5"
    with open(f"{path}/shards.json", "wb") as written:
        written.write(b"[1, 2, 3]")
    with open(f"{path}/manifest.json", "rb+") as written:
        manifest = decode_manifest(written.read(), path)
        manifest.shards = digest("shards.json", b"[1, 2, 3]")
        written.seek(0)
        written.write(encode_manifest(manifest))
    assert invoke(run).exit_code == 0
    flip(f"{path}/{file}")
    what = f"{file} {whose}does not have the SHA-256 that the manifest lists"
    for arguments in ([run], [path]):
        result = invoke(*arguments)
        assert result.exit_code == 1
        assert f"step-5: damaged: {what}\n  -> load step 4 ({run}/step-4) instead\n" in result.stdout
        assert result.stdout.splitlines()[-1] == f"newest loadable is step 4 ({run}/step-4){BY_SIZE}"
    (damage,) = json.loads(invoke(path, "--json").stdout)["checkpoints"][0]["damage"]
    assert (damage["file"], damage["rank"]) == (file, 1 if whose else None)


def test_an_index_that_cannot_be_read_is_damage(run, monkeypatch):
    """An index that fails to be read is told with the reason, and does not end the look at the others."""
    save(STORAGE, f"{run}/step-4", 4)
    save(STORAGE, f"{run}/step-5", 5)
    real = milepost.commit.checkpoint.file_digest

    def fails(folder, name):
        if folder.path.endswith("5"):
            raise StorageError("Input/output error", path=name)
        return real(folder, name)

    monkeypatch.setattr("milepost.commit.checkpoint.file_digest", fails)
    found = diagnose(STORAGE, run)
    assert [finding.state for finding in found.findings] == ["whole", "damaged"]
    assert words(found.findings[1], 0) == (
        "damaged: index_0.json of rank 0: cannot be read: Input/output error"
    )
    assert found.newest.step == 4


def test_what_a_damaged_index_took_the_place_of_is_kept(run):
    """A repair keeps the former checkpoint also when it is an index of the later one that is damaged."""
    path = f"{run}/step"
    save(STORAGE, path, 1)
    shutil.copytree(path, f"{run}-aside")
    save(STORAGE, path, 2)
    os.rename(f"{run}-aside", join_hidden(path, "job-1"))
    flip(f"{path}/index_0.json")
    result = invoke(run, "--repair")
    assert result.exit_code == 1
    assert f"not repaired {path}: the checkpoint there cannot be read whole" in result.stdout
    assert len(os.listdir(run)) == 2


def test_deep_keeps_what_a_plain_look_tells(run):
    """Of a data file that is missing or cut, --deep names the lost values once, and other damage as well."""
    path = f"{run}/step-5"
    save_real(path, 5)
    file = f"{path}/checkpoint_0.pt"
    os.truncate(file, os.path.getsize(file) - 1)
    cut = only(path)
    os.truncate(file, 100)
    shorter = only(path)
    assert shorter.damage[0].keys == ("model.weight", "model.bias")
    assert only(path, deep=True).damage == shorter.damage
    os.remove(file)
    assert only(path, deep=True).damage == only(path).damage
    assert words(only(path, deep=True), 0) == (
        "damaged: checkpoint_0.pt of rank 0 is missing; affected: model.weight, model.bias"
    )
    shutil.rmtree(path)
    save_real(path, 5)
    with open(file, "rb+") as data:
        position = data.read().find(torch.ones(64, 8).numpy().tobytes())
        data.seek(position)
        data.write(b"\xff")
        data.truncate(os.path.getsize(file) - 1)
    first, *others = only(path, deep=True).damage
    assert (first, [damage.keys for damage in others]) == (cut.damage[0], [("model.weight",)])


def test_damage_that_is_seen_only_once_is_none(run, monkeypatch):
    """What seems damaged while a save replaces it is looked at again, and is whole."""
    path = f"{run}/step-5"
    save(STORAGE, path, 5)
    real, looks = milepost.health.diagnosis.scan, []

    def scan(storage, folder):
        looks.append(folder)
        if len(looks) > 1:
            return real(storage, folder)
        os.rename(f"{path}/checkpoint_0.pt", f"{run}-aside")
        entries = real(storage, folder)
        os.rename(f"{run}-aside", f"{path}/checkpoint_0.pt")
        return entries

    monkeypatch.setattr("milepost.health.diagnosis.scan", scan)
    assert only(path).state == "whole"
    assert len(looks) == 2


def test_a_folder_that_cannot_be_listed_is_exit_code_4(run):
    """When the folder around a checkpoint cannot be listed, the error says so, not that it is missing."""
    save(STORAGE, f"{run}/step-5", 5)

    class Unlisted(LocalStorage):
        def open_folder(self, path):
            if path == run:
                raise StorageError("no permission", path=path)
            return super().open_folder(path)

    with pytest.raises(StorageError, match="no permission"):
        diagnose(Unlisted(), f"{run}/step-5")


def test_manifests_that_are_damaged_or_missing(run):
    """A damaged or missing manifest is damage, and none is loadable."""
    path = f"{run}/step-5"
    save(STORAGE, path, 5)
    with open(f"{path}/manifest.json", "ab") as file:
        file.write(b" ")
    for deep in ([], ["--deep"]):
        result = invoke(path, *deep)
        assert result.exit_code == 1
        assert "step-5: damaged: manifest.json not a manifest" in result.stdout
        assert "no other checkpoint is loadable" in result.stdout
    os.remove(f"{path}/manifest.json")
    result = invoke(run)
    assert result.exit_code == 1
    assert "step-5: damaged: manifest.json is missing" in result.stdout
    assert result.stdout.splitlines()[-1] == "none is loadable"


def test_a_later_format_is_exit_code_4(run):
    """What a later version wrote is not called damaged: exit code 4, with the way out."""
    save(STORAGE, f"{run}/step-5", 5)
    path = f"{run}/step-5/manifest.json"
    with open(path, "rb+") as file:
        manifest = decode_manifest(file.read(), path)
        manifest.version = (2, 0)
        file.seek(0)
        file.truncate()
        file.write(encode_manifest(manifest))
    result = invoke(run)
    assert result.exit_code == 4
    assert "step-5: not readable by this version" in result.stdout
    assert "pip install -U milepost" in result.stdout


def test_plain_files_are_whole(run):
    """A folder of plain torch.save files is whole in a deep look, and is not called so without one."""
    os.mkdir(f"{run}/old")
    torch.save({"a": torch.ones(3)}, f"{run}/old/checkpoint_0.pt")
    for arguments, state in (([run], "unchecked"), ([run, "--deep"], "whole"), ([f"{run}/old"], "unchecked")):
        result = invoke(*arguments)
        assert result.exit_code == 0
        assert f"old: {state}: 1 rank (files of plain torch.save" in result.stdout
        assert ("nothing of it was checked" in result.stdout) == (state == "unchecked")


def test_what_is_not_there_is_exit_code_3(run):
    """Where nothing is, there is one error with a hint; an empty folder is no error."""
    save(STORAGE, f"{run}/step-5", 5)
    result = invoke(f"{run}/step-50")
    assert (result.exit_code, result.stdout) == (3, "")
    assert "step-5" in result.stderr
    with pytest.raises(CheckpointNotFoundError):
        diagnose(STORAGE, f"{run}/nothing/at/all")
    os.mkdir(f"{run}/empty")
    result = invoke(f"{run}/empty")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "no checkpoints" in result.stderr


def test_json_has_all_facts(run):
    """--json gives each finding with its ranks and damage, and the newest loadable."""
    save(STORAGE, f"{run}/step-4", 4)
    die(*partial(f"{run}/step-5", (1,), 2))
    result = invoke(run, "--json")
    assert result.exit_code == 1
    data = json.loads(result.stdout)
    assert (data["run"], data["newest"]["step"], data["repaired"]) == (True, 4, [])
    found = {finding["name"]: finding for finding in data["checkpoints"]}
    assert [rank["state"] for rank in found["step-5"]["ranks"]] == ["silent", "arrived"]
    assert [found[name]["wrong"] for name in ("step-4", "step-5")] == [False, True]
    assert found["step-5"]["says"] == "incomplete: rank 0 never began; arrived: 1"


def test_hostile_text_never_reaches_the_terminal(run):
    """Control characters in names and error messages are printed as escapes."""
    path = f"{run}/step\x1b]0;x\x07"
    failing = begin(path, 1, 2)
    failing.abort(RuntimeError("evil\x1b[31m\r\n"))
    die(failing)
    result = invoke(run)
    assert result.exit_code == 1
    assert not set(result.output) & set("\x1b\x07\r")
    assert "evil\\x1b" in result.stdout


def test_doctor_loads_no_torch(run):
    """The command does its work without torch and numpy."""
    die(*partial(f"{run}/step-5", (0,), 2))
    code = (
        "import sys; from milepost.cli import main\n"
        f"sys.argv = ['milepost', 'doctor', {run!r}, '--repair']\n"
        "try: main()\nexcept SystemExit as end: print(end.code, *sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    code, *modules = output.splitlines()[-1].split()
    assert code == "0"
    assert {name.partition(".")[0] for name in modules} & {"torch", "numpy"} == set()


# ---------------------------------------------------------------------------- repair


def test_a_complete_save_loads_and_repair_publishes_it(run):
    """A full set of marks is the newest loadable in its place; only --repair moves it to its path."""
    path = f"{run}/step-5"
    save(STORAGE, f"{run}/step-4", 4)
    die(*partial(path, (0, 1), 2))
    before = tree(STORAGE, run)
    for arguments in ([run], [path], [path, "--json"]):
        assert invoke(*arguments).exit_code == 0
    result = invoke(path)
    assert "step-5: complete, but not published: step 5, 2 ranks" in result.stdout
    assert f"newest loadable is step 5 ({path})" in result.stdout
    assert tree(STORAGE, run) == before
    result = invoke(path, "--repair")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        f"published {path} (it was complete, but not published: step 5, 2 ranks)",
        "step-5: whole by size: step 5, 2 ranks",
        f"newest loadable is step 5 ({path}){BY_SIZE}",
    ]
    assert sorted(os.listdir(run)) == ["step-4", "step-5"]


def test_repair_removes_what_is_dead_and_nothing_else(run):
    """Of a dead, a living and a foreign partial only the dead one goes, with a last word of what it was."""
    save(STORAGE, f"{run}/step-4", 4)
    dead = partial(f"{run}/step-5", (0,), 2)
    die(*dead)
    living = partial(f"{run}/step-6", (0,), 2, step=6)
    foreign = join_hidden(f"{run}/step-7", "job-1")
    shutil.copytree(dead[0].folder, foreign)
    result = invoke(run, "--repair")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0] == (
        f"removed {dead[0].folder} (it was incomplete: rank 1 never began; arrived: 0)"
    )
    assert "step-7: not ours: .step-7.job-1.partial" in result.stdout
    left = {".step-6.job-1.partial", ".step-7.job-1.partial", "step-4"}
    assert set(os.listdir(run)) == left
    die(*living)


def test_repair_of_one_path_leaves_the_others(run):
    """Given one checkpoint, also by its hidden folder, only its attempts are removed."""
    attempts = partial(f"{run}/step-5", (0,), 2) + partial(f"{run}/step-6", (0,), 2)
    die(*attempts)
    result = invoke(attempts[0].folder, "--repair")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[1:] == ["none is loadable"]
    assert os.listdir(run) == [".step-6.job-1.partial"]
    data = json.loads(invoke(f"{run}/step-6", "--repair", "--json").stdout)
    assert [action["what"] for action in data["repaired"]] == ["removed"]
    assert data["repaired"][0]["finding"]["state"] == "incomplete"
    assert os.listdir(run) == []


def age(path):
    """What an hour does to the files of a checkpoint."""
    for name in os.listdir(path):
        os.utime(f"{path}/{name}", (time.time() - 3600,) * 2)


def test_repair_removes_a_checkpoint_that_has_no_data_left(run):
    """Without any data file it goes, if it is minutes old and has no files of the user's; else it stays."""
    for rank in range(2):
        writer = CheckpointWriter(CheckpointWriterConfig(start_id="a"), RankInfo(rank, 2))
        writer.write(f"{run}/half", {"w": torch.ones(2)})
        writer.close()
    for name in ("step-5", "noted"):
        save_real(f"{run}/{name}", 5)
    for name in ("half", "step-5", "noted"):
        os.remove(f"{run}/{name}/checkpoint_0.pt")
    open(f"{run}/noted/notes.txt", "w").close()
    early = invoke(run, "--repair")
    assert early.stdout.count("it is new, so try again in a few minutes") == 2
    for name in os.listdir(run):
        age(f"{run}/{name}")
    late = invoke(run, "--repair")
    assert late.exit_code == 1
    assert f"removed {run}/step-5 (it was damaged" in late.stdout
    assert "files that are not the checkpoint's (notes.txt)" in late.stdout
    assert sorted(os.listdir(run)) == ["half", "noted"]
    assert sorted(os.listdir(f"{run}/half")) == [
        "checkpoint_1.pt", "index_0.json", "index_1.json", "manifest.json"
    ]  # fmt: skip


def test_a_save_that_comes_as_its_path_is_cleared_stays(run, monkeypatch):
    """A checkpoint that is published just when a repair removes an empty one from the path is kept."""
    path = f"{run}/step-5"
    save_real(path, 5)
    os.remove(f"{path}/checkpoint_0.pt")
    monkeypatch.setattr(
        "milepost.commit.by_rename.discard.check_discardable", lambda _, path: save_real(path, 6)
    )
    assert not discard_emptied(STORAGE, path)
    assert (os.listdir(run), only(path, deep=True).step) == (["step-5"], 6)


def test_names_of_ours_without_our_content_stay(run):
    """What is only named like a rest of `milepost rm`, a file or a folder of the user's, stays."""
    name = ".step-5.0123456789abcdef.removed"
    os.mkdir(f"{run}/{name}")
    open(f"{run}/{name}/notes.txt", "w").close()
    open(f"{run}/{name.replace('5', '6', 1)}", "w").close()
    invoke(run, "--repair")
    assert len(os.listdir(run)) == 2
    assert os.listdir(f"{run}/{name}") == ["notes.txt"]


def test_an_overtaken_save_is_removed(run):
    """A complete attempt that is older than what is published is no longer loadable, and goes."""
    path = f"{run}/step"
    old = partial(path, (0,), 1, step=1)
    save(STORAGE, path, 2)
    die(*old)
    assert {finding.state for finding in diagnose(STORAGE, path).findings} == {"whole", "overtaken"}
    result = invoke(path, "--repair")
    assert result.exit_code == 0
    assert "it was complete, but overtaken by a newer checkpoint: step 1, 1 rank" in result.stdout
    assert os.listdir(run) == ["step"]


def test_left_overs_of_an_exchange(run):
    """A checkpoint that was exchanged out is cleared, or put back when nothing else is at the path."""
    path = f"{run}/step"
    save(STORAGE, path, 1)
    aside = f"{run}-aside"
    shutil.copytree(path, aside)
    save(STORAGE, path, 2)
    slot = join_hidden(path, "job-1")
    os.rename(aside, slot)
    (replaced,) = (finding for finding in diagnose(STORAGE, path).findings if finding.path == slot)
    assert (replaced.state, replaced.loads) == ("replaced", False)
    assert "left over: a former checkpoint, replaced by a later save: step 1, 1 rank" in words(replaced, 0)
    os.rename(path, aside)
    found = diagnose(STORAGE, path)
    assert found.newest.step == 1
    assert "restores it" in advice(found.findings[0], found)
    assert [action.what for action in repair(STORAGE, found)] == ["published"]
    assert only(path).step == 1
    shutil.move(path, slot)
    os.rename(aside, path)
    result = invoke(path, "--repair")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"removed {slot} (it was left over")
    assert os.listdir(run) == ["step"]


def test_plain_files_that_were_exchanged_out_are_cleared(run):
    """Plain files in the hidden folder of the attempt that is published are left over, and removed."""
    path = f"{run}/step"
    save(STORAGE, path, 1, attempt="one")
    slot = join_hidden(path, "one")
    os.mkdir(slot)
    with open(f"{slot}/checkpoint_0.pt", "wb") as file:
        file.write(b"old")
    assert "left over" in invoke(path).stdout
    assert f"removed {slot}" in invoke(path, "--repair").stdout
    assert os.listdir(run) == ["step"]


@pytest.mark.parametrize(("attempt", "suffix"), [("one", "partial"), ("other", "replaced")])
def test_what_was_replaced_and_is_empty_already_is_left_over(run, attempt, suffix):
    """A save that is killed when it has emptied what it replaced leaves no damage, but a folder to remove."""
    path = f"{run}/step"
    save(STORAGE, path, 1, attempt="one")
    slot = f"{run}/.step.{attempt}.{suffix}"
    os.mkdir(slot)
    result = invoke(run)
    assert result.exit_code == 0
    assert "step: left over: a former checkpoint, replaced by a later save (it is empty)\n" in result.stdout
    os.truncate(f"{path}/checkpoint_0.pt", 1)
    assert "restores this" not in invoke(run).stdout
    assert f"removed {slot}" in invoke(run, "--repair").stdout
    assert os.listdir(run) == ["step"]


def test_empty_hidden_folders_and_passing_files_go(run):
    """What a save left as it began, and its passing files in a published checkpoint, are told and removed."""
    path = f"{run}/step"
    save(STORAGE, path, 1)
    slot = join_hidden(path, "job-1")
    os.mkdir(slot)
    with open(f"{path}/state_0.json", "wb") as file:
        file.write(b"{}")
    result = invoke(path)
    assert "step: whole by size: step 1, 1 rank (1 passing file of its save still in it)" in result.stdout
    assert "step: incomplete: it is empty" in result.stdout
    result = invoke(path, "--repair")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[:2] == [
        f"removed {slot} (it was incomplete: it is empty)",
        f"swept {path}: removed state_0.json",
    ]
    assert sorted(tree(STORAGE, run)) == [
        "step/checkpoint_0.pt",
        "step/index_0.json",
        "step/manifest.json",
    ]


def test_a_damaged_checkpoint_in_the_way_of_a_complete_one(run):
    """What cannot be read at a path is not replaced by a repair; the complete save beside it still loads."""
    path = f"{run}/step"
    os.mkdir(path)
    die(*partial(path, (0,), 1, step=2))
    with open(f"{path}/manifest.json", "wb") as file:
        file.write(b"{}")
    result = invoke(path, "--repair")
    assert result.exit_code == 1
    assert "a complete save beside it is loaded in its place" in result.stdout
    assert f"newest loadable is step 2 ({path})" in result.stdout
    assert len(os.listdir(run)) == 2


def test_what_a_damaged_checkpoint_replaced_is_kept(run):
    """The former checkpoint may be the last whole one: a repair keeps it, and puts it back when asked."""
    path = f"{run}/step"
    save(STORAGE, path, 1)
    slot = join_hidden(path, "job-1")
    shutil.copytree(path, f"{run}-aside")
    save(STORAGE, path, 2)
    os.rename(f"{run}-aside", slot)
    os.truncate(f"{path}/checkpoint_0.pt", 10)
    result = invoke(path, "--repair")
    assert result.exit_code == 1
    assert f"not repaired {path}: the checkpoint there cannot be read whole" in result.stdout
    assert "move that away; `milepost doctor --repair` restores this" in result.stdout
    assert invoke(slot, "--repair").exit_code == 1
    assert len(os.listdir(run)) == 2
    shutil.move(path, f"{run}-aside")
    result = invoke(path, "--repair")
    assert result.exit_code == 0
    assert "step: whole by size: step 1, 1 rank" in result.stdout


def test_a_complete_save_with_a_damaged_byte_is_not_published_by_a_deep_repair(run):
    """With --deep the bytes of a complete save are compared before it may replace what is at its path."""
    path = f"{run}/step"
    save(STORAGE, path, 1)
    (attempt,) = partial(path, (0,), 1, step=2)
    die(attempt)
    with open(f"{attempt.folder}/checkpoint_0.pt", "rb+") as file:
        file.write(b"X")
    result = invoke(path, "--repair", "--deep")
    assert result.exit_code == 1
    assert f"not repaired {path}: a save that seemed complete is damaged" in result.stdout
    assert decode_manifest(tree(STORAGE, path)["manifest.json"], path).step == 1


def test_names_that_were_cut(run):
    """The full name of a cut hidden folder comes from its attempt.json; without it nothing is repaired."""
    path = f"{run}/{'long' * 60}"
    attempts = partial(path, (0,), 2)
    die(*attempts)
    assert only(path).name == "long" * 60
    os.remove(f"{attempts[0].folder}/attempt.json")
    finding = only(run)
    assert finding.target is None
    assert "its name is cut" in advice(finding, diagnose(STORAGE, run))
    assert repair(STORAGE, diagnose(STORAGE, run)) == []
    assert os.listdir(run) == [os.path.basename(attempts[0].folder)]


def test_a_hidden_folder_with_a_damaged_manifest_is_left_alone(run):
    """A manifest that cannot be read makes a hidden folder nobody's to remove: it is damage."""
    path = f"{run}/step"
    attempts = partial(path, (0,), 1)
    die(*attempts)
    with open(f"{attempts[0].folder}/manifest.json", "wb") as file:
        file.write(b"{}")
    result = invoke(path, "--repair")
    assert result.exit_code == 1
    assert "delete it yourself" in result.stdout
    assert len(os.listdir(run)) == 1


def test_a_repair_that_fails_goes_on_with_the_next(run, monkeypatch):
    """A failure at one path is told, with exit code 1, and the other paths are repaired all the same."""
    attempts = partial(f"{run}/step-5", (0,), 2) + partial(f"{run}/step-6", (0,), 2)
    die(*attempts)
    broken = milepost.health.repair.roll_forward

    def fails(storage, path):
        if path.endswith("5"):
            raise StorageError("no permission", path=path)
        return broken(storage, path)

    monkeypatch.setattr("milepost.health.repair.roll_forward", fails)
    result = invoke(run, "--repair")
    assert result.exit_code == 1
    assert f"not repaired {run}/step-5: no permission" in result.stdout
    assert os.listdir(run) == [".step-5.job-1.partial"]


# ---------------------------------------------------------------------------- odd places


def test_links_and_folders_of_plain_files(run):
    """A link is followed; plain files beside checkpoints do not make their folder one checkpoint."""
    save(STORAGE, f"{run}/step-5", 5)
    os.symlink(f"{run}/step-5", f"{run}/latest")
    assert only(f"{run}/latest").path == f"{run}/step-5"
    with open(f"{run}/checkpoint_0.pt", "wb") as file:
        file.write(b"")
    found = diagnose(STORAGE, run)
    assert (found.is_run, [finding.name for finding in found.findings]) == (True, ["step-5"])


def test_a_folder_with_our_name_and_nothing_of_ours(run):
    """A hidden folder of somebody else is no checkpoint, and is never touched."""
    slot = join_hidden(f"{run}/step-5", "mine")
    os.mkdir(slot)
    with open(f"{slot}/notes.txt", "wb") as file:
        file.write(b"")
    assert invoke(f"{run}/step-5", "--repair").exit_code == 3
    assert invoke(run, "--repair").exit_code == 0
    assert os.listdir(slot) == ["notes.txt"]


def test_a_complete_save_that_is_alive_or_of_a_later_format(run):
    """What its owners are about to publish is left to them, and so is what a later version made."""
    path = f"{run}/step-5"
    (attempt,) = partial(path, (0,), 1)
    result = invoke(path, "--repair")
    assert result.exit_code == 0
    assert "complete, but not published: step 5, 1 rank; somebody still works on it" in result.stdout
    assert "its owners publish it" in result.stdout
    die(attempt)
    assert [action.what for action in repair(STORAGE, diagnose(STORAGE, path))] == ["published"]
    with open(f"{path}/manifest.json", "rb") as file:
        manifest = decode_manifest(file.read(), path)
    manifest.version = (2, 0)
    with open(f"{path}/manifest.json", "wb") as file:
        file.write(encode_manifest(manifest))
    os.rename(path, attempt.folder)
    assert invoke(path, "--repair").exit_code == 4
    assert os.listdir(run) == [os.path.basename(attempt.folder)]


def test_a_lock_that_cannot_be_asked_for(run):
    """When the lock cannot be tried, it is not known whether a save lives, and nothing is repaired."""
    path = f"{run}/step-5"
    die(*partial(path, (0,), 2))

    class Unlockable(LocalStorage):
        def lock(self, path, *, exclusive=False):
            raise StorageError("no permission", path=path)

    found = diagnose(Unlockable(), path)
    assert found.findings[0].alive is None
    assert [action.what for action in repair(Unlockable(), found)] == ["failed"]


def test_many_ranks_and_much_damage_are_told_in_short(run):
    """Of many missing ranks and damaged files the first ten are told, and how many more there are."""
    path = f"{run}/step-5"
    late = [begin(path, rank, 13) for rank in range(12)]
    die(*late)
    said = words(only(path), 0)
    assert "rank 9 never arrived" in said
    assert "and 2 more ranks never arrived; rank 12 never began" in said
    for rank, attempt in enumerate([begin(f"{run}/step-7", rank, 13) for rank in range(13)]):
        attempt.abort(StorageError(f"no space left for {rank}"))
        attempt._release()
    said = words(only(f"{run}/step-7"), 0)
    assert "no space left for 9; and 3 more ranks failed" in said
    assert "no space left for 10" not in said
    die(*partial(f"{run}/step-6", range(12), 12, step=6))
    assert invoke(f"{run}/step-6", "--repair").exit_code == 0
    for rank in range(12):
        os.remove(f"{run}/step-6/checkpoint_{rank}.pt")
    result = invoke(f"{run}/step-6")
    assert "step-6: damaged: 12 problems" in result.stdout
    assert "  and 2 more\n" in result.stdout


def test_a_committed_attempt_whose_file_is_gone(run):
    """An unpublished manifest that does not fit its files makes an incomplete attempt."""
    path = f"{run}/step-5"
    (attempt,) = partial(path, (0,), 1)
    die(attempt)
    assert [action.what for action in repair(STORAGE, diagnose(STORAGE, path))] == ["published"]
    os.rename(path, attempt.folder)
    os.remove(f"{attempt.folder}/checkpoint_0.pt")
    finding = only(path)
    assert (finding.state, finding.world_size, finding.problem) == (
        "incomplete",
        1,
        "checkpoint_0.pt is missing",
    )
    result = invoke(path, "--repair")
    assert "it is committed and stays until a later one is" in result.stdout
    assert os.listdir(run) == [os.path.basename(attempt.folder)]
    assert "committed, but files of it seem to be missing" in CliRunner().invoke(app, ["ls", run]).stdout


def test_what_does_not_say_whose_it_is_is_called_so(run):
    """A hidden folder whose attempt.json is lost, with nothing else that names its attempt, is left alone."""
    folder = join_hidden(f"{run}/step-5", "lost")
    os.mkdir(folder)
    for name in ("attempt.json", "checkpoint_0.pt"):
        with open(f"{folder}/{name}", "wb"):
            pass
    finding = only(f"{run}/step-5")
    assert finding.state == "foreign"
    assert "it is left alone" in advice(finding, diagnose(STORAGE, run))
    assert repair(STORAGE, diagnose(STORAGE, run)) == []
