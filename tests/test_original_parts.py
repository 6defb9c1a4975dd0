"""Pieces of the original layout: towers known by their shapes, language models by words and tensors, odd configs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import vlm_runtime
from originals import tiny_original
from vlm_export import export
from vlm_models.checkpoint import Sources, Stored, open_checkpoint
from vlm_models.errors import CheckpointError
from vlm_models.family import read_spec
from vlm_models.model import load_model
from vlm_models.original import config as translated
from vlm_models.original.names import TOWER
from vlm_models.original.tower import Tower, find_tower
from vlm_models.projectors import projector


def shaped(*shape: int) -> Stored:
    """Zeros that take no memory."""
    return Stored("F16", np.broadcast_to(np.zeros((), np.float16), shape))


def carried(width: int, patch: int, places: int, hidden: int, layers: int, *, clip: bool) -> dict[str, Stored]:
    """Names and shapes that a tower's config is read from."""
    out = {
        f"{TOWER}embeddings.patch_embedding.weight": shaped(width, 3, patch, patch),
        f"{TOWER}embeddings.position_embedding.weight": shaped(places, width),
        **{f"{TOWER}encoder.layers.{i}.mlp.fc1.weight": shaped(hidden, width) for i in range(layers)},
    }
    return out | ({f"{TOWER}embeddings.class_embedding": shaped(width)} if clip else {})


def found(folder: Path, name: str, tensors: dict[str, Stored]) -> Tower:
    return find_tower(folder, {"mm_vision_tower": name}, tensors, Sources())


# The released config.json of each: https://huggingface.co/<name>
RELEASED: dict[str, tuple[dict[str, Stored], dict[str, Any]]] = {
    "openai/clip-vit-large-patch14-336": (
        carried(1024, 14, 577, 4096, 24, clip=True),
        {"image_size": 336, "num_attention_heads": 16, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    ),
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": (
        carried(1280, 14, 257, 5120, 32, clip=True),
        {"image_size": 224, "num_attention_heads": 16, "hidden_act": "gelu", "layer_norm_eps": 1e-5},
    ),
    "google/siglip-so400m-patch14-384": (
        carried(1152, 14, 729, 4304, 27, clip=False),
        {"image_size": 384, "num_attention_heads": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
    ),
    "google/siglip-base-patch16-224": (
        carried(768, 16, 196, 3072, 12, clip=False),
        {"image_size": 224, "num_attention_heads": 12, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
    ),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_towers_are_known_by_their_shapes(tmp_path: Path, name: str) -> None:
    tensors, wanted = RELEASED[name]
    tower = found(tmp_path, name, tensors)
    assert {key: tower.config[key] for key in wanted} == wanted
    assert tower.config["num_hidden_layers"] == tower.layers
    assert f"since {name} is not at hand" in tower.notes[0]
    kind = transformers.CLIPVisionConfig if "clip" in name.lower() else transformers.SiglipVisionConfig
    with torch.device("meta"):
        module: Any = transformers.AutoModel.from_config(kind(**tower.config))
    shapes = {TOWER + key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    assert all(shapes[key] == stored.array.shape for key, stored in tensors.items())


def test_a_tower_whose_last_layer_was_cut_off_gives_its_new_last_one(tmp_path: Path) -> None:
    tensors = carried(1152, 14, 729, 4304, 26, clip=False)
    tower = found(tmp_path, "google/siglip-so400m-patch14-384", tensors)
    assert (tower.config["num_hidden_layers"], tower.layers) == (26, 27)
    part = translated.vision_part({"mm_vision_select_layer": -2}, "siglip_vision_model", 26, tower.layers)
    assert part == {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    whole = translated.vision_part({}, "siglip_vision_model", 27, 27)
    assert whole["vision_feature_layer"] == -2


UNKNOWN = {
    "width": (carried(1000, 14, 577, 4096, 2, clip=True), "clip_vision_model of width 1000 is none of the known"),
    "other": ({f"{TOWER}trunk.stem.0.weight": shaped(64, 3, 4, 4)}, "has no 'vision_tower.embeddings.patch_embedding"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_a_tower_of_unknown_shapes_asks_for_its_config(tmp_path: Path, case: str) -> None:
    tensors, words = UNKNOWN[case]
    with pytest.raises(CheckpointError, match=rf"{words}.*'mobileclip_l' cannot be read.*--vision-tower"):
        found(tmp_path, "mobileclip_l", tensors)


def test_a_tower_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "eva").mkdir()
    (tmp_path / "eva" / "config.json").write_text('{"model_type": "eva_clip"}')
    save_file({"a": torch.zeros(1)}, tmp_path / "eva" / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds no CLIP or SigLIP vision tower"):
        found(tmp_path, "eva", {})
    save_file({"vision_model.encoder.layers.0.x": torch.zeros(1)}, tmp_path / "eva" / "model.safetensors")
    with pytest.raises(
        CheckpointError, match="model_type 'eva_clip' is not supported; clip, clip_vision_model, siglip"
    ):
        found(tmp_path, "eva", {})
    with pytest.raises(CheckpointError, match="names none"):
        find_tower(tmp_path, {}, {}, Sources())


def test_the_vision_part_of_a_whole_clip_is_taken(tmp_path: Path) -> None:
    options = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = transformers.CLIPTextConfig(**options, vocab_size=99, eos_token_id=2, bos_token_id=1)
    vision = transformers.CLIPVisionConfig(**options, image_size=16, patch_size=8)
    whole = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    whole.save_pretrained(tmp_path / "clip")
    tower = found(tmp_path, "clip", {})
    assert tower.config["model_type"] == "clip_vision_model"
    assert (tower.config["hidden_size"], tower.config["image_size"], tower.layers) == (32, 16, 2)
    own = {TOWER + name for name in transformers.CLIPVisionModel(vision).state_dict() if "position_ids" not in name}
    assert set(tower.tensors) == own


QKV = "language_model.layers.0.self_attn."
LANGUAGES: dict[str, tuple[str, str, tuple[str, ...], str]] = {
    "LLaVA 1.5": ("llava", "LlavaLlamaForCausalLM", (), "llama"),
    "LLaVA 1.6": ("llava_llama", "LlavaLlamaForCausalLM", (), "llama"),
    "Mistral": ("llava_mistral", "LlavaMistralForCausalLM", (), "mistral"),
    "OneVision": ("llava", "LlavaQwenForCausalLM", ("q_proj.bias",), "qwen2"),
    "nanoLLaVA": ("llava-qwen2", "LlavaQwen2ForCausalLM", ("q_proj.bias",), "qwen2"),
    "Bunny Qwen": ("bunny-qwen2", "BunnyQwenForCausalLM", ("q_proj.bias",), "qwen2"),
    "Bunny Phi-3": ("bunny-phi3", "BunnyPhi3ForCausalLM", ("qkv_proj.weight",), "phi3"),
    "Bunny Llama": ("bunny-llama", "BunnyLlamaForCausalLM", (), "llama"),
    "MobileVLM": ("mobilevlm", "MobileLlamaForCausalLM", (), "llama"),
    "ShareGPT4V": ("share4v", "Share4VLlamaForCausalLM", (), "llama"),
    "Gemma": ("llava_gemma", "LlavaGemmaForCausalLM", (), "gemma"),
    "Qwen3 by its norms": ("llava", "", ("q_norm.weight",), "qwen3"),
    "Qwen2 by its biases": ("llava", "", ("q_proj.bias",), "qwen2"),
    "Llama with biases": ("llava", "", ("q_proj.bias", "o_proj.bias"), "llama"),
}


@pytest.mark.parametrize("case", LANGUAGES)
def test_language_models_are_known_by_words_and_tensors(tmp_path: Path, case: str) -> None:
    model_type, architecture, tensors, wanted = LANGUAGES[case]
    config = {"model_type": model_type, "architectures": [architecture], "hidden_size": 8, "mm_hidden_size": 4}
    text = translated.language(tmp_path, config, {QKV + name: shaped(2) for name in tensors})
    assert text == {"model_type": wanted, "hidden_size": 8}


REFUSED = {"mpt": "LlavaMpt", "phi": "BunnyPhi", "stablelm": "BunnyStableLM", "minicpm": "BunnyMiniCPM"}


@pytest.mark.parametrize("word", REFUSED)
def test_other_language_models_are_refused_with_a_list(tmp_path: Path, word: str) -> None:
    config = {"model_type": f"llava_{word}", "architectures": [f"{REFUSED[word]}ForCausalLM"]}
    with pytest.raises(CheckpointError, match=f"language model '{word}' .* gemma, gemma2, llama, mistral, phi3, qwen2"):
        translated.language(tmp_path, config, {})


def test_old_configs_with_keys_of_other_codes_are_read(tmp_path: Path) -> None:
    old = {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 20000.0}
    strange = {"lora_r": 8, "max_sequence_length": 2048, "tokenizer_model_max_length": 2048, "bunny_data": [1, 2]}
    keys = {**old, **strange, "auto_map": {"AutoConfig": "a.B"}, "image_crop_resolution": 224}
    made = tiny_original(tmp_path, config={**keys, "mm_vision_select_feature": None, "mm_projector_type": None})
    tensors = load_file(made.folder / "model.safetensors")
    weight, bias = tensors.pop("model.mm_projector.0.weight"), tensors.pop("model.mm_projector.0.bias")
    linear = {"model.mm_projector.weight": weight, "model.mm_projector.bias": bias}
    kept = {name: t for name, t in tensors.items() if "mm_projector" not in name}
    save_file({**kept, **linear, "model.faster_token": torch.ones(64)}, made.folder / "model.safetensors")
    model = load_model(made.folder)
    rope = model.spec.language.rope
    assert (rope.type, rope.theta, rope.scaling) == ("linear", 20000.0, {"factor": 2.0})
    assert model.spec.projector.kind == "linear"
    assert "1 tensors of no part are left out: model.faster_token" in model.checkpoint.notes


def test_a_hub_download_is_called_what_the_model_is_called(tmp_path: Path) -> None:
    made = tiny_original(tmp_path, config={"mm_vision_tower": str(tmp_path / "tower")})
    place = tmp_path / "models--liuhaotian--llava-v1.6-34b" / "snapshots" / "a1b2"
    place.parent.mkdir(parents=True)
    made.folder.rename(place)
    checkpoint = open_checkpoint(place)
    assert checkpoint.name == "llava-v1.6-34b"
    assert any("chatml_direct, since the name" in note for note in checkpoint.notes)


def test_a_step_of_training_is_called_after_its_run(tmp_path: Path) -> None:
    made = tiny_original(tmp_path, config={"mm_vision_tower": str(tmp_path / "tower")})
    (tmp_path / "llava-v1.5-mine").mkdir()
    made.folder.rename(tmp_path / "llava-v1.5-mine" / "checkpoint-100")
    checkpoint = open_checkpoint(tmp_path / "llava-v1.5-mine" / "checkpoint-100")
    assert checkpoint.name == "llava-v1.5-mine_checkpoint-100"


def test_added_tokens_keep_their_ids(tmp_path: Path) -> None:
    made = tiny_original(tmp_path)
    path = made.folder / "added_tokens.json"
    path.write_text(json.dumps({"<im_end>": 402, "<im_patch>": 400, "<im_start>": 401}))
    model = load_model(made.folder)
    assert model.spec.prompt.image_token_id == 403
    path.write_text(json.dumps({"<im_patch>": 17}))
    with pytest.raises(CheckpointError, match=r"added_tokens.json gives '<im_patch>' the id 17, the tokenizer 400"):
        load_model(made.folder)


@pytest.mark.slow
@pytest.mark.parametrize("legacy", [True, False])
def test_gguf_reads_its_prompts_too(tmp_path: Path, legacy: bool) -> None:
    """Tokenizer, chunks and an image token beyond the table through llama.cpp."""
    made = tiny_original(tmp_path, vocabulary=400, legacy=legacy)
    manifest = export(made.folder, "gguf", tmp_path / "bundle", precision="fp32", max_context=256)
    assert manifest.parity["gguf"]["greedy"]["equal"] == 32
    answer = vlm_runtime.load(tmp_path / "bundle").answer(
        "What is this?", [tmp_path / "bundle" / "golden" / "image.png"], max_new_tokens=4
    )
    assert answer.image_tokens == 16


LINES: dict[str, dict[str, Any]] = {
    "Yi-VL-6B": {"config": {"mm_projector_type": "mlp2x_gelu_Norm", "model_type": "llava"}},
    "MobileVLM-1.7B": {"config": {"mm_projector_type": "ldpnet", "model_type": "mobilevlm"}},
    "MobileVLM_V2-1.7B": {
        "config": {"mm_projector_type": "ldpnetv2", "model_type": "mobilevlm"},
        "image_size": 96,
        "patch_size": 4,
    },
    "nanoLLaVA": {
        "config": {"model_type": "llava-qwen2", "image_aspect_ratio": "pad", "mm_vision_select_feature": None},
        "text": "qwen2",
        "tower": "siglip",
        "tokens": "bpe",
    },
}
CONVERSATION = {"Yi-VL-6B": "mm_default", "nanoLLaVA": "tokenizer"}
NANO = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
NANO += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


@pytest.mark.slow
@pytest.mark.parametrize("name", LINES)
def test_descendants_go_the_whole_line(tmp_path: Path, name: str) -> None:
    """Projector, conversation and the text that ends an answer, from the saved names to an answer of the bundle."""
    made = tiny_original(tmp_path, name=name, **LINES[name])
    if name == "nanoLLaVA":
        path = made.folder / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": NANO}))
    else:
        tensors = load_file(made.folder / "model.safetensors")
        kept = {key: tensor for key, tensor in tensors.items() if "mm_projector" not in key}
        module = projector(read_spec(open_checkpoint(made.folder)))
        generator = torch.Generator().manual_seed(0)
        noisy = {key: t + 0.1 * torch.randn(t.shape, generator=generator) for key, t in module.state_dict().items()}
        own = {f"model.mm_projector.{key}": tensor for key, tensor in noisy.items()}
        save_file({**kept, **own}, made.folder / "model.safetensors")
    manifest = export(made.folder, "onnx", tmp_path / "bundle", precision="fp32")
    assert manifest.parity["onnx"]["greedy"]["equal"] == 32
    wanted = CONVERSATION.get(name, "vicuna_v1")
    assert any(note.startswith(f"conversation: {wanted}, since") for note in manifest.notes)
    assert manifest.spec.prompt.stop == (("###",) if wanted == "mm_default" else ())
    model = vlm_runtime.load(tmp_path / "bundle", threads=1)
    picture = tmp_path / "bundle" / "golden" / "image.png"
    answer = model.answer("What is this?", [picture], max_new_tokens=4)
    assert answer.image_tokens == model.spec.tile_tokens
    chat = model.chat()
    assert "".join(chat.ask("What is this?", [picture], max_new_tokens=4)) == answer.text
    list(chat.ask("Sure?", max_new_tokens=2))
    assert chat.last is not None
    assert chat.last.image_tokens == model.spec.tile_tokens
