"""`python -m vlm_bench.llamacpp_limits CHECKPOINT…`: what llama.cpp's own image path changes, limit by limit.

None of it touches a bundle: there the vision parts run elsewhere and llama.cpp is given their rows.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from vlm_bench import report
from vlm_export import golden
from vlm_export.gguf.architecture import architecture, embed_scale
from vlm_export.gguf.file import write_gguf
from vlm_export.gguf.mmproj import tower, unsupported, write_mmproj, write_tower
from vlm_export.gguf.mtmd import Mtmd, bitmap, measure_mmproj
from vlm_export.gguf.tensors import tensors
from vlm_export.parity import distance
from vlm_export.reference import Reference, compute_reference, looked_up, pixel_values
from vlm_export.target import silent
from vlm_models.command import run
from vlm_models.demo.scenes import make_scene, questions
from vlm_models.errors import InputError
from vlm_models.model import Model, load_model
from vlm_models.processor import tokenizer_json
from vlm_quant.gguf_types import GGUF_TYPES
from vlm_runtime.engines.gguf import GgufDecoder
from vlm_runtime.prompt import render, user_message
from vlm_runtime.tokenizer import expand

Floats = NDArray[np.float32]
TILED = ((300, 200), (224, 112), (672, 336))  # width, height, for a tower of 336 pixels; scaled to the tower's size
LONGEST = 12  # tokens of an answer of the demo


@dataclass(frozen=True)
class Limit:
    """One number of llama.cpp's image path beside ours: rows of our engines are the checkpoint's own to rounding (the
    parity in every manifest), logits are measured with them.
    """

    limit: str
    measured: str
    llamacpp: float | int
    ours: float | int


def limits(folder: Path, work: Path, pictures: int, threads: int) -> Iterator[Limit]:
    """Every limit that shows with this checkpoint; `pictures` of the demo are asked about, 0 for none."""
    model = load_model(folder)
    if (reason := unsupported(model)) is not None:
        raise InputError(f"{folder}: {reason}")
    language = work / "language_model.gguf"
    arch, weights = architecture(model.spec.language, 512), tensors(model.checkpoint, model.spec)
    words = {"tokenizer.ggml.model": "none"}
    write_gguf(language, arch, {}, weights, GGUF_TYPES["f16"], words, progress=silent)
    picture = golden.write_picture(work)
    reference = compute_reference(model, picture, golden.prompt(model.spec.prompt), tokens=1)
    moved, plain = work / "moved.gguf", work / "plain.gguf"
    write_mmproj(model, moved, type="f16")
    found = measure_mmproj(moved, language, picture, reference, model.spec, threads=threads)
    exact = found["exact"]["logits"]["relative_l2"]
    write_mmproj(model, plain, type="f16", plain=True)
    usual = measure_mmproj(plain, language, picture, reference, model.spec, threads=threads)
    if model.spec.vision.model_type.startswith("clip"):
        order = "class row last, patch 0 dropped"
        yield Limit(order, "rows, cosine", usual["prepared"]["image_embeds"]["cosine"], 1.0)
        yield Limit(order, "logits, relative L2", usual["prepared"]["logits"]["relative_l2"], exact)
    if (gelu := _tanh(model, reference)) is not None:
        yield Limit("GELU by tanh where the checkpoint has erf", "rows, relative L2", gelu, 0.0)
    scaled = "picture of 500 × 372, padded and scaled"
    yield Limit(scaled, "rows, cosine", usual["as_it_is"]["image_embeds"]["cosine"], 1.0)
    yield Limit(scaled, "logits, relative L2", usual["as_it_is"]["logits"]["relative_l2"], exact)
    yield Limit("the same with our mmproj.gguf", "rows, cosine", found["as_it_is"]["image_embeds"]["cosine"], 1.0)
    whole = "a prepared picture with our mmproj.gguf"
    yield Limit(whole, "rows, cosine", found["prepared"]["image_embeds"]["cosine"], 1.0)
    yield Limit(whole, "rows, relative L2", found["prepared"]["image_embeds"]["relative_l2"], 0.0)
    yield Limit(whole, "logits, relative L2", found["prepared"]["logits"]["relative_l2"], exact)
    yield from _tiles(model, work, language, threads)
    yield from _prompt(model, picture, reference)
    if pictures:
        ours = _answers(model, None, language, pictures, threads)
        for name, file in (("mmproj as usual", plain), ("our mmproj.gguf", moved)):
            share = _answers(model, file, language, pictures, threads)
            yield Limit(f"right answers on {pictures} pictures, {name}", "share", share, ours)


def _tanh(model: Model, reference: Reference) -> float | None:
    """Relative L2 of the rows when every exact GELU of tower and projector is the tanh approximation; None of none."""
    import torch
    from transformers.activations import ACT2FN

    encoder: Any = model.vision_encoder()
    projector: Any = model.projector()
    blocks: Any = [m for m in encoder.modules() if type(getattr(m, "activation_fn", None)).__name__ == "GELUActivation"]
    if not blocks and projector.activation != "gelu":
        return None
    before, activation = [block.activation_fn for block in blocks], projector.activation
    for block in blocks:
        block.activation_fn = ACT2FN["gelu_pytorch_tanh"]
    projector.activation = "gelu_pytorch_tanh" if activation == "gelu" else activation
    with torch.inference_mode():
        rows = projector(encoder(torch.from_numpy(reference.pixel_values)))[0].numpy()
    for block, function in zip(blocks, before, strict=True):
        block.activation_fn = function
    projector.activation = activation
    return distance(reference.image_embeds, rows)["relative_l2"]


def _tiles(model: Model, work: Path, language: Path, threads: int) -> Iterator[Limit]:
    """Rows that llama.cpp makes of a picture in tiles, and how many LLaVA-NeXT's processor counts for it."""
    from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor as Next

    vision = model.spec.vision
    s, pins = vision.image_size, [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]
    flat = [edge * s for pin in pins for edge in pin]
    parts = tower(model)
    file = work / "tiles.gguf"
    write_tower(replace(parts, keys={**parts.keys, "image_grid_pinpoints": flat}), file, model.spec, half=True)
    counted: Any = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=[[h * s, w * s] for w, h in pins]),
        patch_size=vision.patch_size,
        num_additional_image_tokens=0,
    )
    unpadded: Any = Next._get_unpadded_features
    counted._get_unpadded_features = lambda *sizes: unpadded(counted, *sizes)
    opened = Mtmd(file, language, threads=threads)
    for width, height in ((w * s // 336, h * s // 336) for w, h in TILED):
        pixels = np.full((height, width, 3), 128, np.uint8)
        rows = len(opened.rows(pixels, model.spec.projector.out_features))
        want = Next._get_number_of_features(counted, height, width, s, s)
        yield Limit("tiles of LLaVA-NeXT: no unpadding, no newline rows", f"rows of {width} × {height}", rows, want)
    opened.close()


def _prompt(model: Model, picture: Path, reference: Reference) -> Iterator[Limit]:
    """What becomes of the prompt when question and picture are one text before the chat template sees them."""
    prompt = model.spec.prompt
    flat = render([{"role": "user", "content": f"{prompt.image_token}{golden.QUESTION}"}], prompt)
    other = compute_reference(model, picture, flat, tokens=1)
    what = "template never sees the picture"
    yield Limit(what, "prompt tokens", len(other.prompt_ids), len(reference.prompt_ids))
    yield Limit(what, "logits, relative L2", distance(reference.logits, other.logits)["relative_l2"], 0.0)


def _answers(model: Model, mmproj: Path | None, language: Path, pictures: int, threads: int) -> float:
    """Share of exact answers on the demo's held-out pictures with rows by `mmproj`, or the checkpoint's own."""
    import torch

    spec = model.spec
    scale = np.float32(embed_scale(spec.language))
    opened = Mtmd(mmproj, language, threads=threads) if mmproj is not None else None
    decoder = GgufDecoder(
        language,
        hidden_size=spec.language.hidden_size,
        vocab_size=spec.language.vocab_size,
        max_context=512,
        threads=threads,
        embed_scale=float(scale),
    )
    tokenizer, right, asked = Tokenizer.from_str(tokenizer_json(model.checkpoint)), 0, 0
    for seed in range(pictures):
        picture, objects = make_scene(seed, "test")
        pixels = pixel_values(model, picture)[0]
        if opened is not None:
            rows = opened.rows(bitmap(pixels, spec.preprocess), spec.projector.out_features) * scale
        else:
            with torch.inference_mode():
                rows = model.projector()(model.vision_encoder()(torch.from_numpy(pixels)[None]))[0].numpy()
        for kind, question, answer in questions(objects, seed):
            if kind != "describe":
                text = _greedy(model, tokenizer, decoder, rows, question)
                right, asked = right + (text == answer), asked + 1
    if opened is not None:
        opened.close()
    return right / asked


def _greedy(model: Model, tokenizer: Tokenizer, decoder: GgufDecoder, rows: Floats, question: str) -> str:
    spec = model.spec.prompt
    prompt = render([user_message(question, 1, spec)], spec)
    starts = bool(spec.bos_token) and prompt.startswith(spec.bos_token or "")
    ids = np.array(expand(tokenizer.encode(prompt, add_special_tokens=not starts).ids, spec, [spec.image_tokens]))
    image = ids == spec.image_token_id
    embeds = looked_up(model, np.where(image, 0, ids).tolist()).numpy().copy()
    embeds[image] = rows
    decoder.rewind(0)
    logits, out = decoder.prefill(embeds), list[int]()
    while len(out) < LONGEST and (token := int(logits.argmax())) not in spec.eos_token_ids:
        out.append(token)
        logits = decoder.decode(looked_up(model, [token]).numpy()[0])
    return str(tokenizer.decode(out)).strip()


def command(
    checkpoints: Annotated[list[Path], typer.Argument(help="Checkpoint folders with a CLIP or SigLIP tower.")],
    pictures: Annotated[int, typer.Option(min=0, help="Held-out pictures of the demo to ask about.")] = 0,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    save: Annotated[bool, typer.Option("--save", help=f"Write the numbers into {report.RESULTS}.")] = False,
) -> None:
    """A table for each checkpoint: llama.cpp's own image path, and ours."""
    console, all_found = Console(), {}
    for folder in checkpoints:
        with tempfile.TemporaryDirectory() as work:
            found = list(limits(folder, Path(work), pictures, threads))
        table = Table("limit", "measured", "llama.cpp", "ours", title=folder.absolute().name)
        for one in found:
            table.add_row(one.limit, one.measured, _shown(one.llamacpp), _shown(one.ours))
        console.print(table)
        all_found[folder.absolute().name] = [asdict(one) for one in found]
    if save:
        console.print(str(report.save(report.record("llamacpp-limits", limits=all_found))))


def _shown(number: float | int) -> str:
    return str(number) if isinstance(number, int) else f"{number:.6f}" if number > 0.99 else f"{number:.3g}"


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command(no_args_is_help=True)(command)
    run(app)
