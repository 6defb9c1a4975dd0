"""`python -m vlm_bench.web BUNDLE…`: the browser runtime in Chromium beside the Python runtime, on the same bundles."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image
from rich.console import Console

from vlm_bench import report
from vlm_bench.browser import PACKAGE, PAGE, chromium, installed, serving
from vlm_bench.measure import Rep, interleave, ratio
from vlm_bench.worker import workers
from vlm_models.errors import BundleError
from vlm_runtime.bundle import open_bundle
from vlm_runtime.vlm import load

PYTHON, BROWSER = "Python", "Chromium"
_LOAD = """async ([url, threads]) => {
  const { load } = await import("vlm-runtime-web");
  globalThis.model = await load(url, { threads, cache: false });
}"""
_ANSWER = """async ([png, question, tokens]) => {
  const image = Uint8Array.from(atob(png), (letter) => letter.charCodeAt(0));
  const answer = await globalThis.model.answer(question, { images: [image], maxNewTokens: tokens });
  return [answer.timingsMs, answer.tokenIds.length];
}"""


def make_python(folder: str, threads: int, question: str, tokens: int) -> Rep:
    """Greedy answers of the Python runtime about pictures that it has not seen before."""
    vlm, picture = load(folder, engine="onnx", threads=threads), _golden(Path(folder))

    def rep(number: int) -> Mapping[str, float]:
        answer = vlm.answer(question, [_png(picture, number)], max_new_tokens=tokens)
        return _values(answer.timings_ms, len(answer.token_ids))

    return rep


def make_browser(folder: str, threads: int, question: str, tokens: int) -> Rep:
    """The same by the browser runtime in a page of Chromium, which lives as long as the process."""
    picture, stack = _golden(Path(folder)), contextlib.ExitStack()
    address = stack.enter_context(serving({"bundle": Path(folder).resolve()}))
    page = stack.enter_context(chromium()).new_page()
    page.goto(address + PAGE)
    page.evaluate(_LOAD, [f"{address}bundle/", threads])

    def rep(number: int) -> Mapping[str, float]:
        assert stack  # closed with the process, not before
        png = base64.b64encode(_png(picture, number)).decode()
        times, count = page.evaluate(_ANSWER, [png, question, tokens])
        return _values(times, count)

    return rep


def _golden(folder: Path) -> Image.Image:
    bundle = open_bundle(folder, verify=False)
    path = bundle.folder / "golden" / "image.png"
    if not path.is_file():
        raise BundleError(f"{folder} has no golden/image.png: export it with its check")
    with Image.open(path) as image:
        return image.convert("RGB")


def _png(picture: Image.Image, number: int) -> bytes:
    """The picture with one pixel of its own in the middle, so that no repeat finds its rows in a cache."""
    changed, file = picture.copy(), io.BytesIO()
    middle = (picture.width // 2, picture.height // 2)
    changed.putpixel(middle, (number * 7 % 256, number * 31 % 256, number * 101 % 256))
    changed.save(file, "PNG")
    return file.getvalue()


def _values(times: Mapping[str, float], tokens: int) -> dict[str, float]:
    return {
        "ttft_ms": times["ttft"],
        "preprocess_ms": times["preprocess"],
        "vision_ms": times["vision"] + times["projector"],
        "prefill_ms": times["prefill"],
        "decode_tokens_per_s": 1e3 * (tokens - 1) / times["decode"],
        "answer_tokens": float(tokens),
    }


def command(
    bundles: Annotated[list[Path], typer.Argument(help="Bundle folders of target onnx.")],
    question: Annotated[str, typer.Option()] = "Describe the image.",
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of an answer at most.")] = 32,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    repeats: Annotated[int, typer.Option(min=1)] = 7,
    idle: Annotated[float, typer.Option(help="Seconds to wait for an idle machine before each repeat.")] = 8.0,
    save: Annotated[bool, typer.Option("--save", help=f"Write the numbers into {report.RESULTS}.")] = False,
) -> None:
    """TTFT and decode rate of one bundle in Python and in a browser, repeats in turn, medians."""
    console, makers = Console(), dict[str, tuple[str, tuple[Any, ...]]]()
    for bundle in bundles:
        arguments = (str(bundle), threads, question, tokens)
        makers[f"{PYTHON} {bundle.name}"] = ("vlm_bench.web:make_python", arguments)
        makers[f"{BROWSER} {bundle.name}"] = ("vlm_bench.web:make_browser", arguments)
    with workers(makers, threads) as running:
        loads = {name: worker.load_s for name, worker in running.items()}
        results = interleave(running, repeats, idle_s=idle, watch=report.status(console))
    columns = {
        "ttft_ms": "TTFT, ms",
        "vision_ms": "vision, ms",
        "prefill_ms": "prefill, ms",
        "decode_tokens_per_s": "decode tok/s",
    }
    console.print(report.table(f"{threads} threads, medians", results, columns))
    ratios = {
        bundle.name: {
            number: ratio(results, f"{BROWSER} {bundle.name}", f"{PYTHON} {bundle.name}", number)
            for number in ("ttft_ms", "decode_tokens_per_s")
        }
        for bundle in bundles
    }
    for name, found in ratios.items():
        ttft, rate = found["ttft_ms"], found["decode_tokens_per_s"]
        console.print(f"{name}: browser / Python: TTFT {ttft:.2f}, decode rate {rate:.2f}")
    report.warn_if_loud(console, results)
    if save:
        recipes = {bundle.name: dict(open_bundle(bundle, verify=False).manifest.recipes) for bundle in bundles}
        data = report.record(
            "web",
            results,
            ratios=ratios,
            recipes=recipes,
            load_s=loads,
            question=question,
            tokens=tokens,
            threads=threads,
            browser=subprocess.run([installed(), "--version"], capture_output=True, text=True).stdout.strip(),
            onnxruntime_web=_version("onnxruntime-web"),
        )
        console.print(str(report.save(data)))


def _version(package: str) -> str:
    return str(json.loads((PACKAGE / "node_modules" / package / "package.json").read_text("utf-8"))["version"])


if __name__ == "__main__":
    from vlm_models.command import run

    app = typer.Typer(add_completion=False)
    app.command(no_args_is_help=True)(command)
    run(app)
