"""Tensors of OpenGVLab's own InternVL code by the names that transformers gives them, fused projections taken apart.

Names: modeling_intern_vit.py, modeling_internvl_chat.py and modeling_internlm2.py of
https://github.com/OpenGVLab/InternVL.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlm_models.checkpoint import Stored
from vlm_models.errors import CheckpointError
from vlm_models.layouts.huggingface import canonical

_TOWER = (
    (r"^vision_model\.embeddings\.class_embedding$", "vision_tower.embeddings.cls_token"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "vision_tower.embeddings.patch_embeddings.projection."),
    (r"^vision_model\.embeddings\.position_embedding$", "vision_tower.embeddings.position_embeddings"),
    (
        r"^vision_model\.encoder\.layers\.(\d+)\.attn\.proj\.",
        r"vision_tower.encoder.layer.\1.attention.projection_layer.",
    ),
    (
        r"^vision_model\.encoder\.layers\.(\d+)\.attn\.([qk])_norm\.",
        r"vision_tower.encoder.layer.\1.attention.\2_norm.",
    ),
    (r"^vision_model\.encoder\.layers\.(\d+)\.attn\.qkv\.", r"vision_tower.encoder.layer.\1.attention.qkv."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.norm1\.", r"vision_tower.encoder.layer.\1.layernorm_before."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.norm2\.", r"vision_tower.encoder.layer.\1.layernorm_after."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.ls([12])$", r"vision_tower.encoder.layer.\1.lambda_\2"),
    (r"^vision_model\.encoder\.layers\.", "vision_tower.encoder.layer."),
    (r"^mlp1\.0\.", "multi_modal_projector.layer_norm."),
    (r"^mlp1\.1\.", "multi_modal_projector.linear_1."),
    (r"^mlp1\.3\.", "multi_modal_projector.linear_2."),
)
_INTERNLM2 = (
    (r"^language_model\.model\.tok_embeddings\.", "language_model.embed_tokens."),
    (r"^language_model\.output\.", "lm_head."),
    (r"^(language_model)\.model(\.layers\.\d+\.)attention\.wo\.", r"\1\2self_attn.o_proj."),
    (r"^(language_model)\.model(\.layers\.\d+\.)attention\.wqkv\.", r"\1\2self_attn.wqkv."),
    (r"^(language_model)\.model(\.layers\.\d+\.)feed_forward\.w1\.", r"\1\2mlp.gate_proj."),
    (r"^(language_model)\.model(\.layers\.\d+\.)feed_forward\.w2\.", r"\1\2mlp.down_proj."),
    (r"^(language_model)\.model(\.layers\.\d+\.)feed_forward\.w3\.", r"\1\2mlp.up_proj."),
    (r"^(language_model)\.model(\.layers\.\d+\.)attention_norm\.", r"\1\2input_layernorm."),
    (r"^(language_model)\.model(\.layers\.\d+\.)ffn_norm\.", r"\1\2post_attention_layernorm."),
)


def canonical_tensors(
    folder: Path, llm: Mapping[str, Any], stored: Iterable[tuple[str, Stored]]
) -> Iterator[tuple[str, Stored]]:
    """Tensors by their canonical names, fused queries, keys and values apart; `llm` is the config's llm_config.

    Raises CheckpointError for weights of a LoRA, two spellings of one tensor, or a projection of another size.
    """
    internlm2 = llm["architectures"][0] == "InternLM2ForCausalLM"
    patterns = [(re.compile(p), to) for p, to in (*_TOWER, *(_INTERNLM2 if internlm2 else ()))]
    renamed = []
    for name, tensor in stored:
        if "lora_" in name:
            raise CheckpointError(f"{folder}: tensor {name!r} is of a LoRA that has not been merged; merge it first")
        found = next(((p, to) for p, to in patterns if p.match(name)), None)
        renamed.append((name if found is None else found[0].sub(found[1], name), tensor))
    for name, tensor in canonical(folder, renamed).items():
        before, _, kind = name.rpartition(".")
        if before.endswith(".attention.qkv"):
            rows = len(tensor.array) // 3
            for i, part in enumerate("qkv"):
                yield f"{before.removesuffix('qkv')}{part}_proj.{kind}", _rows(tensor, i * rows, (i + 1) * rows)
        elif before.endswith(".self_attn.wqkv"):
            for part, order in _groups(folder, llm, len(tensor.array)).items():
                name = f"{before.removesuffix('wqkv')}{part}_proj.{kind}"
                yield name, dataclasses.replace(tensor, order=order)
        else:
            yield name, tensor


def _rows(tensor: Stored, start: int, stop: int) -> Stored:
    """Rows start:stop that follow each other in the file."""
    part, size = tensor.array[start:stop], tensor.array[:1].nbytes
    first = tensor.span[0]
    span = (first + start * size, first + stop * size) if tensor.map is not None else tensor.span
    return dataclasses.replace(tensor, array=part, span=span)


def _groups(folder: Path, llm: Mapping[str, Any], rows: int) -> dict[str, np.ndarray[Any, np.dtype[np.int64]]]:
    """Which rows of InternLM2's wqkv are queries, keys, values: a key head stands after the queries that share it."""
    heads = int(llm.get("num_attention_heads", 32))
    groups = int(llm.get("num_key_value_heads") or heads)
    size = int(llm.get("hidden_size", 4096)) // heads
    if rows != (heads + 2 * groups) * size:
        raise CheckpointError(
            f"{folder}: wqkv has {rows} rows, but config.json asks for {heads} heads and {groups} key heads of {size}"
        )
    index = np.arange(rows).reshape(groups, heads // groups + 2, size)
    return {"q": index[:, :-2].reshape(-1), "k": index[:, -2].reshape(-1), "v": index[:, -1].reshape(-1)}
