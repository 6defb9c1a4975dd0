"""What an engine must be, by what the builder said of it: a cache updated in place, weights once and at their bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_export.table import size
from vlm_models.errors import CheckError

INT4_LIMIT = 0.45  # of the bytes that the same weights take in fp16
_FIXED = 32 << 20  # of an engine that are no weights: its graph and its kernels
_SPREAD = 1.5


def verify(who: str, told: Mapping[str, Any], weights: int, io: Mapping[str, Any]) -> list[str]:
    """Remarks on an engine. `told` is the worker's result, `weights` the bytes of weights in the graph's files.

    Raises CheckError where the engine holds weights twice, or not at four bits, or lost the cache update.
    """
    layers: Mapping[str, int] = told["layers"]
    most = _SPREAD * max(weights, int(told["constant_bytes"])) + _FIXED
    if told["bytes"] > most:
        raise CheckError(
            f"{who}: the engine has {size(told['bytes'])} for {size(weights)} of weights: "
            f"they were stored twice or at more bits; please report it with the checkpoint's name"
        )
    share = int4_share(told["weights"])
    if share >= 0.75 and told["bytes"] - _FIXED > INT4_LIMIT * fp16_bytes(told["weights"]):
        raise CheckError(
            f"{who}: the int4 engine has {size(told['bytes'])}, more than {INT4_LIMIT} of what fp16 takes "
            f"({size(fp16_bytes(told['weights']))}); try another group, as in --precision language=int4:g128"
        )
    updates = layers.get("KV_CACHE_UPDATE", 0)
    if io.get("kv") == "scatter" and updates != 2 * io["layers"]:
        raise CheckError(
            f"{who}: {updates} of {2 * io['layers']} KV caches are updated in place; try --tensorrt-kv concat"
        )
    attended = layers.get("ATTENTION", 0)
    if "layers" in io and attended < io["layers"]:
        return [f"{who}: attention of {io['layers'] - attended} of {io['layers']} layers is not one fused layer"]
    return []


def fp16_bytes(weights: Mapping[str, int]) -> int:
    """What numbers of weights by type ({"INT4": …}) would take in fp16."""
    return 2 * sum(weights.values())


def int4_share(weights: Mapping[str, int]) -> float:
    """The share of weights that have four bits."""
    return weights.get("INT4", 0) / max(1, sum(weights.values()))
