"""The report: one page that loads nothing, shows every number or "not measured", and lets no text become markup."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import itertools
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlm_bench.html import render, require, write_html
from vlm_bench.html.answers import LIMIT
from vlm_bench.html.charts import FIRST_TOKEN
from vlm_bench.html.drawing import COLORS, FAINT, INK, MARKERS, PAPER
from vlm_bench.html.pictures import SIDE, thumbnail
from vlm_bench.measure import Stat
from vlm_bench.results import (
    STAGES,
    Accuracy,
    Asked,
    Condition,
    Deviation,
    Drift,
    Energy,
    Environment,
    LoadTimes,
    Percentiles,
    Results,
    Row,
    Settings,
    Skipped,
)
from vlm_models.errors import DependencyError, InputError

HOSTILE = (
    "</style></svg><script>alert(1)</script>\"'><img src=x onerror=alert(2)> $\\frac{1}{0}$ {{ 7*7 }} &amp; \x1b[31m"
)
CHROMIUM = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--virtual-time-budget=5000",
    "--dump-dom",
)


def stat(value: float) -> Stat:
    return Stat(value, value * 0.9, value * 1.1, 5, 5)


def row(name: str, **other: Any) -> Row:
    """A measured bundle; `other` replaces fields."""
    sound: dict[str, Any] = {
        "name": name,
        "kind": "bundle",
        "engines": {"vision_encoder": "onnx", "projector": "onnx", "language_model": "gguf"},
        "precision": "vision=int8,projector=fp16,language=int4:g32",
        "bytes_on_disk": 161 << 20,
        "stages_ms": {stage: stat(3 + at) for at, stage in enumerate(STAGES)},
        "ttft_ms": stat(1234.6),
        "token_ms": Percentiles(6.5, 7.25, 9.75),
        "tokens_per_s": stat(152),
        "wall_ms": stat(2345),
        "load_ms": LoadTimes(912, 301),
        "peak_rss_mb": 456.7,
        "gpu_mb": None,
        "bytes_read": 100 << 20,
        "energy": None,
        "noisy": False,
        "quiet": 5,
        "of": 5,
        "image_tokens": 81,
        "prompt_tokens": 104,
        "new_tokens": 64,
        "tiles": 1,
    }
    return Row(**{**sound, **other})


def unmeasured(name: str) -> Row:
    """A peer that tells no more than the whole time."""
    nothing = dict.fromkeys(
        ("precision", "bytes_on_disk", "ttft_ms", "token_ms", "tokens_per_s", "peak_rss_mb", "bytes_read")
    )
    more = dict.fromkeys(("image_tokens", "prompt_tokens", "tiles"))
    return row(name, kind="peer", engines={}, stages_ms={}, load_ms=LoadTimes(), **nothing, **more)


def results(**other: Any) -> Results:
    """A complete run of two bundles; `other` replaces fields."""
    sound: dict[str, Any] = {
        "created": "2026-01-01T00:00:00+00:00",
        "command": "vlm-bench small large --html report.html",
        "environment": Environment("A Processor", 2, 23.5, "Linux", "3.12.1", {"numpy": "2.3.5"}),
        "settings": Settings(2, 5, 64, ("a.png",), ("What is it?",)),
        "complete": True,
        "rows": (row("small"), row("large", bytes_on_disk=612 << 20)),
    }
    return Results(**{**sound, **other})


def data_url(color: str = "red", size: tuple[int, int] = (900, 600)) -> str:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def accuracy(name: str, answers: list[str], image: str | None = None, **other: Any) -> Accuracy:
    """One set whose questions all have the reference "Two"."""
    asked = tuple(
        Asked(str(at), image, f"How many in {at}?", "Two", answer, "count", answer == "Two")
        for at, answer in enumerate(answers)
    )
    exact = sum(bool(one.exact) for one in asked) / len(asked)
    return Accuracy(name, "demo", len(asked), exact, exact, 0.875, interval=(0.8, 0.9), per_question=asked, **other)


def drift(name: str, answer: str = "A red cross.", **other: Any) -> Drift:
    """Drifts at the projector."""
    sound: dict[str, Any] = {
        "reference": "checkpoint",
        "name": name,
        "image": None,
        "prompt": "Describe the image.",
        "stages": {
            "pixel_values": Deviation(1.0, 0.0, 0.0),
            "image_features": Deviation(0.999987, 0.01, 0.001),
            "image_embeds": Deviation(0.987654, 0.3, 0.1),
            "inputs_embeds": Deviation(0.987655, 0.3, 0.1),
            "logits": Deviation(0.912345, 1.0, 0.3),
        },
        "first": "image_embeds",
        "answer": answer,
        "reference_answer": "A red cross.",
    }
    return Drift(**{**sound, **other})


class Page(HTMLParser):
    """What a browser would see: elements with their attributes, the text in each, and all text but that of styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self._inside: dict[str, list[list[str]]] = {}
        self._open: list[tuple[str, list[str]]] = []
        self._text: list[str] = []
        self.feed(text)
        self.text = "".join(self._text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        self._open.append((tag, []))
        self._inside.setdefault(tag, []).append(self._open[-1][1])

    def handle_endtag(self, tag: str) -> None:
        if any(tag == one for one, _ in self._open):
            while self._open.pop()[0] != tag:
                pass

    def handle_data(self, data: str) -> None:
        if all(tag != "style" for tag, _ in self._open):
            self._text.append(data)
        for _, parts in self._open:
            parts.append(data)

    def tags(self) -> set[str]:
        return {tag for tag, _ in self.elements}

    def inside(self, tag: str) -> list[str]:
        """The text in each element of a kind, white space made single."""
        return [" ".join("".join(parts).split()) for parts in self._inside.get(tag, [])]


def everything() -> Results:
    """A run with all that a report can show."""
    return results(
        rows=(
            row("small", energy=Energy(12.5, 0.195, "RAPL")),
            row("large", noisy=True, quiet=1, gpu_mb=812.0),
            unmeasured("peer"),
        ),
        skipped=(Skipped("missing", "peer missing is not installed"),),
        accuracy=(
            accuracy("small", ["Two", "Three"], data_url(), kinds={"count": 0.5}),
            accuracy("large", ["Two"] * 2),
        ),
        drift=(drift("small"), drift("large", "A red circle.")),
    )


@pytest.fixture(scope="module")
def whole() -> str:
    """The page of `everything`."""
    return render(everything())


def test_the_page_loads_nothing(whole: str) -> None:
    text = whole
    page = Page(text)
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster", "background"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:image/webp;base64,")), f"{tag} {name}={value[:80]}"
    assert not page.tags() & {"script", "link", "iframe", "object", "embed", "form", "base", "video", "audio"}
    assert "://" not in text
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)]*)", text))
    policy = next(a["content"] for t, a in page.elements if t == "meta" and "http-equiv" in a)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_every_reference_inside_the_page_has_its_target(whole: str) -> None:
    text = whole
    ids = [attributes["id"] for _, attributes in Page(text).elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = re.findall(r"url\(#([^)]*)\)", text) + re.findall(r'href="#([^"]*)"', text)
    assert used
    assert set(used) <= set(ids)


def test_no_text_becomes_markup(whole: str) -> None:
    sound = Page(whole)
    hostile = dataclasses.replace(
        everything(),
        created=HOSTILE,
        command=HOSTILE,
        environment=Environment(HOSTILE, 2, 1.0, HOSTILE, HOSTILE, {HOSTILE: HOSTILE}, HOSTILE, HOSTILE, HOSTILE),
        settings=Settings(2, 5, 64, (HOSTILE,), (HOSTILE,), (HOSTILE,)),
        rows=(
            row(HOSTILE, precision=HOSTILE, engines={"vision_encoder": HOSTILE}, energy=Energy(1.5, 0.5, HOSTILE)),
            row(HOSTILE + "2", noisy=True),
        ),
        skipped=(Skipped(HOSTILE, HOSTILE),),
        accuracy=(
            Accuracy(
                HOSTILE, HOSTILE, 1, 0.0, 0.0, 0.0, 0.5, HOSTILE, None, {HOSTILE: 0.5},
                (Asked(HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE + "!", HOSTILE, False),),
            ),
        ),
        drift=(drift(HOSTILE, HOSTILE, reference=HOSTILE, image=HOSTILE, prompt=HOSTILE, reference_answer="x"),),
    )  # fmt: skip
    page = Page(render(hostile))
    assert page.tags() <= sound.tags()
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert len(page.inside("style")) == len(sound.inside("style"))
    assert page.text.count("<script>alert(1)</script>") > 20
    assert "{{ 7*7 }}" in page.text
    assert any(HOSTILE[:30] in text for text in page.inside("text")), "names on charts are text as well"


def test_names_that_plotting_libraries_trip_over_are_drawn_as_they_are() -> None:
    names = ["$x^2$", "$\\frac{", "模型 🙂", "a_b", "100 %", "x" * 300, "two\nlines", "\ud800"]
    page = Page(render(results(rows=tuple(map(row, names)), drift=tuple(map(drift, names)))))
    drawn = page.inside("text")
    for name in (*names[:5], f"{'x' * 33}…", "two lines", "?"):
        assert drawn.count(name) == 6, "in two bar charts and in the legend of the drift, wide and narrow"


def test_what_was_not_measured_says_so_and_is_never_zero_or_none() -> None:
    page = Page(render(results(rows=(row("small"), unmeasured("peer")))))
    assert "not measured" in page.text
    assert "Not measured here: GPU memory, energy" in page.text
    assert not re.search(r"\b(None|nan|inf|undefined)\b", page.text)
    cells = page.inside("td")
    assert "0" not in cells
    assert "0 ms" not in cells


def test_numbers_are_those_of_the_run(whole: str) -> None:
    page = Page(whole)
    cells = page.inside("td")
    for expected in ("1 235 ms", "152", "161 MB", "912 / 301 ms", "12.5 J", "5 of 5", "1 of 5 noisy", "812 MB"):
        assert expected in cells
    for expected in ("0.999987", "0.987654", "projector", "1 of 1", "0 of 1", "50.0%", "0.875", "80.0% – 90.0%"):
        assert expected in cells
    assert "peer missing is not installed" in page.text
    assert "Noisy: other processes were busy while large ran" in page.text


def test_ratios_are_to_the_best_peer() -> None:
    rows = (
        row("ours", ttft_ms=stat(50), tokens_per_s=stat(300)),
        row("slow", kind="peer", ttft_ms=stat(400), tokens_per_s=stat(100)),
        row("fast", kind="peer", ttft_ms=stat(100), tokens_per_s=stat(200)),
    )
    cells = Page(render(results(rows=rows))).inside("td")
    assert [text for text in cells if text.endswith("×")] == [
        *("0.50 ×", "1.50 ×"),
        *("4.00 ×", "0.50 ×"),
        *("1.00 ×", "1.00 ×"),
    ]


def test_a_run_that_was_cut_says_partial_and_one_that_was_not_does_not() -> None:
    assert "Partial" in Page(render(results(rows=(), complete=False))).text
    assert "Partial" not in Page(render(results(rows=()))).text


def test_a_machine_that_held_itself_back_is_named() -> None:
    environment = Environment("P", 2, None, "Linux", "3.12", after=Condition(95.0, 800.0, True))
    page = Page(render(results(rows=(), environment=environment)))
    assert "Throttled" in page.text
    assert "temperature 95 °C, clock 800 MHz, throttled: yes" in page.text


@pytest.mark.parametrize("fields", [{}, {"skipped": (Skipped("a", "no such engine"),)}, {"drift": (drift("a"),)}])
def test_a_run_without_rows_is_a_page_all_the_same(fields: dict[str, Any]) -> None:
    page = Page(render(results(rows=(), complete=False, **fields)))
    assert "Environment" in page.text
    assert ("no such engine" in page.text) == ("skipped" in fields)


def test_differences_of_answers_are_marked_and_equal_answers_stand_together() -> None:
    three = (accuracy("a", ["Two", "Two"]), accuracy("b", ["Three", "Two"]), accuracy("c", ["Three", "Two"]))
    page = Page(render(results(rows=(), accuracy=three)))
    names = page.inside("dt")
    assert names.count("b, c") == 1
    assert names.count("all 3 contestants") == 1
    assert "Two" in page.inside("del")
    assert "Three" in page.inside("ins")
    assert "✗ wrong:" in page.inside("span"), "not by colour alone"
    assert "1 questions that all answered" in page.text


def test_a_page_shows_the_disputed_questions_first_and_says_how_many_there_are() -> None:
    answers = ["Two"] * (LIMIT + 50)
    answers[-1] = "Seven"
    page = Page(render(results(rows=(), accuracy=(accuracy("a", answers),))))
    assert f"{LIMIT} of {LIMIT + 50} questions" in page.text
    assert "Seven" in page.inside("ins")
    assert sum(text.startswith("How many in") for text in page.inside("h3")) == LIMIT


def test_drift_without_a_number_is_shown_as_such() -> None:
    broken = drift("a", stages={"pixel_values": Deviation(None, None, None)}, first="pixel_values")
    cells = Page(render(results(rows=(), drift=(broken,)))).inside("td")
    assert "no number" in cells


def test_pictures_are_kept_small_and_once() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (1200, 1600, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG")
    url = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    text = render(results(rows=(), accuracy=(accuracy("a", ["Two", "Three", "Four"], url),)))
    (small,) = re.findall(r"data:image/webp;base64,([A-Za-z0-9+/=]+)", text)[:1]
    with Image.open(io.BytesIO(base64.b64decode(small))) as image:
        assert max(image.size) == 2 * SIDE
    assert text.count(small) == 2, "once where answers differ, once where they agree"


def test_a_page_of_many_pictures_stays_small() -> None:
    asked = []
    for at in range(400):
        noise = np.random.default_rng(at).integers(0, 255, (72, 72, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).save(file, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        asked.append(Asked(str(at), url, "What color is the circle?", "Red", "Green", "color", False))
    one = Accuracy("a", "demo", 400, 0.0, 0.0, 0.0, per_question=tuple(asked))
    rows = tuple(row(f"bundle {at}") for at in range(8))
    assert len(render(results(rows=rows, accuracy=(one,)))) < 1.5e6


def test_pictures_that_are_not_here_or_no_pictures_leave_a_place(tmp_path: Path) -> None:
    text = tmp_path / "secret.txt"
    text.write_text("password")
    os.mkfifo(tmp_path / "pipe.png")
    svg = base64.b64encode(b"<svg><script>alert(1)</script></svg>").decode()
    sources = (
        *map(str, (text, tmp_path, tmp_path / "pipe.png", tmp_path / "gone.png")),
        *("\0", "x" * 5000, "data:image/svg+xml;base64," + svg, "data:text/html,<b>", "data:image/png;base64,AAAA"),
    )
    for source in sources:
        assert thumbnail(source) is None, source[:60]
    shown = Page(render(results(rows=(), accuracy=(accuracy("a", ["Three"], str(tmp_path / "gone.png")),))))
    assert "picture not here: gone.png" in shown.text
    assert "img" not in shown.tags()


def test_a_transparent_picture_lies_on_white() -> None:
    file = io.BytesIO()
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(file, "PNG")
    small = thumbnail(f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}")
    assert small is not None
    with Image.open(io.BytesIO(base64.b64decode(small.split(",")[1]))) as image:
        assert image.convert("RGB").getpixel((4, 4)) == (255, 255, 255)


def test_charts_follow_the_theme_of_the_page(whole: str) -> None:
    text = whole
    for color in (INK, FAINT, PAPER):
        assert color not in text
    charts = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert "var(--ink)" in charts
    fixed = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", charts))
    assert fixed <= set(COLORS), "any other colour may vanish on one of the two papers"
    css = text.split("<style>")[1].split("</style>")[0]
    light, dark = (set(re.findall(r"(--[\w-]+):", block)) for block in (css.split("}")[0], css.split("dark)")[1]))
    assert light >= {"--ink", "--line", "--paper"}
    assert light - dark == set(), "a colour of the light page is missing from the dark one"


def test_stages_and_contestants_are_told_apart_without_colour() -> None:
    looks = list(FIRST_TOKEN.values())
    assert set(FIRST_TOKEN) == set(STAGES) - {"decode", "other"}
    assert len({color for color, _, _ in looks}) == len(looks)
    assert all(a[1] != b[1] for a, b in itertools.pairwise(looks))
    both = {(COLORS[at % len(COLORS)], MARKERS[at % len(MARKERS)]) for at in range(len(COLORS) * len(MARKERS))}
    assert len(both) == len(COLORS) * len(MARKERS)


def test_equal_results_give_equal_pages(whole: str) -> None:
    assert render(everything()) == whole


def test_without_matplotlib_the_extra_to_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DependencyError, match=r"--html needs matplotlib: pip install 'vlm-export\[bench\]'"):
        require()


def test_importing_the_report_loads_no_plotting_library() -> None:
    code = "import sys, vlm_bench.html; print(*{'matplotlib', 'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_a_page_that_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot write"):
        write_html(tmp_path / "no" / "report.html", results(rows=()))
    assert write_html(tmp_path / "report.html", results(rows=())).read_text("utf-8").startswith("<!DOCTYPE html>")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize("width", [390, 1280])
def test_no_page_is_wider_than_its_window(width: int, tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.fail("this test looks at the page in Chromium: apt-get install chromium")
    long = "unbreakable" * 30
    wide = dataclasses.replace(
        everything(),
        command=long,
        rows=(row(long), *everything().rows),
        skipped=(Skipped(long, long),),
        accuracy=(accuracy(long, [long, "Two"], long), *everything().accuracy),
        drift=(drift(long, long, prompt=long), *everything().drift),
    )
    # A frame of the width of a phone, since windows of Chromium have a least width of their own.
    outer = tmp_path / "outer.html"
    outer.write_text(
        f'<iframe style="width:{width}px; height:800px; border:0" srcdoc="{html.escape(render(wide))}"></iframe>'
        "<script>onload = () => { const root = document.querySelector('iframe').contentDocument.documentElement;"
        "const svgs = [...root.querySelectorAll('svg')].filter(one => one.getBoundingClientRect().width > 0);"
        "document.title = [root.clientWidth, root.scrollWidth, svgs.length].join(' ') }</script>",
        "utf-8",
    )
    done = subprocess.run(
        [chromium, *CHROMIUM, f"--user-data-dir={tmp_path / 'profile'}", outer.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    title = re.search(r"<title>(\d+) (\d+) (\d+)</title>", done.stdout)
    assert title, done.stdout[-500:] + done.stderr[-500:]
    seen, needed, charts = map(int, title.groups())
    assert needed <= seen
    assert charts == 4, "of each chart either the wide or the narrow drawing"
