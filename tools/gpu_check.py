"""Checks what only a GPU can show: pinned staging, the side stream, CUDA's random state, FSDP2 on a device.

    python tools/gpu_check.py    # 5 minutes at most; exit code 0: all passed, 1: one failed, 2: no CUDA here

It has not been run on a GPU yet: until it has, nothing that it checks is promised.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable

import torch

import milepost

MIB = 1 << 20


def state_of(size: int) -> dict[str, torch.Tensor]:
    return {f"w{n}": torch.randn(4 * MIB // 4, device="cuda") for n in range(size // (4 * MIB))}


def blank(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(value) for name, value in state.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def check_both_ways(folder: str) -> str:
    """A state on the GPU is saved and loaded, at once and in the background, with strides and half floats."""
    state = state_of(64 * MIB)
    state |= {
        "turned": torch.randn(300, 200, device="cuda").t(),
        "half": torch.randn(999, device="cuda").half(),
    }
    with milepost.make_sync_checkpointer() as sync, milepost.make_async_checkpointer() as background:
        sync.save(os.path.join(folder, "sync"), state)
        background.save(os.path.join(folder, "background"), state)[1].result()
        for name in ("sync", "background"):
            target = blank(state)
            sync.load(os.path.join(folder, name), target)
            assert same(state, target), f"{name}: other values came back"
            assert all(value.is_cuda for value in target.values())
            plain = torch.load(os.path.join(folder, name, "checkpoint_0.pt"), map_location="cpu")
            assert same({key: value.cpu() for key, value in state.items()}, plain)
    return ""


def check_pinned_arena(folder: str) -> str:
    """The arena is pinned, and what is copied into it is right."""
    state = state_of(1024 * MIB)
    with milepost.make_async_checkpointer() as checkpointer:
        checkpointer.prepare(state)
        checkpointer._stager.wait_prepared()
        slot = checkpointer._stager._slots[0]
        assert slot._unpin is not None, "the arena was not pinned"
        start = time.perf_counter()
        _, written = checkpointer.save(os.path.join(folder, "pinned"), state)
        stall = time.perf_counter() - start
        written.result()
    target = blank(state)
    with milepost.make_sync_checkpointer() as checkpointer:
        checkpointer.load(os.path.join(folder, "pinned"), target)
    assert same(state, target)
    host = torch.empty(1024 * MIB, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(1024 * MIB, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    start = time.perf_counter()
    host.copy_(device)
    return f"stall {stall:.3f} s for 1 GiB, a plain pinned copy {time.perf_counter() - start:.3f} s"


def check_side_stream(folder: str) -> str:
    """What the current stream has queued before `save` is saved, and what it queues after it is not."""
    value = torch.zeros(4 * MIB, device="cuda")
    busy = torch.randn(4096, 4096, device="cuda")
    with milepost.make_async_checkpointer() as checkpointer:
        for turn in range(1, 11):
            for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
                with torch.cuda.stream(stream):
                    for _ in range(20):
                        busy @ busy  # the update below is queued behind this
                    value.fill_(turn)
                    path = os.path.join(folder, f"stream-{turn}")
                    _, written = checkpointer.save(path, {"value": value})
                    value.fill_(-1)
                    written.result()
                    found = checkpointer.load(path, default_map_location="cpu")["value"]
                    assert bool((found == turn).all()), f"turn {turn}: {found.unique().tolist()[:5]}"
                torch.cuda.synchronize()
    return ""


def check_random_state(folder: str) -> str:
    """CUDA's random state comes back, and the same numbers are drawn again."""
    with milepost.make_sync_checkpointer() as checkpointer:
        path = os.path.join(folder, "random")
        checkpointer.save(path, {"cuda": torch.cuda.get_rng_state_all(), "cpu": torch.get_rng_state()})
        first = torch.randn(1000, device="cuda"), torch.randn(1000)
        saved = checkpointer.load(path, default_map_location="cpu")
    torch.cuda.set_rng_state_all(saved["cuda"])
    torch.set_rng_state(saved["cpu"])
    again = torch.randn(1000, device="cuda"), torch.randn(1000)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    return ""


def check_fsdp2(folder: str) -> str:
    """FSDP2 with AdamW on one device, saved in the background: training goes on alike after a load."""
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(4))).cuda()
        mesh = init_device_mesh("cuda", (1,))
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        data = torch.randn(32, 1024, device="cuda")

        def train(steps: int) -> list[float]:
            losses = []
            for _ in range(steps):
                optimizer.zero_grad()
                loss = model(data).square().mean()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            return losses

        train(2)
        path = os.path.join(folder, "fsdp2")
        with milepost.make_async_checkpointer() as checkpointer:
            weights, moments = get_state_dict(model, optimizer)
            _, written = checkpointer.save(path, {"model": weights, "optimizer": moments})
            first = train(3)  # while it is written
            written.result()
            weights, moments = get_state_dict(model, optimizer)
            state = {"model": weights, "optimizer": moments}
            checkpointer.load(path, state)
            set_state_dict(
                model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
            )
        assert train(3) == first, "training went on differently"
    finally:
        dist.destroy_process_group()
    return ""


CHECKS: dict[str, Callable[[str], str]] = {
    "saved and loaded": check_both_ways,
    "pinned arena": check_pinned_arena,
    "side stream": check_side_stream,
    "random state": check_random_state,
    "FSDP2": check_fsdp2,
}


def main() -> int:
    if not torch.cuda.is_available():
        print("No CUDA device is here, so nothing was checked.")
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, milepost {milepost.__version__}")
    failed = 0
    with tempfile.TemporaryDirectory(prefix="gpu-check-", dir=".") as folder:
        for name, check in CHECKS.items():
            start = time.perf_counter()
            try:
                said = check(folder)
            except Exception:  # noqa: BLE001 - every check is run
                failed += 1
                traceback.print_exc()
                print(f"FAIL {name}", flush=True)
            else:
                print(f"PASS {name} ({time.perf_counter() - start:.1f} s) {said}".rstrip(), flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
