"""`python -m vlm_bench.genai CHECKPOINT`: our int4 language model beside onnxruntime-genai's, in one run."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console

from vlm_bench import report
from vlm_bench.measure import Rep, interleave, ratio
from vlm_bench.stages import check_room, open_endless
from vlm_bench.worker import workers
from vlm_models.errors import DependencyError, InputError

_BLOCK = 32


def make_ours(bundle: str, threads: int, prompt: int, tokens: int) -> Rep:
    """Prefill of `prompt` token ids and greedy decoding, lookup and argmax included, as the peer's loop does."""
    model = open_endless(bundle, None, threads)
    check_room(model, prompt, tokens + 1)
    ids = _ids(prompt, model.embedding.rows_count)

    def rep(number: int) -> Mapping[str, float]:
        model.decoder.rewind(0)
        row = np.empty(model.embedding.columns, np.float32)
        start = time.perf_counter()
        token = int(model.decoder.prefill(model.embedding.rows(ids)).argmax())
        first = time.perf_counter()
        for _ in range(tokens):
            model.embedding.row_into(token, row)
            token = int(model.decoder.decode(row).argmax())
        return _values(start, first, tokens)

    return rep


def make_genai(folder: str, threads: int, prompt: int, tokens: int, vocab: int) -> Rep:
    """onnxruntime-genai's own greedy generator on what its builder wrote."""
    import onnxruntime_genai as og

    config = og.Config(folder)
    options = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
    config.overlay(json.dumps(options))
    model, ids = og.Model(config), np.array([_ids(prompt, vocab)], np.int32)

    def rep(number: int) -> Mapping[str, float]:
        parameters = og.GeneratorParams(model)
        length = prompt + tokens + 1
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = og.Generator(model, parameters)
        start = time.perf_counter()
        generator.append_tokens(ids)
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(tokens):
            generator.generate_next_token()
        values = _values(start, first, tokens)
        if (made := len(generator.get_sequence(0))) != length:
            raise InputError(f"onnxruntime-genai stopped after {made} of {length} tokens: nothing to compare")
        return values

    return rep


def build_ours(checkpoint: Path, folder: Path, precision: str) -> Path:
    """Our bundle of the checkpoint, written once."""
    from vlm_export import export

    if not (folder / "manifest.json").is_file():
        export(checkpoint, ["onnx"], folder, precision=precision, check=False)
    return folder


def build_genai(checkpoint: Path, folder: Path) -> Path:
    """The peer's int4 model of the same language model, written once by its own builder."""
    if importlib.util.find_spec("onnxruntime_genai") is None:
        raise DependencyError("the comparison needs onnxruntime-genai: pip install 'vlm-export[bench]'")
    if (folder / "genai_config.json").is_file():
        return folder
    text = folder.with_name("text-model")
    write_text_model(checkpoint, text)
    options = [f"int4_block_size={_BLOCK}", "int4_accuracy_level=4"]
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(text), "-o", str(folder)]
    command = [*builder, "-p", "int4", "-e", "cpu", "-c", str(folder / "cache"), "--extra_options", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise DependencyError(f"onnxruntime-genai's builder failed: {done.stdout.strip().splitlines()[-1]}")
    return folder


def write_text_model(checkpoint: Path, folder: Path) -> None:
    """The checkpoint's language model as a text-only Hugging Face folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlavaForConditionalGeneration

    whole = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    text = AutoModelForCausalLM.from_config(whole.config.text_config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    text.model.load_state_dict(whole.model.language_model.state_dict())
    text.lm_head.load_state_dict(whole.lm_head.state_dict())
    text.save_pretrained(folder)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)


def _ids(count: int, vocab: int) -> list[int]:
    ids: list[int] = np.random.default_rng(count).integers(0, vocab, count).tolist()
    return ids


def _values(start: float, first: float, tokens: int) -> dict[str, float]:
    return {
        "prefill_ms": (first - start) * 1e3,
        "decode_tokens_per_s": tokens / (time.perf_counter() - first),
    }


def command(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, such as vlm-demo writes.")],
    work: Annotated[Path, typer.Option(help="Where both models are kept between runs.")] = Path("build/genai"),
    precision: Annotated[str, typer.Option(help="Ours, as for vlm-export.")] = "int4",
    prompt: Annotated[int, typer.Option(min=1, help="Prefilled tokens.")] = 600,
    tokens: Annotated[int, typer.Option(min=1, help="Decoded tokens.")] = 64,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    repeats: Annotated[int, typer.Option(min=1)] = 7,
    idle: Annotated[float, typer.Option(help="Seconds to wait for an idle machine before each repeat.")] = 8.0,
    save: Annotated[bool, typer.Option("--save", help=f"Write the numbers into {report.RESULTS}.")] = False,
) -> None:
    """Prefill and decode of our int4 language model and of onnxruntime-genai's, repeats in turn, ratios of medians."""
    console = Console()
    if not (checkpoint / "config.json").is_file():
        raise InputError(f"{checkpoint} has no config.json: give a checkpoint folder")
    vocab = json.loads((checkpoint / "config.json").read_text("utf-8"))["text_config"]["vocab_size"]
    work.mkdir(parents=True, exist_ok=True)
    with contextlib.redirect_stdout(sys.stderr):
        peer = build_genai(checkpoint, work / "genai-int4")
        ours = build_ours(checkpoint, work / f"ours-{precision}".replace("=", "-").replace(",", "-"), precision)
    makers = {
        "vlm_runtime": ("vlm_bench.genai:make_ours", (str(ours), threads, prompt, tokens)),
        "onnxruntime-genai": ("vlm_bench.genai:make_genai", (str(peer), threads, prompt, tokens, vocab)),
    }
    with workers(makers, threads) as running:
        results = interleave(running, repeats, idle_s=idle, watch=report.status(console))
    columns = {"prefill_ms": f"prefill of {prompt}, ms", "decode_tokens_per_s": "decode tok/s"}
    console.print(report.table(f"int4 language model, {threads} threads; medians", results, columns))
    ratios = {number: ratio(results, "vlm_runtime", "onnxruntime-genai", number) for number in columns}
    console.print(
        f"ours / genai: prefill time {ratios['prefill_ms']:.2f}, decode rate {ratios['decode_tokens_per_s']:.2f}"
    )
    report.warn_if_loud(console, results)
    if save:
        data = report.record("genai", results, ratios=ratios, precision=precision, prompt=prompt, threads=threads)
        console.print(str(report.save(data)))


if __name__ == "__main__":
    from vlm_models.command import run

    app = typer.Typer(add_completion=False)
    app.command(no_args_is_help=True)(command)
    run(app)
