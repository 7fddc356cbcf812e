"""For tests of programs and of storages: a storage that fails, and the contract of all storages.

- `FaultyStorage` fails, or kills the process, at the n-th operation.
- `StorageContract` is a test class. The author of a storage derives a class from it.
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
