"""Ports for the tests' servers."""

from __future__ import annotations

import random
import socket
from contextlib import suppress


def free_port():
    """A port at which nobody listens, none of those that the system gives to whoever wants any."""
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
