"""Types that all modules use."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

__all__ = ["STATE_DICT", "RankInfo", "StrPath"]

STATE_DICT = dict[str, Any]
"""A state dict: text keys, and below them any nesting of containers, tensors and plain values."""

StrPath = str | os.PathLike[str]
"""The type of all path arguments."""


@dataclass
class RankInfo:
    """Which rank this process is, and of how many.

    Attributes:
        global_rank: This process's rank, from 0.
        global_world_size: How many ranks take part in each save.

    Examples:
        >>> from milepost import RankInfo
        >>> RankInfo(global_rank=0, global_world_size=2)
        RankInfo(global_rank=0, global_world_size=2)
    """

    global_rank: int
    global_world_size: int
