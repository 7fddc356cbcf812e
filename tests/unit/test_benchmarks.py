"""The benchmarks run, at a size at which they measure nothing: what they use has not gone from under them."""

from __future__ import annotations

import copy
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"
KINDS = [
    "gpt2", "count-10", "FSDP2-4", "DDP-4", "lost", "starts", "listing",
    "scale-worst", "scale-division", "scale-arrivals",
]  # fmt: skip
"""One of each kind; the others are the same with other numbers."""


def run(*arguments):
    command = [sys.executable, str(FOLDER / "run.py"), "--small", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def report():
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("report")
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """What a run of one group of each kind has written."""
    folder = tmp_path_factory.mktemp("bench")
    results = folder / "results.json"
    done = run("--full", "--json", str(results), "--folder", str(folder), *KINDS)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stdout + done.stderr
    return json.loads(results.read_text())


@pytest.mark.parametrize("name", KINDS)
def test_a_benchmark_runs(content, name):
    """Each row has figures, or is a peer that is not installed; bars are set on figures that there are."""
    entry = content["groups"][name]
    for row, found in entry["rows"].items():
        assert found["rounds"] if not found["error"] else "No module named" in found["error"], (row, found)
    figures = {
        (row, figure) for row in entry["rows"] for one in entry["rows"][row]["rounds"] for figure in one
    }
    for bar in entry["bars"]:
        base = bar["base"] or bar["row"]
        if not entry["rows"][bar["row"]]["error"] and not entry["rows"][base]["error"]:
            assert (bar["row"], bar["figure"]) in figures, bar


def test_every_group_can_be_made():
    """All groups are listed, and those that no test runs differ from one that runs in numbers alone."""
    names = run("--list").stdout.split()
    assert set(KINDS) <= set(names)
    alike = dict.fromkeys(["size", "500x4MiB", "20000x16KiB", "100000x16KiB", "small", "lora"], "count")
    tested = {name.split("-")[0] for name in KINDS}
    for name in names:
        assert (
            name in KINDS or alike.get(name, alike.get(name.split("-")[0], name)).split("-")[0] in tested
        ), name


def test_documents_are_made_of_results(content, report):
    """README's table, the page of figures and the charts come out of any results."""
    made = {Path(path).name: text for path, text in report.documents(content).items()}
    assert made["gpt2.svg"].startswith("<svg")
    assert "| durable save, the training waits |" in report.readme_table(content)
    assert all(f"`{name}`, 1 round" in made["README.md"] or name == "gpt2" for name in KINDS[:1])
    assert all("nan" not in text for text in made.values())


def quiet(content):
    made = copy.deepcopy(content)
    for entry in made["groups"].values():
        entry["disturbed"] = ""
    return made


def test_verdicts_need_a_quiet_machine(content, report):
    """On figures of a busy machine nothing is compared, and `--check` says that it cannot tell."""
    entry = {
        "loads": [0.1],
        "control": [{"cpu": 1.0, "disk": 1.0, "others": 0.0}, {"cpu": 1.1, "disk": 2.0, "others": 0.01}],
    }
    assert report.disturbed(entry) == ""
    assert "load average" in report.disturbed(entry | {"loads": [0.1, 5.0]})
    assert "cpu" in report.disturbed(
        entry | {"control": [*entry["control"], {"cpu": 2, "disk": 1, "others": 0}]}
    )
    busy = quiet(content)
    for one in busy["groups"].values():
        one["disturbed"] = "others used 90 % of the cores"
        text = report.group_text("gpt2", one)
        assert "others used 90 %" in text
        assert "asked" not in text
        assert "peer is faster" not in text
    assert report.check(quiet(content), busy)[0] == 3
    assert all("no verdict" in line for line in report.compare(quiet(content), busy))


def test_a_stored_ratio_is_a_floor(content, report):
    """The same results hold; when ours takes twice as long, `--check` fails and `--compare` names it."""
    stored = quiet(content)
    assert report.check(stored, stored)[0] == 0
    slower = quiet(content)
    for one in slower["groups"]["gpt2"]["rows"]["milepost"]["rounds"]:
        one["cold"] *= 2
    code, lines = report.check(stored, slower)
    assert code == 1
    assert any("gpt2: milepost, cold" in line for line in lines)
    assert any("cold" in line and "+100%" in line for line in report.compare(stored, slower))


def test_a_faster_peer_is_named(content, report):
    """Where a peer is faster, the table says so by itself."""
    entry = quiet(content)["groups"]["gpt2"]
    for one in entry["rows"]["torch.save + fsync"]["rounds"]:
        one["restart"] = 1e-9
    assert any(
        line.startswith("- restart: torch.save + fsync takes 0.00 ×") for line in report.verdicts(entry)
    )


def test_an_unknown_name_is_refused():
    """A wrong name is refused, and the right ones are listed."""
    done = run("nosuch")
    assert done.returncode == 2
    assert "scale-arrivals" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which it would check")
def test_the_gpu_check_says_that_there_is_no_gpu():
    """Without CUDA nothing passes and nothing fails: it says so and exits with 2."""
    script = FOLDER.parent / "tools" / "gpu_check.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "No CUDA device is here, so nothing was checked.\n")
