"""Where the tests that try every point of a save do it."""

from __future__ import annotations

import os
import shutil
import tempfile

import pytest


@pytest.fixture
def quick_path(tmp_path):
    """An empty folder in memory where there is such a file system: what is killed there need not be slow."""
    if not os.access("/dev/shm", os.W_OK):
        yield str(tmp_path)
        return
    folder = tempfile.mkdtemp(prefix="milepost-faults-", dir="/dev/shm")
    yield folder
    shutil.rmtree(folder)
