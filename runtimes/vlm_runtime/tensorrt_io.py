"""What the manifest says of a language model of the TensorRT layout: its inputs, outputs and cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from vlm_models.errors import BundleError, InputError
from vlm_models.plain import from_plain
from vlm_models.spec import LanguageSpec
from vlm_runtime.manifest import Part


@dataclass(frozen=True)
class LanguageIO:
    """The `io` of a language model's Part.

    `kv` "concat": past (1, KV, P, D) → present (1, KV, P + S, D); "scatter": a cache (1, KV, max_context, D) written
    in place. `dtype` is that of embeddings and cache; one call takes up to `prefill_chunk` rows.
    `check_graph` is a file that ONNX Runtime's CPU runs where it lacks what the graph uses.
    """

    kv: Literal["concat", "scatter"]
    dtype: Literal["fp32", "fp16", "bf16"]
    layers: int
    kv_heads: int
    head_dim: int
    max_context: int
    prefill_chunk: int
    check_graph: str | None = None

    def caches(self) -> list[tuple[str, str]]:
        """(input, output) of each layer's keys and values."""
        before, after = ("past_", "present_") if self.kv == "concat" else ("", "new_")
        suffix = "" if self.kv == "concat" else "_cache"
        kinds = [(layer, kind) for layer in range(self.layers) for kind in ("key", "value")]
        return [(f"{before}{kind}{suffix}.{layer}", f"{after}{kind}{suffix}.{layer}") for layer, kind in kinds]


def language_io(part: Part, spec: LanguageSpec) -> LanguageIO:
    """The `io` of the language model, checked against the model's spec. Raises BundleError."""
    io = _read(part)
    wanted = (spec.layers, spec.kv_heads, spec.head_dim)
    if (io.layers, io.kv_heads, io.head_dim) != wanted:
        raise BundleError(
            f"{part.graph} has {io.layers} layers of {io.kv_heads} × {io.head_dim} in its cache, "
            f"its spec says {wanted[0]} of {wanted[1]} × {wanted[2]}: export the model again"
        )
    if min(io.max_context, io.prefill_chunk) < 1:
        raise BundleError(f"{part.graph} takes {io.prefill_chunk} rows in a context of {io.max_context}: export again")
    return io


def check_graph(part: Part) -> str | None:
    """The file that ONNX Runtime's CPU runs in the place of `part.graph`, where there is one."""
    io = part.details.get("io")
    name = io.get("check_graph") if isinstance(io, Mapping) else None
    return name if name in part.files else None


def _read(part: Part) -> LanguageIO:
    io, known = part.details.get("io"), LanguageIO.__dataclass_fields__
    plain = {name: value for name, value in io.items() if name in known} if isinstance(io, Mapping) else io
    try:
        return from_plain(LanguageIO, plain, f"the manifest's io of {part.graph}")
    except InputError as error:
        raise BundleError(f"{error}: export the model again") from None
