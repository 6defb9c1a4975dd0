"""Ranges from a stream: equal to what all numbers at once give, by programs that share nothing with ours."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from vlm_quant.ranges import BINS, METHODS, Histogram, Method


def observed(*arrays: NDArray[Any]) -> Histogram:
    histogram = Histogram()
    for array in arrays:
        histogram.observe(array)
    return histogram


def numbers(kind: str, count: int = 100_000) -> NDArray[np.float32]:
    """What activations look like: bells, long tails, one sign, mostly zeros, a few outliers."""
    rng = np.random.default_rng(3)
    bell = rng.standard_normal(count)
    made = {
        "bell": bell,
        "tails": rng.standard_t(3, count),
        "one sign": np.log1p(np.exp(bell)),
        "zeros": np.maximum(bell - 1, 0),
        "outliers": np.where(rng.random(count) < 1e-4, 60 * bell, bell),
        "far from zero": bell + 20,
    }
    return np.asarray(made[kind], np.float32)


KINDS = ("bell", "tails", "one sign", "zeros", "outliers", "far from zero")


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40), st.randoms())
def test_counts_depend_on_neither_order_nor_pieces(values: list[float], random: Any) -> None:
    array = np.array(values, np.float32)
    at_once, shuffled = observed(array), list(values)
    random.shuffle(shuffled)
    one_by_one = observed(*(np.array([value], np.float32) for value in shuffled))
    assert at_once.counts.tolist() == one_by_one.counts.tolist()
    assert (at_once.width, at_once.low, at_once.high) == (one_by_one.width, one_by_one.low, one_by_one.high)
    assert at_once.counts.sum() == len(values)
    bins = np.floor(np.abs(array.astype(np.float64)) / at_once.width).astype(int)
    assert at_once.counts.tolist() == np.bincount(bins, minlength=BINS).tolist()


def test_at_least_half_of_the_bins_are_in_use_after_any_growth() -> None:
    bell = numbers("bell")
    histogram = observed(bell / 1000, bell * 7, bell)
    largest = float(np.abs(bell * 7).max())
    assert largest / (BINS * histogram.width) >= 0.5
    assert histogram.counts.shape == (BINS,)


@pytest.mark.parametrize("kind", KINDS)
def test_minmax_is_exact_and_holds_zero(kind: str) -> None:
    x = numbers(kind)
    assert observed(x[:500], x[500:]).range("minmax") == (min(0.0, float(x.min())), max(0.0, float(x.max())))


@pytest.mark.parametrize(("method", "percent"), [("p99.9", 99.9), ("p99.99", 99.99)])
@pytest.mark.parametrize("kind", KINDS)
def test_percentiles_are_those_of_all_magnitudes(kind: str, method: Method, percent: float) -> None:
    x = numbers(kind)
    histogram = observed(*np.split(x, 10))
    low, high = histogram.range(method)
    want = float(np.percentile(np.abs(x), percent, method="inverted_cdf"))
    assert max(-low, high) == pytest.approx(want, abs=histogram.width)
    assert low == pytest.approx(-want, abs=histogram.width) or low == min(0.0, float(x.min()))


def divergence(histogram: Histogram, kept: int, levels: int = 128) -> float:
    """KL as TensorRT's calibrator is described to find it, one bin after the other; clipped numbers are lost."""
    counts = [float(c) for c in histogram.counts]
    counts[0] = min(counts[:2])
    p = counts[:kept]
    p[-1] += sum(counts[kept:])
    q = [0.0] * kept
    for level in range(levels):
        members = [i for i in range(kept) if i * levels // kept == level and counts[i]]
        for i in members:
            q[i] = sum(counts[j] for j in members) / len(members)
    q[-1] = max(q[-1], 1)
    total = sum(p)
    return sum(a / total * math.log((a / total) / (b / total)) for a, b in zip(p, q, strict=True) if a)


@pytest.mark.parametrize("kind", ["tails", "outliers", "zeros"])
def test_entropy_loses_the_least_information(kind: str) -> None:
    histogram = observed(numbers(kind))
    low, high = histogram.range("entropy")
    used = int(histogram.counts.nonzero()[0].max()) + 1
    kept = math.ceil(max(-low, high) / histogram.width)
    tried = [divergence(histogram, i) for i in range(128, used + 1, 61)]
    assert divergence(histogram, kept) <= min(tried) * 1.02 + 1e-9


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_mse_rounds_the_numbers_themselves_best(kind: str, bits: int) -> None:
    x, levels = numbers(kind), 2 ** (bits - 1) - 1

    def error(limit: float) -> float:
        step = limit / levels
        return float(((np.clip(np.rint(x / step), -levels, levels) * step - x) ** 2).mean())

    low, high = observed(x).range("mse", bits=bits)
    best = min(error(limit) for limit in np.linspace(0.03, 1, 400) * np.abs(x).max())
    assert error(max(-low, high)) <= best * 1.02


def test_outliers_are_clipped_by_all_but_minmax() -> None:
    histogram = observed(numbers("outliers"))
    limits = {method: max(map(abs, histogram.range(method))) for method in METHODS}
    assert limits["p99.9"] < 4 < limits["p99.99"] < limits["minmax"]
    assert limits["entropy"] < 0.9 * limits["minmax"]
    assert limits["mse"] < 0.9 * limits["minmax"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_method_clips_more_than_a_few_numbers(kind: str, method: Method) -> None:
    x = numbers(kind)
    assert (np.abs(x) > max(map(abs, observed(x).range(method)))).mean() < 0.003


@pytest.mark.parametrize("method", METHODS)
def test_constants_and_zeros_have_ranges_too(method: Method) -> None:
    low, high = observed(np.full(100, 3.0)).range(method)
    assert low == 0
    assert high == pytest.approx(3, rel=1e-3)
    assert observed(np.zeros(100)).range(method) == (0, 0)
    assert observed(np.array([-2.0])).range(method)[1] == 0


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16])
def test_any_float_type_and_shape_is_counted(dtype: Any) -> None:
    x = numbers("bell", 600).astype(dtype)
    assert observed(x.reshape(2, 3, 100)).counts.tolist() == observed(x.astype(np.float32)).counts.tolist()
    assert not observed(x.reshape(2, 300)[:, :0]).finite


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_without_a_range_are_known(bad: float) -> None:
    """Also when finite ones follow."""
    histogram = observed(np.array([1.0]), np.array([bad, 2.0]), np.array([3.0]))
    assert not histogram.finite
    with pytest.raises(ValueError, match="no range"):
        histogram.range("minmax")
