"""LoRA folders: what is exported computes x·Wᵀ + s·(x·Aᵀ)·Bᵀ; nothing of an adapter is dropped in silence."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import loras
import vlm_export
import vlm_runtime
from checkpoints import copy, hf_model, respell
from exporting import Command, command
from originals import Made, tiny_original
from vlm_export.reference_adapter import as_trained
from vlm_models import adapter as adapters
from vlm_models.checkpoint import LowRank, Sources, open_checkpoint
from vlm_models.model import load_model
from vlm_runtime.manifest import read_manifest

run = pytest.fixture(command)
TOLERANCE = 1e-5
LAYERS = re.compile(r"(q_proj|v_proj|down_proj|fc1|linear_1|lm_head)$")  # of language model, tower, projector, head
Tensors = dict[str, Tensor]


def linears(model: nn.Module, pattern: re.Pattern[str] = LAYERS) -> dict[str, tuple[int, int]]:
    """Shapes of the linear layers whose names end so, as the model that is trained calls them."""
    found = ((name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and pattern.search(name))
    return {name: (m.out_features, m.in_features) for name, m in found}


@pytest.fixture(scope="session")
def trained(tiny: Path) -> Tensors:
    """Factors of rank 4 for 16 layers of the tiny LLaVA."""
    return loras.factors(linears(hf_model(tiny)), lambda module: 4)


@pytest.fixture(scope="session")
def folder(tiny: Path, trained: Tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEFT adapter of the tiny LLaVA, and nothing else. Read only."""
    return loras.adapter(tmp_path_factory.mktemp("lora") / "adapter", tiny, trained)


def logits_by_hooks(base: Path, tensors: Tensors, scale: Callable[[str], float], picture: Image.Image) -> np.ndarray:
    """(S, V) of transformers' model with its weights as they were and the adapter beside them."""
    model = loras.apply(hf_model(base), tensors, scale)
    processor = transformers.AutoProcessor.from_pretrained(base)
    inputs = processor(images=picture, text="<image>\nWhat is it?", return_tensors="pt")
    with torch.inference_mode():
        return np.asarray(model(**inputs).logits[0])


def logits_of(folder: Path, picture: Image.Image, sources: Sources | None = None) -> np.ndarray:
    """(S, V) by the modules that are exported."""
    model = load_model(folder, sources or Sources())
    processor = transformers.AutoProcessor.from_pretrained(model.checkpoint.files)
    inputs = processor(images=picture, text="<image>\nWhat is it?", return_tensors="pt")
    ids = inputs["input_ids"][0]
    table = torch.from_numpy(np.array(model.checkpoint.rows("language_model.embed_tokens.weight"), np.float32))
    with torch.inference_mode():
        rows = table[ids]
        rows[ids == model.spec.prompt.image_token_id] = model.projector()(
            model.vision_encoder()(inputs["pixel_values"])
        )[0]
        return np.asarray(model.language_model().forward(rows, last_row=False))


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


VARIANTS: dict[str, tuple[dict[str, Any], Callable[[str], int], Callable[[str], float]]] = {
    "alpha over r": ({}, lambda m: 4, lambda m: 10 / 4),
    "rank-stabilised": ({"use_rslora": True}, lambda m: 4, lambda m: 10 / 2),
    "fan_in_fan_out, which linear layers ignore": ({"fan_in_fan_out": True}, lambda m: 4, lambda m: 10 / 4),
    "ranks and alphas of their own": (
        {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.fc1": 8, "proj": 64}, "alpha_pattern": {"lm_head": 3}},
        lambda m: 2 if m.endswith("q_proj") else 8 if m.endswith("layers.1.mlp.fc1") else 4,
        lambda m: (3 if m == "lm_head" else 10) / (2 if m.endswith("q_proj") else 8 if "layers.1.mlp.fc1" in m else 4),
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_the_adapter_beside_the_weights(
    tiny: Path, picture: Image.Image, tmp_path: Path, variant: str
) -> None:
    config, rank, scale = VARIANTS[variant]
    tensors = loras.factors(linears(hf_model(tiny)), rank)
    lora = loras.adapter(tmp_path / "lora", tiny, tensors, **config)
    want = logits_by_hooks(tiny, tensors, scale, picture)
    assert relative(logits_of(lora, picture), want) < TOLERANCE
    assert relative(logits_of(tiny, picture), want) > 0.1  # the adapter matters


@pytest.mark.parametrize("style", ["4.3x", "4.5x", "5.x"])
def test_base_and_adapter_may_be_spelled_by_transformers_of_different_years(
    tiny: Path, trained: Tensors, picture: Image.Image, tmp_path: Path, style: str
) -> None:
    respell(copy(tiny, tmp_path / "base"), style)
    old = {
        name.replace("model.language_model.", "language_model.model.")
        .replace("model.vision_tower.", "vision_tower.vision_model.")
        .replace("model.multi_modal_projector.", "multi_modal_projector.")
        .replace("lm_head.", "language_model.lm_head."): tensor
        for name, tensor in trained.items()
    }
    lora = loras.adapter(tmp_path / "lora", "../base", old, file="bin")
    assert relative(logits_of(lora, picture), logits_by_hooks(tiny, trained, lambda m: 2.5, picture)) < TOLERANCE


def test_a_half_precision_base_and_adapter_are_merged_in_float32(make_tiny: Any, tmp_path: Path) -> None:
    base = make_tiny(text="qwen2", dtype="bfloat16", text_options={"tie_word_embeddings": True})
    shapes = linears(hf_model(base), re.compile("layers.0.*(k_proj|fc2)$"))
    tensors = {name: t.bfloat16() for name, t in loras.factors(shapes, lambda m: 4).items()}
    model = load_model(loras.adapter(tmp_path / "lora", base, tensors))
    before, name = open_checkpoint(base), "language_model.layers.0.self_attn.k_proj.weight"
    (key,) = (k.removesuffix(".lora_A.weight") for k in tensors if "language_model" in k and "lora_A" in k)
    up, down = (np.asarray(tensors[f"{key}.lora_{side}.weight"].double()) for side in "BA")
    want = before.rows(name).astype(np.float64) + 2.5 * up @ down
    assert model.checkpoint.dtype(name) == "F32"
    assert np.abs(model.checkpoint.rows(name) - want).max() < 1e-6
    assert np.abs(model.checkpoint.rows(name, 7, 20) - want[7:20]).max() < 1e-6
    assert model.checkpoint.dtype("language_model.norm.weight") == "BF16"


def test_the_embedding_of_a_tied_model_is_adapted_alone(make_tiny: Any, tmp_path: Path) -> None:
    base = make_tiny(text="qwen2", text_options={"tie_word_embeddings": True})
    before = open_checkpoint(base)
    rows, columns = before.shape("language_model.embed_tokens.weight")
    generator = torch.Generator().manual_seed(2)
    down, up = (torch.randn(*shape, generator=generator) for shape in ((4, rows), (columns, 4)))
    name = "model.language_model.embed_tokens.lora_embedding_"
    folder = loras.adapter(tmp_path / "lora", base, {f"{name}A": down, f"{name}B": up})
    model = load_model(folder)
    table = before.rows("language_model.embed_tokens.weight")
    want = table + 2.5 * (up @ down).T.numpy()
    assert np.abs(model.checkpoint.rows("language_model.embed_tokens.weight") - want).max() < 1e-5
    assert not model.spec.language.tied
    assert np.array_equal(model.checkpoint.rows("lm_head.weight"), table)


def test_a_convolution_is_adapted_too(tiny: Path, tmp_path: Path) -> None:
    """PEFT's pair of convolutions: of the patches to r channels, then 1 × 1."""
    module, generator = "model.vision_tower.embeddings.patch_embedding", torch.Generator().manual_seed(6)
    down, up = (torch.randn(*shape, generator=generator) * 0.2 for shape in ((4, 3, 8, 8), (48, 4, 1, 1)))
    lora = loras.adapter(tmp_path / "lora", tiny, {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up})
    pixels = torch.randn(2, 3, 32, 32, generator=generator)
    with torch.inference_mode():
        convolution = hf_model(tiny).get_submodule(module)
        beside = nn.functional.conv2d(nn.functional.conv2d(pixels, down, stride=8), up)
        want = (convolution(pixels) + 2.5 * beside).numpy()
        for model in (load_model(lora), as_trained(load_model(lora))):
            got = model.vision_encoder().tower.get_submodule("embeddings.patch_embedding")(pixels)
            assert relative(got.numpy(), want) < TOLERANCE


def test_layers_that_were_trained_whole_replace_the_base_s(tiny: Path, trained: Tensors, tmp_path: Path) -> None:
    table = torch.randn(open_checkpoint(tiny).shape("lm_head.weight"))
    norm = torch.rand(64) + 0.5
    more = {
        **{name: t for name, t in trained.items() if "lm_head" not in name},
        "lm_head.modules_to_save.default.weight": table,
        "model.language_model.norm.modules_to_save.weight": norm,
        "model.multi_modal_projector.linear_2.weight": torch.eye(64),
    }
    checkpoint = load_model(loras.adapter(tmp_path / "lora", tiny, more, modules_to_save=["lm_head"])).checkpoint
    assert np.array_equal(checkpoint.rows("lm_head.weight"), table.numpy())
    assert np.array_equal(checkpoint.rows("language_model.norm.weight"), norm.numpy())
    assert np.array_equal(checkpoint.rows("multi_modal_projector.linear_2.weight"), np.eye(64))
    assert "3 tensors that were trained whole" in checkpoint.notes[1]


def test_the_line_answers_as_the_adapted_model(
    tiny: Path, folder: Path, trained: Tensors, picture: Image.Image, picture_file: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    manifest = vlm_export.export(folder, "onnx", bundle, precision="fp32", greedy_tokens=4)
    assert manifest.parity["onnx"]["passed"]
    model = vlm_runtime.load(bundle, threads=1)
    answer = model.answer("<image>\nWhat is it?", [picture_file], raw=True, max_new_tokens=1)
    want = logits_by_hooks(tiny, trained, lambda m: 2.5, picture)
    assert answer.token_ids[0] == int(want[-1].argmax())


@pytest.mark.slow
def test_it_goes_to_gguf_and_tensorrt(folder: Path, tmp_path: Path) -> None:
    manifest = vlm_export.export(folder, ["gguf", "tensorrt"], tmp_path / "bundle", precision="fp32", greedy_tokens=4)
    assert all(record["passed"] for record in manifest.parity.values())


def export_fails(run: Command, folder: Path, output: Path) -> str:
    ran = run(folder, "--target", "onnx", "-o", output, "--precision", "fp32", "--greedy-tokens", "4")
    assert ran.code == 1
    return ran.err


MISTAKES: dict[str, tuple[str, Any, str]] = {
    "alpha left out": ("scale_of", lambda folder, config, module: (4, 0.25), "image_features"),
    "factors of a wrong layer": ("LowRank", lambda up, down, scale: LowRank(up.copy()[::-1], down, scale), "image_"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_merge_fails_the_check(
    folder: Path, tmp_path: Path, run: Command, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    name, wrong, stage = MISTAKES[mistake]
    monkeypatch.setattr(adapters, name, wrong)
    assert f"parity failed: {stage}" in export_fails(run, folder, tmp_path / "bundle")


@pytest.mark.slow
def test_an_adapter_of_the_tower_that_was_dropped_fails_the_check(
    folder: Path, tmp_path: Path, run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = adapters.read_adapter

    def without(path: Path) -> adapters.Adapter:
        found = real(path)
        kept = {name: one for name, one in found.low_rank.items() if "vision" not in name}
        return dataclasses.replace(found, low_rank=kept)

    monkeypatch.setattr("vlm_models.layouts.lora.read_adapter", without)
    assert "parity failed: image_features" in export_fails(run, folder, tmp_path / "bundle")


def test_the_reference_reads_the_adapter_by_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = load_model(folder)
    monkeypatch.setattr(LowRank, "add", lambda self, rows, start, stop: rows)
    reference = as_trained(load_model(folder)).checkpoint
    monkeypatch.undo()
    assert reference.adapted
    for name in reference.adapted:
        assert np.allclose(reference.rows(name, 3, 9), right.checkpoint.rows(name, 3, 9), atol=1e-6)


def test_another_adapter_is_another_checkpoint(tiny: Path, folder: Path, trained: Tensors, tmp_path: Path) -> None:
    name = next(iter(trained))
    middle = trained[name].clone()
    middle[2, 30] += 1
    other = loras.adapter(tmp_path / "other", tiny, {**trained, name: middle})
    marks = {open_checkpoint(path).fingerprint for path in (tiny, folder, other)}
    assert len(marks) == 3


def test_a_tokenizer_beside_the_adapter_counts_before_the_base_s(tiny: Path, folder: Path, tmp_path: Path) -> None:
    lora = Path(shutil.copytree(folder, tmp_path / "lora"))
    (lora / "adapter_config.json").write_text(json.dumps({**loras.CONFIG, "base_model_name_or_path": str(tiny)}))
    shutil.copyfile(tiny / "tokenizer.json", lora / "tokenizer.json")
    own = json.loads((tiny / "tokenizer_config.json").read_text())
    (lora / "tokenizer_config.json").write_text(json.dumps({**own, "model_max_length": 99}))
    checkpoint = open_checkpoint(lora)  # its files go with it
    files = checkpoint.files
    assert json.loads((files / "tokenizer_config.json").read_text())["model_max_length"] == 99
    assert (files / "processor_config.json").is_file() or (files / "preprocessor_config.json").is_file()


# LLaVA's own LoRA folders.


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A LLaVA in the original layout, its tower apart. Read only."""
    return tiny_original(tmp_path_factory.mktemp("original"), name="llava-v1.5-tiny", carried=False)


def as_llava_trains(made: Made, to: Path, *, bare: bool) -> tuple[Path, Tensors, Tensors]:
    """config.json, adapter and non_lora_trainables.bin, on the whole LLaVA or on its language model alone.

    Also the factors by the names of the twin's modules, and the projector that was trained whole.
    """
    base, tensors = made.folder, load_file(made.folder / "model.safetensors")
    if bare:
        base = Path(shutil.copytree(made.folder, to / "vicuna-tiny"))
        language = {name: tensor for name, tensor in tensors.items() if "mm_projector" not in name}
        save_file(language, base / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((base / "config.json").read_text())
        kept = {k: v for k, v in config.items() if not k.startswith(("mm_", "image_", "tune_", "freeze_", "use_mm"))}
        (base / "config.json").write_text(json.dumps({**kept, "model_type": "llama"}))
    names = [f"layers.{i}.{part}" for i in (0, 2) for part in ("self_attn.q_proj", "mlp.up_proj")]
    shapes = {f"model.{n}": tuple(tensors[f"model.{n}.weight"].shape) for n in names}
    tower = "vision_tower.vision_tower.vision_model.encoder.layers.1.mlp.fc2"  # of the tower that lies apart
    low_rank = loras.factors({**shapes, f"model.{tower}": (48, 96)}, lambda module: 4)
    folder = loras.adapter(to / "llava-v1.5-tiny-lora", base, low_rank)
    shutil.copyfile(made.folder / "config.json", folder / "config.json")
    generator = torch.Generator().manual_seed(9)
    projector = {
        name: torch.randn(tensor.shape, generator=generator) * 0.15
        for name, tensor in tensors.items()
        if "mm_projector" in name
    }
    saved = {f"base_model.model.{name}": tensor for name, tensor in projector.items()}
    torch.save(saved, folder / "non_lora_trainables.bin")
    twins = {
        name.replace("model.layers", "model.language_model.layers").replace(
            "vision_tower.vision_tower.vision_model", "vision_tower"
        ): factor
        for name, factor in low_rank.items()
    }
    return folder, twins, projector


@pytest.mark.parametrize("bare", [False, True], ids=["on a LLaVA", "on a language model alone"])
def test_llava_s_own_folders(original: Made, picture: Image.Image, tmp_path: Path, bare: bool) -> None:
    folder, low_rank, projector = as_llava_trains(original, tmp_path, bare=bare)
    twin = hf_model(original.twin)
    for number, layer in ((0, "linear_1"), (2, "linear_2")):
        for part in ("weight", "bias"):
            parameter = getattr(getattr(twin.model.multi_modal_projector, layer), part)
            parameter.data.copy_(projector[f"model.mm_projector.{number}.{part}"])
    loras.apply(twin, low_rank, lambda module: 2.5)
    pixels, ids = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(4)), [5, 9, 300, 7]
    sources = Sources(vision_tower=original.tower)
    model = load_model(folder, sources)
    with torch.inference_mode():
        rows = twin.model.get_image_features(pixels).pooler_output[0]
        embeds = torch.cat([twin.get_input_embeddings()(torch.tensor(ids)), rows])
        want = twin(inputs_embeds=embeds[None]).logits[0].numpy()
        ours = model.projector()(model.vision_encoder()(pixels))[0]
        table = np.array(model.checkpoint.rows("language_model.embed_tokens.weight")[ids], np.float32)
        got = model.language_model().forward(torch.cat([torch.from_numpy(table), ours]), last_row=False).numpy()
    assert relative(got, want) < TOLERANCE
    assert model.checkpoint.name == folder.name
    assert any("LoRA on 5 matrices, 1 of them of the vision tower" in note for note in model.checkpoint.notes)


def test_llava_s_own_folder_passes_the_check(original: Made, tmp_path: Path) -> None:
    folder, _, _ = as_llava_trains(original, tmp_path, bare=True)
    sources = Sources(vision_tower=original.tower)
    manifest = vlm_export.export(
        folder, "onnx", tmp_path / "bundle", precision="fp32", greedy_tokens=3, sources=sources
    )
    assert manifest.parity["onnx"]["passed"]
    assert read_manifest(tmp_path / "bundle").spec.prompt.chunked
