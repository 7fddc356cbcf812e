"""How a repository runs its tests, by the lines of its own files that say so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gazetteer.read.scan import Found

__all__ = ["test_runs"]

# File name, pattern of the line that says so, command.
_SIGNS: tuple[tuple[str, re.Pattern[str], str], ...] = (
    ("Makefile", re.compile(r"^(test|check)\s*:(?!=)"), "make {0}"),
    ("GNUmakefile", re.compile(r"^(test|check)\s*:(?!=)"), "make {0}"),
    ("pyproject.toml", re.compile(r"^\[tool\.pytest(?:\.ini_options)?\]"), "pytest"),
    ("pytest.ini", re.compile(r"^\[pytest\]"), "pytest"),
    ("setup.cfg", re.compile(r"^\[tool:pytest\]"), "pytest"),
    ("tox.ini", re.compile(r"^\[tox\]"), "tox"),
    ("noxfile.py", re.compile(r"^@nox\.session"), "nox"),
    ("package.json", re.compile(r'^\s*"test"\s*:\s*"(?!echo)'), "npm test"),
    ("Cargo.toml", re.compile(r"^\[(?:package|workspace)\]"), "cargo test"),
    ("go.mod", re.compile(r"^module\s"), "go test ./..."),
    ("CMakeLists.txt", re.compile(r"^\s*(?:enable_testing|include\(CTest\))"), "ctest"),
    ("pom.xml", re.compile(r"^\s*<project"), "mvn test"),
    ("build.gradle", re.compile(r"^\s*test\b"), "gradle test"),
)


def test_runs(files: Mapping[str, Found]) -> tuple[tuple[str, str, int], ...]:
    """Return command, file and line of each way that the root folder's files name, in order."""
    found: list[tuple[str, str, int]] = []
    for name, pattern, command in _SIGNS:
        if name not in files or files[name].link:
            continue
        try:
            text = Path(files[name].real).read_text("utf-8", "replace")
        except OSError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            match = pattern.match(line)
            if match:
                found.append((command.format(*match.groups()), name, number))
                break
    return tuple(found)
