"""Exact greedy answers of a checkpoint on held-out pictures: `python -m vlm_models.demo.accuracy CHECKPOINT`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoProcessor, LlavaForConditionalGeneration

from vlm_models.demo.scenes import QUESTION_KINDS, make_scene, questions

EXTRA = "describe"  # reported, but not part of the mean: it is a whole sentence
LONGEST = {EXTRA: 60}  # tokens; every other answer has at most three
Scores = dict[str, tuple[float, int]]  # question kind -> (share of exact answers, questions)


def measure(checkpoint: Path, pictures: int, shuffle: bool = False, batch: int = 32) -> Scores:
    """Exact match by question kind on the first `pictures` test scenes, by transformers' generate() in fp32.

    With `shuffle` every question is asked about the picture of the next scene: what remains is chance.
    """
    llava: Any = LlavaForConditionalGeneration
    auto: Any = AutoProcessor
    model = llava.from_pretrained(checkpoint, dtype=torch.float32).eval()
    processor = auto.from_pretrained(checkpoint, backend="pil")
    asked: dict[str, list[tuple[Image.Image, str, str]]] = {kind: [] for kind in QUESTION_KINDS}
    for seed in range(pictures):
        picture, objects = make_scene(seed, "test")
        if shuffle:
            picture, _ = make_scene((seed + 1) % pictures, "test")
        for kind, question, answer in questions(objects, seed):
            asked[kind].append((picture, question, answer))
    jobs = [(kind, group) for kind, items in asked.items() for group in _groups(items, batch)]
    hits = dict.fromkeys(asked, 0)
    for kind, group in track(jobs, "asking", console=Console(stderr=True)):
        said = answers(model, processor, [item[:2] for item in group], LONGEST.get(kind, 6))
        hits[kind] += sum(text == item[2] for text, item in zip(said, group, strict=True))
    return {kind: (hits[kind] / len(items), len(items)) for kind, items in asked.items() if items}


def answers(model: Any, processor: Any, asked: list[tuple[Image.Image, str]], longest: int) -> list[str]:
    """Greedy answers to (picture, question) pairs, asked in one left-padded batch through the chat template."""
    prompts = []
    for _, question in asked:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        message = {"role": "user", "content": content}
        prompts.append(processor.apply_chat_template([message], add_generation_prompt=True))
    pictures = [picture for picture, _ in asked]
    inputs = processor(images=pictures, text=prompts, padding=True, padding_side="left", return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=longest, do_sample=False)
    texts: list[str] = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def mean(scores: Scores) -> float:
    """Mean over the question kinds, each counting the same."""
    shares = [share for kind, (share, _) in scores.items() if kind != EXTRA]
    return sum(shares) / len(shares)


def _groups(items: list[tuple[Image.Image, str, str]], size: int) -> Iterator[list[tuple[Image.Image, str, str]]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]


def command(
    checkpoint: Annotated[Path, typer.Argument(help="A folder written by vlm-demo.")],
    pictures: Annotated[int, typer.Option(help="How many held-out pictures.")] = 1000,
    shuffle: Annotated[bool, typer.Option("--shuffle", help="Ask about the wrong picture: measures chance.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Share of exact greedy answers, by question kind."""
    scores = measure(checkpoint, pictures, shuffle)
    if as_json:
        rows = {kind: {"accuracy": round(share, 4), "questions": n} for kind, (share, n) in scores.items()}
        report = {"pictures": pictures, "shuffled": shuffle, "mean": round(mean(scores), 4), "kinds": rows}
        typer.echo(json.dumps(report))
        return
    table = Table("question", "exact answers", "of")
    for kind, (share, n) in scores.items():
        table.add_row(kind, f"{share:.1%}", str(n))
    table.add_row(f"mean without {EXTRA}", f"{mean(scores):.1%}", "")
    Console().print(table)


if __name__ == "__main__":
    typer.run(command)
