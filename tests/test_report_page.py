"""The page of a report in a browser: scrolling tables, code blocks, and pictures on light and dark pages."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import NEEDS_BROWSER, errors_in, open_browser, show_as
from PIL import Image
from test_tables import comparison_of, run_of

from lightning_ssesam import DigitsLT
from lightning_ssesam.experiments.figures import FIGURES
from lightning_ssesam.experiments.report import write_report
from lightning_ssesam.runs import GROUPS

CONFIG = "epochs: 2\n" + "\n".join(f"option_{k}: {'a/very/long/path/' * 12}" for k in range(3))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    data = DigitsLT()
    data.setup("test")
    places = (data._sets["test"].tensors[1] == 2).nonzero().flatten().tolist()
    kept = {
        "calibration": dict.fromkeys(GROUPS, 0.1),
        "reliability": {group: [[30, 0.4, 0.3], [70, 0.9, 0.8]] for group in ("head", "tail", "all")},
        "confused_pairs": [[2, 0, 9], [0, 1, 5]],
        "tail_mistakes": [[place, 2, 3, 0.9] for place in places[:8]],
    }
    runs = [run_of(name, seed, right=0.5 + seed / 10, **kept) for name in ("ERM", "SAM") for seed in range(2)]
    comparison = replace(comparison_of(runs), config=CONFIG, own_data=dict.fromkeys(("ERM", "SAM"), data))
    report = write_report(comparison, folder)[0]
    with open_browser(folder / "profile") as browser:
        yield browser, report


FADES = "const box = document.getElementById('last').parentElement; return getComputedStyle(box).maskImage !== 'none'"


@NEEDS_BROWSER
def test_tables_hint_that_they_scroll(page):
    browser, report = page
    show_as(browser, 390, dark=False)
    browser.get(report.as_uri())
    assert browser.execute_script(FADES)
    browser.execute_script(
        "const box = document.getElementById('last').parentElement;"
        "box.scrollLeft = 10000; box.dispatchEvent(new Event('scroll'))"
    )
    assert not browser.execute_script(FADES)
    show_as(browser, 1280, dark=False)
    browser.get(report.as_uri())
    assert not browser.execute_script(FADES)
    # Without the script, shadows at the edges stay in place while their covers move with the table.
    attachment = "return getComputedStyle(document.querySelector('.wide')).backgroundAttachment"
    assert browser.execute_script(attachment) == "local, local, scroll, scroll"
    assert not errors_in(browser)


@NEEDS_BROWSER
@pytest.mark.parametrize("width", [1280, 390])
def test_commands_wrap_and_can_be_copied(page, width):
    browser, report = page
    show_as(browser, width, dark=True)
    browser.get(report.as_uri())
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    block = "const pre = document.querySelector('pre');"
    assert browser.execute_script(f"{block} return pre.scrollWidth <= pre.clientWidth")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    browser.find_element("css selector", "button").click()
    assert browser.find_element("css selector", "button").text == "Copied"
    assert browser.execute_script("return getSelection().toString()").strip() == CONFIG
    assert not errors_in(browser)


@NEEDS_BROWSER
def test_without_scripts_there_are_no_buttons(page):
    browser, report = page
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(report.as_uri())
        assert not browser.find_elements("css selector", "button")
        assert len(browser.find_elements("css selector", "pre")) == 1
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


@NEEDS_BROWSER
def test_pictures_fit_the_page(page):
    """The ground of every picture has the colour of the page, and its black lines that of text."""
    browser, report = page
    place = """
        document.images[arguments[0]].scrollIntoView();
        const box = document.images[arguments[0]].getBoundingClientRect();
        return [box.left, box.top, box.right, box.bottom].map(Math.round);
    """
    for dark in (False, True):
        show_as(browser, 1280, dark)
        browser.get(report.as_uri())
        ground = (24, 24, 24) if dark else (255, 255, 255)
        for number in range(len(FIGURES)):
            left, top, right, bottom = browser.execute_script(place, number)
            shot = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
            picture = shot.crop((left + 3, top + 3, right - 3, min(bottom - 3, shot.height)))
            assert picture.getpixel((0, 0)) == ground
            brightness = np.asarray(picture, dtype=int).sum(2)
            assert brightness.min() < 120
            assert brightness.max() > 600


@NEEDS_BROWSER
@pytest.mark.parametrize("width", [1280, 390])
def test_photos_keep_their_colours_and_fit(page, width):
    browser, report = page
    for dark in (False, True):
        show_as(browser, width, dark)
        browser.get(report.as_uri())
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        sizes = browser.execute_script(
            "return [...document.querySelectorAll('#gallery img')].map(i => [i.naturalWidth, i.offsetWidth,"
            " i.offsetHeight, getComputedStyle(i).filter, getComputedStyle(i).imageRendering,"
            " i.getBoundingClientRect().right])"
        )
        assert [size[:5] for size in sizes] == [[8, 96, 96, "none", "pixelated"]] * 16
        assert max(size[5] for size in sizes) <= width
        # As many in a row as there is room for.
        rows = browser.execute_script("return new Set([...document.querySelectorAll('li')].map(i => i.offsetTop)).size")
        assert rows == (2 if width == 1280 else 6)
        assert browser.execute_script("return document.images[0].naturalWidth > 600")
    assert not errors_in(browser)


@NEEDS_BROWSER
def test_the_page_may_fetch_nothing(page):
    policy = 'http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:;'
    assert policy in Path(page[1]).read_text()
