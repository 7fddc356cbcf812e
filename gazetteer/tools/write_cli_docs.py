"""Writes what every command says of itself under ``--help`` to a page."""

from __future__ import annotations

import sys
from pathlib import Path

from typer.testing import CliRunner

from gazetteer.cli import app

COMMANDS = ("", "build", "search", "check", "serve")


def page() -> str:
    """Return the page."""
    blocks = ["# The command line\n", "Written by `make docs` from the program itself.\n"]
    for command in COMMANDS:
        arguments = [*command.split(), "--help"]
        result = CliRunner().invoke(
            app, arguments, prog_name="gazetteer", env={"COLUMNS": "100", "TERMINAL_WIDTH": "100"}
        )
        text = "\n".join(line.rstrip() for line in result.output.strip().splitlines())
        blocks.append(f"## gazetteer {command}".rstrip() + f"\n\n```text\n{text}\n```\n")
    return "\n".join(blocks)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), "utf-8")
