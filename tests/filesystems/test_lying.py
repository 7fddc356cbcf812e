"""A network file system at its worst: names that show late, files that stay, errors at fsync and close."""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import os

import pytest
import torch
from support.file_systems import LOOKS, LYING_FUSE, become_client, mount_lying, run_on
from support.saves import SCENARIOS, check_recovery

from milepost import syscalls
from milepost.checkpoint_reader import CheckpointReader
from milepost.checkpoint_writer import CheckpointWriter, CheckpointWriterConfig
from milepost.errors import MilepostError
from milepost.types import RankInfo

ALL = SCENARIOS[4]


def run(case, seconds=60.0):
    reason = run_on(LYING_FUSE, case, seconds=seconds)
    if reason:
        pytest.skip(f"{LYING_FUSE}: {reason}")


def other_client(folder):
    """A second client of what the first one has at `folder`."""
    above = os.path.dirname(folder)
    return mount_lying(f"{above}/mounted", f"{above}/other")


def test_the_lies_are_told():
    """Late names, late listings, files that stay, fixed modes, unknown renames, an error on command."""

    def case(folder):
        other = other_client(folder)
        opened = os.open(folder, os.O_RDONLY)
        assert syscalls.is_network_file_system(opened)
        assert not os.path.exists(f"{folder}/late")
        os.mkdir(f"{other}/late")
        seen = [os.path.exists(f"{folder}/late") for _ in range(LOOKS + 1)]
        assert seen == [False] * LOOKS + [True]
        assert [os.listdir(opened) for _ in range(LOOKS + 1)] == [[]] * LOOKS + [["late"]]
        with open(f"{folder}/file", "w") as file:
            os.unlink(f"{folder}/file")
            (kept,) = os.listdir(folder)
            assert kept.startswith(".nfs")
            with pytest.raises(OSError, match="busy"):
                os.unlink(f"{folder}/{kept}")
            file.write("x")
        assert kept not in os.listdir(folder)
        with pytest.raises(PermissionError):
            os.chmod(f"{folder}/late", 0o700)
        os.mkdir(f"{folder}/mine")
        with pytest.raises(OSError, match="Invalid"):
            syscalls.rename_exchange(f"{folder}/mine", f"{folder}/late")
        os.setxattr(folder, "user.fail", b"mkdir 2 EIO")
        os.mkdir(f"{folder}/first")
        with pytest.raises(OSError, match="Input"):
            os.mkdir(f"{folder}/second")
        os.mkdir(f"{folder}/third")

    run(case)


FAULTS = [("fsync", "EIO"), ("flush", "EDQUOT"), ("flush", "EIO"), ("any", "ESTALE"), ("any", "EIO")]


@pytest.mark.filesystems
@pytest.mark.parametrize(("operation", "error"), FAULTS, ids=str)
@pytest.mark.timeout(600)
def test_an_operation_that_fails_loses_nothing(operation, error):
    """A save fails with a clear error, or is whole; the old or the new loads, and the next save tidies up."""

    def case(folder):
        raised = 0
        for number in itertools.count(1, 5 if operation == "any" else 1):
            inner = f"{folder}/{number}"
            os.mkdir(inner)
            path = ALL.prepare(inner)
            os.setxattr(folder, "user.fail", f"{operation} {number} {error}".encode())
            allowed = {2}
            try:
                ALL.save(path, 2)
            except MilepostError as failure:
                allowed = {ALL.old, 2}
                assert os.strerror(getattr(errno, error)) in str(failure)  # noqa: PT017 - it may also work
                raised += 1
            missed = int(os.getxattr(folder, "user.fail"))
            os.setxattr(folder, "user.fail", b"none 0 EIO")
            assert ALL.found(path) in allowed, f"{operation} {number}"
            check_recovery(ALL, path, number)
            if missed:
                assert allowed == {2}
                break
        assert raised > 3

    run(case, 500)


@pytest.mark.parametrize("meet", [True, False], ids=["barrier", "none"])
def test_ranks_on_two_clients(meet):
    """Two ranks whose names show late to each other commit every step, and the files of both load."""

    def case(folder):
        path, other = f"{folder}/step", other_client(folder)
        barrier = multiprocessing.get_context("fork").Barrier(2, timeout=60)

        class Meeting:
            def execute_barrier(self):
                barrier.wait()

        def rank(number):
            if number:
                become_client(other, folder)
            config = CheckpointWriterConfig(start_id="start", write_barrier_timeout_secs=50)
            writer = CheckpointWriter(config, RankInfo(number, 2), Meeting() if meet else None)
            for step in range(3):
                writer.write(path, {"w": torch.full((1000,), 10 * step + number)}, step=step)
                barrier.wait()
            writer.close()

        work = multiprocessing.get_context("fork").Process
        processes = [work(target=rank, args=(number,)) for number in (0, 1)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0, 0]
        truth = f"{os.path.dirname(folder)}/mounted/step"
        for number in (0, 1):
            loaded = CheckpointReader(RankInfo(number, 2)).read(truth)[0]
            assert loaded["w"].tolist() == [20 + number] * 1000

    run(case)
