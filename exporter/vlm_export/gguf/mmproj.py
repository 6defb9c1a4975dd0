"""mmproj.gguf: vision tower and projector for llama-server and others that read pictures with llama.cpp's own code.

Our runtime never needs it. What is written is what llama.cpp's graph for LLaVA (projector_type "mlp") and its loader
take; how far that graph is from the checkpoint is measured by `vlm_export.gguf.mtmd`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
from numpy.typing import NDArray

from vlm_export.gguf.architecture import embed_scale
from vlm_export.gguf.class_row import in_order
from vlm_export.gguf.tower import Tower, Weight
from vlm_export.target import Progress, silent
from vlm_models.checkpoint import Checkpoint
from vlm_models.errors import CheckpointError, RecipeError
from vlm_models.model import Model
from vlm_models.spec import PreprocessSpec, VLMSpec

Floats = NDArray[np.float32]

TOWERS = ("clip_vision_model", "siglip_vision_model")
# Activation of the tower's MLP → the key that names it; llama.cpp's "gelu" is the tanh approximation.
_ACTIVATIONS: Mapping[str, str | None] = {
    "quick_gelu": None,
    "gelu": "clip.use_gelu",
    "gelu_new": "clip.use_gelu",
    "gelu_pytorch_tanh": "clip.use_gelu",
    "silu": "clip.use_silu",
}
_GELUS = ("gelu", "gelu_new", "gelu_pytorch_tanh")
_FP16_MAX = float(np.finfo(np.float16).max)
_BLOCK = {
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
# The two linear layers of the projectors that llama.cpp's graph is, by kind.
_LAYERS = {"mlp": ("linear_1", "linear_2"), "mlp2x_gelu": ("0", "2")}
_BEFORE = {
    "embeddings.class_embedding": "v.class_embd",
    "embeddings.patch_embedding.weight": "v.patch_embd.weight",
    "embeddings.patch_embedding.bias": "v.patch_embd.bias",
    "embeddings.position_embedding.weight": "v.position_embd.weight",
    "pre_layrnorm.weight": "v.pre_ln.weight",
    "pre_layrnorm.bias": "v.pre_ln.bias",
}


def unsupported(model: Model) -> str | None:
    """Why llama.cpp's LLaVA graph cannot be this tower and projector, in one line; None where it can."""
    vision, projector = model.spec.vision, model.spec.projector
    if model.spec.tiling is not None:
        return "llama.cpp cuts pictures into tiles and packs their rows in a way of its own"
    if vision.model_type not in TOWERS:
        return f"llama.cpp has no LLaVA graph for a {vision.model_type} tower"
    if projector.kind not in _LAYERS:
        return f"mmproj files are written for projectors of two linear layers with GELU, this one is {projector.kind}"
    if projector.activation not in _GELUS:
        return f"llama.cpp's LLaVA projector computes GELU, this one {projector.activation}"
    if (activation := _config(model.checkpoint).hidden_act) not in _ACTIVATIONS:
        return f"llama.cpp's vision tower computes {', '.join(_ACTIVATIONS)}, not {activation}"
    patches = (vision.image_size // vision.patch_size) ** 2
    if vision.image_tokens != patches:
        return f"llama.cpp gives one row for each of the {patches} patches, this checkpoint takes {vision.image_tokens}"
    return None


def write_mmproj(
    model: Model,
    path: Path,
    *,
    type: Literal["f32", "f16"] = "f16",
    plain: bool = False,
    progress: Progress = silent,
) -> None:
    """Write tower and projector as one GGUF of `type`, one tensor in memory at a time.

    `plain` is the usual layout, of which llama.cpp puts a CLIP tower's rows in the wrong order and pads what SigLIP's
    processor squashes; without it the file is laid out so that both come right.
    Raises CheckpointError for what `unsupported` names, RecipeError for weights that fp16 cannot hold.
    """
    if (reason := unsupported(model)) is not None:
        raise CheckpointError(f"no mmproj can be written: {reason}")
    parts, resize = tower(model), model.spec.preprocess
    if not plain and (resize.resize, resize.crop, resize.pad) == ("exact", 0, "none"):
        # With tiles of no size all that llama.cpp makes is the overview, which it squashes as Pillow does.
        parts = dataclasses.replace(parts, keys={**parts.keys, "image_grid_pinpoints": [0, 0]})
    if not plain and "v.class_embd" in parts.weights:
        parts = in_order(parts)
    write_tower(parts, path, model.spec, half=type == "f16", progress=progress)


def tower(model: Model) -> Tower:
    """Keys and tensors of the checkpoint's tower up to its deepest feature layer, and of its projector."""
    checkpoint, spec, config = model.checkpoint, model.spec, _config(model.checkpoint)
    layers = [n % (spec.vision.layers + 1) for n in spec.vision.feature_layers]  # indices into hidden_states
    blocks = max(*layers, 1)
    keys: dict[str, Any] = {
        "image_size": spec.vision.image_size,
        "patch_size": spec.vision.patch_size,
        "embedding_length": spec.vision.hidden_size,
        "feed_forward_length": int(config.intermediate_size),
        "block_count": blocks,
        "attention.head_count": int(config.num_attention_heads),
        "attention.layer_norm_epsilon": float(config.layer_norm_eps),
        "projection_dim": spec.projector.out_features,
        # Explicit, since the default leaves out the last block stored; the graph stacks them from the lowest up.
        "feature_layer": sorted(set(layers)),
        **_normalisation(spec.preprocess),
    }
    if (activation := _ACTIVATIONS[config.hidden_act]) is not None:
        keys[activation] = True
    weights: dict[str, Weight] = {}
    for theirs, ours in _BEFORE.items():
        if (name := f"vision_tower.{theirs}") in checkpoint:
            weights[ours] = _stored(checkpoint, name)
    for block in range(blocks):
        for theirs, ours in _BLOCK.items():
            for kind in ("weight", "bias"):
                name = f"vision_tower.encoder.layers.{block}.{theirs}.{kind}"
                if name in checkpoint:
                    weights[f"v.blk.{block}.{ours}.{kind}"] = _stored(checkpoint, name)
    return Tower(keys, weights | _projector(checkpoint, spec, layers))


def write_tower(tower: Tower, path: Path, spec: VLMSpec, *, half: bool, progress: Progress = silent) -> None:
    """Write a Tower with the keys every file of ours has. Raises RecipeError for weights that fp16 cannot hold."""
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_name(spec.name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if half else gguf.LlamaFileType.ALL_F32)
    writer.add_string("vlm.fingerprint", spec.fingerprint)
    writer.add_string("vlm.part", "mmproj")
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    for key, value in tower.keys.items():
        _add(writer, key if key.startswith(("clip.", "vlm.")) else f"clip.vision.{key}", value)
    weights = _swapped(tower)
    for name, weight in weights.items():
        dtype: Any = np.dtype(np.float16 if half and weight.matrix else np.float32)
        writer.add_tensor_info(name, list(weight.shape), dtype, int(np.prod(weight.shape)) * dtype.itemsize)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, (name, weight) in enumerate(weights.items()):
            progress("mmproj", done, len(weights))
            values = weight.read().reshape(weight.shape)
            writer.write_tensor_data(np.ascontiguousarray(_half(name, values) if half and weight.matrix else values))
    finally:
        writer.close()
    progress("mmproj", len(weights), len(weights))


def _swapped(tower: Tower) -> dict[str, Weight]:
    """The loader takes an ffn_down whose rows are as long as the tower is wide for ffn_up, and swaps the two."""
    width = tower.keys["embedding_length"]
    blocks = {
        name.removesuffix(".ffn_down.weight")
        for name, weight in tower.weights.items()
        if name.endswith(".ffn_down.weight") and weight.shape[1] == width
    }
    other = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}
    out = {}
    for name, weight in tower.weights.items():
        block, _, rest = name.partition(".ffn_")
        part, _, kind = f"ffn_{rest}".partition(".")
        out[f"{block}.{other[part]}.{kind}" if rest and block in blocks else name] = weight
    return out


def _projector(checkpoint: Checkpoint, spec: VLMSpec, layers: list[int]) -> dict[str, Weight]:
    """mm.0 and mm.2 with biases, zeros where the checkpoint has none: the graph adds them unasked.

    mm.2 is divided by what the language model's graph will multiply the rows by.
    """
    p, width, scale = spec.projector, spec.vision.hidden_size, np.float32(embed_scale(spec.language))
    order, (linear_1, linear_2) = sorted(set(layers)), _LAYERS[p.kind]

    def stored(name: str) -> Weight:
        return _stored(checkpoint, f"multi_modal_projector.{name}", scale=scale if name.startswith(linear_2) else None)

    def first() -> Floats:
        # (hidden, layers × width): columns go from the checkpoint's order of feature layers to the graph's.
        given = _read(checkpoint, f"multi_modal_projector.{linear_1}.weight")
        given = given.reshape(p.hidden_size, len(layers), width)
        out = np.zeros((p.hidden_size, len(order), width), np.float32)
        for i, layer in enumerate(layers):
            out[:, order.index(layer)] += given[:, i]
        return out.reshape(p.hidden_size, -1)

    weights = {
        "mm.0.weight": Weight((p.hidden_size, len(order) * width), True, first),
        "mm.2.weight": stored(f"{linear_2}.weight"),
    }
    for ours, theirs, size in (("mm.0", linear_1, p.hidden_size), ("mm.2", linear_2, p.out_features)):
        weights[f"{ours}.bias"] = stored(f"{theirs}.bias") if p.bias else Weight((size,), False, _zeros(size))
    return weights


def _normalisation(spec: PreprocessSpec) -> dict[str, list[float]]:
    """image_mean and image_std for llama.cpp, which always scales pixels by 1/255 first."""
    scale = 255.0 * spec.rescale
    return {"image_mean": [m / scale for m in spec.mean], "image_std": [s / scale for s in spec.std]}


def _config(checkpoint: Checkpoint) -> Any:
    from transformers import LlavaConfig

    return LlavaConfig.from_dict(dict(checkpoint.config)).vision_config


def _stored(checkpoint: Checkpoint, name: str, scale: np.float32 | None = None) -> Weight:
    shape = checkpoint.shape(name)
    matrix = len(shape) > 1 and "position_embedding" not in name
    if scale is None or scale == 1:
        return Weight(shape, matrix, lambda: _read(checkpoint, name))
    return Weight(shape, matrix, lambda: _read(checkpoint, name) / scale)


def _read(checkpoint: Checkpoint, name: str) -> Floats:
    values: Floats = np.array(checkpoint.rows(name), dtype=np.float32)
    checkpoint.release(name)
    return values


def _zeros(size: int) -> Callable[[], Floats]:
    return lambda: np.zeros(size, np.float32)


def _half(name: str, values: Floats) -> NDArray[np.float16]:
    largest = float(max(values.max(initial=0), -values.min(initial=0)))
    if largest > _FP16_MAX:
        raise RecipeError(f"mmproj: {name} reaches {largest:.3g}, beyond fp16: choose fp32 for vision and projector")
    return values.astype(np.float16)


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
