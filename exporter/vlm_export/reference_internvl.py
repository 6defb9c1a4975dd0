"""InternVL's original files read once more, for the reference alone: from each tensor's name to the one in the file.

So a layer that was mixed up on the way to a bundle shows. Names are those of https://github.com/OpenGVLab/InternVL.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vlm_models.checkpoint import Array, Checkpoint, Stored, read_json
from vlm_models.model import Model
from vlm_models.weights import read_weights

_VISION = {
    "embeddings.cls_token": "embeddings.class_embedding",
    "embeddings.patch_embeddings.projection": "embeddings.patch_embedding",
    "embeddings.position_embeddings": "embeddings.position_embedding",
}
_BLOCK = {
    "attention.q_proj": "attn.qkv",
    "attention.k_proj": "attn.qkv",
    "attention.v_proj": "attn.qkv",
    "attention.projection_layer": "attn.proj",
    "attention.q_norm": "attn.q_norm",
    "attention.k_norm": "attn.k_norm",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "lambda_1": "ls1",
    "lambda_2": "ls2",
}
_INTERNLM2 = {
    "self_attn.q_proj": "attention.wqkv",
    "self_attn.k_proj": "attention.wqkv",
    "self_attn.v_proj": "attention.wqkv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
_PROJECTOR = {"layer_norm": "0", "linear_1": "1", "linear_2": "3"}


@dataclass(frozen=True)
class AsSaved(Checkpoint):
    """A checkpoint of which every tensor is looked up among `saved`, which have the original names."""

    saved: Mapping[str, Stored] = field(default_factory=dict)
    llm: Mapping[str, Any] = field(default_factory=dict)

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Rows start:stop, of a fused tensor as the original takes it apart after it has multiplied with it."""
        internlm2 = self.llm["architectures"][0] == "InternLM2ForCausalLM"
        stored = self.saved[_saved(name, internlm2)].array
        part = next((i for i, at in enumerate(("q_proj.", "k_proj.", "v_proj.")) if at in name), None)
        if part is None or not (internlm2 or name.startswith("vision_tower.")):
            return stored[start:stop]
        if name.startswith("vision_tower."):
            whole: Array = stored.reshape(3, -1, *stored.shape[1:])[part]
            return whole[start:stop]
        shared = self.llm["num_attention_heads"] // self.llm["num_key_value_heads"]
        heads = stored.reshape(self.llm["num_key_value_heads"], shared + 2, -1, *stored.shape[1:])
        taken = heads[:, [slice(0, shared), slice(shared, shared + 1), slice(shared + 1, None)][part]]
        rows: Array = taken.reshape(-1, *stored.shape[1:])[start:stop]
        return rows


def as_saved(model: Model) -> Model:
    """The same model with its tensors read anew."""
    checkpoint = model.checkpoint
    values = {f.name: getattr(checkpoint, f.name) for f in dataclasses.fields(checkpoint)}
    llm = read_json(checkpoint.folder / "config.json", "")["llm_config"]
    return Model(AsSaved(**values, saved=dict(read_weights(checkpoint.folder)), llm=llm), model.spec)


def _saved(name: str, internlm2: bool) -> str:
    """What the original calls a tensor."""
    part, _, rest = name.partition(".")
    module, _, kind = rest.rpartition(".")
    if part == "multi_modal_projector":
        return f"mlp1.{_PROJECTOR[module]}.{kind}"
    if part == "lm_head":
        return f"language_model.{'output' if internlm2 else 'lm_head'}.{rest}"
    if part == "language_model" and (not internlm2 or not rest.startswith("layers.")):
        return "language_model.model." + (rest.replace("embed_tokens", "tok_embeddings") if internlm2 else rest)
    if part == "vision_tower" and rest.startswith("embeddings."):
        return f"vision_model.{_VISION[rest]}" if rest in _VISION else f"vision_model.{_VISION[module]}.{kind}"
    before, number, inside = _numbered(rest)
    known = _INTERNLM2 if part == "language_model" else _BLOCK
    if inside in known:  # a parameter of the block itself
        return f"vision_model.{before}s.{number}.{known[inside]}"
    module, _, kind = inside.rpartition(".")
    outer = "language_model.model." if part == "language_model" else "vision_model."
    plural = before if before.endswith("s") else f"{before}s"
    return f"{outer}{plural}.{number}.{known.get(module, module)}.{kind}"


def _numbered(name: str) -> tuple[str, str, str]:
    """ "encoder.layer.3.mlp.fc1.weight" → ("encoder.layer", "3", "mlp.fc1.weight")."""
    words = name.split(".")
    at = next(i for i, word in enumerate(words) if word.isdigit())
    return ".".join(words[:at]), words[at], ".".join(words[at + 1 :])
