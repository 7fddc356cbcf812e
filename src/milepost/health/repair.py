"""Repair publishes what is complete and removes what is dead, as the next saves to these paths would."""

from __future__ import annotations

# Paths are str, here as in the storage package.
import os
from dataclasses import dataclass, replace
from typing import Literal

from milepost.commit import clean_up, roll_forward
from milepost.commit.by_rename.claim import unchanged_seconds
from milepost.commit.by_rename.discard import discard_emptied, remove_rest
from milepost.commit.by_rename.folders import names_of
from milepost.errors import CheckpointNotFoundError, MilepostError
from milepost.format.names import MANIFEST_NAME, is_own
from milepost.health.diagnosis import LATE_SECONDS, Watch, diagnose
from milepost.health.findings import Diagnosis, Finding
from milepost.storage import Storage

__all__ = ["Action", "diagnose_again", "repair"]


@dataclass(frozen=True)
class Action:
    """What a repair did with a folder, which was as `finding` says before."""

    what: Literal["published", "removed", "swept", "failed"]
    path: str
    message: str = ""
    finding: Finding | None = None


def repair(storage: Storage, diagnosis: Diagnosis) -> list[Action]:
    """Publish complete saves and remove dead ones, at every path of a diagnosis.

    A folder stays as it is while somebody works on it, and if nothing in it says that it is ours. What may
    be the last whole checkpoint is never given up for a damaged one. A failure at one path is an action of
    its own and does not stop the others.

    Args:
        storage: Where.
        diagnosis: What `diagnose` found there.
    """
    actions: list[Action] = []
    by_target: dict[str, list[Finding]] = {}
    for finding in diagnosis.findings:
        if finding.target is not None:
            by_target.setdefault(finding.target, []).append(finding)
    for target, findings in by_target.items():
        if not all(one.published and not one.leftovers and not one.emptied for one in findings):
            refusal = _refusal(storage, findings)
            try:
                if refusal is None:
                    actions += _repaired(storage, target, findings)
                elif refusal:
                    actions.append(Action("failed", target, refusal))
            except MilepostError as error:
                actions.append(Action("failed", target, error.message))
    return actions


def diagnose_again(storage: Storage, before: Diagnosis, *, deep: bool, watch: Watch | None) -> Diagnosis:
    """Diagnose what a repair left; it may have removed or moved all that was at the path.

    Args:
        storage: Where.
        before: The diagnosis that was repaired.
        deep: As for `diagnose`.
        watch: As for `diagnose`.
    """
    path = before.path
    if not before.is_run:
        path = next((finding.target for finding in before.findings if finding.target), path)
    try:
        return diagnose(storage, path, deep=deep, watch=watch)
    except CheckpointNotFoundError:
        return replace(before, findings=[], newest=diagnose(storage, os.path.dirname(path)).newest)


def _refusal(storage: Storage, findings: list[Finding]) -> str | None:
    """Why a path is not repaired; None if it is, "" while more ranks may come."""
    for finding in findings:
        silent = not finding.aborted and any(rank.state == "silent" for rank in finding.ranks)
        if finding.state == "incomplete" and (finding.alive is None or (silent and not finding.alive)):
            # By the file system's clock, as a wrong one here must not give a live job up.
            if unchanged_seconds(storage, finding.path) < LATE_SECONDS:
                return ""
            if not silent:
                return f"it cannot be told whether somebody works on it: {finding.path}"
        if not finding.published and any(damage.file != MANIFEST_NAME for damage in finding.damage):
            return f"a save that seemed complete is damaged; delete it yourself: {finding.path}"
    damaged = any(finding.published and finding.state in ("damaged", "unreadable") for finding in findings)
    heir = any(finding.state == "complete" and finding.alive is False for finding in findings)
    if damaged and not heir and any(finding.is_former for finding in findings):
        return "the checkpoint there cannot be read whole, so what it replaced is kept"
    emptied = [finding.path for finding in findings if finding.emptied]
    if emptied and not heir and unchanged_seconds(storage, emptied[0]) < LATE_SECONDS:
        return f"its data files are not seen, and it is new, so try again in a few minutes: {emptied[0]}"
    return None


def _repaired(storage: Storage, target: str, findings: list[Finding]) -> list[Action]:
    was = {finding.path: finding for finding in findings}
    if findings[0].state == "removed":
        remove_rest(storage, target)
        return [Action("removed", target, finding=findings[0])]
    before = set(names_of(storage, target) or ())
    published = roll_forward(storage, target)
    actions = [Action("published", target, finding=was.get(path)) for path in published]
    actions += [Action("removed", path, finding=was.get(path)) for path in clean_up(storage, target)]
    passing = {name for name in before if is_own(name) and name != MANIFEST_NAME}
    gone = passing - set(names_of(storage, target) or ())
    if target in was and was[target].emptied and not published and discard_emptied(storage, target):
        actions.append(Action("removed", target, finding=was[target]))
    elif gone and not published:
        actions.append(Action("swept", target, ", ".join(sorted(gone)), was.get(target)))
    return actions
