"""What tests hand to a writer process: hooks, a storage that kills it, functions that end its start.

Imports no torch, and no hook derives from WriterHook: the writer process imports this module as well, and
torch takes most of the time of a short test.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

from milepost.storage import default_storage
from milepost.testing import MUTATIONS, FaultyStorage


class Gate:
    """Holds a save in pre_commit until `open` is called, and tells when one has come there.

    It works across processes, by two FIFOs. Writer and reader may open them in either order.
    """

    def __init__(self, folder):
        self.came, self.go = f"{folder}/came.fifo", f"{folder}/go.fifo"
        for path in (self.came, self.go):
            os.mkfifo(path)

    def pre_commit(self, path, **kwargs):
        with open(self.came, "w") as fifo:
            fifo.write("x")
        with open(self.go) as fifo:
            fifo.read(1)

    def post_commit(self, path, **kwargs):
        pass

    def wait_for_save(self):
        """Returns when a save stands at the gate."""
        with open(self.came) as fifo:
            assert fifo.read(1) == "x"

    def open(self):
        """Let the save that stands there pass."""
        with open(self.go, "w") as fifo:
            fifo.write("x")


class Diary:
    """Writes down each call of a hook, with its process, in a file."""

    def __init__(self, file, fail="", error=None):
        self.file, self.fail, self.error = str(file), fail, error or ValueError("the hook is broken")

    def pre_commit(self, path, **kwargs):
        self._note("pre", path, kwargs)

    def post_commit(self, path, **kwargs):
        self._note("post", path, kwargs)

    def _note(self, kind, path, kwargs):
        with open(self.file, "a") as file:
            file.write(f"{kind} {os.path.basename(path)} {kwargs.get('step')}\n")
        if self.fail == kind:
            raise self.error

    def lines(self):
        return Path(self.file).read_text().splitlines() if os.path.exists(self.file) else []


class KillOnce:
    """Kills the checkpoint process in a hook, the first time."""

    def __init__(self, file, kind):
        self.file, self.kind = str(file), kind

    def pre_commit(self, path, **kwargs):
        self._call("pre")

    def post_commit(self, path, **kwargs):
        self._call("post")

    def _call(self, kind):
        with open(self.file, "a") as file:
            file.write(f"{kind}\n")
        if kind == self.kind and Path(self.file).read_text().count(f"{kind}\n") == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    def lines(self):
        return Path(self.file).read_text().splitlines()


class Full:
    """A disk that is full when a save says so."""

    def pre_commit(self, path, **kwargs):
        if kwargs.get("full"):
            raise OSError(28, "No space left on device")

    def post_commit(self, path, **kwargs):
        """Nothing to do."""


class KillsWriter:
    """The plain storage for the trainer; it kills the first writer process at an operation, no later one."""

    def __init__(self, number, file):
        self.number, self.file = number, file

    def __reduce__(self):
        return _in_the_writer, (self.number, self.file)

    def __getattr__(self, name):
        return getattr(default_storage(), name)


def _in_the_writer(number, file):
    storage = FaultyStorage(default_storage(), counts=MUTATIONS)
    if not os.path.exists(file):
        with open(file, "w"):
            return storage.fail_at(number)
    return storage


def fail_to_start(*arguments):
    raise LookupError(f"no such device: {arguments}")


def hang(*_):
    """Never returns, but ends when its process is killed."""
    signal.pause()


def noisy_exit(*_):
    os.write(2, b"some library says: giving up\n")
    os._exit(7)


def leave_a_process_behind(file):
    """Fork a process that holds whatever this one has open."""
    pid = os.fork()
    if pid == 0:
        signal.pause()
    Path(file).write_text(str(pid))


def fail_to_start_with_rank(rank_info):
    raise LookupError(f"rank {rank_info.global_rank} of {rank_info.global_world_size}")
