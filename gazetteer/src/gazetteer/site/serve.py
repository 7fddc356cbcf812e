"""Showing a built site on this machine, to this machine only."""

from __future__ import annotations

from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from gazetteer.errors import UsageError
from gazetteer.paths import SITE

if TYPE_CHECKING:
    from email.message import Message
    from pathlib import Path

__all__ = ["make_server"]

_HOSTS = {"127.0.0.1", "localhost", "[::1]"}


def _host(headers: Message) -> str:
    """Return the host that a request names, without its port."""
    name, colon, port = str(headers.get("Host") or "").rpartition(":")
    return name if colon and port.isdigit() else name + colon + port


class _Handler(SimpleHTTPRequestHandler):
    """Serves files; refuses requests that another site's page may have sent under its own name."""

    extensions_map = {**SimpleHTTPRequestHandler.extensions_map, ".js": "text/javascript", ".wasm": "application/wasm"}  # noqa: RUF012 - as in the base class

    def send_head(self) -> Any:  # noqa: ANN401 - as in the base class
        """Answer, unless the request was meant for another host."""
        if _host(self.headers) not in _HOSTS:
            self.send_error(403, "This server answers only to localhost")
            return None
        return super().send_head()

    def end_headers(self) -> None:
        """Let no page load anything from elsewhere."""
        self.send_header(
            "Content-Security-Policy",
            "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self' 'unsafe-inline'; img-src 'self' data:",
        )
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def list_directory(self, _path: object) -> None:
        """Show no listings: every folder of the site has an index."""
        self.send_error(404, "No such page")

    def log_message(self, *_arguments: object) -> None:
        """Say nothing for each request."""


def make_server(out: Path, port: int = 0) -> ThreadingHTTPServer:
    """Return a server of a built site, bound to 127.0.0.1 and not yet running.

    Args:
        out: The output folder of a build with ``--site``.
        port: The port; 0 takes a free one (``server_address`` says which).

    Raises:
        UsageError: There is no site there.
    """
    site = out / SITE
    if not (site / "index.html").is_file():
        msg = f"{out}: has no site. Build it with: gazetteer build REPO -o {out} --site"
        raise UsageError(msg)
    return ThreadingHTTPServer(("127.0.0.1", port), partial(_Handler, directory=str(site)))
