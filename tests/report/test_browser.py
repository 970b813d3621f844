"""The report in a real browser: on a phone and on a desk, in light and dark."""

import base64
import itertools
import json
import shutil

import pytest

from mgt_fast.report import write_report

selenium = pytest.importorskip("selenium.webdriver", reason="Selenium is not installed")

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="there is no Chromium: apt-get install chromium chromium-driver"
)

SIZES = {"phone": (390, 844), "small phone": (360, 640), "desk": (1280, 900)}
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--disable-dev-shm-usage",
)

HIDDEN = """
return [...document.querySelectorAll("section, section h2, figure, .chart")]
  .filter((e) => !e.checkVisibility() || e.getBoundingClientRect().height < 5).map((e) => e.outerHTML);
"""
CUT = """
return [...document.querySelectorAll("figure, .card, .facts div, .crystals li, .scroll, nav li, p, h1")]
  .filter((e) => e.getBoundingClientRect().right > innerWidth + 0.5).map((e) => e.textContent);
"""
# Texts whose colour is too near to that of what they stand on, by the formula of WCAG 2.
CONTRAST = """
const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
const light = (color) => {
  const [r, g, b] = color.slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ground = (element) => {
  for (let at = element; at; at = at.parentElement) {
    const color = rgb(getComputedStyle(at).backgroundColor);
    if (color.length < 4 || color[3] > 0) return color;
  }
  return [255, 255, 255];
};
const poor = [];
let seen = 0;
for (const element of document.querySelectorAll("body *")) {
  const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  if (!own || ["SCRIPT", "STYLE", "title"].includes(element.tagName) || !element.checkVisibility()) continue;
  const style = getComputedStyle(element);
  const pair = [light(rgb(element.tagName === "text" ? style.fill : style.color)), light(ground(element))];
  const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
  seen += 1;
  if (ratio < 4.5) poor.push([element.tagName, element.textContent.slice(0, 40), ratio]);
}
return [seen, poor];
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory, finished, pretrained, hostile):
    folder = tmp_path_factory.mktemp("reports")
    runs = {"finished": finished, "pretrained": pretrained, "hostile": hostile}
    return {name: write_report(run, folder / f"{name}.html") for name, run in runs.items()}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = selenium.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = selenium.Chrome(options, selenium.ChromeService(executable_path=DRIVER))
    yield driver
    driver.quit()


def show(browser, path, size="desk", scheme="light"):
    """Load a page; return the addresses that it asked for, and what the console says."""
    width, height = SIZES[size]
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size != "desk"}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get("about:blank")
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(path.as_uri())
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return asked, browser.get_log("browser")


@pytest.mark.parametrize(
    ("run", "size", "scheme"),
    [
        *(("finished", size, scheme) for size in ("phone", "desk") for scheme in ("light", "dark")),
        ("pretrained", "phone", "dark"),
        ("hostile", "small phone", "light"),
    ],
)
def test_a_page_fits_reads_well_and_loads_nothing(browser, pages, run, size, scheme):
    asked, console = show(browser, pages[run], size, scheme)
    assert [url for url in asked if not url.startswith("data:")] == [pages[run].as_uri()]
    assert console == []
    assert browser.title != "taken"
    browser.execute_script("document.querySelectorAll('details').forEach(e => e.open = true)")
    width, inner = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert width <= inner == SIZES[size][0]
    assert browser.execute_script(HIDDEN) == []
    assert browser.execute_script(CUT) == []
    seen, poor = browser.execute_script(CONTRAST)
    assert seen > 100
    assert poor == []


def test_headings_and_drawings_have_names_in_order(browser, pages):
    show(browser, pages["finished"])
    levels = browser.execute_script(
        "return [...document.querySelectorAll('h1,h2,h3,h4')].map(e => +e.tagName[1])"
    )
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    nameless = browser.execute_script(
        "return [...document.querySelectorAll('svg')].filter(e => e.getAttribute('aria-hidden') !== 'true'"
        " && !(e.getAttribute('role') === 'img' && e.getAttribute('aria-label'))).length"
    )
    assert nameless == 0
    dangling = browser.execute_script(
        "return [...document.querySelectorAll('nav a')].filter(e => !document.querySelector(e.hash)).length"
    )
    assert dangling == 0


def test_texts_of_charts_are_legible_on_a_phone(browser, pages):
    show(browser, pages["finished"], "small phone")
    smallest = browser.execute_script(
        "return Math.min(...[...document.querySelectorAll('.chart text')].map(e =>"
        " parseFloat(getComputedStyle(e).fontSize) * Math.hypot(e.getScreenCTM().a, e.getScreenCTM().b)))"
    )
    assert smallest > 8.5  # pixels of the style sheet


def test_values_show_at_the_pointer(browser, pages):
    show(browser, pages["finished"])
    chart = browser.find_element("css selector", "svg[data-curve]")
    readout = chart.find_element("xpath", "..").find_element("css selector", ".readout")
    assert readout.text == ""
    selenium.ActionChains(browser).move_to_element(chart).perform()
    assert readout.text.startswith("epoch ")
    assert "val" in readout.text


def test_tables_wider_than_a_phone_scroll_in_their_box(browser, pages):
    show(browser, pages["finished"], "phone")
    boxes = browser.execute_script(
        "return [...document.querySelectorAll('.scroll')].filter(e => e.checkVisibility())"
        ".map(e => [e.scrollWidth, e.clientWidth, getComputedStyle(e).overflowX, e.tabIndex])"
    )
    assert any(inside > outside for inside, outside, _, _ in boxes)
    assert all((overflow, tab) == ("auto", 0) for _, _, overflow, tab in boxes)


def test_it_prints(browser, pages):
    show(browser, pages["finished"], scheme="dark")
    pdf = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"])
    assert pdf.startswith(b"%PDF")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert paper == "rgb(255, 255, 255)"
