"""The command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gazetteer.build import build as build_pages

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _top() -> None:
    """Gazetteer."""


@app.command()
def build(repository: Path, out: Annotated[Path, typer.Option("--out", "-o")], jobs: int = 0, json: bool = False) -> None:
    """Document a repository."""
    print(build_pages(repository, out, jobs=jobs, json_index=json))


def main() -> None:
    """Run the command line."""
    app()
