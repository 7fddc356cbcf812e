"""Train a small transformer on Python's own documentation, byte by byte, on one or several processes.

    torchrun --standalone --nproc-per-node 4 examples/train_fsdp2.py --checkpoints RUN [--resume] [--async]
    python examples/train_fsdp2.py --checkpoints RUN [--resume] [--async]

Under torchrun the model is sharded with FSDP2 (`fully_shard`; on CPUs, with gloo), and each rank saves the
shards that it holds. Without torchrun it is an ordinary model in one process. Both save the same keys, so
that what 4 ranks saved goes on on 2, or on one: the template says how the tensors lie, and `load` brings
them there. The batch of a step depends on the step alone, and each rank takes its slice of it.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

import milepost
from milepost.checkpoint_writer import CheckpointWriterConfig
from milepost.health.listing import scan
from milepost.storage import default_storage

BYTES, CONTEXT, WIDTH, HEADS, LAYERS = 256, 64, 96, 4, 3
BATCH = 16
"""Pieces of text in a step, on all ranks together."""


class Block(nn.Module):
    """Attention to what came before, then two layers on each place."""

    def __init__(self) -> None:
        super().__init__()
        self.before_attention = nn.LayerNorm(WIDTH)
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.attended = nn.Linear(WIDTH, WIDTH)
        self.before_layers = nn.LayerNorm(WIDTH)
        self.layers = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x):
        batch, length, _ = x.shape
        parts = self.query_key_value(self.before_attention(x)).view(batch, length, 3, HEADS, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        attention = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attended(attention.transpose(1, 2).flatten(2))
        return x + self.layers(self.before_layers(x))


class Transformer(nn.Module):
    """Predicts each next byte of a text."""

    def __init__(self) -> None:
        super().__init__()
        self.byte = nn.Embedding(BYTES, WIDTH)
        self.place = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.next = nn.Linear(WIDTH, BYTES, bias=False)

    def forward(self, text):
        x = self.byte(text) + self.place(torch.arange(text.shape[1]))
        return self.next(self.norm(self.blocks(x)))


class Trainer:
    """The model, its optimizer and its data, on this rank of `world` ranks."""

    def __init__(self, rank: int, world: int, seed: int) -> None:
        if BATCH % world:
            raise SystemExit(f"{world} ranks cannot share {BATCH} pieces of text evenly")
        self.rank, self.world, self.seed, self.step = rank, world, seed, 0
        text = "\n".join(topics[name] for name in sorted(topics)).encode()
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        torch.manual_seed(seed)  # every rank makes the whole model, and keeps its shards
        self.model, self.excess = Transformer(), torch.ones(1)
        if dist.is_initialized():
            mesh = init_device_mesh("cpu", (world,))
            for block in self.model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
            ones = torch.ones(world)  # gloo of torch 2.7 returns the sum where FSDP2 asks it for the mean
            dist.reduce_scatter_tensor(self.excess, ones, op=dist.ReduceOp.AVG)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-3)

    def batch(self) -> torch.Tensor:
        """This rank's slice of the batch of the next step."""
        order = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        starts = torch.randint(len(self.text) - CONTEXT, (BATCH,), generator=order)
        mine = starts.view(self.world, -1)[self.rank].tolist()
        return torch.stack([self.text[start : start + CONTEXT + 1] for start in mine])

    def train_step(self) -> float:
        """One step; returns the mean loss over the batch of all ranks."""
        batch = self.batch()
        guesses = self.model(batch[:, :-1])
        loss = functional.cross_entropy(guesses.flatten(0, 1), batch[:, 1:].flatten())
        self.optimizer.zero_grad()
        (loss / self.excess).backward()  # FSDP2 takes the mean of the gradients over the ranks
        self.optimizer.step()
        self.step += 1
        mean = loss.detach()
        if dist.is_initialized():
            dist.all_reduce(mean)
        return mean.item() / self.world

    def state_dict(self) -> dict:
        """All that decides how training goes on, under names that do not depend on the number of ranks."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "step": self.step}

    def load(self, checkpointer, path: str) -> None:
        """Go on from a checkpoint, whatever number of ranks saved it."""
        state = checkpointer.load(path, self.state_dict(), strict=True)
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        self.step = state["step"]


def newest(folder: Path, rank: int) -> str | None:
    """The committed checkpoint of the latest step: rank 0 looks, so that all ranks take the same."""
    found = [None]
    if rank == 0 and folder.exists():
        entries = [entry for entry in scan(default_storage(), str(folder)) if entry.state == "committed"]
        if entries:
            found = [str(folder / max(entries, key=lambda entry: entry.step or 0).name)]
    if dist.is_initialized():
        dist.broadcast_object_list(found, src=0)
    return found[0]


def train(options: argparse.Namespace, rank: int, world: int) -> None:
    """Train, save and tell; rank 0 speaks for all."""
    trainer = Trainer(rank, world, options.seed)
    # AdamW counts its steps in plain tensors: the same on all ranks, so that saving them once is enough.
    config = milepost.CheckpointerConfig(
        writer_config=CheckpointWriterConfig(replicated=["optimizer.state.*.step"])
    )
    make = milepost.make_async_checkpointer if options.beside else milepost.make_sync_checkpointer
    with make(config) as checkpointer, open(options.loss_log if rank == 0 else os.devnull, "a") as log:
        path = newest(options.checkpoints, rank) if options.resume else None
        if path is not None:
            trainer.load(checkpointer, path)
        if rank == 0:
            where = f"resumed from {Path(path).name}" if path else "starting from the beginning"
            print(f"  {world} rank{'s' if world > 1 else ''}: {where}", flush=True)
        while trainer.step < options.steps:
            loss = trainer.train_step()
            log.write(json.dumps({"step": trainer.step, "loss": loss, "ranks": world}) + "\n")
            log.flush()
            if trainer.step % options.every == 0:
                target = options.checkpoints / f"step-{trainer.step:06d}"
                checkpointer.save(str(target), trainer.state_dict(), step=trainer.step)
                if rank == 0:
                    print(f"  step {trainer.step}: loss {loss:.4f}", flush=True)


def main() -> None:
    """Join the other ranks, if there are any, and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoints", type=Path, default=Path("demo-run/fsdp2"), metavar="DIR")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--every", type=int, default=5, metavar="N", help="save every N steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--loss-log", default=os.devnull, metavar="FILE", help="append each step's loss here")
    parser.add_argument("--resume", action="store_true", help="go on from the newest committed checkpoint")
    parser.add_argument("--async", dest="beside", action="store_true", help="save beside the training")
    options = parser.parse_args()
    torch.use_deterministic_algorithms(True)
    if "RANK" not in os.environ:
        train(options, 0, 1)
        return
    dist.init_process_group("gloo")
    try:
        train(options, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
