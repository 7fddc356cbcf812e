"""What every test starts from: a cache of its own, and repositories made from a few lines."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

collect_ignore = ["golden"]
SAMPLE = Path(__file__).parent / "golden" / "sample"

settings.register_profile("gazetteer", deadline=None, derandomize=True, max_examples=150)
settings.load_profile("gazetteer")

Maker = Callable[[dict[str, str | bytes]], Path]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.delenv("GIT_DIR", raising=False)
    monkeypatch.delenv("GIT_INDEX_FILE", raising=False)


@pytest.fixture
def make(tmp_path: Path) -> Maker:
    """Return a function that makes a repository from names and texts."""

    def maker(files: dict[str, str | bytes]) -> Path:
        root = tmp_path / "repo"
        for name, content in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return root

    return maker


def git(root: Path, *arguments: str) -> str:
    """Run git with a fixed author and date."""
    who = ["-c", "user.name=A", "-c", "user.email=a@example.com", "-c", "init.defaultBranch=main"]
    done = subprocess.run(["git", "-C", str(root), *who, *arguments], check=True, capture_output=True, text=True)
    return done.stdout


def tree(out: Path) -> dict[str, bytes]:
    """Return every page with its bytes, without what only the next build needs."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and ".gazetteer" not in path.parts
    }
