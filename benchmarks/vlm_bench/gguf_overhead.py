"""`python -m vlm_bench.gguf_overhead BUNDLE`: our engine "gguf" beside plain llama.cpp calls on the same file."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console

from vlm_bench import report
from vlm_bench.measure import Rep, interleave, ratio
from vlm_bench.worker import workers
from vlm_models.errors import InputError
from vlm_runtime import llama
from vlm_runtime.bundle import open_bundle
from vlm_runtime.embedding import EmbeddingTable
from vlm_runtime.engine import KVCache, Options
from vlm_runtime.engines import gguf


def make_ours(folder: str, threads: int, prompt: int, tokens: int, kv_cache: KVCache | None) -> Rep:
    """Prefill of `prompt` looked-up rows and greedy decoding, embedding lookup and argmax included."""
    bundle = open_bundle(folder, verify=False)
    options = Options(threads=threads, max_context=prompt + tokens, kv_cache=kv_cache)
    decoder, table = gguf.decoder(bundle, options), EmbeddingTable(bundle)
    if decoder.max_context < prompt + tokens:
        raise InputError(f"{prompt} + {tokens} tokens do not fit the bundle's context of {decoder.max_context}")
    ids = _ids(prompt, table.rows_count)

    def rep(number: int) -> Mapping[str, float]:
        decoder.rewind(0)
        row = np.empty(table.columns, np.float32)
        start = time.perf_counter()
        token = int(decoder.prefill(table.rows(ids)).argmax())
        first = time.perf_counter()
        for _ in range(tokens):
            table.row_into(token, row)
            token = int(decoder.decode(row).argmax())
        return _values(start, first, tokens)

    return rep


def make_plain(folder: str, threads: int, prompt: int, tokens: int, kv_cache: KVCache | None) -> Rep:
    """The same file and settings by llama.cpp's calls alone: token ids in a batch, its own embedding table."""
    bundle, lib = open_bundle(folder, verify=False), llama.library()
    part = bundle.part("language_model", gguf.NAME)
    kv_type, flash = gguf.attention_choice(part.precision, Options(kv_cache=kv_cache))
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = prompt + tokens, prompt, Options().prefill_chunk
    params.n_threads = params.n_threads_batch = threads
    params.type_k = params.type_v = gguf.GGML_TYPES[kv_type]
    params.flash_attn_type = -1 if flash is None else int(flash)
    context = lib.llama_init_from_model(llama.load_model(bundle.path(part.graph)), params)
    if not context:
        raise InputError(f"llama.cpp cannot make the context ({llama.last_error()})")
    vocab = bundle.spec.language.vocab_size
    memory, batch = lib.llama_get_memory(context), lib.llama_batch_init(prompt, 0, 1)
    ids = _ids(prompt, vocab)

    def step(tokens: list[int], position: int) -> int:
        """Append `tokens`; the best next one."""
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position + i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, i + 1 == len(tokens)
        if lib.llama_decode(context, batch):
            raise InputError(f"llama.cpp could not decode ({llama.last_error()})")
        logits = np.ctypeslib.as_array(lib.llama_get_logits_ith(context, -1), (vocab,))
        return int(logits.argmax())

    def rep(number: int) -> Mapping[str, float]:
        lib.llama_memory_seq_rm(memory, 0, 0, -1)
        start = time.perf_counter()
        token = step(ids, 0)
        first = time.perf_counter()
        for i in range(tokens):
            token = step([token], prompt + i)
        return _values(start, first, tokens)

    return rep


def _ids(count: int, vocab: int) -> list[int]:
    ids: list[int] = np.random.default_rng(count).integers(0, vocab, count).tolist()
    return ids


def _values(start: float, first: float, tokens: int) -> dict[str, float]:
    return {"prefill_ms": (first - start) * 1e3, "decode_tokens_per_s": tokens / (time.perf_counter() - first)}


def command(
    bundle: Annotated[Path, typer.Argument(help="A bundle folder of target gguf.")],
    prompt: Annotated[int, typer.Option(min=1, help="Prefilled tokens.")] = 512,
    tokens: Annotated[int, typer.Option(min=1, help="Decoded tokens.")] = 64,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    kv_cache: Annotated[str | None, typer.Option(help="f32, f16 or q8_0 for both; else the engine's choice.")] = None,
    repeats: Annotated[int, typer.Option(min=1)] = 9,
    idle: Annotated[float, typer.Option(help="Seconds to wait for an idle machine before each repeat.")] = 8.0,
    save: Annotated[bool, typer.Option("--save", help=f"Write the numbers into {report.RESULTS}.")] = False,
) -> None:
    """Prefill and decode by our engine and by plain llama.cpp calls on one file, repeats in turn, ratios of medians."""
    console = Console()
    opened = open_bundle(bundle, verify=False)
    precision = opened.part("language_model", gguf.NAME).precision
    Options(kv_cache=kv_cache)  # type: ignore[arg-type]
    arguments = (str(bundle), threads, prompt, tokens, kv_cache)
    makers = {
        "vlm_runtime": ("vlm_bench.gguf_overhead:make_ours", arguments),
        "llama.cpp": ("vlm_bench.gguf_overhead:make_plain", arguments),
    }
    with workers(makers, threads) as running:
        results = interleave(running, repeats, idle_s=idle, watch=report.status(console))
    columns = {"prefill_ms": f"prefill of {prompt}, ms", "decode_tokens_per_s": "decode tok/s"}
    console.print(report.table(f"{precision} language model, {threads} threads; medians", results, columns))
    ratios = {number: ratio(results, "vlm_runtime", "llama.cpp", number) for number in columns}
    console.print(
        f"ours / llama.cpp: prefill time {ratios['prefill_ms']:.3f}, decode rate {ratios['decode_tokens_per_s']:.3f}"
    )
    report.warn_if_loud(console, results)
    if save:
        data = report.record(
            "gguf-overhead",
            results,
            ratios=ratios,
            precision=precision,
            kv_cache=kv_cache,
            prompt=prompt,
            tokens=tokens,
            threads=threads,
        )
        console.print(str(report.save(data)))


if __name__ == "__main__":
    from vlm_models.command import run

    app = typer.Typer(add_completion=False)
    app.command(no_args_is_help=True)(command)
    run(app)
