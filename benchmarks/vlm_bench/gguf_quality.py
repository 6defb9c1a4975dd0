"""`python -m vlm_bench.gguf_quality CHECKPOINT`: each GGUF type's KL to the checkpoint, with and without importance.

Held-out pictures with questions and their true answers go through the checkpoint in fp32 and through llama.cpp, and the
distributions of every answer token are compared. The prompts are the same for all types, so that differences are
paired; intervals come from resampling pictures. Importance is measured on several samples of the calibration pairs, a
file each: two files whose errors are equally large differ in KL by a quarter either way, by how the rounding falls.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from vlm_bench import report
from vlm_export.gguf.architecture import architecture, embed_scale
from vlm_export.gguf.file import write_gguf
from vlm_export.gguf.quantize import quantize_gguf
from vlm_export.gguf.tensors import exact_type, tensors
from vlm_export.importance import SAMPLES, Example, Importance, examples, measure
from vlm_export.target import silent
from vlm_models.demo.scenes import write_pairs
from vlm_models.errors import InputError
from vlm_models.model import Model, load_model
from vlm_quant.calibration import Calibration, read_pairs, sample
from vlm_quant.gguf_types import GGUF_TYPES
from vlm_runtime.engines.gguf import GgufDecoder

FORMATS = ("q4_0", "q4_1", "q4_k_s", "q4_k_m", "iq4_nl", "iq4_xs")
WEIGHED = ("no", "text-only", "image-text")
_RESAMPLES = 2000
_LEVEL = 95  # percent


@dataclass(frozen=True)
class Truth:
    """What the checkpoint says: log-probabilities (N, V) of the answer rows of one sequence, and its picture."""

    example: Example
    picture: int
    log_probs: NDArray[np.float32]


@dataclass(frozen=True)
class Quality:
    """Files against the checkpoint: KL (prompts,) summed over `tokens` (prompts,) answer tokens, means over the files.

    `agree`: tokens whose most likely one is the checkpoint's. `files`: the KL per token of each file.
    """

    kl: NDArray[np.float64]
    tokens: NDArray[np.int64]
    agree: float
    bytes: int
    files: tuple[float, ...] = ()

    @property
    def mean(self) -> float:
        """KL per answer token, nats."""
        return float(self.kl.sum() / self.tokens.sum())


def held_out(model: Model, pairs: Calibration) -> list[Truth]:
    """The checkpoint's own distributions, in fp32."""
    pictures = sorted({pair.image for pair in pairs.pairs})
    order = sorted(pairs.pairs, key=lambda pair: pair.image)  # as `examples` gives them
    language, last, truths = model.language_model(), torch.empty(0, 0), []
    for pair, example in zip(order, examples(model, pairs), strict=True):
        common = shared(last, example)
        language.rewind(common)
        logits = language.forward(example.embeds[common:], last_row=False)[example.first_read - common : -1]
        log_probs: NDArray[np.float32] = logits.log_softmax(-1).numpy()
        truths.append(Truth(example, pictures.index(pair.image), log_probs))
        last = example.embeds
    return truths


def shared(last: torch.Tensor, example: Example) -> int:
    """How many first rows of the sequence the KV cache holds from the one before: a picture has many questions."""
    rows = min(len(last), example.first_read)
    same = (last[:rows] == example.embeds[:rows]).all(-1) if rows else torch.ones(0, dtype=torch.bool)
    return int(same.cumprod(0).sum())


def compared(decoder: GgufDecoder, truths: Sequence[Truth], size: int) -> Quality:
    """Run every held-out sequence through the file."""
    kl, agree, last = [], 0, torch.empty(0, 0)
    decoder.rewind(0)
    for truth in truths:
        rows, first = truth.example.embeds, truth.example.first_read
        decoder.rewind(shared(last, truth.example))
        got = [decoder.prefill(rows[decoder.position : first + 1].numpy()).copy()]
        got += [decoder.decode(row.numpy()).copy() for row in rows[first + 1 : -1]]
        log_probs = torch.from_numpy(np.stack(got)).double().log_softmax(-1).numpy()
        wanted = truth.log_probs.astype(np.float64)
        kl.append(float((np.exp(wanted) * (wanted - log_probs)).sum()))
        agree += int((wanted.argmax(-1) == log_probs.argmax(-1)).sum())
        last = rows
    return Quality(np.array(kl), np.array([len(t.log_probs) for t in truths]), agree, size)


def together(draws: Sequence[Quality]) -> Quality:
    """One Quality for files that differ only in the sample that importance was measured on."""
    kl, agree = np.mean([draw.kl for draw in draws], 0), float(np.mean([draw.agree for draw in draws]))
    return Quality(kl, draws[0].tokens, agree, draws[0].bytes, tuple(draw.mean for draw in draws))


def intervals(quality: Quality, base: Quality, pictures: NDArray[np.int64]) -> dict[str, list[float]]:
    """Bootstrap intervals of the mean KL, and of its ratio to `base`, over pictures; prompts are the same in both."""
    groups = [np.flatnonzero(pictures == picture) for picture in np.unique(pictures)]
    sums = np.array([[q[g].sum() for q in (quality.kl, base.kl, quality.tokens)] for g in groups])
    drawn = np.random.default_rng(0).integers(0, len(groups), (_RESAMPLES, len(groups)))
    ours, theirs, tokens = sums[drawn].sum(1).T
    ends = ((100 - _LEVEL) / 2, (100 + _LEVEL) / 2)
    return {
        "kl_interval": [float(v) for v in np.percentile(ours / tokens, ends)],
        "ratio_interval": [float(v) for v in np.percentile(ours / theirs, ends)],
    }


def variants(
    model: Model,
    importances: Mapping[str, Sequence[Importance | None]],
    formats: Sequence[str],
    truths: Sequence[Truth],
    work: Path,
) -> Iterator[tuple[str, str, Quality]]:
    """Each type, weighed in each way: made, measured, removed."""
    language, exact, out = model.spec.language, work / "exact.gguf", work / "quantized.gguf"
    weights = tensors(model.checkpoint, model.spec)
    context = max(len(truth.example.embeds) for truth in truths)
    arch, kind = architecture(language, context), GGUF_TYPES[exact_type(weights)]
    write_gguf(exact, arch, {}, weights, kind, {"tokenizer.ggml.model": "none"}, progress=silent)
    for name in formats:
        for weighed, matters in importances.items():
            draws = []
            for matter in matters:
                kind = GGUF_TYPES[name]
                quantize_gguf(exact, out, kind, matter, language, threads=os.cpu_count() or 1, progress=silent)
                decoder = GgufDecoder(
                    out,
                    hidden_size=language.hidden_size,
                    vocab_size=language.vocab_size,
                    max_context=context,
                    kv_cache="f32",
                    flash_attention=False,
                    embed_scale=embed_scale(language),
                )
                draws.append(compared(decoder, truths, out.stat().st_size))
                del decoder
                out.unlink()
            yield name, weighed, together(draws)


def rows(found: Mapping[tuple[str, str], Quality], pictures: NDArray[np.int64]) -> list[dict[str, Any]]:
    """The table as plain values; ratios are to the same type without importance."""
    table = []
    for (name, weighed), quality in found.items():
        base = found[name, WEIGHED[0]]
        row: dict[str, Any] = {"format": name, "importance": weighed, "kl": quality.mean, "kl_of_files": quality.files}
        row |= {"ratio": quality.mean / base.mean, **intervals(quality, base, pictures)}
        if (text := found.get((name, WEIGHED[1]))) is not None and weighed == WEIGHED[2]:
            row["ratio_to_text"] = quality.mean / text.mean
            row["ratio_to_text_interval"] = intervals(quality, text, pictures)["ratio_interval"]
        row |= {"agree": quality.agree / int(quality.tokens.sum()), "megabytes": quality.bytes / 1e6}
        table.append(row)
    return table


def shown(table: Sequence[Mapping[str, Any]], prompts: int, tokens: int) -> Table:
    out = Table(title=f"KL to the checkpoint in fp32, {prompts} held-out prompts, {tokens} answer tokens")
    for i, heading in enumerate(("type", "importance", "KL, nats", f"{_LEVEL} %", "to none", f"{_LEVEL} %", "to text",
                                 f"{_LEVEL} %", "same token", "MB")):  # fmt: skip
        out.add_column(heading, justify="left" if i < 2 else "right")
    for row in table:
        text = (
            [f"{row['ratio_to_text']:.2f}", _span(row["ratio_to_text_interval"], 2)]
            if "ratio_to_text" in row
            else ["", ""]
        )
        own = [f"{row['kl']:.4f}", _span(row["kl_interval"], 4), f"{row['ratio']:.2f}", _span(row["ratio_interval"], 2)]
        out.add_row(row["format"], row["importance"], *own, *text, f"{row['agree']:.1%}", f"{row['megabytes']:.0f}")
    return out


def _span(ends: Sequence[float], digits: int) -> str:
    return f"{ends[0]:.{digits}f}–{ends[1]:.{digits}f}"


def command(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, such as vlm-demo writes.")],
    pictures: Annotated[int, typer.Option(min=2, help="Held-out demo pictures, six or seven questions each.")] = 40,
    held: Annotated[Path | None, typer.Option("--held-out", help="Own held-out pairs instead of the demo's.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="Pairs; by default CHECKPOINT/calibration.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="How many of them are taken.")] = SAMPLES,
    draws: Annotated[int, typer.Option(min=1, help="How many such samples, a file each.")] = 3,
    formats: Annotated[str, typer.Option(help="GGUF types, separated by commas.")] = ",".join(FORMATS),
    save: Annotated[bool, typer.Option("--save", help=f"Write the numbers into {report.RESULTS}.")] = False,
) -> None:
    """Every 4-bit type without importance, with that of the calibration texts alone, and with pictures."""
    console, chosen = Console(), [name.strip() for name in formats.split(",")]
    if unknown := [name for name in chosen if name not in GGUF_TYPES]:
        raise InputError(f"unknown GGUF type {unknown[0]!r}: choose of {', '.join(GGUF_TYPES)}")
    model = load_model(checkpoint)
    pairs = read_pairs(calibration or checkpoint / "calibration")
    with tempfile.TemporaryDirectory(prefix="gguf-quality-") as folder:
        work = Path(folder)
        truths = held_out(model, read_pairs(held or write_pairs(work / "held-out", pictures)))
        importances: dict[str, list[Importance | None]] = {WEIGHED[0]: [None], WEIGHED[1]: [], WEIGHED[2]: []}
        for seed in range(draws):
            drawn = sample(pairs, samples, seed)
            importances[WEIGHED[1]].append(measure(model, examples(model, drawn, pictures=False)))
            importances[WEIGHED[2]].append(measure(model, examples(model, drawn)))
        groups, found = np.array([truth.picture for truth in truths]), dict[tuple[str, str], Quality]()
        tokens = sum(len(truth.log_probs) for truth in truths)
        for name, weighed, quality in variants(model, importances, chosen, truths, work):
            found[name, weighed] = quality
            console.print(f"[dim]{name}, {weighed} importance: KL {quality.mean:.5f}[/dim]")
            if save:  # what there is so far
                facts: dict[str, Any] = {
                    "prompts": len(truths),
                    "pictures": len(set(groups.tolist())),
                    "answer_tokens": tokens,
                }
                facts |= {
                    "calibration_pairs": min(samples, len(pairs.pairs)),
                    "draws": draws,
                    "calibration_sha256": pairs.sha256,
                }
                report.save(report.record("gguf-quality", **facts, table=rows(found, groups)))
    console.print(shown(rows(found, groups), len(truths), tokens))


if __name__ == "__main__":
    from vlm_models.command import run

    app = typer.Typer(add_completion=False)
    app.command(no_args_is_help=True)(command)
    run(app)
