"""The command line: ``milepost show``, ``verify``, ``ls``, ``doctor`` and ``rm``.

Data go to stdout and messages to stderr. This module imports nothing heavy: each command imports what
it needs, so that ``milepost --help`` is there at once.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated, Any

import typer

from milepost.cli.output import EPILOG, UNREAD, Session, reported

__all__ = ["app", "main"]

app = typer.Typer(
    name="milepost",
    help="Look at checkpoints that Milepost saved, and check them. Only `doctor --repair` and `rm` change "
    "anything.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text for people.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Bytes = Annotated[bool, typer.Option("--bytes", help="Print sizes as exact numbers of bytes.")]


def _print_version(value: bool) -> None:
    if value:
        import milepost

        print(f"milepost {milepost.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(epilog=EPILOG)
def show(
    checkpoint: Annotated[str, typer.Argument(metavar="CKPT", help="A checkpoint's folder.")],
    depth: Annotated[int | None, typer.Option(min=0, help="Show only so many levels of nesting.")] = None,
    only: Annotated[
        str | None,
        typer.Option("--filter", help="Show only paths that contain this text or match this *pattern*."),
    ] = None,
    rank: Annotated[int, typer.Option(min=0, help="Whose part to show.")] = 0,
    exact: Bytes = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a checkpoint holds: its values with shapes, dtypes and sizes, who wrote it and when."""
    with reported(checkpoint, debug=debug, as_json=as_json), Session() as session:
        from milepost.cli.show import run

        session.exit_code = run(session, checkpoint, depth, only, rank, exact=exact, as_json=as_json)


@app.command(epilog=EPILOG)
def verify(
    checkpoints: Annotated[list[str], typer.Argument(metavar="CKPT", help="Checkpoints' folders.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare every byte of checkpoints with its checksum, and name the damaged tensors of each file."""
    with reported(*checkpoints, debug=debug), Session() as session:
        from milepost.cli.verify import run

        session.exit_code = run(session, checkpoints, as_json=as_json)


@app.command("ls", epilog=EPILOG)
def list_(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="The folder in which checkpoints lie.")] = ".",
    exact: Bytes = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the checkpoints in a folder: step, size, and state (committed, partial, damaged or unreadable).

    The state comes from the manifests and the sizes of the files; `milepost verify` reads the bytes.
    """
    with reported(folder, debug=debug, as_json=as_json), Session() as session:
        from milepost.cli.ls import run

        session.exit_code = run(session, folder, exact=exact, as_json=as_json)


@app.command(epilog=EPILOG)
def doctor(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A checkpoint, or a folder of checkpoints.")],
    mend: Annotated[
        bool,
        typer.Option("--repair", help="Publish what is complete, and remove what dead saves have left."),
    ] = False,
    deep: Annotated[bool, typer.Option("--deep", help="Compare every byte with its checksum.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Tell what is wrong with a checkpoint or a folder of them, which ranks are missing, and what to do.

    Without --repair nothing is changed. With it, nothing is touched that a save still works on.
    """
    with reported(path, debug=debug, as_json=as_json), Session() as session:
        from milepost.cli.doctor import run

        session.exit_code = run(session, path, mend=mend, deep=deep, as_json=as_json)


@app.command(epilog=EPILOG)
def rm(
    checkpoints: Annotated[list[str], typer.Argument(metavar="CKPT", help="Checkpoints' folders.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    debug: Debug = False,
) -> None:
    """Remove checkpoints. A folder with other files in it stays as it is, and so do all others then.

    Each is renamed first, so that a removal that is killed leaves no half of a checkpoint at its path.
    """
    with reported(*checkpoints, debug=debug), Session() as session:
        from milepost.cli.rm import run

        session.exit_code = run(session, checkpoints, yes=yes)


def main() -> Any:
    """Run the command line; the entry point of the ``milepost`` script."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed before the start
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for good
        if hasattr(stream := getattr(sys, name), "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGPIPE, lambda *_: os._exit(UNREAD))  # the reader of the output has gone away
    with reported():
        return app()
