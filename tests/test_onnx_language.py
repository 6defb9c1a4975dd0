"""The streamed language model, run by ONNX Runtime in chunks with its cache in place, against transformers."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import transformers

from checkpoints import ROPES, TEXTS
from conftest import MakeTiny
from vlm_export.targets.onnx import language_model, requires
from vlm_models.errors import CheckpointError
from vlm_models.model import Model, load_model
from vlm_quant.recipe import Precision, parse_recipe
from vlm_runtime.manifest import Part

ROWS, CONTEXT, FP32 = 45, 48, Precision("fp32")
CHUNKS = (0, 30, 41, 42, 43, 44, ROWS)
VARIANTS: list[dict[str, Any]] = [
    *({"text": text} for text in TEXTS),
    *({"rope": rope} for rope in ROPES),
    {"text": "phi3", "text_options": {"partial_rotary_factor": 0.5, "hidden_size": 128}},
    {"text_options": {"attention_bias": True, "mlp_bias": True}},
    {"text_options": {"hidden_act": "gelu_pytorch_tanh", "head_dim": 32, "num_key_value_heads": 4}},
]


def exported(model: Model, folder: Path, precision: Precision = FP32) -> Part:
    part = language_model(model.checkpoint, model.spec, precision, folder, CONTEXT, lambda *_: None)
    onnx.checker.check_model(folder / "language_model.onnx")
    return part


def embeddings(model: Model) -> np.ndarray:
    return np.random.default_rng(4).standard_normal((ROWS, model.spec.language.hidden_size)).astype(np.float32) * 0.5


def run_chunks(path: Path, embeds: np.ndarray, chunks: tuple[int, ...] = CHUNKS) -> np.ndarray:
    """Logits (chunks, V) after each chunk; the cache starts full of rubbish, which must never be read."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    past = [i for i in session.get_inputs() if i.name.startswith("past_key_values.")]
    caches = {i.name: ort.OrtValue.ortvalue_from_numpy(np.full(i.shape, 99, np.float32)) for i in past}
    out = []
    for start, stop in itertools.pairwise(chunks):
        binding = session.io_binding()
        binding.bind_cpu_input("inputs_embeds", embeds[None, start:stop])
        binding.bind_cpu_input("seqlens_k", np.array([stop - 1], np.int32))
        binding.bind_cpu_input("total_sequence_length", np.array(stop, np.int32))
        for name, value in caches.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
        binding.bind_output("logits")
        session.run_with_iobinding(binding)
        out.append(binding.get_outputs()[-1].numpy()[0, 0].copy())
    return np.stack(out)


def transformers_logits(folder: Path, embeds: np.ndarray) -> np.ndarray:
    """Logits (rows, V) of transformers' own model without a cache."""
    # eager: sdpa leaves out the softcap of attention scores.
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    model: Any = transformers.LlavaForConditionalGeneration.from_pretrained(folder, **options).eval()
    with torch.inference_mode():
        hidden = model.model.language_model(inputs_embeds=torch.from_numpy(embeds)[None]).last_hidden_state
        return np.asarray(model.lm_head(hidden)[0])


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: "-".join(map(str, o.values())))
def test_logits_are_those_of_transformers_in_chunks_and_token_by_token(
    make_tiny: MakeTiny, tmp_path: Path, options: dict[str, Any]
) -> None:
    folder = make_tiny(**options)
    model = load_model(folder)
    exported(model, tmp_path)
    embeds = embeddings(model)
    got, want = run_chunks(tmp_path / "language_model.onnx", embeds), transformers_logits(folder, embeds)
    for index, stop in enumerate(CHUNKS[1:]):
        assert relative(got[index], want[stop - 1]) < 1e-5, f"row {stop}"


def test_capped_logits_are_those_of_the_torch_walk(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """LLaVA leaves Gemma's cap on the logits out, so transformers cannot be asked."""
    whole = load_model(make_tiny(text="gemma2"))
    capped = dataclasses.replace(whole.spec.language, logit_softcap=0.5)
    model = Model(whole.checkpoint, dataclasses.replace(whole.spec, language=capped))
    exported(model, tmp_path)
    embeds = embeddings(model)
    want = model.language_model().forward(torch.from_numpy(embeds)).numpy()[0]
    assert np.abs(want).max() <= 0.5
    assert relative(run_chunks(tmp_path / "language_model.onnx", embeds)[-1], want) < 1e-5


@pytest.mark.parametrize(
    ("weights", "bound"), [("fp16", 3e-3), ("int8", 0.12), ("int4", 0.7)], ids=["fp16", "int8", "int4"]
)
@pytest.mark.parametrize("text", ["qwen2", "gemma3_text"])
def test_fewer_bits_stay_near_and_cost_less(
    make_tiny: MakeTiny, tmp_path: Path, text: str, weights: str, bound: float
) -> None:
    model = load_model(make_tiny(text=text))
    embeds = embeddings(model)
    (tmp_path / "fp32").mkdir()
    whole = exported(model, tmp_path / "fp32").details["data_bytes"]
    want = run_chunks(tmp_path / "fp32/language_model.onnx", embeds)
    part = exported(model, tmp_path, Precision(weights))  # type: ignore[arg-type]
    error = relative(run_chunks(tmp_path / "language_model.onnx", embeds), want)
    assert 1e-5 < error < bound
    assert part.details["data_bytes"] < 0.75 * whole


@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_chunks_of_the_prompt_give_what_one_prompt_gives(make_tiny: MakeTiny, tmp_path: Path, weights: str) -> None:
    model = load_model(make_tiny())
    exported(model, tmp_path, Precision(weights))  # type: ignore[arg-type]
    embeds, path = embeddings(model), tmp_path / "language_model.onnx"
    assert relative(run_chunks(path, embeds)[-1], run_chunks(path, embeds, (0, ROWS))[-1]) < 0.01


def test_every_linear_layer_is_counted_and_at_its_precision(make_tiny: MakeTiny, tmp_path: Path) -> None:
    model = load_model(make_tiny())
    part = exported(model, tmp_path, Precision("int4", 16))
    # qkv in one, o, gate, up and down in each of three layers; the head at 8 bits.
    assert part.details["linears"] == {"int4:g16": 15, "int8:g128": 1}
    graph = onnx.load(tmp_path / "language_model.onnx", load_external_data=False).graph
    operators = Counter(node.op_type for node in graph.node)
    assert operators["MatMulNBits"] == 16
    assert operators["MatMul"] == 0
    assert operators["RMSNormalization"] == 7
    assert operators["GroupQueryAttention"] == 3
    # 16 linears, 7 norms, 6 sums, 3 attentions, QuickGelu and Mul a layer, two slices, Identity: nothing else.
    assert len(graph.node) == 16 + 7 + 6 + 3 + 6 + 2 + 1
    assert part.files == ("onnx/language_model.onnx", "onnx/language_model.onnx.data")
    assert part.precision == "int4:g16"


def test_head_sizes_that_onnx_runtime_cannot_attend_with_are_refused_before_work(make_tiny: MakeTiny) -> None:
    fine = load_model(make_tiny()).spec
    requires(parse_recipe("int4"), fine, ["language_model"], 64)
    odd = dataclasses.replace(fine, language=dataclasses.replace(fine.language, head_dim=24))
    with pytest.raises(CheckpointError, match=r"multiples of 16.*head_dim is 24"):
        requires(parse_recipe("int4"), odd, ["language_model"], 64)
    partial = dataclasses.replace(fine.language, rope=dataclasses.replace(fine.language.rope, dim=8))
    with pytest.raises(CheckpointError, match="rotated channels are 8"):
        requires(parse_recipe("int4"), dataclasses.replace(fine, language=partial), ["language_model"], 64)


def test_the_graph_says_which_checkpoint_it_is_from(make_tiny: MakeTiny, tmp_path: Path) -> None:
    model = load_model(make_tiny())
    exported(model, tmp_path)
    session = ort.InferenceSession(str(tmp_path / "language_model.onnx"), providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata == {"vlm.fingerprint": model.spec.fingerprint, "vlm.part": "language_model"}
    assert [o.shape for o in session.get_outputs() if o.name == "logits"] == [[1, 1, model.spec.language.vocab_size]]
