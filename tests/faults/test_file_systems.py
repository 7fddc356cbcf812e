"""Saves on file systems that behave otherwise than ext4."""

from __future__ import annotations

import pytest
from mounts import bindfs_mount, loop_mount
from scenarios import OURS, SINGLE, make_state, save, which

from milepost.checkpoint_writer import CheckpointWriter, CheckpointWriterConfig, WriterHook


@pytest.mark.parametrize("kind", ["btrfs", "xfs"])
def test_a_save_and_a_replace_commit(tmp_path, kind):
    """A save that returned loads, and so does the one that replaces it."""
    with loop_mount(kind, tmp_path) as place:
        for number in (1, 2):
            save(str(place / "step"), number)
            assert which(str(place / "step")) == number
        assert [entry.name for entry in place.iterdir()] == ["step"]


class Fails(WriterHook):
    """A hook that ends the save."""

    def pre_commit(self, path, **kwargs):
        raise ValueError("no")

    def post_commit(self, path, **kwargs):
        pass


def test_on_fuse_a_save_that_fails_ends_and_leaves_nothing(tmp_path):
    """FUSE keeps a removed file that is open under a new name each time: the clean-up ends all the same."""
    with bindfs_mount(tmp_path) as place:
        path = str(place / "step")
        for number in (1, 2):
            save(path, number)
            assert which(path) == number
            writer = CheckpointWriter(CheckpointWriterConfig(), SINGLE, commit_hook=Fails())
            with pytest.raises(ValueError, match="no"):
                writer.write(path, make_state(7))
            writer.close()
            assert [entry.name for entry in place.iterdir()] == ["step"]
            assert which(path) == number
        assert sorted(entry.name for entry in (place / "step").iterdir()) == OURS
