"""The weight types of a GGUF language model, by the names that llama.cpp's own tools give them.

Numbers: `llama_ftype` in llama.cpp's include/llama.h, at the version that the extra `gguf` pins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlm_models.errors import RecipeError

if TYPE_CHECKING:
    from vlm_quant.recipe import Precision, Weights


@dataclass(frozen=True)
class GgufType:
    """A type of file: `weights` is how coarse it is, `bits` what one weight takes in its blocks.

    `direct` types are written while the checkpoint streams by; the others are made by llama.cpp's quantizer, which can
    weigh errors by an importance matrix. `file_type` is the number under general.file_type.
    """

    name: str
    weights: Weights
    bits: float
    file_type: int
    direct: bool = False


GGUF_TYPES: Mapping[str, GgufType] = {
    type.name: type
    for type in (
        GgufType("f32", "fp32", 32, 0, direct=True),
        GgufType("f16", "fp16", 16, 1, direct=True),
        GgufType("bf16", "fp16", 16, 32, direct=True),
        GgufType("q8_0", "int8", 8.5, 7, direct=True),
        GgufType("q6_k", "int8", 6.5625, 18),
        GgufType("q5_1", "int4", 6, 9, direct=True),
        GgufType("q5_0", "int4", 5.5, 8, direct=True),
        GgufType("q5_k_m", "int4", 5.69, 17),
        GgufType("q5_k_s", "int4", 5.54, 16),
        GgufType("q4_1", "int4", 5, 3, direct=True),
        GgufType("q4_0", "int4", 4.5, 2, direct=True),
        GgufType("q4_k_m", "int4", 4.85, 15),
        GgufType("q4_k_s", "int4", 4.58, 14),
        GgufType("iq4_nl", "int4", 4.5, 25),
        GgufType("iq4_xs", "int4", 4.25, 30),
        GgufType("q3_k_l", "int3", 4.27, 13),
        GgufType("q3_k_m", "int3", 3.91, 12),
        GgufType("q3_k_s", "int3", 3.5, 11),
        GgufType("q2_k", "int2", 3.16, 10),
    )
}

_WORDS = {"fp32": "f32", "fp16": "f16", "int8": "q8_0", "int4": "q4_k_m"}


def gguf_type(precision: Precision) -> GgufType:
    """The GGUF type of a precision: its own, or the one that stands for the common word.

    Raises RecipeError for group sizes that GGUF's blocks do not have.
    """
    if precision.format in GGUF_TYPES:
        return GGUF_TYPES[precision.format]
    if precision.format or (precision.weights == "int4" and precision.group_size != 32):
        raise RecipeError(
            f"target 'gguf' has no precision {str(precision)!r}: its blocks are fixed; "
            f"choose int4 or one of {', '.join(GGUF_TYPES)}"
        )
    return GGUF_TYPES[_WORDS[precision.weights]]
