"""Projectors against their papers' and codes' definitions, composed here of torch's own layers; through the targets."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

import vlm_export
import vlm_runtime
from checkpoints import copy, tiny_llava
from exporting import Command, command, rewrite
from originals import tiny_original
from projectors_like import KINDS, with_projector
from vlm_export import reference_projector
from vlm_models import projectors
from vlm_models.errors import CheckpointError
from vlm_models.model import Model, load_model
from vlm_models.spec import VLMSpec
from vlm_runtime.manifest import read_manifest

run = pytest.fixture(command)
ALL = (*KINDS, "identity")
# LDPv2 pools from a multiple of 12 × 12 rows; 5 × 5 rows are halved unevenly by LDP.
OPTIONS: dict[str, dict[str, Any]] = {
    "ldpnetv2": {"image_size": 48, "patch_size": 2},
    "identity": {"text_options": {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3}},
}
Make = Callable[[str], Path]


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A checkpoint with the projector, written once. Read only."""

    @cache
    def one(kind: str) -> Path:
        folder = tiny_llava(tmp_path_factory.mktemp(kind) / "checkpoint", **OPTIONS.get(kind, {"image_size": 40}))
        return with_projector(folder, kind)

    return one


def by_definition(folder: Path, kind: str, x: Tensor) -> Tensor:
    """The projector in channels-first pictures and torch.nn.functional, weights by the names in the file."""
    prefix = "multi_modal_projector."
    w = {k.removeprefix(prefix): t for k, t in load_file(folder / "model.safetensors").items() if k.startswith(prefix)}

    def linear(x: Tensor, name: str) -> Tensor:
        return functional.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return functional.layer_norm(x, (x.shape[-1],), w[f"{name}.weight"], w[f"{name}.bias"])

    if kind == "identity":
        return x
    if kind == "linear":
        return linear(x, "linear")
    if kind == "mlp2x_gelu_Norm":
        return norm(linear(functional.gelu(norm(linear(x, "0"), "1")), "3"), "4")
    if kind.startswith("mlp"):
        x = linear(x, "0")
        for i in range(2, 2 * int(kind[3]), 2):
            x = linear(functional.gelu(x), str(i))
        return x
    side, at = int(x.shape[1] ** 0.5), "mlp.mlp" if kind == "ldpnetv2" else "model.mlp"
    first, second = (0, 2) if kind == "ldpnetv2" else (1, 3)
    x = linear(functional.gelu(linear(x, f"{at}.{first}")), f"{at}.{second}")
    y = x.permute(0, 2, 1).reshape(x.shape[0], -1, side, side)
    width = y.shape[1]
    if kind == "ldpnetv2":
        y = functional.adaptive_avg_pool2d(y, (12, 12))
        y = y + functional.conv2d(y, w["peg.peg.0.weight"], w["peg.peg.0.bias"], padding=1, groups=width)
        return y.flatten(2).permute(0, 2, 1)

    def channel_norm(y: Tensor, name: str) -> Tensor:
        return norm(y.permute(0, 2, 3, 1), name).permute(0, 3, 1, 2)

    def conv(y: Tensor, name: str) -> Tensor:
        return functional.conv2d(y, w[f"{name}.weight"], w[f"{name}.bias"])

    for i in (1, 2):
        b, before = f"model.mb_block.{i}.block", y
        y = functional.conv2d(y, w[f"{b}.0.0.weight"], stride=i, padding=1, groups=width)
        y = functional.hardswish(channel_norm(y, f"{b}.0.1"))
        share = conv(functional.relu(conv(functional.adaptive_avg_pool2d(y, 1), f"{b}.1.fc1")), f"{b}.1.fc2")
        y = channel_norm(functional.conv2d(y * functional.hardsigmoid(share), w[f"{b}.2.0.weight"]), f"{b}.2.1")
        y = y + before if i == 1 else y
    return y.flatten(2).permute(0, 2, 1)


def features(model: Model, count: int = 3) -> Tensor:
    rows = model.spec.vision.image_tokens, model.spec.projector.in_features
    return torch.randn(count, *rows, generator=torch.Generator().manual_seed(1)) * 1.5


@pytest.mark.parametrize("kind", ALL)
def test_rows_are_those_of_the_definition(make: Make, kind: str) -> None:
    model = load_model(make(kind))
    x = features(model)
    with torch.inference_mode():
        got, other = model.projector()(x), reference_projector.projected(model, x)
        want = by_definition(make(kind), kind, x)
    assert got.shape == (3, model.spec.tile_tokens, model.spec.language.hidden_size) == want.shape
    assert (got - want).norm() / want.norm() < 1e-5
    assert (other - want).norm() / want.norm() < 1e-5


@pytest.mark.parametrize("kind", ALL)
def test_the_original_layout_carries_any_of_them(make: Make, tmp_path: Path, kind: str) -> None:
    """model.mm_projector.… and mm_projector_type, as the original codes save them."""
    made = tiny_original(tmp_path, **OPTIONS.get(kind, {"image_size": 40}))
    old, new = load_file(made.folder / "model.safetensors"), load_file(make(kind) / "model.safetensors")
    tensors = {name: tensor for name, tensor in old.items() if "mm_projector" not in name}
    for name, tensor in new.items():
        if name.startswith("multi_modal_projector."):
            tail = name.removeprefix("multi_modal_projector.").removeprefix("linear.")
            tensors[f"model.mm_projector.{tail}"] = tensor
    save_file(tensors, made.folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((made.folder / "config.json").read_text())
    (made.folder / "config.json").write_text(json.dumps({**config, "mm_projector_type": kind}))
    model = load_model(made.folder)
    x = features(model)
    with torch.inference_mode():
        want = by_definition(make(kind), kind, x)
        assert (model.projector()(x) - want).norm() / want.norm() < 1e-5
    assert model.spec.prompt.image_tokens == model.spec.tile_tokens == want.shape[1]


def test_the_rows_of_transformers_own_projector_are_its_module_s(tiny: Path) -> None:
    model = load_model(tiny)
    x = features(model)
    with torch.inference_mode():
        assert torch.allclose(model.projector()(x), reference_projector.projected(model, x), atol=1e-5)


@pytest.mark.parametrize(("kind", "tokens"), [("ldpnet", 9), ("ldpnetv2", 144), ("mlp3x_gelu", 25), ("linear", 25)])
def test_a_picture_takes_as_many_tokens_as_rows_come_out(make: Make, kind: str, tokens: int) -> None:
    spec = load_model(make(kind)).spec
    assert (spec.tile_tokens, spec.prompt.image_tokens, spec.projector.kind) == (tokens, tokens, kind)


def test_the_line_answers_as_the_checkpoint(make: Make, picture: Image.Image, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    parity = vlm_export.export(make("ldpnet"), "onnx", bundle, precision="fp32", greedy_tokens=4).parity["onnx"]
    assert parity["passed"]
    assert all(stage["relative_l2"] <= 1e-4 for stage in parity["stages"].values())
    answer = vlm_runtime.load(bundle, threads=1).answer("What is it?", [picture], max_new_tokens=2)
    assert answer.image_tokens == read_manifest(bundle).spec.tile_tokens


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in ALL if kind not in ("linear", "mlp1x_gelu", "mlp3x_gelu")])
def test_projectors_of_all_operators_go_to_gguf_and_tensorrt(make: Make, tmp_path: Path, kind: str) -> None:
    manifest = vlm_export.export(
        make(kind), ["onnx", "gguf", "tensorrt"], tmp_path / "bundle", precision="fp32", greedy_tokens=4
    )
    assert all(manifest.parity[target]["passed"] for target in ("onnx", "gguf", "tensorrt"))
    details = manifest.parts["language_model"]["gguf"].details
    assert ("no_mmproj" in details) == (kind != "mlp2x_gelu")  # llama.cpp's graph is two layers


def test_swapped_layers_fail_the_check(
    make: Make, tmp_path: Path, run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The projector that is exported reads its second layer where the third is, and the third where the second is."""
    real = projectors.projector

    def wrong(spec: VLMSpec) -> nn.Module:
        module: Any = real(spec)
        module.register_load_state_dict_pre_hook(swap)
        return module

    def swap(module: nn.Module, state: dict[str, Tensor], *rest: Any) -> None:
        for part in ("weight", "bias"):
            state[f"2.{part}"], state[f"4.{part}"] = state[f"4.{part}"], state[f"2.{part}"]

    monkeypatch.setattr("vlm_models.vision.projector_of", wrong)
    ran = run(make("mlp3x_gelu"), "--target", "onnx", "-o", tmp_path / "bundle", "--precision", "fp32")
    assert ran.code == 1
    assert "parity failed: image_embeds" in ran.err


@pytest.mark.slow
def test_an_activation_that_was_left_out_fails_the_check(
    make: Make, tmp_path: Path, run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projectors._HardSwish, "forward", lambda self, x: x)
    ran = run(make("ldpnet"), "--target", "onnx", "-o", tmp_path / "bundle", "--precision", "fp32")
    assert ran.code == 1
    assert "parity failed: image_embeds" in ran.err


def test_a_type_that_is_not_known_lists_those_that_are(make: Make, tmp_path: Path) -> None:
    folder = copy(make("linear"), tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    for kind in ("resampler", "mlp0x_gelu", "mlp2x_relu", "mlp2x_gelu_Norm\n"):
        (folder / "config.json").write_text(json.dumps({**config, "mm_projector_type": kind}))
        with pytest.raises(
            CheckpointError, match=r"mm_projector_type '.*' is not supported; supported are linear, ide"
        ):
            load_model(folder)


def test_widths_that_do_not_meet_are_both_named(make: Make, tmp_path: Path) -> None:
    narrow = with_projector(copy(make("mlp2x_gelu"), tmp_path / "narrow"), "mlp2x_gelu", rows=40)
    with pytest.raises(CheckpointError, match="projector takes rows of 40, but the vision tower gives rows of 48"):
        load_model(narrow)
    wide = with_projector(copy(make("ldpnetv2"), tmp_path / "wide"), "ldpnetv2", width=96)
    with pytest.raises(CheckpointError, match="projector gives rows of 96, but the language model takes rows of 64"):
        load_model(wide)
    bare = copy(make("linear"), tmp_path / "bare")
    config = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps({**config, "mm_projector_type": "identity"}))
    with pytest.raises(CheckpointError, match=r"\(identity\) the vision tower's rows of 48 do not meet .* of 64"):
        load_model(bare)


def test_transformers_projector_names_both_widths_too(tiny: Path, tmp_path: Path) -> None:
    def cut(tensors: dict[str, Tensor]) -> None:
        (name,) = (name for name in tensors if name.endswith("projector.linear_1.weight"))
        tensors[name] = tensors[name][:, :32].contiguous()

    with pytest.raises(CheckpointError, match="projector takes rows of 32, but the vision tower gives rows of 48"):
        load_model(rewrite(copy(tiny, tmp_path / "copy"), cut))


def test_rows_that_cannot_be_pooled_are_refused(make: Make, tmp_path: Path) -> None:
    folder = copy(make("ldpnet"), tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "mm_projector_type": "ldpnetv2"}))
    with pytest.raises(CheckpointError, match="ldpnetv2 pools 12 × 12 rows, not evenly from 5 × 5"):
        load_model(folder)
    changed = {**config, "vision_feature_select_strategy": "full"}
    (folder / "config.json").write_text(json.dumps(changed))
    with pytest.raises(CheckpointError, match="ldpnet needs rows that form a square, the vision tower gives 26"):
        load_model(folder)
