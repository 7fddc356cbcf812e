"""Files of any storage, for libraries that read from file objects."""

from __future__ import annotations

import io
import os
from typing import Any

from milepost.storage import OpenFile

__all__ = ["FileStream"]


class FileStream(io.RawIOBase):
    """An open file as the standard library and torch want it: readable and seekable."""

    def __init__(self, file: OpenFile) -> None:
        self._file, self._position = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._file.size}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._file.size - self._position))
        if count:
            self._file.read_into(self._position, [view[:count]])
        self._position += count
        return count
