"""Check the distributions in a folder: their files, and README's example in a fresh environment.

    python tools/check_dist.py dist

The fresh environment gets the wheel, with the versions of constraints.txt and the torch version of this
environment.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def check_files(wheel: Path) -> None:
    """The wheel holds every file of the package, and nothing else."""
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = ROOT / "src" / "milepost"
    expected = {
        path.relative_to(ROOT / "src").as_posix()
        for path in package.rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }
    assert "milepost/py.typed" in expected
    if found != expected:
        sys.exit(f"{wheel.name} has the wrong files: {sorted(found ^ expected)}")


def check_example(wheel: Path) -> None:
    """README's example and the command line work where only the wheel is installed."""
    example = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)[
        1
    ]
    torch = importlib.metadata.version("torch").partition("+")[0]
    versions = re.sub(
        r"^torch==.*", f"torch=={torch}", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE
    )
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "constraints.txt").write_text(versions)
        (place / "example.py").write_text(example)
        programs = place / "venv" / "bin"
        for command in (
            [sys.executable, "-m", "venv", "venv"],
            [programs / "python", "-m", "pip", "install", "--quiet", "-c", "constraints.txt", wheel],
            [programs / "python", "example.py"],
            [programs / "milepost", "verify", "run/step-100"],
        ):
            subprocess.run(command, cwd=place, check=True)


if __name__ == "__main__":
    (wheel,) = Path(sys.argv[1]).resolve().glob("*.whl")
    check_files(wheel)
    check_example(wheel)
    print(f"{wheel.name}: all files are in it, and README's example runs")
