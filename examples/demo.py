"""Kill a training run twice in the middle of a save, and compare it with a run that was left alone.

    python examples/demo.py [--folder demo-run] [--keep]

The run saves in the background. First the trainer and its checkpoint process are killed, as when a machine
dies: the save is gone, everything before it is whole. Then the trainer alone is killed: the checkpoint
process finishes the save. The exit code is 0 only if the final weights are the same bit for bit. Nothing
is slowed down or arranged: the demo watches the file that is being written, and sends SIGKILL when between
a tenth and nine tenths of its bytes are there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

STEPS, SAVE_EVERY = 30, 6
FEWEST, MOST = 0.1, 0.9
POLL_SECONDS = 0.0005
DATA_FILE = "checkpoint_0.pt"
TRAINER = Path(__file__).with_name("train_digits.py")


class DemoError(Exception):
    """What was to be shown could not be shown."""


@dataclass
class Kill:
    """How far the save had come when its process was dead."""

    checkpoint: str
    written: int
    total: int
    writer: int

    @property
    def share(self) -> float:
        """The part of the bytes that had been written."""
        return self.written / self.total


def start(folder: Path) -> subprocess.Popen[str]:
    """Start the trainer on a folder; its output goes to ours and, by a pipe, to `finish`."""
    variables = os.environ | {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE", "MKL_DYNAMIC": "FALSE"}
    command = [sys.executable, str(TRAINER), str(folder), f"--steps={STEPS}", f"--save-every={SAVE_EVERY}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=variables)


def finish(trainer: subprocess.Popen[str]) -> str:
    """Print what the trainer prints until it ends; return the fingerprint of its weights."""
    fingerprint = ""
    assert trainer.stdout is not None
    for line in trainer.stdout:
        print(line, end="", flush=True)
        if line.startswith("  weights "):
            fingerprint = line.split()[1]
    if trainer.wait() != 0 or not fingerprint:
        raise DemoError(f"the trainer ended with exit code {trainer.returncode}")
    return fingerprint


def committed(folder: Path) -> list[Path]:
    """The committed checkpoints, oldest first."""
    found = [path for path in folder.glob("step-*") if (path / "manifest.json").exists()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def partials(folder: Path) -> set[str]:
    """The names of the hidden folders of saves that have not committed."""
    names = os.listdir(folder) if folder.exists() else ()
    return {name for name in names if name.startswith(".") and name.endswith(".partial")}


def written_bytes(file: Path) -> int:
    """How many bytes there are in a file by now; 0 if it does not exist."""
    try:
        status = file.stat()
    except FileNotFoundError:
        return 0
    return min(status.st_size, status.st_blocks * 512)


def writer_of(trainer: int) -> int:
    """The pid of a trainer's checkpoint process; 0 if it has none."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == trainer and b"milepost.background.writer_main" in (path / "cmdline").read_bytes():
                return int(path.name)
        except (OSError, ValueError):
            continue  # it ended meanwhile
    return 0


def kill_in_a_save(folder: Path, total: int, *, after: int, writer_too: bool) -> Kill:
    """Start the trainer and kill it while it saves; start it again if the moment was missed.

    Args:
        folder: Its folder.
        total: Bytes of a data file.
        after: How many checkpoints must be committed before.
        writer_too: Kill its checkpoint process as well.
    """
    while len(committed(folder)) < STEPS // SAVE_EVERY:
        earlier = partials(folder)
        trainer = start(folder)
        saving, writer, written = "", 0, 0
        while trainer.poll() is None:
            writer = writer or writer_of(trainer.pid)
            saving = next(iter(partials(folder) - earlier), "")
            written = written_bytes(folder / saving / DATA_FILE) if saving else 0
            if FEWEST * total <= written <= MOST * total and len(committed(folder)) >= after:
                trainer.send_signal(signal.SIGKILL)
                if writer_too and writer:
                    os.kill(writer, signal.SIGKILL)
                break
            time.sleep(POLL_SECONDS)
        print(trainer.communicate()[0], end="", flush=True)
        if trainer.returncode not in (0, -signal.SIGKILL):
            raise DemoError(f"the trainer ended with exit code {trainer.returncode}")
        if writer_too:  # what the dead left; the living one goes on writing
            written = written_bytes(folder / saving / DATA_FILE) if saving else 0
        kill = Kill(saving.split(".")[1] if saving else "", written, total, writer)
        if trainer.returncode != 0 and FEWEST <= kill.share <= MOST:
            return kill
        print(f"  missed the moment ({kill.share:.0%} written): again at the next save", flush=True)
    raise DemoError("each save was over before it could be killed")


def milepost(*arguments: str) -> int:
    """Run a command of milepost in the terminal, as a user would."""
    print(f"\n  $ milepost {' '.join(arguments)}", flush=True)
    return subprocess.run(
        [str(Path(sys.executable).with_name("milepost")), *arguments], check=False
    ).returncode


def compare(one: Path, other: Path) -> tuple[int, int, list[str]]:
    """How many tensors and other values two data files hold, read by torch alone, and which differ."""
    import torch

    def walk(value, path=""):
        if isinstance(value, dict):
            for key, item in value.items():
                yield from walk(item, f"{path}.{key}")
        elif isinstance(value, list | tuple):
            for number, item in enumerate(value):
                yield from walk(item, f"{path}[{number}]")
        else:
            yield path, value

    def same(a, b):
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            return a.shape == b.shape and torch.equal(
                *(x.contiguous().view(-1).view(torch.uint8) for x in (a, b))
            )
        return type(a) is type(b) and a == b

    first = dict(walk(torch.load(one / DATA_FILE, mmap=True)))
    second = dict(walk(torch.load(other / DATA_FILE, mmap=True)))
    names = first.keys() | second.keys()
    different = [n for n in names if n not in first or n not in second or not same(first[n], second[n])]
    tensors = sum(isinstance(value, torch.Tensor) for value in first.values())
    return tensors, len(names) - tensors, sorted(different)


def wait_for_end(pid: int) -> None:
    """Wait until a process that is not our child has ended."""
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists():
        if time.monotonic() > deadline:
            raise DemoError("the checkpoint process does not end")
        time.sleep(0.01)


def show(folder: Path) -> None:
    """The story from beginning to end."""
    started = time.monotonic()
    straight, killed = folder / "straight", folder / "killed"

    print("1. Train without interruption.", flush=True)
    expected = finish(start(straight))

    print("\n2. The same seed again; kill trainer and checkpoint process (SIGKILL) amid a save.", flush=True)
    total = (committed(straight)[-1] / DATA_FILE).stat().st_size
    kill = kill_in_a_save(killed, total, after=1, writer_too=True)
    print(
        f"  killed while saving {kill.checkpoint}: "
        f"{kill.written / 2**20:.0f} of {kill.total / 2**20:.0f} MiB ({kill.share:.0%}) were written"
    )
    if milepost("ls", str(killed)) != 0 or milepost("verify", *map(str, committed(killed))) != 0:
        raise DemoError("the checkpoints before the kill are not all whole")

    print(
        "\n3. Start it again: it resumes. Kill the trainer alone, in the middle of a later save.", flush=True
    )
    kill = kill_in_a_save(killed, total, after=len(committed(killed)) + 1, writer_too=False)
    print(
        f"  killed while saving {kill.checkpoint}: "
        f"{kill.written / 2**20:.0f} of {kill.total / 2**20:.0f} MiB ({kill.share:.0%}) were written"
    )
    wait_for_end(kill.writer)
    if milepost("ls", str(killed)) != 0 or milepost("verify", str(committed(killed)[-1])) != 0:
        raise DemoError("the checkpoints after the second kill are not all whole")
    if committed(killed)[-1].name != kill.checkpoint:
        raise DemoError(f"{kill.checkpoint} was not finished after the trainer's death")
    print(f"\n  {kill.checkpoint} was finished without its trainer", flush=True)

    print("\n4. Start it once more: it resumes from there, and ends.", flush=True)
    found = finish(start(killed))
    if milepost("verify", *map(str, committed(killed))) != 0:
        raise DemoError("the checkpoints after resuming are not all whole")

    print("\n5. Compare.", flush=True)
    print(f"  uninterrupted     {expected}")
    print(f"  killed, resumed   {found}")
    tensors, others, different = compare(committed(straight)[-1], committed(killed)[-1])
    verdict = f"{len(different)} differ: {different[:5]}" if different else "all equal"
    print(f"  last checkpoints  {tensors} tensors and {others} other values (read by torch.load): {verdict}")
    if found != expected or different:
        raise DemoError("the two runs ended differently")
    print(f"\nThe weights are bit-identical. ({time.monotonic() - started:.0f} s)")


def main() -> int:
    """Run the demo in a new folder and remove it afterwards."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("demo-run"))
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints where they are")
    options = parser.parse_args()
    for name in ("straight", "killed"):
        shutil.rmtree(options.folder / name, ignore_errors=True)
    try:
        show(options.folder)
    except DemoError as error:
        print(f"\nFAILED: {error}", file=sys.stderr)
        return 1
    finally:
        if not options.keep:
            for name in ("straight", "killed"):
                shutil.rmtree(options.folder / name, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
