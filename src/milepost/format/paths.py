"""The way to a value in a state dict, typed and as text. Torch-free."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["ATTRIBUTES", "Item", "Path", "matcher", "path_text"]

Path = tuple[Any, ...]
"""Where a value is: the keys on the way down, an `Item` for each position in a list, tuple or set, and
`ATTRIBUTES`."""


class Item(int):
    """A position in a list, tuple or set, as a step of a path."""


class _Attributes:
    """The step from an OrderedDict to its attributes, which is not one of its keys."""

    def __str__(self) -> str:
        return "__dict__"


ATTRIBUTES = _Attributes()


def path_text(path: Path) -> str:
    """A path as text: ``model.layers[0].weight``."""
    text = ""
    for step in path:
        if isinstance(step, Item):
            text += f"[{int(step)}]"
        else:
            text += f".{step}" if text else str(step)
    return text


def matcher(patterns: Iterable[str]) -> Callable[[str], object]:
    """A function that tells whether a path fits one of some patterns.

    In a pattern ``*`` stands for any text and ``?`` for one character; brackets stand for themselves, as
    paths have them: ``layers[0].*``.
    """
    return re.compile(
        "|".join(fnmatch.translate(item.replace("[", "[[]")) for item in patterns) or "(?!)"
    ).match
