"""What a bad address, a bad bundle and a bad picture say in the example app: one line, and the page goes on."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from running import running_bundle
from vlm_bench.browser import PAGE, chromium
from web_pages import Site, example, open_bundle, site_of

QUESTION = "What colour is it?"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    with site_of(folder, running_bundle(folder / "made")) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture
def page(browser: Browser, site: Site) -> Iterator[Page]:
    with example(browser, site) as page:
        yield page


Damage = Callable[[Path], object]
LARGEST = "onnx/language_model.onnx"


def manifest(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(folder: Path) -> None:
        data = json.loads((folder / "manifest.json").read_text())
        change(data)
        (folder / "manifest.json").write_text(json.dumps(data))

    return damage


def cut(folder: Path) -> None:
    with (folder / LARGEST).open("r+b") as file:
        file.truncate((folder / LARGEST).stat().st_size - 1000)


def flip(folder: Path) -> None:
    data = bytearray((folder / LARGEST).read_bytes())
    data[5000] ^= 1
    (folder / LARGEST).write_bytes(data)


DAMAGES: dict[str, tuple[Damage, str]] = {
    "a page in place of the manifest": (
        lambda folder: (folder / "manifest.json").write_text("<!doctype html><title>Sign in</title>"),
        "is a web page, not a manifest: give the address of the bundle's folder",
    ),
    "half a manifest": (
        lambda folder: (folder / "manifest.json").write_text((folder / "manifest.json").read_text()[:500]),
        "is not valid JSON",
    ),
    "another JSON file": (lambda folder: (folder / "manifest.json").write_text("{}"), "is not a vlm-export manifest"),
    "a later version": (manifest(lambda data: data.update(version=2)), "has version 2, this runtime reads version 1"),
    "no ONNX graphs": (
        manifest(lambda data: [part.update(gguf=part.pop("onnx")) for part in data["parts"].values()]),
        "for gguf: export with --target onnx",
    ),
    "a file that is not there": (lambda folder: (folder / LARGEST).unlink(), "answered 404: is it the address"),
    "a truncated file": (cut, r"has \d+ bytes instead of \d+: copy the bundle again, whole"),
    "a damaged file": (flip, "does not match its sha256"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_bad_bundle_is_told_in_one_line_and_a_good_one_loads_after_it(page: Page, site: Site, what: str) -> None:
    damage, message = DAMAGES[what]
    folder = site.folder / re.sub(r"\W", "-", what)
    shutil.copytree(site.folder / "bundle", folder)
    damage(folder)
    open_bundle(page, f"{site.url}files/{folder.name}/")
    told = str(page.get_by_role("alert").text_content())
    assert re.search(message, told), told
    assert "\n" not in told
    expect(page.get_by_role("button", name="Ask")).to_be_disabled()
    if what == "a damaged file":
        open_bundle(page, f"{site.url}files/bundle/")
        expect(page.get_by_role("alert")).to_be_hidden()
        expect(page.get_by_role("button", name="Ask")).to_be_enabled()


def test_addresses_without_any_bundle_are_told_apart(page: Page, site: Site) -> None:
    for address, message in (
        (f"{site.url}files/none/", "manifest.json answered 404"),
        (site.url + PAGE, "answered 404"),
        ("http://127.0.0.1:9/", "cannot be fetched"),
        ("http://[", "is no address"),
    ):
        open_bundle(page, address)
        expect(page.get_by_role("alert")).to_contain_text(message)


def test_a_server_that_sends_a_page_for_everything_is_found_out(page: Page, site: Site) -> None:
    page.route("**/everything/**", lambda route: route.fulfill(content_type="text/html", body="<h1>Home</h1>"))
    open_bundle(page, f"{site.url}everything/")
    expect(page.get_by_role("alert")).to_contain_text("is a web page")


def test_a_file_that_is_no_picture_is_told_in_one_line(page: Page, site: Site, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    open_bundle(page, f"{site.url}files/bundle/")
    page.get_by_label("choose one:").set_input_files(tmp_path / "bad.png")
    page.get_by_label("Question").fill(QUESTION)
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("the image cannot be decoded")
    expect(page.get_by_role("button", name="Ask")).to_be_enabled()
