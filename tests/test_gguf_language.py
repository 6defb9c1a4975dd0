"""The GGUF language model in llama.cpp itself: every family's logits and greedy tokens equal the reference's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import MakeTiny
from test_families import CASES, TOKENS, looked_up, relative_l2
from vlm_export.gguf import tensors
from vlm_export.gguf.architecture import GRAPHS, Architecture, architecture, embed_scale, inexact, query_scale
from vlm_export.gguf.file import FileFacts, write_gguf
from vlm_export.target import silent
from vlm_models import torch_language
from vlm_models.errors import CheckpointError
from vlm_models.model import Model, load_model
from vlm_quant.gguf_types import GGUF_TYPES
from vlm_runtime import llama
from vlm_runtime.engines.gguf import GgufDecoder
from vlm_runtime.gguf_header import check_language_model, read_header

ROWS, CONTEXT = 45, 128
NO_VOCABULARY = {"tokenizer.ggml.model": "none"}

# What the checkpoints of test_families have and llama.cpp's graphs have not, each refused below.
CHANGES: dict[str, dict[str, Any]] = {
    "mistral": {"text_options": {"sliding_window": None}},
    "float16": {"text_options": {"sliding_window": None}},
    "gemma2": {"text_options": {"tie_word_embeddings": True}},
}
OWN_CASES: dict[str, dict[str, Any]] = {
    "yarn with a ramp of its own": {
        "text_options": {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
                "attention_factor": 1.3,
            }
        }
    },
    "yarn with a factor of its own": {
        "text": "qwen3",
        "text_options": {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "attention_factor": 1.3,
            }
        },
    },
    "gemma2 of other sliding layers, uncapped": {
        "text": "gemma2",
        "text_options": {
            "tie_word_embeddings": True,
            "layer_types": ["full_attention", "full_attention", "sliding_attention"],
            "attn_logit_softcapping": None,
        },
    },
    "gemma2 without sliding layers": {
        "text": "gemma2",
        "text_options": {"tie_word_embeddings": True, "layer_types": ["full_attention"] * 3},
    },
    "gemma3 of sliding layers only": {
        "text": "gemma3_text",
        "text_options": {"layer_types": ["sliding_attention"] * 3},
    },
    "gemma3 without sliding layers": {"text": "gemma3_text", "text_options": {"layer_types": ["full_attention"] * 3}},
    "gemma3 tied": {"text": "gemma3_text", "text_options": {"tie_word_embeddings": True}},
}
EXPRESSED = {name: {**CASES[name], **CHANGES.get(name, {})} for name in CASES if name != "untied gemma"} | OWN_CASES


def table_gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU as llama.cpp's CPU has it: from fp16 to fp16 between −10 and 10."""
    y = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
    return torch.where(x <= -10, 0.0, torch.where(x >= 10, x, y))


def written(model: Model, path: Path, type: str = "f32") -> FileFacts:
    arch = architecture(model.spec.language, CONTEXT)
    own = {"vlm.fingerprint": model.spec.fingerprint, "vlm.part": "language_model"}
    parts = tensors.tensors(model.checkpoint, model.spec)
    return write_gguf(path, arch, own, parts, GGUF_TYPES[type], NO_VOCABULARY, progress=silent)


def opened(model: Model, path: Path) -> GgufDecoder:
    language = model.spec.language
    return GgufDecoder(
        path,
        hidden_size=language.hidden_size,
        vocab_size=language.vocab_size,
        max_context=CONTEXT,
        prefill_chunk=16,
        threads=1,
        kv_cache="f32",
        flash_attention=False,
        embed_scale=embed_scale(language),
    )


def prompt(model: Model) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(ROWS, model.spec.language.hidden_size, generator=generator) * 0.5


@dataclasses.dataclass(frozen=True)
class Deviation:
    """Relative L2 of the logits after the prompt and each token of the answer, and how many greedy tokens agree."""

    median: float
    worst: float
    equal: int


def deviation(model: Model, path: Path) -> Deviation:
    decoder, reference, rows = opened(model, path), model.language_model(), prompt(model)
    got, want = decoder.prefill(rows.numpy()), reference.forward(rows)[0].numpy()
    found, equal = [relative_l2(got, want)], 0
    for _ in range(TOKENS):
        token = int(want.argmax())
        equal += int(got.argmax()) == token
        row = looked_up(model, [token])
        got, want = decoder.decode(row[0].numpy()), reference.forward(row)[0].numpy()
        found.append(relative_l2(got, want))
    return Deviation(float(np.median(found)), max(found), equal)


@pytest.mark.parametrize("case", EXPRESSED)
def test_llama_cpp_computes_what_the_reference_computes(
    make_tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    model = load_model(make_tiny(**EXPRESSED[case]))
    exact, half = tmp_path / "f32.gguf", tmp_path / "f16.gguf"
    written(model, exact)
    written(model, half, "f16")
    check_language_model(read_header(exact), exact, model.spec)
    tabled = bool(inexact(model.spec.language))
    if tabled:
        assert deviation(model, exact).worst <= 2e-3
        monkeypatch.setitem(torch_language.ACTIVATIONS, "gelu_pytorch_tanh", table_gelu)
    found = deviation(model, exact)
    # The rest of what GELU's table does: a value that rounds to its other neighbour now and then.
    assert found.median <= (5e-5 if tabled else 1e-5)
    assert found.worst <= (5e-4 if tabled else 1e-5)
    assert found.equal == TOKENS
    assert deviation(model, half).median <= 2e-3  # llama.cpp rounds activations to fp16 too


def as_stored(name: str) -> Callable[[list[tensors.Tensor], Model], list[tensors.Tensor]]:
    def stored(tensor: tensors.Tensor, model: Model) -> tensors.Tensor:
        return dataclasses.replace(tensor, read=lambda start, stop: model.checkpoint.rows(tensor.source, start, stop))

    return lambda parts, model: [stored(t, model) if t.name == name else t for t in parts]


def zeroed(name: str) -> Callable[[list[tensors.Tensor], Model], list[tensors.Tensor]]:
    def zero(tensor: tensors.Tensor) -> tensors.Tensor:
        return dataclasses.replace(tensor, read=lambda start, stop: np.zeros_like(tensor.read(start, stop)))

    return lambda parts, _: [zero(t) if t.name == name else t for t in parts]


def without(name: str) -> Callable[[list[tensors.Tensor], Model], list[tensors.Tensor]]:
    return lambda parts, _: [t for t in parts if t.name != name]


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({}, as_stored("blk.1.attn_k.weight")),
        ({"text": "qwen2"}, zeroed("blk.1.attn_q.bias")),
        ({"text": "gemma"}, as_stored("blk.1.ffn_norm.weight")),
        ({"rope": "llama3"}, without("rope_freqs.weight")),
        ({"text": "phi3"}, zeroed("blk.2.attn_output.weight")),
    ],
    ids=["rows of k not permuted", "a bias lost", "a norm without its offset", "llama3 factors lost", "a matrix lost"],
)
def test_a_wrong_tensor_would_be_seen(
    make_tiny: MakeTiny, tmp_path: Path, options: dict[str, Any], change: Callable[..., list[tensors.Tensor]]
) -> None:
    model = load_model(make_tiny(**options))
    parts = change(tensors.tensors(model.checkpoint, model.spec), model)
    arch = architecture(model.spec.language, CONTEXT)
    write_gguf(tmp_path / "x.gguf", arch, {}, parts, GGUF_TYPES["f32"], NO_VOCABULARY, progress=silent)
    assert deviation(model, tmp_path / "x.gguf").median > 1e-3


@pytest.mark.parametrize(
    ("options", "key", "value"),
    [
        ({"text": "qwen3"}, "qwen3.rope.freq_base", 1e5),
        ({"text": "yarn"}, "qwen2.rope.scaling.factor", 2.0),
        ({"text": "gemma2"}, "gemma2.attention.sliding_window", 9),
        ({"text": "gemma3_text"}, "gemma3.rope.freq_base_swa", 1e6),
        ({}, "llama.attention.layer_norm_rms_epsilon", 1e-2),
    ],
)
def test_a_wrong_hyper_parameter_would_be_seen(
    make_tiny: MakeTiny, tmp_path: Path, options: dict[str, Any], key: str, value: float
) -> None:
    name = {"yarn": "yarn rope"}.get(options.get("text", "llama"), options.get("text", "llama"))
    model = load_model(make_tiny(**EXPRESSED[name]))
    arch = architecture(model.spec.language, CONTEXT)
    assert key in arch.fields
    arch = Architecture(arch.name, {**arch.fields, key: value})
    parts = tensors.tensors(model.checkpoint, model.spec)
    write_gguf(tmp_path / "x.gguf", arch, {}, parts, GGUF_TYPES["f32"], NO_VOCABULARY, progress=silent)
    assert deviation(model, tmp_path / "x.gguf").median > 1e-3


@pytest.mark.parametrize("text", ["llama", "smollm", "gemma", "gemma2", "gemma3_text"])
def test_token_ids_give_what_their_embeddings_give(make_tiny: MakeTiny, tmp_path: Path, text: str) -> None:
    """llama.cpp's own users feed ids: it looks them up in token_embd and scales them as the checkpoint does."""
    model = load_model(make_tiny(**EXPRESSED[text]))
    written(model, tmp_path / "x.gguf")
    decoder, lib, ids = opened(model, tmp_path / "x.gguf"), llama.library(), [5, 77, 300, 2, 9, 150, 150, 31]
    tokens = (lib.llama_token * len(ids))(*ids)  # llama.cpp keeps no copy
    assert lib.llama_decode(decoder._ctx, lib.llama_batch_get_one(tokens, len(ids))) == 0, llama.last_messages()
    got = np.ctypeslib.as_array(lib.llama_get_logits_ith(decoder._ctx, -1), (model.spec.language.vocab_size,)).copy()
    want = model.language_model().forward(looked_up(model, ids))[0].numpy()
    assert relative_l2(got, want) <= (2e-3 if inexact(model.spec.language) else 1e-5)


@pytest.mark.parametrize("text", ["gemma2", "gemma3_text"])
def test_a_softcap_on_logits_is_applied(make_tiny: MakeTiny, tmp_path: Path, text: str) -> None:
    model = load_model(make_tiny(**EXPRESSED[text]))
    language = dataclasses.replace(model.spec.language, logit_softcap=2.0)
    capped = Model(model.checkpoint, dataclasses.replace(model.spec, language=language))
    written(capped, tmp_path / "x.gguf")
    assert deviation(capped, tmp_path / "x.gguf").worst <= 2e-3
    assert deviation(model, tmp_path / "x.gguf").median > 1e-2


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "window": ("mistral", {"windows": (8, 8, 8)}, "beyond 8 positions: .* --max-context 8 or less"),
    "qwen2 window": ("qwen2", {"windows": (0, 0, 16)}, "--max-context 16"),
    "untied": ("untied gemma", {}, "a head of its own"),
    "activation": ("llama", {"activation": "relu"}, "the activation 'relu'"),
    "erf GELU": ("gemma", {"activation": "gelu"}, "the activation 'gelu'"),
    "output bias": ("qwen3", {"o_bias": True}, "a bias on the attention's output"),
    "MLP bias": ("qwen2", {"mlp_bias": True}, "biases in the MLP"),
    "head norms": ("qwen3", {"qk_norm": False}, "no norms on q and k"),
    "head_dim": ("qwen2", {"head_dim": 48}, "heads of 192 channels in all"),
    "part rotates": ("llama", {"rope": {"dim": 8}}, "rotation of 8 of a head's 16 channels"),
    "llama3": ("qwen2", {"rope": {"type": "llama3"}}, "rope scaling 'llama3'"),
    "ramp": ("yarn rope", {"rope": {"scaling": {"beta_fast": 8.0, "factor": 4.0}}}, "'yarn' with its own ramp"),
    "softcap": ("llama", {"logit_softcap": 30.0}, "a softcap on logits"),
    "attention softcap": ("gemma3_text", {"attention_softcap": 30.0}, "a softcap on attention scores"),
    "windows": ("gemma2", {"windows": (8, 0, 16)}, "sliding windows of several sizes"),
    "type": ("llama", {"model_type": "mamba"}, "no architecture for language models of type 'mamba'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_graph_computes_is_refused_in_one_line(make_tiny: MakeTiny, case: str) -> None:
    name, changes, message = REFUSED[case]
    spec = load_model(make_tiny(**(EXPRESSED.get(name) or CASES[name]))).spec.language
    changes = dict(changes)
    if "rope" in changes:
        changes["rope"] = dataclasses.replace(spec.rope, **changes["rope"])
    with pytest.raises(CheckpointError, match=message) as caught:
        architecture(dataclasses.replace(spec, **changes), CONTEXT)
    assert "\n" not in str(caught.value)
    assert "another target" in str(caught.value)


def test_a_window_as_long_as_the_context_is_no_window(make_tiny: MakeTiny) -> None:
    spec = load_model(make_tiny(text="mistral")).spec.language
    assert architecture(spec, 8).fields["llama.context_length"] == 8


def test_every_supported_family_has_a_graph() -> None:
    from vlm_models.family import supported

    assert set(GRAPHS) == set(supported("language"))


def test_the_largest_gemmas_scale_scores_by_their_width(make_tiny: MakeTiny) -> None:
    spec = load_model(make_tiny(**EXPRESSED["gemma2"])).spec.language
    assert query_scale(spec) == pytest.approx((32 / 24) ** 0.5)
    assert query_scale(dataclasses.replace(spec, attention_scale=32**-0.5)) == 1.0
    assert query_scale(dataclasses.replace(spec, layers=46, attention_scale=16**-0.5)) == 1.0  # 64 channels, 4 heads
