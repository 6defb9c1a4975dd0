"""mmproj files in llama.cpp itself: its projected rows equal the checkpoint's for CLIP and SigLIP towers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from PIL import Image

from checkpoints import copy
from conftest import MakeTiny
from exporting import rewrite
from vlm_export import golden
from vlm_export.gguf.architecture import architecture, embed_scale
from vlm_export.gguf.class_row import in_order
from vlm_export.gguf.file import write_gguf
from vlm_export.gguf.mmproj import tower, unsupported, write_mmproj, write_tower
from vlm_export.gguf.mtmd import CLASS_ROW_ISSUE, Mtmd, bitmap, measure_mmproj
from vlm_export.gguf.tensors import tensors
from vlm_export.gguf.tower import Tower, Weight
from vlm_export.parity import distance
from vlm_export.reference import compute_reference, pixel_values
from vlm_export.target import silent
from vlm_models.errors import BundleError, CheckpointError, RecipeError
from vlm_models.model import Model, load_model
from vlm_quant.gguf_types import GGUF_TYPES

CASES: dict[str, dict[str, Any]] = {
    "clip": {},
    "clip, the last layer": {"feature_layer": -1},
    "clip, embeddings and layers in any order": {"feature_layer": [-1, 0, 1]},
    "clip, embeddings alone": {"feature_layer": 0},
    "clip of 49 patches, no projector bias": {"image_size": 56, "projector_bias": False},
    "clip for gemma, which scales rows": {"text": "gemma"},
    "siglip": {"tower": "siglip", "strategy": "full", "feature_layer": -1, "text": "qwen2", "dtype": "bfloat16"},
    "siglip, embeddings alone": {"tower": "siglip", "strategy": "full", "feature_layer": 0},
    "siglip, a layer twice": {"tower": "siglip", "strategy": "full", "feature_layer": [2, -1, 2]},
    "siglip, pixels from -1 to 1": {
        "tower": "siglip",
        "strategy": "full",
        "processor_options": {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [0.9] * 3},
    },
}
SIGLIP: dict[str, Any] = {"tower": "siglip", "strategy": "full"}


def language(model: Model, folder: Path) -> Path:
    """The model's decoder as GGUF without vocabulary, which an mmproj is opened for."""
    path = folder / "language_model.gguf"
    weights, arch = tensors(model.checkpoint, model.spec), architecture(model.spec.language, 128)
    write_gguf(path, arch, {}, weights, GGUF_TYPES["f32"], {"tokenizer.ggml.model": "none"}, progress=silent)
    return path


def rows(model: Model, mmproj: Path, pixels: np.ndarray) -> np.ndarray:
    """What llama.cpp's image path hands to the language model's first layer."""
    opened = Mtmd(mmproj, language(model, mmproj.parent), threads=1)
    out = opened.rows(pixels, model.spec.projector.out_features) * np.float32(embed_scale(model.spec.language))
    opened.close()
    return out


def expected(model: Model, picture: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """The checkpoint's own rows of a picture, and its pixels as prepared for it."""
    pixels = pixel_values(model, picture)[0]
    with torch.inference_mode():
        embeds = model.projector()(model.vision_encoder()(torch.from_numpy(pixels)[None]))[0].numpy()
    return embeds, bitmap(pixels, model.spec.preprocess)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("type", "limit"), [("f32", 1e-3), ("f16", 5e-3)])
def test_llama_cpp_projects_the_rows_of_the_checkpoint(
    case: str, type: Any, limit: float, make_tiny: MakeTiny, picture: Image.Image, tmp_path: Path
) -> None:
    model = load_model(make_tiny(**CASES[case]))
    write_mmproj(model, tmp_path / "mmproj.gguf", type=type)
    want, pixels = expected(model, picture)
    got = rows(model, tmp_path / "mmproj.gguf", pixels)
    assert got.shape == want.shape
    assert distance(want, got)["relative_l2"] <= limit
    each = np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)
    assert each.max() <= 5 * limit


@pytest.mark.parametrize("activation", ["gelu", "silu", "gelu_pytorch_tanh"])
def test_activations_of_the_tower_are_named_in_the_file(
    activation: str, tiny: Path, picture: Image.Image, tmp_path: Path
) -> None:
    folder = copy(tiny, tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["hidden_act"] = activation
    (folder / "config.json").write_text(json.dumps(config))
    model = load_model(folder)
    write_mmproj(model, tmp_path / "mmproj.gguf", type="f32")
    want, pixels = expected(model, picture)
    assert distance(want, rows(model, tmp_path / "mmproj.gguf", pixels))["relative_l2"] <= 1e-3


def test_rows_that_are_all_alike_or_extreme_are_still_told_apart(tiny: Path, tmp_path: Path) -> None:
    model = load_model(tiny)
    write_mmproj(model, tmp_path / "mmproj.gguf", type="f16")
    noise = np.random.default_rng(1).choice([0, 255], (32, 32, 3)).astype(np.uint8)
    for pixels in (np.zeros((32, 32, 3), np.uint8), np.full((32, 32, 3), 255, np.uint8), noise):
        want, prepared = expected(model, Image.fromarray(pixels))
        assert distance(want, rows(model, tmp_path / "mmproj.gguf", prepared))["relative_l2"] <= 5e-3


@pytest.mark.parametrize("picture_of", ["grey", "noise"])
def test_the_moving_block_finds_every_row_with_products_that_fp16_holds(picture_of: str, tiny: Path) -> None:
    model = load_model(tiny)
    moved = in_order(tower(model))
    w = {name: weight.read().reshape(weight.shape).astype(np.float64) for name, weight in moved.weights.items()}
    eps, heads = moved.keys["attention.layer_norm_epsilon"], moved.keys["attention.head_count"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt(x.var(-1, keepdims=True) + eps) * w[f"{name}.weight"] + w[f"{name}.bias"]

    pixels = np.zeros((16, 192)) if picture_of == "grey" else np.random.default_rng(0).choice([-2.2, 2.2], (16, 192))
    kernel = w["v.patch_embd.weight"].reshape(-1, 192)
    x = np.concatenate([pixels @ kernel.T, w["v.class_embd"][None]]) + w["v.position_embd.weight"]
    y = norm(norm(x, "v.pre_ln"), "v.blk.0.ln1")
    q, k = (y @ w[f"v.blk.0.attn_{letter}.weight"].T for letter in "qk")
    q, k = (z.reshape(17, heads, -1)[:, 0] for z in (q / np.sqrt(len(kernel) / heads), k))
    products = np.abs(q[:, None] * k[None])
    assert products.max() < np.finfo(np.float16).max
    scores = q @ k.T
    right = np.roll(np.arange(17), 1)
    others = np.where(np.eye(17)[right] == 1, -np.inf, scores)
    assert (scores[np.arange(17), right] - others.max(-1)).min() >= 20


def test_the_plain_layout_of_clip_is_wrong_upstream(tiny: Path, picture: Image.Image, tmp_path: Path) -> None:
    """When this fails, llama.cpp's graph is mended, and CLIP towers must be written with plain=True."""
    model = load_model(tiny)
    write_mmproj(model, tmp_path / "mmproj.gguf", type="f32", plain=True)
    want, pixels = expected(model, picture)
    assert distance(want, rows(model, tmp_path / "mmproj.gguf", pixels))["cosine"] < 0.9


def test_an_mlp_as_wide_as_the_tower_is_not_turned_round(
    make_tiny: MakeTiny, picture: Image.Image, tmp_path: Path
) -> None:
    model = load_model(make_tiny(**SIGLIP))
    width = model.spec.vision.hidden_size
    for layer in model.vision_encoder().tower.encoder.layers:  # type: ignore[union-attr]
        layer.mlp.fc1.weight.data, layer.mlp.fc1.bias.data = layer.mlp.fc1.weight[:width], layer.mlp.fc1.bias[:width]
        layer.mlp.fc2.weight.data = layer.mlp.fc2.weight[:, :width]

    def cut(name: str, weight: Weight) -> Weight:
        if ".ffn_up." in name:
            return Weight((width, *weight.shape[1:]), weight.matrix, lambda: weight.read()[:width])
        if name.endswith(".ffn_down.weight"):
            return Weight((width, width), True, lambda: weight.read()[:, :width].copy())
        return weight

    whole = tower(model)
    narrow = Tower({**whole.keys, "feed_forward_length": width}, {n: cut(n, w) for n, w in whole.weights.items()})
    write_tower(narrow, tmp_path / "mmproj.gguf", model.spec, half=False)
    want, pixels = expected(model, picture)
    assert distance(want, rows(model, tmp_path / "mmproj.gguf", pixels))["relative_l2"] <= 1e-3


def test_the_file_says_what_it_is_and_holds_no_norm_that_would_be_applied(
    make_tiny: MakeTiny, tiny: Path, tmp_path: Path
) -> None:
    for folder, blocks, feature in ((make_tiny(**SIGLIP), 2, [2]), (tiny, 3, [3])):
        model = load_model(folder)
        write_mmproj(model, tmp_path / "mmproj.gguf")
        reader = GGUFReader(tmp_path / "mmproj.gguf")
        fields = {name: field.contents() for name, field in reader.fields.items()}
        assert fields["general.architecture"] == "clip"
        assert fields["general.type"] == fields["vlm.part"] == "mmproj"
        assert fields["vlm.fingerprint"] == model.spec.fingerprint
        assert (fields["clip.vision.block_count"], fields["clip.vision.feature_layer"]) == (blocks, feature)
        assert fields.get("vlm.class_row") == ("appended" if folder == tiny else None)
        names = {tensor.name for tensor in reader.tensors}
        assert not any("post_ln" in name for name in names)
        assert {"mm.0.weight", "mm.0.bias", "mm.2.weight", "mm.2.bias"} <= names


def test_the_moved_tower_is_an_eighth_wider_for_the_usual_heads(make_tiny: MakeTiny) -> None:
    whole = tower(load_model(make_tiny()))
    usual = {"attention.head_count": 16, "embedding_length": 1024, "image_size": 336, "patch_size": 14}
    shapes = {
        "v.patch_embd.weight": (1024, 3, 14, 14),
        "v.class_embd": (1024,),
        "v.position_embd.weight": (577, 1024),
        "mm.0.weight": (4096, 1024),
    }
    random = np.random.default_rng(0)
    weights = {n: _made(random.normal(0, 0.02, shape).astype(np.float32)) for n, shape in shapes.items()}
    wide = in_order(Tower({**whole.keys, **usual}, weights))
    assert wide.keys["embedding_length"] == 1152
    assert wide.weights["mm.0.weight"].shape == (4096, 1152)


def _made(values: np.ndarray) -> Weight:
    return Weight(values.shape, values.ndim > 1, lambda: values)


@pytest.mark.parametrize(
    ("options", "projector", "reason"),
    [
        ({"strategy": "full"}, "gelu", "one row for each of the 16 patches, this checkpoint takes 17"),
        ({"tower": "siglip"}, "gelu", "one row for each of the 16 patches, this checkpoint takes 15"),
        ({}, "relu", "computes GELU, this one relu"),
    ],
)
def test_what_the_graph_cannot_compute_is_named(
    options: dict[str, Any], projector: str, reason: str, make_tiny: MakeTiny, tmp_path: Path
) -> None:
    model = load_model(make_tiny(**options))
    spec = model.spec
    changed = Model(
        model.checkpoint, dataclasses.replace(spec, projector=dataclasses.replace(spec.projector, activation=projector))
    )
    assert reason in (unsupported(changed) or "")
    with pytest.raises(CheckpointError, match=reason):
        write_mmproj(changed, tmp_path / "mmproj.gguf")
    assert not (tmp_path / "mmproj.gguf").exists()


def test_a_tower_llama_cpp_has_no_graph_for_is_named(tiny: Path) -> None:
    model = load_model(tiny)
    other = dataclasses.replace(model.spec.vision, model_type="dinov2")
    changed = Model(model.checkpoint, dataclasses.replace(model.spec, vision=other))
    assert "no LLaVA graph for a dinov2 tower" in (unsupported(changed) or "")


def test_weights_beyond_fp16_are_refused_by_name(make_tiny: MakeTiny, tmp_path: Path) -> None:
    name = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"

    def change(weights: dict[str, torch.Tensor]) -> None:
        key = next(n for n in weights if n.endswith(name.removeprefix("vision_tower.vision_model.")))
        weights[key][0, 0] = 1e6

    model = load_model(rewrite(copy(make_tiny(**SIGLIP), tmp_path / "checkpoint"), change))
    with pytest.raises(RecipeError, match=r"v\.blk\.0\.ffn_up\.weight reaches 1e\+06, beyond fp16"):
        write_mmproj(model, tmp_path / "mmproj.gguf")
    write_mmproj(model, tmp_path / "mmproj.gguf", type="f32")


@pytest.mark.parametrize("options", [SIGLIP, {}])
@pytest.mark.parametrize("plain", [False, True])
def test_the_record_of_a_measurement(options: dict[str, Any], plain: bool, make_tiny: MakeTiny, tmp_path: Path) -> None:
    model = load_model(make_tiny(**options))
    path, clip = golden.write_picture(tmp_path), not options
    reference = compute_reference(model, path, golden.prompt(model.spec.prompt), tokens=1)
    write_mmproj(model, tmp_path / "mmproj.gguf", plain=plain)
    found = measure_mmproj(tmp_path / "mmproj.gguf", language(model, tmp_path), path, reference, model.spec, threads=1)
    assert found["exact"]["logits"]["relative_l2"] <= 1e-5
    assert found["prepared"]["rows"] == found["as_it_is"]["rows"] == 16
    prepared, as_it_is = (found[name]["image_embeds"] for name in ("prepared", "as_it_is"))
    if clip and plain:
        assert found["prepared"]["logits"]["relative_l2"] > 0.01
        assert "deviates" in found["note"]
    else:
        assert prepared["relative_l2"] <= 5e-3
        assert found["prepared"]["logits"]["relative_l2"] <= 5e-3
        assert found["note"].startswith("llama.cpp's own image path equals the checkpoint")
    if clip or plain:
        assert as_it_is["cosine"] < 0.95  # it pads where the checkpoint crops or squashes
    else:
        assert as_it_is["relative_l2"] <= 5e-3
    assert (CLASS_ROW_ISSUE in found["note"]) == clip
    assert "\n" not in found["note"]
    json.dumps(found)


def test_the_bitmap_normalises_back_to_the_pixel_values(make_tiny: MakeTiny, picture: Image.Image) -> None:
    model = load_model(make_tiny())
    pixels, spec = pixel_values(model, picture)[0], model.spec.preprocess
    levels = bitmap(pixels, spec).astype(np.float32).transpose(2, 0, 1)
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (spec.mean, spec.std))
    np.testing.assert_allclose((levels * np.float32(spec.rescale) - mean) / std, pixels, atol=1e-5)


def test_a_file_that_is_no_mmproj_is_refused_in_one_line(tiny: Path, tmp_path: Path) -> None:
    model = load_model(tiny)
    (tmp_path / "mmproj.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(BundleError, match=r"^mmproj\.gguf cannot be opened by llama\.cpp") as raised:
        Mtmd(tmp_path / "mmproj.gguf", language(model, tmp_path), threads=1)
    assert "\n" not in str(raised.value)
