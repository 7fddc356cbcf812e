"""The commit: a checkpoint becomes visible whole, or not at all. No torch here.

A save is an `Attempt`: data goes to a hidden folder beside the path; each rank's index, written last, is its
*mark*; whoever sees all marks and no abort mark creates the manifest, which is the commit; then one rename
publishes the folder. `locate` finds what to load, `roll_forward` and `clean_up` deal with what dead
attempts left. ARCHITECTURE.md has the protocol.

Modules, each importing only from those below it:

    attempt                                    a rank's part, and all ranks'
    part                                       a rank's own part
    waiting | word | attachments | recover     its tools, and what dead attempts left
    publish | claim | listing                  taking a place; who works there; what is there
    locate | removal
    marks                                      when a folder holds a whole checkpoint
    hidden | ids | copies                      names and contents; what all ranks have saved alike
"""

from __future__ import annotations

from milepost.commit.attempt import Attempt
from milepost.commit.claim import Clock
from milepost.commit.folders import absolute_path
from milepost.commit.ids import attempt_id, count_save, environment_start_id, new_attempt_id, process_id
from milepost.commit.locate import Located, expect, locate
from milepost.commit.publish import Target, check_target, publish
from milepost.commit.recover import clean_up, roll_forward
from milepost.commit.waiting import Meeting, News, Outcome, is_undecided, sees_rank

__all__ = [
    "Attempt",
    "Clock",
    "Located",
    "Meeting",
    "News",
    "Outcome",
    "Target",
    "absolute_path",
    "attempt_id",
    "check_target",
    "clean_up",
    "count_save",
    "environment_start_id",
    "expect",
    "is_undecided",
    "locate",
    "new_attempt_id",
    "process_id",
    "publish",
    "roll_forward",
    "sees_rank",
]
