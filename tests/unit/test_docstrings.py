"""The API reference has an example for every public name, and the examples do what they say."""

from __future__ import annotations

import builtins
import doctest
import importlib
import inspect
import re
import tempfile
from pathlib import Path

import pytest
import torch

import milepost
from milepost import barriers

MKDOCS = Path(__file__).resolve().parents[2] / "mkdocs.yml"
WITH_METHODS = {
    "AsyncCheckpointer",
    "CheckpointReader",
    "CheckpointWriter",
    "DefaultStager",
    "SyncCheckpointer",
}
FOR_MILEPOST = {
    "AsyncCheckpointer.on_progress",
    "CheckpointWriter.carry_out",
    "DefaultStager.stage_image",
    "OwnedByProcess.check_owner",
}
"""Methods that only other modules of Milepost call."""


def public():
    """Docstrings of the API reference's classes and functions; the base class's example is for all errors."""
    found = {}
    for name in re.findall(r"api/(\w+)\.md", MKDOCS.read_text()):
        module = milepost if name == "milepost" else importlib.import_module(f"milepost.{name}")
        if ">>>" in module.__doc__:
            found[name] = module
        for value in (getattr(module, name) for name in module.__all__):
            is_error = isinstance(value, type) and issubclass(value, Exception)
            if (isinstance(value, type) and not is_error) or inspect.isfunction(value):
                found[value.__qualname__] = value
            if getattr(value, "__name__", "") in WITH_METHODS:
                methods = inspect.getmembers(value, inspect.isfunction)
                found |= {m.__qualname__: m for name, m in methods if name[0] != "_"}
    found["MilepostError"] = milepost.MilepostError
    return {name: inspect.getdoc(value) for name, value in found.items() if name not in FOR_MILEPOST}


PUBLIC = public()


@pytest.fixture(scope="module")
def checkpointer():
    """An `AsyncCheckpointer` with an arena, which the examples of its methods use."""
    torch.distributed.TCPStore("localhost", 0, is_master=True)  # the first one opens pipes for good
    with tempfile.TemporaryDirectory() as folder, milepost.make_async_checkpointer() as checkpointer:
        checkpointer.save(f"{folder}/step-1", {"w": torch.ones(2)})
        checkpointer.wait_committed()
        yield checkpointer


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_has_an_example_that_runs(name, checkpointer, tmp_path, monkeypatch):
    """The docstring of a public class, function or method has an example, and it prints what it says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(barriers, "BARRIER_REGISTRY", dict(barriers.BARRIER_REGISTRY))
    example = doctest.DocTestParser().get_doctest(PUBLIC[name], {"checkpointer": checkpointer}, name, None, 0)
    assert example.examples
    assert "Example:\n" not in PUBLIC[name]  # the API reference shows "Examples:" as code
    printed = []
    try:
        outcome = doctest.DocTestRunner().run(example, out=printed.append)
    finally:
        builtins.__dict__.pop("_", None)  # the last value that was printed
    checkpointer.wait_committed()
    assert outcome.failed == 0, "".join(printed)
