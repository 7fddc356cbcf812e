"""What the tests of background saves have in common: checkpointers, hooks that wait, kills, waiting."""

from __future__ import annotations

import copy
import os
import signal
import socket
import threading
import time
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import torch

from milepost.builder import make_async_checkpointer
from milepost.checkpoint_process import CheckpointProcess, LeanWriter
from milepost.checkpoint_reader import CheckpointReader
from milepost.checkpoint_writer import CheckpointWriter, CheckpointWriterConfig, WriterHook
from milepost.checkpointer import AsyncCheckpointer
from milepost.config import AsyncConfig, CheckpointerConfig, CheckpointProcessConfig, CheckpointStagerConfig
from milepost.health.verify import verify
from milepost.staging import DefaultStager
from milepost.storage import default_storage
from milepost.types import RankInfo

ONE = RankInfo(0, 1)
PATIENCE = 60.0
"""No wait of a test is longer, in seconds."""


def state_of(number, size=1000):
    return {"w": torch.full((size,), float(number)), "step": number}


def make(hook=None, **options):
    """A checkpointer with these options of AsyncConfig; ``staging`` is the stager's config."""
    config = CheckpointerConfig()
    config.staging_config = options.pop("staging", CheckpointStagerConfig())
    config.writer_config = options.pop("writer", CheckpointWriterConfig(write_barrier_timeout_secs=60))
    config.process_config = options.pop("process", CheckpointProcessConfig())
    rank_info = options.pop("rank_info", None)
    config.barrier_config = options.pop("barrier", config.barrier_config)
    config.async_config = AsyncConfig(**options)
    return make_async_checkpointer(config, rank_info, commit_hook=hook)


@contextmanager
def parts(lean=None, stager=None, process=None, fallback=None, **options):
    """A checkpointer put together by hand; closed at the end, whatever has failed before."""
    process = process or CheckpointProcess(ONE, CheckpointProcessConfig(), lean=lean or LeanWriter())
    checkpointer = AsyncCheckpointer(
        stager or DefaultStager(),
        process,
        CheckpointReader(ONE),
        config=AsyncConfig(**options),
        fallback=fallback,
    )
    try:
        yield checkpointer
    finally:
        close(checkpointer)


def close(checkpointer):
    """Close, whatever has failed before and was not looked at."""
    try:
        checkpointer.close()
    except Exception:
        checkpointer.close()


def writer_pid(checkpointer):
    """The pid of the checkpoint process, once it is ready."""
    checkpointer._process.process_creation_future.result(PATIENCE)
    return checkpointer._process.process.pid


def kill_writer(checkpointer):
    os.kill(writer_pid(checkpointer), signal.SIGKILL)


def result(future):
    return future.result(PATIENCE)


def error_of(future):
    return future.exception(PATIENCE)


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


def step_at(path):
    """The step of the verified checkpoint of a `state_of` at a path; None if there is none."""
    if not os.path.exists(f"{path}/manifest.json"):
        return None
    report = verify(default_storage(), str(path))
    assert not report.problems, report.problems
    loaded = CheckpointReader(ONE).read(str(path))[0]
    assert bool((loaded["w"] == loaded["step"]).all()), "old and new values are mixed"
    return loaded["step"]


def arenas():
    """How many descriptors of arenas this process has."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            found += "milepost-arena" in os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue
    return found


class Gate(WriterHook):
    """Holds a save in pre_commit until `open` is called, and tells when one has come there.

    It works across processes, by two FIFOs; whoever writes to them may come first.
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


class Diary(WriterHook):
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


class KillOnce(WriterHook):
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


class Collect:
    """An observer that keeps what it is told."""

    def __init__(self):
        self.events = []

    def on_event(self, event):
        self.events.append(event)

    def kinds(self, path=None):
        kinds = [event.kind for event in self.events if path is None or event.path == str(path)]
        return [kind for n, kind in enumerate(kinds) if kind != "writing" or kinds[n - 1] != "writing"]


class RecordingWriter(CheckpointWriter):
    """A writer of the user's: torch.save, with what it saw."""

    def write(self, path, state_dict, **kwargs):
        os.makedirs(path, exist_ok=True)
        torch.save({"state": state_dict, "kwargs": kwargs, "pid": os.getpid()}, f"{path}/own.pt")


def recording_writer(rank_info, **_):
    return RecordingWriter(CheckpointWriterConfig(), rank_info)


class AddingWriter:
    """A writer that adds one to the tensors that it gets, and tells what it got."""

    def write(self, path, state_dict, **kwargs):
        facts = {}
        for name, tensor in state_dict.items():
            storage = tensor.untyped_storage()
            where = (storage.data_ptr(), storage.nbytes(), tensor.storage_offset())
            facts[name] = (tensor.clone(), tensor.is_shared(), where)
            tensor.add_(1)
        torch.save(facts, path)


def adding_writer(rank_info):
    return AddingWriter()


class PassingWriter:
    """A writer that passes on what it gets: storages, a copy, and a tensor through a queue."""

    def write(self, path, state_dict, **kwargs):
        plain, part = state_dict["plain"], state_dict["part"]
        queue = torch.multiprocessing.SimpleQueue()
        queue.put(plain)
        copied = copy.deepcopy(plain)
        torch.save((copied, queue.get(), copied.is_shared()), f"{path}/tensors")
        torch.save((plain.untyped_storage(), part.untyped_storage()), f"{path}/storages")


def passing_writer(rank_info):
    return PassingWriter()


class FutureWriter:
    """A writer that works in the background and fails there."""

    def write(self, path, state_dict, **kwargs):
        future = Future()
        future.set_exception(OSError(28, "No space left on device"))
        return future


def future_writer(rank_info):
    return FutureWriter()


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


def held_socket():
    """A socket pair of the kind that the channel uses."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def fail_to_start_with_rank(rank_info):
    raise LookupError(f"rank {rank_info.global_rank} of {rank_info.global_world_size}")


class ShoutingWriter:
    """A writer that ends its process with some last words."""

    def write(self, path, state_dict, **kwargs):
        os.write(1, b"the writer shouts\n")
        os._exit(3)


def shouting_writer(rank_info):
    return ShoutingWriter()


def together(*works):
    """What each rank's work returned or raised; each is run in a thread of its own."""
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
