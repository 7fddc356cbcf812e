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
KINDS = ["gpt2", "count-10", "FSDP2-4", "DDP-4", "lost", "starts", "listing"]
KINDS += ["scale-worst", "scale-division", "scale-arrivals"]
"""One of each kind; the others are the same with other numbers."""
ALIKE = ["size", "500x4MiB", "20000x16KiB", "100000x16KiB", "small", "lora"]
"""Groups that are made as those that count tensors."""


def run(*arguments):
    command = [sys.executable, str(FOLDER / "run.py"), "--small", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def report():
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("report")
    sys.path.remove(str(FOLDER))


@pytest.mark.timeout(900)
def test_every_kind_of_benchmark_runs(tmp_path, report):
    """Rows have figures, or are peers that are not installed; bars are set on figures that there are."""
    results = tmp_path / "results.json"
    done = run("--full", "--json", str(results), "--folder", str(tmp_path), *KINDS)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stdout + done.stderr
    content = json.loads(results.read_text())
    assert list(content["groups"]) == sorted(KINDS, key=list(content["groups"]).index)
    for name, entry in content["groups"].items():
        rows = entry["rows"]
        for found in rows.values():
            assert any(found["rounds"]) if not found["error"] else "No module" in found["error"], (
                name,
                found,
            )
            assert report.group_text(name, entry)
        figures = {(row, figure) for row in rows for one in rows[row]["rounds"] for figure in one}
        for bar in entry["bars"]:
            assert (bar["row"], bar["figure"]) in figures, bar
            assert not bar["base"] or bar["base"] in rows, bar
    assert report.documents(content)


def test_every_group_is_of_a_kind_that_is_run():
    """All groups can be listed, and those that no test runs differ in numbers alone from one that runs."""
    names = run("--list").stdout.split()
    assert set(KINDS) <= set(names)
    tested = {name.split("-")[0] for name in KINDS} | set(ALIKE)
    assert {name.split("-")[0] for name in names} == tested


def group(**changes):
    """What a results file says of a group that was measured on a quiet machine."""

    def row(config, **figures):
        return {"rounds": [{k: v * turn for k, v in figures.items()} for turn in (1.0, 1.1)],
                "error": "", "config": config, "lacks": ""}  # fmt: skip

    loads = {"restart": 0.5, "warm": 0.2, "cold": 0.6}
    return {
        "title": "A state", "rounds": 2, "bytes": 1 << 30, "notes": "", "ours": "milepost",
        "about": {"machine": "a machine", "versions": {}, "date": "2026-01-01", "commit": "abc"},
        "loads": [0.1], "disturbed": "",
        "control": [{"cpu": 1.0, "disk": 1.0, "others": 0.0}, {"cpu": 1.1, "disk": 2.0, "others": 0.01}],
        "bars": [dict(zip(("row", "figure", "limit", "base", "base_figure"), bar, strict=True)) for bar in (
            ("milepost", "stall", 1.5, "limits", "copy"), ("milepost", "cold", 0.5, "", ""))],
        "rows": {
            "limits": row("", copy=0.1, **{"direct write, 8 MiB": 0.6, "direct read, 1 threads": 0.6}),
            "milepost": row("defaults", stall=0.12, durable=0.8, **loads),
            "milepost sync": row("defaults", stall=0.7, durable=0.7),
            "torch.save + fsync": row("plain", stall=1.4, durable=1.4, **loads | {"restart": 0.2}),
        },
    } | changes  # fmt: skip


def test_tables_say_who_is_faster_and_what_is_missed(report):
    """A peer that is faster is named with the figure, and so is what was asked and is not met."""
    text = report.group_text("one", group())
    assert "- restart: torch.save + fsync takes 0.40 × as long as milepost\n" in text
    assert text.count("takes") == 1
    assert "Of 2 things that are asked, 1 are met." in text
    assert "- missed: milepost, cold: 0.63 s (asked: at most 0.50 s)" in text
    assert "milepost stall 1.20 × copy" in text
    assert "| 1.47 s (1.40–1.54 s) ×12 |" in text


def test_a_peer_that_fails_is_named(report):
    """A row that ran out of time keeps what it measured, and the table says why it ended."""
    entry = group()
    entry["rows"]["torch.save + fsync"]["error"] = "passed its time limit of 90 s"
    assert "**passed its time limit of 90 s**" in report.group_text("one", entry)


def test_a_row_with_fewer_turns_says_so(report):
    """The table names how many rounds a row took part in, if not in all."""
    text = report.group_text("one", group(rounds=3))
    assert "- limits: 2 rounds.\n- milepost: defaults; 2 rounds.\n" in text
    assert "2 rounds." not in report.group_text("one", group())


def test_documents_are_made_of_results(report):
    """README's table names the best peer and the limit; the page and the charts come out of the same file."""
    content = {
        "groups": {"gpt2": group(), "size-10": group(x=["size", 10]), "size-100": group(x=["size", 100])}
    }
    made = {Path(path).name: text for path, text in report.documents(content).items()}
    assert made.keys() == {
        "README.md",
        "gpt2.svg",
        *(f"size-{f}.svg" for f in ("stall", "durable", "restart", "cold")),
    }
    assert all(text.startswith("<svg") for name, text in made.items() if name.endswith("svg"))
    restart = "| restart: killed after a save, a new process loads | 0.53 s | 0.21 s (torch.save + fsync) |"
    assert restart in report.readme_table(content)


def test_verdicts_need_a_quiet_machine(report):
    """On figures of a busy machine nothing is compared, and `--check` says that it cannot tell."""
    entry = group()
    assert report.disturbed(entry) == ""
    assert "load average 5.0" in report.disturbed(entry | {"loads": [0.1, 5.0]})
    slow = {"cpu": 2.0, "disk": 1.0, "others": 0.0}
    assert "cpu took 1.00–2.00 s" in report.disturbed(entry | {"control": [*entry["control"], slow]})
    busy = [{"cpu": 1.0, "disk": 1.0, "others": 0.5}]
    assert "others used 50% of the cores" in report.disturbed(entry | {"control": busy})
    quiet, loud = {"groups": {"one": entry}}, {"groups": {"one": group(disturbed="others used 50 %")}}
    text = report.group_text("one", loud["groups"]["one"])
    assert "others used 50 %" in text
    assert "asked" not in text
    assert "takes" not in text
    assert report.check(quiet, loud)[0] == report.check(loud, quiet)[0] == 3
    assert all("no verdict" in line for line in report.compare(quiet, loud))


def test_a_stored_ratio_is_a_floor(report):
    """The same results hold; when ours takes twice as long, `--check` fails and `--compare` names it."""
    stored = {"groups": {"one": group()}}
    assert report.check(stored, stored) == (0, ["every stored ratio holds"])
    slower = copy.deepcopy(stored)
    for one in slower["groups"]["one"]["rows"]["milepost"]["rounds"]:
        one["cold"] *= 2
    code, lines = report.check(stored, slower)
    assert code == 1
    assert lines == ["one: milepost, cold: 2.00 × direct read, 1 threads, was 1.00"]
    assert "  milepost, cold: 0.63 s -> 1.26 s (+100%), of its limit 1.00 -> 2.00" in report.compare(
        stored, slower
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
