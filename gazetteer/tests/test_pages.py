"""Names of pages, links between them, and sections that are left out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gazetteer.markdown import Page
from gazetteer.paths import docs_page, folder_page, href, kw_page


def test_empty_sections_are_left_out() -> None:
    """A heading that nothing follows is not there, nor one whose parts are all empty."""
    page = Page("T")
    page.heading(2, "Empty")
    page.heading(2, "Outer")
    page.heading(3, "Also empty")
    page.heading(3, "Full")
    page.items(["x"])
    page.heading(2, "Last")
    assert page.render() == "# T\n\n## Outer\n\n### Full\n\n- x\n"
    assert page.sections == ["Outer"]


parts = st.text(st.sampled_from("a~.md_x#"), min_size=1, max_size=8).filter(lambda s: s.strip(".") != "")


@given(st.sets(st.lists(parts, min_size=1, max_size=3).map("/".join), min_size=2, max_size=6))
def test_no_two_places_share_a_page(paths: set[str]) -> None:
    """Pages of different files and folders never meet, nor does a page meet a folder."""
    pages = [page(path) for path in paths for page in (docs_page, kw_page)]
    folders = {"/".join(path.split("/")[:n]) for path in paths for n in range(len(path.split("/")))}
    pages += [folder_page(folder, name) for folder in folders for name in ("index.md", "doc.md", "sub.md")]
    assert len(set(pages)) == len(pages)
    used = {"/".join(page.split("/")[:n]) for page in pages for n in range(1, len(page.split("/")))}
    assert not used & set(pages)


def test_links_are_relative_and_quoted() -> None:
    """A link leads from page to page whatever the names hold."""
    assert href("a/b.md", "a/c d#.md", "x") == "c%20d%23.md#x"
    assert href("a/b.md", "e/f.md") == "../e/f.md"
    assert href("index.md", "e/f.md") == "e/f.md"
