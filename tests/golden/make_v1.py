"""The state of the golden checkpoint `v1`, and the program that wrote it: ``python make_v1.py FOLDER``.

`v1` is never written again: every later version of the library must read it.
"""

from __future__ import annotations

import struct
import sys
from collections import Counter, OrderedDict, defaultdict
from unittest import mock

import numpy as np
import torch

ATTEMPT = "00000000000000a1"
METADATA = {"run": "golden", "loss": 0.5}
STEP = 41


def plain_state():
    """Values whose bytes in a file depend on nothing but the format."""
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    weights = OrderedDict(weight=base, tied=base[1:3], transposed=base.t())
    weights._metadata = OrderedDict([("", {"version": 2})])
    byte = torch.arange(16, dtype=torch.uint8)
    return {
        "model": weights,
        "parameter": torch.nn.Parameter(torch.tensor([1.5, -2.0], dtype=torch.bfloat16)),
        "dtypes": [byte.to(torch.int16), byte.view(torch.int64), byte, torch.tensor([True, False])],
        "float8": byte.view(torch.float8_e4m3fn),
        "complex": torch.tensor([1 + 2j, 3 - 4j]).conj(),
        "nan": torch.tensor([0x7FC00123, -1], dtype=torch.int32).view(torch.float32),
        "empty": [torch.zeros(0, 3), torch.tensor(7)],
        "expanded": torch.tensor([1.0, 2.0]).expand(3, 2),
        "array": np.arange(4, dtype="<i4"),
        "big-endian": np.arange(3, dtype=">f8"),
        "structured": np.array([(1, "ab")], dtype=[("n", "<i4"), ("s", "<U2")]),
        "scalars": [np.float64(0.1), np.int8(-3), np.datetime64("2024-01-02", "D")],
        "values": [
            None,
            True,
            1,
            -(2**63),
            2**64,
            10**4400,
            0.1,
            float("-inf"),
            1j,
            b"\0\xff",
            "ä🙂",
            "\ud800",
        ],
        "float": struct.unpack(">d", bytes.fromhex("7ff8dead00beef01"))[0],
        "keys": {1: "a", "1": "b", None: "c", (1, ("x", None)): "d", False: "e", 2.5: "f"},
        "containers": [(), (1, [2]), {3}, defaultdict(list, a=[1]), torch.Size([1, 2])],
        "torch": [torch.float16, torch.device("cuda", 1)],
        "step": 41,
    }


def state():
    """All of it: with objects, whose pickles depend on the versions of torch and Python."""
    return {**plain_state(), "sparse": torch.eye(2).to_sparse(), "counter": Counter("hello")}


def write(path, values):
    """Save with the attempt's id fixed."""
    from milepost import make_sync_checkpointer

    with (
        mock.patch("milepost.commit.ids.new_attempt_id", return_value=ATTEMPT),
        make_sync_checkpointer() as checkpointer,
    ):
        checkpointer.save(path, values, step=STEP, metadata=METADATA)


if __name__ == "__main__":
    write(f"{sys.argv[1]}/v1", state())
    write(f"{sys.argv[1]}/v1_plain", plain_state())
