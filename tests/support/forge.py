"""Checkpoints changed on purpose, with all checksums made right again: what an attacker can do."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import Any

CHUNK = 262144


class Forge:
    """Changes a checkpoint of one rank and signs it anew.

    Attributes:
        index: The index, as JSON values.
        body: The body of the manifest.
        data: The data file.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.index: Any = json.loads(Path(f"{path}/index_0.json").read_bytes())
        self.body: Any = json.loads(Path(f"{path}/manifest.json").read_bytes())["body"]
        self.data = bytearray(Path(f"{path}/checkpoint_0.pt").read_bytes())

    def sign(self) -> None:
        """Write everything, with true checksums of records and files."""
        self.sign_data()
        self.sign_index(dump(self.index))

    def sign_data(self) -> None:
        """Write the data file; its checksums go into the index and the manifest."""
        records = self.index["records"]
        records["crcs"] = [
            zlib.crc32(self.data[start : min(start + CHUNK, offset + length)])
            for offset, length in zip(records["offset"], records["length"], strict=True)
            for start in range(offset, offset + length, CHUNK)
        ]
        facts = {"size": len(self.data), "crc32": zlib.crc32(self.data)}
        self.index["files"][0].update(facts)
        self.body["files"][0].update(facts)
        write(f"{self.path}/checkpoint_0.pt", bytes(self.data))

    def sign_index(self, data: bytes) -> None:
        """Write these bytes as the index, and a manifest that fits."""
        write(f"{self.path}/index_0.json", data)
        self.body["indexes"][0].update(size=len(data), sha256=hashlib.sha256(data).hexdigest())
        self.sign_manifest(dump(self.body))

    def sign_manifest(self, body: bytes) -> None:
        """Write a manifest with this body."""
        digest = hashlib.sha256(body).hexdigest().encode()
        write(f"{self.path}/manifest.json", b'{"sha256":"' + digest + b'","body":' + body + b"}")

    def record(self, number: int) -> slice:
        """Where in the data file a record lies."""
        offset = self.index["records"]["offset"][number]
        return slice(offset, offset + self.index["records"]["length"][number])

    def empty_record(self) -> int:
        """The number of a record without bytes."""
        number: int = self.index["records"]["length"].index(0)
        return number

    def put_object(self, key: str, data: bytes) -> None:
        """Make these bytes the pickle of an object of the state dict, and sign everything."""
        records, number = self.index["records"], self.node(key)[1]
        place = self.record(number)
        if len(data) > place.stop - place.start:  # make room, before the records that follow
            self.data[place.stop : place.stop] = bytes(len(data))
            later = range(number + 1, len(records["offset"]))
            for follower in later:
                records["offset"][follower] += len(data)
        records["length"][number] = len(data)
        self.data[place.start : place.start + len(data)] = data
        self.sign()

    def node(self, key: str) -> Any:
        """The node of a value of the state dict."""
        return next(value for name, value in self.index["tree"][1] if name == ["str", key])

    def set(self, key: str, node: Any) -> None:
        """Put another node in the place of a value."""
        next(pair for pair in self.index["tree"][1] if pair[0] == ["str", key])[1] = node


def dump(value: Any) -> bytes:
    """JSON as it is written in a checkpoint (`Raw` values as they are)."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")


def write(path: str, data: bytes) -> None:
    """Replace a file."""
    if os.path.lexists(path):
        os.remove(path)
    Path(path).write_bytes(data)
