"""Sessions that CI does not run: other versions of torch and of Python, and a system with less than Linux.

pip install nox
nox --list
nox --session "torch(2.7.1)"
nox --session "torch(2.7.1)" -- tests/unit    # arguments for pytest
"""

from __future__ import annotations

from pathlib import Path

import nox

nox.options.sessions = []
nox.options.reuse_venv = "yes"

TORCHES = ["2.7.1", "2.14.1", "2.15.0"]
"""The oldest torch with which Milepost works, and those after the pinned one."""

PYTHONS = ["3.11", "3.12", "3.13"]


def run_tests(session: nox.Session, **environment: str) -> None:
    """Install Milepost beside the torch that is there, or else the pinned one, and run the tests."""
    session.run("bash", "tools/install.sh", session.virtualenv.location, external=True)
    chosen = session.posargs or ["-m", "not slow and not filesystems"]
    session.run("python", "-m", "pytest", "-n", "2", *chosen, env=environment)


@nox.session(python="3.11")
@nox.parametrize("version", [nox.param(version, id=version) for version in TORCHES])
def torch(session: nox.Session, version: str) -> None:
    """Another torch."""
    session.install(f"torch=={version}")
    run_tests(session)


@nox.session(python=PYTHONS)
def python(session: nox.Session) -> None:
    """Another Python, with the pinned torch."""
    run_tests(session)


@nox.session(python="3.11")
def bare(session: nox.Session) -> None:
    """A system without memfd, O_DIRECT and renameat2, which stands for macOS."""
    run_tests(session, PYTHONPATH=str(Path(__file__).parent / "tests" / "support" / "bare"))
