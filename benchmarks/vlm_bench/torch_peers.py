"""`python -m vlm_bench.torch_peers CHECKPOINT`: our ONNX bundles beside PyTorch eager and torch.compile, in one run.

The same picture-shaped noise, prompt rows and number of greedy tokens for all, batch 1, on the CPU or with
`--device cuda` on a GPU. PyTorch runs transformers' own module with a static KV cache in `--dtype`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from vlm_bench import report
from vlm_bench.genai import build_ours
from vlm_bench.measure import Rep, interleave, ratio
from vlm_bench.stages import check_room
from vlm_bench.worker import workers
from vlm_models.errors import InputError

COLUMNS = {
    "vision_ms": "vision and projector, ms",
    "prefill_ms": "prefill, ms",
    "decode_tokens_per_s": "decode tok/s",
}
DTYPES = ("float32", "float16", "bfloat16")
_MODULE = "vlm_bench.torch_peers"  # by which the workers import it; __name__ may be __main__
EAGER, COMPILED = "torch eager", "torch.compile"


def make_ours(folder: str, device: str, threads: int, prompt: int, tokens: int) -> Rep:
    """The bundle's ONNX graphs through the runtime; lookup and argmax are counted, as in the peers' loop."""
    from vlm_runtime.bundle import open_bundle
    from vlm_runtime.engine import Options, choose_engines
    from vlm_runtime.vlm import VLM

    bundle = open_bundle(folder, verify=False)
    model = VLM(bundle, choose_engines(bundle, "onnx"), Options(threads=threads, device=device))  # type: ignore[arg-type]
    check_room(model, prompt, tokens)
    ids = _ids(prompt, model.embedding.rows_count)
    size = bundle.spec.vision.image_size

    def rep(number: int) -> Mapping[str, float]:
        pixels, row = _pixels(number, size), np.empty(model.embedding.columns, np.float32)
        model.decoder.rewind(0)
        start = time.perf_counter()
        model.projector.run(model.vision_encoder.run(pixels))
        seen = time.perf_counter()
        token = int(model.decoder.prefill(model.embedding.rows(ids)).argmax())
        first = time.perf_counter()
        for _ in range(tokens):
            model.embedding.row_into(token, row)
            token = int(model.decoder.decode(row).argmax())
        return _values(start, seen, first, tokens)

    return rep


def make_torch(checkpoint: str, device: str, dtype: str, compiled: bool, threads: int, prompt: int, tokens: int) -> Rep:
    """transformers' module with a static cache, eager or compiled; the first repeat, which compiles, warms up."""
    import torch
    from transformers import LlavaForConditionalGeneration, StaticCache
    from transformers.utils import logging

    quiet: Any = logging
    quiet.disable_progress_bar()
    torch.set_num_threads(threads)
    kind: Any = LlavaForConditionalGeneration
    model = kind.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).to(device)
    language, ids = model.model.language_model, _ids(prompt, model.config.text_config.vocab_size)
    cache: Any = StaticCache(config=model.config.text_config, max_cache_len=prompt + tokens + 1)
    size = model.config.vision_config.image_size

    def see(pixels: Any) -> Any:
        return model.get_image_features(pixel_values=pixels)

    def step(token: Any, position: Any) -> Any:
        hidden = language(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True)[0]
        return model.lm_head(hidden[:, -1]).argmax(-1)

    if compiled:
        see, decode = torch.compile(see), torch.compile(step)
        prefill = torch.compile(step)
    else:
        decode = prefill = step
    settle: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None

    @torch.inference_mode()
    def rep(number: int) -> Mapping[str, float]:
        pixels = torch.from_numpy(_pixels(number, size)).to(device, getattr(torch, dtype))
        cache.reset()
        rows = torch.tensor([ids], device=device)
        settle()
        start = time.perf_counter()
        see(pixels)
        settle()
        seen = time.perf_counter()
        token = prefill(rows, torch.arange(prompt, device=device)[None])
        settle()
        first = time.perf_counter()
        for i in range(tokens):
            token = decode(token[None].clone(), torch.tensor([[prompt + i]], device=device))
            token.item()  # a loop that prints text has to know it
        return _values(start, seen, first, tokens)

    for number in range(2 if compiled else 0):  # the second call compiles again: by then the cache has its tensors
        rep(number)
    return rep


def _pixels(number: int, size: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(number).standard_normal((1, 3, size, size), np.float32)


def _ids(count: int, vocab: int) -> list[int]:
    ids: list[int] = np.random.default_rng(count).integers(0, vocab, count).tolist()
    return ids


def _values(start: float, seen: float, first: float, tokens: int) -> dict[str, float]:
    times = {"vision_ms": (seen - start) * 1e3, "prefill_ms": (first - seen) * 1e3}
    return {**times, "decode_tokens_per_s": tokens / (time.perf_counter() - first)}


def device_name(device: str) -> str:
    """What the numbers were measured on."""
    if device == "cpu":
        return str(report.machine()["processor"])
    import torch

    if not torch.cuda.is_available():
        raise InputError("device cuda: PyTorch sees no NVIDIA GPU here; take --device cpu")
    return torch.cuda.get_device_name()


def command(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, such as vlm-demo writes.")],
    work: Annotated[Path, typer.Option(help="Where our bundles are kept between runs.")] = Path("build/torch-peers"),
    precisions: Annotated[str, typer.Option(help="Ours, separated by spaces.")] = "fp16 int8 int4",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help=f"PyTorch's: {', '.join(DTYPES)}.")] = "float32",
    prompt: Annotated[int, typer.Option(min=1, help="Prefilled tokens.")] = 600,
    tokens: Annotated[int, typer.Option(min=1, help="Decoded tokens.")] = 64,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    repeats: Annotated[int, typer.Option(min=1)] = 7,
    idle: Annotated[float, typer.Option(help="Seconds to wait for an idle machine before each repeat.")] = 8.0,
    save: Annotated[bool, typer.Option("--save", help=f"Write the numbers into {report.RESULTS}.")] = False,
) -> None:
    """Vision, prefill and decode of our bundles and of PyTorch, repeats in turn, ratios of medians."""
    console = Console()
    if not (checkpoint / "config.json").is_file():
        raise InputError(f"{checkpoint} has no config.json: give a checkpoint folder")
    for what, given, allowed in (("device", device, ("cpu", "cuda")), ("dtype", dtype, DTYPES)):
        if given not in allowed:
            raise InputError(f"unknown {what} {given!r}: choose one of {', '.join(allowed)}")
    measured_on = device_name(device)
    makers: dict[str, tuple[str, tuple[Any, ...]]] = {}
    for precision in precisions.split():
        folder = build_ours(checkpoint, work / precision.replace("=", "-").replace(",", "-"), precision)
        makers[f"ours {precision}"] = (f"{_MODULE}:make_ours", (str(folder), device, threads, prompt, tokens))
    for name in (EAGER, COMPILED):
        arguments = (str(checkpoint), device, dtype, name == COMPILED, threads, prompt, tokens)
        makers[f"{name} {dtype}"] = (f"{_MODULE}:make_torch", arguments)
    ours, peers = list(makers)[: len(precisions.split())], list(makers)[len(precisions.split()) :]
    with workers(makers, threads) as running:
        results = interleave(running, repeats, idle_s=idle, watch=report.status(console))
    console.print(report.table(f"{measured_on}, {threads} threads, prompt of {prompt}; medians", results, COLUMNS))
    ratios = {f"{a} / {b}": {number: ratio(results, a, b, number) for number in COLUMNS} for a in ours for b in peers}
    for pair, numbers in ratios.items():
        console.print(f"{pair}: " + ", ".join(f"{name} {value:.2f}" for name, value in numbers.items()))
    report.warn_if_loud(console, results)
    if save:
        facts = {"device": measured_on, "dtype": dtype, "prompt": prompt, "tokens": tokens, "threads": threads}
        console.print(str(report.save(report.record("torch-peers", results, **facts, ratios=ratios))))


if __name__ == "__main__":
    from vlm_models.command import run

    app = typer.Typer(add_completion=False)
    app.command(no_args_is_help=True)(command)
    run(app)
