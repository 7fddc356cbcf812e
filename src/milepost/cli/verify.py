"""``milepost verify``."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from milepost.cli.output import DAMAGED, FAILED, NOT_FOUND, OK, Session, exit_code_of, explain, size
from milepost.errors import MilepostError
from milepost.health.verify import Problem, Report, verify
from milepost.storage import default_storage

if TYPE_CHECKING:
    from collections.abc import Iterator

    from milepost.health.verify import Progress

_MOST_KEYS = 5
_MOST_PROBLEMS = 50


def run(session: Session, checkpoints: list[str], *, as_json: bool) -> int:
    """Verify one checkpoint after the other; return the exit code of the worst."""
    storage = default_storage()
    codes, results = [], []
    for path in checkpoints:
        try:
            with progress_bar(session, path) as progress:
                report = verify(storage, path, progress)
        except MilepostError as error:
            codes.append(exit_code_of(error))
            results.append({"path": path, "ok": False, "error": error.message})
            if not as_json:
                session.line(
                    path, ": ", ("incomplete or damaged" if codes[-1] == DAMAGED else "no result", "red")
                )
            session.message("error: ", explain(error).replace("\n", " — "))
            continue
        codes.append(DAMAGED if report.problems else OK)
        results.append(_as_data(path, report))
        if not as_json:
            _print(session, path, report)
    if as_json:
        session.json(results)
    return next((code for code in (DAMAGED, FAILED, NOT_FOUND) if code in codes), OK)


@contextmanager
def progress_bar(session: Session, path: str) -> Iterator[Progress]:
    """A progress bar on stderr, if that is a terminal."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
    from rich.text import Text

    from milepost.cli.output import plain

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=session.err, transient=True, disable=not session.err.is_terminal) as bar:
        task = bar.add_task(Text(plain(path)).markup, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _as_data(path: str, report: Report) -> dict[str, Any]:
    data = asdict(report)
    return {"path": path, "ok": not report.problems, "folder": data.pop("path"), **data}


def _print(session: Session, path: str, report: Report) -> None:
    state = ("damaged", "bold red") if report.problems else ("ok", "green")
    files = f"{report.files} {'file' if report.files == 1 else 'files'}"
    step = f"step {report.step}, " if report.step is not None else ""
    kind = "" if report.kind == "milepost" else ", files of plain torch.save"
    session.line(path, ": ", state, f", {step}{files}, {size(report.bytes)}{kind}")
    for problem in report.problems[:_MOST_PROBLEMS]:
        session.line("  ", _place(problem), ("  " + problem.message, "red"), *_keys(problem))
    if len(report.problems) > _MOST_PROBLEMS:
        session.line(f"  … and {len(report.problems) - _MOST_PROBLEMS} more (--json lists all)")
    for warning in report.warnings:
        session.message("warning: ", path, "/", _place(warning), "  ", warning.message)


def _place(problem: Problem) -> str:
    if problem.offset < 0:
        return problem.file
    return f"{problem.file} bytes {problem.offset}–{problem.offset + problem.length - 1}"


def _keys(problem: Problem) -> list[str | tuple[str, str]]:
    if not problem.keys:
        return []
    shown = ", ".join(problem.keys[:_MOST_KEYS])
    more = len(problem.keys) - _MOST_KEYS
    return ["  in ", (shown, "bold"), f" and {more} more" if more > 0 else ""]
