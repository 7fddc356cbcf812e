"""File systems that tests mount for a while, as root: loop devices and FUSE. Elsewhere they are skipped."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{' '.join(command[:3])} does not work here: {done.stderr.strip() or done.returncode}")


def _unmount(place: Path) -> None:
    gc.collect()  # a mapping of a file keeps its file system busy
    subprocess.run(["umount", str(place)], check=True)


def _need(*tools: str) -> None:
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"this needs root and {', '.join(tools)}")


@contextmanager
def loop_mount(kind: str, folder: Path) -> Iterator[Path]:
    """A new file system of this kind, in an image file below `folder`."""
    _need(f"mkfs.{kind}", "mount")
    image, place = folder / f"{kind}.image", folder / kind
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(320 << 20)
    _run(f"mkfs.{kind}", "-q", str(image))
    _run("mount", "-o", "loop", str(image), str(place))
    try:
        yield place
    finally:
        _unmount(place)


@contextmanager
def bindfs_mount(folder: Path) -> Iterator[Path]:
    """A folder below `folder` as bindfs, a FUSE file system, shows it."""
    _need("bindfs", "umount")
    below, place = folder / "below", folder / "bindfs"
    below.mkdir()
    place.mkdir()
    _run("bindfs", str(below), str(place))
    try:
        yield place
    finally:
        _unmount(place)
