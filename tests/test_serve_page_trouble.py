"""The chat page where something is wrong: keys, full queues, files that are no pictures, hostile text, lost servers."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Route, expect

from browsing import Served, picture_file, serving, tiny_vlm, visiting
from serving import wait_for
from vlm_bench.browser import chromium
from vlm_runtime.vlm import VLM

HOSTILE = "<img src=x onerror=alert(1)></p><script>alert(2)</script> {{7*7}} &lt;b&gt; \u202e"


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> VLM:
    return tiny_vlm(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def served(vlm: VLM) -> Iterator[Served]:
    with serving(vlm) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


def test_a_key_is_asked_for_and_kept_for_the_tab_alone(vlm: VLM, browser: Browser) -> None:
    with serving(vlm, api_key="right") as served, visiting(browser, served.url) as visit:
        assert httpx.get(served.url + "v1/models").status_code == 401
        field = visit.page.get_by_label("API key")
        expect(field).to_be_focused()
        field.fill("wrong")
        visit.page.keyboard.press("Enter")
        expect(visit.page.get_by_role("alert")).to_have_text("The server refuses this API key.")
        field.fill("right")
        visit.page.keyboard.press("Enter")
        expect(field).to_be_hidden()
        expect(visit.page.get_by_role("heading", level=1)).to_have_text(vlm.spec.name)
        visit.ask("hi")
        assert visit.words(1)
        visit.page.reload()
        expect(visit.page.locator("#facts")).to_contain_text("onnx")
        assert "right" not in visit.page.evaluate("JSON.stringify(localStorage) + document.cookie + location.href")
        visit.page.get_by_role("button", name="Settings").click()
        visit.page.get_by_role("button", name="Forget API key").click()
        expect(field).to_be_visible()
    with serving(vlm, api_key="right") as served, visiting(browser, served.url) as visit:
        expect(visit.page.get_by_label("API key")).to_be_visible()
        visit.ask("hi")  # without a key
        expect(visit.turn(1).locator(".state")).to_have_class("state wrong")
        visit.page.get_by_label("API key").fill("right")
        visit.page.get_by_role("button", name="Use key").click()
        expect(visit.page.get_by_label("API key")).to_be_hidden()
        visit.page.get_by_role("button", name="Retry").click()
        assert visit.words(1) == vlm.answer("hi", max_new_tokens=8).text


def test_a_full_queue_is_told_and_waited_for(vlm: VLM, browser: Browser) -> None:
    with serving(vlm, queue=1) as served, visiting(browser, served.url) as visit:
        served.pace.clear()
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 100}
        others = [threading.Thread(target=_post, args=(served.url, body)) for _ in range(2)]
        for other, sign in zip(others, ("vlm_running 1.0", "vlm_queue_length 1.0"), strict=True):
            other.start()
            wait_for(lambda sign=sign: sign in httpx.get(served.url + "metrics").text)
        visit.ask("What colour is it?")
        state = visit.turn(1).locator(".state")
        expect(state).to_contain_text("The server is busy. Asking again in")
        served.pace.set()
        assert visit.words(1) == vlm.answer("What colour is it?", max_new_tokens=8).text
        for other in others:
            other.join()


def test_waiting_for_a_full_queue_can_be_stopped(served: Served, browser: Browser) -> None:
    with visiting(browser, served.url) as visit:
        busy = {"error": {"message": "full", "type": "rate_limit_error", "param": None, "code": "queue_full"}}
        visit.page.route(
            "**/v1/chat/completions", lambda route: route.fulfill(status=429, json=busy, headers={"Retry-After": "900"})
        )
        visit.ask("hi")
        expect(visit.turn(1).locator(".state")).to_contain_text("The server is busy. Asking again in")
        visit.page.keyboard.press("Escape")
        expect(visit.turn(1).locator(".state")).to_have_text("Stopped.")
        assert len(visit.bodies) == 1


def test_text_of_any_kind_stays_text(served: Served, browser: Browser, tmp_path: Path) -> None:
    with visiting(browser, served.url) as visit:
        visit.page.on("dialog", lambda dialog: (visit.errors.append(dialog.message), dialog.dismiss()))
        visit.page.route("**/v1/chat/completions", lambda route: _answer(route, [HOSTILE[:9], HOSTILE[9:]]))
        name = picture_file(tmp_path / "<img src=x onerror=alert(3)>.png")
        visit.page.set_input_files("#files", name)
        expect(visit.page.get_by_role("button", name=f"Remove {name.name}")).to_be_visible()
        visit.ask(HOSTILE)
        expect(visit.turn(1).locator(".state")).to_be_hidden()
        assert visit.turn(1).locator(".words").text_content() == HOSTILE
        assert visit.turn(1).get_by_role("heading").text_content() == HOSTILE
        expect(visit.page.locator("article script, article [onerror], article p img")).to_have_count(0)
        assert visit.errors == []


def test_what_is_no_picture_is_told_and_the_rest_is_kept(served: Served, browser: Browser, tmp_path: Path) -> None:
    good = picture_file(tmp_path / "good.png")
    picture_file(tmp_path / "jpeg.jpg").rename(tmp_path / "renamed.png")
    (tmp_path / "drawing.png").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:20])
    with visiting(browser, served.url) as visit:
        names = ("good.png", "drawing.png", "cut.png", "renamed.png")
        visit.page.set_input_files("#files", [tmp_path / name for name in names])
        alert = visit.page.get_by_role("alert")
        expect(alert).to_contain_text("drawing.png is not a picture: PNG, JPEG, WebP, GIF, BMP or TIFF are.")
        expect(alert).to_contain_text("cut.png cannot be decoded: is the file complete?")
        expect(visit.page.locator("#tray img")).to_have_count(2)
        visit.page.keyboard.press("Enter")
        expect(alert).to_have_text("Write a question about the picture.")
        visit.ask("What is it?")
        assert visit.words(1)
        sent = [part["image_url"]["url"] for part in visit.bodies[0]["messages"][0]["content"][:2]]
        assert [url.split(";")[0] for url in sent] == ["data:image/png", "data:image/jpeg"]  # what it is, not its name
        visit.page.set_input_files("#files", good)
        visit.page.get_by_role("button", name="Remove good.png").click()
        expect(visit.page.locator("#tray img")).to_have_count(0)
        expect(visit.page.get_by_label("Your question")).to_be_focused()


def test_pictures_can_be_dropped_and_pasted_and_text_goes_where_it_is_meant_for(
    served: Served, browser: Browser, tmp_path: Path
) -> None:
    content = list(picture_file(tmp_path / "a.png").read_bytes())
    give = """([kind, bytes]) => {
        const data = new DataTransfer();
        if (bytes) data.items.add(new File([new Uint8Array(bytes)], `${kind}.png`, { type: "image/png" }));
        else data.setData("text/plain", "words");
        const options = { bubbles: true, cancelable: true, dataTransfer: data, clipboardData: data };
        const event = kind === "paste" ? new ClipboardEvent(kind, options) : new DragEvent(kind, options);
        document.body.dispatchEvent(event);
        return event.defaultPrevented;
    }"""
    with visiting(browser, served.url) as visit:
        expect(visit.page.locator("#facts")).to_contain_text("onnx")
        assert visit.page.evaluate(give, ["dragover", content]) is True
        expect(visit.page.get_by_text("Drop pictures here")).to_be_visible()
        assert visit.page.evaluate(give, ["drop", content]) is True
        expect(visit.page.get_by_text("Drop pictures here")).to_be_hidden()
        expect(visit.page.get_by_role("button", name="Remove drop.png")).to_be_visible()
        assert visit.page.evaluate(give, ["paste", content]) is True
        expect(visit.page.get_by_role("button", name="Remove paste.png")).to_be_visible()
        for kind in ("dragover", "drop", "paste"):
            assert visit.page.evaluate(give, [kind, None]) is False
        expect(visit.page.locator("#tray img")).to_have_count(2)


def test_a_question_that_is_refused_can_be_left_out(served: Served, browser: Browser) -> None:
    with visiting(browser, served.url) as visit:
        visit.ask("too long " * 300)
        state = visit.turn(1).locator(".state")
        expect(state).to_contain_text("the bundle's context is 250: shorten it")
        expect(visit.page.get_by_role("button", name="Retry")).to_be_visible()
        visit.ask("hi")
        assert visit.words(2) == served.vlm.answer("hi", max_new_tokens=8).text
        expect(state).to_contain_text("Left out.")
        assert len(visit.bodies[1]["messages"]) == 1


def test_what_cut_an_answer_off_is_told(served: Served, browser: Browser) -> None:
    for most, told in ((3, "Cut off at the longest answer"), (300, "Cut off: the context of the model is full.")):
        with visiting(browser, served.url, max_tokens=most) as visit:
            visit.ask("hi")
            assert visit.words(1)
            expect(visit.turn(1).locator(".state")).to_contain_text(told)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (['data: {"choices": [{"delta": {"content": "a"}}]}\n\n'], "The connection ended before the answer did."),
        (['data: {"error": {"message": "it took too long"}}\n\n'], "It took too long"),
        (["data: {nonsense\n\n"], "The server sent something else than an answer."),
    ],
)
def test_an_answer_that_breaks_off_is_told(served: Served, browser: Browser, content: list[str], told: str) -> None:
    with visiting(browser, served.url) as visit:
        visit.page.route(
            "**/v1/chat/completions",
            lambda route: route.fulfill(body="".join(content), content_type="text/event-stream"),
        )
        visit.ask("hi")
        expect(visit.turn(1).locator(".state")).to_have_text(told)
        expect(visit.page.get_by_role("button", name="Retry")).to_be_visible()
        assert [error for error in visit.errors if "Failed to load" not in error] == []


def test_a_server_that_is_gone_is_told(vlm: VLM, browser: Browser) -> None:
    with serving(vlm) as served:
        url = served.url
        with visiting(browser, url) as visit:
            expect(visit.page.locator("#facts")).to_contain_text("onnx")
            visit.page.route("**/v1/**", lambda route: route.abort("connectionrefused"))
            visit.ask("hi")
            told = "The server does not answer: is vlm-serve still running?"
            expect(visit.turn(1).locator(".state")).to_have_text(told)
            visit.page.unroute_all()
            visit.page.get_by_role("button", name="Retry").click()
            assert visit.words(1)


def _post(url: str, body: Any) -> None:
    assert httpx.post(url + "v1/chat/completions", json=body, timeout=120).status_code == 200


def _answer(route: Route, pieces: list[str]) -> None:
    """A whole stream of these pieces."""
    chunks = [{"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]} for piece in pieces]
    last = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in (*chunks, last)]
    route.fulfill(body="".join([*lines, "data: [DONE]\n\n"]), content_type="text/event-stream")
