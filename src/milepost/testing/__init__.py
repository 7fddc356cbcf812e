"""For tests of programs and of storages: storages that fail, and the contract they keep.

- `FaultyStorage` fails, or kills the process, at the n-th operation.
- `StorageContract` is the test class that the author of a storage inherits from.
"""

from __future__ import annotations

from milepost.testing.contract import StorageContract
from milepost.testing.faults import MUTATIONS, FaultyStorage, short_writes, signal_storm

__all__ = [
    "MUTATIONS",
    "FaultyStorage",
    "StorageContract",
    "short_writes",
    "signal_storm",
]
