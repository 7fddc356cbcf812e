"""MkDocs hooks for `make docs-site`: pages from outside docs/, pages of the API, no use of the network."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

OUTSIDE = {
    "index.md": "README.md",
    "architecture.md": "ARCHITECTURE.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
}
"""Pages of the site whose source is not in docs/."""

LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")
RESOURCE = re.compile(
    r"""<(?:script|link|img|iframe|source|video|audio|object|embed)\b[^>]*?\b(?:src|href|data)=["']?(?:https?:)?//
    |(?:url\(|@import\s)\s*["']?(?:https?:)?//""",
    re.VERBOSE,
)


def on_files(files, config):
    """Add the pages from outside docs/, and a page for each module that the navigation names."""
    root = Path(config.config_file_path).parent
    for uri, name in OUTSIDE.items():
        files.append(File.generated(config, uri, abs_src_path=str(root / name)))
    for uri in _pages(config.nav):
        if uri.startswith("api/"):
            name = Path(uri).stem
            module = name if name == "milepost" else f"milepost.{name}"
            files.append(File.generated(config, uri, content=f"# `{module}`\n\n::: {module}\n"))
    return files


def _pages(nav):
    for entry in nav:
        for value in entry.values():
            yield from _pages(value) if isinstance(value, list) else (value,)


def on_page_markdown(markdown, page, config, files):
    """Point links at pages of the site. A link to a file outside the site becomes its text."""
    source = page.file.abs_src_path
    if source is None:
        return markdown
    known = {Path(file.abs_src_path): file.src_uri for file in files if file.abs_src_path}

    def pointed(link):
        text, target, anchor = link[1], link[2], link[3] or ""
        if "://" in target:
            return link[0]
        path = (Path(source).parent / target).resolve()
        uri = known.get(path) or known.get(path / "README.md")
        if uri is None:
            return text if path.exists() else link[0]  # MkDocs reports a link that leads nowhere
        return f"[{text}]({posixpath.relpath(uri, posixpath.dirname(page.file.src_uri))}{anchor})"

    return LINK.sub(pointed, markdown)


def on_post_build(config):
    """Refuse a site whose pages or styles load anything from another host."""
    for path in Path(config.site_dir).rglob("*"):
        if path.suffix in {".html", ".css"} and (found := RESOURCE.search(path.read_text())):
            raise PluginError(f"{path} loads something from the network: {found[0]}")
