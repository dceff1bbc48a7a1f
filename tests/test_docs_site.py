"""The documentation as a site: it builds without warnings, is complete, holds together, and is right in a browser."""

import gc
import importlib
import inspect
import pkgutil
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from helpers import NEEDS_BROWSER, colors_in, errors_in, open_browser, show_as, start_process

import lightning_ssesam

pytest.importorskip("sphinx")
pytest.importorskip("furo")
pytest.importorskip("myst_parser")

DOCS = Path(__file__).parent.parent / "docs"

# Modules without `__all__` whose classes and functions are public, except for those that only the project itself uses.
OPEN = ("metrics", "objectives", "split", "step_options", "errors", "losses.functional")
SHARED = {"as_counts", "as_labels", "check_class_indices", "count_labels", "counts_of"}


def build(options):
    from sphinx.cmd.build import main

    # Its trees stay to the end. Looking for garbage among them takes a third of the time.
    gc.disable()
    sys.exit(main(options))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    options = ["-q", "-W", "--keep-going", "-b", "html", DOCS, folder / "html", "-d", folder / "doctrees"]
    process = start_process(build, list(map(str, options)), folder=folder, log=folder / "log.txt")
    process.join()
    assert process.exitcode == 0, (folder / "log.txt").read_text()
    return folder / "html"


@pytest.fixture(scope="module")
def pages(site):
    found = {}
    for path in sorted(site.rglob("*.html")):
        found[path] = _Page()
        found[path].feed(path.read_text())
    assert len(found) > 20
    return found


class _Page(HTMLParser):
    """Collects what a page fetches, where it leads, and what can be led to."""

    def __init__(self):
        super().__init__()
        self.ids, self.links, self.sources = set(), set(), set()

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.ids.add(values.get("id"))
        if tag == "a" and values.get("href"):
            self.links.add(values["href"])
        elif tag == "link" and values.get("rel") in ("stylesheet", "icon", "preload"):
            self.sources.add(values["href"])
        elif values.get("src"):
            self.sources.add(values["src"])


def test_links_and_anchors_lead_somewhere(pages):
    for path, page in pages.items():
        for link in page.links:
            url = urlsplit(link)
            if url.scheme in ("http", "https"):
                continue
            assert not url.scheme, (path.name, link)
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            assert target.is_file(), (path.name, link)
            # Scripts make the anchors of the search and the index' letters are there.
            if url.fragment and target in pages:
                assert unquote(url.fragment) in pages[target].ids, (path.name, link)


def test_nothing_comes_from_other_hosts(site, pages):
    for path, page in pages.items():
        for source in page.sources:
            url = urlsplit(source)
            assert not url.scheme, (path.name, source)
            assert not url.netloc, (path.name, source)
            assert (path.parent / unquote(url.path)).is_file(), (path.name, source)
    for style in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", style.read_text()), style.name


def test_every_page_is_in_the_contents(site):
    navigation = (site / "index.html").read_text()
    for page in DOCS.rglob("*.md"):
        name = page.relative_to(DOCS).with_suffix(".html").as_posix()
        if name != "index.html":
            assert f'href="{name}"' in navigation, name


def public_names():
    for module in pkgutil.walk_packages(lightning_ssesam.__path__, "lightning_ssesam."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name, module in sorted(sys.modules.items()):
        if not re.fullmatch(r"lightning_ssesam(\.\w+)*", name):
            continue
        if hasattr(module, "__all__"):
            for public in module.__all__:
                yield name, public
        elif name.removeprefix("lightning_ssesam.") in OPEN:
            for public, value in vars(module).items():
                is_its_own = inspect.isclass(value) or inspect.isfunction(value)
                if is_its_own and value.__module__ == name and public[0] != "_" and public not in SHARED:
                    yield name, public


def test_reference_is_complete(pages):
    described = set().union(*(page.ids for path, page in pages.items() if path.parent.name == "api")) - {None}
    last_parts = {name.rpartition(".")[2] for name in described if name.startswith("lightning_ssesam.")}
    missing = [f"{module}.{name}" for module, name in public_names() if name not in last_parts]
    assert not missing


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


# Blocks of code without a button to copy them, commands that are cut off, pictures that do not follow the page.
UNCOPIED = "return [...document.querySelectorAll('div.highlight')].filter(d => !d.querySelector('.copybtn')).length"
CUT_OFF = (
    "return [...document.querySelectorAll('.highlight-bash pre')].filter(p => p.scrollWidth > p.clientWidth).length"
)
INVERTED = (
    "return [...document.querySelectorAll('article img')].map(i => getComputedStyle(i).filter.includes('invert'))"
)
# Tables and code that scroll without a shadow at the edge that moves with the window, not with the content.
UNHINTED = """return [...document.querySelectorAll('.table-wrapper, .highlight pre')].filter(e => e.scrollWidth >
    e.clientWidth && getComputedStyle(e).backgroundAttachment != 'local, local, scroll, scroll').length"""


# All of it in one call, because each call takes as long as drawing a page.
FAULTS = ", ".join(f"(() => {{ {script} }})()" for script in (UNCOPIED, CUT_OFF, UNHINTED))
LOOK = f"""return [innerWidth, document.documentElement.scrollWidth, [{FAULTS}],
    (() => {{ {INVERTED} }})()]"""


# Each page at both widths and in both schemes, and every other page with them the other way round.
LOOKS = [[(1280, False), (390, True)], [(1280, True), (390, False)]]


@NEEDS_BROWSER
def test_in_a_browser(pages, browser):
    for number, path in enumerate(pages):
        browser.get(path.as_uri())
        assert browser.execute_script("return [...document.images].every(i => i.complete && i.naturalWidth)"), path.name
        for width, dark in LOOKS[number % 2]:
            show_as(browser, width, dark)
            inner, scrolled, faults, inverted = browser.execute_script(LOOK)
            assert inner == width, path.name
            # Wide tables, code and formulas scroll within themselves; the page does not.
            assert scrolled <= width, (path.name, width)
            ground, text = colors_in(browser)
            assert (ground < 150) == dark, path.name
            assert abs(ground - text) > 350, path.name
            assert faults == [0, 0, 0], path.name
            assert set(inverted) <= {dark}, path.name
        assert not errors_in(browser), path.name


# By how much each formula of its own would scroll up and down.
SCROLLING = "return [...document.querySelectorAll('div.formula')].map(f => f.scrollHeight - f.clientHeight)"


@NEEDS_BROWSER
def test_formulas_are_drawn(site, browser):
    browser.get((site / "curvature.html").as_uri())
    assert browser.execute_script(SCROLLING) == [0]
    browser.get((site / "method.html").as_uri())
    heights = browser.execute_script(
        "return [...document.querySelectorAll('math')].map(m => m.getBoundingClientRect().height)"
    )
    assert len(heights) > 20
    assert all(height > 4 for height in heights)
    # A fraction in it stands higher than the line.
    assert max(heights) > 2 * min(heights) + 10
    assert set(browser.execute_script(SCROLLING)) == {0}
    # TeX that was not understood would be left as it is.
    assert not browser.execute_script(
        "return [...document.querySelectorAll('math')].some(m => /\\\\/.test(m.innerText))"
    )
