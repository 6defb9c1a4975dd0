"""A tiny bundle made by hand: a sound manifest and small files, without any checkpoint or graph behind it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

from vlm_models.spec import (
    LanguageSpec,
    PreprocessSpec,
    ProjectorSpec,
    PromptSpec,
    RopeSpec,
    VisionSpec,
    VLMSpec,
)
from vlm_runtime.manifest import FileEntry, Manifest, Part, Table, write_manifest

VOCAB, HIDDEN, IMAGE_ID = 37, 8, 5
SPEC = VLMSpec(
    family="llava",
    name="tiny",
    fingerprint="f" * 64,
    vision=VisionSpec("clip_vision_model", 32, 8, 16, 2, (-2,), "default", 16),
    projector=ProjectorSpec(16, 12, HIDDEN, "gelu", True),
    language=LanguageSpec(
        model_type="llama",
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=16,
        layers=2,
        heads=2,
        kv_heads=1,
        head_dim=4,
        norm_eps=1e-6,
        activation="silu",
        rope=RopeSpec(10000.0, 4, "linear", {"factor": 2.0}),
        max_positions=64,
        tied=True,
        windows=(0, 0),
        rope_local=RopeSpec(100.0, 4),
    ),
    preprocess=PreprocessSpec(
        32, "shortest_edge", 32, 3, 1 / 255, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    ),
    prompt=PromptSpec("<image>", IMAGE_ID, 16, (2,), "<s>", "</s>", None),
)
STORED = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


def tiny_table(dtype: str = "F32") -> np.ndarray:
    """Random rows (VOCAB, HIDDEN) as stored; bfloat16 as the upper halves of float32."""
    values = np.random.default_rng(3).normal(0, 1, (VOCAB, HIDDEN)).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype("<u2") if dtype == "BF16" else values.astype(STORED[dtype])


def tiny_tokenizer_json() -> str:
    """A word-level tokenizer whose image token has the id IMAGE_ID."""
    words = ["<s>", "<unk>", "</s>", "USER", "ASSISTANT", "<image>", *(f"w{i}" for i in range(VOCAB - 6))]
    tokenizer = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>", "<image>"])
    return str(tokenizer.to_str())


def tiny_bundle(folder: Path, spec: VLMSpec = SPEC, dtype: Any = "F32") -> Path:
    """Write a bundle of one engine "onnx" and return its folder."""
    contents = {
        "embedding.bin": tiny_table(dtype).tobytes(),
        "tokenizer.json": tiny_tokenizer_json().encode(),
        "golden.npz": b"golden",
    }
    parts = {}
    for part in ("vision_encoder", "projector", "language_model"):
        graph, data = f"onnx/{part}.onnx", f"onnx/{part}.onnx.data"
        contents[graph], contents[data] = part.encode(), part.encode() * 40
        parts[part] = {"onnx": Part(graph, (graph, data), "fp16", {"opset": 21})}
    (folder / "onnx").mkdir(parents=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    manifest = Manifest(
        format="vlm-bundle",
        version=1,
        created="2026-01-01T00:00:00Z",
        spec=spec,
        max_context=64,
        embedding=Table("embedding.bin", dtype, VOCAB, HIDDEN),
        tokenizer="tokenizer.json",
        files={n: FileEntry(hashlib.sha256(c).hexdigest(), len(c)) for n, c in contents.items()},
        parts=parts,
        recipes={"onnx": "language=fp16,projector=fp16,vision=fp16"},
        parity={"onnx": {"passed": True, "stages": {}, "greedy": {"equal": 32, "of": 32}, "reference": "torch"}},
        golden="golden.npz",
        tools={"vlm-export": "0.1.0"},
    )
    write_manifest(folder, manifest)
    return folder
