"""Lines of code per package of src/milepost against its budget; exit code 1 when something is too long.

A line of code is one that is not blank, comment or docstring. A module is as long as its one job. A class has
at most 300 lines and a function 60, without its docstring. Ruff limits the branches (PLR0912).
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

TOP = "top level"
BUDGETS = {
    "background": 1_460,
    "cli": 770,
    "commit": 3_005,
    "format": 2_365,
    "health": 1_035,
    "loading": 1_300,
    "ranks": 680,
    "state": 1_180,
    "storage": 1_160,
    "testing": 490,
    TOP: 2_315,
}
"""The lines of code that each package may have. Their sum is the budget of all."""

MAX_ROOMS = 32
"""Packages and top-level modules."""

MAX_TOP_FILES = 18
MAX_LINES = {ast.ClassDef: 300, ast.FunctionDef: 60, ast.AsyncFunctionDef: 60}

REASONS: dict[str, str] = {
    "testing/contract.py:StorageContract": "a class of tests, one for each promise of a storage",
}
"""Classes and functions that may be longer, as "package/module.py:Class.method", each with the reason."""

_NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def code_lines(text: str) -> int:
    """How many lines hold code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if _is_text(node):
            lines.difference_update(range(node.lineno, node.end_lineno + 1))
    return len(lines)


def _is_text(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def read(root: Path) -> dict[str, str]:
    """The text of every module, by its path in the package."""
    paths = sorted(root.rglob("*.py"))
    return {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def sizes(texts: dict[str, str]) -> Counter[str]:
    """The lines of code of each package."""
    found: Counter[str] = Counter()
    for name, text in texts.items():
        found[name.split("/")[0] if "/" in name else TOP] += code_lines(text)
    return found


def too_long(name: str, node: ast.AST) -> Iterator[tuple[str, str]]:
    """The classes and functions of a module that are too long: their names, and how long they are."""
    for part in ast.iter_child_nodes(node):
        most = MAX_LINES.get(type(part))
        inner = name if most is None else f"{name}{'.' if name[-3:] != '.py' else ':'}{part.name}"
        yield from too_long(inner, part)
        if most is not None:
            text = part.body[0] if _is_text(part.body[0]) else None
            lines = part.end_lineno - part.lineno + 1
            lines -= text.end_lineno - text.lineno + 1 if text else 0
            if lines > most:
                yield inner, f"{lines} lines (at most {most})"


def problems(texts: dict[str, str], budgets: dict[str, int], reasons: dict[str, str]) -> list[str]:
    """All that breaks a rule."""
    found = []
    for package, lines in sizes(texts).items():
        if lines > budgets.get(package, 0):
            found.append(f"{package}: {lines} lines of code (at most {budgets.get(package, 0)})")
    top = [name for name in texts if "/" not in name]
    rooms = len(top) + len({name.split("/")[0] for name in texts if "/" in name})
    if len(top) > MAX_TOP_FILES:
        found.append(f"{len(top)} files at the top level (at most {MAX_TOP_FILES})")
    if rooms > MAX_ROOMS:
        found.append(f"{rooms} packages and top-level modules (at most {MAX_ROOMS})")
    long = {part: size for name, text in texts.items() for part, size in too_long(name, ast.parse(text))}
    found += [f"{part}: {size}" for part, size in long.items() if part not in reasons]
    found += [f"{part}: has a reason to be long, and is not" for part in reasons if part not in long]
    return found


def main() -> int:
    """Print the table; return the exit code."""
    texts = read(Path(__file__).resolve().parent.parent / "src" / "milepost")
    code = sizes(texts)
    found = problems(texts, BUDGETS, REASONS)
    print(f"{'code':>7}{'budget':>8}")
    for package, lines in sorted(code.items(), key=lambda item: -item[1]):
        print(f"{lines:7,}{BUDGETS.get(package, 0):8,}  {package}")
    print(f"{sum(code.values()):7,}{sum(BUDGETS.values()):8,}  in all")
    for part, reason in REASONS.items():
        print(f"allowed: {part}: {reason}")
    for problem in found:
        print(f"TOO LONG: {problem}")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
