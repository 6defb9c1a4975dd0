"""A real server on a tiny bundle, and Chromium looking at its chat page."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from playwright.sync_api import Browser, Page, Request

from running import running_bundle, running_spec
from serving import in_thread
from vlm_runtime.answer import Answer
from vlm_runtime.server.options import ServerOptions
from vlm_runtime.vlm import VLM, load

WIDE, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}


@dataclass
class Served:
    """A running server: its address, its model, and how long each piece of an answer takes there."""

    url: str
    vlm: VLM
    pace: threading.Event = field(default_factory=threading.Event)  # set: pieces come as fast as they are made


def tiny_vlm(folder: Path) -> VLM:
    """A model whose answers end at their longest only, in a context of 250 tokens."""
    return load(running_bundle(folder / "bundle", running_spec(eos_token_ids=()), max_context=250), threads=1)


@contextlib.contextmanager
def serving(vlm: VLM, **options: Any) -> Iterator[Served]:
    """The application of `vlm-serve` on a free port of this machine, in a thread, until the end of the block."""
    served = Served("", vlm)
    served.pace.set()
    speak = vlm.speak
    vlm.speak = _paced(speak, served.pace)  # type: ignore[method-assign]
    try:
        with in_thread(vlm, ServerOptions(**options)) as (address, _):
            served.url = f"{address}/"
            try:
                yield served
            finally:
                served.pace.set()
    finally:
        vlm.speak = speak  # type: ignore[method-assign]


def _paced(speak: Any, fast: threading.Event) -> Any:
    """`speak` with a pause after each piece while `fast` is not set."""

    def slowly(*given: Any, **named: Any) -> Generator[str, None, Answer]:
        answer = speak(*given, **named)
        try:
            while True:
                try:
                    yield next(answer)
                except StopIteration as stop:
                    return stop.value
                fast.wait(0.2)
        finally:
            answer.close()

    return slowly


@dataclass
class Watched:
    """A page with what it asked the network for, what went wrong in it, and the bodies it sent to the model."""

    page: Page
    asked: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    bodies: list[Any] = field(default_factory=list)

    def note(self, request: Request) -> None:
        self.asked.append(request.url)
        if request.url.endswith("/v1/chat/completions"):
            self.bodies.append(json.loads(request.post_data or "null"))

    def ask(self, text: str) -> None:
        """Write a question and press Enter."""
        self.page.get_by_label("Your question").fill(text)
        self.page.keyboard.press("Enter")

    def turn(self, number: int) -> Any:
        """The turn of that number, from 1."""
        return self.page.locator(f".turn:nth-child({number})")

    def words(self, number: int = 1) -> str:
        """The whole answer of a turn."""
        self.turn(number).locator(".took").wait_for()
        return str(self.turn(number).locator(".words").text_content())


@contextlib.contextmanager
def visiting(browser: Browser, url: str, *, max_tokens: int = 8, **context: Any) -> Iterator[Watched]:
    """A fresh visitor of the page, with answers of at most `max_tokens` tokens."""
    context.setdefault("viewport", WIDE)
    visit = browser.new_context(**context)
    visit.set_default_timeout(60_000)  # the machine may be busy
    saved = json.dumps(json.dumps({"maxTokens": max_tokens}))
    visit.add_init_script(
        f"localStorage.getItem('vlm-serve settings') || localStorage.setItem('vlm-serve settings', {saved})"
    )
    watched = Watched(visit.new_page())
    watched.page.on("request", watched.note)
    watched.page.on("pageerror", lambda error: watched.errors.append(str(error)))
    watched.page.on("console", lambda told: told.type == "error" and watched.errors.append(told.text))
    try:
        watched.page.goto(url)
        yield watched
    finally:
        visit.close()


def picture_file(path: Path, seed: int = 0) -> Path:
    """Write a picture of 50 × 40 random pixels."""
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 50, 3), np.uint8)).save(path)
    return path
