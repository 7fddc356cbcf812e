"""What is beside saving and loading: lost compute, starting up, and thousands of checkpoints in a folder."""

from __future__ import annotations

import compileall
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import peers
import torch
from cycle import Trainer
from harness import MIB, Bar, Group, Row, Worker, in_worker
from workloads import Workload

import milepost

COMMAND = os.path.join(os.path.dirname(sys.executable), "milepost")
BACKGROUND = [name for name, peer in peers.ALL.items() if peer.background and not peer.objects]


# -- lost compute ------------------------------------------------------------------------------------


class Computer(Trainer):
    """A trainer that multiplies matrices while it saves."""

    def lost(self, threads: int) -> dict[str, float]:
        """Seconds of compute that a save costs: its stall, and what its writing slows down."""
        torch.set_num_threads(threads)
        matrix = torch.randn(512, 512)
        over = threading.Event()
        start = time.perf_counter()
        durable = self.peer.save(self.state)

        def wait() -> None:
            try:
                durable()
            finally:
                over.set()

        stall = time.perf_counter() - start
        threading.Thread(target=wait).start()
        done, elapsed = _multiply(matrix, over.is_set)
        self.peer.retire()
        end = time.perf_counter() + elapsed
        alone, elapsed_alone = _multiply(matrix, lambda: time.perf_counter() >= end)
        slower = 1 - (done / elapsed) / (alone / elapsed_alone)
        name = f"{threads} of {os.cpu_count()} cores"
        return {f"lost, {name}": stall + slower * elapsed, f"slower, {name}": slower, f"for, {name}": elapsed}


def _multiply(matrix: torch.Tensor, done: Callable[[], bool]) -> tuple[int, float]:
    count, start = 0, time.perf_counter()
    while not count or not done():
        matrix @ matrix
        count += 1
    return count, time.perf_counter() - start


def lost(folder: str, *, small: bool) -> Group:
    names = [name for name in BACKGROUND if not small or name in ("milepost", "moonclip")]
    workload = Workload("1 GiB", 4 if small else 256, MIB // 16 if small else 4 * MIB)
    cores = os.cpu_count() or 1

    def row(name: str) -> Row:
        peer = peers.ALL[name]
        path = os.path.join(folder, "lost")

        def turn(limit: float) -> dict[str, float]:
            found: dict[str, float] = {}
            with Worker(Computer, name, workload) as worker:
                worker.call("open", path, limit=limit)
                worker.call("save", limit=limit)
                for threads in sorted({max(cores - 1, 1), cores}):
                    found |= worker.call("lost", threads, limit=limit)
            shutil.rmtree(path)
            return found

        return Row(name, turn, peer.config, peer.lacks, peers.missing(peer))

    size = workload.count * workload.each
    bars = [
        Bar("milepost", f"slower, {max(cores - 1, 1)} of {cores} cores", 0.05),
        Bar("milepost", f"lost, {cores} of {cores} cores", 0.25 * size / (1 << 30) + 0.15),
    ]
    notes = (
        "A loop of matrix products (512 x 512) runs while a save is under way, then as long without one. "
        "Lost: the save's stall, and the seconds by which its writing slows the loop down."
    )
    return Group("Lost compute, 1 GiB in 256 tensors", [row(name) for name in names], notes, bars, size, 90)


# -- starting up -------------------------------------------------------------------------------------


class Opener:
    """How long it takes until a library is ready to save."""

    def __init__(self, name: str, folder: str) -> None:
        self.peer = peers.ALL[name](folder)

    def open(self) -> float:
        start = time.perf_counter()
        self.peer.open()
        return time.perf_counter() - start


def _command(name: str, *command: str) -> Row:
    def turn(limit: float) -> dict[str, float]:
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=limit)
        return {"seconds": time.perf_counter() - start}

    return Row(name, turn, " ".join(command[1:]) if len(command) < 5 else "")


def starts(folder: str, *, small: bool) -> Group:
    compileall.compile_dir(os.path.dirname(milepost.__file__), quiet=2)  # as an installed package is

    def ready(name: str) -> Row:
        def turn(limit: float) -> dict[str, float]:
            with Worker(Opener, name, os.path.join(folder, "starts")) as worker:
                return {"seconds": worker.call("open", limit=limit)}

        return Row(f"{name}: ready to save", turn, peers.ALL[name].config, "", peers.missing(peers.ALL[name]))

    rows = [
        _command("limits", sys.executable, "-c", "pass"),
        _command("import typer, rich", sys.executable, "-c", "import typer, rich"),
        _command("import torch", sys.executable, "-c", "import torch"),
        _command("milepost --help", COMMAND, "--help"),
        _command("milepost ls --help", COMMAND, "ls", "--help"),
        *(
            ready(name)
            for name in ("milepost", "torch _experimental", "torch_checkpointing")[: 1 if small else 3]
        ),
    ]
    bars = [Bar("milepost: ready to save", "seconds", 4.0, "limits")]
    return Group("Starting up", rows[:2] + rows[3:] if small else rows, "", bars, limit=60)


# -- many checkpoints --------------------------------------------------------------------------------


def make_many(folder: str, count: int, tensors: int) -> None:
    """`count` checkpoints of a few bytes, without fsync to make them quickly, and one of many tensors."""
    real, os.fsync = os.fsync, lambda _: None
    with milepost.make_sync_checkpointer() as checkpointer:
        state = {"w": torch.zeros(4)}
        for step in range(count):
            checkpointer.save(os.path.join(folder, "run", f"step-{step}"), state, step=step)
        large = Workload("", tensors, 16 * 1024).build()
        checkpointer.save(os.path.join(folder, "large"), large, step=1)
    os.fsync = real


def read_manifests(folder: str) -> float:
    start = time.perf_counter()
    for entry in os.scandir(folder):
        with open(os.path.join(entry.path, "manifest.json"), "rb") as file:
            file.read()
    return time.perf_counter() - start


def listing(folder: str, *, small: bool) -> Group:
    count, tensors = (20, 50) if small else (10_000, 100_000)
    place = os.path.join(folder, "listing")
    run, large = os.path.join(place, "run"), os.path.join(place, "large")

    def made(row: Row) -> Row:
        work = row.turn

        def turn(limit: float) -> dict[str, float]:
            if not os.path.exists(large):
                in_worker(make_many, place, count, tensors)
            return work(limit)

        row.turn = turn
        return row

    middle = os.path.join(run, f"step-{count // 2}")
    rows = [
        Row("limits", lambda _: {"seconds": read_manifests(run)}, f"read {count:,} manifest.json, in Python"),
        _command(f"milepost ls, {count:,} steps", COMMAND, "ls", run),
        _command(f"milepost ls --json, {count:,} steps", COMMAND, "ls", "--json", run),
        _command(f"milepost show, one of {count:,}", COMMAND, "show", middle),
        _command(f"milepost show --depth 1, {tensors:,} tensors", COMMAND, "show", "--depth", "1", large),
        _command(f"milepost doctor, {count:,} steps", COMMAND, "doctor", run),
    ]
    notes = (
        "Commands are timed with their start-up; the files have just been made, so the page cache has them."
    )
    return Group(f"A folder of {count:,} checkpoints", [made(row) for row in rows], notes, limit=120)


def all_groups(folder: str, *, small: bool) -> dict[str, Callable[[], Group]]:
    found: dict[str, Any] = {"lost": lost, "starts": starts, "listing": listing}
    return {name: lambda make=make: make(folder, small=small) for name, make in found.items()}
