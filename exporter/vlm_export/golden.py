"""Golden vectors: one picture, one question, and what the reference makes of them, for any runtime to replay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from vlm_export.reference import Reference
from vlm_models.spec import PromptSpec
from vlm_runtime.prompt import render

FOLDER = "golden"
PICTURE = f"{FOLDER}/image.png"
VECTORS = f"{FOLDER}/golden.safetensors"
QUESTION = "Describe the image."
_WIDTH, _HEIGHT = 500, 372  # not square, so that resizing and cropping show


def picture() -> Image.Image:
    """The test picture: colour gradients, a disc, a square, stripes and a fine checkerboard; the same everywhere."""
    y, x = np.mgrid[0:_HEIGHT, 0:_WIDTH]
    pixels = np.stack([x * 255 // _WIDTH, y * 255 // _HEIGHT, (x + y) * 255 // (_WIDTH + _HEIGHT)], -1)
    pixels[(x - 140) ** 2 + (y - 130) ** 2 < 85**2] = (220, 30, 40)
    pixels[(abs(x - 350) < 70) & (abs(y - 110) < 70)] = (40, 60, 220)
    stripes = (y > 250) & (x < 230) & (x // 7 % 2 == 0)
    pixels[stripes] = (250, 210, 20)
    board = (y > 240) & (x > 280) & ((x + y) % 2 == 0)
    pixels[board] = 255 - pixels[board]
    return Image.fromarray(pixels.astype(np.uint8), "RGB")


def prompt(spec: PromptSpec) -> str:
    """One picture and the question, through the checkpoint's chat template."""
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    return render([{"role": "user", "content": content}], spec)


def write_picture(folder: Path) -> Path:
    """golden/image.png in `folder`, unless it is there: an older bundle's golden vectors belong to its picture."""
    path = folder / PICTURE
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        picture().save(path)
    return path


def write_vectors(folder: Path, reference: Reference) -> None:
    """golden/golden.safetensors: float32 `pixel_values` (N,3,s,s), `image_features` (N,T,F), `image_embeds` (N,T',H)
    of the picture's N tiles, `inputs_embeds` (S,H), `logits` (V,) of the last prompt row; int64 `prompt_ids` (S,) and
    `greedy_tokens` (n,).
    """
    from safetensors.numpy import save

    r = reference
    tensors = {
        "pixel_values": r.pixel_values,
        "image_features": r.image_features,
        "image_embeds": r.image_embeds,
        "inputs_embeds": r.inputs_embeds,
        "logits": r.logits[0],
        "prompt_ids": np.array(r.prompt_ids, np.int64),
        "greedy_tokens": np.array(r.greedy, np.int64),
    }
    about = {"prompt": r.prompt, "image": Path(PICTURE).name, "reference": r.how}
    (folder / VECTORS).write_bytes(save({name: np.ascontiguousarray(t) for name, t in tensors.items()}, about))
