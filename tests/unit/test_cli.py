"""The command line: what it prints where, and how it ends."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commit_steps import Killed, MortalStorage
from typer.testing import CliRunner

import milepost
from milepost.checkpoint_writer import CheckpointWriter
from milepost.cli import app
from milepost.commit.by_rename.discard import discard
from milepost.config import CheckpointWriterConfig
from milepost.health.listing import scan
from milepost.health.outline import plain_value, text_of
from milepost.storage import default_storage
from milepost.types import RankInfo

ROOT = Path(__file__).resolve().parents[2]
MILEPOST = [str(Path(sys.executable).with_name("milepost"))]
EVIL = "evil\x1b[31m\x9bkey\u202e\r\n\x07"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the checkpoints step-5 and step-10."""
    folder = tmp_path_factory.mktemp("run")
    checkpointer = milepost.make_sync_checkpointer()
    for step in (5, 10):
        state = {
            "model": {
                "weight": torch.full((32, 8), float(step)),
                "bias": torch.zeros(32, dtype=torch.bfloat16),
            },
            "lr": 0.5,
            "order": list(range(100)),
            "betas": (0.9, math.inf),
            (1, None): True,
            "device": torch.device("cpu"),
            "big": 1 << 20_000,
            EVIL: EVIL,
        }
        metadata = {"loss": math.nan, EVIL: [EVIL, b"\0"]}
        checkpointer.save(str(folder / f"step-{step}"), state, step=step, metadata=metadata)
    checkpointer.close()
    return folder


@pytest.fixture
def run(saved, tmp_path):
    """A copy of that folder."""
    return shutil.copytree(saved, tmp_path / "run")


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def rows(output):
    """The lines of a table as lists of cells."""
    return [re.split(r" {2,}", line.strip()) for line in output.splitlines()]


def damage(path):
    """Flip a byte of the weight in a checkpoint of `saved`."""
    data = path / "checkpoint_0.pt"
    content = bytearray(data.read_bytes())
    content[content.find(torch.full((32, 8), 5.0).numpy().tobytes())] ^= 1
    data.write_bytes(content)


# ---------------------------------------------------------------------------- starting


def test_help_loads_no_heavy_module():
    """`milepost --help` imports neither torch nor numpy, nor msgspec or any part that reads checkpoints."""
    code = (
        "import sys; from milepost.cli import main; sys.argv = ['milepost', '--help']\n"
        "try: main()\nexcept SystemExit as end: print(end.code, *sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    code, *modules = output.splitlines()[-1].split()
    assert code == "0"
    assert {name.partition(".")[0] for name in modules} & {"torch", "numpy", "msgspec", "isal"} == set()
    ours = {name for name in modules if name.startswith("milepost.")}
    assert ours == {"milepost._version", "milepost.cli", "milepost.cli.output"}


@pytest.mark.parametrize("command", ["show", "verify", "ls", "doctor"])
def test_no_command_loads_torch(saved, command):
    """Every command does its work without torch and numpy."""
    code = (
        "import sys; from milepost.cli import main\n"
        f"sys.argv = ['milepost', {command!r}, {str(saved if command == 'ls' else saved / 'step-5')!r}]\n"
        "try: main()\nexcept SystemExit as end: print(end.code, *sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    code, *modules = output.splitlines()[-1].split()
    assert code == "0"
    assert {name.partition(".")[0] for name in modules} & {"torch", "numpy"} == set()


def test_version():
    """`milepost --version` prints the version of the package."""
    assert invoke("--version").stdout == f"milepost {milepost.__version__}\n"


def test_each_command_and_exit_code_is_documented():
    """docs/cli.md has a section for each command, and help and document list the same exit codes."""
    document = (ROOT / "docs" / "cli.md").read_text()
    names = [command.name or command.callback.__name__ for command in app.registered_commands]
    assert sorted(names) == ["doctor", "ls", "rm", "show", "verify"]
    for name in names:
        assert f"## `milepost {name} --help`" in document
    in_help = re.findall(
        r"(\d+) (?:all|a|wrong|there|it|interrupted|whoever)", " ".join(invoke("--help").stdout.split())
    )
    in_document = re.findall(r"^\| (\d+) \|", document, re.MULTILINE)
    assert in_help == in_document == ["0", "1", "2", "3", "4", "130", "141"]


# ---------------------------------------------------------------------------- show


def test_show_prints_values_with_types_and_sizes(run):
    """`show` tells each value's key, dtype, shape and bytes, and the checkpoint's step and writer."""
    result = invoke("show", run / "step-5")
    assert (result.exit_code, result.stderr) == (0, "")
    head, table = result.stdout.split("\n\n")
    assert "step 5" in head
    assert f"process {os.getpid()}" in head
    assert f"torch {torch.__version__}" in head
    found = rows(table)
    assert ["model", "dict, 2 entries", "1.1 KiB"] in found
    assert ["weight", "float32 [32, 8]", "1.0 KiB"] in found
    assert ["bias", "bfloat16 [32]", "64 B"] in found
    assert ["lr", "0.5"] in found
    assert ["order", "list, 100 entries: 0, 1, 2, 3, 4, 5, 6, 7, …"] in found
    assert ["betas", "tuple, 2 entries: 0.9, inf"] in found
    assert ["(1, None)", "True"] in found
    assert ["device", "device('cpu')"] in found


def test_show_as_json_has_every_value(run):
    """`show --json` is valid JSON that lists every path with its facts, and the step, time and metadata."""
    data = json.loads(invoke("show", run / "step-5", "--json").stdout, parse_constant=pytest.fail)
    values = {value["path"]: value for value in data["values"]}
    weight = {
        "kind": "tensor",
        "dtype": "float32",
        "shape": [32, 8],
        "size_bytes": 1024,
        "device": "cpu",
        "depth": 2,
    }
    assert weight.items() <= values["model.weight"].items()
    assert values["order[99]"]["value"] == 99
    assert values["betas[1]"]["value"] == "inf"
    assert values["big"]["value"] == hex(1 << 20_000)
    assert values[EVIL]["value"] == EVIL
    assert (data["step"], data["world_size"], data["published"]) == (5, 1, True)
    assert data["metadata"] == {"loss": "nan", EVIL: [EVIL, "AA=="]}
    assert data["size_bytes"] == sum(
        file.stat().st_size for file in (run / "step-5").iterdir() if file.name != "manifest.json"
    )


@pytest.mark.parametrize(
    ("descr", "data", "text"),
    [
        ("|b1", "01", "True"),
        (">i2", "0102", "258"),
        ("<f4", "0000c03f", "1.5"),
        ("<c8", "0000c03f00000000", "numpy(<c8, 0x0000c03f00000000)"),
    ],
)
def test_numpy_scalars_show_as_numbers(descr, data, text):
    """A numpy bool, integer or float shows as its value, any other scalar as its dtype and bytes."""
    assert text_of(plain_value(["scalar", descr, data])) == text


def test_show_depth_and_filter(run):
    """--depth cuts nesting off, --filter takes part of a path or a whole pattern, --bytes is exact."""
    shallow = invoke("show", run / "step-5", "--depth", 1, "--bytes").stdout
    assert ["model", "dict, 2 entries", "1088"] in rows(shallow)
    assert "weight" not in shallow
    part = rows(invoke("show", run / "step-5", "--filter", "odel.w").stdout.split("\n\n")[1])
    assert part == [["key", "value", "size"], ["model.weight", "float32 [32, 8]", "1.0 KiB"]]
    pattern = json.loads(invoke("show", run / "step-5", "--filter", "order[?]", "--json").stdout)
    assert [value["path"] for value in pattern["values"]] == [f"order[{number}]" for number in range(10)]
    assert json.loads(invoke("show", run / "step-5", "--filter", "odel.w*", "--json").stdout)["values"] == []


def test_show_counts_each_tensor_once(tmp_path):
    """What ranks hold between them counts as one tensor, as does what is there under two keys."""
    config = CheckpointWriterConfig(start_id="start", replicated=["model.*", "tied"])
    for rank in range(2):
        weight, own = torch.ones(4, 4), torch.zeros(2)
        state = {"model": {"weight": weight, "bias": torch.ones(8)}, "tied": weight, "own": [own, own]}
        writer = CheckpointWriter(config, RankInfo(rank, 2))
        writer.write(str(tmp_path / "step"), state)
        writer.close()
    assert "content   3 tensors for rank 0, " in invoke("show", tmp_path / "step").stdout


def test_show_of_a_rank_that_is_not_there(run):
    """A rank beyond the world size is exit code 3, and the message says which there are."""
    result = invoke("show", run / "step-5", "--rank", 1)
    assert (result.exit_code, result.stdout) == (3, "")
    assert "ranks 0 to 0" in result.stderr
    result = invoke("show", run / "step-5", "--rank", 1, "--json")
    assert result.exit_code == 3
    assert "ranks 0 to 0" in json.loads(result.stdout)["error"]


def test_show_refuses_a_damaged_index(run):
    """An index with a flipped byte is not shown: exit code 1."""
    index = run / "step-5" / "index_0.json"
    index.write_bytes(index.read_bytes().replace(b'"float",0.5', b'"float",0.6'))
    result = invoke("show", run / "step-5")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "index is damaged" in result.stderr


def test_show_of_plain_files(tmp_path):
    """Files of plain torch.save are listed with their sizes."""
    torch.save({"a": torch.ones(3)}, tmp_path / "checkpoint_0.pt")
    size = (tmp_path / "checkpoint_0.pt").stat().st_size
    assert ["checkpoint_0.pt", str(size)] in rows(invoke("show", tmp_path, "--bytes").stdout)
    data = json.loads(invoke("show", tmp_path, "--json").stdout)
    assert (data["kind"], data["files"]) == ("torch", [{"name": "checkpoint_0.pt", "size": size}])


# ---------------------------------------------------------------------------- verify


def test_verify_of_whole_checkpoints(run):
    """Whole checkpoints are ok, each on a line of its own, with exit code 0."""
    result = invoke("verify", run / "step-5", run / "step-10")
    assert (result.exit_code, result.stderr) == (0, "")
    assert [": ok, step " in line for line in result.stdout.splitlines()] == [True, True]


def test_verify_names_the_damaged_tensor(run):
    """Damage is exit code 1 and names file and tensor; the other checkpoints are still checked."""
    damage(run / "step-5")
    result = invoke("verify", run / "step-5", run / "step-10")
    assert result.exit_code == 1
    first, second, third = result.stdout.splitlines()
    assert ": damaged, step 5" in first
    assert "checkpoint_0.pt bytes " in second
    assert second.endswith(" in model.weight")
    assert ": ok, step 10" in third
    data = json.loads(invoke("verify", run / "step-5", run / "step-10", "--json").stdout)
    assert [entry["ok"] for entry in data] == [False, True]
    assert data[0]["problems"][0]["keys"] == ["model.weight"]


def test_verify_goes_on_after_what_is_not_there(run):
    """A missing checkpoint does not keep the others from being checked; the gravest exit code stands."""
    result = invoke("verify", run / "step-6", run / "step-10")
    assert result.exit_code == 3
    assert "step-6: no result" in result.stdout
    assert ": ok, step 10" in result.stdout
    assert "step-5" in result.stderr
    damage(run / "step-5")
    assert invoke("verify", run / "step-6", run / "step-5").exit_code == 1


def test_verify_warns_of_plain_files_only(tmp_path):
    """A wrong CRC in a plain file is a warning on stderr, with exit code 0."""
    torch.save({"a": torch.full((32, 8), 5.0)}, tmp_path / "checkpoint_0.pt")
    damage(tmp_path)
    result = invoke("verify", tmp_path)
    assert result.exit_code == 0
    assert "warning:" in result.stderr
    assert "data/0" in result.stderr


# ---------------------------------------------------------------------------- ls


def test_ls_lists_steps_sizes_and_states(run):
    """`ls` shows committed and damaged checkpoints by time, with exit code 1 if one is damaged."""
    result = invoke("ls", run)
    assert result.exit_code == 0
    assert [row[:2] + row[3:4] for row in rows(result.stdout)[1:]] == [
        ["step-5", "5", "committed"],
        ["step-10", "10", "committed"],
    ]
    os.truncate(run / "step-5" / "checkpoint_0.pt", 10)
    result = invoke("ls", run, "--json")
    assert result.exit_code == 1
    entries = json.loads(result.stdout)
    assert [(entry["name"], entry["state"]) for entry in entries] == [
        ("step-5", "damaged"),
        ("step-10", "committed"),
    ]
    size = sum(file.stat().st_size for file in (run / "step-10").iterdir() if file.name != "manifest.json")
    assert entries[1]["size_bytes"] == size


def test_ls_shows_a_save_that_died_as_partial(run):
    """A save whose process was killed is listed as partial, with exit code 0, and verifies as incomplete."""
    code = (
        "import os, signal, milepost, torch\n"
        "from milepost.checkpoint_writer import WriterHook\n"
        "class Die(WriterHook):\n"
        "    def pre_commit(self, path, **kwargs): os.kill(os.getpid(), signal.SIGKILL)\n"
        "    def post_commit(self, path, **kwargs): pass\n"
        f"path = {str(run / 'step-15')!r}\n"
        "milepost.make_sync_checkpointer(commit_hook=Die()).save(path, {'a': torch.ones(9)}, step=15)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    result = invoke("ls", run, "--json")
    assert result.exit_code == 0
    (partial,) = (entry for entry in json.loads(result.stdout) if entry["name"] == "step-15")
    assert partial["state"] == "partial"
    for command in ("verify", "show"):
        result = invoke(command, run / "step-15")
        assert result.exit_code == 3
        assert f"has not committed: see `milepost doctor {run}/step-15`" in result.stderr
    assert invoke("verify", partial["path"]).exit_code == 1
    result = invoke("ls", partial["path"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "error: this is part of a checkpoint, and not a folder of checkpoints: " in result.stderr
    assert f"`milepost doctor {partial['path']}`" in result.stderr


def test_ls_of_an_empty_folder(tmp_path):
    """Where there are no checkpoints, `ls` says so on stderr and prints nothing, or an empty list."""
    result = invoke("ls", tmp_path)
    assert (result.exit_code, result.stdout) == (0, "")
    assert "no checkpoints" in result.stderr
    assert json.loads(invoke("ls", tmp_path, "--json").stdout) == []


def test_ls_of_a_checkpoint_says_what_it_is(run):
    """The path of one checkpoint is wrong usage, and the message names the commands that are meant."""
    for options in ([], ["--json"]):
        result = invoke("ls", f"{run}/step-5/", *options)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.splitlines() == [
            f"error: this is a checkpoint itself, and not a folder of checkpoints: {run}/step-5",
            f"hint: `milepost show {run}/step-5` tells about it; `milepost ls {run}` lists it",
        ]
    (run / "step-5" / "manifest.json").unlink()
    assert f"`milepost doctor {run}/step-5`" in invoke("ls", run / "step-5").stderr


# ---------------------------------------------------------------------------- ending


def test_what_is_not_there_is_exit_code_3_with_a_suggestion(run):
    """A missing checkpoint or folder is one clear line and a hint at what exists, on stderr alone."""
    result = invoke("show", run / "step-50")
    assert (result.exit_code, result.stdout) == (3, "")
    message, hint = result.stderr.splitlines()
    assert message.startswith("error: ")
    assert str(run / "step-50") in message
    assert hint.startswith("hint: ")
    assert "step-5" in hint
    result = invoke("ls", str(run)[:-1])
    assert result.exit_code == 3
    assert f"did you mean {run}?" in result.stderr
    result = invoke("ls", run / "step-5" / "manifest.json")
    assert result.exit_code == 3
    assert f"this is a file, and not a folder: {run}/step-5/manifest.json" in result.stderr


@pytest.mark.parametrize("command", ["show", "verify", "ls", "doctor"])
def test_json_tells_errors_as_well(run, command):
    """With --json what keeps a command from its work is told on stdout too, alike in all of them."""
    path = str(run / "step" / "nothing")
    result = invoke(command, path, "--json")
    data = json.loads(result.stdout)
    found = data[0] if command == "verify" else data
    assert (result.exit_code, found["path"], found["ok"]) == (3, path, False)
    assert result.stderr.splitlines()[0].startswith(f"error: {found['error']}")


def test_wrong_usage_is_exit_code_2():
    """An unknown command, a missing argument and an impossible option are exit code 2, told on stderr."""
    for arguments in (["shw"], ["show"], ["show", "x", "--depth", "-1"], ["ls", "a", "b"]):
        result = invoke(*arguments)
        assert (result.exit_code, result.stdout) == (2, "")
    assert "show" in invoke("shw").stderr


@pytest.mark.parametrize(
    "arguments",
    [["show"], ["verify", "step-5"], ["ls"], ["doctor"], ["doctor", "--repair"], ["rm", "--yes", "step-5"]],
    ids=" ".join,
)
def test_an_empty_path_is_wrong_usage(run, monkeypatch, arguments):
    """An empty path, as of a variable that is not set, does not stand for the current folder: exit code 2."""
    monkeypatch.chdir(run)
    result = invoke(*arguments, "")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "a path is empty" in result.stderr


def test_a_later_format_is_exit_code_4(run):
    """A checkpoint that a later version wrote is exit code 4, with the way out."""
    from milepost.format.manifest import decode_manifest, encode_manifest

    path = run / "step-5" / "manifest.json"
    manifest = decode_manifest(path.read_bytes(), "")
    manifest.version = (2, 0)
    path.write_bytes(encode_manifest(manifest))
    for command in ("verify", "show"):
        result = invoke(command, run / "step-5")
        assert result.exit_code == 4
        assert "pip install -U milepost" in result.stderr
    (run / "step-10").rename(run / ".step-15.job-1.partial")
    shutil.copy(path, run / ".step-15.job-1.partial")
    listed = json.loads(invoke("ls", run, "--json").stdout)
    assert [entry["state"] for entry in listed] == ["unreadable"] * 2
    result = invoke("ls", run)
    assert result.exit_code == 4
    assert "unreadable" in result.stdout
    assert "later" in result.stdout
    os.truncate(path, 10)
    assert invoke("ls", run).exit_code == 1


def test_debug_shows_the_traceback(run):
    """Errors come without a traceback, and with one under --debug."""
    assert "Traceback" not in invoke("show", run / "nothing").stderr
    result = invoke("show", run / "nothing", "--debug")
    assert "Traceback" in result.stderr
    assert result.exit_code == 3


def test_an_interrupt_ends_cleanly(run):
    """Ctrl-C in the middle of a command is exit code 130 and one word, without a traceback."""
    code = (
        "import os, signal, sys, milepost.health.verify\n"
        "from milepost.cli import main\n"
        "def interrupted(*_, **__): os.kill(os.getpid(), signal.SIGINT)\n"
        "milepost.health.verify.scan_file = interrupted\n"
        f"sys.argv = ['milepost', 'verify', {str(run / 'step-5')!r}]\n"
        "main()\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize("arguments", [["show", "--json"], ["ls"], ["verify"]], ids=["long", "short", "bad"])
def test_a_closed_pipe_ends_quietly(run, arguments):
    """When the reader of the output goes away, a command ends without a word, and not as if all were well."""
    damage(run / "step-5")
    reading, writing = os.pipe()
    os.close(reading)
    command = [*MILEPOST, *arguments, str(run if "ls" in arguments else run / "step-5")]
    result = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (result.returncode, result.stderr) == (141, "")


@pytest.mark.parametrize(
    "arguments", [["show", "nothing"], ["show", "nothing", "--json"], ["--help"], ["ls", ""]]
)
def test_a_closed_pipe_for_messages_too(arguments):
    """Where messages cannot be told either, that is no damage, nor anything else that an exit code means."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [*MILEPOST, *arguments]
    assert subprocess.run(command, stdout=writing, stderr=writing, check=False).returncode == 141
    os.close(writing)


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-", "2>&-"])
def test_closed_streams_are_no_error(run, closed):
    """With stdout or stderr closed a command does its work, and its exit code tells the outcome."""
    for arguments, code in ((["verify", run / "step-5"], 0), (["ls", run], 0), (["show", run / "none"], 3)):
        command = ["sh", "-c", f'exec "$@" {closed}', "sh", *MILEPOST, *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == code
        assert "Traceback" not in result.stderr
        assert "error: " not in result.stdout


@pytest.mark.parametrize("arguments", [["show"], ["show", "--json"], ["show", "--filter", "*"], ["verify"]])
def test_hostile_keys_never_reach_the_terminal(run, arguments):
    """Control characters in keys, values and metadata are printed as escapes."""
    command, *options = arguments
    output = invoke(command, run / "step-5", *options).stdout
    assert not set(output) & set("\x1b\x9b\u202e\r\x07")
    if "verify" not in arguments:
        assert "evil\\u001b" in output or "evil\\x1b[31m\\x9bkey\\u202e" in output


def test_hostile_folder_names_never_reach_the_terminal(run):
    """Control characters in the names of folders are printed as escapes, also in errors and warnings."""
    name = "step\x1b]0;x\x07"
    (run / "step-5").rename(run / name)
    for arguments in (["ls", run], ["ls", run, "--json"], ["verify", run / name], ["show", run / name]):
        result = invoke(*arguments)
        assert result.exit_code == 0
        assert not set(result.output) & set("\x1b\x07")
    missing = invoke("show", run / (name + "x"))
    assert missing.exit_code == 3
    assert not set(missing.output) & set("\x1b\x07")


def test_no_color_is_honoured(run):
    """On what is no terminal there are no styles at all, and NO_COLOR takes colours from any output."""
    result = subprocess.run([*MILEPOST, "ls", str(run)], capture_output=True, text=True, check=True)
    assert "\x1b" not in result.stdout
    coloured = os.environ | {"FORCE_COLOR": "1", "TERM": "xterm-256color"}
    coloured.pop("NO_COLOR", None)
    result = subprocess.run(
        [*MILEPOST, "ls", str(run)], capture_output=True, text=True, check=True, env=coloured
    )
    assert "\x1b[32m" in result.stdout
    plain = coloured | {"NO_COLOR": "1"}
    result = subprocess.run(
        [*MILEPOST, "ls", str(run)], capture_output=True, text=True, check=True, env=plain
    )
    assert not re.search(r"\x1b\[[\d;]*3\d", result.stdout)


def test_text_that_the_encoding_lacks_is_escaped(run):
    """On a terminal of ASCII only, other characters are printed as escapes instead of failing."""
    variables = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [*MILEPOST, "show", str(run / "step-5")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
    assert result.returncode == 0
    assert "\\u2026" in result.stdout


@pytest.mark.parametrize("command", ["show", "verify", "ls", "doctor", "rm"])
def test_an_address_is_no_path(command, tmp_path, monkeypatch):
    """Each command refuses an address and an unexpanded ~, and says what to give instead."""
    monkeypatch.chdir(tmp_path)
    for path, way_out in (("s3://bucket/step-5", "mounted"), ("~/run", f"give {Path.home()}/run")):
        found = invoke(command, path)
        assert found.exit_code == 3
        assert "a folder with a local path, and this is" in found.stderr
        assert way_out in found.stderr


# ---------------------------------------------------------------------------- rm


def test_rm_asks_and_removes(run, monkeypatch):
    """`rm` names what it is about to remove, removes it on yes alone, and leaves no trace of it."""
    module = importlib.import_module("milepost.cli.rm")  # the command of this name hides it as an attribute
    monkeypatch.setattr(module, "_can_ask", lambda: True)
    no = CliRunner().invoke(app, ["rm", str(run / "step-5")], input="n\n")
    assert "step 5, " in no.stderr
    assert "nothing was removed" in no.stderr
    assert sorted(os.listdir(run)) == ["step-10", "step-5"]
    yes = CliRunner().invoke(app, ["rm", str(run / "step-5")], input="y\n")
    assert (yes.exit_code, yes.stdout.splitlines()[-1]) == (0, f"removed {run / 'step-5'}")
    assert os.listdir(run) == ["step-10"]


def test_rm_without_a_terminal_needs_yes(run):
    """Where nobody can be asked, `rm` without --yes is wrong usage and removes nothing."""
    done = subprocess.run(
        [*MILEPOST, "rm", run / "step-5"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "--yes" in done.stderr
    assert invoke("rm", "--yes", run / "step-5", run / "step-10").exit_code == 0
    assert os.listdir(run) == []


@pytest.mark.parametrize(
    ("make", "code", "words"),
    [
        (lambda path: None, 3, "no checkpoint at this path"),
        (lambda path: path.mkdir(), 3, "no checkpoint in this folder"),
        (lambda path: path.write_text("x"), 3, "no checkpoint at this path"),
        (lambda path: path.symlink_to("step-10"), 4, "the folder that it points to"),
        (lambda path: shutil.copytree(path.parent, path), 3, "no checkpoint in this folder"),
    ],
    ids=["nothing", "empty", "file", "link", "run"],
)
def test_rm_of_no_checkpoint_removes_nothing(run, make, code, words):
    """If one of the paths is no checkpoint, `rm` says so and removes none of the others either."""
    make(run / "other")
    done = invoke("rm", "--yes", run / "step-5", run / "other")
    assert (done.exit_code, words in done.stderr) == (code, True), done.stderr
    assert (run / "step-5" / "manifest.json").exists()


def test_rm_leaves_a_folder_with_the_users_files(run):
    """A folder with files that the checkpoint does not list stays, and they are named."""
    (run / "step-5" / "plots").mkdir()
    (run / "step-5" / "plots" / "loss.png").write_text("x")
    done = invoke("rm", "--yes", run / "step-5")
    assert (done.exit_code, "plots/loss.png" in done.stderr) == (4, True)
    assert (run / "step-5" / "checkpoint_0.pt").exists()


@pytest.mark.parametrize("name", ["manifest.json", "checkpoint_0.pt", "index_0.json"])
def test_rm_removes_what_is_left_of_a_checkpoint(run, name):
    """A checkpoint that has lost any of its files, or whose manifest is damaged, can be removed."""
    (run / "step-5" / name).unlink()
    (run / "step-10" / "manifest.json").write_bytes(b"{}")
    assert invoke("rm", "--yes", run / "step-5", run / "step-10").exit_code == 0
    assert os.listdir(run) == []


def test_what_rm_removed_does_not_come_back(run):
    """A complete checkpoint that a dead save left beside the path goes, too: `load` finds none any more."""
    path = run / "step-5"
    attempt = json.loads((path / "manifest.json").read_bytes())["body"]["attempt"]
    shutil.copytree(path, run / f".step-5.{attempt}.partial")
    shutil.rmtree(path)
    checkpointer = milepost.make_sync_checkpointer()
    assert checkpointer.load(str(path))["lr"] == 0.5
    with pytest.raises(milepost.CheckpointNotFoundError):
        discard(default_storage(), str(run / "step-6"))
    discard(default_storage(), str(path))
    with pytest.raises(milepost.CheckpointNotFoundError):
        checkpointer.load(str(path))
    assert os.listdir(run) == ["step-10"]


def test_an_rm_that_dies_leaves_no_checkpoint(run):
    """Killed at any operation, `rm` leaves the whole checkpoint, or a rest that a repair removes."""
    whole_ones = []
    for count in itertools.count():
        target = shutil.copytree(run / "step-5", run / f"try-{count}")
        storage = MortalStorage(default_storage(), dies_at=count)
        try:
            discard(storage, str(target))
            break
        except Killed:
            pass
        listed = {entry.name: entry.state for entry in scan(default_storage(), str(run))}
        whole = listed.pop(target.name, None)
        assert whole == ("committed" if target.exists() else None)
        whole_ones += [target.name] if whole else []
        assert listed.keys() <= {"step-5", "step-10", *(f"try-{n}" for n in range(count))}
    assert count > 5
    mended = invoke("doctor", "--repair", run)
    assert (mended.exit_code, mended.stdout.count("somebody has removed")) == (0, count - len(whole_ones))
    assert sorted(os.listdir(run)) == sorted(["step-5", "step-10", *whole_ones])


def test_the_package_is_a_program(run):
    """`python -m milepost` is the command line."""
    done = subprocess.run(
        [sys.executable, "-m", "milepost", "ls", run], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "step-10" in done.stdout
