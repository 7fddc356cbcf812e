"""What happens to a checkpoint: it is saved, its trainer dies, new processes load it.

One turn of a row makes new processes, in this order:

1. A trainer builds the state and saves it: the *first* save, then *later* ones after steps of training. It
   waits until each is durable. It is killed with SIGKILL right after the last one; so the page cache holds
   what that save has left there.
2. A new process with a state of its own, all memory touched, loads: the *restart*.
3. In full runs another process loads the same: *again*. The page cache holds what the second one left there.
4. The checkpoint is copied with `cp -r`, as users do to keep or to move one. Then the page cache holds all
   of the copy, whatever the library, and a new process loads it: *warm*. Then another one loads it *cold*:
   after fsync and POSIX_FADV_DONTNEED, which the host of a virtual machine does not see.
5. In full runs more processes prepare before they save, load right after a save, and are watched for memory.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from typing import Any

import peers
from harness import Failed, Row, Worker
from limits import bytes_in, cached_share, drop_cache
from workloads import Workload, blank, sample


class Trainer:
    """In a process of its own: a state, and one library to save and load it with."""

    rank = 0
    peers = peers.ALL

    def __init__(self, name: str, workload: Workload, folder: str, loads: bool) -> None:  # noqa: FBT001
        self.workload = workload
        self.peer = self.peers[name](folder)
        if self.peer.objects:
            self.model, self.optimizer = workload.objects()  # type: ignore[attr-defined]
        self.state = self._state(workload)
        (self.peer.open_to_load if loads else self.peer.open)()
        if self.peer.objects:
            self.peer.track(self.model, self.optimizer)
        if loads:
            self.peer.find()

    def _state(self, workload: Workload) -> Any:
        if self.peer.objects:
            return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return workload.build()

    def ready(self) -> None:
        """The state is there, and so is the library."""

    def meet(self) -> None:
        """Start at the same time as the other ranks."""

    def prepare(self) -> dict[str, float]:
        start = time.perf_counter()
        wait = self.peer.prepare(self.state)
        called = time.perf_counter() - start
        if wait is None:
            return {}
        wait()
        return {"prepare": called, "prepared": time.perf_counter() - start}

    def save(self) -> dict[str, float]:
        self.workload.step(self.state)
        self.peer.step()
        before = bytes_in(self.peer.folder)
        self.meet()
        start = time.perf_counter()
        durable = self.peer.save(self.state)
        stall = time.perf_counter() - start
        durable()
        total = time.perf_counter() - start
        self.meet()
        if not self.rank:
            self.peer.retire()
        self.meet()
        after = bytes_in(self.peer.folder)
        written = after - before if self.peer.path() == self.peer.folder else bytes_in(self.peer.path())
        return {"stall": stall, "durable": total, "bytes": written}

    def sample(self) -> dict[int, int]:
        return {self.rank: sample(self.state)}

    def load(self, wanted: dict[int, int], way: str = "") -> dict[str, float]:
        """Fill the state, which has touched memory, and compare a sample of it with what was saved."""
        blank(self.state)
        cached = cached_share(self.peer.path())
        before = _read_bytes()
        self.meet()
        start = time.perf_counter()
        (self.peer.more_loads(self.state)[way] if way else lambda: self.peer.load(self.state))()
        seconds = time.perf_counter() - start
        if self.peer.objects:  # its loads put other tensors into them
            self.state = self._state(self.workload)
        if not way.startswith("no template") and sample(self.state) != wanted[self.rank]:
            raise ValueError("what was loaded is not what was saved")
        return {"seconds": seconds, "read": _read_bytes() - before, "cached": cached}

    def cold(self) -> None:
        drop_cache(self.peer.path())
        self.meet()

    def more_loads(self) -> list[str]:
        return [*self.peer.more_loads(self.state)]

    def verify(self) -> float:
        start = time.perf_counter()
        self.peer.verify()
        return time.perf_counter() - start


def _read_bytes() -> int:
    """What this process has had read from the disk."""
    with open("/proc/self/io") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("read_bytes"))


class Cycle:
    """One row of a table: a library, a workload, and a turn in each round."""

    def __init__(
        self,
        name: str,
        workload: Workload,
        folder: str,
        *,
        full: bool,
        loads: bool | None = None,
        known: dict[str, type[peers.Peer]] = peers.ALL,
    ) -> None:
        self.peer, self.workload = known[name], workload
        self.folder = os.path.join(folder, "".join(c if c.isalnum() else "-" for c in name))
        self.full, self.later = full, 2 if full else 1
        self.measure_loads = not self.peer.loads_as if loads is None else loads
        self.watched = False

    def row(self) -> Row:
        error = peers.missing(self.peer)
        return Row(self.peer.name, self.turn, self.peer.config, self.peer.lacks, error)

    def turn(self, limit: float) -> dict[str, float]:
        self.deadline, self.found = time.monotonic() + limit, {}
        try:
            self._turn(self.found)
            return self.found
        except Failed as failure:
            failure.found = self.found
            raise
        finally:
            for folder in (self.folder, self.folder + "-copy"):
                shutil.rmtree(folder, ignore_errors=True)

    def _left(self) -> float:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise Failed("passed its time limit")
        return left

    def _trainer(self, to_load: str = "") -> Worker:
        """A new process with a state of its own, to save, or to load what is in a folder."""
        worker = Worker(Trainer, self.peer.name, self.workload, to_load or self.folder, bool(to_load))
        worker.call("ready", limit=self._left())
        return worker

    def _turn(self, found: dict[str, float]) -> None:
        with self._trainer() as trainer:
            first = trainer.call("save", limit=self._left())
            found |= {"first stall": first["stall"], "first durable": first["durable"]}
            later = [trainer.call("save", limit=self._left()) for _ in range(self.later)]
            for name in ("stall", "durable", "bytes"):
                found[name] = sum(one[name] for one in later) / len(later)
            saved = trainer.call("sample", limit=self._left())
        if self.measure_loads:
            self._loads(found, saved)
        if self.full:
            self._more(found)

    def _loads(self, found: dict[str, float], saved: dict[int, int]) -> None:
        def note(name: str, process: Worker) -> None:
            one = process.call("load", saved, limit=self._left())
            found[name] = one["seconds"]
            found[f"{name} read"] = one["read"]
            found[f"{name} cached"] = one["cached"]

        for name in ("restart", "again") if self.full else ("restart",):
            with self._trainer(self.folder) as process:
                note(name, process)
        copy = self.folder + "-copy"
        subprocess.run(["cp", "-r", self.folder, copy], check=True)
        os.sync()
        with self._trainer(copy) as process:
            note("warm", process)
            more = process.call("more_loads") if self.full else []
            for way in more:
                found[f"warm, {way}"] = process.call("load", saved, way, limit=self._left())["seconds"]
        with self._trainer(copy) as process:
            process.call("cold")
            note("cold", process)
            if self.full and getattr(self.peer, "verify", None):
                process.call("cold")
                found["verify"] = process.call("verify", limit=self._left())

    def _more(self, found: dict[str, float]) -> None:
        """What needs fresh processes: after `prepare`, a load in the process that has saved, memory."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with self._trainer() as trainer:
            prepared = trainer.call("prepare", limit=self._left())
            first = trainer.call("save", limit=self._left())
            if prepared:
                found |= prepared | {"prepared stall": first["stall"]}
            if self.measure_loads and not self.peer.objects:
                trainer.call("save", limit=self._left())
                saved = trainer.call("sample")
                found["same process"] = trainer.call("load", saved, limit=self._left())["seconds"]
        if self.watched:
            return
        self.watched = True
        shutil.rmtree(self.folder, ignore_errors=True)
        with self._trainer() as trainer:
            before = trainer.memory()
            for _ in range(2):
                trainer.call("save", limit=self._left(), watch=True)
            for name, value in trainer.peak.items():
                found[f"save: {name}"] = value
            found["save: trainer private"] -= before["trainer private"]
            if self.measure_loads:
                saved = trainer.call("sample")
        if self.measure_loads:
            with self._trainer(self.folder) as trainer:
                trainer.call("cold")
                before = trainer.memory()
                trainer.call("load", saved, limit=self._left(), watch=True)
                found["load: trainer private"] = trainer.peak["trainer private"] - before["trainer private"]
