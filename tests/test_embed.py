"""The programs of runtimes/EMBED.md: they run, they answer as the library does, and the page shows them as they are."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import expect

from running import running_bundle, running_spec
from serving import serving
from tiled import noise
from vlm_bench.browser import chromium
from vlm_bench.browser import serving as serving_files
from vlm_runtime.vlm import load
from web_package import built

ROOT = Path(__file__).resolve().parent.parent / "runtimes"
PAGE, EXAMPLES = (ROOT / "EMBED.md").read_text("utf-8"), ROOT / "examples"
NAMES = sorted(file.name for file in EXAMPLES.iterdir() if file.is_file())
QUESTION = "What colour is it?"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = running_spec(eos_token_ids=())
    return running_bundle(tmp_path_factory.mktemp("embedded") / "bundle", spec, max_context=256)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    noise((60, 50)).save(path)
    return path


@pytest.fixture(scope="module")
def want(bundle: Path, picture: Path) -> str:
    return load(bundle, threads=1).answer(QUESTION, [picture], max_new_tokens=64).text


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[str]:
    with serving(bundle, "--threads", 1, key="sesame") as process:
        yield process.url


def ran(*line: object, cwd: Path | None = None) -> str:
    environment = {**os.environ, "VLM_API_KEY": "sesame", "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(list(map(str, line)), capture_output=True, env=environment, cwd=cwd, timeout=600)
    assert done.returncode == 0, done.stderr.decode() + done.stdout.decode()
    return done.stdout.decode()


@pytest.mark.parametrize("name", NAMES)
def test_the_page_shows_the_program_that_is_tested(name: str) -> None:
    text = (EXAMPLES / name).read_text("utf-8")
    assert text in PAGE
    assert len(text.splitlines()) <= 25


def test_the_page_shows_no_other_programs() -> None:
    assert len(re.findall(r"^```\w+$", PAGE, re.MULTILINE)) == len(NAMES)
    assert {name for name in NAMES if f"def test_{name.replace('.', '_')}" not in Path(__file__).read_text()} == set()


def test_ask_py(bundle: Path, picture: Path, want: str) -> None:
    chat = load(bundle, threads=1).chat()
    first = "".join(chat.ask(QUESTION, [picture], max_new_tokens=64))
    second = "".join(chat.ask("Are you sure?", max_new_tokens=64))
    assert first == want
    assert ran(sys.executable, EXAMPLES / "ask.py", bundle, picture, QUESTION) == f"{first}\n{second}\n"


def test_ask_sh(server: str, picture: Path, want: str) -> None:
    answer = json.loads(ran("sh", EXAMPLES / "ask.sh", picture, QUESTION, server))
    assert answer["choices"][0]["message"]["content"] == want


def test_ask_openai_py(server: str, picture: Path, want: str) -> None:
    assert ran(sys.executable, EXAMPLES / "ask_openai.py", picture, QUESTION, server) == want + "\n"


def test_ask_mjs(bundle: Path, picture: Path, want: str, tmp_path: Path) -> None:
    Image.open(picture).save(tmp_path / "picture.ppm")
    (tmp_path / "ask.mjs").write_text((EXAMPLES / "ask.mjs").read_text("utf-8"))
    (tmp_path / "node_modules").mkdir()
    (tmp_path / "node_modules" / "vlm-runtime-web").symlink_to(built())
    assert ran("node", "ask.mjs", bundle, "picture.ppm", QUESTION, cwd=tmp_path) == want + "\n"


def test_ask_html(bundle: Path, picture: Path, want: str, tmp_path: Path) -> None:
    (tmp_path / "ask.html").symlink_to(EXAMPLES / "ask.html")
    (tmp_path / "bundle").symlink_to(bundle)
    with serving_files({"files": tmp_path}, built()) as url, chromium() as browser:
        page = browser.new_page()
        page.goto(f"{url}files/ask.html")
        expect(page.locator("output")).to_have_text("Ready.", timeout=120_000)
        page.get_by_label("Picture").set_input_files(picture)
        page.get_by_label("Question").fill(QUESTION)
        page.keyboard.press("Enter")
        expect(page.locator("output")).to_have_js_property("value", want, timeout=120_000)
