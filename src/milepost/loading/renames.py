"""What a load may change: renamed keys, keys that need not be saved, dtypes. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from milepost.errors import ConfigError
from milepost.format.paths import Item, Path, matcher, path_text
from milepost.format.tree import HOLE, Node, children, key_value

__all__ = ["Names", "nodes_by_path"]


class Names:
    """What a load may do where template and checkpoint differ.

    Args:
        rename: From the path that a value had when it was saved to the one it has in the template, such as
            ``{"model.encoder.*": "model.backbone.*"}``. One ``*`` in each of both stands for the same text.
            What was not saved under the old name is looked for under the new one.
        allow_missing: Patterns of paths that need not have been saved, as for `matcher`.
        cast: Convert saved values to the dtypes of the template.

    Raises:
        ConfigError: A pattern is malformed.
    """

    def __init__(self, rename: Any = None, allow_missing: Any = (), *, cast: bool = False) -> None:
        rename = {} if rename is None else rename
        if not isinstance(rename, Mapping) or not all(
            isinstance(old, str) and isinstance(new, str) and old.count("*") == new.count("*") <= 1
            for old, new in rename.items()
        ):
            raise ConfigError(
                f"rename must be a dict from saved to new paths, one * in both or in none, not {rename!r}",
                hint='rename={"old.*": "new.*"}',
            )
        if isinstance(allow_missing, str) or not all(isinstance(item, str) for item in allow_missing):
            raise ConfigError(
                f"allow_missing must be a list of patterns, not {allow_missing!r}",
                hint='allow_missing=["model.head.*"]',
            )
        self.renames = {new: old for old, new in rename.items()}
        if len(self.renames) != len(rename):
            raise ConfigError(f"rename gives two saved paths one new name: {rename!r}")
        self.cast = cast
        self._unused = dict(self.renames)
        self._allowed = list(allow_missing)
        self._allows = matcher(self._allowed)

    def old_names(self, path: str) -> Iterator[str]:
        """The paths at which the value that the template has at `path` may have been saved."""
        return (old for _, old in self._old_names(path))

    def _old_names(self, path: str) -> Iterator[tuple[str, str]]:
        for new, old in self.renames.items():
            head, star, tail = new.partition("*")
            if not star:
                if path == new:
                    yield new, old
            elif path.startswith(head) and path.endswith(tail) and len(path) > len(head) + len(tail):
                yield new, old.replace("*", path[len(head) : len(path) - len(tail)])

    def old_name(self, path: str, saved: Mapping[str, Node]) -> str | None:
        """The path at which the value that the template has at `path` was saved, if it was renamed."""
        for new, old in self._old_names(path):
            if old in saved:
                self._unused.pop(new, None)
                return old
        return None

    def unused(self) -> list[str]:
        """The renames that `old_name` has never found a use for, as text."""
        return [f"{old} -> {new}" for new, old in self._unused.items()]

    def reach_into(self, value: Any, path: Path, saved: Mapping[str, Node]) -> bool:
        """Whether something in a dict or list of the template was saved under another name."""
        return bool(self.renames) and any(
            old in saved for inner in _inner_paths(value, path) for old in self.old_names(path_text(inner))
        )

    def may_lack(self, value: Any, path: Path) -> bool:
        """Whether a value of the template need not have been saved: it, or each leaf of it, is allowed."""
        if not self._allowed:
            return False
        if self._allows(path_text(path)):
            return True
        leaves = [path_text(inner) for inner in _inner_paths(value, path, leaves=True)]
        return bool(leaves) and all(map(self._allows, leaves))

    def left_over(
        self, candidates: Sequence[tuple[Path, Node]], renamed: Iterable[tuple[str, str]]
    ) -> list[str]:
        """Topmost paths of what was saved and was not loaded under another name either."""
        used = {old for old, _ in renamed}
        if not used:
            return [path_text(path) for path, _ in candidates]
        left: list[str] = []
        for path, node in candidates:
            paths = [path_text(inner) for inner in _leaf_paths(node, path, used)]
            if not any(text in used for text in paths):
                left.append(path_text(path))
            else:
                left += [text for text in paths if text not in used]
        return left


def _inner_paths(value: Any, path: Path, *, leaves: bool = False) -> Iterator[Path]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            if not leaves:
                yield (*path, key)
            yield from _inner_paths(inner, (*path, key), leaves=leaves)
    elif isinstance(value, list | tuple) and value:
        for position, inner in enumerate(value):
            if not leaves:
                yield (*path, Item(position))
            yield from _inner_paths(inner, (*path, Item(position)), leaves=leaves)
    elif leaves:
        yield path


def _steps(node: Node) -> Iterator[tuple[Any, Node]]:
    """The values in a node, except the items of a set, each with the step to it."""
    if node[0] != "set":
        yield from ((key_value(step), child) for step, child in children(node) if child is not HOLE)


def _leaf_paths(node: Node, path: Path, used: set[str]) -> Iterator[Path]:
    """The paths of the leaves of a saved node; what was used as a whole counts as a leaf."""
    inner = [] if path_text(path) in used else list(_steps(node))
    if not inner:
        yield path
    for step, child in inner:
        yield from _leaf_paths(child, (*path, step), used)


def nodes_by_path(node: Node) -> dict[str, Node]:
    """Every node of a saved tree, by its path as text; the first of several."""
    found: dict[str, Node] = {}
    stack: list[tuple[Path, Node]] = [((), node)]
    while stack:
        path, node = stack.pop()
        found.setdefault(path_text(path), node)
        stack += reversed([((*path, step), child) for step, child in _steps(node)])
    return found
