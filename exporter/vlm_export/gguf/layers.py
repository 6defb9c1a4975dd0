"""Types of single tensors of a GGUF, from the rules of a precision."""

from __future__ import annotations

import re
from collections.abc import Mapping

from vlm_export.gguf.tensors import HEAD, TOKEN_EMBEDDING, gguf_name
from vlm_export.rules import HEAD as HEAD_LAYER
from vlm_export.rules import check_rules, language_layers
from vlm_models.errors import RecipeError
from vlm_models.spec import LanguageSpec
from vlm_quant.gguf_types import GgufType, gguf_type
from vlm_quant.recipe import Precision

_FUSED = re.compile(r"(self_attn\.)[qkv]_proj|(mlp\.)(?:gate|up)_proj")


def tensor_types(precision: Precision, spec: LanguageSpec) -> dict[str, str]:
    """GGUF tensor name → ggml type ("q8_0") of every matrix that a rule speaks of.

    Raises RecipeError for rules that fit no layer, that part layers which one matrix holds, that name no GGUF type, and
    for types of llama.cpp's quantizer beside a part in floats.
    """
    check_rules(precision, language_layers(spec), "language_model")
    whole, found = gguf_type(precision), dict[str, str | None]()
    for layer in language_layers(spec):
        rule = precision.rule(layer)
        kind = None if rule is None else ggml_of(gguf_type(rule))
        name = _tensor(layer, spec)
        if found.setdefault(name, kind) != kind:
            raise RecipeError(
                f"target 'gguf' holds {layer} in one matrix with its neighbours, {name}: give them one precision"
            )
    types = {name: kind for name, kind in found.items() if kind is not None}
    if whole.bits >= 16 and not _direct(precision):
        raise RecipeError(
            f"precision {str(precision)!r} has rules of types that llama.cpp makes for quantized parts alone: "
            f"give the whole language part such a type, as in {_example(precision)!r}"
        )
    return types


def direct(precision: Precision) -> bool:
    """Whether every tensor's type is written while the checkpoint streams by."""
    return gguf_type(precision).direct and _direct(precision)


def ggml_of(type: GgufType) -> str:
    """The tensor type after which a type of file is named: "q4_k" of "q4_k_m"."""
    return re.sub("_[sml]$", "", type.name)


def kept(precision: Precision, types: Mapping[str, str], fallbacks: Mapping[str, str], tied: bool) -> dict[str, str]:
    """Matrices of a quantized file that stay in floats, and why; those of "q8_0" beside coarser ones too."""
    whole, found = gguf_type(precision), {}
    if whole.bits >= 16:
        return {}
    for name, kind in types.items():
        if name in fallbacks and kind in ("f32", "f16", "bf16"):
            found[name] = fallbacks[name]
        elif kind in ("f16", "bf16"):
            found[name] = f"{kind}: asked for by a rule"
        elif kind == "q8_0" and whole.bits < 6.5 and name in (HEAD, TOKEN_EMBEDDING) and whole.direct:
            head = name == HEAD or tied
            reason = "its errors count most; a rule for lm_head makes it smaller" if head else "rows are looked up"
            found[name] = f"q8_0: {reason}"
    return found


def _direct(precision: Precision) -> bool:
    return all(gguf_type(rule).direct for _, rule in precision.rules)


def _example(precision: Precision) -> str:
    return f"language=q8_0;{';'.join(f'{pattern}={rule}' for pattern, rule in precision.rules)}"


def _tensor(layer: str, spec: LanguageSpec) -> str:
    if layer == HEAD_LAYER:
        return TOKEN_EMBEDDING if spec.tied else HEAD
    if spec.fused:
        layer = _FUSED.sub(lambda m: f"{m[1]}qkv_proj" if m[1] else f"{m[2]}gate_up_proj", layer)
    return gguf_name(f"language_model.{layer}.weight", spec)
