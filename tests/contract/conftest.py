"""File systems that behave in other ways than the one under ``tmp_path``."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from milepost import syscalls


@pytest.fixture
def shm_path():
    """An empty folder in shared memory."""
    folder = tempfile.mkdtemp(prefix="milepost-test-", dir="/dev/shm")
    yield Path(folder)
    shutil.rmtree(folder)


@pytest.fixture
def refuse_direct_open(monkeypatch):
    """O_DIRECT is refused for every descriptor, at open() and later; returns how often it was."""
    real_open, real_fcntl, refused = os.open, fcntl.fcntl, []

    def check(flags):
        if flags & syscalls.O_DIRECT:
            refused.append(flags)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    def open_(path, flags, *arguments, **options):
        check(flags)
        return real_open(path, flags, *arguments, **options)

    def fcntl_(descriptor, command, argument=0):
        if command == fcntl.F_SETFL:
            check(argument)
        return real_fcntl(descriptor, command, argument)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(fcntl, "fcntl", fcntl_)
    return refused


@pytest.fixture
def refuse_direct_calls(monkeypatch):
    """Every read and write through an O_DIRECT descriptor fails; returns how often it did."""
    refused = []

    def refusing(real):
        def call(descriptor, *arguments):
            if len(arguments) < 3 and fcntl.fcntl(descriptor, fcntl.F_GETFL) & syscalls.O_DIRECT:
                refused.append(descriptor)
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return real(descriptor, *arguments)

        return call

    monkeypatch.setattr(os, "pwrite", refusing(os.pwrite))
    monkeypatch.setattr(os, "preadv", refusing(os.preadv))
    return refused
