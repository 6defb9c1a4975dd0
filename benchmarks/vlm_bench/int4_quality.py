"""`python -m vlm_bench.int4_quality CHECKPOINT`: bits, algorithms and calibration sets on the same questions.

Held-out demo pictures with questions and their true answers go through the checkpoint in fp32 and through simulated
bundles (`vlm_export.simulate`: weights on their grids, products' inputs in int8 as ONNX Runtime rounds them). The same
pairs, seeds and bits for all, so that differences are paired; intervals come from resampling pictures. KL counts answer
tokens, and, on some of the pictures, every word after the picture, which is harder to guess. Perplexity is that of the
language model on the licence and the documentation that Python brings along.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from vlm_bench import report
from vlm_export.decide import decide_on
from vlm_export.importance import examples
from vlm_export.quality import HeldOut, Quality, ask, compared, held_out, joined
from vlm_export.reference import looked_up
from vlm_export.simulate import simulate
from vlm_models.demo.accuracy import EXTRA
from vlm_models.demo.scenes import make_scene, questions
from vlm_models.model import Model, load_model
from vlm_models.processor import tokenizer_json
from vlm_quant.calibration import Calibration, Pair, read_pairs, sample
from vlm_quant.recipe import parse_recipe

ALGORITHMS = ("awq", "gptq", "awq+gptq")
SETS = ("text-only", "image-text")
_CHUNK = 25  # pictures asked at once: their logits must fit in memory
_WINDOW = 512  # tokens that perplexity is taken over
_WINDOWS = 4


@dataclass(frozen=True)
class Variant:
    """A recipe of the language model, and how its weights are rounded on which pairs ("" for round-to-nearest)."""

    recipe: str
    algorithm: str = "rtn"
    pairs: str = ""


@dataclass(frozen=True)
class Measured:
    """One variant: answers, all words after the picture, perplexity."""

    answers: Quality
    words: Quality
    perplexity: float


def variants(groups: Sequence[int]) -> list[Variant]:
    """The baseline of each group size comes first."""
    out = [Variant("language=fp16"), Variant("language=int8")]
    for group in groups:
        out.append(Variant(f"language=int4:g{group}"))
        out += [Variant(f"language=int4:g{group}", name, pairs) for name in ALGORITHMS for pairs in SETS]
    return out


def asked(folder: Path, pictures: int, first: int = 0) -> Calibration:
    """Test scenes with their short questions."""
    pairs = []
    for seed in range(first, first + pictures):
        picture, objects = make_scene(seed, "test")
        path = folder / f"{seed:05d}.png"
        picture.save(path)
        pairs += [Pair(path, question, answer) for kind, question, answer in questions(objects, seed) if kind != EXTRA]
    return Calibration(tuple(pairs))


def texts(model: Model) -> list[list[int]]:
    """Windows of token ids from Python's licence and language reference, in equal numbers."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_json(model.checkpoint))
    licence = Path(os.__file__).parent / "LICENSE.txt"
    documents = [licence.read_text("utf-8")] if licence.is_file() else []
    documents.append("\n".join(text for _, text in sorted(topics.topics.items())))
    windows = []
    for text in documents:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        count = min(_WINDOWS // len(documents), len(ids) // _WINDOW)
        windows += [ids[i * _WINDOW : (i + 1) * _WINDOW] for i in range(count)]
    return windows


@torch.inference_mode()
def perplexity(model: Model, windows: Sequence[Sequence[int]]) -> float:
    """exp of the mean loss of the second half of each window's tokens."""
    language, losses = model.language_model(), []
    for ids in windows:
        language.rewind(0)
        logits = language.forward(looked_up(model, ids[:-1]), last_row=False)[len(ids) // 2 :]
        targets = torch.tensor(ids[len(ids) // 2 + 1 :])
        losses.append(float(torch.nn.functional.cross_entropy(logits.double(), targets)))
    return float(np.exp(np.mean(losses)))


def measure(
    model: Model, chosen: Sequence[Variant], drawn: Calibration, answers: Sequence[HeldOut], words: HeldOut
) -> Iterator[tuple[Variant, Measured]]:
    """Each variant, decided and asked."""
    windows = texts(model)
    for variant in chosen:
        recipe = parse_recipe(f"{variant.recipe},vision=fp32,projector=fp32")
        with tempfile.TemporaryDirectory(prefix="int4-quality-") as folder:
            decided = model
            if variant.pairs:
                shown = examples(model, drawn, pictures=variant.pairs == SETS[1])
                algorithm, path = variant.algorithm, Path(folder)
                decided, _ = decide_on(model, recipe, shown, algorithm, symmetric=False, folder=path)
            tried = simulate(decided, recipe)
            quality = joined([ask(tried, held, 0) for held in answers])
            yield variant, Measured(quality, ask(tried, words, 0), perplexity(tried, windows))


def rows(found: Mapping[Variant, Measured]) -> list[dict[str, Any]]:
    """The table as plain values. Ratios are paired: to round-to-nearest, and to the same algorithm on text alone."""
    table = []
    for variant, measured in found.items():
        row: dict[str, Any] = {"recipe": variant.recipe, "algorithm": variant.algorithm, "pairs": variant.pairs}
        row |= {"answers": measured.answers.numbers(), "words": measured.words.numbers()}
        row["perplexity"] = measured.perplexity
        bases = {"rtn": found.get(Variant(variant.recipe))}
        if variant.pairs == SETS[1]:
            bases["text-only"] = found.get(Variant(variant.recipe, variant.algorithm, SETS[0]))
        for name, base in bases.items():
            if base is not None and base is not measured:
                pairs = (("answers", measured.answers, base.answers), ("words", measured.words, base.words))
                row[f"to {name}"] = {
                    what: {"kl_ratio": ours.mean_kl / theirs.mean_kl, **compared(ours, theirs)}
                    for what, ours, theirs in pairs
                }
        table.append(row)
    return table


def shown(table: Sequence[Mapping[str, Any]], title: str) -> Table:
    out = Table(title=title)
    headings = ("recipe", "algorithm", "pairs", "KL answers", "95 %", "to rtn", "KL words", "to rtn", "to text",
                "exact", "perplexity")  # fmt: skip
    for i, heading in enumerate(headings):
        out.add_column(heading, justify="left" if i < 3 else "right")
    for row in table:
        answers, words = row["answers"], row["words"]
        cells = [f"{answers['kl']:.5f}", "{:.5f}–{:.5f}".format(*answers["kl_interval"]), _ratio(row, "rtn", "answers")]
        cells += [f"{words['kl']:.4f}", _ratio(row, "rtn", "words"), _ratio(row, "text-only", "words")]
        cells += [f"{answers['accuracy']:.1%}", f"{row['perplexity']:.2f}"]
        out.add_row(row["recipe"].removeprefix("language="), row["algorithm"], row["pairs"], *cells)
    return out


def _ratio(row: Mapping[str, Any], base: str, what: str) -> str:
    if f"to {base}" not in row:
        return ""
    numbers = row[f"to {base}"][what]
    return f"{numbers['kl_ratio']:.2f} ({numbers['kl_ratio_interval'][0]:.2f}–{numbers['kl_ratio_interval'][1]:.2f})"


def command(
    checkpoint: Annotated[Path, typer.Argument(help="The demo checkpoint, as vlm-demo writes it.")],
    pictures: Annotated[int, typer.Option(min=2, help="Held-out pictures, five or six questions each.")] = 180,
    samples: Annotated[int, typer.Option(min=1, help="Calibration pairs.")] = 128,
    seed: Annotated[int, typer.Option(help="Which of them.")] = 0,
    groups: Annotated[str, typer.Option(help="Group sizes of int4, separated by commas.")] = "32,128",
    words: Annotated[
        int, typer.Option(min=2, help="Pictures of which every word is compared, not answers alone.")
    ] = 25,
    save: Annotated[bool, typer.Option("--save", help=f"Write the numbers into {report.RESULTS}.")] = False,
) -> None:
    """fp16, int8 and int4; round-to-nearest, AWQ and GPTQ; calibrated on texts alone and on pictures with texts."""
    console, model = Console(), load_model(checkpoint)
    drawn = sample(read_pairs(checkpoint / "calibration"), samples, seed)
    with tempfile.TemporaryDirectory(prefix="int4-quality-") as folder:
        spans = [(first, min(_CHUNK, pictures - first)) for first in range(0, pictures, _CHUNK)]
        answers = [held_out(model, asked(Path(folder), count, first)) for first, count in spans]
        said = held_out(model, asked(Path(folder), words), prompts=True)
    asked_count = sum(len(held.questions) for held in answers)
    facts: dict[str, Any] = {"questions": asked_count, "pictures": pictures, "word_pictures": words}
    facts |= {"samples": len(drawn.pairs), "seed": seed, "calibration_sha256": drawn.sha256}
    found: dict[Variant, Measured] = {}
    sizes = [int(group) for group in groups.split(",")]
    for variant, measured in measure(model, variants(sizes), drawn, answers, said):
        found[variant] = measured
        console.print(f"[dim]{variant}: {measured.answers.mean_kl:.5f} {measured.words.mean_kl:.4f}[/dim]")
        if save:  # what there is so far
            report.save(report.record("int4-quality", **facts, table=rows(found)))
    console.print(shown(rows(found), f"{asked_count} held-out questions about {pictures} pictures, KL in nats a token"))


if __name__ == "__main__":
    from vlm_models.command import run

    app = typer.Typer(add_completion=False)
    app.command(no_args_is_help=True)(command)
    run(app)
