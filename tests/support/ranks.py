"""Ranks in processes: a launcher that has imported torch forks them, with gloo and an agent's store.

Each job is started as torchrun does it: a process for each rank, with RANK, WORLD_SIZE and an agent's store
in the environment. This module imports torch only where a rank needs it: writer processes import it, too.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import pickle
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from milepost import errors
from milepost.errors import RemoteError

WORLD = 3
PATIENCE = 90
"""Seconds after which a job is ended by force, and its test fails."""

KILLED = "killed"
"""What became of a rank that was killed."""


def agent_store():
    import torch.distributed as dist

    return dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=60))


class Launcher:
    """Runs jobs, one after the other; everything that they started has ended when one is over."""

    _numbers = itertools.count(1)

    def __init__(self):
        agent_store()  # the first one leaves a pipe of libuv's
        code = f"import sys; sys.path[:] = {sys.path!r}; from support.ranks import serve; serve()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._crew = None
        assert pickle.load(self._process.stdout) == "ready"

    def close(self):
        if self._crew is not None:
            self._crew.close()
        self._process.stdin.close()
        self._process.wait(PATIENCE)
        self._process.stdout.close()

    def start(
        self, folder, work, *arguments, ranks=None, world=WORLD, store=None, seconds=PATIENCE, **environment
    ):
        """Start a process for each of the ranks (by default all), to call ``work(*arguments)``.

        ``store`` is the agent's store of an earlier start; by default it is a new one. After so many
        ``seconds`` the job is ended by force.
        """
        store = store or agent_store()
        common = {
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": str(next(self._numbers)),
            "MILEPOST_START_ID": f"test-{os.getpid()}",
            **environment,
        }
        ranks = range(world) if ranks is None else ranks
        own = [{"RANK": str(rank), "PROCESS": str(n)} for n, rank in enumerate(ranks)]
        return self._start(folder, [(work, arguments, common | more) for more in own], store, seconds)

    def run(self, *arguments, **options):
        return self.start(*arguments, **options).wait()

    def programs(self, folder, code, *arguments, world=2, **environment):
        """What ranks that torchrun knows nothing of wrote, and their exit codes.

        Each runs `code` as ``python -c code RANK WORLD *arguments`` does, until its end.
        """
        job = self._start(
            folder,
            [(run_program, (code, rank, world, *arguments), environment) for rank in range(world)],
        )
        codes = [{None: 0, KILLED: -signal.SIGKILL}.get(outcome, 1) for outcome in job.wait()]
        return [*zip(job.logs(), codes, strict=True)]

    def ask(self, work, *arguments):
        """What ``work(*arguments)`` returns on each rank of a job that lives on, or raises."""
        if self._crew is None:
            self._crew = Crew()
        answers = []
        try:
            answers = self._crew.ask(work, arguments)
        finally:
            if not answers or any(isinstance(answer, Exception) for answer in answers):
                self._crew.close()
                self._crew = None
        return answers

    def _start(self, folder, ranks, store=None, seconds=PATIENCE):
        folder = f"{folder}/job-{next(self._numbers)}"
        os.mkdir(folder)
        job = [(*rank, f"{folder}/{n}") for n, rank in enumerate(ranks)]
        pickle.dump((job, seconds), self._process.stdin)
        self._process.stdin.flush()
        return Job(self._process.stdout, folder, pickle.load(self._process.stdout), store)


@dataclass
class Job:
    """The processes of a job."""

    replies: Any
    folder: str
    pids: list[int]
    store: Any

    def kill(self, number):
        try:
            os.kill(self.pids[number], signal.SIGKILL)
        except ProcessLookupError:  # the launcher's answer is read, or the next job would get it
            pytest.fail(f"process {number} has ended by itself: {self.wait()}")

    def logs(self):
        """What each process has written."""
        return [Path(f"{self.folder}/{n}.log").read_text() for n in range(len(self.pids))]

    def wait(self):
        """What each process returned, the exception that it raised, or KILLED."""
        codes, late = pickle.load(self.replies)
        self.store = None
        logs = "\n".join(text[-3000:] for text in self.logs())
        assert not late, f"not over within {PATIENCE} seconds:\n{logs}"
        found = []
        for number, pid in enumerate(self.pids):
            if codes[pid] == -signal.SIGKILL:
                found.append(KILLED)
                continue
            assert codes[pid] == 0, f"exit code {codes[pid]} of process {number}:\n{logs}"
            found.append(pickle.loads(Path(f"{self.folder}/{number}.result").read_bytes()))
        return found


def serve():
    """The launcher's process: forks the ranks of each job, and waits until all they started has ended."""
    # The ranks need these, and would import them in each process.
    import torch._dynamo
    import torch.distributed.checkpoint.state_dict
    import torch.distributed.fsdp
    import torch.distributed.tensor.parallel  # noqa: F401

    import milepost.builder  # noqa: F401 - as above

    subreaper = 36
    assert ctypes.CDLL(None).prctl(subreaper, 1, 0, 0, 0) == 0
    replies = os.fdopen(os.dup(1), "wb")
    signal.signal(signal.SIGALRM, lambda *_: _raise_late())
    pickle.dump("ready", replies)
    replies.flush()
    while True:
        try:
            job, seconds = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pids = [_fork(*rank) for rank in job]
        pickle.dump(pids, replies)
        replies.flush()
        codes, late = {}, False
        signal.alarm(seconds)
        while True:
            try:
                pid, status = os.wait()
                codes[pid] = os.waitstatus_to_exitcode(status)
            except TimeoutError:
                late = True
                for name in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
                    os.kill(int(name), signal.SIGKILL)
                signal.alarm(1)
            except ChildProcessError:
                break
        signal.alarm(0)
        pickle.dump((codes, late), replies)
        replies.flush()


def _raise_late():
    raise TimeoutError


def _fork(work, arguments, environment, result):
    pid = os.fork()
    if pid:
        return pid
    try:
        log = os.open(f"{result}.log", os.O_CREAT | os.O_WRONLY, 0o600)
        null = os.open("/dev/null", os.O_RDONLY)
        for source, target in ((null, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        os.environ.update(environment)
        try:
            returned = work(*arguments)
        except Exception as error:
            traceback.print_exc()
            returned = error
        if isinstance(returned, RemoteError):  # its class was made in the rank
            kind = getattr(errors, type(returned).__name__, RemoteError)
            returned = kind(returned.message).located(rank=returned.rank, key=returned.key)
        Path(f"{result}.result").write_bytes(pickle.dumps(returned))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(1)


def run_program(code, *arguments):
    """The work of a rank that is a program."""
    sys.argv[1:] = map(str, arguments)
    exec(code, {"__name__": "__main__"})


@contextmanager
def as_rank(rank, size):
    """Be a rank of a world of this size, in torch's fake process group."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from milepost.state import placements

    placements._known.clear()  # where a mesh is, is kept for this process's rank
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


class Crew:
    """A job that lives on: its ranks do one work after the other, in one process group."""

    def __init__(self):
        self._folder = tempfile.mkdtemp(prefix="milepost-crew-")
        self._launcher = Launcher()
        self._job = self._launcher.start(self._folder, answer_all, seconds=24 * 3600)
        self._numbers = itertools.count()

    def ask(self, work, arguments):
        number, store = next(self._numbers), self._job.store
        store.set(f"ask/{number}", pickle.dumps((work, arguments)))
        answers = [f"answer/{number}/{rank}" for rank in range(WORLD)]
        try:
            store.wait(answers, timedelta(seconds=PATIENCE))
        except Exception as error:
            raise AssertionError("\n".join(text[-3000:] for text in self._job.logs())) from error
        return [pickle.loads(store.get(answer)) for answer in answers]

    def close(self):
        for pid in self._job.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._job.wait()
        self._launcher.close()
        shutil.rmtree(self._folder)


def answer_all():
    """One rank of a `Crew`."""
    import torch.distributed as dist

    rank, _ = join()
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(*address, is_master=False)
    for number in itertools.count():
        store.wait([f"ask/{number}"], timedelta(days=1))
        work, arguments = pickle.loads(store.get(f"ask/{number}"))
        try:
            answer = work(*arguments)
        except Exception as error:
            traceback.print_exc()
            answer = error
        store.set(f"answer/{number}/{rank}", pickle.dumps(answer))


class Gate:
    """Where a process stops until the test lets it pass, and where the test hears that it has come.

    Attributes:
        tell: Called by the process before it stops.
    """

    tell = None

    def __init__(self, folder, name="gate"):
        self.paths = [f"{folder}/{name}.{end}" for end in ("came", "go")]
        self._ends = []

    def __enter__(self):
        for path in self.paths:
            os.mkfifo(path)
            self._ends.append(os.open(path, os.O_RDWR))
        return self

    def __exit__(self, *_):
        for end in self._ends:
            os.close(end)

    def __getstate__(self):
        return {"paths": self.paths}

    def stop(self):
        """Called by the process."""
        if self.tell:
            self.tell()
        for path, mode in zip(self.paths, "wr", strict=True):
            with open(path, f"{mode}b", buffering=0) as fifo:
                _ = fifo.write(b"x") if mode == "w" else fifo.read(1)

    def leave(self):
        """Called by the process instead, where it does not stop."""
        with open(self.paths[0], "wb", buffering=0) as fifo:
            fifo.write(b"x")

    def wait(self, count=1):
        """Called by the test: returns when so many processes have come."""
        for _ in range(count):
            assert select.select(self._ends[:1], [], [], PATIENCE)[0], "nobody came to the gate"
            os.read(self._ends[0], 1)

    def open(self, count=1):
        """Called by the test: lets so many processes pass."""
        os.write(self._ends[1], b"x" * count)


def join():
    """Become a rank of the job's process group; on return all others have, so that one may die."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    store = dist.distributed_c10d._get_default_store()
    store.set(f"joined/{rank}", b"")
    store.wait([f"joined/{other}" for other in range(world)])
    return rank, world
