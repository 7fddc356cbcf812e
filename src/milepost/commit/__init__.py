"""The commit: a checkpoint becomes visible whole, or not at all. No torch here.

A save is an `Attempt`: data goes to a hidden folder beside the path; each rank's index, written last, is its
*mark*; whoever sees all marks and no abort mark creates the manifest, which is the commit; then one rename
publishes the folder. `locate` finds what to load and gives it as a `Checkpoint`. `roll_forward` and
`clean_up` deal with what dead attempts left. ARCHITECTURE.md has the protocol.

What every kind of storage shares is in the modules here. `place` is the seam: what an attempt asks of a kind
of storage. `by_rename` answers for file systems.
"""

from __future__ import annotations

from milepost.commit.attempt import Attempt
from milepost.commit.by_rename.folders import absolute_path, given_path
from milepost.commit.by_rename.place import begin, is_undecided, sees_rank
from milepost.commit.by_rename.publish import Target, check_target, publish
from milepost.commit.by_rename.recover import clean_up, roll_forward
from milepost.commit.checkpoint import Checkpoint
from milepost.commit.ids import attempt_id, count_save, environment_start_id, new_attempt_id, process_id
from milepost.commit.locate import expect, locate
from milepost.commit.waiting import Clock, Meeting, News, Outcome

__all__ = [
    "Attempt",
    "Checkpoint",
    "Clock",
    "Meeting",
    "News",
    "Outcome",
    "Target",
    "absolute_path",
    "attempt_id",
    "begin",
    "check_target",
    "clean_up",
    "count_save",
    "environment_start_id",
    "expect",
    "given_path",
    "is_undecided",
    "locate",
    "new_attempt_id",
    "process_id",
    "publish",
    "roll_forward",
    "sees_rank",
]
