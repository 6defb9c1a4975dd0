"""`python -m vlm_bench.gptq_peer CHECKPOINT --peer-python PYTHON`: our AWQ and GPTQ beside llm-compressor's GPTQ.

The same weights, bits, group size and calibration rows (pictures and conversations, as embeddings); the head stays as
it is in all. Then the same held-out questions: KL of every answer token to the checkpoint in float32. The peer runs in
an environment of its own, to which PYTHON belongs (pip install llmcompressor).
"""

from __future__ import annotations

import dataclasses
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file, save_file

from vlm_bench import report
from vlm_bench.genai import write_text_model
from vlm_export.algorithms import SAMPLES
from vlm_export.decide import decide
from vlm_export.importance import examples
from vlm_export.quality import Quality, ask, compared, held_out
from vlm_export.simulate import simulate
from vlm_models.checkpoint import Stored
from vlm_models.demo.scenes import write_pairs
from vlm_models.errors import DependencyError, InputError
from vlm_models.model import Model, load_model
from vlm_quant.calibration import Calibration, read_pairs, sample
from vlm_quant.recipe import GROUP_SIZES, Recipe, parse_recipe

_PROGRAM = Path(__file__).parent / "peers" / "llmcompressor_gptq.py"
PEER = "llm-compressor gptq"
OURS = ("rtn", "awq", "gptq", "awq+gptq")


def run_peer(
    python: Path, checkpoint: Path, model: Model, pairs: Calibration, group: int, symmetric: bool, work: Path
) -> Model:
    """The checkpoint with the weights that the peer rounded. Raises DependencyError with its last words."""
    text, rows, out = work / "text-model", work / "calibration.safetensors", work / "peer.safetensors"
    if not text.exists():
        write_text_model(checkpoint, text)
        shown = examples(model, pairs)
        save_file({f"{i:04d}": example.embeds.numpy() for i, example in enumerate(shown)}, rows)
    grid = "symmetric" if symmetric else "asymmetric"
    command = [str(python), str(_PROGRAM), str(text), str(rows), "4", str(group), grid, str(out)]
    done = subprocess.run(command, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise DependencyError(f"the peer failed: {(done.stdout.strip().splitlines() or ['without a word'])[-1][:300]}")
    tensors = {
        name.replace("model.", "language_model.", 1): Stored("F32", weight) for name, weight in load_file(out).items()
    }
    changed = dataclasses.replace(model.checkpoint, tensors={**model.checkpoint.tensors, **tensors})
    return Model(changed, model.spec)


def ours(
    model: Model, recipe: Recipe, pairs: Calibration, symmetric: bool, algorithms: Sequence[str]
) -> Iterator[tuple[str, Model]]:
    """Our algorithms, each on the same pairs. Symmetric round-to-nearest is not simulated, and left out."""
    for algorithm in algorithms:
        if algorithm in ("rtn", "awq") and symmetric:
            continue
        with tempfile.TemporaryDirectory(prefix="gptq-peer-") as folder:
            count = len(pairs.pairs)
            decided = decide(
                model, recipe, pairs, algorithm, symmetric=symmetric, folder=Path(folder), samples=count, seed=0
            )
            yield f"ours {algorithm}", simulate(decided.model, recipe, activations=False)


def shown(table: Sequence[dict[str, Any]], title: str) -> Table:
    out = Table(title=title)
    for i, heading in enumerate(("", "grid", "KL, nats", "95 %", "to the peer", "95 %", "same token", "exact")):
        out.add_column(heading, justify="left" if i < 2 else "right")
    for row in table:
        spans = ["–".join(f"{end:.{n}f}" for end in row[key]) for key, n in (("kl_interval", 5), ("ratio_interval", 2))]
        own = [f"{row['kl']:.5f}", spans[0], f"{row['ratio']:.2f}", spans[1]]
        out.add_row(row["who"], row["grid"], *own, f"{row['top1']:.2%}", f"{row['accuracy']:.2%}")
    return out


def command(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, such as vlm-demo writes.")],
    peer_python: Annotated[Path, typer.Option(help="Python of an environment with llmcompressor.")],
    pictures: Annotated[int, typer.Option(min=2, help="Held-out demo pictures, six or seven questions each.")] = 40,
    held: Annotated[Path | None, typer.Option("--held-out", help="Own held-out pairs instead of the demo's.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration pairs.")] = SAMPLES,
    group_size: Annotated[int, typer.Option(help="Columns that share a scale.")] = 32,
    algorithms: Annotated[str, typer.Option(help="Ours, separated by spaces.")] = " ".join(OURS),
    save: Annotated[bool, typer.Option("--save", help=f"Write the numbers into {report.RESULTS}.")] = False,
) -> None:
    """KL of int4 language models to the checkpoint: ours and llm-compressor's, of the same bits and group size."""
    console = Console()
    if group_size not in GROUP_SIZES:
        raise InputError(f"group size {group_size} cannot be: choose one of {', '.join(map(str, GROUP_SIZES))}")
    if not peer_python.is_file():
        raise InputError(f"no such program: {peer_python}; give the python of an environment with llmcompressor")
    model = load_model(checkpoint)
    pairs = sample(read_pairs(checkpoint / "calibration"), samples, 0)
    whole = "vision=fp32,projector=fp32"
    recipe = parse_recipe(f"{whole},language=int4:g{group_size};lm_head=fp32")
    table: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="gptq-peer-") as folder:
        work = Path(folder).resolve()
        truth = held_out(model, read_pairs(held or write_pairs(work / "held-out", pictures)))
        for symmetric in (False, True):
            peer = run_peer(peer_python.absolute(), checkpoint, model, pairs, group_size, symmetric, work)
            found: dict[str, Quality] = {PEER: ask(peer, truth)}
            for who, variant in ours(model, recipe, pairs, symmetric, algorithms.split()):
                found[who] = ask(variant, truth)
                console.print(f"[dim]{who}: KL {found[who].mean_kl:.5f}[/dim]")
            grid = "symmetric" if symmetric else "zero points"
            for who, quality in found.items():
                ratio = quality.mean_kl / found[PEER].mean_kl
                ends = compared(quality, found[PEER])["kl_ratio_interval"]
                table.append({"who": who, "grid": grid, **quality.numbers(), "ratio": ratio, "ratio_interval": ends})
    prompts = len(truth.questions)
    console.print(shown(table, f"int4 in groups of {group_size}: KL to the checkpoint, {prompts} held-out questions"))
    if save:
        facts: dict[str, Any] = {"group_size": group_size, "calibration_pairs": len(pairs.pairs), "questions": prompts}
        console.print(str(report.save(report.record("gptq-peer", **facts, table=table))))


if __name__ == "__main__":
    from vlm_models.command import run

    app = typer.Typer(add_completion=False)
    app.command(no_args_is_help=True)(command)
    run(app)
