"""Kill a training run in the middle of a save, resume it, and compare with a run that was left alone.

    python examples/demo.py [--folder demo-run] [--keep]

The exit code is 0 only if the final weights are the same bit for bit. Nothing is slowed down or staged:
the demo watches the file that the trainer is writing, and sends SIGKILL between a tenth and nine tenths.
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
SAVES_BEFORE_THE_KILL = 2
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


def kill_in_a_save(folder: Path, total: int) -> Kill:
    """Start the trainer and kill it while it saves; start it again if the moment was missed."""
    while len(committed(folder)) < STEPS // SAVE_EVERY:
        earlier = partials(folder)
        trainer = start(folder)
        saving = ""
        while trainer.poll() is None:
            saving = next(iter(partials(folder) - earlier), "")
            written = written_bytes(folder / saving / DATA_FILE) if saving else 0
            if FEWEST * total <= written <= MOST * total and len(committed(folder)) >= SAVES_BEFORE_THE_KILL:
                trainer.send_signal(signal.SIGKILL)
                break
            time.sleep(POLL_SECONDS)
        print(trainer.communicate()[0], end="", flush=True)
        if trainer.returncode not in (0, -signal.SIGKILL):
            raise DemoError(f"the trainer ended with exit code {trainer.returncode}")
        written = written_bytes(folder / saving / DATA_FILE) if saving else 0
        kill = Kill(saving.split(".")[1] if saving else "", written, total)
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


def show(folder: Path) -> None:
    """The story from beginning to end."""
    started = time.monotonic()
    straight, killed = folder / "straight", folder / "killed"

    print("1. Train without interruption.", flush=True)
    expected = finish(start(straight))

    print(
        "\n2. Train with the same seed, and kill the trainer (SIGKILL) in the middle of a save.", flush=True
    )
    total = (committed(straight)[-1] / DATA_FILE).stat().st_size
    kill = kill_in_a_save(killed, total)
    print(
        f"  killed while saving {kill.checkpoint}: "
        f"{kill.written / 2**20:.0f} of {kill.total / 2**20:.0f} MiB ({kill.share:.0%}) were written"
    )
    if milepost("ls", str(killed)) != 0 or milepost("verify", *map(str, committed(killed))) != 0:
        raise DemoError("the checkpoints before the kill are not all whole")

    print("\n3. Start the same command again: it resumes from the newest checkpoint.", flush=True)
    found = finish(start(killed))
    if milepost("ls", str(killed)) != 0 or milepost("verify", str(committed(killed)[-1])) != 0:
        raise DemoError("the checkpoints after resuming are not all whole")

    print("\n4. Compare.", flush=True)
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
