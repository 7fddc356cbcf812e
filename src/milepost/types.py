"""The two types that every other module speaks in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["STATE_DICT", "RankInfo"]

STATE_DICT = dict[str, Any]
"""A state dict: string keys, any nesting of containers, tensors and plain values below them."""


@dataclass
class RankInfo:
    """Which rank this process is, and of how many.

    Attributes:
        global_rank: This process's rank, from 0.
        global_world_size: How many ranks take part in each save.
    """

    global_rank: int
    global_world_size: int
