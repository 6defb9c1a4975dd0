"""A language model in llama.cpp's words: general.architecture and the hyper-parameters that its loader reads.

Facts read in llama.cpp at commit 0c1e57098 (the version that the extra `gguf` pins): src/models/<name>.cpp for what
each graph computes, src/llama-model.cpp for the keys, src/llama-context.cpp and ggml's rope for YaRN.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlm_models.errors import CheckpointError
from vlm_models.rope import inv_freq
from vlm_models.spec import LanguageSpec, RopeSpec

Value = str | int | float | bool | list[str] | list[int] | list[float] | list[bool]
"""A GGUF value: int is written as uint32, float as float32, lists of int as int32."""

# Of a graph that always caps: so wide that tanh is the identity in float32, and a power of two, so that it is exact.
_NO_SOFTCAP = 2.0**30
_GELU = ("gelu_pytorch_tanh", "gelu_new")


@dataclass(frozen=True)
class Architecture:
    """What stands in the header: `name` under general.architecture, `fields` with their full keys."""

    name: str
    fields: Mapping[str, Value]


@dataclass(frozen=True)
class Graph:
    """What the graph of one architecture computes, where graphs differ.

    `interleaved`: rotated pairs are neighbours, so rows of q and k are stored permuted. `factors`: the tensor that
    divides rotary frequencies, if it reads one. `period`: its sliding layers unless the file says which (0: never any).
    `width_scale_layers`: with so many layers it scales scores by (hidden / heads)^-0.5.
    """

    name: str
    activations: tuple[str, ...] = ("silu",)
    interleaved: bool = False
    factors: str = ""
    period: int = 0
    any_head_dim: bool = True
    part_rotates: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    fused: bool = False
    attention_softcap: bool = False
    logit_softcap: bool = False
    own_head: bool = True
    scales_input: bool = False
    width_scale_layers: int = 0


_LLAMA = Graph("llama", interleaved=True, factors="rope_freqs.weight", o_bias=True, mlp_bias=True)
GRAPHS: Mapping[str, Graph] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Graph("qwen2", any_head_dim=False),
    "qwen3": Graph("qwen3", qk_norm=True),
    "phi3": Graph("phi3", any_head_dim=False, part_rotates=True, fused=True),
    "gemma": Graph("gemma", activations=_GELU, part_rotates=True, own_head=False, scales_input=True),
    "gemma2": Graph(
        "gemma2",
        activations=_GELU,
        period=2,
        part_rotates=True,
        post_norms=True,
        attention_softcap=True,
        logit_softcap=True,
        own_head=False,
        scales_input=True,
        width_scale_layers=46,
    ),
    "gemma3_text": Graph(
        "gemma3",
        activations=_GELU,
        period=6,
        part_rotates=True,
        qk_norm=True,
        post_norms=True,
        width_scale_layers=62,
    ),
}


def architecture(spec: LanguageSpec, max_context: int) -> Architecture:
    """Name and hyper-parameters of a model that is to run up to `max_context` positions.

    Raises CheckpointError, saying which fact, for a model that llama.cpp's graph cannot express.
    """
    graph = graph_of(spec)
    _check(spec, graph)
    fields: dict[str, Value] = {
        "vocab_size": spec.vocab_size,
        "context_length": _context_length(spec, graph, max_context),
        "embedding_length": spec.hidden_size,
        "feed_forward_length": spec.intermediate_size,
        "block_count": spec.layers,
        "attention.head_count": spec.heads,
        "attention.head_count_kv": spec.kv_heads,
        "attention.key_length": spec.head_dim,
        "attention.value_length": spec.head_dim,
        "attention.layer_norm_rms_epsilon": spec.norm_eps,
        **_rope(spec, graph),
        **_windows(spec, graph, max_context),
    }
    if graph.attention_softcap:
        fields["attn_logit_softcapping"] = spec.attention_softcap or _NO_SOFTCAP
    if graph.logit_softcap:
        fields["final_logit_softcapping"] = spec.logit_softcap or _NO_SOFTCAP
    elif spec.logit_softcap:  # gemma3 caps where the key stands
        fields["final_logit_softcapping"] = spec.logit_softcap
    return Architecture(graph.name, {f"{graph.name}.{key}": value for key, value in fields.items()})


def embed_scale(spec: LanguageSpec) -> float:
    """What llama.cpp multiplies injected embeddings by: sqrt(hidden_size) in the graphs of Gemma 1 and 2, else 1."""
    return math.sqrt(spec.hidden_size) if graph_of(spec).scales_input else 1.0


def inexact(spec: LanguageSpec) -> str:
    """What llama.cpp computes less exactly than the checkpoint whatever the weights' type; empty where nothing is."""
    if graph_of(spec).activations != _GELU:
        return ""
    return "llama.cpp takes GELU from a table of fp16 values: logits deviate by some 5e-4 (relative L2) even at fp32"


def graph_of(spec: LanguageSpec) -> Graph:
    """The graph that runs a model type. Raises CheckpointError for one that has none."""
    if spec.model_type not in GRAPHS:
        raise CheckpointError(
            f"target 'gguf' has no architecture for language models of type {spec.model_type!r}: "
            f"it takes {', '.join(GRAPHS)}; choose another target"
        )
    return GRAPHS[spec.model_type]


def query_scale(spec: LanguageSpec) -> float:
    """What queries must be multiplied by before llama.cpp scales them, since no key tells it the scale: mostly 1."""
    wanted = spec.attention_scale or spec.head_dim**-0.5
    by_width = spec.layers == graph_of(spec).width_scale_layers
    given = (spec.hidden_size // spec.heads if by_width else spec.head_dim) ** -0.5
    return 1.0 if math.isclose(wanted, given, rel_tol=1e-6) else wanted / given


def rope_factors(spec: LanguageSpec) -> Mapping[str, NDArray[np.float32]]:
    """Tensors (dim / 2,) that divide rotary frequencies, for scaling that no key expresses: Llama 3's, odd YaRN."""
    rope = spec.rope
    if _keyed(rope):
        return {}
    exponent = np.arange(0, rope.dim, 2, dtype=np.float64) / rope.dim
    factors = (rope.theta**-exponent / inv_freq(rope)[0].astype(np.float64)).astype(np.float32)
    return {graph_of(spec).factors: factors}


def _check(spec: LanguageSpec, graph: Graph) -> None:
    heads = spec.heads * spec.head_dim
    local = spec.rope_local
    for wrong, fact in (
        (spec.activation not in graph.activations, f"the activation {spec.activation!r}"),
        (spec.o_bias and not graph.o_bias, "a bias on the attention's output"),
        (spec.mlp_bias and not graph.mlp_bias, "biases in the MLP"),
        (spec.qk_norm != graph.qk_norm, f"{'' if spec.qk_norm else 'no '}norms on q and k"),
        (spec.post_norms != graph.post_norms, f"{'' if spec.post_norms else 'no '}norms after attention and MLP"),
        (spec.fused != graph.fused, f"q, k and v stored {'as one' if spec.fused else 'apart'}"),
        (not spec.tied and not graph.own_head, "a head of its own beside the embedding table"),
        (heads != spec.hidden_size and not graph.any_head_dim, f"heads of {heads} channels in all, not hidden_size"),
        (
            spec.rope.dim != spec.head_dim and not graph.part_rotates,
            f"rotation of {spec.rope.dim} of a head's {spec.head_dim} channels",
        ),
        (spec.attention_softcap and not graph.attention_softcap, "a softcap on attention scores"),
        (spec.logit_softcap and graph.name not in ("gemma2", "gemma3"), "a softcap on logits"),
        (not _keyed(spec.rope) and not graph.factors, f"rope scaling {_words(spec.rope)}"),
        (
            local is not None and (graph.name != "gemma3" or local.type != "default" or local.dim != spec.rope.dim),
            "a rotary embedding of that kind on sliding layers",
        ),
        (local is not None and spec.rope.type == "yarn", "YaRN beside another rotary embedding on sliding layers"),
        (
            local is None and graph.name == "gemma3" and any(spec.windows) and spec.rope.type != "default",
            f"rope scaling {_words(spec.rope)} on sliding layers",
        ),
        (len({w for w in spec.windows if w}) > 1 and graph.period, "sliding windows of several sizes"),
    ):
        if wrong:
            raise CheckpointError(
                f"target 'gguf' cannot express this language model: it has {fact}, "
                f"which llama.cpp's graph {graph.name!r} does not; choose another target, such as onnx"
            )


def _context_length(spec: LanguageSpec, graph: Graph, max_context: int) -> int:
    """Positions up to which the graph computes the same: to the window of a graph that has no sliding layers."""
    window = min((w for w in spec.windows if w), default=0)
    if graph.period or not window:
        return spec.max_positions
    if max_context > window:
        raise CheckpointError(
            f"target 'gguf' cannot express this language model beyond {window} positions: its layers attend to the "
            f"last {window}, llama.cpp's graph {graph.name!r} to all; choose --max-context {window} or less, "
            "or another target, such as onnx"
        )
    return min(spec.max_positions, window)


def _windows(spec: LanguageSpec, graph: Graph, max_context: int) -> Mapping[str, Value]:
    """Size and place of the sliding layers. The place is left out where it is the graph's own, for older readers."""
    window = max(spec.windows, default=0)
    if not graph.period or (not window and graph.name == "gemma3"):
        return {}
    if not window:  # Gemma 2's graph ends the process without a sliding layer: they see everything
        return {"attention.sliding_window": max(spec.max_positions, max_context)}
    sliding = [bool(w) for w in spec.windows]
    usual = [i % graph.period < graph.period - 1 for i in range(spec.layers)]
    place: Mapping[str, Value] = {} if sliding == usual else {"attention.sliding_window_pattern": sliding}
    return {"attention.sliding_window": window, **place}


def _rope(spec: LanguageSpec, graph: Graph) -> Mapping[str, Value]:
    rope, s = spec.rope, spec.rope.scaling
    fields: dict[str, Value] = {"rope.dimension_count": rope.dim, "rope.freq_base": rope.theta}
    if spec.rope_local is not None:
        fields["rope.freq_base_swa"] = spec.rope_local.theta
    elif graph.name == "gemma3":
        fields["rope.freq_base_swa"] = rope.theta
    given = 1.0  # the factor on cos and sin that llama.cpp finds itself
    if _keyed(rope) and rope.type in ("linear", "yarn"):
        fields |= {"rope.scaling.type": rope.type, "rope.scaling.factor": s["factor"]}
    if _keyed(rope) and rope.type == "yarn":
        fields["rope.scaling.original_context_length"] = int(s["original_max_position_embeddings"])
        given = 1.0 + 0.1 * math.log(s["factor"])
    wanted = inv_freq(rope)[1]
    if not math.isclose(wanted, given, rel_tol=1e-6):
        fields["rope.scaling.attn_factor"] = wanted / given
    return fields


def _keyed(rope: RopeSpec) -> bool:
    """Whether keys say all of it. YaRN's ramp has no keys that every graph reads: only its usual one is keyed."""
    if rope.type == "yarn":
        s = rope.scaling
        usual = (s.get("beta_fast", 32.0), s.get("beta_slow", 1.0), bool(s.get("truncate", 1.0))) == (32.0, 1.0, True)
        return usual and s["factor"] > 1 and s["original_max_position_embeddings"].is_integer()
    return rope.type in ("default", "linear")


def _words(rope: RopeSpec) -> str:
    return repr(rope.type) + (" with its own ramp" if rope.type == "yarn" else "")
