"""ckpt-chaos kills the trainer, or the writer process, at each of its file events.

A named session: `make test-chaos` installs ckpt-chaos and runs it. The injector is that of ckpt-chaos, and
so is the sitecustomize that arms the writer. Only its runner is not used: it starts two interpreters with
torch for each kill point, where these trainers are forked.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from support.processes import in_child
from support.saves import save, which
from support.states import make_state

from milepost.builder import make_async_checkpointer, make_sync_checkpointer
from milepost.config import AsyncConfig, CheckpointerConfig

pytest.importorskip("ckpt_chaos", reason="ckpt-chaos is not installed: make test-chaos installs it")

from ckpt_chaos.byo import BOOT
from ckpt_chaos.runner import _events
from ckpt_chaos.targets.common import arm_from_env

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SAVES = [("a", 1), ("b", 2), ("a", 3), ("runs/c", 4)]
"""Path and number of each save: into an empty folder, beside another, over another, in a new folder."""

FEWEST = 40
"""How many distinct kill points each process must have."""

CRASHED = 137
"""The exit code of a process that ckpt-chaos has ended."""


# -- the trainers, each forked, with ckpt-chaos's variables set --------------------------------------------


def trainer_dies(root):
    """Saves while it waits. The trainer is armed."""
    arm_from_env(0, lazy=True)
    os.environ["CKPT_CHAOS_ARMED"] = "1"
    with make_sync_checkpointer() as checkpointer:
        for path, number in SAVES:
            checkpointer.save(f"{root}/out/{path}", make_state(number), step=number)
            tell(root, "committed", number)


def writer_dies(root, on_failure):
    """Saves in the background. ckpt-chaos's sitecustomize arms the first writer as it starts."""
    sys.path.insert(0, str(BOOT))
    config = CheckpointerConfig(async_config=AsyncConfig(on_failure=on_failure))
    with make_async_checkpointer(config) as background:
        os.environ["CKPT_CHAOS_ARMED"] = "1"
        for path, number in SAVES:
            _, written = background.save(f"{root}/out/{path}", make_state(number), step=number)
            error = written.exception(60)
            tell(root, "committed" if error is None else str(error).splitlines()[0], number)


def writer_is_replaced(root):
    """Saves in the background; what a killed writer leaves is written by another."""
    writer_dies(root, "retry")


def writer_is_missed(root):
    """Saves in the background; the save whose writer is killed fails."""
    writer_dies(root, "raise")


def tell(root, what, number):
    """Note, outside of what ckpt-chaos watches, what the trainer was told of a save."""
    with open(f"{root}/told", "a") as file:
        file.write(f"{number} {what}\n")


# -- the kills ---------------------------------------------------------------------------------------------


def run(job, root, crash_at=0):
    """Run a job that dies at a file event; its exit code, what it was told by number, its file events."""
    os.makedirs(f"{root}/out")

    def trainer():
        os.environ["CKPT_CHAOS_WATCH"] = f"{root}/out"
        os.environ["CKPT_CHAOS_LOG"] = f"{root}/events"
        os.environ["CKPT_CHAOS_CRASH_AT"] = str(crash_at)
        os.environ.pop("CKPT_CHAOS_ARMED", None)
        job(root)

    code = in_child(trainer)
    lines = Path(f"{root}/told").read_text().splitlines() if os.path.exists(f"{root}/told") else []
    told = {int(number): what for number, what in (line.split(" ", 1) for line in lines)}
    events = [
        f"{number} {kind} {re.sub('[0-9a-f]{16}', '*', name)}"
        for number, kind, name, _ in _events(Path(f"{root}/events.rank0"))
    ]
    return code, told, events


def check(root, told):
    """What was told loads, or a later one; each path is whole; the next saves work and leave nothing else."""
    committed = [number for number, what in told.items() if what == "committed"]
    paths = sorted({path for path, _ in SAVES})
    for path in paths:
        saved = [number for other, number in SAVES if other == path]
        least = max((number for number in saved if number in committed), default=0)
        found = which(f"{root}/out/{path}")
        assert (found or 0) >= least, f"{path}: {least} was told committed, and {found} loads"
        assert found in {None, *saved}
    for path in paths:
        save(f"{root}/out/{path}", 5)
        assert which(f"{root}/out/{path}") == 5
    left = [name for _, folders, files in os.walk(f"{root}/out") for name in (*folders, *files)]
    assert not [name for name in left if name.startswith(".")]


def check_told(job, code, told, crash_at):
    """The job has ended as it should, and was told what it should."""
    numbers = [number for _, number in SAVES]
    lost = [what for what in told.values() if what != "committed"]
    assert all(f"exit code {CRASHED}" in what for what in lost)
    if job is trainer_dies:
        assert code == (CRASHED if crash_at else 0)
        assert list(told) == numbers[: len(told)]
        assert lost == []
    else:
        assert code == 0
        assert list(told) == numbers
        assert len(lost) == (job is writer_is_missed and crash_at > 0)


@pytest.mark.parametrize("job", [trainer_dies, writer_is_replaced, writer_is_missed])
def test_no_kill_by_ckpt_chaos_loses_what_was_told(quick_path, capfd, job):
    """Killed at any file event of trainer or writer: what was told committed loads bit for bit."""
    code, told, plan = run(job, f"{quick_path}/0")
    check_told(job, code, told, 0)
    points, bad = set(), []
    for number, event in enumerate(plan, 1):
        root = f"{quick_path}/{number}"
        code, told, events = run(job, root, number)
        try:
            assert events == plan[:number], "other file events than without a kill"
            points.add(event)
            check_told(job, code, told, number)
            check(root, told)
        except (Exception, AssertionError) as error:
            bad.append(f"killed at {event}: {error!r}")
        shutil.rmtree(root)
    with capfd.disabled():
        kinds = {event.split(" ", 1)[1] for event in points}
        counts = f"{len(points)} distinct kill points ({len(kinds)} kinds), {len(bad)} bad"
        sys.stdout.write(f"\n{job.__name__}: {counts}\n")
    assert not bad, "\n".join(bad)
    assert len(points) >= FEWEST
