"""The example app of the browser runtime in Chromium: where it is served, and how it is used."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from playwright.sync_api import Browser, Page

from vlm_bench.browser import PAGE, serving
from web_package import built


@dataclass
class Site:
    """Where the runtime and the bundles below `folder` are served, these as files/NAME/."""

    url: str
    folder: Path


@contextlib.contextmanager
def site_of(folder: Path, bundle: Path) -> Iterator[Site]:
    """Serve `bundle` as files/bundle/, and whatever else comes into `folder`."""
    (folder / "bundle").symlink_to(bundle)
    with serving({"files": folder}, built()) as url:
        yield Site(url, folder)


@contextlib.contextmanager
def example(browser: Browser, site: Site) -> Iterator[Page]:
    """The app for a new visitor; nothing may go wrong in its scripts."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(120_000)  # the machine may be busy
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(site.url + PAGE)
    yield page
    context.close()
    assert not errors


def open_bundle(page: Page, address: str) -> None:
    """Load in the example, and wait for what comes of it."""
    page.get_by_label("Address of a bundle").fill(address)
    page.get_by_role("button", name="Load").click()
    page.locator("#open:enabled").wait_for()


def ask(page: Page, question: str) -> str:
    """The whole answer."""
    page.get_by_label("Question").fill(question)
    page.keyboard.press("Enter")
    page.locator("#took").get_by_text("First token").wait_for()
    return str(page.locator("#answer").text_content())
