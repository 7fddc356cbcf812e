"""The command line: data to stdout, messages to stderr.

Exit codes: 0 done; 1 ``check`` found broken links or ``search`` found nothing; 2 the command was
used wrongly or could not be done; 130 interrupted.
"""

from __future__ import annotations

import json
import sys
import webbrowser
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from gazetteer.build import Summary
from gazetteer.build import build as build_pages
from gazetteer.check import check as check_links
from gazetteer.errors import GazetteerError
from gazetteer.model import Kind
from gazetteer.paths import SITE
from gazetteer.read.collect import read_repository
from gazetteer.search import search as search_facts
from gazetteer.site.serve import make_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["app", "main"]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
_messages = Console(stderr=True, highlight=False)

_KINDS = (*(kind.value for kind in Kind), "heading", "file")
_Json = Annotated[bool, typer.Option("--json", help="Write the result to stdout as JSON.")]
_Jobs = Annotated[int, typer.Option("--jobs", "-j", min=0, help="Processes to use; 0: one per processor.")]
_Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no summary.")]


@contextmanager
def _progress(*, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    columns = (TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    hidden = quiet or not _messages.is_terminal
    with Progress(*columns, console=_messages, disable=hidden, transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def report(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase, total=total)
            bar.update(tasks[phase], completed=done, total=total)

        yield report


def _print_json(value: Any) -> None:  # noqa: ANN401 - whatever JSON can hold
    sys.stdout.write(json.dumps(value, ensure_ascii=False, indent=2, sort_keys=True) + "\n")


def _say(summary: Summary, out: Path, *, site: bool) -> None:
    done = (
        f"{summary.parsed:,} parsed, {summary.written:,} pages written"
        if summary.parsed or summary.written
        else "nothing had changed"
    )
    _messages.print(
        f"{summary.files:,} files in {summary.folders:,} folders, {summary.symbols:,} symbols, {summary.pages:,} pages; {done} in {summary.seconds:.1f} s",
        markup=False,
        soft_wrap=True,
    )
    words = {
        "partial": "parsed with errors",
        "huge": "too large to parse",
        "failed": "crashed the parser",
        "link": "symbolic links",
        "text": "in no known language",
    }
    notes = [f"{count:,} {words.get(status, status)}" for status, count in sorted(summary.statuses.items())]
    if summary.excluded:
        notes.append(f"{summary.excluded:,} left out (the index lists them)")
    if summary.removed:
        notes.append(f"{summary.removed:,} stale pages removed")
    if notes:
        _messages.print("  " + ", ".join(notes), markup=False, soft_wrap=True)
    _messages.print(
        f"Read {out / 'index.md'}" + (f", or: gazetteer serve {out}" if site else ""), markup=False, soft_wrap=True
    )


def _show_version(show: bool) -> None:
    if show:
        sys.stdout.write(f"gazetteer {version('gazetteer-docs')}\n")
        raise typer.Exit


@app.callback()
def _top(
    _version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version.")
    ] = False,
) -> None:
    """Document a whole repository from its syntax trees. Nothing is sent anywhere.

    Exit codes: 0 done; 1 check found broken links, or search found nothing; 2 used wrongly or not
    possible; 130 interrupted.
    """


@app.command()
def build(
    repository: Annotated[Path, typer.Argument(help="Root folder of the repository.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the pages go.", show_default=False)],
    name: Annotated[
        str, typer.Option(help="What the pages call the repository; empty: its folder's name.", show_default=False)
    ] = "",
    site: Annotated[bool, typer.Option("--site", help="Make the static site as well.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Write OUT/index.json as well, and the summary to stdout as JSON.")
    ] = False,
    jobs: _Jobs = 0,
    quiet: _Quiet = False,
) -> None:
    """Document a repository; only what changed is parsed and written."""
    try:
        with _progress(quiet=quiet) as report:
            summary = build_pages(repository, out, name=name, jobs=jobs, json_index=as_json, site=site, progress=report)
    except KeyboardInterrupt:
        _messages.print("Interrupted. Every page is whole; the next build goes on from here.", soft_wrap=True)
        raise  # Typer makes it exit code 130
    if as_json:
        _print_json(asdict(summary))
    if not quiet:
        _say(summary, out, site=site)


@app.command()
def search(
    repository: Annotated[Path, typer.Argument(help="Root folder of the repository.", show_default=False)],
    term: Annotated[str, typer.Argument(help="A name or a part of one.", show_default=False)],
    kind: Annotated[str, typer.Option(help=f"Only this kind: {', '.join(_KINDS[:-1])} or {_KINDS[-1]}.")] = "",
    limit: Annotated[int, typer.Option("--limit", "-n", min=0, help="At most so many; 0: all.")] = 50,
    as_json: _Json = False,
    jobs: _Jobs = 0,
) -> None:
    """Find symbols and files by name; the best fit comes first. Exit code 1: nothing found."""
    if kind not in ("", *_KINDS):
        raise typer.BadParameter(f"{kind!r} is none of {', '.join(_KINDS)}.", param_hint="--kind")
    if not term:
        msg = "is empty; every name would fit."
        raise typer.BadParameter(msg, param_hint="term")
    with _progress(quiet=False) as report:
        facts = read_repository(repository, jobs=jobs, progress=report)
    hits = search_facts(facts, term, kind=kind, limit=limit)
    if as_json:
        _print_json([asdict(hit) for hit in hits])
    else:
        for hit in hits:
            tail = f"  {hit.doc}" if hit.doc else ""
            sys.stdout.write(f"{hit.path}:{hit.line}: {hit.kind} {hit.signature or hit.name}{tail}\n")
    if not hits:
        _messages.print(f"Nothing is named like {term!r}.", markup=False, soft_wrap=True)
        raise typer.Exit(1)


@app.command()
def check(
    out: Annotated[Path, typer.Argument(help="Output folder of a build.", show_default=False)],
    as_json: _Json = False,
    jobs: _Jobs = 0,
) -> None:
    """Follow every link and anchor. Exit code 1: some lead nowhere; they are named."""
    with _progress(quiet=False) as progress:
        report = check_links(out, jobs=jobs, progress=progress)
    if as_json:
        broken = [{"page": b.page, "link": b.link, "why": b.why} for b in report.broken]
        _print_json({"pages": report.pages, "links": report.links, "broken": broken})
    else:
        for item in report.broken:
            sys.stdout.write(f"{item.page}: {item.link}: {item.why}\n")
    _messages.print(
        f"{report.pages:,} pages, {report.links:,} links, {len(report.broken):,} broken", markup=False, soft_wrap=True
    )
    if report.broken:
        raise typer.Exit(1)


@app.command()
def serve(
    out: Annotated[Path, typer.Argument(help="Output folder of a build with --site.", show_default=False)],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: a free one.")] = 8000,
    open_browser: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    as_json: _Json = False,
) -> None:
    """Serve the site on this machine, to this machine only, until interrupted."""
    try:
        server = make_server(out, port)
    except OSError as error:
        _messages.print(
            f"Port {port} cannot be used: {error.strerror}. Name another with --port.", markup=False, soft_wrap=True
        )
        raise typer.Exit(2) from error
    url = f"http://127.0.0.1:{server.server_address[1]}/"
    if as_json:
        _print_json({"url": url, "site": str(out / SITE)})
    else:
        sys.stdout.write(url + "\n")
    sys.stdout.flush()
    if open_browser:
        webbrowser.open(url)
    with server:
        server.serve_forever()


def main() -> None:
    """Run the command line and end the process with its exit code."""
    try:
        app(standalone_mode=True)
    except (GazetteerError, OSError) as error:
        _messages.print(f"error: {error}", markup=False, soft_wrap=True)
        raise SystemExit(2) from error
