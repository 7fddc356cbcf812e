"""All code that touches an accelerator's memory. None of it has been run on a GPU by this project.

It uses torch's device-neutral interfaces where there are any. On a machine without an accelerator nothing
here is called but `copy_tensors`, which then copies between CPU tensors.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["copy_bytes", "copy_tensors", "pin"]


def copy_tensors(targets: list[torch.Tensor], sources: list[torch.Tensor], *, pinned: bool) -> None:
    """Copy tensors into CPU tensors of the same strides; all bytes are there on return.

    Args:
        targets: CPU tensors.
        sources: CPU tensors, or tensors of one accelerator.
        pinned: The targets' memory is pinned, so that copies may overlap.
    """
    if not targets:
        return
    devices = {source.device for source in sources if not source.is_cpu}
    with torch.no_grad():
        if not devices:
            torch._foreach_copy_(targets, sources)
            return
        for device in devices:
            stream: Any = torch.Stream(device=device)
            stream.wait_stream(torch.accelerator.current_stream(device))
            with stream:
                torch._foreach_copy_(targets, sources, non_blocking=pinned)
            stream.synchronize()


def copy_bytes(tensor: torch.Tensor, start: int, size: int, address: int) -> None:
    """Copy bytes `start` to `start + size` of a tensor's storage to host memory."""
    source = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    source.set_(tensor.untyped_storage(), start, (size,), (1,))
    target = torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=torch.uint8)
    target.copy_(source)


def pin(owner: object, address: int, size: int) -> Callable[[], object]:
    """Pin host memory for fast copies, where there is CUDA; returns what unpins it.

    It is unpinned when that is called, and at the latest when `owner` is collected.
    """
    if not torch.cuda.is_available():
        return lambda: None
    cudart: Any = torch.cuda.cudart
    runtime = cudart()
    if int(runtime.cudaHostRegister(address, size, 0)) != 0:
        return lambda: None  # copies are slower, and as right
    return weakref.finalize(owner, runtime.cudaHostUnregister, address)
