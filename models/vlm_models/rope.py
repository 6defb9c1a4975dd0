"""Rotary position embedding: inverse frequencies of the scaling types that checkpoints use.

Sources: RoFormer (arXiv 2104.09864); linear: arXiv 2306.15595; llama3: the Llama 3.1 release; YaRN: arXiv 2309.00071.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from vlm_models.spec import RopeSpec

F32 = npt.NDArray[np.float32]


def inv_freq(rope: RopeSpec) -> tuple[F32, float]:
    """Inverse frequencies (dim/2,) in radians per position, and the factor on cos and sin."""
    exponent = np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)
    base = (1.0 / np.power(np.float32(rope.theta), exponent)).astype(np.float32)
    s = rope.scaling
    if rope.type == "linear":
        return (base / np.float32(s["factor"])).astype(np.float32), 1.0
    if rope.type == "llama3":
        return _llama3(base, s), 1.0
    if rope.type == "yarn":
        return _yarn(base, rope), s.get("attention_factor", _attention_factor(rope))
    return base, 1.0


def cos_sin(rope: RopeSpec, positions: int) -> tuple[F32, F32]:
    """cos and sin (positions, dim/2) for half-split rotation, the attention factor included."""
    frequencies, factor = inv_freq(rope)
    angles = np.outer(np.arange(positions, dtype=np.float32), frequencies)
    return (np.cos(angles) * np.float32(factor)), (np.sin(angles) * np.float32(factor))


def _llama3(base: F32, s: Any) -> F32:
    """Long wavelengths are divided by `factor`, short ones kept, a linear blend between."""
    length, low, high = s["original_max_position_embeddings"], s["low_freq_factor"], s["high_freq_factor"]
    wavelength = 2 * math.pi / base
    blend = (length / wavelength - low) / (high - low)
    blended = (1 - blend) * base / s["factor"] + blend * base
    out = np.where(wavelength > length / low, base / s["factor"], base)
    middle = (wavelength >= length / high) & (wavelength <= length / low)
    return np.where(middle, blended, out).astype(np.float32)


def _yarn(base: F32, rope: RopeSpec) -> F32:
    """Channels that turn often in the original context are kept, slow ones interpolated, a ramp between."""
    s, dim = rope.scaling, rope.dim
    length = s["original_max_position_embeddings"]

    def channel(turns: float) -> float:
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = channel(s.get("beta_fast", 32.0)), channel(s.get("beta_slow", 1.0))
    if s.get("truncate", 1.0):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / max(high - low, 0.001), 0, 1)
    out: F32 = (base / np.float32(s["factor"]) * ramp + base * (1 - ramp)).astype(np.float32)
    return out


def _attention_factor(rope: RopeSpec) -> float:
    s = rope.scaling

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(s["factor"]) + 1.0 if s["factor"] > 1 else 1.0

    if s.get("mscale") and s.get("mscale_all_dim"):
        return mscale(s["mscale"]) / mscale(s["mscale_all_dim"])
    return mscale(1.0)
