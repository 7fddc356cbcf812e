"""Random saves, steps, kills and closes against a model, and a thousand saves that leave nothing behind."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from support.background import arenas, make, result, state_of, step_at, writer_pid
from support.processes import PATIENCE, is_running, wait_until


class Training(RuleBasedStateMachine):
    """A training that saves to three paths, whose writer is killed or stopped, and which begins anew.

    The model: for each path the steps whose saves were accepted since the last that is known to be
    committed. What loads is one of these, or that one.
    """

    @initialize()
    def begin(self):
        self.folder = tempfile.mkdtemp(prefix="milepost-machine-")
        self.state = state_of(0, 500)
        self.committed = {}
        self.checkpointer = None

    def path(self, name):
        return f"{self.folder}/{name}"

    @precondition(lambda self: self.checkpointer is None)
    @rule(flight=st.integers(1, 3))
    def open(self, flight):
        self.checkpointer = make(max_in_flight=flight, retries=50)

    @rule()
    def step(self):
        self.state["step"] += 1
        self.state["w"].add_(1)

    @precondition(lambda self: self.checkpointer is not None)
    @rule(name=st.sampled_from("abc"), wait=st.booleans())
    def save(self, name, wait):
        written = self.checkpointer.save(self.path(name), self.state, step=self.state["step"])[1]
        self.committed[name] = self.state["step"]
        if wait:
            result(written)
            assert step_at(self.path(name)) == self.committed[name]

    @precondition(lambda self: self.checkpointer is not None)
    @rule(number=st.sampled_from([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
    def hit_the_writer(self, number):
        with suppress(ProcessLookupError):  # killed before, and replaced at the next save
            os.kill(writer_pid(self.checkpointer), number)

    @precondition(lambda self: self.checkpointer is not None)
    @rule(name=st.sampled_from("abc"))
    def load(self, name):
        if name in self.committed:
            assert self.checkpointer.load(self.path(name))["step"] == self.committed[name]

    @precondition(lambda self: self.checkpointer is not None)
    @rule()
    def close(self):
        self.checkpointer.close()
        self.checkpointer = None
        assert {name: step_at(self.path(name)) for name in self.committed} == self.committed

    def teardown(self):
        if hasattr(self, "folder"):
            if self.checkpointer is not None:
                self.close()
            shutil.rmtree(self.folder)


def run(examples, steps):
    from hypothesis.stateful import run_state_machine_as_test

    with_settings = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Training, settings=with_settings)


def test_any_order_of_saves_steps_kills_and_closes():
    """Whatever happens in whatever order, each accepted save commits with the values of its time."""
    run(15, 20)


@pytest.mark.slow
def test_any_order_of_saves_steps_kills_and_closes_at_length():
    """The same for many more and longer orders."""
    run(100, 60)


def resident(pid="self"):
    """Private and file pages of a process, in KiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssFile")))


def usage(pid, folder):
    """What may not grow: descriptors and threads of both processes, arenas, shared memory, files."""
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "writer's descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": threading.active_count(),
        "writer's threads": len(os.listdir(f"/proc/{pid}/task")),
        "mappings": len(Path("/proc/self/maps").read_text().splitlines()) // 20,
        "writer's mappings": len(Path(f"/proc/{pid}/maps").read_text().splitlines()) // 20,
        "arenas": arenas(),
        "files": sorted(os.listdir(folder)),
    }


def soak(tmp_path, saves, warm_up):
    with make() as checkpointer:
        pid = writer_pid(checkpointer)
        state = {"w": torch.randn(50, 50), "n": 0, "set": {1}}
        before = memory = None
        for number in range(saves):
            state["n"] = number
            written = checkpointer.save(str(tmp_path / "c"), state, step=number)[1]
            if number == warm_up:
                result(written)
                gc.collect()
                before, memory = usage(pid, tmp_path), (resident(), resident(pid))
        written.result(PATIENCE)
        gc.collect()
        assert usage(pid, tmp_path) == before
        grown = resident() - memory[0], resident(pid) - memory[1]
        assert max(grown) < 8 * 1024, f"grown by {grown} KiB"
        assert len(checkpointer._stager._slots) == 1
    wait_until(lambda: not is_running(pid))


def test_many_saves_leave_nothing_behind(tmp_path):
    """Saves one after the other use no more memory, descriptors, threads or files than the first."""
    soak(tmp_path, 60, 20)


@pytest.mark.slow
def test_a_thousand_saves_leave_nothing_behind(tmp_path):
    """The same for 1,000 saves."""
    soak(tmp_path, 1000, 100)
