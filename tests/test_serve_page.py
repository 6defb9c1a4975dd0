"""The chat page in Chromium: it says what the model says, and can be used by keyboard, on a phone, in the dark."""

from __future__ import annotations

import html.parser
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image
from playwright.sync_api import Browser, expect

from browsing import PHONE, Served, picture_file, serving, tiny_vlm, visiting
from vlm_bench.browser import chromium
from vlm_runtime.server.page import FOLDER

FILES = sorted(path for path in FOLDER.iterdir() if path.is_file())


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tiny_vlm(tmp_path_factory.mktemp("page"))) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture_file(tmp_path_factory.mktemp("pictures") / "first.png")


def test_every_file_is_served_under_a_policy_that_runs_nothing_else(served: Served) -> None:
    with httpx.Client(base_url=served.url) as client:
        for path in ("", *(f"page/{file.name}" for file in FILES)):
            answer = client.get(path)
            assert answer.status_code == 200, path
            policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
            assert policy["default-src"] == "'none'"
            assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
            assert policy["frame-ancestors"] == "'none'"
            again = client.get(path, headers={"If-None-Match": answer.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
            assert client.head(path).headers["content-length"] == str(len(answer.content))
        for path in ("page/", "page/none.js", "page/../page.py", "page/%2e%2e/page.py", "page/..%2fpage.py"):
            assert client.get(path).status_code == 404, path


def test_the_page_needs_no_network_and_no_build_and_lets_no_text_become_markup() -> None:
    names = {file.name for file in FILES}
    for file in FILES:
        text = file.read_text("utf-8")
        assert len(text.splitlines()) <= 300, file.name
        assert set(re.findall(r"https?://[^\s\"'<>]+", text)) <= {"http://www.w3.org/2000/svg"}, file.name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", text)
        assert not re.search(r"\sstyle=|\son[a-z]+=\"", text) or file.suffix != ".html"
        for wanted in re.findall(r"(?:from \"\./|page/)([\w.-]+\.\w+)\"", text):
            assert wanted in names, f"{file.name} needs {wanted}"


def test_answers_are_those_of_the_model_turn_by_turn(served: Served, browser: Browser, picture: Path) -> None:
    chat = served.vlm.chat()
    one = "".join(chat.ask("What colour is it?", [Image.open(picture)], max_new_tokens=8))
    two = "".join(chat.ask("Is it red?", max_new_tokens=8))
    with visiting(browser, served.url) as visit:
        expect(visit.page.get_by_role("heading", level=1)).to_have_text(served.vlm.spec.name)
        expect(visit.page.locator("#facts")).to_have_text("onnx fp32context 250 tokens")
        visit.page.set_input_files("#files", picture)
        expect(visit.page.get_by_role("img", name="Picture 1: first.png, 50 × 40 pixels")).to_be_visible()
        visit.ask("What colour is it?")
        assert visit.words(1) == one
        expect(visit.page.locator("#announce")).to_have_text(one)
        visit.ask("Is it red?")
        assert visit.words(2) == two
        took = visit.turn(1).locator(".took")
        for stage in ("queue", "preprocess", "vision", "projector", "prefill", "decode"):
            expect(took.locator("dt", has_text=stage)).to_be_visible()
        expect(took.locator("summary")).to_contain_text("first token")
        expect(took.locator("summary")).to_contain_text("tokens/s")
        expect(took.locator(".counts")).to_contain_text("4 of pictures")
        expect(took.locator(".counts")).to_contain_text("8 out")
        assert len(visit.bodies[1]["messages"]) == 3
        assert all(url.startswith((served.url, "blob:")) for url in visit.asked), visit.asked
        assert visit.errors == []


def test_esc_stops_the_answer_and_retry_brings_the_whole(served: Served, browser: Browser) -> None:
    whole = served.vlm.answer("Tell", max_new_tokens=60).text
    with visiting(browser, served.url, max_tokens=60) as visit:
        served.pace.clear()
        try:
            visit.ask("Tell")
            stop = visit.page.get_by_role("button", name="Stop")
            expect(stop).to_be_visible()
            expect(visit.page.get_by_role("button", name="Ask")).to_be_hidden()
            expect(visit.page.get_by_label("Your question")).to_be_focused()
            expect(visit.turn(1).locator(".words")).not_to_be_empty()
            visit.page.keyboard.press("Escape")
            expect(visit.turn(1).locator(".state")).to_have_text("Stopped.")
            said = str(visit.turn(1).locator(".words").text_content())
            assert said
            assert len(said) < len(whole)
            assert whole.startswith(said)
        finally:
            served.pace.set()
        visit.page.get_by_role("button", name="Retry").click()
        assert visit.words(1) == whole
        visit.ask("More")  # the model was let go
        assert visit.words(2)
        assert [m["role"] for m in visit.bodies[2]["messages"]] == ["user", "assistant", "user"]
        assert visit.bodies[2]["messages"][1]["content"] == whole
        expect(visit.page.get_by_role("button", name="Retry")).to_have_count(1)


def test_a_stopped_answer_stays_part_of_the_conversation(served: Served, browser: Browser) -> None:
    with visiting(browser, served.url, max_tokens=60) as visit:
        served.pace.clear()
        try:
            visit.ask("Tell")
            expect(visit.turn(1).locator(".words")).not_to_be_empty()
            visit.page.get_by_role("button", name="Stop").click()
            expect(visit.turn(1).locator(".state")).to_have_text("Stopped.")
            said = visit.turn(1).locator(".words").text_content()
        finally:
            served.pace.set()
        visit.ask("Go on")
        assert visit.words(2)
        assert visit.bodies[1]["messages"][1] == {"role": "assistant", "content": said}


def test_a_new_chat_forgets_and_ends_what_runs(served: Served, browser: Browser, picture: Path) -> None:
    with visiting(browser, served.url, max_tokens=60) as visit:
        served.pace.clear()
        try:
            visit.page.set_input_files("#files", picture)
            visit.ask("Tell")
            expect(visit.turn(1).locator(".words")).not_to_be_empty()
            visit.page.get_by_role("button", name="New chat").click()
            expect(visit.page.locator(".turn")).to_have_count(0)
            expect(visit.page.get_by_text("Ask about a picture.")).to_be_visible()
        finally:
            served.pace.set()
        visit.ask("hi")
        assert visit.words(1) == served.vlm.answer("hi", max_new_tokens=60).text
        assert len(visit.bodies[1]["messages"]) == 1


def test_settings_reach_the_model_and_last(served: Served, browser: Browser) -> None:
    wanted = served.vlm.answer("hi", system="short", max_new_tokens=5, temperature=0.7, top_p=0.9, seed=3)
    with visiting(browser, served.url) as visit:
        visit.page.get_by_role("button", name="Settings").click()
        dialog = visit.page.get_by_role("dialog", name="Settings")
        dialog.get_by_label("System message").fill("short")
        dialog.get_by_label("Longest answer").fill("5")
        dialog.get_by_label("Temperature").fill("0.7")
        dialog.get_by_label("Top p").fill("0.9")
        dialog.get_by_label("Seed").fill("3")
        visit.page.keyboard.press("Enter")
        expect(dialog).to_be_hidden()
        visit.page.reload()
        visit.ask("hi")
        assert visit.words(1) == wanted.text
        visit.page.get_by_role("button", name="Settings").click()
        dialog.get_by_label("Temperature").fill("9")
        visit.page.keyboard.press("Enter")  # what is out of range is not saved
        expect(dialog).to_be_visible()
        visit.page.keyboard.press("Escape")
        expect(dialog).to_be_hidden()
        expect(visit.page.get_by_role("button", name="Settings")).to_be_focused()


def test_the_keyboard_reaches_everything_and_shift_enter_breaks_the_line(served: Served, browser: Browser) -> None:
    with visiting(browser, served.url) as visit:
        expect(visit.page.locator("#facts span").first).to_be_visible()
        wanted = [
            "Skip to your question",
            "Settings",
            "New chat",
            "Choose a picture",
            "Your question",
            "Add picture",
            "Ask",
        ]
        for name in wanted:
            visit.page.keyboard.press("Tab")
            role = {"Skip to your question": "link", "Your question": "textbox"}.get(name, "button")
            expect(visit.page.get_by_role(role, name=name, exact=True)).to_be_focused()  # type: ignore[arg-type]
        question = visit.page.get_by_label("Your question")
        question.focus()
        visit.page.keyboard.type("one")
        visit.page.keyboard.press("Shift+Enter")
        visit.page.keyboard.type("two")
        expect(question).to_have_value("one\ntwo")
        visit.page.keyboard.press("Enter")
        assert visit.words(1)
        assert visit.bodies[0]["messages"][0]["content"] == [{"type": "text", "text": "one\ntwo"}]
        expect(question).to_have_value("")
        expect(question).to_be_focused()


def test_a_phone_shows_it_all_without_scrolling_sideways(served: Served, browser: Browser, picture: Path) -> None:
    with visiting(browser, served.url, viewport=PHONE, has_touch=True, is_mobile=True) as visit:
        visit.page.set_input_files("#files", [picture, picture])
        visit.ask("What colour is it? " + "w" * 200)
        assert visit.words(1)
        assert visit.page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
        for name in ("Ask", "Add picture", "Settings", "New chat"):
            box = visit.page.get_by_role("button", name=name, exact=True).bounding_box()
            assert box is not None
            assert box["height"] >= 40, name
        box = visit.page.get_by_label("Your question").bounding_box()
        assert box is not None
        assert box["y"] + box["height"] <= PHONE["height"]
        summary = visit.turn(1).locator("summary")
        expect(visit.turn(1).locator("dl")).to_be_hidden()
        summary.tap()
        expect(visit.turn(1).locator("dl")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_on_its_ground(served: Served, browser: Browser, scheme: str) -> None:
    """Contrast of at least 4.5 for text and 3 for edges (WCAG 2.2, 1.4.3 and 1.4.11)."""
    with visiting(browser, served.url, color_scheme=scheme) as visit:
        names = ("paper", "raised", "ink", "soft", "edge", "accent", "on-accent", "wrong")
        script = "names => names.map(n => getComputedStyle(document.documentElement).getPropertyValue('--' + n).trim())"
        colors = dict(zip(names, map(_luminance, visit.page.evaluate(script, list(names))), strict=True))
        assert (colors["paper"] > colors["ink"]) == (scheme == "light")
        for front, back, least in (
            ("ink", "paper", 4.5),
            ("soft", "paper", 4.5),
            ("soft", "raised", 4.5),
            ("accent", "paper", 4.5),
            ("on-accent", "accent", 4.5),
            ("wrong", "paper", 4.5),
            ("edge", "paper", 3.0),
        ):
            low, high = sorted((colors[front], colors[back]))
            assert (high + 0.05) / (low + 0.05) >= least, (scheme, front, back)


def test_every_control_has_a_name() -> None:
    class Controls(html.parser.HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.labelled: set[str | None] = set()
            self.needing: set[str | None] = set()

        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            given = dict(attributes)
            if tag == "label":
                self.labelled.add(given.get("for"))
            if tag in ("input", "textarea") and "aria-label" not in given:
                self.needing.add(given.get("id"))

    controls = Controls()
    controls.feed((FOLDER / "index.html").read_text("utf-8"))
    assert controls.needing
    assert controls.needing <= controls.labelled


def _luminance(color: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2.2)."""
    levels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in levels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
