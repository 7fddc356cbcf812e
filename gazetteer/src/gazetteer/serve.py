"""Showing a built site on this machine, to this machine only."""

from __future__ import annotations

from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

from gazetteer.errors import UsageError
from gazetteer.paths import SITE

if TYPE_CHECKING:
    from http.client import HTTPMessage
    from pathlib import Path

__all__ = ["make_server"]

_HOSTS = {"127.0.0.1", "localhost", "[::1]"}


def _host(headers: HTTPMessage) -> str:
    return (headers.get("Host") or "").rsplit(":", 1)[0] if not (headers.get("Host") or "").endswith("]") else headers["Host"]


class _Handler(SimpleHTTPRequestHandler):
    """Serves files; refuses requests that another site's page may have sent under its own name."""

    extensions_map = {**SimpleHTTPRequestHandler.extensions_map, ".js": "text/javascript", ".wasm": "application/wasm"}  # noqa: RUF012 - as in the base class

    def send_head(self):  # type: ignore[no-untyped-def]  # noqa: ANN201 - the base class gives no type
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

    def list_directory(self, _path: object) -> None:  # type: ignore[override]
        """Show no listings: every folder of the site has an index."""
        self.send_error(404, "No such page")

    def log_message(self, *_arguments: object) -> None:  # type: ignore[override]
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
