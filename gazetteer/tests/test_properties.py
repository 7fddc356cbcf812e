"""Any text gives valid pages; nothing in a source can break a page or get into it as markup."""

from __future__ import annotations

import tempfile
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

import gazetteer
from gazetteer.markdown import clean, code, fence, slug, text, words
from gazetteer.read.text import one_line

TRAPS = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "```",
    "````\n# Heading\n",
    "~~~",
    "](http://evil.example)",
    "[a]: http://evil.example",
    "![x](y)",
    "**bold**",
    "`",
    "``",
    "{{< x >}}",
    "{{% x %}}",
    "{{ .Site }}",
    "<!--",
    "-->",
    "<details>",
    "| a |\n|---|",
    "# H",
    "- x",
    "1. x",
    "> q",
    "&lt;",
    "&#60;",
    "\\",
    "\u202e",
    "\u2028",
    "\x00",
    "\r",
    "http://evil.example",
    "www.evil.example",
    "a@b.example",
    "$x$",
    "\ufdd0",
    "---",
    "===",
    "[^1]",
    ":::",
    "%%",
    "javascript:alert(1)",
]
texts = st.lists(
    st.one_of(st.sampled_from(TRAPS), st.text(max_size=12), st.sampled_from(["\n", " ", "\t", "x"])), max_size=14
).map("".join)
COMMONMARK = MarkdownIt("commonmark")
GITHUB = MarkdownIt("gfm-like", {"linkify": False}).enable("table")
ALLOWED = {"h1", "h2", "h3", "h4", "p", "ul", "li", "a", "strong", "code", "pre", "ol"}


class Shape(HTMLParser):
    """Collects tags, attributes and words."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def squeezed(value: str) -> str:
    return "".join(clean(one_line(value)).split())


@pytest.mark.parametrize("parser", [COMMONMARK, GITHUB], ids=["commonmark", "github"])
@given(texts)
def test_text_shows_as_itself(parser: MarkdownIt, value: str) -> None:
    """Escaped text renders to one paragraph that says what the text says."""
    shape = Shape(parser.render(f"- **x**: {text(value)}"))
    assert [tag for tag, _ in shape.tags] == ["ul", "li", "strong"]
    assert "".join("".join(shape.words).split()) == "x:" + squeezed(value)


@pytest.mark.parametrize("parser", [COMMONMARK, GITHUB], ids=["commonmark", "github"])
@given(texts)
def test_text_at_the_start_of_a_line_begins_no_block(parser: MarkdownIt, value: str) -> None:
    """Escaped text on a line of its own is a paragraph, whatever it begins with."""
    shape = Shape(parser.render(text(value)))
    assert [tag for tag, _ in shape.tags] in (["p"], [])
    assert "".join("".join(shape.words).split()) == squeezed(value)


@given(texts)
def test_words_keep_code_as_code_and_all_else_as_words(value: str) -> None:
    """A docstring's sentence renders to words and code spans only."""
    shape = Shape(COMMONMARK.render(f"x {words(value)}"))
    assert {tag for tag, _ in shape.tags} <= {"p", "code"}


@given(texts)
def test_code_shows_as_itself(value: str) -> None:
    """A code span holds exactly its text and ends where it should."""
    shape = Shape(COMMONMARK.render(f"a {code(value)} b"))
    assert [tag for tag, _ in shape.tags] == ["p", "code"]
    assert "".join("".join(shape.words).split()) == "a" + (squeezed(value) or "\ufffd") + "b"


@given(texts)
def test_a_fence_holds_everything(value: str) -> None:
    """No line of a source ends its block."""
    tokens = COMMONMARK.parse("before\n\n" + fence(value, "python") + "\nafter\n")
    assert [t.type for t in tokens] == [
        "paragraph_open",
        "inline",
        "paragraph_close",
        "fence",
        "paragraph_open",
        "inline",
        "paragraph_close",
    ]
    assert tokens[3].content.rstrip("\n") == clean(value.replace("\r\n", "\n").replace("\r", "\n")).rstrip("\n")


NAMES = [
    "x.py",
    "x.c",
    "x.cpp",
    "x.cu",
    "x.js",
    "x.ts",
    "x.go",
    "x.rs",
    "x.java",
    "x.sh",
    "CMakeLists.txt",
    "x.yaml",
    "x.toml",
    "x.json",
    "x.md",
    "x.rst",
    "x.unknown",
]
STARTS = [
    "",
    '"""',
    "# ",
    "/* ",
    "// ",
    "class A:\n  '''",
    "def f(): '''",
    "import ",
    "#include <",
    "# Title\n\n",
    "key: ",
    '{"a": "',
]


@settings(max_examples=120)
@given(st.sampled_from(NAMES), st.sampled_from(STARTS), texts)
def test_any_text_gives_valid_pages(name: str, start: str, value: str) -> None:
    """Whatever a file holds, its pages have no markup of its own and every link resolves."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "repo")
        root.mkdir()
        (root / name).write_bytes((start + value).encode("utf-8", "surrogatepass"))
        out = Path(folder, "out")
        gazetteer.build(root, out, jobs=1)
        assert gazetteer.check(out, jobs=1).broken == []
        for page in out.rglob("*.md"):
            shape = Shape(COMMONMARK.render(page.read_text("utf-8")))
            assert {tag for tag, _ in shape.tags} <= ALLOWED, page.name
            for tag, attributes in shape.tags:
                if tag == "a":
                    assert ":" not in str(attributes["href"]), attributes


def test_slugs_are_those_of_github() -> None:
    """The fixed section titles have the anchors that GitHub gives them."""
    assert slug("Architecture & Design") == "architecture--design"
    assert slug("Security & Safety") == "security--safety"
    assert slug("Keyword → Section Map") == "keyword--section-map"


def test_a_long_name_with_a_backtick_takes_no_time() -> None:
    """Telling a simple name from others is linear; a pattern that tried every split once hung here."""
    assert code("a" * 50_000 + "`") == "`` " + "a" * 50_000 + "` ``"
