"""The dependency rule and the other promises about the package as a whole."""

from __future__ import annotations

import ast
import json
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "milepost"
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())

LAYERS = "A package imports only from lines below"
TORCH_FREE = "Torch-free packages import neither torch nor numpy"
STORAGES = "Only builder, cli, testing"
INSIDE = "Inside format"

TORCH_PACKAGES = {
    "background",
    "barriers",
    "builder",
    "checkpoint_process",
    "checkpoint_reader",
    "checkpoint_writer",
    "checkpointer",
    "loading",
    "ranks",
    "staging",
    "state",
    "testing",
}
"""Packages and modules that may import torch; every other one is torch-free, and listed in pyproject.toml."""


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
    return subprocess.run(
        [*program, "--config", str(folder / "pyproject.toml"), "--no-cache"],
        cwd=folder,
        env={"PYTHONPATH": str(folder / "src"), "PATH": "", "HOME": str(folder), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )


def copy_of_the_package(folder: Path) -> Path:
    shutil.copytree(PACKAGE, folder / "src" / "milepost", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder / "src" / "milepost"


PLANTED = [
    ("errors", "from milepost.types import RankInfo", LAYERS, "milepost.errors -> milepost.types"),
    ("format/manifest", "import milepost.storage", LAYERS, "milepost.format.manifest -> milepost.storage"),
    ("stowaway", "", LAYERS, "- milepost.stowaway"),
    ("format/tree", "import milepost.format.index", INSIDE, "milepost.format.tree -> milepost.format.index"),
    ("format/stowaway", "", INSIDE, "- milepost.format.stowaway"),
    (
        "commit/merge",
        "import milepost.commit.by_rename.claim",
        "Inside commit",
        "milepost.commit.merge -> milepost.commit.by_rename.claim",
    ),
    ("format/boxes", "import torch", TORCH_FREE, "milepost.format.boxes -> torch"),
    ("utils", "import numpy", TORCH_FREE, "milepost.utils -> numpy"),
    (
        "format/names",
        "from milepost.storage.local import LocalStorage",
        STORAGES,
        "milepost.format.names -> milepost.storage.local",
    ),
]


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """What the import linter says of a copy of the package with all the planted violations."""
    folder = tmp_path_factory.mktemp("planted")
    package = copy_of_the_package(folder)
    for module, line, _, _ in PLANTED:
        path = package / f"{module}.py"
        path.write_text((path.read_text() if path.exists() else "") + f"\n{line}\n")
    return lint_imports(folder)


def test_the_package_keeps_its_contracts():
    """Every import contract of pyproject.toml holds."""
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(("module", "line", "contract", "found"), PLANTED)
def test_a_planted_violation_breaks_its_contract(broken, module, line, contract, found):
    """Each import contract fails, naming the import, when one that it forbids is added to the package."""
    assert broken.returncode == 1, broken.stdout
    assert any(contract in text and "BROKEN" in text for text in broken.stdout.splitlines()), broken.stdout
    assert found in broken.stdout


def test_each_package_is_torch_free_or_known_to_need_torch():
    """Every room of the package is in the torch-free contract or in TORCH_PACKAGES, and not in both."""
    contract = next(c for c in CONFIG["tool"]["importlinter"]["contracts"] if c["type"] == "forbidden")
    free = {name.removeprefix("milepost.") for name in contract["source_modules"]}
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert rooms - {"__init__", "__pycache__"} == {name for name in free if "." not in name} | TORCH_PACKAGES
    assert not free & TORCH_PACKAGES


def test_no_package_is_named_like_a_function_of_the_root():
    """Importing every submodule replaces no name of the root, and each can still be called."""
    code = """
import importlib, pkgutil, milepost
for module in pkgutil.walk_packages(milepost.__path__, "milepost."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
kinds = {name: type(getattr(milepost, name)).__name__ for name in milepost.__all__}
print(sorted(name for name, kind in kinds.items() if kind == "module"), len(kinds))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    import milepost

    assert run.stdout.split() == ["[]", str(len(milepost.__all__))]


@pytest.mark.parametrize("module", ["milepost", "milepost.background.writer_main"])
def test_what_starts_first_imports_little(module):
    """`import milepost` and the writer process's first step load no third-party package, nor slow modules."""
    code = f"import sys; before = set(sys.modules); import {module}; print(*set(sys.modules) - before)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    assert module in loaded
    assert {name.partition(".")[0] for name in loaded} - sys.stdlib_module_names == {"milepost"}
    assert not loaded & {"typing", "dataclasses", "inspect", "logging", "subprocess"}


def test_all_is_exactly_what_can_be_imported():
    """Each name of __all__ is importable and occurs once, and type checkers are told of the same names."""
    import milepost

    assert len(milepost.__all__) == len(set(milepost.__all__))
    for name in milepost.__all__:
        assert getattr(milepost, name) is not None
    public = {name for name in dir(milepost) if not name.startswith("_")}
    submodules = {path.stem for path in PACKAGE.iterdir()}
    helpers = {"annotations", "importlib", "sys", "Any", "TYPE_CHECKING"}
    assert public - submodules - helpers == {name for name in milepost.__all__ if not name.startswith("_")}
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    typed = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        and (node.module or "").startswith("milepost.")
        and node.module != "milepost._version"
        for alias in node.names
    }
    assert typed == set(milepost.__all__) - {"__version__"}


def test_an_unknown_name_is_an_attribute_error():
    """A name that the package does not export is an AttributeError that names it."""
    import milepost

    with pytest.raises(AttributeError, match="no_such_name"):
        _ = milepost.no_such_name


@pytest.mark.parametrize(
    ("attribute", "value", "word"), [("platform", "win32", "Windows"), ("byteorder", "big", "endian")]
)
def test_an_unsupported_host_is_refused_with_words(attribute, value, word):
    """On Windows and on big-endian hosts the import is an ImportError that says why."""
    code = f"import sys; sys.{attribute} = {value!r}; import milepost"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("ImportError: Milepost")
    assert word in result.stderr.splitlines()[-1]


def test_each_test_states_the_truth_that_it_tests():
    """Every test function of this suite has a docstring of one sentence."""
    bare = []
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                text = ast.get_docstring(node) or ""
                if not text.endswith((".", "?")):
                    bare.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert not bare


def test_the_version_has_one_value():
    """milepost.__version__ is the version in pyproject.toml."""
    import milepost

    assert milepost.__version__ == CONFIG["project"]["version"]


def test_every_pin_is_exact_and_none_is_missing():
    """constraints.txt pins each dependency to one version, without addresses, paths or hashes."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {}
    for line in lines:
        name, separator, version = line.partition("==")
        assert separator
        assert not set(line) & set("@/: ")
        pinned[name.lower()] = version
    assert pinned["torch"] == "2.13.0"
    wanted = [*CONFIG["project"]["dependencies"], *CONFIG["project"]["optional-dependencies"]["dev"]]
    for requirement in wanted:
        assert requirement.split(">=")[0] in pinned


SIZE = runpy.run_path(str(ROOT / "tools" / "size.py"))


def size_problems(texts, budgets=None, reasons=None):
    return SIZE["problems"](texts, budgets or {"storage": 1000, SIZE["TOP"]: 1000}, reasons or {})


def test_the_size_budget_counts_the_code_of_every_package():
    """tools/size.py counts no prose, and names a package that has too much code, or no budget."""
    texts = {
        "storage/one.py": "pass\n" * 600,
        "storage/two.py": '"""Not code."""\n\n# Nor this.\n' + "pass\n" * 400,
    }
    assert size_problems(texts) == []
    texts["storage/three.py"] = "pass\n"
    assert size_problems(texts) == ["storage: 1001 lines of code (at most 1000)"]
    assert size_problems({"new/one.py": "pass\n"}) == ["new: 1 lines of code (at most 0)"]


def test_the_size_budget_counts_rooms():
    """At most 18 files at the top level, and 32 packages and top-level modules."""
    top = {f"m{number}.py": "" for number in range(18)}
    packages = {f"p{number}/{name}.py": "" for number in range(14) for name in "ab"}
    assert size_problems(top | packages) == []
    assert size_problems(top | packages | {"p14/a.py": ""}) == [
        "33 packages and top-level modules (at most 32)"
    ]
    assert size_problems(top | {"m18.py": ""}) == ["19 files at the top level (at most 18)"]


def test_the_size_budget_holds_classes_and_functions():
    """Classes have at most 300 lines and functions 60, without docstrings, if there is no reason for more."""
    body = '        """Not\n        counted."""\n' + "        pass\n" * 59
    fits = f"class A:\n    def f(self):\n{body}" + "    x = 1\n" * 237
    assert size_problems({"storage/a.py": fits}) == []
    long = fits.replace("        pass\n    x", "        pass\n        pass\n    x")
    expected = ["storage/a.py:A.f: 61 lines (at most 60)", "storage/a.py:A: 301 lines (at most 300)"]
    assert size_problems({"storage/a.py": long}) == expected
    reasons = {"storage/a.py:A.f": "one table", "storage/a.py:A": "one job"}
    assert size_problems({"storage/a.py": long}, reasons=reasons) == []
    assert len(size_problems({"storage/a.py": fits}, reasons=reasons)) == 2


def test_the_package_is_within_its_budget():
    """Every package of src/milepost, and its classes and functions, are within their limits."""
    assert SIZE["problems"](SIZE["read"](PACKAGE), SIZE["BUDGETS"], SIZE["REASONS"]) == []


def test_config_files_hold_what_they_promise():
    """Ruff selects everything but what it names, with a reason beside each ignored rule."""
    text = (ROOT / "pyproject.toml").read_text().splitlines()
    start = text.index("ignore = [")
    ignored = text[start + 1 : text.index("]", start)]
    assert CONFIG["tool"]["ruff"]["lint"]["select"] == ["ALL"]
    assert len(ignored) == len(CONFIG["tool"]["ruff"]["lint"]["ignore"])
    assert all("#" in line for line in ignored), json.dumps(ignored)
