"""The dependency rule, the names that the package offers, and its errors."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import gazetteer
from gazetteer import errors
from gazetteer.errors import GazetteerError

ROOT = Path(__file__).parents[1]
LAYERS = "A module imports only from lines below"
CIRCLES = "Modules never import each other in a circle"


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Check the import contracts of the package below a folder."""
    program = "from importlinter.cli import lint_imports_command as lint; lint()"
    return subprocess.run(
        [sys.executable, "-c", program, "--config", str(folder / "pyproject.toml"), "--no-cache"],
        cwd=folder,
        env={"PYTHONPATH": str(folder / "src"), "PATH": "", "HOME": str(folder), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_package_keeps_its_contracts() -> None:
    """The package as it is breaks no import contract."""
    kept = lint_imports(ROOT)
    assert kept.returncode == 0, kept.stdout + kept.stderr


@pytest.mark.parametrize(
    ("module", "line", "contract", "found"),
    [
        ("model", "import gazetteer.cache", LAYERS, "gazetteer.model -> gazetteer.cache"),
        ("read/text", "import gazetteer.relate.resolve", LAYERS, "gazetteer.read.text -> gazetteer.relate.resolve"),
        ("pages/tree", "import gazetteer.site.drawing", LAYERS, "gazetteer.pages.tree -> gazetteer.site.drawing"),
        ("stowaway", "", LAYERS, "- gazetteer.stowaway"),
        ("read/text", "import gazetteer.read.extract", CIRCLES, "No cycles are allowed in gazetteer.read"),
    ],
    ids=["upwards", "upwards between packages", "sibling", "unlisted", "circle"],
)
def test_a_planted_import_breaks_its_contract(
    tmp_path: Path, module: str, line: str, contract: str, found: str
) -> None:
    """Each contract fails and names the import when a forbidden import is added to the package."""
    package = tmp_path / "src" / "gazetteer"
    shutil.copytree(ROOT / "src" / "gazetteer", package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (package / f"{module}.py").open("a", encoding="utf-8") as stream:
        stream.write(f"\n{line}\n")
    broken = lint_imports(tmp_path)
    assert broken.returncode == 1, broken.stdout + broken.stderr
    assert any(contract in row and "BROKEN" in row for row in broken.stdout.splitlines()), broken.stdout
    assert found in broken.stdout


def test_the_front_door_is_what_all_names() -> None:
    """``__all__`` is sorted and each name in it can be imported."""
    assert sorted(gazetteer.__all__) == gazetteer.__all__
    assert all(hasattr(gazetteer, name) for name in gazetteer.__all__)


def test_every_error_is_in_the_tree_and_is_a_built_in_as_well() -> None:
    """Each leaf can be caught as GazetteerError and as what a caller would expect."""
    for name in errors.__all__:
        cls = getattr(errors, name)
        assert issubclass(cls, GazetteerError)
        if cls is not GazetteerError:
            assert len(cls.__bases__) == 2
