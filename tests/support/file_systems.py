"""File systems to try things on, each mounted in namespaces of its own: all of it ends with its process."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch

from support.processes import in_child, wait_until

LOOKS = 3
"""How often a client of the lying file system tells what has changed since."""
_LIBC = ctypes.CDLL(None, use_errno=True)
_NEW_MOUNTS, _NEW_PROCESSES, _NEW_NETWORK = 0x00020000, 0x20000000, 0x40000000  # CLONE_NEW…
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class FileSystem:
    """One to try.

    Attributes:
        name: Its name in tests and documents.
        kernel: What the kernel calls it.
        programs: What is needed to make and mount it.
        mount: Called in the namespaces as ``mount(scratch)``; returns the mounted folder.
        optional: Whether a kernel that has it may still refuse to mount it.
    """

    name: str
    kernel: str
    programs: tuple[str, ...]
    mount: Callable[[str], str]
    optional: bool = False

    def __repr__(self) -> str:
        return self.name

    def missing(self) -> str | None:
        """Why it cannot be tried here, or None."""
        if not sys.platform.startswith("linux") or os.geteuid() != 0:
            return "only root may mount file systems"
        known = {line.split()[-1] for line in Path("/proc/filesystems").read_text().splitlines()}
        if self.kernel not in known:
            return f"this kernel has no {self.kernel}"
        gone = [program for program in self.programs if not shutil.which(program)]
        gone += [path for path in _devices(self.programs) if not os.path.exists(path)]
        if gone:
            return f"there is no {' and no '.join(gone)} here"
        return None


def _devices(programs: tuple[str, ...]) -> list[str]:
    return ["/dev/loop-control"] if any(program.startswith("mkfs") for program in programs) else []


def run_on(file_system: FileSystem, work: Callable[[str], None], *, seconds: float) -> str | None:
    """Run ``work(folder)`` in a child on this file system, which is gone afterwards, as are its processes.

    Args:
        file_system: Which.
        work: Raises if the file system does not do as it should.
        seconds: A child that takes longer is killed, which fails the test.

    Returns:
        Why the file system could not be tried, or None if it was.
    """
    reason = file_system.missing()
    if reason:
        return reason
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryFile("w+") as refused:
        os.chmod(scratch, 0o755)

        def first_process() -> None:
            _die_with_parent()
            torch.set_num_threads(1)
            _run("mount", "--make-rprivate", "/")
            _run("mount", "-t", "proc", "proc", "/proc")
            _run("mount", "-t", "tmpfs", "-o", "size=2g,mode=755", "scratch", scratch)
            try:
                folder = file_system.mount(scratch)
            except subprocess.SubprocessError as error:
                if not file_system.optional:
                    raise AssertionError(f"{error}: {error.stderr}") from error
                _say(refused, str(error.stderr or error).splitlines()[0].replace(f"{scratch}/", ""))
                return
            work(folder)

        def enter() -> None:
            _die_with_parent()
            if _LIBC.unshare(_NEW_MOUNTS | _NEW_PROCESSES | _NEW_NETWORK):
                _say(refused, "namespaces cannot be made here")
            else:
                os._exit(in_child(first_process) & 0xFF)

        code = in_child(enter, seconds)
        refused.seek(0)
        reason = refused.read()
    assert code == 0, f"failed on {file_system}: the traceback is in what the child wrote (exit code {code})"
    return reason or None


def _say(file: TextIO, text: str) -> None:
    """Write into a file that another process reads."""
    file.write(text)
    file.flush()


def _die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() == 1 and os.getpid() != 1:
        os.kill(os.getpid(), signal.SIGKILL)


def _obey_quotas() -> None:
    """Give up CAP_SYS_RESOURCE, with which root may exceed a quota."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    capabilities = (ctypes.c_uint32 * 6)()
    assert _LIBC.capget(header, capabilities) == 0
    for word in (0, 1):  # effective, permitted
        capabilities[word] &= ~(1 << 24)
    assert _LIBC.capset(header, capabilities) == 0


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)


def mount_fuse(command: list[str], folder: str) -> None:
    """Start a FUSE server that stays in the foreground; returns when it has mounted the folder."""
    server = subprocess.Popen(command)
    wait_until(lambda: os.path.ismount(folder) or server.poll() is not None, f"the mount of {command[0]}")
    assert server.poll() is None, f"{command[0]} has ended"


def mount_lying(backing: str, folder: str) -> str:
    """Mount one more client of a folder that is served by `lying`."""
    os.makedirs(folder, exist_ok=True)
    mount_fuse(
        [sys.executable, str(Path(__file__).with_name("lying.py")), backing, folder, str(LOOKS)], folder
    )
    return folder


def become_client(other: str, folder: str) -> None:
    """From now on this process sees the folder of another client in place of its own."""
    assert _LIBC.unshare(_NEW_MOUNTS) == 0
    _run("mount", "--bind", other, folder)


def hide(folder: str) -> None:
    """From now on this process sees an empty folder of its own in place of this one."""
    assert _LIBC.unshare(_NEW_MOUNTS) == 0
    _run("mount", "--make-rprivate", "/")
    _run("mount", "-t", "tmpfs", "none", folder)


def _folders(scratch: str, *names: str) -> list[str]:
    paths = [f"{scratch}/{name}" for name in names]
    for path in paths:
        os.mkdir(path)
    return paths


def _image(size: str, mkfs: str, *options: str, mount: str = "loop") -> Callable[[str], str]:
    def make(scratch: str) -> str:
        (folder,) = _folders(scratch, "mounted")
        image = f"{scratch}/image"
        _run("truncate", "-s", size, image)
        _run(mkfs, "-q", *options, image)
        _run("mount", "-o", mount, image, folder)
        return folder

    return make


def _ext4_quota(scratch: str) -> str:
    folder = _image("64m", "mkfs.ext4", "-F", "-O", "quota")(scratch)
    _run("setquota", "-u", "root", "0", "4096", "0", "0", folder)
    _obey_quotas()
    return folder


def _btrfs_quota(scratch: str) -> str:
    folder = _image("256m", "mkfs.btrfs")(scratch)
    _run("btrfs", "quota", "enable", folder)
    _run("btrfs", "subvolume", "create", f"{folder}/limited")
    _run("btrfs", "qgroup", "limit", "4m", f"{folder}/limited")
    return f"{folder}/limited"


def _tmpfs(scratch: str) -> str:
    (folder,) = _folders(scratch, "mounted")
    _run("mount", "-t", "tmpfs", "-o", "size=24m", "small", folder)
    return folder


def overlay_over(make: Callable[[str], None]) -> FileSystem:
    """An overlay over what ``make(folder)`` makes in its lower layer."""

    def mount(scratch: str) -> str:
        small = _tmpfs(scratch)
        lower, upper, work = _folders(small, "lower", "upper", "work")
        (folder,) = _folders(scratch, "merged")
        make(lower)
        _run("mount", "-t", "overlay", "-o", f"lowerdir={lower},upperdir={upper},workdir={work}", "o", folder)
        return folder

    return FileSystem("overlay", "overlay", (), mount)


def _bindfs(scratch: str) -> str:
    small = _tmpfs(scratch)
    (folder,) = _folders(scratch, "bound")
    mount_fuse(["bindfs", "-f", small, folder], folder)
    return folder


def _lying(scratch: str) -> str:
    return mount_lying(_tmpfs(scratch), f"{scratch}/client")


def _nfs(scratch: str) -> str:
    """NFS 4 on loopback: the server lives and dies with the namespaces, and its files lie in them."""
    folder = _image("64m", "mkfs.ext4", "-F")(scratch)
    (mounted,) = _folders(scratch, "nfs")
    _run("ip", "link", "set", "lo", "up")
    _run("mount", "-t", "tmpfs", "state", "/var/lib/nfs")
    _run("mount", "-t", "nfsd", "nfsd", "/proc/fs/nfsd")
    _run("exportfs", "-o", "rw,no_root_squash,insecure,fsid=0", f"127.0.0.1:{folder}")
    _run("rpc.mountd", "-N", "3")
    _run("rpc.nfsd", "-N", "3", "-G", "10", "-L", "10", "2")
    _run("mount", "-t", "nfs4", "127.0.0.1:/", mounted)
    _run("touch", f"{mounted}/ready")
    _run("rm", f"{mounted}/ready")
    return mounted


BTRFS = FileSystem("btrfs", "btrfs", ("mkfs.btrfs",), _image("256m", "mkfs.btrfs"))
LYING_FUSE = FileSystem("lying-fuse", "fuse", ("fusermount3",), _lying)
FILE_SYSTEMS = [
    FileSystem("ext4", "ext4", ("mkfs.ext4",), _image("64m", "mkfs.ext4", "-F")),
    FileSystem("ext4-quota", "ext4", ("mkfs.ext4", "setquota"), _ext4_quota, optional=True),
    FileSystem("xfs", "xfs", ("mkfs.xfs",), _image("320m", "mkfs.xfs")),
    BTRFS,
    FileSystem("btrfs-quota", "btrfs", ("mkfs.btrfs", "btrfs"), _btrfs_quota),
    FileSystem("tmpfs", "tmpfs", (), _tmpfs),
    overlay_over(lambda lower: None),
    FileSystem("bindfs", "fuse", ("bindfs",), _bindfs),
    LYING_FUSE,
    FileSystem("nfs", "nfs4", ("mkfs.ext4", "exportfs", "rpc.nfsd", "ip"), _nfs, optional=True),
]


def fill(folder: str, leave: int) -> str:
    """Take all the space of a file system but about so many bytes; the path of the file that has it."""
    path, spare = f"{folder}/filler", f"{folder}/spare"
    Path(spare).write_bytes(bytes(leave))
    size = 64 << 20
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    while size >= 4096:
        try:
            os.write(descriptor, bytes(size))
            os.fsync(descriptor)
        except OSError:
            size //= 2
    os.close(descriptor)
    os.unlink(spare)
    os.sync()
    return path
