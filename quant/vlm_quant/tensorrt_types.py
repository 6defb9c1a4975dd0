"""The weight types that TensorRT has beside the common words, by the names that a recipe gives them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlm_quant.recipe import Weights


@dataclass(frozen=True)
class TensorRTType:
    """A type of weights: `weights` is how coarse it is, `bits` what one weight takes.

    `activations` are rounded too, by ranges from calibration pairs.
    """

    name: str
    weights: Weights
    bits: float
    activations: bool = False


TENSORRT_TYPES: Mapping[str, TensorRTType] = {
    type.name: type
    for type in (
        TensorRTType("bf16", "fp16", 16),
        TensorRTType("w8a8", "int8", 8, activations=True),
        TensorRTType("fp8", "int8", 8, activations=True),
    )
}
