"""What each kind of file system gives: found out here, and told in docs/filesystems.md.

With ``MILEPOST_FILESYSTEMS`` set to a path, what was found is written there (`make docs/filesystems.md`).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import tempfile
import time
from pathlib import Path

import pytest
from support.file_systems import FILE_SYSTEMS, run_on

from milepost import syscalls
from milepost.storage.local import LocalStorage

TOLD = Path(__file__).resolve().parents[2] / "docs" / "filesystems.json"
KERNEL = ".".join(os.uname().release.split(".")[:2])
FICLONE = 0x40049409
STATX_DIOALIGN = 0x2000


@pytest.fixture(scope="module")
def found():
    """What the tests of this module find, by file system; written where that is wanted."""
    facts: dict[str, dict | None] = {}
    yield facts
    path = os.environ.get("MILEPOST_FILESYSTEMS")
    if path:
        told = {
            "kernel": KERNEL,
            "date": time.strftime("%Y-%m-%d"),
            "file_systems": dict(sorted(facts.items())),
        }
        Path(path).write_text(json.dumps(told, indent=1) + "\n")


def works(call, *arguments):
    """Whether a call succeeds; False if the file system does not know it or refuses it."""
    try:
        call(*arguments)
    except OSError as error:
        if error.errno not in syscalls.UNSUPPORTED | {errno.EPERM, errno.EXDEV}:
            raise
        return False
    return True


def alignment(path):
    """Alignment in bytes of memory and of offsets for direct I/O, as statx tells; None where it does not."""
    buffer = ctypes.create_string_buffer(256)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.statx(-100, path.encode(), 0, ctypes.c_uint(STATX_DIOALIGN), buffer) == 0
    if not ctypes.c_uint32.from_buffer(buffer).value & STATX_DIOALIGN:
        return None
    return [ctypes.c_uint32.from_buffer(buffer, offset).value for offset in (152, 156)]


def write_direct(path):
    """Write a block as Milepost does."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        if not syscalls.enable_direct(descriptor):
            raise OSError(errno.EINVAL, "refused")
        os.pwrite(descriptor, syscalls.private_memory(4096), 0)
    finally:
        os.close(descriptor)


def features(folder):
    """Try everything that Milepost uses where it is there."""
    storage = LocalStorage()
    for name in ("a", "b"):
        os.mkdir(f"{folder}/{name}")
    a, b, free = f"{folder}/a", f"{folder}/b", f"{folder}/free"
    file = os.open(f"{folder}/file", os.O_RDWR | os.O_CREAT)
    os.write(file, b"x" * 8192)
    copy = os.open(f"{folder}/copy", os.O_RDWR | os.O_CREAT)
    opened = os.open(folder, os.O_RDONLY)
    facts = {
        "direct_open": works(lambda: os.close(os.open(f"{folder}/file", os.O_RDWR | os.O_DIRECT))),
        "direct_write": works(write_direct, f"{folder}/file"),
        "alignment": alignment(f"{folder}/file"),
        "exchange": works(syscalls.rename_exchange, a, b),
        "noreplace": works(syscalls.rename_noreplace, a, free),
        "hard_links": works(os.link, f"{folder}/file", f"{folder}/link"),
        "reflink": works(fcntl.ioctl, copy, FICLONE, file),
        "fsync_folder": works(os.fsync, opened),
        "chmod": works(os.chmod, b, 0o755),
        "network": storage.is_network(folder),
    }
    fcntl.flock(file, fcntl.LOCK_SH)
    facts["locks"] = storage.lock(f"{folder}/file", exclusive=True) is None
    reader = storage.open_folder(folder)
    data = reader.open("file")
    facts["mapped"] = data.map() is not None
    data.close()
    reader.close()
    os.mkdir(f"{folder}/later")
    facts["listing"] = "later" in os.listdir(opened)
    for name in ("file", "link") if facts["hard_links"] else ("file",):
        os.unlink(f"{folder}/{name}")
    facts["removed"] = not [name for name in os.listdir(folder) if name.startswith(".")]
    for descriptor in (file, copy, opened):
        os.close(descriptor)
    return facts


@pytest.mark.parametrize("file_system", FILE_SYSTEMS, ids=repr)
def test_what_a_file_system_gives(file_system, found):
    """What docs/filesystems.md tells is what is found, if this is the kernel that it tells of."""
    with tempfile.TemporaryFile("w+") as answer:

        def case(folder):
            json.dump(features(folder), answer)
            answer.flush()

        reason = run_on(file_system, case, seconds=60)
        if reason:
            found[file_system.name] = None
            pytest.skip(f"{file_system}: {reason}")
        answer.seek(0)
        facts = found[file_system.name] = json.load(answer)
    told = json.loads(TOLD.read_text()) if TOLD.exists() else {}
    if told.get("kernel") == KERNEL and "MILEPOST_FILESYSTEMS" not in os.environ:
        assert told["file_systems"][file_system.name] == facts
