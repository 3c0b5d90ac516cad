"""A browser and the server it looks at."""

from __future__ import annotations

import shutil
from urllib.parse import urlsplit

import pytest
from tests.browser.live_server import live_server

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="Playwright is not installed: pip install playwright"
    )
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"there is no Chromium here: none of {', '.join(BROWSERS)} is in PATH")
    with playwright.sync_playwright() as runner:
        browser = runner.chromium.launch(executable_path=found, args=ARGUMENTS)
        browser.new_context().close()
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(browser):
    with live_server() as (address, _):
        yield address


@pytest.fixture
def open_page(browser):
    """Opens pages that must ask no other host and, unless told, log no error."""
    contexts, faults, foreign = [], [], []

    def open_page(address, *, quiet=True, **options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 860}, **options})
        context.set_default_timeout(20_000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        host = urlsplit(address).netloc
        page.on(
            "request",
            lambda request: urlsplit(request.url).netloc == host or foreign.append(request.url),
        )
        if quiet:
            page.on(
                "console",
                lambda message: (
                    message.type in ("error", "warning") and faults.append(message.text)
                ),
            )
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []
    assert foreign == []
