"""SmoothQuant's scales: outliers move from inputs to weights, and int8 products come closer to the exact ones."""

from __future__ import annotations

import numpy as np

from vlm_quant.grouped import Float
from vlm_quant.smoothquant import round_rows, search_smoothing


def case() -> tuple[Float, Float]:
    """Weights (48, 64) and inputs (200, 64) with three outlier channels."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 64)).astype(np.float32)
    x[:, [5, 30, 31]] *= 50
    return rng.standard_normal((48, 64)).astype(np.float32), x


def lost(matrix: Float, x: Float, scales: Float) -> float:
    product = round_rows(x / scales) @ round_rows(matrix * scales).T
    return float(np.square(product - x @ matrix.T).sum())


def test_rows_are_rounded_to_255_values() -> None:
    matrix, _ = case()
    matrix[7] = 0
    rounded = round_rows(matrix)
    step = np.abs(matrix).max(axis=1, keepdims=True) / 127
    assert (np.abs(rounded - matrix) <= step / 2 + 1e-6).all()
    assert max(len(np.unique(row)) for row in np.rint(rounded / np.where(step, step, 1))) <= 255
    assert (rounded[7] == 0).all()


def test_smoothing_lowers_the_error_of_int8_products() -> None:
    matrix, x = case()
    found = search_smoothing([matrix], x, np.abs(x).max(0), np.arange(64))
    assert found.power > 0
    assert found.scales[5] > 3 * found.scales[6]
    assert lost(matrix, x, found.scales) < 0.3 * lost(matrix, x, np.ones(64, np.float32))
    np.testing.assert_allclose(found.scaled, lost(matrix, x, found.scales), rtol=1e-3)


def test_heads_that_share_a_channel_share_its_scale() -> None:
    matrix, x = case()
    source = np.arange(64) // 32 * 16 + np.arange(64) % 16
    found = search_smoothing([matrix, matrix * 2], x, np.abs(x).max(0), source)
    assert found.scales.shape == (32,)
    both = lost(matrix, x, found.scales[source]) * 5  # twice the weights, four times the squared error
    np.testing.assert_allclose(found.scaled, both, rtol=1e-3)


def test_unused_channels_keep_finite_scales() -> None:
    matrix, x = case()
    x[:, :8], matrix[:, 8:10] = 0, 0
    for rows in (x, np.zeros_like(x)):
        found = search_smoothing([matrix], rows, np.abs(rows).max(0), np.arange(64))
        assert np.isfinite(found.scales).all()
        assert (found.scales > 0).all()


def test_one_scale_for_all_rows_is_smoothed_for_its_own_error() -> None:
    """Rows of which one is much larger than the others: a scale a row hides what a scale for all loses."""
    matrix, x = case()
    x[3] *= 20
    largest, ones = np.abs(x).max(0), np.ones(64, np.float32)

    def lost_to_one_scale(scales: Float) -> float:
        step = np.float32((largest / scales).max() / 127)
        product = np.rint(x / scales / step) * step @ round_rows(matrix * scales).T
        return float(np.square(product - x @ matrix.T).sum())

    found = search_smoothing([matrix], x, largest, np.arange(64), whole=True)
    by_rows = search_smoothing([matrix], x, largest, np.arange(64))
    np.testing.assert_allclose(found.scaled, lost_to_one_scale(found.scales), rtol=1e-3)
    assert found.scaled < 0.3 * lost_to_one_scale(ones)
    assert found.scaled <= lost_to_one_scale(by_rows.scales)
    assert found.plain > 2 * by_rows.plain
