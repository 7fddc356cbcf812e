"""What happens to a checkpoint: it is saved, its trainer dies, new processes load it.

One turn of a row makes new processes, in this order:

1. A trainer builds the state and saves it: the *first* save, then *later* ones after steps of training. A
   library that keeps nothing between saves does not need later ones, as all its saves are alike. The trainer
   waits until each is durable. It is killed with SIGKILL right after the last one; so the page cache holds
   what that save has left there.
2. A new process with a state of its own, all memory touched, loads: the *restart*.
3. In full runs another process loads the same: *again*. The page cache holds what the second one left there.
4. The last of these processes also loads *cold*: after fsync and POSIX_FADV_DONTNEED, which the host of a
   virtual machine does not see.
5. *Warm* is a load by a new process while the page cache holds every byte. The last load before the cold one
   was that, if the page cache held all of it before. If not, the checkpoint is copied with `cp -r`, as users
   do to keep or to move one: then the page cache holds all of the copy, and one more process loads that.
6. In full runs the trainer also loads right after a save, other ones prepare before they save or are watched
   for memory.
"""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import peers
from harness import Failed, Row, Worker
from limits import bytes_in, cached_share, drop_cache, sync
from workloads import Workload, blank, sample


class Trainer:
    """In a process of its own: a state, and one library to save and load it with."""

    rank = 0
    peers = peers.ALL

    def __init__(self, name: str, workload: Workload) -> None:
        self.workload, self.library = workload, self.peers[name]
        if self.library.objects:
            self.model, self.optimizer = workload.objects()  # type: ignore[attr-defined]
        self.state = self._state()

    def _state(self) -> Any:
        if self.library.objects:
            return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return self.workload.build()

    def built(self) -> None:
        """The state is there."""

    def open(self, folder: str, loads: bool = False) -> None:  # noqa: FBT001, FBT002 - crosses a pipe
        """Get the library ready, to save or to load what is in the folder."""
        self.peer = self.library(folder)
        (self.peer.open_to_load if loads else self.peer.open)()
        if self.peer.objects:
            self.peer.track(self.model, self.optimizer)
        if loads:
            self.peer.find()

    def meet(self) -> None:
        """Start at the same time as the other ranks."""

    def prepare(self) -> dict[str, float]:
        start = time.perf_counter()
        wait = self.peer.prepare(self.state)
        called = time.perf_counter() - start
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
            self.state = self._state()
        if not way.startswith("no template") and sample(self.state) != wanted[self.rank]:
            raise ValueError("what was loaded is not what was saved")
        return {"seconds": seconds, "read": _read_bytes() - before, "cached": cached}

    def cold(self) -> None:
        gc.collect()  # pages that somebody maps stay
        drop_cache(self.peer.path())
        self.meet()
        if cached_share(self.peer.path()) > 0.01:
            raise ValueError("the page cache still holds the checkpoint")

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
        rounds: int = 0,
        known: dict[str, type[peers.Peer]] = peers.ALL,
    ) -> None:
        self.peer, self.workload = known[name], workload
        self.folder = os.path.join(folder, "".join(c if c.isalnum() else "-" for c in name))
        self.full, self.rounds = full, rounds
        self.measure_loads = not self.peer.loads_as if loads is None else loads
        self.watched = False

    def row(self) -> Row:
        error = peers.missing(self.peer)
        return Row(self.peer.name, self.turn, self.peer.config, self.peer.lacks, error, self.rounds)

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

    def _build(self) -> Worker:
        """A new process, which has begun to build a state of its own."""
        worker = Worker(Trainer, self.peer.name, self.workload)
        worker.begin("built")
        return worker

    @contextmanager
    def _trainer(
        self, to_load: str = "", meanwhile: Callable[[], object] = lambda: None, **how: Any
    ) -> Iterator[Worker]:
        """A new process with a state of its own, to save, or to load what is in a folder; killed at the end.

        `meanwhile` is called while it builds the state.
        """
        with self._build(**how) as worker:
            meanwhile()
            worker.end(limit=self._left())
            worker.call("open", to_load or self.folder, bool(to_load), limit=self._left())
            yield worker

    def _turn(self, found: dict[str, float]) -> None:
        with self._trainer() as trainer:
            saves = [trainer.call("save", limit=self._left())]
            found |= {f"first {name}": saves[0][name] for name in ("stall", "durable")}
            if self.full:
                saves.append(trainer.call("save", limit=self._left()))
                if self.measure_loads and not self.peer.objects:
                    saved = trainer.call("sample")
                    found["same process"] = trainer.call("load", saved, limit=self._left())["seconds"]
            if self.full or self.peer.keeps:
                saves.append(trainer.call("save", limit=self._left()))
            later = saves[1:] if self.peer.keeps else saves
            for name in ("stall", "durable", "bytes"):
                found[name] = sum(one[name] for one in later) / len(later)
            saved = trainer.call("sample", limit=self._left())
        if self.measure_loads:
            self._loads(found, saved)
        if self.full and self.peer.prepares:
            self._prepared(found)
        if self.full and not self.watched:
            self.watched = True
            self._watched(found)

    def _loads(self, found: dict[str, float], saved: dict[int, int]) -> str:
        """Measure the loads; returns where the checkpoint is that was loaded warm."""

        def note(name: str, process: Worker) -> None:
            one = process.call("load", saved, limit=self._left())
            found[name] = one["seconds"]
            found[f"{name} read"] = one["read"]
            found[f"{name} cached"] = one["cached"]

        def cold(process: Worker) -> None:
            process.call("cold")
            note("cold", process)
            if self.full and getattr(self.peer, "verify", None):
                process.call("cold")
                found["verify"] = process.call("verify", limit=self._left())

        def more(process: Worker) -> None:
            """Load in other ways after the warm load."""
            for way in process.call("more_loads") if self.full else ():
                found[f"warm, {way}"] = process.call("load", saved, way, limit=self._left())["seconds"]

        path, names = self.folder, ("restart", "again") if self.full else ("restart",)
        for name in names:
            with self._trainer(path) as process:
                note(name, process)
                last = name == names[-1]
                if last and found[f"{name} cached"] == 1:
                    found |= {f"warm{what}": found[name + what] for what in ("", " read", " cached")}
                    more(process)
                if last and not self.peer.objects:  # these load once a process
                    cold(process)
        if self.peer.objects:
            with self._trainer(path) as process:
                cold(process)
        if "warm" not in found:
            path = self.folder + "-copy"
            with self._trainer(path, meanwhile=lambda: self._copy(path)) as process:
                note("warm", process)
                more(process)
        return path

    def _copy(self, path: str) -> None:
        """As users copy a checkpoint; without the search for holes, which takes longer than the copy."""
        subprocess.run(["cp", "-r", "--sparse=never", self.folder, path], check=True)
        sync(path)

    def _prepared(self, found: dict[str, float]) -> None:
        """A first save after `prepare`, in a fresh process."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with self._trainer() as trainer:
            found |= trainer.call("prepare", limit=self._left())
            found["prepared stall"] = trainer.call("save", limit=self._left())["stall"]

    def _watched(self, found: dict[str, float]) -> None:
        """Memory and descriptors, in processes of their own, as looking takes time."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with self._trainer() as trainer:
            before = trainer.memory()
            for _ in range(2):
                trainer.call("save", limit=self._left(), watch=True)
            found |= {f"save: {name}": value for name, value in trainer.peak.items()}
            found["save: trainer private"] -= before["trainer private"]
            saved = trainer.call("sample")
        if self.measure_loads:
            with self._trainer(self.folder) as trainer:
                trainer.call("cold")
                before = trainer.memory()
                trainer.call("load", saved, limit=self._left(), watch=True)
                found["load: trainer private"] = trainer.peak["trainer private"] - before["trainer private"]
