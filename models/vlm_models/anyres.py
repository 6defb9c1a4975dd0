"""What LLaVA-NeXT and OneVision share: the spec of their tiles, and what the reference takes from transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from vlm_models import vlm_config
from vlm_models.checkpoint import Checkpoint, read_json
from vlm_models.errors import CheckpointError
from vlm_models.processor import image_processor, preprocess_spec, prompt_spec
from vlm_models.spec import TilingSpec, VisionSpec, VLMSpec

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

_CLASSES = {"llava_next": "LlavaNextProcessor", "llava_onevision": "LlavaOnevisionProcessor"}
_NEWLINE = "image_newline"


def spec(checkpoint: Checkpoint, family: str) -> VLMSpec:
    """VLMSpec of config.json, image processor and tokenizer, with every picture cut into tiles.

    Raises CheckpointError where tower, processor and config do not fit together, or the newline row is missing.
    """
    config = vlm_config.read_config(checkpoint)
    vision, language = vlm_config.vision(checkpoint, config), vlm_config.language(checkpoint, config)
    projector = vlm_config.projector(checkpoint, config, vision, language)
    patches = (vision.image_size // vision.patch_size) ** 2
    rows = projector.out_tokens or vision.image_tokens
    if rows != patches:
        raise CheckpointError(
            f"{checkpoint.folder}: tiles are put together from {patches} rows each, one a patch, but tower and "
            f"projector give {rows}: see vision_feature_select_strategy, {vision.select_strategy!r}"
        )
    if (shape := checkpoint.shape(_NEWLINE)) != (language.hidden_size,):
        raise CheckpointError(
            f"{checkpoint.folder}: {_NEWLINE} has shape {shape}, the language model takes rows of "
            f"{language.hidden_size}"
        )
    preprocess = preprocess_spec(checkpoint, vision.image_size)
    return VLMSpec(
        family=family,
        name=checkpoint.name,
        fingerprint=checkpoint.fingerprint,
        vision=vision,
        projector=projector,
        language=language,
        preprocess=dataclasses.replace(preprocess, pad="none"),
        prompt=prompt_spec(checkpoint, config, rows),
        tiling=TilingSpec(rule="anyres", resolutions=_resolutions(checkpoint, config, vision), newline=True),
    )


def _resolutions(checkpoint: Checkpoint, config: Any, vision: VisionSpec) -> tuple[tuple[int, int], ...]:
    """image_grid_pinpoints, (height, width): the tower's tiles must fill them, and the processor know the same."""
    edge, given = vision.image_size, config.image_grid_pinpoints
    pairs = [tuple(one) if isinstance(one, list | tuple) else (one,) for one in given]
    bad = [p for p in pairs if len(p) != 2 or any(not isinstance(n, int) or n < edge or n % edge for n in p)]
    if bad or not pairs:
        raise CheckpointError(
            f"{checkpoint.folder}: image_grid_pinpoints {bad[0] if bad else pairs} cannot be: each is a height and a "
            f"width that are multiples of the tower's {edge}"
        )
    own = [tuple(one) for one in getattr(image_processor(checkpoint), "image_grid_pinpoints", None) or ()]
    if own != pairs:
        raise CheckpointError(
            f"{checkpoint.folder}: image_grid_pinpoints are {len(pairs)} in config.json and {len(own)} others in the "
            "image processor: they must be the same, in the same order"
        )
    return tuple((height, width) for height, width in pairs)


def processor(checkpoint: Checkpoint, spec: VLMSpec) -> Any:
    """transformers' own processor of the family, on Pillow; what old versions did not save comes from config.json."""
    import transformers

    folder, vision = checkpoint.files, spec.vision
    path = folder / "processor_config.json"
    saved = read_json(path, "") if path.is_file() else {}
    options: dict[str, Any] = {"vision_feature_select_strategy": vision.select_strategy}
    extra = int(vision.select_strategy == "default")  # the class token, which the strategy drops again
    if spec.family == "llava_next":
        options |= {"patch_size": vision.patch_size, "num_additional_image_tokens": extra}
    else:
        options |= {
            "num_image_tokens": vision.image_tokens + extra,
            "vision_aspect_ratio": checkpoint.config.get("vision_aspect_ratio", "anyres_max_9"),
        }
    options |= {name: saved[name] for name in options if saved.get(name) is not None}
    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{folder}: transformers cannot load its tokenizer: {reason}") from error
    own = getattr(transformers, _CLASSES[spec.family])
    # OneVision's insists on a processor for videos, which torchvision alone has.
    unchecked = type(own.__name__, (own,), {"check_argument_for_proper_class": lambda self, name, given: None})
    return unchecked(image_processor=image_processor(checkpoint), tokenizer=tokenizer, **options)


def prompt_ids(checkpoint: Checkpoint, spec: VLMSpec, prompt: str, pictures: Sequence[Image.Image]) -> list[int]:
    """Token ids by transformers' own processor, the image token once for each row of its picture."""
    made, bos = processor(checkpoint, spec), spec.prompt.bos_token
    written = bos is not None and prompt.startswith(bos)
    if not pictures:
        return list(made.tokenizer(prompt, add_special_tokens=not written)["input_ids"])
    out = made(text=[prompt], images=[list(pictures)], add_special_tokens=not written)
    return [int(token) for token in out["input_ids"][0]]


def packed_by(model: type, checkpoint: Checkpoint, rows: Tensor, size: tuple[int, int], **options: Any) -> Tensor:
    """(R, H): `pack_image_features` of transformers' own `model` on the rows (N, T, H) of a picture of `size`."""
    from vlm_models.torch_language import as_float32

    stand_in: Any = SimpleNamespace(config=vlm_config.read_config(checkpoint))
    own: Any = model
    newline = as_float32(checkpoint, _NEWLINE)
    (out,), _ = own.pack_image_features(stand_in, [rows], [list(size)], image_newline=newline, **options)
    result: Tensor = out
    return result
