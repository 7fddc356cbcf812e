"""The first steps of the checkpoint process, before it imports anything that takes time."""

from __future__ import annotations

import signal
import socket
import sys

__all__ = ["READY", "main"]

READY = b"\x81\xa4type\xa5Ready"
"""The message `Ready` as bytes."""


def main() -> None:
    """Serve the trainer.

    The arguments are the descriptor of the line and the trainer's pid. A third one says that nothing of the
    user's runs at the start. Then the process is ready now: it accepts requests, and the trainer need not
    wait while it imports what a save needs.
    """
    ignored = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ignored)  # the trainer starts us with these blocked
    line = socket.socket(fileno=int(sys.argv[1]))
    line.set_inheritable(False)
    ready = len(sys.argv) > 3
    if ready:
        try:  # noqa: SIM105 - importing contextlib takes time, too
            line.send(READY)
        except OSError:
            pass  # the trainer has gone, and its requests may be in the line
    from milepost.background.service import serve  # noqa: PLC0415 - it takes some time

    serve(line, int(sys.argv[2]), ready=ready)
