"""Takes away memfd, O_DIRECT and renameat2 from every Python that has this folder in its PYTHONPATH."""

import ctypes
import errno
import os


def _refuse(*_):
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


class _Library(ctypes.CDLL):
    def __getattr__(self, name):
        if name == "renameat2":
            raise AttributeError(name)
        return super().__getattr__(name)


os.memfd_create = _refuse
os.O_DIRECT = 0
ctypes.CDLL = _Library
