"""For tests of programs and of storages: storages that fail, that record, and the contract they keep.

- `FaultyStorage` fails, or kills the process, at the n-th operation.
- `RecordingStorage` notes what is done; `disk_states` gives the disks that a power cut may then leave.
- `StorageContract` is the test class that the author of a storage inherits from.
"""

from __future__ import annotations

from milepost.testing.contract import StorageContract
from milepost.testing.faults import MUTATIONS, FaultyStorage, short_writes, signal_storm
from milepost.testing.power import Event, RecordingStorage, copy_out, disk_states

__all__ = [
    "MUTATIONS",
    "Event",
    "FaultyStorage",
    "RecordingStorage",
    "StorageContract",
    "copy_out",
    "disk_states",
    "short_writes",
    "signal_storm",
]
