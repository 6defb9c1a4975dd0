"""The browser runtime in Chromium: golden vectors, and an example app that answers as Python does."""

from __future__ import annotations

import copy
import dataclasses
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect

import vlm_export
from exporting import exported
from running import entry
from vlm_bench.browser import PAGE, chromium, serving
from vlm_export.golden import PICTURE, prompt
from vlm_export.target import silent
from vlm_export.targets.onnx import language_model
from vlm_models.demo.build import build_demo
from vlm_models.model import load_model
from vlm_quant.recipe import parse_recipe
from vlm_runtime.manifest import read_manifest, write_manifest
from vlm_runtime.vlm import load
from web_package import built
from web_pages import Site, ask, example, open_bundle, site_of

STAGES = ["pixel_values", "image_features", "image_embeds", "inputs_embeds", "logits"]
QUESTION = "What colour is the large circle?"
REPLAY = """async (url) => {
  const { load, replay } = await import("vlm-runtime-web");
  const model = await load(url, { cache: false, threads: 1 });
  try { return await replay(model); } finally { await model.dispose(); }
}"""
ANSWER = """async ([url, question, image, tokens]) => {
  const { load } = await import("vlm-runtime-web");
  const model = await load(url, { cache: false });
  try {
    const picture = await (await fetch(image)).blob();
    return await model.answer(question, { images: [picture], maxNewTokens: tokens });
  } finally { await model.dispose(); }
}"""


@pytest.fixture(scope="module")
def native(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that runs in a browser as it is."""
    return exported(tiny, tmp_path_factory)


@pytest.fixture(scope="module")
def site(native: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site_of(tmp_path_factory.mktemp("site"), native) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture
def page(browser: Browser, site: Site) -> Iterator[Page]:
    with example(browser, site) as page:
        yield page


def python_tokens(bundle: Path, count: int) -> list[int]:
    """What the Python runtime says to the golden prompt."""
    vlm = load(bundle, threads=1)
    asked = prompt(vlm.spec.prompt)
    return list(vlm.answer(asked, [bundle / PICTURE], raw=True, max_new_tokens=count).token_ids)


def written_for_a_browser(checkpoint: Path, native: Path, folder: Path) -> None:
    """The bundle with a language model of four bits as `--web` writes it."""
    shutil.copytree(native, folder)
    model, manifest = load_model(checkpoint), read_manifest(native)
    precision, context = parse_recipe("int4").language, manifest.max_context
    part = language_model(model.checkpoint, model.spec, precision, folder / "onnx", context, silent, web=True)
    parity = copy.deepcopy(dict(manifest.parity))
    parity["onnx"]["stages"]["logits"]["threshold"] = {"cosine": 0.9}
    changed = dataclasses.replace(
        manifest,
        files={**manifest.files, **{name: entry(folder / name) for name in part.files}},
        parts={**manifest.parts, "language_model": {"onnx": part}},
        parity=parity,
    )
    write_manifest(folder, changed)


def check_replay(page: Page, site: Site, name: str, *, reference: bool) -> None:
    replay = page.evaluate(REPLAY, f"{site.url}files/{name}/")
    assert [stage["name"] for stage in replay["stages"]] == STAGES
    assert all(stage["passed"] for stage in replay["stages"]), replay["stages"]
    assert replay["stages"][0]["maxAbs"] <= 1e-6
    assert replay["promptEqual"]
    mine = python_tokens(site.folder / name, len(replay["greedy"]))
    assert replay["greedy"][: len(mine)] == mine
    if reference:
        assert replay["greedy"] == replay["reference"]


def test_golden_vectors_are_met_stage_by_stage(page: Page, site: Site) -> None:
    assert page.evaluate("crossOriginIsolated")
    check_replay(page, site, "bundle", reference=True)


def test_golden_vectors_are_met_by_graphs_written_for_a_browser(page: Page, site: Site, tiny: Path) -> None:
    written_for_a_browser(tiny, site.folder / "bundle", site.folder / "web")
    check_replay(page, site, "web", reference=False)


def test_the_page_answers_as_python_does_and_says_what_it_took(
    page: Page, site: Site, native: Path, picture_file: Path
) -> None:
    wanted = load(native, threads=1).answer(QUESTION, [picture_file], max_new_tokens=128)
    open_bundle(page, f"{site.url}files/bundle/")
    expect(page.get_by_role("status")).to_contain_text(read_manifest(native).spec.name)
    page.get_by_label("choose one:").set_input_files(picture_file)
    assert ask(page, QUESTION) == wanted.text
    took = page.locator("#took")
    for stage in ("Preprocess", "Vision", "Prefill", "Decode"):
        expect(took).to_contain_text(stage)
    expect(took).to_contain_text(f"{wanted.prompt_tokens} tokens, {wanted.image_tokens} of the picture")
    expect(took).to_contain_text(f"{len(wanted.token_ids)} tokens")
    expect(page.get_by_role("alert")).to_be_hidden()


def test_a_bundle_is_fetched_once(page: Page, site: Site) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    open_bundle(page, f"{site.url}files/bundle/")
    assert any(url.endswith("language_model.onnx.data") for url in asked)
    page.reload()
    asked.clear()
    open_bundle(page, f"{site.url}files/bundle/")
    expect(page.get_by_role("button", name="Ask")).to_be_enabled()
    assert [url for url in asked if "/files/" in url] == [f"{site.url}files/bundle/manifest.json"]


def test_stop_ends_an_answer_and_the_next_one_is_whole(page: Page, site: Site, native: Path) -> None:
    whole = load(native, threads=1).answer(QUESTION, max_new_tokens=128).text
    open_bundle(page, f"{site.url}files/bundle/")
    page.evaluate(
        """() => new MutationObserver((_, watch) => {
          watch.disconnect();
          document.getElementById("stop").click();
        }).observe(document.getElementById("answer"), { childList: true, characterData: true })"""
    )
    page.get_by_label("Question").fill(QUESTION)
    page.keyboard.press("Enter")
    page.locator("#send:enabled").wait_for()
    broken = str(page.locator("#answer").text_content())
    assert len(broken) < len(whole)
    assert whole.startswith(broken)
    assert ask(page, QUESTION) == whole


def test_the_example_fits_a_phone_in_the_dark(browser: Browser, site: Site) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme="dark")
    page = context.new_page()
    page.goto(site.url + PAGE)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(23, 22, 20)"
    context.close()


def test_the_small_server_isolates_the_page_and_serves_nothing_else(native: Path) -> None:
    command = ["node", "example/serve.mjs", str(native), "0"]
    with subprocess.Popen(command, cwd=built(), stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            with httpx.Client(base_url=url, follow_redirects=True) as client:
                home = client.get("/")
                assert home.headers["cross-origin-opener-policy"] == "same-origin"
                assert home.headers["cross-origin-embedder-policy"] == "require-corp"
                assert "vlm-runtime-web" in home.text
                assert client.get("/bundle/manifest.json").json()["format"] == "vlm-bundle"
                for path in (
                    "/bundle/",
                    "/bundle/none",
                    "/bundle/%2e%2e/x",
                    "/bundle/..%2f..%2fetc/passwd",
                    "/%ff",
                    "/x",
                ):
                    assert client.get(path).status_code == 404, path
        finally:
            server.terminate()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # transformers' own
def test_the_demo_answers_in_the_browser_as_in_python(browser: Browser, tmp_path: Path) -> None:
    build_demo(tmp_path / "demo")
    bundle = tmp_path / "bundle"
    options = {"precision": "int8", "algorithm": "rtn", "max_context": 512, "web": True}
    vlm_export.export(tmp_path / "demo", "onnx", bundle, **options)  # type: ignore[arg-type]
    sample = tmp_path / "demo" / "sample.png"
    vlm = load(bundle)
    with serving({"bundle": bundle, "demo": tmp_path / "demo"}, built()) as url:
        page = browser.new_page()
        page.goto(url + PAGE)
        replay = page.evaluate(REPLAY, f"{url}bundle/")
        assert all(stage["passed"] for stage in replay["stages"]), replay["stages"]
        for question in ("How many objects are in the image?", "Describe the image."):
            wanted = vlm.answer(question, [Image.open(sample)], max_new_tokens=24)
            given = [f"{url}bundle/", question, f"{url}demo/sample.png", 24]
            assert page.evaluate(ANSWER, given)["text"] == wanted.text
        page.close()
