"""`python -m vlm_bench.accuracy BUNDLE`: exact greedy answers of a bundle of the demo checkpoint."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

import vlm_runtime
from vlm_models.command import run
from vlm_models.demo.scenes import make_scene, questions

EXTRA = "describe"  # a whole sentence: not part of the demo's mean either
LONGEST = 12  # tokens; the answers have at most three


def accuracy(bundle: Path, pictures: int) -> dict[str, float]:
    """Share of exact answers by question kind on the first `pictures` test scenes."""
    model, right, asked = vlm_runtime.load(bundle), Counter[str](), Counter[str]()
    for seed in track(range(pictures), "asking", console=Console(stderr=True), transient=True):
        picture, objects = make_scene(seed, "test")
        for kind, question, answer in questions(objects, seed):
            if kind != EXTRA:
                asked[kind] += 1
                right[kind] += model.answer(question, [picture], max_new_tokens=LONGEST).text.strip() == answer
    return {kind: right[kind] / asked[kind] for kind in asked}


def command(
    bundle: Annotated[Path, typer.Argument(help="A bundle of the demo checkpoint.")],
    pictures: Annotated[int, typer.Option(min=1, help="Held-out pictures, about five questions each.")] = 100,
) -> None:
    """Print one JSON object: the share of exact answers by question kind, and their mean."""
    kinds = accuracy(bundle, pictures)
    mean = sum(kinds.values()) / len(kinds)
    typer.echo(json.dumps({"pictures": pictures, "mean": round(mean, 4), "kinds": kinds}))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command(no_args_is_help=True)(command)
    run(app)
