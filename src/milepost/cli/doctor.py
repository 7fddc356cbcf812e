"""``milepost doctor``."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial

from milepost.cli.output import DAMAGED, FAILED, OK, Session, size
from milepost.cli.verify import progress_bar
from milepost.commit.contents import numbers
from milepost.commit.judge import wording
from milepost.health.diagnosis import diagnose
from milepost.health.findings import Damage, Diagnosis, Finding, RankState
from milepost.health.listing import causes, ranks_named
from milepost.health.repair import Action, diagnose_again, repair
from milepost.storage import default_storage

_MOST_RANKS = 10
_MOST_DAMAGE = 10
_MOST_KEYS = 5
_STYLES = {"whole": "green", "damaged": "bold red", "unreadable": "red", "complete": "green"}
_COMPARED = {
    "nothing": ("unchecked", "nothing of it was checked: --deep reads every byte"),
    "sizes": ("whole by size", "its data were compared by size alone: --deep compares every byte"),
    "bytes": ("whole", ""),
}
_SPANS = ((86400, "day"), (3600, "hour"), (60, "minute"), (1, "second"))


def run(session: Session, path: str, *, mend: bool, deep: bool, as_json: bool) -> int:
    """Say what is wrong at a path and what to do; return the exit code."""
    storage, watch = default_storage(), partial(progress_bar, session)
    found = diagnose(storage, path, deep=deep, watch=watch)
    actions = repair(storage, found) if mend else []
    if actions:
        found = diagnose_again(storage, found, deep=deep, watch=watch)
    if as_json:
        session.json(_as_data(found, actions))
    else:
        _print(session, found, actions)
    if any(finding.is_wrong for finding in found.findings) or any(a.what == "failed" for a in actions):
        return DAMAGED
    return FAILED if any(finding.state == "unreadable" for finding in found.findings) else OK


def _as_data(found: Diagnosis, actions: list[Action]) -> dict[str, object]:
    now = time.time()
    return {
        "path": found.path,
        "run": found.is_run,
        "checkpoints": [
            asdict(finding)
            | {"wrong": finding.is_wrong, "says": words(finding, now), "advice": advice(finding, found)}
            for finding in found.findings
        ],
        "newest": asdict(found.newest) if found.newest else None,
        "repaired": [asdict(action) for action in actions],
    }


def _print(session: Session, found: Diagnosis, actions: list[Action]) -> None:
    now = time.time()
    for action in actions:
        was = f" (it was {words(action.finding, now)})" if action.finding else ""
        if action.what == "swept":
            session.line(("swept", "bold"), f" {_shown(action.path)}: removed {action.message}")
        elif action.what == "failed":
            session.line(("not repaired", "red"), f" {_shown(action.path)}: {action.message}")
        else:
            session.line((action.what, "bold"), f" {_shown(action.path)}{was}")
    for finding in found.findings:
        style = _STYLES.get(finding.state, "yellow")
        session.line((finding.name, "bold"), ": ", (words(finding, now), style))
        if len(finding.damage) > 1:
            for damage in finding.damage[:_MOST_DAMAGE]:
                session.line("  ", _damage(damage))
            if len(finding.damage) > _MOST_DAMAGE:
                session.line(f"  and {len(finding.damage) - _MOST_DAMAGE} more")
        if todo := advice(finding, found):
            session.line("  -> ", todo)
    if found.is_run and not found.findings:
        session.message("no checkpoints in ", found.path)
        return
    if found.newest is None:
        session.line(("none is loadable", "bold red"))
        return
    unsure = _COMPARED[found.newest.compared][1]
    session.line((f"newest loadable is {_named(found.newest)}", "bold"), f"; {unsure}" if unsure else "")


def _shown(path: str) -> str:
    """A path as short as it can be given."""
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative


def _named(finding: Finding) -> str:
    if finding.step is None:
        return _shown(finding.target or finding.path)
    return f"step {finding.step} ({_shown(finding.target or finding.path)})"


def _plural(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


def _ago(moment: float, now: float) -> str:
    """How long ago something was."""
    seconds = int(max(now - moment, 0))
    span, word = next((pair for pair in _SPANS if seconds >= pair[0]), _SPANS[-1])
    return f"{_plural(seconds // span, word)} ago"


# ---------------------------------------------------------------------------- what a finding is

_SENTENCES = {
    "whole": "{compared}: {content}{problem}{leftovers}",
    "damaged": "damaged: {damage}",
    "unreadable": "{said}{problem}",
    "complete": "{said}{about}{alive}",
    "overtaken": "{said}{about}{alive}",
    "incomplete": "{progress}: {told}",
    "replaced": "{said}{about}{problem}",
    "foreign": "{said}{alive}",
    "removed": "{said}",
}


def words(finding: Finding, now: float) -> str:
    """What a finding is, in one line."""
    facts = [f"step {finding.step}"] if finding.step is not None else []
    facts += [_plural(finding.world_size, "rank")] if finding.world_size else []
    content, damage, left = ", ".join(facts), finding.damage, len(finding.leftovers)
    return _SENTENCES[finding.state].format(
        said=wording(finding.state, finding.path),
        compared=_COMPARED[finding.compared][0],
        content=content or "no step recorded",
        about=content and f": {content}",
        problem=f" ({finding.problem})" if finding.problem else "",
        leftovers=f" ({_plural(left, 'passing file')} of its save still in it)" if left else "",
        damage=f"{len(damage)} problems" if len(damage) > 1 else "".join(map(_damage, damage)),
        alive="; somebody still works on it" if finding.alive else "",
        progress="under way" if _is_living(finding) else "incomplete",
        told="; ".join(_told(finding, now)),
    )


def _damage(damage: Damage) -> str:
    owner = "" if damage.rank is None else f" of rank {damage.rank}"
    colon = ":" if owner and damage.message.partition(" ")[0] not in ("is", "has") else ""
    text = f"{damage.file}{owner}{colon} {damage.message}".strip()
    if damage.keys:
        more = len(damage.keys) - _MOST_KEYS
        keys = ", ".join(damage.keys[:_MOST_KEYS]) + (f" and {more} more" if more > 0 else "")
        text += f"; affected: {keys}"
    return text


# ---------------------------------------------------------------------------- what its ranks did

_DOING = {"begin": "beginning", "write": "writing", "barrier": "at the barrier"}


def _is_living(finding: Finding) -> bool:
    return bool(finding.alive) and not finding.aborted


def _told(finding: Finding, now: float) -> Iterable[str]:
    """What is known of the ranks of an attempt that has not committed."""
    for state, sentences in _OF_RANKS.items():
        yield from sentences(finding, [rank for rank in finding.ranks if rank.state == state], now)
    if not finding.ranks:
        yield finding.problem or "no rank has left a word"
    if finding.alive and finding.aborted:
        yield "other ranks have not given up yet"


def _failed(finding: Finding, ranks: list[RankState], _now: float) -> Iterable[str]:
    ranks = sorted(ranks, key=lambda rank: (rank.time, rank.rank))
    phases = {rank.rank: rank.phase or "its save" for rank in ranks}
    roots, stopped = causes((rank.rank, rank.error or "") for rank in ranks)
    for error, failed in list(roots.items())[:_MOST_RANKS]:
        yield f"{ranks_named(failed)} failed in {phases[failed[0]]} with {error}"
    if len(roots) > _MOST_RANKS:
        yield f"and {_plural(sum(map(len, list(roots.values())[_MOST_RANKS:])), 'more rank')} failed"
    if stopped:
        yield f"{ranks_named(stopped)} stopped because of it"
    if finding.aborted and not ranks:
        yield "a rank failed"


def _missing(finding: Finding, ranks: list[RankState], now: float) -> Iterable[str]:
    text, more = "never arrived (last seen {})", "never arrived"
    if _is_living(finding):
        text, more = ("has not arrived yet ({})", "have not arrived")
    for rank in ranks[:_MOST_RANKS]:
        last = _DOING.get(rank.phase or "", f"in {rank.phase}")
        if rank.bytes_done or rank.phase == "write":
            last += f", {size(rank.bytes_done)}"
        yield f"rank {rank.rank} {text.format(f'{last}, {_ago(rank.time, now)}')}"
    if len(ranks) > _MOST_RANKS:
        yield f"and {len(ranks) - _MOST_RANKS} more ranks {more}"


def _silent(finding: Finding, ranks: list[RankState], _now: float) -> Iterable[str]:
    begun = f"ha{'s' if len(ranks) == 1 else 've'} not begun yet" if _is_living(finding) else "never began"
    if ranks:
        yield f"{ranks_named(rank.rank for rank in ranks)} {begun}"


def _arrived(finding: Finding, ranks: list[RankState], _now: float) -> Iterable[str]:
    if ranks and len(ranks) == finding.world_size:
        yield "all ranks arrived" + (f", but {finding.problem}" if finding.problem else "")
    elif ranks:
        yield f"arrived: {numbers(rank.rank for rank in ranks)}"


_OF_RANKS: dict[str, Callable[[Finding, list[RankState], float], Iterable[str]]] = {
    "failed": _failed,
    "missing": _missing,
    "silent": _silent,
    "arrived": _arrived,
}

# ---------------------------------------------------------------------------- what to do


def _any(_finding: Finding, _found: Diagnosis) -> bool:
    return True


def _is_loaded_beside(finding: Finding, found: Diagnosis) -> bool:
    return found.newest is not None and found.newest.target == finding.target


def _is_needed(finding: Finding, found: Diagnosis) -> bool:
    others = [other for other in found.findings if other.target == finding.target and other.published]
    return finding.is_former and any(other.state in ("damaged", "unreadable") for other in others)


_ADVICE: list[tuple[str, Callable[[Finding, Diagnosis], bool], str]] = [
    ("damaged", lambda f, _: not f.published, "it is left alone: delete it yourself: {path}; {instead}"),
    ("damaged", _is_loaded_beside, "a complete save beside it is loaded in its place"),
    ("damaged", lambda f, _: f.emptied, "none of its data files is left: {repair} removes it; {instead}"),
    ("damaged", _any, "{instead}"),
    ("unreadable", _any, "update Milepost: pip install -U milepost"),
    ("incomplete", lambda f, _: f.aborted, "look at that rank's log; {next} removes it; {instead}"),
    ("incomplete", lambda f, _: f.kept, "it is committed and stays until a later one is; {instead}"),
    ("incomplete", lambda f, _: bool(f.alive), "wait for it; if it hangs, look at its missing ranks' logs"),
    ("incomplete", lambda f, _: f.alive is None, "other ranks may still come: look again soon; {instead}"),
    ("incomplete", _any, "nobody works on it any more: {next} removes it; {instead}"),
    ("complete", lambda f, _: bool(f.alive), "{loads}; its owners publish it"),
    ("complete", _any, "{loads}; {next} publishes it"),
    ("overtaken replaced", _is_needed, "its successor is damaged: move that away; {repair} restores this"),
    ("overtaken", _any, "it is of no use: {next} removes it"),
    ("replaced", lambda f, _: f.loads, "nothing is at its path: it loads from here; {repair} restores it"),
    ("replaced", _any, "{next} clears it"),
    ("removed", _any, "{repair} removes it"),
    ("foreign", _any, "it is left alone: move it away or delete it yourself: {path}"),
]
"""States, which findings of these states, and what to do about them; the first that fits counts."""


def advice(finding: Finding, found: Diagnosis) -> str | None:
    """What to do about a finding, if anything."""
    text: str | None = "its name is cut, and is told nowhere: move it away or delete it: {path}"
    if finding.target is not None:
        rows = (row for row in _ADVICE if finding.state in row[0].split())
        text = next((said for _, fits, said in rows if fits(finding, found)), None)
    instead = f"load {_named(found.newest)} instead" if found.newest else "no other checkpoint is loadable"
    repair = "`milepost doctor --repair`"
    return text and text.format(
        path=_shown(finding.path),
        instead=instead,
        loads="a load of its path reads it where it is",
        repair=repair,
        next=f"the next save to it, or {repair},",
    )
