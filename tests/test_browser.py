"""The site in a real browser: Debian's Chromium with Playwright, over the pages that Quarto renders, or pandoc where Quarto is absent.

Needs Chromium (Playwright's own browser download is not used) and pandoc or Quarto; axe-core comes with the package axe-playwright-python.
"""
import functools
import http.server
import shutil
import threading
from pathlib import Path

import pytest
from conftest import ROOT

axe = pytest.importorskip("axe_playwright_python", reason="the package axe-playwright-python is not installed")
sync_api = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
pytest.importorskip("nbdev", reason="the site needs nbdev, which is in kdbook[dev]")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
              pytest.mark.skipif(not (shutil.which("quarto") or shutil.which("pandoc")), reason="neither Quarto nor pandoc is installed")]

from kdbook.book import site
from kdbook.book.chapters import chapters

CHAPTERS = tuple(item.id for item in chapters(ROOT))
UNCHECKED = set(CHAPTERS[2::3] + CHAPTERS[1::3])  # every third chapter is enough for axe: it needs seconds for a page with many formulas
PAGES = (*CHAPTERS, "index", "gallery", "ledger", "foundations/losses", "worlds/shapes", "book/claims", "llm/index", "api/index", "api/losses",
         "reading", "notation", "glossary", "bibliography", "404", "explore/temperature", "explore/divergences")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *words):
        pass


@pytest.fixture(scope="module")
def address(tmp_path_factory, request):
    """The address of a served site; says which tool made it."""
    folder = tmp_path_factory.mktemp("site")
    staged = site.stage(root=ROOT, folder=folder / "stage", partial=True, jobs=2)
    if shutil.which("quarto"):
        site.render(staged, folder / "html")
    else:
        site.plain(staged.folder, folder / "html", [f"{name}.qmd" for name in PAGES], jobs=2)
    print("rendered by", "Quarto" if shutil.which("quarto") else "pandoc")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder / "html")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.parametrize("scheme, width", [("light", 1280), ("dark", 390)])
def test_pages_load_without_trouble(browser, address, scheme, width):
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, trouble = context.new_page(), []
    page.on("console", lambda message: trouble.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("request", lambda request: trouble.append(f"asks {request.url}") if not request.url.startswith((address, "data:")) else None)
    page.on("response", lambda response: trouble.append(f"{response.status} {response.url}") if response.status >= 400 else None)
    for name in PAGES:
        page.goto(f"{address}{name}.html")
        page.evaluate("document.querySelectorAll('img').forEach(image => { image.loading = 'eager' })")
        page.wait_for_load_state("networkidle")
        trouble += [f"{name}: no alt text or no picture: {source}" for source in
                    page.evaluate("[...document.images].filter(i => !i.alt || !i.complete || !i.naturalWidth).map(i => i.src)")]
        wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        if wide > 0:
            trouble.append(f"{name}: {wide} pixels too wide at {width}")
        if name in UNCHECKED:
            continue
        page.add_script_tag(path=Path(axe.__file__).with_name("axe.min.js"))
        found = page.evaluate("axe.run().then(r => r.violations.filter(v => ['serious', 'critical'].includes(v.impact)).map(v => v.id + ' ' + v.nodes[0].html.slice(0, 120)))")
        trouble += [f"{name}: {violation}" for violation in found]
    context.close()
    assert trouble == []


def test_ledger_filters_and_sorts(browser, address):
    page = browser.new_page()
    page.goto(f"{address}ledger.html")
    rows = page.locator("#ledger tbody tr")
    if rows.count() == 0:
        pytest.skip("no claims in the ledger")
    page.wait_for_selector("#ledger-filters:not([hidden])")
    verdict = rows.first.get_attribute("data-verdict")
    page.select_option("[data-filter=verdict]", verdict)
    shown = page.eval_on_selector_all("#ledger tbody tr:not([hidden])", "rows => rows.map(row => row.dataset.verdict)")
    assert shown and set(shown) == {verdict} and page.text_content("#ledger-count").startswith(f"{len(shown)} of")
    page.select_option("[data-filter=verdict]", "")
    for wanted, reverse in (("ascending", False), ("descending", True)):
        page.click("#ledger th:nth-child(4) button")
        values = page.eval_on_selector_all("#ledger tbody tr td:nth-child(4)", "cells => cells.map(cell => +cell.dataset.value)")
        assert values == sorted(values, reverse=reverse) and page.get_attribute("#ledger th:nth-child(4)", "aria-sort") == wanted
    page.fill("[data-filter=text]", "no such words anywhere")
    assert page.locator("#ledger tbody tr:not([hidden])").count() == 0
    page.close()


def test_temperature_explorer(browser, address):
    page = browser.new_page()
    page.goto(f"{address}explore/temperature.html")
    facts = page.locator(".kd-explorer p[aria-live]")
    before = facts.text_content()
    page.locator(".kd-explorer input").first.focus()
    for _ in range(40):
        page.keyboard.press("ArrowRight")
    assert "4.00" in page.text_content(".kd-explorer output") and "0.467" in page.text_content(".kd-explorer svg") and facts.text_content() != before
    page.click(".kd-explorer button")
    assert facts.text_content() == before
    page.close()


def test_divergence_explorer(browser, address):
    page = browser.new_page()
    page.goto(f"{address}explore/divergences.html")
    handle, facts = page.locator(".kd-handle").nth(1), page.locator(".kd-explorer p[aria-live]")
    before = facts.text_content()
    box = handle.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] - 120, box["y"])
    page.mouse.up()
    dragged = float(handle.get_attribute("aria-valuenow"))
    assert facts.text_content() != before and dragged < 2.0
    handle.focus()
    page.keyboard.press("ArrowLeft")
    assert float(handle.get_attribute("aria-valuenow")) == pytest.approx(dragged - 0.1)
    # one bump: both students are the teacher
    page.evaluate("""() => { const inputs = document.querySelectorAll('.kd-explorer input');
        [1, 1, 0.5, 0.7, 0.7].forEach((value, i) => { inputs[i].value = value; inputs[i].dispatchEvent(new Event('input', {bubbles: true})); }); }""")
    text = facts.text_content()
    assert text.count("mean 1.00") == 2 and text.count("width 0.70") == 2 and text.count("= 0.000") + text.count("= -0.000") == 2, text
    page.close()
