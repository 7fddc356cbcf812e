"""The benchmarks run, at a size at which they measure nothing: what they use has not gone from under them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
SMALL = ["--rounds", "1", "--size-mib", "8"]
ALL = {
    "sync": SMALL,
    "async": [*SMALL, "--no-peers"],
    "scale ranks": ["--rounds", "1", "--ranks", "8,16", "--only", "ranks"],
    "scale division": ["--ranks", "4,8", "--only", "division"],
    "scale arrivals": ["--marks", "10,20", "--only", "arrivals"],
    "ranks": [*SMALL, "--only", "replicas"],
    "ranks reshard": [*SMALL, "--only", "reshard"],
    "ranks peers": [*SMALL, "--only", "peers4"],
    "cli_start": [],
}


def test_every_benchmark_is_here():
    """A new benchmark is run by these tests too."""
    assert {f"bench_{name.split()[0]}.py" for name in ALL} == {
        path.name for path in FOLDER.glob("bench_*.py")
    }


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ALL)
def test_a_benchmark_runs(tmp_path, name):
    """It ends by itself, prints what it found, and its exit code is 1 if bars were missed, else 0."""
    script = FOLDER / f"bench_{name.split()[0]}.py"
    folder = [] if name == "cli_start" else ["--folder", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, str(script), *ALL[name], *folder], capture_output=True, text=True, check=False
    )
    assert done.returncode == ("bars missed in: " in done.stdout), done.stderr
    assert ("bars missed in: " in done.stdout) == ("MISSED" in done.stdout)
    assert "Traceback" not in done.stdout + done.stderr
    assert any(word in done.stdout for word in ("asked", " x ", "ratio")), done.stdout


@pytest.mark.parametrize("names", [["nosuch"], ["--help"]])
def test_the_runner_says_which_there_are(names):
    """A wrong name is refused, and --help lists the right ones."""
    done = subprocess.run(
        [sys.executable, str(FOLDER / "run.py"), *names], capture_output=True, text=True, check=False
    )
    assert done.returncode == (0 if names == ["--help"] else 2)
    assert "cli_start" in done.stdout + done.stderr
