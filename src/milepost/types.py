"""The types that every other module uses."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

__all__ = ["STATE_DICT", "RankInfo", "StrPath"]

STATE_DICT = dict[str, Any]
"""A state dict: string keys, any nesting of containers, tensors and plain values below them."""

StrPath = str | os.PathLike[str]
"""A path, as every function of Milepost takes it."""


@dataclass
class RankInfo:
    """Which rank this process is, and of how many.

    Attributes:
        global_rank: This process's rank, from 0.
        global_world_size: How many ranks take part in each save.
    """

    global_rank: int
    global_world_size: int
