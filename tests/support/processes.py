"""Processes that tests start, and how they wait for them. Imports no torch."""

from __future__ import annotations

import os
import random
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

PATIENCE = 60.0
"""No wait of a test is longer, in seconds."""

KILLED = -signal.SIGKILL
"""The exit code of a killed process."""


def fork(work: Callable[[], Any]) -> int:
    """Start `work` in a forked child; its pid. Torch must stay single-threaded."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return pid


def ended(pid: int) -> int:
    """Wait for a child; its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def in_child(work: Callable[[], Any], seconds: float | None = None) -> int:
    """Run `work` in a forked child; its exit code, negative for a signal.

    A child that takes longer than `seconds` is killed, and that is a failure.
    """
    pid = fork(work)
    try:
        if seconds is not None:
            with open(os.pidfd_open(pid), "rb") as end:
                in_time = select.select([end], [], [], seconds)[0]
            assert in_time, f"the child had not ended after {seconds} s, and was killed"
        return ended(pid)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise


def together(*works):
    """What each rank's work returned or raised; each runs in a thread."""
    results = [None] * len(works)

    def run(rank):
        try:
            results[rank] = works[rank]()
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def wait_until(true, what="it"):
    """Wait for something that another process does; fails after PATIENCE."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, f"{what} did not happen"
        time.sleep(0.005)


def is_running(pid):
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def descriptors() -> int:
    """How many descriptors this process has open."""
    return len(os.listdir("/proc/self/fd"))


def free_port():
    """A port at which nobody listens. The system does not give it to a process that asks for any port."""
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
