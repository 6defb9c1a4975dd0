"""What the families of the Llama line share: a transformers text config → LanguageSpec."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_models.errors import CheckpointError
from vlm_models.spec import LanguageSpec, RopeSpec

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "relu")


def decoder(config: Any, **options: Any) -> LanguageSpec:
    """LanguageSpec of a transformers text config; `options` are the fields in which the family differs."""
    heads = int(config.num_attention_heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    activation = options.pop("activation", None) or config.hidden_act
    if activation not in ACTIVATIONS:
        raise CheckpointError(f"activation {activation!r} is not supported: {', '.join(ACTIVATIONS)} are")
    if getattr(config, "use_bidirectional_attention", None):
        raise CheckpointError("use_bidirectional_attention is not supported: only causal decoders are")
    options.setdefault("rope", rope(config.rope_parameters, head_dim, config))
    options.setdefault("windows", windows(config))
    return LanguageSpec(
        model_type=config.model_type,
        vocab_size=int(config.vocab_size),
        hidden_size=int(config.hidden_size),
        intermediate_size=int(config.intermediate_size),
        layers=int(config.num_hidden_layers),
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=head_dim,
        norm_eps=float(config.rms_norm_eps),
        activation=activation,
        max_positions=int(config.max_position_embeddings),
        tied=bool(config.tie_word_embeddings),
        **options,
    )


def rope(parameters: Mapping[str, Any] | None, head_dim: int, config: Any) -> RopeSpec:
    """RopeSpec of one rope_parameters entry as transformers 5 standardises it."""
    p = dict(parameters or {})
    kind: Any = p.get("rope_type") or p.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise CheckpointError(f"rope scaling {kind!r} is not supported: {', '.join(ROPE_TYPES)} are")
    scaling = {
        key: float(value)
        for key, value in p.items()
        if isinstance(value, int | float) and key not in ("rope_theta", "partial_rotary_factor")
    }
    if kind == "default":
        scaling = {}
    elif kind in ("llama3", "yarn"):
        original = getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
        scaling.setdefault("original_max_position_embeddings", float(original))
    if kind != "default" and "factor" not in scaling:
        raise CheckpointError(f"rope scaling {kind!r} has no factor in config.json")
    dim = int(head_dim * float(p.get("partial_rotary_factor") or 1.0))
    theta = p.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0
    return RopeSpec(theta=float(theta), dim=dim, type=kind, scaling=scaling)


def windows(config: Any) -> tuple[int, ...]:
    """Positions each layer attends to (0: all), from layer_types where given, else one window for all layers."""
    window = int(getattr(config, "sliding_window", None) or 0)
    types = getattr(config, "layer_types", None)
    if types is None:
        return (window,) * int(config.num_hidden_layers)
    if unknown := sorted(set(types) - {"full_attention", "sliding_attention"}):
        raise CheckpointError(f"attention layers of type {unknown[0]!r} are not supported")
    return tuple(window if kind == "sliding_attention" else 0 for kind in types)
