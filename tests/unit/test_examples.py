"""The examples do what they say (`make demo` runs them at full size)."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def train(folder):
    """Train a tiny network for six steps, saving every other; return what was printed."""
    script = str(ROOT / "examples" / "train_digits.py")
    options = ["--hidden", "64", "--steps", "6", "--save-every", "2"]
    command = [sys.executable, script, str(folder), *options]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def weights(output):
    return re.search(r"weights ([0-9a-f]{64})", output)[1]


def test_a_resumed_training_run_ends_with_the_same_weights(tmp_path):
    """Resumed from the newest checkpoint that loads, training ends with an uninterrupted run's weights."""
    whole = train(tmp_path / "run")
    assert "starting from the beginning" in whole
    finished = train(tmp_path / "run")
    assert "resumed from step-6" in finished
    assert weights(finished) == weights(whole)

    shutil.rmtree(tmp_path / "run" / "step-6")
    data = tmp_path / "run" / "step-4" / "checkpoint_0.pt"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    resumed = train(tmp_path / "run")
    assert "cannot load step-4" in resumed
    assert "resumed from step-2" in resumed
    assert weights(resumed) == weights(whole)


def test_other_seeds_end_with_other_weights(tmp_path):
    """The weights depend on the seed: equal fingerprints are no matter of course."""
    script = str(ROOT / "examples" / "train_digits.py")
    options = ["--hidden", "64", "--steps", "2", "--save-every", "2"]
    prints = set()
    for seed in ("0", "1"):
        command = [sys.executable, script, str(tmp_path / seed), *options, "--seed", seed]
        prints.add(weights(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    assert len(prints) == 2


def test_the_demo_fails_when_nothing_is_proven(tmp_path):
    """Without a trainer that works, the demo ends with exit code 1 and says why."""
    (tmp_path / "examples").mkdir()
    shutil.copy(ROOT / "examples" / "demo.py", tmp_path / "examples")
    (tmp_path / "examples" / "train_digits.py").write_text("raise SystemExit(3)")
    command = [sys.executable, str(tmp_path / "examples" / "demo.py")]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "FAILED: the trainer ended with exit code 3" in result.stderr
