# Owner(s): ["oncall: distributed checkpointing"]
# class Commented: this word and this class are in a comment
# import nothing_at_all

"""Tests for the builder: import this, class That and def those are words in a docstring."""

import os
import shutil
import tempfile

import torch
from torch.distributed.checkpoint._experimental.barriers import BarrierConfig
from torch.distributed.checkpoint._experimental.builder import (
    make_async_checkpointer,
    make_sync_checkpointer,
)
from torch.distributed.checkpoint._experimental.checkpointer import (
    AsyncCheckpointer,
    SyncCheckpointer,
)
from torch.distributed.checkpoint._experimental.config import CheckpointerConfig
from torch.distributed.checkpoint._experimental.staging import CheckpointStagerConfig
from torch.distributed.checkpoint._experimental.types import RankInfo
from torch.testing._internal.common_utils import run_tests, TestCase


class TestMakeCheckpointer(TestCase):
    def setUp(self) -> None:
        super().setUp()
        self.temp_dir = tempfile.mkdtemp()  # def not_a_function(): pass
        self.text = """
        class InAString:
            def also_in_a_string(self): ...
        """

    def tearDown(self) -> None:
        shutil.rmtree(self.temp_dir)

    def test_make_sync_checkpointer(self) -> None:
        """A synchronous one saves at once."""
        checkpointer = make_sync_checkpointer(config=CheckpointerConfig(), rank_info=RankInfo(0, 1))
        self.assertIsInstance(checkpointer, SyncCheckpointer)

    def test_make_sync_checkpointer_with_config_first(self) -> None:
        make_sync_checkpointer(CheckpointerConfig(barrier_config=BarrierConfig()), RankInfo(0, 1))

    def test_make_sync_checkpointer_with_custom_config(self) -> None:
        self.assertTrue(os.path.isdir(self.temp_dir))
        self.assertEqual(torch.ones(1).item(), 1)

    def test_make_async_checkpointer(self) -> None:
        made = make_async_checkpointer(CheckpointerConfig(staging_config=CheckpointStagerConfig()), RankInfo(0, 1))
        self.assertIsInstance(made, AsyncCheckpointer)


if __name__ == "__main__":
    run_tests()
