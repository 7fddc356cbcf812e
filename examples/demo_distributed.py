"""Train on 4 ranks, be killed, go on on 2, be killed, go on on one; compare the loss curves.

    python examples/demo_distributed.py [--folder demo-run/distributed] [--keep]

The trainer is train_fsdp2.py: a small transformer, sharded with FSDP2 on CPUs. All its ranks get SIGKILL, the
first time in the middle of a save (the demo watches the folder that is being written). The exit code is 0
only if every step of the killed run has the loss of the uninterrupted one: bit for bit wherever as many ranks
computed it, otherwise within a tolerance. Needs Linux, as it finds its processes in /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from demo import DemoError, committed, milepost, partials, written_bytes

TOLERANCE = 1e-5
"""How far two losses of the same step may be apart: forty units in the last place of a float32 near 3."""

TOKEN = f"MILEPOST_DEMO={secrets.token_hex(8)}"
"""In the environment of each process that the demo starts, and of those that they start."""

POLL_SECONDS = 0.001
WAIT_SECONDS = 60
DATA_FILES = "checkpoint_*.pt"
TRAINER = Path(__file__).with_name("train_fsdp2.py")
RUNS = ("straight", "killed", "copy")


def ours(*, ranks_only: bool = False) -> list[int]:
    """The pids of what the demo started: torchrun, the ranks, and their checkpoint processes."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile, or is another user's
            mine = TOKEN.encode() in (path / "environ").read_bytes().split(b"\0")
            if mine and not (
                ranks_only and b"milepost.background.writer_main" in (path / "cmdline").read_bytes()
            ):
                found.append(int(path.name))
    return sorted(found)


def kill(pids: list[int]) -> None:
    """SIGKILL for each of them, torchrun first, so that it does not see its ranks die."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def wait_until_gone(what: str, *, killing: bool = False) -> None:
    """Wait until nothing that the demo started is left."""
    deadline = time.monotonic() + WAIT_SECONDS
    while left := ours():
        if time.monotonic() > deadline:
            raise DemoError(f"{what}: processes {left} do not end")
        if killing:
            kill(left)
        time.sleep(0.01)


class Run:
    """A training run in a folder: its checkpoints, and the log of its losses.

    Args:
        folder: Where both are.
        steps: How many steps it has.
        every: How many steps there are between two saves.
    """

    def __init__(self, folder: Path, steps: int, every: int) -> None:
        self.folder, self.checkpoints, self.log = folder, folder / "checkpoints", folder / "loss.jsonl"
        self.steps, self.every = steps, every
        self.checkpoints.mkdir(parents=True)

    def start(self, ranks: int, *options: str) -> subprocess.Popen[bytes]:
        """Start the trainer; on one rank without torchrun."""
        name, value = TOKEN.split("=")
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command = [
            *(sys.executable, *(launcher if ranks > 1 else ()), str(TRAINER), "--resume", *options),
            *(f"--checkpoints={self.checkpoints}", f"--loss-log={self.log}"),
            *(f"--steps={self.steps}", f"--every={self.every}"),
        ]
        variables = os.environ | {name: value, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, env=variables, start_new_session=True)

    def finish(self, ranks: int, *options: str) -> None:
        """Train to the end."""
        check(self.start(ranks, *options).wait())
        wait_until_gone("training has ended")

    def losses(self) -> list[tuple[int, float, int]]:
        """Step, loss and number of ranks of each step so far, in the order in which they were made."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [(line["step"], line["loss"], line["ranks"]) for line in map(json.loads, lines)]

    def kill_in_a_save(self, ranks: int, *, after: int) -> str:
        """Start the trainer and kill all ranks while they save; again if the moment was missed.

        Args:
            ranks: How many.
            after: How many checkpoints must be committed before.

        Returns:
            The name of the checkpoint that was being saved.
        """
        while len(committed(self.checkpoints)) < self.steps // self.every - 1:
            earlier = partials(self.checkpoints)
            trainer, pids, saving = self.start(ranks), [], ""
            while trainer.poll() is None:
                if not pids and len(committed(self.checkpoints)) >= after:
                    pids = ours()
                saving = next(iter(partials(self.checkpoints) - earlier), "") if pids else ""
                if any(map(written_bytes, (self.checkpoints / saving).glob(DATA_FILES) if saving else ())):
                    kill(pids)
                    break
                time.sleep(POLL_SECONDS)
            check(trainer.wait(), killed=True)
            wait_until_gone("all ranks were killed", killing=True)
            name = saving.split(".")[1] if saving else ""
            if name and not (self.checkpoints / name).exists():
                return name
            print("  missed the moment: again at a later save", flush=True)
            after = len(committed(self.checkpoints)) + 1
        raise DemoError("each save was over before it could be killed")

    def kill_after_a_save(self, ranks: int) -> int:
        """Start the trainer, saving beside the training, and kill all ranks one step after a commit.

        Their checkpoint processes are left alone, and finish what they have.

        Returns:
            The last step that was made.
        """
        before, made = len(committed(self.checkpoints)), len(self.losses())
        trainer = self.start(ranks, "--async")
        while trainer.poll() is None:
            found = committed(self.checkpoints)
            if len(found) > before:
                newest = int(found[-1].name.removeprefix("step-"))
                if self.losses()[made:][-1][0] > newest:
                    kill(ours(ranks_only=True))
                    break
            time.sleep(POLL_SECONDS)
        if check(trainer.wait(), killed=True) == 0:
            raise DemoError("training was over before it could be killed")
        wait_until_gone("the checkpoint processes finish what they have")
        return self.losses()[-1][0]


def check(code: int, *, killed: bool = False) -> int:
    """Return the exit code of a trainer, which must not have failed."""
    if code != 0 and not (killed and code == -signal.SIGKILL):
        raise DemoError(f"the trainer ended with exit code {code}")
    return code


def show_checkpoints(run: Run, *, verify: bool = True) -> None:
    """What `milepost ls` and `milepost verify` say."""
    code = milepost("ls", str(run.checkpoints))
    if code or (verify and milepost("verify", *map(str, committed(run.checkpoints)))):
        raise DemoError("the checkpoints are not all whole")


def tensors_of(path: Path) -> dict:
    """All tensors of a checkpoint by name; what several ranks saved comes whole."""
    import milepost as library

    def walk(value, name):
        if isinstance(value, dict | list):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                yield from walk(item, f"{name}.{key}")
        elif hasattr(value, "shape"):
            yield name, value

    with library.make_sync_checkpointer() as checkpointer:
        return dict(walk(checkpointer.load(str(path)), "state"))


def far(one: Path, other: Path) -> tuple[int, float]:
    """How many tensors two checkpoints hold, and how far apart their values are at most."""
    first, second = tensors_of(one), tensors_of(other)
    if {name: tensor.shape for name, tensor in first.items()} != {
        name: tensor.shape for name, tensor in second.items()
    }:
        raise DemoError("the last checkpoints do not hold the same tensors")
    return len(first), max((first[name] - second[name]).abs().max().item() for name in first)


def compare(straight: Run, killed: Run, ranks: list[int]) -> None:
    """Print both curves side by side; refuse them if they are not the same."""
    expected = {step: loss for step, loss, _ in straight.losses()}
    made = killed.losses()
    if not expected.keys() == {step for step, _, _ in made} == set(range(1, straight.steps + 1)):
        raise DemoError("there is not a loss for every step")
    columns = [{step: loss for step, loss, count in made if count == number} for number in ranks]
    if not all(columns):
        raise DemoError(f"the killed run did not go on on {ranks} ranks one after the other")

    names = [f"{number} rank{'s' if number > 1 else ''}" for number in ranks]
    print(f"\n  {'':>4}  {'never killed':>12}  killed and resumed")
    print(f"  step  {names[0]:>12}  {''.join(f'{name:<10}' for name in names)}difference")
    beginnings = {min(column) for column in columns}
    for step, loss in expected.items():
        if step % straight.every == 0 or step in beginnings:
            cells = [f"{column[step]:<10.6f}" if step in column else " " * 10 for column in columns]
            apart = max(abs(column[step] - loss) for column in columns if step in column)
            print(f"  {step:>4}  {loss:>12.6f}  {''.join(cells)}{apart:.1e}")

    apart = max(abs(loss - expected[step]) for step, loss, _ in made)
    changes = [abs(expected[step + 1] - expected[step]) for step in range(1, straight.steps)]
    unequal = sum(loss != expected[step] for step, loss, count in made if count == ranks[0])
    print(
        f"\n  on {names[0]} {len(columns[0])} losses, {unequal or 'none'} different\n"
        f"  largest difference {apart:.1e}, allowed {TOLERANCE:.0e}; "
        f"the loss changes by {sum(changes) / len(changes):.1e} from step to step"
    )
    if unequal:
        raise DemoError(f"on {names[0]} the losses should be the same bit for bit")
    if not apart <= TOLERANCE:
        raise DemoError("the loss curves differ")


def show(folder: Path, ranks: int, steps: int, every: int) -> None:
    """The story from beginning to end."""
    started = time.monotonic()
    straight, killed, copy = (Run(folder / name, steps, every) for name in RUNS)
    half = ranks // 2

    print(f"1. Train on {ranks} ranks without interruption.", flush=True)
    straight.finish(ranks)

    print("\n2. The same seed again; kill all ranks (SIGKILL) in the middle of a save.", flush=True)
    name = killed.kill_in_a_save(ranks, after=max(1, steps // every // 3))
    print(f"  killed while saving {name}")
    show_checkpoints(killed)

    print(f"\n3. Resume a copy on {ranks} ranks again, to the end.", flush=True)
    newest = committed(killed.checkpoints)[-1]
    shutil.copytree(newest, copy.checkpoints / newest.name)
    copy.finish(ranks, "--async")
    expected = straight.losses()[-len(copy.losses()) :]
    count, apart = far(committed(straight.checkpoints)[-1], committed(copy.checkpoints)[-1])
    same = copy.losses() == expected and apart == 0
    print(f"  {len(expected)} losses and {count} tensors {'are the same bit for bit' if same else 'DIFFER'}")
    if not same:
        raise DemoError(f"resumed on {ranks} ranks, the run should be the same bit for bit")

    print(f"\n4. Resume on {half} ranks, saving beside the training; kill them after a save.", flush=True)
    print(f"  killed after step {killed.kill_after_a_save(half)}")
    show_checkpoints(killed, verify=False)

    print("\n5. Resume in one process, without torchrun, to the end.", flush=True)
    killed.finish(1, "--async")
    show_checkpoints(killed)

    print("\n6. Compare.", flush=True)
    compare(straight, killed, [ranks, half, 1])
    count, apart = far(committed(straight.checkpoints)[-1], committed(killed.checkpoints)[-1])
    print(f"  last checkpoints: the same {count} tensors, whose values differ by at most {apart:.1e}")
    print(
        f"\nOn {ranks} ranks the resumed run is bit-identical: what was loaded is what was saved. On fewer\n"
        "it is the same but for rounding: when another number of ranks shares a batch, its losses and\n"
        "gradients are summed up in another order, and sums of floats depend on their order. "
        f"({time.monotonic() - started:.0f} s)"
    )


def interrupt(*_: object) -> None:
    """End as by Ctrl-C."""
    raise KeyboardInterrupt


def main() -> int:
    """Run the demo in a new folder; whatever happens, leave no process and, unless asked, no file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("demo-run/distributed"))
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints where they are")
    parser.add_argument("--ranks", type=int, choices=(4, 8, 16), default=4)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--every", type=int, default=5, metavar="N", help="save every N steps")
    options = parser.parse_args()
    if not Path("/proc/self/environ").exists():
        parser.error("this demo needs /proc")
    for name in RUNS:
        shutil.rmtree(options.folder / name, ignore_errors=True)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        show(options.folder, options.ranks, options.steps, options.every)
    except DemoError as error:
        print(f"\nFAILED: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        wait_until_gone("cleaning up", killing=True)
        for name in () if options.keep else RUNS:
            shutil.rmtree(options.folder / name, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
