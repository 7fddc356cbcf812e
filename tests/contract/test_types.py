"""What type checkers make of a user's program: right lines pass, and each wrong one is an error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[2] / "src"
PROGRAM = """
import os
from pathlib import Path
from typing import Any
import milepost
from milepost import (
    STATE_DICT, AsyncCheckpointer, Barrier, BarrierConfig, Checkpointer, CheckpointerConfig, CheckpointReader,
    CheckpointStager, CheckpointStagerConfig, CheckpointWriter, CheckpointWriterConfig, DefaultStager,
    RankInfo, SyncCheckpointer, TCPStoreBarrier, WriterHook, create_barrier_from_config,
    make_async_checkpointer,
    make_sync_checkpointer, wrap_future,
)
from milepost import Nope  # wrong

class Hook(WriterHook):
    def pre_commit(self, path: str, **kwargs: Any) -> None: ...
    def post_commit(self, path: str, **kwargs: Any) -> None: ...

class Own(CheckpointWriter):
    def write(self, path: str | os.PathLike[str], state_dict: STATE_DICT, **kwargs: Any) -> None: ...

milepost.nope.foo()  # wrong
milepost.AsyncConfig(when_busy="skip", on_failure="warn", on_low_memory="raise")
milepost.AsyncConfig(when_busy="skp")  # wrong
milepost.AsyncConfig(on_failure="no")  # wrong
milepost.AsyncConfig(on_low_memory=1)  # wrong
CheckpointerConfig(meeting="never")  # wrong

def use(sync: SyncCheckpointer, background: AsyncCheckpointer, state: STATE_DICT) -> None:
    sync.save(Path("a"), state, step=1, metadata={"loss": 0.5}, to_my_hook=object())
    sync.save("a", state, step="1")  # wrong
    sync.save(5, state)  # wrong
    staged, written = background.save(Path("a"), state, step=1)
    written.result(5.0)
    background.save("a", state, step=1.5)  # wrong
    found: dict[str, Any] = sync.load(
        Path("a"), state, strict=True, map_location="cpu", verify="first", cast=True,
        rename={"a.*": "b.*"}, allow_missing=["c"], together=False,
    )
    background.load("a", default_map_location="cpu")
    background.load("a", verify="last")  # wrong
    sync.load("a", cast="yes")  # wrong
    sync.load("a", rename=["a"])  # wrong
    sync.load("a", together=None)  # wrong
    missing: list[str] = CheckpointReader(RankInfo(0, 1)).read(Path("a"))[1]
    with make_async_checkpointer(commit_hook=Hook()) as checkpointer:
        checkpointer.save("a", state)
    make_sync_checkpointer(rank_info=(0, 1))  # wrong
"""
WRONG = {number for number, line in enumerate(PROGRAM.splitlines(), 1) if line.endswith("# wrong")}
CONFIG = """
[mypy]
strict = True
[mypy-milepost.*]
follow_imports = silent
[mypy-torch.*,numpy.*]
follow_imports = skip
"""


def mypy(program, folder):
    """The lines with errors. torch is not followed: it has nothing to say here, and takes a minute."""
    (folder / "mypy.ini").write_text(CONFIG)
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--no-error-summary", program]
    done = subprocess.run(
        command, cwd=folder, env={"MYPYPATH": str(SRC)}, capture_output=True, text=True, check=False
    )
    assert done.returncode in {0, 1}, done.stdout + done.stderr
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    return {int(line.split(":")[1]): line for line in errors}


def pyright(program, folder):
    """The lines with errors."""
    (folder / "pyrightconfig.json").write_text(
        json.dumps({"extraPaths": [str(SRC)], "typeCheckingMode": "standard"})
    )
    command = [sys.executable, "-m", "basedpyright", "--level", "error", "--outputjson", program]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)["generalDiagnostics"]
    return {item["range"]["start"]["line"] + 1: item["message"] for item in found}


@pytest.mark.parametrize("check", [mypy, pyright])
def test_type_checkers_see_what_a_user_sees(check, tmp_path):
    """Every line marked as wrong is an error, among them names that the root lacks, and no other line is."""
    (tmp_path / "program.py").write_text(PROGRAM)
    errors = check("program.py", tmp_path)
    assert errors.keys() == WRONG, errors
