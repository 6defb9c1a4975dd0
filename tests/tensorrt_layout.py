"""A tiny bundle of the TensorRT layout: hand-made standard ONNX of random weights, both kinds of KV cache, three types.

Edges and cache have the bundle's type and everything between is float32, so that NumPy can say what must come out.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from running import HEAD, HIDDEN, LAYERS, entry, projector_graph, running_bundle, running_spec, vision_graph
from vlm_models.spec import VLMSpec
from vlm_runtime.bundle import Bundle, open_bundle
from vlm_runtime.manifest import Part, read_manifest, write_manifest
from vlm_runtime.stepwise import STORED, load, store

HEADS, CONTEXT, CHUNK = 2, 24, 8  # as many key heads as heads, so that moving rows of a head is seen
ONNX = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
RUN_BY = ("tensorrt", "tensorrt_onnx")


def layout_spec() -> VLMSpec:
    """The facts of the tiny model of running.py, with HEADS key and value heads."""
    spec = running_spec()
    return dataclasses.replace(spec, language=dataclasses.replace(spec.language, kv_heads=HEADS))


def io(kv: str, dtype: str, /, **changes: Any) -> dict[str, Any]:
    """What the manifest says of the language model."""
    plain: dict[str, Any] = {"kv": kv, "dtype": dtype, "layers": LAYERS, "kv_heads": HEADS, "head_dim": HEAD}
    return {**plain, "max_context": CONTEXT, "prefill_chunk": CHUNK, **changes}


def tensorrt_bundle(folder: Path, kv: str, dtype: str = "fp32", *, engines: list[dict[str, Any]] | None = None) -> Path:
    """Write it; `engines` are listed for each part, {part} replaced in their file names: write those before."""
    spec = layout_spec()
    running_bundle(folder, spec, max_context=CONTEXT)
    (folder / "tensorrt").mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    graphs = {
        "vision_encoder": vision_graph(random),
        "projector": projector_graph(random),
        "language_model": language_graph(weights(spec.language.vocab_size), kv, dtype),
    }
    manifest, parts, files = read_manifest(folder), {}, {}
    for part, graph in graphs.items():
        name = f"tensorrt/{part}.onnx"
        save(graph, folder / name, part, spec.fingerprint)
        listed = [{**one, "file": one["file"].replace("{part}", part)} for one in engines or []]
        names = (name, *(one["file"] for one in listed))
        details: dict[str, Any] = {"engines": listed}
        if part == "language_model":
            details["io"] = io(kv, dtype)
        parts[part] = dict.fromkeys(RUN_BY, Part(name, names, dtype, details))
        files |= {n: entry(folder / n) for n in names}
    write_manifest(folder, dataclasses.replace(manifest, parts=parts, files={**manifest.files, **files}))
    return folder


def opened(folder: Path, kv: str, dtype: str = "fp32", **options: Any) -> Bundle:
    """The same, opened."""
    return open_bundle(tensorrt_bundle(folder, kv, dtype, **options))


def replaced(bundle: Bundle, part: str, **fields: Any) -> Bundle:
    """`bundle` with other fields in one Part, in memory."""
    changed = {name: dataclasses.replace(value, **fields) for name, value in bundle.manifest.parts[part].items()}
    return Bundle(bundle.folder, dataclasses.replace(bundle.manifest, parts={**bundle.manifest.parts, part: changed}))


def save(graph: onnx.GraphProto, path: Path, part: str, fingerprint: str) -> None:
    """Write a graph of standard operators with the metadata of its part."""
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    helper.set_model_props(model, {"vlm.part": part, "vlm.fingerprint": fingerprint})
    onnx.save(model, path)


def weights(vocab: int) -> dict[str, np.ndarray]:
    """Weights of the language model by name, float32."""
    random = np.random.default_rng(1)
    shapes = {"places": (CONTEXT, HIDDEN), "head": (HIDDEN, vocab)}
    for n in range(LAYERS):
        shapes |= {f"{kind}{n}": (HIDDEN, HEADS * HEAD) for kind in "qkv"} | {f"o{n}": (HEADS * HEAD, HIDDEN)}
    return {name: random.standard_normal(shape).astype(np.float32) * 0.3 for name, shape in shapes.items()}


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """Float32 values as `dtype` holds them."""
    stored = np.empty(values.shape, STORED[dtype])
    store(stored, values.astype(np.float32))
    return load(stored)


def plain_logits(embeds: np.ndarray, vocab: int, dtype: str) -> np.ndarray:
    """Logits (S, V) after each row (S, HIDDEN), without a cache, keys and values rounded as the cache does."""
    w, count = weights(vocab), len(embeds)
    x = rounded(embeds, dtype) + w["places"][:count]
    for n in range(LAYERS):
        q, k, v = ((x @ w[f"{kind}{n}"]).reshape(count, HEADS, HEAD) for kind in "qkv")
        k, v = rounded(k, dtype), rounded(v, dtype)
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(np.float32(HEAD))
        scores = np.where(np.tri(count, dtype=bool), scores, -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        x = x + np.einsum("hqk,khd->qhd", shares, v).reshape(count, -1) @ w[f"o{n}"]
    return np.asarray(x @ w["head"])


def language_graph(weights: dict[str, np.ndarray], kv: str, dtype: str) -> onnx.GraphProto:
    """Attention layers with learned places and a head, with the inputs and outputs of the layout."""
    constants = dict(weights) | {"scale": np.float32(HEAD**-0.5), "no": np.float32(-np.inf), "yes": np.float32(0)}
    constants |= {"zero": np.array(0), "one": np.array(1), "two": np.array(2), "zeros": np.array([0])}
    constants |= {"heads": np.array([0, 0, HEADS, HEAD]), "flat": np.array([0, 0, HEADS * HEAD])}
    constants |= {"column": np.array([-1, 1]), "last": np.array([-1])}
    nodes = []

    def op(kind: str, *inputs: str, out: str = "", **attributes: Any) -> str:
        name = out or f"{kind}_{len(nodes)}"
        nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    edge, cast = ONNX[dtype], {"to": TensorProto.FLOAT}
    length = "T" if kv == "concat" else CONTEXT
    inputs = {"inputs_embeds": (edge, [1, "S", HIDDEN]), "position": (TensorProto.INT64, [1])}
    outputs: dict[str, tuple[int, list[Any]]] = {"logits": (TensorProto.FLOAT, [1, len(weights["head"][0])])}
    rows = op("Gather", op("Shape", "inputs_embeds"), "one")
    queries = op("Add", op("Range", "zero", rows, "one"), "position")
    x = op("Add", op("Cast", "inputs_embeds", **cast), op("Gather", "places", queries))
    mask = ""
    for n in range(LAYERS):
        split = [op("Reshape", op("MatMul", x, f"{kind}{n}"), "heads") for kind in "qkv"]
        q, *new = (op("Transpose", one, perm=[0, 2, 1, 3]) for one in split)
        held = []
        for kind, rows_of in zip(("key", "value"), new, strict=True):
            stored = op("Cast", rows_of, to=edge)
            if kv == "concat":
                names = f"past_{kind}.{n}", f"present_{kind}.{n}"
                op("Concat", names[0], stored, out=names[1], axis=2)
            else:
                names = f"{kind}_cache.{n}", f"new_{kind}_cache.{n}"
                op("TensorScatter", names[0], stored, "position", out=names[1], axis=2)
            inputs[names[0]] = (edge, [1, HEADS, "P" if kv == "concat" else length, HEAD])
            outputs[names[1]] = (edge, [1, HEADS, length, HEAD])
            held.append(op("Cast", names[1], **cast))
        if not mask:
            keys = op("Range", "zero", op("Gather", op("Shape", held[0]), "two"), "one")
            seen = op("LessOrEqual", keys, op("Reshape", queries, "column"))
            mask = op("Where", seen, "yes", "no")
        scores = op("Mul", op("MatMul", q, op("Transpose", held[0], perm=[0, 1, 3, 2])), "scale")
        shares = op("Softmax", op("Add", scores, mask), axis=-1)
        mixed = op("Transpose", op("MatMul", shares, held[1]), perm=[0, 2, 1, 3])
        x = op("Add", x, op("MatMul", op("Reshape", mixed, "flat"), f"o{n}"))
    op("MatMul", op("Squeeze", op("Gather", x, "last", axis=1), "one_axis"), "head", out="logits")
    constants["one_axis"] = np.array([1])
    return helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, *value) for name, value in inputs.items()],
        [helper.make_tensor_value_info(name, *value) for name, value in outputs.items()],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
