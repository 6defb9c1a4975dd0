"""The language model as TensorRT is given it: run by ONNX Runtime against the torch walk, and built by the SDK."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import tensorrt_rtx as trt
import torch

from checkpoints import ROPES, TEXTS
from conftest import MakeTiny
from vlm_export.tensorrt.language import KV, language_model
from vlm_export.tensorrt.linear import Ranges
from vlm_models.errors import CheckpointError
from vlm_models.model import Model, load_model
from vlm_quant.recipe import parse_recipe
from vlm_runtime.manifest import Part

CONTEXT = 64
STEPS = (20, 9, *[1] * 16)  # a prompt in two chunks, then tokens
KVS: tuple[KV, ...] = ("concat", "scatter")
VARIANTS: list[dict[str, Any]] = [
    *({"text": text} for text in TEXTS),
    *({"rope": rope} for rope in ROPES),
    {"text": "phi3", "text_options": {"partial_rotary_factor": 0.5, "hidden_size": 128}},
    {"text_options": {"attention_bias": True, "mlp_bias": True}},
    {"text_options": {"hidden_act": "gelu_pytorch_tanh", "head_dim": 32, "num_key_value_heads": 4}},
]
every_family = pytest.mark.parametrize("options", VARIANTS, ids=lambda o: "-".join(map(str, o.values())))


class Everywhere(dict[str, tuple[float, float]]):
    """One range for whatever layer is asked for."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> tuple[float, float]:
        return (-4.0, 4.0)


def exported(
    model: Model, folder: Path, text: str, kv: KV, ranges: Ranges | None = None, opset: Literal[21, 23] = 23
) -> Part:
    precision = parse_recipe(f"language={text}").language
    part = language_model(
        model.checkpoint,
        model.spec,
        precision,
        folder,
        max_context=CONTEXT,
        kv=kv,
        ranges=ranges,
        progress=lambda *_: None,
        opset=opset,
    )
    json.dumps(part.details)
    return part


def embeddings(model: Model) -> np.ndarray:
    size = (sum(STEPS), model.spec.language.hidden_size)
    return np.random.default_rng(4).standard_normal(size).astype(np.float32) * 0.5


def run(folder: Path, part: Part, embeds: np.ndarray, steps: tuple[int, ...] = STEPS) -> np.ndarray:
    """Logits (steps, V) after each step; a fixed cache starts full of rubbish, which must never be seen."""
    io = part.details["io"]
    settings = ort.SessionOptions()
    settings.log_severity_level = 4
    settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    path = folder / Path(io.get("check_graph", part.graph)).name
    session = ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    dtype = np.float16 if session.get_inputs()[0].type == "tensor(float16)" else np.float32
    names = ("past_{}.{}", "present_{}.{}") if io["kv"] == "concat" else ("{}_cache.{}", "new_{}_cache.{}")
    shape = (1, io["kv_heads"], 0 if io["kv"] == "concat" else io["max_context"], io["head_dim"])
    keys = [(kind, layer) for layer in range(io["layers"]) for kind in ("key", "value")]
    caches, out, position = [np.full(shape, 99, dtype) for _ in keys], [], 0
    for rows in steps:
        feed = {names[0].format(*key): cache for key, cache in zip(keys, caches, strict=True)}
        feed["inputs_embeds"] = embeds[None, position : position + rows].astype(dtype)
        feed["position"] = np.array([position], np.int64)
        logits, *caches = session.run(["logits", *(names[1].format(*key) for key in keys)], feed)
        assert logits.dtype == np.float32
        out.append(logits[0])
        position += rows
    return np.stack(out)


def reference(model: Model, embeds: np.ndarray) -> np.ndarray:
    logits = model.language_model().forward(torch.from_numpy(embeds), last_row=False).numpy()
    return np.asarray(logits[np.cumsum(STEPS) - 1])


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def cosine(got: np.ndarray, want: np.ndarray) -> float:
    """Of the row that is off most."""
    products = (got * want).sum(-1) / np.linalg.norm(got, axis=-1) / np.linalg.norm(want, axis=-1)
    return float(products.min())


@pytest.mark.parametrize("kv", KVS)
@every_family
def test_logits_are_those_of_the_reference_in_chunks_and_token_by_token(
    make_tiny: MakeTiny, tmp_path: Path, options: dict[str, Any], kv: KV
) -> None:
    model = load_model(make_tiny(**options))
    embeds = embeddings(model)
    want = reference(model, embeds)
    assert relative(run(tmp_path, exported(model, tmp_path, "fp32", kv), embeds), want) < 1e-5
    if kv == "scatter":
        assert cosine(run(tmp_path, exported(model, tmp_path, "fp16", kv), embeds), want) >= 0.9999


@pytest.mark.parametrize("options", [VARIANTS[4], VARIANTS[7], VARIANTS[8], VARIANTS[12]], ids=lambda o: o["text"])
def test_opset_21_says_the_same_without_the_newer_operators(
    make_tiny: MakeTiny, tmp_path: Path, options: dict[str, Any]
) -> None:
    model = load_model(make_tiny(**options))
    embeds = embeddings(model)
    want = reference(model, embeds)
    assert relative(run(tmp_path, exported(model, tmp_path, "fp32", "concat", opset=21), embeds), want) < 1e-5
    assert cosine(run(tmp_path, exported(model, tmp_path, "fp16", "concat", opset=21), embeds), want) >= 0.9999
    graph = onnx.load(tmp_path / "language_model.onnx", load_external_data=False)
    assert [(o.domain, o.version) for o in graph.opset_import] == [("", 21)]
    assert not {node.op_type for node in graph.graph.node} & {"Attention", "RMSNormalization", "RotaryEmbedding"}
    parsed(tmp_path / "language_model.onnx")


@pytest.mark.parametrize(
    ("text", "least"),
    [("bf16", 0.9995), ("int8", 0.9975), ("w8a8", 0.95), ("fp8", 0.93), ("int4:g32", 0.8)],
)
@pytest.mark.parametrize("family", ["qwen2", "gemma2", "gemma3_text"])
def test_fewer_bits_stay_near_and_both_caches_agree(
    make_tiny: MakeTiny, tmp_path: Path, family: str, text: str, least: float
) -> None:
    """Rows are 64 numbers of random weights: rounding costs more than in any trained model."""
    model = load_model(make_tiny(text=family))
    embeds = embeddings(model)
    got = [run(tmp_path, exported(model, tmp_path, text, kv, Everywhere()), embeds) for kv in KVS]
    assert least < cosine(got[0], reference(model, embeds)) < 1
    assert relative(got[0], got[1]) < 1e-3


def test_prompts_cut_elsewhere_give_the_same(make_tiny: MakeTiny, tmp_path: Path) -> None:
    model = load_model(make_tiny(text="gemma3_text"))
    embeds = embeddings(model)
    for kv in KVS:
        part = exported(model, tmp_path, "fp32", kv)
        once = run(tmp_path, part, embeds[:29], (29,))[-1]
        for steps in ((1, 28), (28, 1), (7, 7, 7, 8)):
            assert relative(run(tmp_path, part, embeds[:29], steps)[-1], once) < 1e-5


def test_capped_logits_are_those_of_the_reference(make_tiny: MakeTiny, tmp_path: Path) -> None:
    whole = load_model(make_tiny(text="gemma2"))
    capped = dataclasses.replace(whole.spec.language, logit_softcap=0.5)
    model = Model(whole.checkpoint, dataclasses.replace(whole.spec, language=capped))
    embeds = embeddings(model)
    want = reference(model, embeds)
    assert np.abs(want).max() <= 0.5
    for text, bound in (("fp32", 1e-5), ("fp16", 5e-3)):
        assert relative(run(tmp_path, exported(model, tmp_path, text, "scatter"), embeds), want) < bound


def test_a_bf16_graph_brings_one_for_onnx_runtime_over_the_same_weights(make_tiny: MakeTiny, tmp_path: Path) -> None:
    model = load_model(make_tiny())
    part = exported(model, tmp_path, "bf16", "scatter")
    assert part.details["io"]["check_graph"] == part.files[-1] == "tensorrt/language_model.check.onnx"
    weights = {p.name: p.stat().st_size for p in tmp_path.iterdir()}
    assert weights.pop("language_model.onnx.data") == part.details["data_bytes"]
    assert max(weights.values()) < 120_000  # the graphs themselves
    logits = run(tmp_path, part, embeddings(model))
    assert np.array_equal(logits, logits.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_the_part_says_what_builder_and_engine_must_know(make_tiny: MakeTiny, tmp_path: Path) -> None:
    model = load_model(make_tiny())
    part = exported(model, tmp_path, "int4:g16;layers.0.mlp=int8;lm_head=fp16", "concat")
    assert part.files == ("tensorrt/language_model.onnx", "tensorrt/language_model.onnx.data")
    assert part.details["linears"] == {"int4:g16": 18, "int8": 3, "fp16": 1}
    assert part.details["io"] == {
        "kv": "concat",
        "dtype": "fp16",
        "layers": 3,
        "kv_heads": 2,
        "head_dim": 16,
        "max_context": CONTEXT,
        "prefill_chunk": CONTEXT,
    }
    graph = onnx.load(tmp_path / "language_model.onnx", load_external_data=False)
    assert {p.key: p.value for p in graph.metadata_props} == {
        "vlm.fingerprint": model.spec.fingerprint,
        "vlm.part": "language_model",
    }


@pytest.mark.parametrize(("kv", "opset"), [("concat", 23), ("scatter", 24)])
def test_masks_and_tables_are_made_once_and_operators_are_standard(
    make_tiny: MakeTiny, tmp_path: Path, kv: KV, opset: int
) -> None:
    """Gemma 3 has two windows and two ropes over three layers."""
    exported(load_model(make_tiny(text="gemma3_text")), tmp_path, "fp16", kv)
    model = onnx.load(tmp_path / "language_model.onnx", load_external_data=False)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", opset)]
    found = Counter(node.op_type for node in model.graph.node)
    assert found["Attention"] == 3
    assert (found["GreaterOrEqual"], found["Less"], found["Gather"]) == (2, 1, 4)
    assert found["Concat" if kv == "concat" else "TensorScatter"] == 6
    assert found["MatMul"] == 22


def test_an_activation_without_a_form_is_refused_by_name(make_tiny: MakeTiny, tmp_path: Path) -> None:
    whole = load_model(make_tiny())
    language = dataclasses.replace(whole.spec.language, activation="mish")
    model = Model(whole.checkpoint, dataclasses.replace(whole.spec, language=language))
    with pytest.raises(CheckpointError, match="'mish' has no TensorRT form: supported are silu, gelu"):
        exported(model, tmp_path, "fp16", "concat")


def parsed(path: Path) -> tuple[Any, ...]:
    """The network that TensorRT-RTX reads from the file; its parts live as long as all that is returned."""
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    told = parser.parse_from_file(str(path)) or [parser.get_error(i).desc() for i in range(parser.num_errors)]
    assert told is True, told
    return network, builder, parser, logger


def engine_bytes(path: Path, capability: str) -> int:
    """Bytes of the engine that TensorRT-RTX builds, 0 where it refuses."""
    network, builder, *_ = parsed(path)
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for tensor in (network.get_input(i) for i in range(network.num_inputs)):
        least, most = (1, CONTEXT) if tensor.name == "inputs_embeds" else (0, CONTEXT - 1)
        shapes = [[size if size >= 0 else bound for size in tensor.shape] for bound in (least, least, most)]
        profile.set_shape(tensor.name, *shapes)
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    engine = builder.build_serialized_network(network, config)
    return 0 if engine is None else int(engine.nbytes)


@pytest.mark.parametrize("kv", KVS)
@every_family
def test_tensorrt_reads_every_family_and_finds_its_own_layers_in_it(
    make_tiny: MakeTiny, tmp_path: Path, options: dict[str, Any], kv: KV
) -> None:
    model = load_model(make_tiny(**options))
    exported(model, tmp_path, "fp16", kv)
    network, *_ = parsed(tmp_path / "language_model.onnx")
    types = Counter(str(network.get_layer(i).type).rpartition(".")[2] for i in range(network.num_layers))
    assert types["KV_CACHE_UPDATE"] == (6 if kv == "scatter" else 0)
    assert types["ATTENTION_OUTPUT"] == (0 if model.spec.language.attention_softcap else 3)
    assert types["ROTARY_EMBEDDING"] == 6


BUILT = [("llama", "bf16"), ("gemma2", "fp16"), ("qwen3", "int4:g32"), ("gemma3_text", "w8a8")]


@pytest.mark.parametrize(("family", "text"), BUILT, ids=lambda v: v)
def test_tensorrt_builds_engines(make_tiny: MakeTiny, tmp_path: Path, family: str, text: str) -> None:
    model = load_model(make_tiny(text=family))
    exported(model, tmp_path, text, "scatter", Everywhere())
    assert engine_bytes(tmp_path / "language_model.onnx", "SM120") > 0


@pytest.mark.slow
@every_family
def test_tensorrt_builds_every_family_for_every_device(
    make_tiny: MakeTiny, tmp_path: Path, options: dict[str, Any]
) -> None:
    model = load_model(make_tiny(**options))
    for kv in KVS:
        exported(model, tmp_path, "fp16", kv)
        for capability in ("SM86", "SM89", "SM120"):
            assert engine_bytes(tmp_path / "language_model.onnx", capability), (kv, capability)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["fp32", "bf16", "int8", "int4:g32", "w8a8", "fp8"])
def test_tensorrt_builds_every_precision_but_fp8_on_ampere(make_tiny: MakeTiny, tmp_path: Path, text: str) -> None:
    model = load_model(make_tiny(text="gemma3_text"))
    for kv, capability in itertools.product(KVS, ("SM86", "SM89", "SM120")):
        exported(model, tmp_path, text, kv, Everywhere())
        built = engine_bytes(tmp_path / "language_model.onnx", capability) > 0
        assert built == (text != "fp8" or capability != "SM86"), (kv, capability)
