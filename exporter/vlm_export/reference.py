"""What the checkpoint itself computes: transformers' own processor, tower and projector, and the torch decoder."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from vlm_export.greedy import Blocks, Draft, decode, decode_drafts
from vlm_export.reference_original import is_original, original_features, original_pixels
from vlm_export.reference_prompt import original_ids
from vlm_export.target import Progress, silent
from vlm_models.errors import CheckpointError
from vlm_models.family import family_of

if TYPE_CHECKING:
    from torch import Tensor

    from vlm_models.model import Model

Floats = npt.NDArray[np.float32]
_EMBEDDING = "language_model.embed_tokens.weight"


@dataclass(frozen=True)
class Reference:
    """The checkpoint's own numbers for one picture and one prompt, all float32.

    `prompt_ids` (S) have the image token repeated; of N tiles, one where the picture is not cut, are `pixel_values`
    (N,3,s,s), `image_features` (N,T,F), `image_embeds` (N,T',H); `inputs_embeds` (S,H) have the picture's rows in
    place. `logits` (n,V): row i predicts `greedy[i]` after the prompt and `greedy[:i]`. End-of-text tokens do not end
    `greedy`. `how` says in words how it was computed.
    """

    prompt: str
    prompt_ids: tuple[int, ...]
    pixel_values: Floats
    image_features: Floats
    image_embeds: Floats
    inputs_embeds: Floats
    logits: Floats
    greedy: tuple[int, ...]
    how: str


def compute_reference(
    model: Model,
    picture: Path,
    prompt: str,
    *,
    tokens: int,
    draft: Draft | None = None,
    keep: bool | None = None,
    progress: Progress = silent,
) -> Reference:
    """Run the checkpoint on the file `picture` and `prompt` and decode `tokens` greedy tokens.

    `keep` holds the decoder's weights in memory as float32; by default where they fit in half of the free memory.
    Else every pass streams them from disk, and greedy decoding verifies the tokens of `draft` many at a time: four
    passes at most, so that fewer than `tokens` may come out.
    """
    import torch

    from vlm_export.reference_adapter import as_trained
    from vlm_export.reference_projector import projected

    model, steps = as_trained(model), tokens + 3
    with Image.open(picture) as opened:
        image = opened.convert("RGB")
    ids, pixels = prompt_ids(model, prompt, [image]), pixel_values(model, image)
    progress("reference", 1, steps)
    with torch.inference_mode():
        features = image_features(model, torch.from_numpy(pixels))
        progress("reference", 2, steps)
        rows = projected(model, features)
        embeds = spliced(model, ids, packed(model, rows, (image.height, image.width)))
        progress("reference", 3, steps)
        kept = fits_in_memory(model) if keep is None else keep
        language = model.language_model(keep=kept)

        def embed(of: Sequence[int]) -> Tensor:
            return looked_up(model, of)

        def reached(count: int) -> None:
            progress("reference", 3 + count, steps)

        if kept:
            logits, greedy = decode(language, embeds, embed, tokens, reached, blocks=blocks_of(model, ids))
        else:
            blocks = blocks_of(model, ids)
            logits, greedy = decode_drafts(language, embeds, embed, tokens, draft, reached, blocks=blocks)
    progress("reference", steps, steps)
    how = f"torch float32, weights {'in memory' if kept else 'streamed'}, {len(greedy)} of {tokens} greedy tokens"
    return Reference(
        prompt=prompt,
        prompt_ids=tuple(ids),
        pixel_values=pixels,
        image_features=features.numpy(),
        image_embeds=rows.numpy(),
        inputs_embeds=embeds.numpy(),
        logits=logits.numpy(),
        greedy=tuple(greedy),
        how=how,
    )


def pixel_values(model: Model, picture: Image.Image, pictures: int = 1) -> Floats:
    """(N, 3, s, s): the tiles of one of `pictures` pictures of a prompt, by the checkpoint's own image processor."""
    from vlm_models.processor import image_processor

    own = getattr(family_of(model.checkpoint), "pixel_values", None)
    if is_original(model.checkpoint):
        return np.ascontiguousarray(original_pixels(model, picture, pictures), np.float32)
    if own is not None:
        return np.ascontiguousarray(own(model.checkpoint, model.spec, picture, pictures), np.float32)
    pixels = image_processor(model.checkpoint)(images=picture, return_tensors="np")["pixel_values"]
    return np.ascontiguousarray(np.asarray(pixels, np.float32))


def image_features(model: Model, pixels: Tensor) -> Tensor:
    """(N, T, F): rows of the tower, as the family or LLaVA's original code selects them."""
    if is_original(model.checkpoint):
        return original_features(model, pixels)
    rows: Tensor = model.vision_encoder()(pixels)
    return rows


def packed(model: Model, rows: Tensor, size: tuple[int, int], pictures: int = 1) -> Tensor:
    """(R, H): the rows of a picture of (height, width) from its tiles' projected rows (N, T, H)."""
    own = getattr(family_of(model.checkpoint), "packed", None)
    if own is None:
        return rows.flatten(0, 1)
    result: Tensor = own(model.checkpoint, model.spec, rows, size, pictures)
    return result


def picture_rows(model: Model, picture: Image.Image, pictures: int = 1) -> Tensor:
    """(R, H): what tower, projector and packing make of one of `pictures` pictures of a prompt."""
    import torch

    with torch.inference_mode():
        pixels = torch.from_numpy(pixel_values(model, picture, pictures))
        rows = model.projector()(model.vision_encoder()(pixels))
        return packed(model, rows, (picture.height, picture.width), pictures)


def prompt_ids(model: Model, prompt: str, pictures: Sequence[Image.Image]) -> list[int]:
    """The prompt's token ids by transformers' tokenizer, each image token repeated for every row of its picture."""
    from transformers import AutoTokenizer

    own = getattr(family_of(model.checkpoint), "prompt_ids", None)
    if (written := model.checkpoint.conversation) is not None and not written.whole:
        return original_ids(model.checkpoint, prompt, pictures, _rows_of(model, own), model.spec.prompt.image_token_id)
    if own is not None:
        return list(own(model.checkpoint, model.spec, prompt, pictures))
    folder, spec = model.checkpoint.files, model.spec.prompt
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{folder}: transformers cannot load its tokenizer: {reason}") from error
    begun = spec.bos_token is not None and prompt.startswith(spec.bos_token)
    ids = tokenizer(prompt, add_special_tokens=not begun)["input_ids"]
    return [i for t in ids for i in ([t] * spec.image_tokens if t == spec.image_token_id else [t])]


def _rows_of(model: Model, own: Callable[..., Sequence[int]] | None) -> Callable[[Image.Image], int]:
    """How many rows a picture takes: as many as always, or as the family's `prompt_ids` counts."""
    prompt = model.spec.prompt
    if own is None:
        return lambda picture: prompt.image_tokens
    return lambda picture: list(own(model.checkpoint, model.spec, prompt.picture, [picture])).count(
        prompt.image_token_id
    )


def looked_up(model: Model, ids: Sequence[int]) -> Tensor:
    """Embedding rows (n, H) of the checkpoint, float32, with the family's multiplier."""
    import torch

    from vlm_models.torch_language import as_float32

    rows = [as_float32(model.checkpoint, _EMBEDDING, i, i + 1) for i in ids]
    return torch.cat(rows) * model.spec.language.embed_multiplier


def spliced(model: Model, ids: Sequence[int], rows: Tensor) -> Tensor:
    """The prompt's embeddings (S, H) with the pictures' rows (R, H) at the image tokens, as transformers does it."""
    import torch

    at = torch.tensor(ids) == model.spec.prompt.image_token_id
    text = looked_up(model, [0 if image else i for i, image in zip(ids, at.tolist(), strict=True)])
    return text.masked_scatter(at[:, None], rows)


def blocks_of(model: Model, ids: Sequence[int]) -> Blocks:
    """(start, stop) of the rows of a prompt that see one another, as transformers' masks of the family have it."""
    both_ways = model.spec.language.both_ways
    if both_ways == "none":
        return []
    if both_ways == "prompt":
        return [(0, len(ids))]
    blocks: list[tuple[int, int]] = []
    for i, token in enumerate(ids):
        if token != model.spec.prompt.image_token_id:
            continue
        if blocks and blocks[-1][1] == i:
            blocks[-1] = blocks[-1][0], i + 1
        else:
            blocks.append((i, i + 1))
    return blocks


def fits_in_memory(model: Model) -> bool:
    """Whether the decoder's weights as float32 take at most half of the memory that is free now."""
    names = [n for n in model.checkpoint.names() if n.startswith(("language_model.", "lm_head."))]
    return 4 * sum(math.prod(model.checkpoint.shape(n)) for n in names) <= available_memory() // 2


def available_memory() -> int:
    """Bytes that new work can take without swapping (Linux), or half of what is built in (elsewhere)."""
    import os

    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    if hasattr(os, "sysconf"):
        return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) // 2
    return 8 << 30
