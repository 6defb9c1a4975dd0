"""A tiny bundle that runs: three hand-made ONNX graphs of random weights with the I/O that the exporter writes."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tokenizers
from onnx import TensorProto, helper, numpy_helper
from tokenizers import decoders, models, pre_tokenizers, trainers

from bundles import SPEC
from vlm_models.spec import LanguageSpec, ProjectorSpec, PromptSpec, RopeSpec, VisionSpec, VLMSpec
from vlm_runtime.manifest import FileEntry, Manifest, Part, Table, write_manifest

HIDDEN, HEADS, KV, HEAD, LAYERS, IMAGE_TOKENS, FEATURES = 32, 2, 1, 16, 2, 4, 8
TEXT = "What colour is it? It is red, green or blue. Naïve café 東京 🙂 USER: ASSISTANT: " * 4
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>\n{% else %}{{ p['text'] }}{% endif %}"
    "{% endfor %}{% endif %}</s>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@functools.cache
def tokenizer() -> tokenizers.Tokenizer:
    """Byte-level BPE whose image token is a special one."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([TEXT], trainer)
    return made


def running_spec(**prompt: Any) -> VLMSpec:
    """The facts of the tiny model; `prompt` replaces fields of its PromptSpec."""
    vocab = tokenizer().get_vocab_size()
    language = LanguageSpec(
        model_type="llama",
        vocab_size=vocab,
        hidden_size=HIDDEN,
        intermediate_size=16,
        layers=LAYERS,
        heads=HEADS,
        kv_heads=KV,
        head_dim=HEAD,
        norm_eps=1e-6,
        activation="silu",
        rope=RopeSpec(10000.0, HEAD),
        max_positions=256,
        tied=False,
        windows=(0,) * LAYERS,
    )
    base = PromptSpec("<image>", 2, IMAGE_TOKENS, (1,), "<s>", "</s>", TEMPLATE)
    return dataclasses.replace(
        SPEC,
        vision=VisionSpec("clip_vision_model", 32, 16, FEATURES, 1, (-1,), "full", IMAGE_TOKENS),
        projector=ProjectorSpec(FEATURES, 8, HIDDEN, "gelu", False),
        language=language,
        prompt=dataclasses.replace(base, **prompt),
    )


def running_bundle(
    folder: Path, spec: VLMSpec | None = None, *, max_context: int = 96, dynamic: bool = False, seed: int = 0
) -> Path:
    """Write the bundle; `dynamic` leaves the length of the KV cache open in the graph, as `max` does not."""
    spec = spec or running_spec()
    random = np.random.default_rng(seed)
    (folder / "onnx").mkdir(parents=True)
    graphs = {
        "vision_encoder": vision_graph(random),
        "projector": projector_graph(random),
        "language_model": language_graph(random, spec.language.vocab_size, None if dynamic else max_context),
    }
    parts = {}
    for part, graph in graphs.items():
        name = f"onnx/{part}.onnx"
        save(graph, folder / name, part, spec.fingerprint)
        parts[part] = {"onnx": Part(name, (name,), "fp32")}
    table = random.standard_normal((spec.language.vocab_size, HIDDEN)).astype(np.float32)
    (folder / "embedding.bin").write_bytes(table.tobytes())
    tokenizer().save(str(folder / "tokenizer.json"))
    names = ["embedding.bin", "tokenizer.json", *(p["onnx"].graph for p in parts.values())]
    write_manifest(
        folder,
        Manifest(
            format="vlm-bundle",
            version=1,
            created="2026-01-01T00:00:00Z",
            spec=spec,
            max_context=max_context,
            embedding=Table("embedding.bin", "F32", *table.shape),
            tokenizer="tokenizer.json",
            files={n: entry(folder / n) for n in names},
            parts=parts,
            recipes={"onnx": "fp32"},
            parity={},
            golden=None,
            tools={},
        ),
    )
    return folder


def entry(path: Path) -> FileEntry:
    """What the manifest says of a file."""
    content = path.read_bytes()
    return FileEntry(hashlib.sha256(content).hexdigest(), len(content))


def save(graph: onnx.GraphProto, path: Path, part: str, fingerprint: str) -> None:
    """Write a graph with the metadata of its part."""
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    helper.set_model_props(model, {"vlm.part": part, "vlm.fingerprint": fingerprint})
    onnx.save(model, path)


def vision_graph(random: np.random.Generator) -> onnx.GraphProto:
    """pixel_values (N, 3, 32, 32) → image_features (N, 4, FEATURES): one convolution."""
    weight = (random.standard_normal((FEATURES, 3, 16, 16)) * 0.1).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["pixel_values", "w"], ["c"], strides=[16, 16]),
        helper.make_node("Reshape", ["c", "shape"], ["r"]),
        helper.make_node("Transpose", ["r"], ["image_features"], perm=[0, 2, 1]),
    ]
    weights = {"w": weight, "shape": np.array([0, FEATURES, -1], np.int64)}
    return _graph(
        nodes,
        {"pixel_values": ["N", 3, 32, 32]},
        {"image_features": ["N", IMAGE_TOKENS, FEATURES]},
        weights,
    )


def projector_graph(random: np.random.Generator) -> onnx.GraphProto:
    """image_features (N, T, FEATURES) → image_embeds (N, T, HIDDEN): one matrix."""
    nodes = [helper.make_node("MatMul", ["image_features", "w"], ["image_embeds"])]
    weight = random.standard_normal((FEATURES, HIDDEN)).astype(np.float32)
    shapes = {"image_features": ["N", IMAGE_TOKENS, FEATURES]}, {"image_embeds": ["N", IMAGE_TOKENS, HIDDEN]}
    return _graph(nodes, *shapes, {"w": weight})


def language_graph(random: np.random.Generator, vocab: int, positions: int | None) -> onnx.GraphProto:
    """Attention layers and a head; the KV cache has `positions`, or as many as are bound."""
    angles = np.outer(np.arange(positions or 512), 1e4 ** -(np.arange(0, HEAD, 2) / HEAD))
    weights = {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
    inputs: dict[str, list[Any]] = {"inputs_embeds": [1, "S", HIDDEN]}
    outputs: dict[str, list[Any]] = {"logits": [1, 1, vocab]}
    nodes, x = [], "inputs_embeds"
    for n in range(LAYERS):
        weights[f"qkv{n}"] = random.standard_normal((HIDDEN, (HEADS + 2 * KV) * HEAD)).astype(np.float32) * 0.3
        weights[f"o{n}"] = random.standard_normal((HEADS * HEAD, HIDDEN)).astype(np.float32) * 0.5
        past = [f"past_key_values.{n}.{k}" for k in ("key", "value")]
        present = [f"present.{n}.{k}" for k in ("key", "value")]
        inputs |= {name: [1, KV, positions or "max", HEAD] for name in past}
        outputs |= {name: [1, KV, positions or "max", HEAD] for name in present}
        nodes += [
            helper.make_node("MatMul", [x, f"qkv{n}"], [f"q{n}"]),
            helper.make_node(
                "GroupQueryAttention",
                [f"q{n}", "", "", *past, "seqlens_k", "total_sequence_length", "cos", "sin"],
                [f"a{n}", *present],
                domain="com.microsoft",
                num_heads=HEADS,
                kv_num_heads=KV,
                do_rotary=1,
            ),
            helper.make_node("MatMul", [f"a{n}", f"o{n}"], [f"m{n}"]),
            helper.make_node("Add", [x, f"m{n}"], [f"x{n}"]),
        ]
        x = f"x{n}"
    weights |= {"start": np.array([-1]), "end": np.array([2**62]), "axis": np.array([1])}
    weights["head"] = random.standard_normal((HIDDEN, vocab)).astype(np.float32)
    nodes.append(helper.make_node("Slice", [x, "start", "end", "axis"], ["last"]))
    nodes.append(helper.make_node("MatMul", ["last", "head"], ["logits"]))
    graph = _graph(nodes, inputs, outputs, weights)
    graph.input.append(helper.make_tensor_value_info("seqlens_k", TensorProto.INT32, [1]))
    graph.input.append(helper.make_tensor_value_info("total_sequence_length", TensorProto.INT32, []))
    return graph


def _graph(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, list[Any]],
    outputs: dict[str, list[Any]],
    weights: dict[str, np.ndarray],
) -> onnx.GraphProto:
    given = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()]
    made = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs.items()]
    return helper.make_graph(nodes, "g", given, made, [numpy_helper.from_array(w, n) for n, w in weights.items()])
