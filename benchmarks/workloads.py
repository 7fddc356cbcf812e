"""The states that are saved: what they hold, and how a step of training changes them."""

from __future__ import annotations

import contextlib
import functools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

MIB = 1 << 20
TILE = 1 << 22
"""Elements of the random numbers that states are filled from: more than compressors look back."""


@functools.cache
def tile() -> torch.Tensor:
    """Made once, by numpy: torch would start threads, after which no worker can be forked."""
    return torch.from_numpy(np.random.default_rng(1).standard_normal(2 * TILE, dtype=np.float32))


def load_all() -> None:
    """Make and import, before workers are forked, what they need: no figure holds the time of an import."""
    import torch.distributed.checkpoint
    import torch.distributed.fsdp
    import torch.distributed.tensor

    with contextlib.suppress(ImportError):
        import safetensors.torch  # noqa: F401
    tile()
    torch.optim.AdamW([torch.zeros(1)])


def tensors_of(state: Any) -> list[torch.Tensor]:
    """All tensors of a state dict, in its order, of DTensors this rank's part; tied ones count twice."""
    return list(_walk(state))


def unique(state: Any) -> list[torch.Tensor]:
    """The tensors of a state dict, tied ones once: what has to be copied and written at least."""
    found = {(t.untyped_storage()._cdata, t.storage_offset(), t.shape): t for t in tensors_of(state)}
    return list(found.values())


def _walk(node: Any) -> Iterator[torch.Tensor]:
    if isinstance(node, torch.Tensor):
        yield getattr(node, "_local_tensor", node)
    elif isinstance(node, dict | list):
        for value in node.values() if isinstance(node, dict) else node:
            yield from _walk(value)


def sample(state: Any) -> int:
    """A checksum of a few elements of each tensor: what was loaded is what was saved."""
    found = 0
    for value in tensors_of(state):
        flat = value.detach().numpy().reshape(-1)
        found = zlib.crc32(flat[:: max(1, flat.size // 16)].tobytes(), found)
    return found


def blank(state: Any) -> None:
    """Zeroes in every tensor; its memory stays touched."""
    with torch.no_grad():
        torch._foreach_zero_(tensors_of(state))


def fill(tensors: list[torch.Tensor], scale: float = 1.0) -> None:
    """Random numbers, quickly: a large tile of them, for each tensor from another place on."""
    if tensors[0].is_meta:
        return
    numbers = tile()
    for number, value in enumerate(tensors):
        flat = value.detach().view(-1)
        start = number * 7919 % TILE
        for offset in range(0, flat.numel(), TILE):
            part = flat[offset : offset + TILE]
            torch.mul(numbers[start : start + part.numel()], scale, out=part)


@dataclass(frozen=True)
class Workload:
    """`count` float32 tensors of `each` bytes.

    Attributes:
        name: As the tables show it.
        count: How many tensors.
        each: Bytes of each.
        changing: The share of the tensors that a step of training changes.
    """

    name: str
    count: int
    each: int
    changing: float = 1.0

    def build(self) -> dict[str, Any]:
        """A new state, its memory touched."""
        made = {f"layer.{i}.weight": torch.empty(max(self.each // 4, 1)) for i in range(self.count)}
        fill(list(made.values()))
        return {"model": made}

    def shape(self) -> dict[str, Any]:
        """The state without its bytes."""
        with torch.device("meta"):
            return self.build()

    def step(self, state: dict[str, Any]) -> None:
        """What a step of training does to the state, as far as a checkpoint sees it."""
        values = tensors_of(state)
        torch._foreach_mul_(values[: max(1, int(len(values) * self.changing))], 0.999)


@dataclass(frozen=True)
class GPT2(Workload):
    """GPT-2 with AdamW: the 148 parameters of the 124M model by name and shape, and the tied head.

    Written by hand after the published model, without its forward pass: only the state counts here.
    `width` and `layers` make it small. Two float32 moments and a step count belong to each parameter.
    """

    width: int = 768
    layers: int = 12
    vocabulary: int = 50_257

    def objects(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Module()
        for name, shape in self._shapes().items():
            *path, last = name.split(".")
            module = model
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_parameter(last, nn.Parameter(torch.empty(shape)))
        fill(list(model.parameters()), 0.02)
        model.add_module("lm_head", nn.Module())
        model.lm_head.weight = model.transformer.wte.weight
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)
        for parameter in model.parameters():
            moments = [torch.empty_like(parameter, requires_grad=False) for _ in range(2)]
            optimizer.state[parameter] = {
                "step": torch.tensor(1000.0),
                "exp_avg": moments[0],
                "exp_avg_sq": moments[1],
            }
        fill([values["exp_avg"] for values in optimizer.state.values()], 1e-4)
        fill([values["exp_avg_sq"] for values in optimizer.state.values()], 1e-4)
        torch._foreach_abs_([values["exp_avg_sq"] for values in optimizer.state.values()])
        return model, optimizer

    def build(self) -> dict[str, Any]:
        model, optimizer = self.objects()
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    def step(self, state: dict[str, Any]) -> None:
        """As far as bits go: weights move a little, moments decay."""
        weights = unique(state["model"])
        moments = state["optimizer"]["state"].values()
        with torch.no_grad():
            torch._foreach_mul_(weights, 0.999)
            torch._foreach_mul_([values["exp_avg"] for values in moments], 0.9)
            torch._foreach_mul_([values["exp_avg_sq"] for values in moments], 0.999)
            torch._foreach_add_([values["step"] for values in moments], 1.0)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        width = self.width
        shapes: dict[str, tuple[int, ...]] = {
            "transformer.wte.weight": (self.vocabulary, width),
            "transformer.wpe.weight": (1024, width),
        }
        inner = {
            "ln_1": (width,),
            "attn.c_attn": (width, 3 * width),
            "attn.c_proj": (width, width),
            "ln_2": (width,),
            "mlp.c_fc": (width, 4 * width),
            "mlp.c_proj": (4 * width, width),
        }
        blocks = {
            f"transformer.h.{n}.{name}": shape for n in range(self.layers) for name, shape in inner.items()
        }
        for name, shape in {**blocks, "transformer.ln_f": (width,)}.items():
            shapes[f"{name}.weight"] = shape
            shapes[f"{name}.bias"] = shape[-1:]
        return shapes


def gpt2(*, small: bool) -> GPT2:
    if small:
        return GPT2("GPT-2, tiny", 0, 0, width=32, layers=2, vocabulary=500)
    return GPT2("GPT-2 124M and AdamW", 0, 0)
