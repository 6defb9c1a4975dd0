"""Tiny checkpoints in the layout of OpenGVLab's own InternVL code, and what that code computes, written out here.

From https://github.com/OpenGVLab/InternVL: modeling_intern_vit.py, modeling_internvl_chat.py, modeling_internlm2.py and
conversation.py. The language models are transformers' own with the original's weights; InternLM2's fused projection is
taken apart after it is computed, as the original does.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from checkpoints import TEXT as TALK
from shuffled import CONTEXT, text_config, tokenizer_with

WIDTH, DEEP, HEADS, EDGE, PATCH, TEXT = 48, 3, 4, 28, 7, 64
_PUYU = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
SYSTEM = {
    "internvl2_5": (
        "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
    ),
    "Hermes-2": _PUYU,
    "phi3-chat": _PUYU,
}
_ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM", "internlm2": "InternLM2ForCausalLM"}
_MEAN, _STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def tiny_chat(
    folder: Path,
    *,
    text: str = "qwen2",
    template: str = "internvl2_5",
    vision: Mapping[str, Any] | None = None,
    **config: Any,
) -> Path:
    """Write a complete folder. `vision` and `config` change keys of config.json."""
    torch.manual_seed(0)
    folder.mkdir()
    tokenizer = tokenizer_with(CONTEXT, "<img>", "</img>", "<|end|>", "<|user|>", "<|assistant|>")
    llm = text_config("llama" if text == "internlm2" else text, tokenizer).to_dict()
    llm.pop("rope_parameters")
    llm |= {"architectures": [_ARCHITECTURES[text]], "rope_theta": 10000.0, "attn_implementation": "flash_attention_2"}
    if text == "internlm2":
        llm |= {"model_type": "internlm2", "bias": False, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    tower = {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "hidden_size": WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": DEEP,
        "num_attention_heads": HEADS,
        "image_size": EDGE,
        "patch_size": PATCH,
        "qkv_bias": True,
        "qk_normalization": False,
        "norm_type": "layer_norm",
        **(vision or {}),
    }
    whole = {
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
        "model_type": "internvl_chat",
        "vision_config": tower,
        "llm_config": llm,
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "ps_version": "v2",
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 6,
        "select_layer": -1,
        "force_image_size": EDGE,
        "template": template,
        **config,
    }
    (folder / "config.json").write_text(json.dumps(whole))
    tensors = {**_tower(tower), **_language(text, llm)}
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    tokenizer.save_pretrained(folder)
    return folder


def internlm2_tokenizer(folder: Path, blank: bool) -> sentencepiece.SentencePieceProcessor:
    """Give the folder a tokenizer as InternLM2's files are: SentencePiece, with code of its own that is not run."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TALK.splitlines()),
        model_writer=out,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        add_dummy_prefix=blank,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(out.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
    added = ["<|im_start|>", "<|im_end|>", "<img>", "</img>", CONTEXT]
    numbered = [(0, "<unk>"), (1, "<s>"), (2, "</s>"), *enumerate(added, pieces.get_piece_size())]
    kind = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "tokenizer_class": "InternLM2Tokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "added_tokens_decoder": {str(i): {"content": token, **kind} for i, token in numbered},
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "</s>",
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return pieces


def _tower(config: Mapping[str, Any]) -> dict[str, Tensor]:
    rows = (EDGE // PATCH) ** 2 + 1
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (1, 1, WIDTH),
        "embeddings.patch_embedding.weight": (WIDTH, 3, PATCH, PATCH),
        "embeddings.patch_embedding.bias": (WIDTH,),
        "embeddings.position_embedding": (1, rows, WIDTH),
    }
    for i in range(DEEP):
        for name, out, into in (
            *(("attn.qkv", 3 * WIDTH, WIDTH), ("attn.proj", WIDTH, WIDTH)),
            *(("mlp.fc1", 96, WIDTH), ("mlp.fc2", WIDTH, 96)),
        ):
            shapes |= {f"encoder.layers.{i}.{name}.weight": (out, into), f"encoder.layers.{i}.{name}.bias": (out,)}
        norms = ["norm1.weight", "norm2.weight", "ls1", "ls2"]
        norms += ["norm1.bias", "norm2.bias"] if config["norm_type"] == "layer_norm" else []
        norms += ["attn.q_norm.weight", "attn.k_norm.weight"] if config["qk_normalization"] else []
        shapes |= {f"encoder.layers.{i}.{name}": (WIDTH,) for name in norms}
        if not config["qkv_bias"]:
            del shapes[f"encoder.layers.{i}.attn.qkv.bias"]
    named = {f"vision_model.{name}": shape for name, shape in shapes.items()}
    named |= {f"mlp1.0.{kind}": (4 * WIDTH,) for kind in ("weight", "bias")}
    named |= {"mlp1.1.weight": (TEXT, 4 * WIDTH), "mlp1.1.bias": (TEXT,), "mlp1.3.weight": (TEXT, TEXT)}
    named |= {"mlp1.3.bias": (TEXT,)}
    one = ("norm", "ls1", "ls2", "mlp1.0.weight")
    return {
        name: torch.randn(shape) * 0.12 + (0.8 if any(part in name for part in one) and len(shape) == 1 else 0.0)
        for name, shape in named.items()
    }


def _language(text: str, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights of transformers' model, InternLM2's with its names and the fused projection."""
    state = {name: torch.randn(t.shape) * 0.12 for name, t in _model(text, config).state_dict().items()}
    state = {name: t + 0.9 if "norm" in name else t * 4 if "embed" in name else t for name, t in state.items()}
    if text != "internlm2":
        return {f"language_model.{name}": t for name, t in state.items()}
    names = {
        "model.embed_tokens.": "model.tok_embeddings.",
        "lm_head.": "output.",
        "self_attn.o_proj.": "attention.wo.",
        "mlp.gate_proj.": "feed_forward.w1.",
        "mlp.up_proj.": "feed_forward.w3.",
        "mlp.down_proj.": "feed_forward.w2.",
        "post_attention_layernorm.": "ffn_norm.",
        "input_layernorm.": "attention_norm.",
    }
    out = {}
    for name, tensor in state.items():
        for theirs, own in names.items():
            name = name.replace(theirs, own)
        if ".self_attn." not in name:
            out[f"language_model.{name}"] = tensor
    rows = (config["num_attention_heads"] + 2 * config["num_key_value_heads"]) * 16
    for i in range(config["num_hidden_layers"]):
        out[f"language_model.model.layers.{i}.attention.wqkv.weight"] = torch.randn(rows, TEXT) * 0.12
    return out


def _model(text: str, config: Mapping[str, Any]) -> Any:
    classes: dict[str, tuple[Any, Any]] = {
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    }
    made, model = classes["llama" if text == "internlm2" else text]
    left = ("architectures", "attn_implementation", "model_type", "rope_scaling", "bias")
    return model(made(**{k: v for k, v in config.items() if k not in left}, attn_implementation="eager")).eval()


class _Part(torch.nn.Module):
    """Queries, keys or values out of InternLM2's fused projection, computed whole and then taken apart."""

    def __init__(self, weight: Tensor, part: str, groups: int, size: int) -> None:
        super().__init__()
        self.fused, self.part, self.groups, self.size = weight, part, groups, size

    def forward(self, x: Tensor) -> Tensor:
        states = F.linear(x, self.fused).unflatten(-1, (self.groups, -1, self.size))
        taken = {"q": states[..., :-2, :], "k": states[..., -2, :], "v": states[..., -1, :]}[self.part]
        return taken.flatten(2)


class Original:
    """The original code's way from pictures and a question to logits."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.state = load_file(folder / "model.safetensors")
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
        self.language = self._loaded()

    def _loaded(self) -> Any:
        llm = self.config["llm_config"]
        text = {v: k for k, v in _ARCHITECTURES.items()}[llm["architectures"][0]]
        model = _model(text, llm)
        own = {k.removeprefix("language_model."): v for k, v in self.state.items() if k.startswith("language_model.")}
        if text != "internlm2":
            model.load_state_dict(own)
            return model
        model.model.embed_tokens.weight.data = own["model.tok_embeddings.weight"]
        model.lm_head.weight.data = own["output.weight"]
        model.model.norm.weight.data = own["model.norm.weight"]
        for i, layer in enumerate(model.model.layers):
            get = {k.removeprefix(f"model.layers.{i}."): v for k, v in own.items()}
            fused, groups = get["attention.wqkv.weight"], llm["num_key_value_heads"]
            for part in "qkv":
                setattr(layer.self_attn, f"{part}_proj", _Part(fused, part, groups, 16))
            layer.self_attn.o_proj.weight.data = get["attention.wo.weight"]
            layer.mlp.gate_proj.weight.data = get["feed_forward.w1.weight"]
            layer.mlp.up_proj.weight.data = get["feed_forward.w3.weight"]
            layer.mlp.down_proj.weight.data = get["feed_forward.w2.weight"]
            layer.input_layernorm.weight.data = get["attention_norm.weight"]
            layer.post_attention_layernorm.weight.data = get["ffn_norm.weight"]
        return model

    def tiles(self, picture: Image.Image) -> np.ndarray:
        """dynamic_preprocess and build_transform: (N, 3, s, s)."""
        width, height = picture.size
        most = self.config["max_dynamic_patch"]
        shapes = {(i, j) for i in range(1, most + 1) for j in range(1, most + 1) if 1 <= i * j <= most}
        best, nearest = (1, 1), float("inf")
        for shape in sorted(shapes, key=lambda x: (x[0] * x[1], x[0])):
            apart = abs(width / height - shape[0] / shape[1])
            if apart < nearest:
                nearest, best = apart, shape
            elif apart == nearest and width * height > 0.5 * EDGE * EDGE * shape[0] * shape[1]:
                best = shape
        resized = picture.resize((EDGE * best[0], EDGE * best[1]), Image.Resampling.BICUBIC)
        boxes = [(i % best[0], i // best[0]) for i in range(best[0] * best[1])]
        cut = [resized.crop((x * EDGE, y * EDGE, (x + 1) * EDGE, (y + 1) * EDGE)) for x, y in boxes]
        if len(cut) != 1:
            cut.append(picture.resize((EDGE, EDGE), Image.Resampling.BICUBIC))
        return np.stack([((np.asarray(one) / 255 - _MEAN) / _STD).transpose(2, 0, 1) for one in cut])

    def rows(self, pixels: np.ndarray) -> Tensor:
        """InternVisionModel, pixel_shuffle and mlp1: (N, T', H)."""
        v, state = self.config["vision_config"], self.state

        def get(name: str) -> Tensor:
            return state[f"vision_model.{name}"]

        def norm(x: Tensor, name: str) -> Tensor:
            if v["norm_type"] == "rms_norm":
                return rms(x, f"{name}.weight")
            return F.layer_norm(x, (WIDTH,), get(f"{name}.weight"), get(f"{name}.bias"), 1e-6)

        def rms(x: Tensor, name: str) -> Tensor:
            return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * get(name)

        x = torch.from_numpy(pixels).float()
        x = F.conv2d(x, get("embeddings.patch_embedding.weight"), get("embeddings.patch_embedding.bias"), stride=PATCH)
        x = torch.cat([get("embeddings.class_embedding").expand(len(x), 1, -1), x.flatten(2).mT], 1)
        x = x + get("embeddings.position_embedding")
        for i in range(DEEP):
            at = f"encoder.layers.{i}."
            bias = state.get(f"vision_model.{at}attn.qkv.bias")
            qkv = F.linear(norm(x, f"{at}norm1"), get(f"{at}attn.qkv.weight"), bias)
            q, k, value = qkv.unflatten(-1, (3, WIDTH)).unbind(2)
            if v["qk_normalization"]:
                q, k = rms(q, f"{at}attn.q_norm.weight"), rms(k, f"{at}attn.k_norm.weight")
            q, k, value = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, value))
            mixed = ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1) @ value
            mixed = mixed.transpose(1, 2).flatten(2)
            x = x + F.linear(mixed, get(f"{at}attn.proj.weight"), get(f"{at}attn.proj.bias")) * get(f"{at}ls1")
            wide = F.gelu(F.linear(norm(x, f"{at}norm2"), get(f"{at}mlp.fc1.weight"), get(f"{at}mlp.fc1.bias")))
            x = x + F.linear(wide, get(f"{at}mlp.fc2.weight"), get(f"{at}mlp.fc2.bias")) * get(f"{at}ls2")
        patches = x[:, 1:].unflatten(1, (EDGE // PATCH, EDGE // PATCH))
        four = [patches[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
        x = torch.cat(four, -1).flatten(1, 2)
        x = F.layer_norm(x, (4 * WIDTH,), state["mlp1.0.weight"], state["mlp1.0.bias"])
        x = F.gelu(F.linear(x, state["mlp1.1.weight"], state["mlp1.1.bias"]))
        return F.linear(x, state["mlp1.3.weight"], state["mlp1.3.bias"])

    def query(self, question: str, tiles: Sequence[int]) -> str:
        """`chat` up to the tokenizer: `<image>` in the question stands for pictures of so many tiles."""
        name = self.config["template"]
        system = self.config.get("system_message", SYSTEM[name])
        if name == "phi3-chat":
            text = f"<|system|>\n{system}<|end|><|user|>\n{question}<|end|><|assistant|>\n"
        else:
            end = "<|im_end|>" if name == "Hermes-2" else "<|im_end|>\n"
            text = f"<|im_start|>system\n{system}{end}<|im_start|>user\n{question}{end}<|im_start|>assistant\n"
        for count in tiles:
            text = text.replace("<image>", f"<img>{CONTEXT * (4 * count)}</img>", 1)
        return text

    def logits(self, question: str, pictures: Sequence[Image.Image], tokens: Sequence[int]) -> tuple[list[int], Any]:
        """Prompt ids, and logits (len(tokens) + 1, V) after the prompt and after each of `tokens`."""
        tiles = [self.tiles(picture) for picture in pictures]
        ids = self.tokenizer(self.query(question, [len(t) for t in tiles]))["input_ids"]
        with torch.inference_mode():
            at = torch.tensor(ids) == self.tokenizer.convert_tokens_to_ids(CONTEXT)
            embeds = self.language.get_input_embeddings()(torch.tensor([*ids, *tokens]))
            embeds[: len(ids)][at] = torch.cat([self.rows(t) for t in tiles]).flatten(0, 1)
            return ids, self.language(inputs_embeds=embeds[None]).logits[0, len(ids) - 1 :].numpy()
