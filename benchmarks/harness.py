"""What every benchmark uses: worker processes, rounds that take turns, the control, and the results file.

The harness itself only forks, waits and writes: whatever is measured runs in a worker, a process of its own
that is forked from the harness after torch was imported, so that it starts at once and owns all it does.
"""

from __future__ import annotations

import ctypes
import datetime as dt
import importlib.metadata
import json
import multiprocessing
import multiprocessing.connection
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Self

from report import disturbed

MIB = 1 << 20
_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True)


class Failed(Exception):  # noqa: N818 - it is a result, as peers fail
    """A worker could not do what it was told; the message is what the table says about it.

    Attributes:
        found: The figures of this turn that had been found before.
    """

    found: dict[str, float] = {}  # noqa: RUF012 - never changed in place


# -- workers -----------------------------------------------------------------------------------------


class Worker:
    """A process that makes an object and then calls its methods, one at a time.

    Args:
        make: Called in the new process with `args`; `call` calls methods of what it returns.
        environment: Variables that are set there first.
    """

    def __init__(self, make: Callable[..., object], *args: Any, environment: dict[str, str] | None = None):
        self._pipe, there = multiprocessing.Pipe()
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by close
        self.peak: dict[str, int] = {}
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.environ.update(environment or {})
            os.dup2(self._log.fileno(), 1)
            os.dup2(self._log.fileno(), 2)
            _serve(there, make, args)
        there.close()
        self._alive = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def call(self, name: str = "", *args: Any, limit: float = 900, watch: bool = False) -> Any:
        """What the method returns; `watch` notes the peak of memory and descriptors meanwhile.

        Raises:
            Failed: It raised, the process ended, or it took more than `limit` seconds.
        """
        self.begin(name, *args)
        return self.end(limit=limit, watch=watch)

    def begin(self, name: str, *args: Any) -> None:
        with suppress(OSError):
            self._pipe.send((name, args))

    def end(self, *, limit: float = 900, watch: bool = False) -> Any:
        deadline = time.monotonic() + limit
        while not self._pipe.poll(0.002 if watch else max(0, deadline - time.monotonic())):
            if time.monotonic() >= deadline:
                self.kill()
                raise Failed(f"passed its time limit of {limit:.0f} s")
            if watch:
                self.memory()
        try:
            good, result = self._pipe.recv()
        except (EOFError, OSError):
            self._log.seek(0)
            said = self._log.read()[-2000:].strip().splitlines()
            self.kill()
            raise Failed(f"its process ended: {said[-1] if said else 'without a word'}") from None
        if not good:
            raise Failed(result)
        return result

    def kill(self) -> None:
        """SIGKILL, as a crash does it: to this process alone, not to its children."""
        if self._alive:
            self._alive = False
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self._pipe.close()
            self._log.close()

    def memory(self) -> dict[str, int]:
        """The peaks so far: memory of its own, shared memory and descriptors, of it and of its children."""
        for who, pids in (("trainer", [self.pid]), ("writer", descendants(self.pid))):
            found = [usage(pid) for pid in pids]
            for name in ("private", "shared", "descriptors"):
                total = sum(one[name] for one in found)
                self.peak[f"{who} {name}"] = max(total, self.peak.get(f"{who} {name}", 0))
        return dict(self.peak)


def _serve(pipe: multiprocessing.connection.Connection, make: Callable[..., object], args: tuple) -> None:
    """Be a worker; never returns."""
    made: object = None
    try:
        while True:
            name, values = pipe.recv()
            try:
                if made is None:
                    made = make(*args)
                result = getattr(made, name)(*values) if name else made
                pipe.send((True, result))
            except Exception as error:  # noqa: BLE001 - a peer that fails is a result
                traceback.print_exc()
                lines = str(error).strip().splitlines() or [""]
                pipe.send((False, f"{type(error).__name__}: {lines[0][:160]}"))
    except (EOFError, OSError):
        pass
    finally:
        os._exit(0)


def in_worker(function: Callable[..., Any], *args: Any, limit: float = 900) -> Any:
    """What `function` returns, called in a fresh process."""
    with Worker(function, *args) as worker:
        return worker.call(limit=limit)


_stopped: list[int] = []


def _stop(number: int, _frame: object) -> None:
    """Python ignores what is raised in some places, such as those around a fork: so it is noted, too."""
    _stopped.append(number)
    sys.exit(128 + number)


def adopt_orphans() -> None:
    """Let the children of killed workers become ours, so that `reap` finds them and their time counts.

    And let SIGTERM end us as Ctrl-C does: workers and files are removed.
    """
    signal.signal(signal.SIGTERM, _stop)
    _libc.prctl(_SUBREAPER, 1, 0, 0, 0)


def reap() -> None:
    """End everything that workers have left behind."""
    for pid in descendants(os.getpid()):
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    with suppress(ChildProcessError):
        while os.waitpid(-1, 0)[0]:
            pass


def descendants(pid: int) -> list[int]:
    found: list[int] = []
    for above in [pid]:
        with suppress(OSError):
            for thread in os.listdir(f"/proc/{above}/task"):
                with open(f"/proc/{above}/task/{thread}/children") as file:
                    children = [int(word) for word in file.read().split()]
                for child in children:
                    found += [child, *descendants(child)]
    return found


def usage(pid: int | str = "self") -> dict[str, int]:
    """Bytes of a process's own memory (RssAnon + RssFile), of shared memory, and its descriptors."""
    found = {"private": 0, "shared": 0, "descriptors": 0}
    with suppress(OSError):
        with open(f"/proc/{pid}/status") as file:
            sizes = {line.split()[0]: int(line.split()[1]) * 1024 for line in file if line.startswith("Rss")}
        found["private"] = sizes.get("RssAnon:", 0) + sizes.get("RssFile:", 0)
        found["shared"] = sizes.get("RssShmem:", 0)
        found["descriptors"] = len(os.listdir(f"/proc/{pid}/fd"))
    return found


def peak_private_bytes(work: Callable[[], object]) -> int:
    """How far `work` raises this process's RssAnon at its highest, over what it was before."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")

    def now(name: str) -> int:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name + ":"))

    before = now("VmHWM") - now("RssFile")
    work()
    return now("VmHWM") - now("RssFile") - before


# -- the control: is this machine quiet? -------------------------------------------------------------


class Control:
    """The same work again and again, on all cores and on the disk: when it drifts, others disturb us."""

    def __init__(self, folder: str, *, small: bool) -> None:
        self.path = os.path.join(folder, "control")
        self.size, self.times = (MIB, 1) if small else (128 * MIB, 32)

    def settle(self) -> None:
        """Let nothing that is on its way to the disk disturb the next row."""
        if self.times > 1:
            os.sync()

    def take(self) -> dict[str, float]:
        from limits import direct_write

        data = bytes(8 * MIB)
        before, mine = _busy_seconds(), sum(os.times()[:4])
        start = time.perf_counter()
        pids = []
        for _ in range(os.cpu_count() or 1):
            pid = os.fork()
            if not pid:
                for _ in range(self.times):
                    zlib.crc32(data)
                os._exit(0)
            pids.append(pid)
        for pid in pids:
            os.waitpid(pid, 0)
        processor = time.perf_counter() - start
        foreign = _busy_seconds() - before - (sum(os.times()[:4]) - mine)
        start = time.perf_counter()
        direct_write(self.path, self.size, min(16 * MIB, self.size))
        disk = time.perf_counter() - start
        os.remove(self.path)
        share = max(0.0, foreign - 0.02) / processor / (os.cpu_count() or 1)  # /proc/stat counts in 10 ms
        return {"cpu": processor, "disk": disk, "others": share}


def _busy_seconds() -> float:
    """Seconds of all processors that were not idle since the machine started."""
    with open("/proc/stat") as file:
        user, nice, system, _, _, irq, soft, steal = map(int, file.readline().split()[1:9])
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


# -- results -----------------------------------------------------------------------------------------


@dataclass
class Row:
    """One line of a table: what takes a turn in each round.

    Attributes:
        name: As the table shows it.
        turn: Called once a round with a time limit in seconds; returns figures by name.
        config: How the peer was configured.
        lacks: What the peer does not do that Milepost does, or the other way round.
        error: Why it cannot run at all; then `turn` is never called.
        rounds: How many turns it takes at most, if not all.
    """

    name: str
    turn: Callable[[float], dict[str, float]] = lambda _: {}
    config: str = ""
    lacks: str = ""
    error: str = ""
    rounds: int = 0


@dataclass
class Bar:
    """What is asked of a row: a figure against another row's, at most `limit` times as much.

    With an empty `base`, `limit` is the figure's own. Of several figures that begin with `base_figure` and a
    comma, the best one counts.
    """

    row: str
    figure: str
    limit: float
    base: str = ""
    base_figure: str = ""


@dataclass
class Group:
    """One table.

    Attributes:
        title: Its heading.
        rows: They take turns.
        notes: What a reader has to know.
        bars: What is asked for.
        size: Bytes of the state, or 0.
        limit: Seconds that a row's turn may take.
        ours: The row that the others are compared with.
        x: The curve that this is a point of, and where.
    """

    title: str
    rows: list[Row]
    notes: str = ""
    bars: list[Bar] = field(default_factory=list)
    size: int = 0
    limit: float = 300
    ours: str = "milepost"
    x: tuple[str, float] | None = None


class Results:
    """The JSON file: written after every turn, so that nothing that was measured is lost."""

    def __init__(self, path: str, *, resume: bool) -> None:
        self.path, self.resume = path, resume
        self.content: dict[str, Any] = {"groups": {}}
        if os.path.exists(path):
            with open(path) as file:
                self.content = json.load(file)
        self.load = os.getloadavg()[0]

    def run(self, name: str, group: Group, rounds: int, control: Control) -> None:
        """Let the rows of a group take turns, in an order that rotates."""
        old = self.content["groups"].get(name)
        again = {"title": group.title, "rounds": rounds, "bytes": group.size, "about": about()}
        again |= {"x": group.x} if group.x else {}
        if not (self.resume and old and old["about"]["commit"] == again["about"]["commit"]):
            old = {"rows": {}, "control": [], "loads": []}
        entry = {
            **old,
            **again,
            "notes": group.notes,
            "ours": group.ours,
            "bars": [vars(b) for b in group.bars],
        }
        entry["loads"] = [*entry["loads"], self.load]
        entry["disturbed"] = "it was not finished"
        self.content["groups"][name] = entry
        for row in group.rows:
            kept = entry["rows"].setdefault(row.name, {"rounds": [], "error": ""})
            kept.update(config=row.config, lacks=row.lacks)
            kept["error"] = kept["error"] or row.error
        for turn in range(rounds):
            entry["control"].append(control.take())
            shift = turn % max(len(group.rows), 1)
            for row in (*group.rows[shift:], *group.rows[:shift]):
                if _stopped:
                    sys.exit(128 + _stopped[0])
                kept = entry["rows"][row.name]
                if kept["error"] or len(kept["rounds"]) > turn or turn >= (row.rounds or rounds):
                    continue
                start = time.perf_counter()
                try:
                    kept["rounds"].append(row.turn(group.limit))
                except Failed as failure:
                    kept["error"] = str(failure)
                    kept["rounds"].append(failure.found)
                reap()
                control.settle()
                seconds = time.perf_counter() - start
                kept["took"] = kept.get("took", 0.0) + seconds
                print(
                    f"  {name} {turn + 1}/{rounds} {row.name}: {kept['error'] or f'{seconds:.1f} s'}",
                    flush=True,
                )
                self.write()
        entry["control"].append(control.take())
        entry["disturbed"] = disturbed(entry)
        self.write()

    def write(self) -> None:
        os.makedirs(os.path.dirname(os.path.abspath(self.path)), exist_ok=True)
        with open(self.path + ".new", "w") as file:
            json.dump(self.content, file, indent=1)
            file.write("\n")
        os.replace(self.path + ".new", self.path)


def about() -> dict[str, Any]:
    """The machine, the versions, the date and the commit."""
    with open("/proc/meminfo") as file:
        memory = int(file.readline().split()[1]) / (1 << 20)
    with open("/proc/cpuinfo") as file:
        models = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    packages = ("milepost", "torch", "safetensors", "torch_checkpointing", "moonclip", "ravex")
    versions = {"Python": platform.python_version()}
    for package in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)

    def git(*words: str) -> str:  # of what is measured: results are files of this repository, too
        command = ["git", *words, "--", ".", "../src"]
        here = os.path.dirname(os.path.abspath(__file__))
        return subprocess.run(command, cwd=here, check=False, capture_output=True, text=True).stdout.strip()

    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores ({models[0] if models else 'unknown'}), "
        f"{memory:.0f} GiB of memory, Linux {platform.release()}",
        "versions": versions,
        "date": dt.datetime.now(dt.UTC).strftime("%Y-%m-%d"),
        "commit": git("log", "-1", "--format=%h") + ("-dirty" if git("status", "--porcelain") else ""),
    }


@contextmanager
def scratch(folder: str | None) -> Iterator[str]:
    with tempfile.TemporaryDirectory(dir=os.path.abspath(folder or "."), prefix="bench-") as made:
        try:
            yield made
        finally:
            reap()
