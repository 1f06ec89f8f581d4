"""The page of a run in a real browser; with HF_ENSEMBLE_SCREENSHOTS=FOLDER pictures of it are left there."""

import os
import shutil
from pathlib import Path

import pytest

from helpers.report_runs import HOSTILE, NAMES, ensemble_run, selection_run
from hf_ensemble import write_report

playwright = pytest.importorskip("playwright.sync_api")
axe_package = pytest.importorskip("axe_playwright_python")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")]

VIEWS = [(scheme, width) for scheme in ("light", "dark") for width in (400, 1400)]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    runs = {
        "ensemble": ensemble_run(folder / "ensemble", NAMES),
        "selection": selection_run(folder / "selection", NAMES),
        "hostile": ensemble_run(folder / "hostile", HOSTILE),
    }
    return {name: write_report(run.path) for name, run in runs.items()}


def opened(browser, path, scheme="light", width=1400, **options):
    """A view of a page, and what it has said, asked for or failed at."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **options)
    view, events = context.new_page(), []
    view.on("console", lambda message: events.append(f"{message.type}: {message.text}"))
    view.on("pageerror", lambda error: events.append(f"error: {error}"))
    view.on("request", lambda request: events.append(f"request: {request.url}"))
    view.on("dialog", lambda dialog: events.append(f"dialog: {dialog.message}"))
    view.goto(path.as_uri())
    assert events.pop(0) == f"request: {path.as_uri()}"
    return view, [event for event in events if not event.startswith("request: data:")]


@pytest.mark.parametrize("name", ["ensemble", "selection", "hostile"])
def test_pages_in_every_view(browser, pages, name):
    for scheme, width in VIEWS:
        view, events = opened(browser, pages[name], scheme, width)
        assert events == []
        # Tables scroll in themselves, the page does not.
        assert view.evaluate("document.documentElement.scrollWidth") <= width
        background = view.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 23, 28)")
        if folder := os.environ.get("HF_ENSEMBLE_SCREENSHOTS"):
            view.screenshot(path=Path(folder) / f"{name}-{scheme}-{width}.png", full_page=True)
        view.context.close()


@pytest.mark.parametrize("name", ["ensemble", "selection", "hostile"])
def test_pages_are_accessible(browser, pages, name):
    script = (Path(axe_package.__file__).parent / "axe.min.js").read_text()
    for scheme in ("light", "dark"):
        # The page's own policy would not let the checker in.
        view, _ = opened(browser, pages[name], scheme, bypass_csp=True)
        for details in view.query_selector_all("details"):
            details.evaluate("node => node.open = true")
        view.evaluate(script)
        found = view.evaluate("axe.run()")["violations"]
        assert [(one["id"], one["impact"], one["nodes"][0]["html"]) for one in found] == []
        view.context.close()


def test_tables_sort_by_mouse_and_keyboard(browser, pages):
    view, events = opened(browser, pages["ensemble"])
    table = view.locator("#results table").first

    def column(number):
        return [cell.split("\n")[0] for cell in table.locator(f"tbody tr > :nth-child({number})").all_inner_texts()]

    before = column(1)
    table.locator("th button", has_text="ensemble").first.click()
    losses = [float(value) for value in column(5)]
    assert losses == sorted(losses) and table.locator("th[aria-sort=ascending]").count() == 1
    table.locator("th button", has_text="ensemble").first.press("Enter")
    assert [float(value) for value in column(5)] == losses[::-1]
    table.locator("th button", has_text="task").first.press("Space")
    assert column(1) == sorted(before) and table.locator("th[aria-sort]").count() == 1
    # The mean stays where it is.
    assert table.locator("tfoot th").inner_text() == "mean" and events == []
    view.context.close()


def test_without_scripts_the_page_is_whole(browser, pages):
    view, events = opened(browser, pages["ensemble"], java_script_enabled=False)
    assert view.locator("#results tbody tr").count() == 2 * len(NAMES) and view.locator("th button").count() == 0
    view.context.close()
