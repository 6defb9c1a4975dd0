"""`python -m vlm_bench.int8_speed CHECKPOINT`: what int8 gains over fp32 in ONNX Runtime, and what it costs.

Prompt and decode times of the language model, times of another checkpoint's vision encoder where one is given, each
precision in a process of its own, in turn. Quality is measured on held-out demo pictures: KL of the answer tokens after
one picture, and after a prompt that is filled up with other pictures and their questions to the length that was timed;
cosine of projected rows, picture by picture.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console

from vlm_bench import report
from vlm_bench.accuracy import accuracy
from vlm_bench.first_token import earlier, first_token, kept
from vlm_bench.gguf_quality import Truth, compared, held_out, intervals
from vlm_bench.measure import Rep, interleave, ratio
from vlm_bench.worker import workers
from vlm_models.errors import InputError
from vlm_runtime.bundle import Bundle
from vlm_runtime.engine import Options, find_engine
from vlm_runtime.manifest import Manifest, Table

LANGUAGE = {
    "fp32": "fp32",
    "fp16": "fp16",
    "int8": "int8",
    "int8 smoothed": "int8",
    "int8 auto": "int8",
    "int4": "int4",
}
DECIDED = {"int8 smoothed": "smoothquant", "int8 auto": "auto"}  # on the calibration pairs; the others are to nearest
VISION = ("fp32", "fp16", "int8")
TOWER = ("vision_encoder", "projector")
BASES = {
    "prefill_ms": "fp32",
    "prefill_cpu_ms": "fp32",
    "decode_ms": "fp32",
    "vision_ms": "vision fp32",
    "vision_cpu_ms": "vision fp32",
}
ONNX = "onnx"


def make_language(bundle: Bundle, threads: int, rows: NDArray[np.float32], tokens: int) -> Rep:
    """Prefill of `rows` (S, H) as one prompt, then `tokens` rows one by one."""
    decoder = find_engine(ONNX).decoder(bundle, Options(threads=threads, max_context=len(rows) + tokens))

    def rep(number: int) -> Mapping[str, float]:
        decoder.rewind(0)
        times = [(time.perf_counter(), time.process_time())]
        decoder.prefill(rows)
        times.append((time.perf_counter(), time.process_time()))
        for row in rows[:tokens]:
            decoder.decode(row)
        times.append((time.perf_counter(), time.process_time()))
        (prefill, prefill_cpu), (decode, decode_cpu) = np.diff(times, axis=0) * 1e3
        values = {"prefill_ms": prefill, "prefill_cpu_ms": prefill_cpu}
        return values | {"decode_ms": decode / tokens, "decode_cpu_ms": decode_cpu / tokens}

    return rep


def make_vision(bundle: Bundle, threads: int) -> Rep:
    """One picture of noise through the vision encoder and the projector."""
    encoders = [find_engine(ONNX).encoder(bundle, part, Options(threads=threads)) for part in TOWER]
    size = bundle.spec.vision.image_size

    def rep(number: int) -> Mapping[str, float]:
        x = np.random.default_rng(number).standard_normal((1, 3, size, size), np.float32)
        times = [(time.perf_counter(), time.process_time())]
        for encoder in encoders:
            x = encoder.run(x)
            times.append((time.perf_counter(), time.process_time()))
        (vision, vision_cpu), (projector, projector_cpu) = np.diff(times, axis=0) * 1e3
        values = {"vision_ms": vision, "vision_cpu_ms": vision_cpu}
        return values | {"projector_ms": projector, "projector_cpu_ms": projector_cpu}

    return rep


def built(model: Any, precision: str, parts: Collection[str], folder: Path, context: int = 1) -> Bundle:
    """Some parts of a model for ONNX Runtime: a bundle of nothing else, and in memory alone."""
    from vlm_export.target import Job, find_target
    from vlm_quant.recipe import parse_recipe

    written = find_target(ONNX).build(Job(model, parse_recipe(precision), folder, context, parts))
    manifest = Manifest(
        format="vlm-bundle",
        version=1,
        created="",
        spec=model.spec,
        max_context=context,
        embedding=Table("", "F32", 0, 0),
        tokenizer="",
        files={},
        parts={name: {ONNX: part} for name, part in written.items()},
        recipes={},
        parity={},
        golden=None,
        tools={},
    )
    return Bundle(folder, manifest)


def languages(model: Any, names: Sequence[str], pairs: Any, work: Path, context: int) -> dict[str, Bundle]:
    """The language model at each precision; smoothed, its outliers are moved into the weights first."""
    from vlm_export.decide import decide
    from vlm_quant.recipe import PRESETS

    found = {}
    for name in names:
        folder, source = work / name.replace(" ", "-"), model
        folder.mkdir()
        if name in DECIDED:
            (folder / "tensors").mkdir()
            source = decide(model, PRESETS["int8"], pairs, DECIDED[name], folder=folder / "tensors").model
        found[name] = built(source, f"language={LANGUAGE[name]}", ("language_model",), folder, context)
    return found


def long_prompts(truths: Sequence[Any], rows: int) -> list[Any]:
    """Examples whose prompts begin with those of other pictures, in turn, as far as `rows` go."""
    import torch

    made = []
    for i, truth in enumerate(truths):
        embeds, before, length = truth.embeds, list[Any](), len(truth.embeds)
        for other in (truths[(i + 7 * n) % len(truths)] for n in range(1, len(truths))):
            length += len(other.embeds)
            if length > rows:
                break
            before.append(other.embeds)
        long = torch.cat([*before, embeds])
        made.append(replace(truth, embeds=long, first_read=truth.first_read + len(long) - len(embeds)))
    return made


def reference(model: Any, examples: Sequence[Any]) -> list[Truth]:
    """The checkpoint's own distributions of the answer tokens, in fp32; every example counts as a picture."""
    language, truths = model.language_model(), []
    for number, example in enumerate(examples):
        language.rewind(0)
        logits = language.forward(example.embeds, last_row=False)[example.first_read : -1]
        truths.append(Truth(example, number, logits.log_softmax(-1).numpy()))
    return truths


def divergence(bundles: Mapping[str, Bundle], truths: Sequence[Truth]) -> dict[str, dict[str, Any]]:
    """KL to the checkpoint by precision, with its interval, and the share of tokens whose best one is the same."""
    found, pictures = {}, np.array([truth.picture for truth in truths])
    for name, bundle in bundles.items():
        decoder: Any = find_engine(ONNX).decoder(bundle, Options())
        quality = compared(decoder, truths, bundle.manifest.parts["language_model"][ONNX].details["data_bytes"])
        found[name] = {"kl": quality.mean, "kl_interval": intervals(quality, quality, pictures)["kl_interval"]}
        found[name] |= {"top1": quality.agree / int(quality.tokens.sum()), "megabytes": quality.bytes / 1e6}
    return found


def cosines(bundles: Mapping[str, Bundle], pixels: Iterator[NDArray[np.float32]]) -> dict[str, dict[str, float]]:
    """Projected rows against those of fp32, picture by picture: the mean cosine and the smallest."""
    encoders = {
        name: [find_engine(ONNX).encoder(bundle, part, Options()) for part in TOWER] for name, bundle in bundles.items()
    }
    found: dict[str, list[float]] = {name: [] for name in bundles if name != "fp32"}
    for picture in pixels:
        rows = {name: projector.run(encoder.run(picture[None])) for name, (encoder, projector) in encoders.items()}
        want = rows["fp32"].astype(np.float64).ravel()
        for name, values in found.items():
            got = rows[name].astype(np.float64).ravel()
            values.append(float(got @ want / np.linalg.norm(got) / np.linalg.norm(want)))
    return {name: {"mean": float(np.mean(values)), "least": min(values)} for name, values in found.items()}


def answers(checkpoint: Path, work: Path, pictures: int) -> dict[str, dict[str, float]]:
    """Share of exact answers with the vision encoder, and with everything, at int8; of all kinds, and their mean."""
    from vlm_export import export

    found = {}
    recipes = {"fp32": "fp32", "int8 vision": "vision=int8,projector=fp16,language=fp32", "int8": "int8"}
    for name, recipe in recipes.items():
        export(checkpoint, ["onnx"], work / name.replace(" ", "-"), precision=recipe, check=False)
        kinds = accuracy(work / name.replace(" ", "-"), pictures)
        found[name] = {"mean": float(np.mean(list(kinds.values()))), **kinds}
    return found


def faster(results: report.Results, base: str, number: str) -> dict[str, float]:
    """How many times as fast as `base` each is, by medians."""
    return {who: ratio(results, base, who, number) for who in results if number in results[who]}


def command(
    checkpoint: Annotated[Path, typer.Argument(help="The demo checkpoint, with its calibration pairs.")],
    vision: Annotated[Path | None, typer.Option(help="A checkpoint whose vision encoder is timed.")] = None,
    rows: Annotated[int, typer.Option(min=64, help="Rows of the prompt.")] = 600,
    tokens: Annotated[int, typer.Option(min=1, help="Decoded tokens.")] = 32,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    repeats: Annotated[int, typer.Option(min=1)] = 9,
    idle: Annotated[float, typer.Option(help="Seconds to wait for an idle machine before each repeat.")] = 8.0,
    pictures: Annotated[int, typer.Option(min=2, help="Held-out pictures, about six questions each.")] = 20,
    asked: Annotated[int, typer.Option(min=0, help="Pictures of which answers are counted, 0 for none.")] = 0,
    precisions: Annotated[str, typer.Option(help="Of the language model, separated by commas.")] = ",".join(LANGUAGE),
    keep: Annotated[Path | None, typer.Option(help="A new folder in which the graphs stay.")] = None,
    before: Annotated[Path | None, typer.Option(help="Graphs that an earlier version kept, to time as well.")] = None,
    save: Annotated[bool, typer.Option("--save", help=f"Write the numbers into {report.RESULTS}.")] = False,
) -> None:
    """Times of fp32, fp16, int8 and int4, in turn; KL and cosine to fp32."""
    from vlm_export.importance import examples
    from vlm_export.reference import pixel_values
    from vlm_models.demo.scenes import make_scene, write_pairs
    from vlm_models.model import load_model
    from vlm_quant.calibration import read_pairs

    console, names = Console(), [name.strip() for name in precisions.split(",")]
    if unknown := [name for name in names if name not in LANGUAGE]:
        raise InputError(f"unknown precision {unknown[0]!r}: choose of {', '.join(LANGUAGE)}")
    if "fp32" not in names:
        raise InputError("everything is compared with fp32: add it to --precisions")
    model, facts = load_model(checkpoint), dict[str, Any](rows=rows, tokens=tokens, threads=threads)
    pairs = read_pairs(checkpoint / "calibration")
    with kept(keep) as work:
        held = read_pairs(write_pairs(work / "held-out", pictures))
        shown = examples(model, held)
        context = max(rows + tokens, *(len(example.embeds) for example in shown))
        bundles = languages(model, names, pairs, work, context)
        bundles |= earlier(bundles, before)
        prompt = long_prompts(shown, rows)
        long = reference(model, prompt[:: max(1, len(prompt) // pictures)])
        facts |= {"held_out": divergence(bundles, held_out(model, held)), "prompts": len(shown)}
        facts |= {"held_out_long": divergence(bundles, long), "long_prompts": len(long)}
        towers = {name: built(model, name, TOWER, _made(work / f"tower-{name}")) for name in VISION}
        seen = (pixel_values(model, make_scene(seed, "test")[0])[0] for seed in range(pictures))
        facts["cosine"] = cosines(towers, seen)
        filled = max((example.embeds for example in prompt), key=len).numpy()
        timed = np.resize(filled, (rows, filled.shape[1]))
        makers: dict[str, tuple[str, tuple[Any, ...]]] = {
            name: ("vlm_bench.int8_speed:make_language", (bundle, threads, timed, tokens))
            for name, bundle in bundles.items()
        }
        if vision is not None:
            large = load_model(vision)
            towers = {name: built(large, name, TOWER, _made(work / f"vision-{name}")) for name in VISION}
            towers |= earlier(towers, before)
            size = large.spec.vision.image_size
            noise = np.random.default_rng(0).standard_normal((3, 3, size, size), np.float32)
            facts["cosine_of_noise"] = cosines(towers, iter(noise))
            makers |= {
                f"vision {name}": ("vlm_bench.int8_speed:make_vision", (bundle, threads))
                for name, bundle in towers.items()
            }
        if asked:
            facts |= {"asked_pictures": asked, "accuracy": answers(checkpoint, work, asked)}
        with workers(makers, threads) as running:
            results = interleave(running, repeats, idle_s=idle, watch=report.status(console))
    facts["first_token"] = first_token(results)
    facts["ratios"] = {number: faster(results, base, number) for number, base in BASES.items() if base in results}
    headings = {"prefill_ms": f"prompt {rows}, ms", "decode_ms": "decode, ms", "vision_ms": "vision, ms"}
    console.print(report.table(f"ONNX Runtime, {threads} threads; medians", results, headings))
    console.print_json(data={key: value for key, value in facts.items() if isinstance(value, dict)})
    report.warn_if_loud(console, results)
    if save:
        console.print(str(report.save(report.record("int8-speed", results, **facts))))


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


if __name__ == "__main__":
    from vlm_models.command import run

    app = typer.Typer(add_completion=False)
    app.command(no_args_is_help=True)(command)
    run(app)
