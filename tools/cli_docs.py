"""The help of every command, as Markdown for docs/cli.md (called by cog)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

COMMANDS = ("", "show", "verify", "ls", "doctor", "rm")


def help_of(command: str) -> str:
    """What ``milepost COMMAND --help`` prints on a terminal of 100 columns."""
    script = Path(sys.executable).with_name("milepost")
    drop = ("COLUMNS", "LINES", "FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS")
    variables = {name: value for name, value in os.environ.items() if name not in drop}
    variables |= {"TERMINAL_WIDTH": "100", "NO_COLOR": "1", "TERM": "dumb", "PYTHONUTF8": "1"}
    arguments = [str(script), *command.split(), "--help"]
    return subprocess.run(arguments, env=variables, capture_output=True, text=True, check=True).stdout


def markdown() -> str:
    """One section for each command."""
    sections = []
    for command in COMMANDS:
        name = f"milepost {command}".strip()
        text = "\n".join(line.rstrip() for line in help_of(command).strip().splitlines())
        sections.append(f"## `{name} --help`\n\n```text\n{text}\n```\n")
    return "\n" + "\n".join(sections)
