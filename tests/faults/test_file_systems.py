"""Saves on file systems that behave otherwise than ext4."""

from __future__ import annotations

import pytest
from mounts import loop_mount
from scenarios import save, which


@pytest.mark.parametrize("kind", ["btrfs", "xfs"])
def test_a_save_and_a_replace_commit(tmp_path, kind):
    """A save that returned loads, and so does the one that replaces it."""
    with loop_mount(kind, tmp_path) as place:
        for number in (1, 2):
            save(str(place / "step"), number)
            assert which(str(place / "step")) == number
        assert [entry.name for entry in place.iterdir()] == ["step"]
