"""The site in a real browser: search opens a class at its line, dark mode stays, sources stay text."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from conftest import SAMPLE, Maker
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

import gazetteer
from gazetteer.site.drawing import draw, read_mermaid
from gazetteer.site.serve import make_server

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1300,1200",
]
EVIL = '''"""Text with </script><script>window.evil = 1</script> and <img src=x onerror="window.evil = 1">."""

TRICK = "{{< evil >}} {{ .Site }} {{% x %}} ``` <!-- </main>"


class Marked:
    """Has `code`, **bold** and <b onclick="window.evil = 1">HTML</b>."""
'''


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Serve the site of the sample, with a file that tries to break out of its pages."""
    folder = tmp_path_factory.mktemp("site")
    root = folder / "repo"
    shutil.copytree(SAMPLE, root)
    (root / "a b#c.py").write_text(EVIL)
    (root / "_source").mkdir()
    (root / "_source" / "x.py").write_text("class Hidden: pass\n")
    gazetteer.build(root, folder / "out", site=True)
    server = make_server(folder / "out")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", folder
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """Start the browser; without one the tests fail, they are not skipped."""
    options = webdriver.ChromeOptions()
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.binary_location = shutil.which("chromium") or "chromium is not installed"
    driver = webdriver.Chrome(
        options=options, service=webdriver.ChromeService(shutil.which("chromedriver") or "chromedriver")
    )
    yield driver
    driver.quit()


def results(browser: webdriver.Chrome, term: str, wanted: str) -> list[str]:
    """Type a term and return the links that are shown once ``wanted`` is among them."""
    box = browser.find_element(By.ID, "search")
    box.clear()
    box.send_keys(term)
    read = "return [...document.querySelectorAll('#results a')].map(a => a.innerText)"
    WebDriverWait(browser, 20).until(lambda b: any(wanted in row for row in b.execute_script(read)))
    return list(browser.execute_script(read))


def test_search_finds_a_class_and_opens_it_at_its_line(site: tuple[str, Path], browser: webdriver.Chrome) -> None:
    """The first result for a class's name leads to its source, at the line that defines it."""
    browser.get(f"{site[0]}/index.html")
    browser.find_element(By.TAG_NAME, "body").send_keys("/")
    rows = results(browser, "TestMakeCheck", "TestMakeCheckpointer")
    assert "test_builder.py:27" in rows[0]
    browser.find_element(By.ID, "search").send_keys(Keys.ENTER)
    WebDriverWait(browser, 20).until(lambda b: b.current_url.endswith("_source/test_builder.py.html#L27"))
    line = browser.execute_script("return document.getElementById('L27').closest('.line').innerText")
    assert "class TestMakeCheckpointer(TestCase):" in line
    top = browser.execute_script("return document.getElementById('L27').getBoundingClientRect().top")
    assert 0 <= top < browser.execute_script("return innerHeight")


def test_full_text_search_finds_words_of_a_docstring(site: tuple[str, Path], browser: webdriver.Chrome) -> None:
    """Words that no symbol has are found in the pages, from a page deep in the tree as well."""
    browser.get(f"{site[0]}/com/example/Garden.java_docs.html")
    results(browser, "fixed-size numbered records", "store.c")


def test_dark_mode_is_kept_from_page_to_page(site: tuple[str, Path], browser: webdriver.Chrome) -> None:
    """The button changes the colours, and the next page has them too."""
    browser.get(f"{site[0]}/index.html")

    def ground() -> str:
        return str(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))

    before = ground()
    browser.find_element(By.ID, "theme").click()
    changed = ground()
    assert changed != before
    browser.get(f"{site[0]}/keywords.html")
    assert ground() == changed
    browser.find_element(By.ID, "theme").click()
    assert ground() == before


@pytest.mark.parametrize(
    "page",
    [
        "a%20b%23c.py_docs.html",
        "a%20b%23c.py_kw.html",
        "_source/a~20b~23c.py.html",
        "index.html",
        "keywords.html",
        "comprehensive_book.html",
    ],
)
def test_nothing_in_a_source_gets_into_a_page(site: tuple[str, Path], browser: webdriver.Chrome, page: str) -> None:
    """Scripts, images and handlers in docstrings and strings are shown, not run."""
    browser.get(f"{site[0]}/{page}")
    assert browser.execute_script("return window.evil") is None
    assert (
        browser.execute_script(
            "return document.querySelectorAll('main img, main script, main [onerror], main [onclick]').length"
        )
        == 0
    )


def test_a_source_is_shown_as_it_is(site: tuple[str, Path], browser: webdriver.Chrome) -> None:
    """The source page says exactly what the file says, template marks included."""
    browser.get(f"{site[0]}/_source/a~20b~23c.py.html")
    shown = browser.execute_script("return [...document.querySelectorAll('main .cl')].map(l => l.textContent).join('')")
    assert shown == EVIL


def test_graphs_are_drawn_and_lead_to_pages(site: tuple[str, Path], browser: webdriver.Chrome) -> None:
    """The import graph is a picture whose nodes are links."""
    browser.get(f"{site[0]}/doc.html")
    assert browser.execute_script("return document.querySelectorAll('figure.graph svg a').length") > 10
    target = browser.execute_script("return document.querySelector('figure.graph svg a').getAttribute('href')")
    with urlopen(f"{site[0]}/{target}") as answer:
        assert answer.status == 200


def test_every_link_of_the_site_resolves(site: tuple[str, Path]) -> None:
    """Links between pages, to lines and to what the pages load all lead somewhere."""
    report = gazetteer.check(site[1] / "out")
    assert report.broken == []
    assert any(path.suffix == ".html" for path in (site[1] / "out" / "_site").iterdir())


def test_the_server_answers_to_this_machine_only(site: tuple[str, Path]) -> None:
    """Requests under another host's name, climbing paths and folders without an index are refused."""
    for path, host, status in (
        ("/index.html", "evil.example", 403),
        ("/_assets/", "", 404),
        ("/../../repo/store.c", "", 404),
        ("/%2e%2e/state", "", 404),
    ):
        request = Request(site[0] + path, headers={"Host": host} if host else {})
        with pytest.raises(HTTPError) as error:
            urlopen(request)
        assert error.value.code == status
        error.value.close()
    with urlopen(site[0] + "/index.html") as answer:
        assert "default-src 'self'" in answer.headers["Content-Security-Policy"]


def test_only_changed_pages_are_rendered_again(tmp_path: Path) -> None:
    """A second site build renders nothing; one change renders that file's pages; a removal removes them."""
    root = tmp_path / "repo"
    (root / "sub").mkdir(parents=True)
    (root / "a.py").write_text('"""A."""\n')
    (root / "sub" / "b.py").write_text('"""B."""\n')
    out = tmp_path / "out"
    assert gazetteer.build(root, out, site=True).site_rendered == 2 * 3 + 2 * 3 + 2
    assert gazetteer.build(root, out, site=True).site_rendered == 0
    (root / "a.py").write_text('"""A changed."""\n')
    assert 3 <= gazetteer.build(root, out, site=True).site_rendered <= 8
    shutil.rmtree(root / "sub")
    gazetteer.build(root, out, site=True)
    assert not (out / "_site" / "sub").exists()
    assert not (out / "_site" / "_source" / "sub").exists()
    assert gazetteer.check(out).broken == []


def test_building_needs_no_network(tmp_path: Path) -> None:
    """In a network namespace of its own, without so much as a loopback, a site is built in full."""
    import sys

    # Without the right to make a namespace, sockets are still taken away inside the process.
    refused = subprocess.run(["unshare", "-rn", "true"], check=False, capture_output=True).returncode
    prefix = [] if refused else ["unshare", "-rn"]
    program = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise AssertionError('a socket was asked for')\n"
        "socket.socket.connect = refuse\nsocket.create_connection = refuse\nsocket.getaddrinfo = refuse\n"
        "import gazetteer\nprint(gazetteer.build(sys.argv[1], sys.argv[2], site=True, jobs=1).site_pages)\n"
    )
    done = subprocess.run(
        [*prefix, sys.executable, "-c", program, str(SAMPLE), str(tmp_path / "out")],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 90


def test_every_file_name_has_its_pages(make: Maker, tmp_path: Path) -> None:
    """New lines, bytes that are no text, percent signs and very long names do not stop or break a site."""
    names = [
        "new\nline.py",
        "d\n1/~a b%41#c.py",
        os.fsdecode(b"bad\xe9/x\xe9.py"),
        "é" * 100 + "/é.py",
        "[l](x) *b*.py",
    ]
    root = make(dict.fromkeys(names, "class Odd: pass\n"))
    os.mkfifo(root / "pipe")
    out = tmp_path / "out"
    gazetteer.build(root, out, site=True)
    assert gazetteer.check(out).broken == []
    lines = [page.read_text() for page in (out / "_site" / "_source").rglob("*.html")]
    assert sum('id="L1"' in text for text in lines) == len(names)


def test_a_drawing_escapes_its_labels_and_draws_cycles() -> None:
    """Labels cannot get out of the drawing; an edge back is drawn as one."""
    nodes, edges = read_mermaid('graph LR\n  n0["a#60;b#62;"]\n  n1["b"]\n  n0 --> n1\n  n1 -->|3| n0\n')
    assert nodes == {"n0": "a<b>", "n1": "b"} and edges == {("n0", "n1"): 1, ("n1", "n0"): 3}
    svg = draw(nodes, edges, {"n0": "x.html", "n1": '"><script>'})
    assert "<b>" not in svg and "<script>" not in svg and "&lt;b&gt;" in svg
    assert svg.count('class="back"') == 1
