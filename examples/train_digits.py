"""Train a small network on scikit-learn's handwritten digits, saving through Milepost.

    python examples/train_digits.py RUN_FOLDER [--steps 30] [--save-every 6] [--seed 0] [--sync]

Started again on the same folder, it goes on from the newest checkpoint that loads, and ends with the
weights that an uninterrupted run ends with, bit for bit: everything that decides them is in the state.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import re
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits

import milepost

HIDDEN = 310_000
"""A hidden layer this wide makes a state of 266 MiB: as much as a disk writes in a tenth of a second."""

BATCH = 24
TEST_IMAGES = 297


class Trainer:
    """Everything that a training run consists of, and its state dict."""

    def __init__(self, seed: int, steps: int, hidden: int = HIDDEN) -> None:
        random.seed(seed)
        torch.manual_seed(seed)
        self.noise = np.random.default_rng(seed)
        digits = load_digits()
        self.images = torch.from_numpy(digits.images.astype(np.float32) / 16.0)
        self.labels = torch.from_numpy(digits.target)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(64, hidden), torch.nn.ReLU(), torch.nn.Dropout(0.1), torch.nn.Linear(hidden, 10)
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-4, fused=True)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=steps)
        self.order: list[int] = []
        self.step = 0

    def train_step(self) -> float:
        """One step on the next batch, each image moved a little (random) and made noisy (numpy)."""
        if len(self.order) < BATCH:
            self.order = torch.randperm(len(self.images) - TEST_IMAGES).tolist()
        batch, self.order = self.order[:BATCH], self.order[BATCH:]
        images = torch.stack([self.images[i].roll(random.choice((-1, 0, 1)), dims=1) for i in batch])
        images += torch.from_numpy(self.noise.normal(0.0, 0.05, images.shape).astype(np.float32))
        self.optimizer.zero_grad(set_to_none=False)  # new memory costs more than zeros
        loss = torch.nn.functional.cross_entropy(self.model(images.flatten(1)), self.labels[batch])
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.step += 1
        return loss.item()

    def accuracy(self) -> float:
        """The part of the test images that the model recognises."""
        self.model.eval()
        with torch.inference_mode():
            guesses = self.model(self.images[-TEST_IMAGES:].flatten(1)).argmax(1)
        self.model.train()
        return (guesses == self.labels[-TEST_IMAGES:]).float().mean().item()

    def state_dict(self) -> dict:
        """All that decides how training goes on."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "data": {"order": self.order, "step": self.step},
            "rng": {
                "python": random.getstate(),
                "numpy": self.noise.bit_generator.state,
                "torch": torch.get_rng_state(),
            },
        }

    def load_state_dict(self, state: dict) -> None:
        """Go back to where `state_dict` was called."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.order, self.step = state["data"]["order"], state["data"]["step"]
        random.setstate(state["rng"]["python"])
        self.noise.bit_generator.state = state["rng"]["numpy"]
        torch.set_rng_state(state["rng"]["torch"])

    def fingerprint(self) -> str:
        """SHA-256 of all weights."""
        digest = hashlib.sha256()
        for name, tensor in self.model.state_dict().items():
            digest.update(name.encode())
            digest.update(memoryview(tensor.contiguous().numpy()).cast("B"))
        return digest.hexdigest()


def resume(trainer: Trainer, checkpointer, folder: Path) -> None:
    """Load the newest checkpoint in `folder` that loads, if there is one."""
    found = [
        (int(match[1]), path)
        for path in folder.iterdir()
        if (match := re.fullmatch(r"step-(\d+)", path.name))
    ]
    for _, path in sorted(found, reverse=True):
        try:
            state = checkpointer.load(str(path))
        except milepost.LoadError as error:
            print(f"  cannot load {path.name}: {error}", flush=True)
        else:
            trainer.load_state_dict(state)
            print(f"  resumed from {path.name}", flush=True)
            return
    print("  starting from the beginning", flush=True)


def main() -> None:
    """Train, save and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--save-every", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sync", action="store_true", help="wait for each save instead of saving beside")
    parser.add_argument("--hidden", type=int, default=HIDDEN, help="width of the hidden layer")
    options = parser.parse_args()
    torch.set_num_threads(2)  # sums depend on how they are split
    torch.use_deterministic_algorithms(True)

    options.folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(options.seed, options.steps, options.hidden)
    make = milepost.make_sync_checkpointer if options.sync else milepost.make_async_checkpointer
    saves = []
    with make() as checkpointer:
        resume(trainer, checkpointer, options.folder)
        while trainer.step < options.steps:
            loss = trainer.train_step()
            if not options.sync and not saves and trainer.step == 1:
                checkpointer.prepare(trainer.state_dict())  # the optimizer has its state from now on
            if trainer.step % options.save_every == 0:
                path = options.folder / f"step-{trainer.step}"
                labels = {"step": trainer.step, "metadata": {"loss": loss, "seed": options.seed}}
                started = time.perf_counter()
                futures = checkpointer.save(str(path), trainer.state_dict(), **labels)
                seconds = time.perf_counter() - started
                saves.append((trainer.step, futures))
                print(f"  step {trainer.step}: loss {loss:.4f}, training waited {seconds:.2f} s", flush=True)
    if not options.sync:
        durable = ", ".join(f"{step}: {written.seconds:.2f} s" for step, (_, written) in saves)
        print(f"  from save until durable, step by step: {durable}")
    print(f"  test accuracy {trainer.accuracy():.1%}")
    print(f"  weights {trainer.fingerprint()}", flush=True)


if __name__ == "__main__":
    main()
