"""What holds for every test: the environment is restored, and nothing that it started is left behind."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import resource_tracker
from pathlib import Path

import hypothesis
import pytest

hypothesis.settings.register_profile("dev", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))

_PATIENCE_SECONDS = 10.0
"""How long something that is ending already may take to end before it counts as leaked."""


@pytest.fixture(autouse=True)
def _environment_is_restored() -> Iterator[None]:
    """Put the environment variables and the working directory back as they were."""
    variables, folder = dict(os.environ), os.getcwd()
    yield
    if dict(os.environ) != variables:
        os.environ.clear()
        os.environ.update(variables)
    os.chdir(folder)


@pytest.fixture(autouse=True)
def _nothing_is_leaked(_environment_is_restored: None) -> Iterator[None]:
    """Fail a test that leaves threads, child processes, descriptors or shared memory behind."""
    threads, children = set(threading.enumerate()), _children()
    descriptors, shared = _descriptors(), _shared_memory()
    yield
    for thread in set(threading.enumerate()) - threads:
        thread.join(_PATIENCE_SECONDS)
    multiprocessing.active_children()  # reaps those that have ended
    leaks = [f"thread {thread.name}" for thread in set(threading.enumerate()) - threads]
    leaks += [f"process {pid}: {what}" for pid, what in _new(_children, children)]
    leaks += [f"descriptor {number}: {what}" for number, what in _new(_descriptors, descriptors)]
    leaks += [f"shared memory /dev/shm/{name}" for name, _ in _new(_shared_memory, shared)]
    if leaks:
        pytest.fail("left behind by this test: " + "; ".join(leaks), pytrace=False)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT interrupts this process, and new ones, also where the tests were started with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def launcher() -> Iterator:
    """Starts jobs of several ranks, see `support.ranks`."""
    from support.ranks import Launcher

    launcher = Launcher()
    yield launcher
    launcher.close()


def _new(look, before: dict) -> list[tuple]:
    """What `look` finds that was not there before, after a garbage collection if there seems to be any."""
    if look().items() - before.items():
        gc.collect()
    return sorted(look().items() - before.items())


def _children() -> dict[int, str]:
    """The children of this process by pid, but for multiprocessing's own helpers (and ended ones)."""
    found = {}
    for task in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):
            for pid in task.read_text().split():
                with suppress(OSError):
                    command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                    if not any(helper in command for helper in ("resource_tracker", "forkserver")):
                        found[int(pid)] = command.strip() or "(ended, not waited for)"
    return found


def _descriptors() -> dict[int, str]:
    """The open descriptors of this process and what they lead to, but for the interpreter's own."""
    own = resource_tracker._resource_tracker._fd
    found = {}
    with suppress(FileNotFoundError):
        for name in os.listdir("/proc/self/fd"):
            with suppress(OSError):
                target = os.readlink(f"/proc/self/fd/{name}")
                if int(name) != own and not target.startswith(
                    ("/dev/urandom", "/proc/", "/dev/null", "/sys/")
                ):
                    found[int(name)] = target
    return found


def _shared_memory() -> dict[str, None]:
    """Entries of /dev/shm that carry this process's id."""
    with suppress(FileNotFoundError):
        return {name: None for name in os.listdir("/dev/shm") if str(os.getpid()) in name}
    return {}
