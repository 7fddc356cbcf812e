"""The examples do what they say (`make demo` runs them at full size)."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from support.ranks import run_program

ROOT = Path(__file__).resolve().parents[2]


def run(launcher, folder, name, *arguments, ranks=0):
    """Run an example as a script of its own, or on so many ranks as torchrun does; what it printed."""
    script = str(ROOT / "examples" / name)
    code = f"import runpy, sys; sys.argv = {[script, *arguments]!r}"
    code += f"; runpy.run_path({script!r}, None, '__main__')"
    if ranks:
        job = launcher.start(folder, run_program, code, world=ranks)
        assert job.wait() == [None] * ranks, job.logs()
        return job.logs()[0]
    ((output, exit_code),) = launcher.programs(folder, code, world=1)
    assert exit_code == 0, output
    return output


@pytest.fixture
def train(launcher, tmp_path):
    """Trains a tiny network for six steps, saving every other; what was printed."""
    options = ["--hidden", "64", "--steps", "6", "--save-every", "2"]
    return lambda name, *more: run(
        launcher, tmp_path, "train_digits.py", str(tmp_path / name), *options, *more
    )


def weights(output):
    return re.search(r"weights ([0-9a-f]{64})", output)[1]


def test_a_resumed_training_run_ends_with_the_same_weights(train, tmp_path):
    """Resumed from the newest checkpoint that loads, training ends with an uninterrupted run's weights."""
    whole = train("run")
    assert "starting from the beginning" in whole
    finished = train("run")
    assert "resumed from step-6" in finished
    assert weights(finished) == weights(whole)

    shutil.rmtree(tmp_path / "run" / "step-6")
    data = tmp_path / "run" / "step-4" / "checkpoint_0.pt"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    resumed = train("run")
    assert "cannot load step-4" in resumed
    assert "resumed from step-2" in resumed
    assert weights(resumed) == weights(whole)


def test_other_seeds_end_with_other_weights(train):
    """The weights depend on the seed: equal fingerprints are no matter of course."""
    assert len({weights(train(seed, "--seed", seed)) for seed in ("0", "1")}) == 2


def test_the_demo_fails_when_nothing_is_proven(tmp_path):
    """Without a trainer that works, the demo ends with exit code 1 and says why."""
    (tmp_path / "examples").mkdir()
    shutil.copy(ROOT / "examples" / "demo.py", tmp_path / "examples")
    (tmp_path / "examples" / "train_digits.py").write_text("raise SystemExit(3)")
    command = [sys.executable, str(tmp_path / "examples" / "demo.py")]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "FAILED: the trainer ended with exit code 3" in result.stderr


@pytest.fixture
def fsdp2(launcher, tmp_path):
    """Trains the transformer, resumed where it can be, saving every other step; its losses."""

    def train(name, steps, ranks=0):
        folder = f"{tmp_path}/{name}"
        options = [f"--checkpoints={folder}", f"--loss-log={folder}.jsonl", f"--steps={steps}"]
        run(launcher, tmp_path, "train_fsdp2.py", *options, "--every=2", "--resume", "--async", ranks=ranks)
        return [json.loads(line)["loss"] for line in Path(f"{folder}.jsonl").read_text().splitlines()]

    return train


def test_two_ranks_go_on_as_one_process_and_one_as_two(fsdp2, tmp_path):
    """A sharded training run goes on without torchrun, and the other way, with the losses of one process."""
    whole = fsdp2("whole", 6)
    fsdp2("fewer", 2, ranks=2)
    shutil.copytree(tmp_path / "whole" / "step-000004", tmp_path / "more" / "step-000004")
    assert len(whole) == 6
    assert fsdp2("fewer", 6) == pytest.approx(whole, abs=1e-5)
    assert fsdp2("more", 6, ranks=2) == pytest.approx(whole[4:], abs=1e-5)


def still_running(folder):
    """The processes whose command line names a folder."""
    lines = [path for path in Path("/proc").glob("[0-9]*/cmdline") if int(path.parent.name) != os.getpid()]
    found = []
    for path in lines:
        with suppress(OSError):
            found += [path] if str(folder).encode() in path.read_bytes() else []
    return found


needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="the demo needs /proc")


@needs_proc
@pytest.mark.slow
def test_the_distributed_demo_in_a_small_form(tmp_path):
    """Killed on 4 ranks and on 2, the run ends in one process with the losses of one left alone."""
    script = str(ROOT / "examples" / "demo_distributed.py")
    command = [sys.executable, script, "--folder", str(tmp_path), "--steps", "12", "--every", "3"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "tensors are the same bit for bit" in result.stdout
    assert "1 rank: resumed from step-" in result.stdout
    assert "largest difference" in result.stdout
    assert not still_running(tmp_path)
    assert not list(tmp_path.iterdir())


@needs_proc
def test_an_interrupted_distributed_demo_leaves_nothing(tmp_path, interruptible):
    """After Ctrl-C neither processes nor files are left."""
    script = str(ROOT / "examples" / "demo_distributed.py")
    command = [sys.executable, script, "--folder", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as demo:
        assert any("starting from the beginning" in line for line in demo.stdout)
        assert still_running(tmp_path)
        demo.send_signal(signal.SIGINT)
        demo.stdout.read()
    assert demo.returncode == 130
    assert not still_running(tmp_path)
    assert not list(tmp_path.iterdir())


@needs_proc
def test_the_distributed_demo_fails_when_nothing_is_proven(tmp_path):
    """Without a trainer that works, the demo ends with exit code 1 and says why."""
    (tmp_path / "examples").mkdir()
    for name in ("demo.py", "demo_distributed.py"):
        shutil.copy(ROOT / "examples" / name, tmp_path / "examples")
    (tmp_path / "examples" / "train_fsdp2.py").write_text("raise SystemExit(3)")
    command = [sys.executable, str(tmp_path / "examples" / "demo_distributed.py")]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "FAILED: the trainer ended with exit code 1" in result.stderr
