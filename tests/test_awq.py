"""AWQ's scales: less output error than none, one for all heads that read a channel, none where nothing is gained."""

from __future__ import annotations

import numpy as np

from vlm_quant.awq import round_scaled, search_scales
from vlm_quant.grouped import Float, Form

FORM = Form(4, 32, False)


def case(seed: int = 0) -> tuple[Float, Float]:
    """Weights (32, 64) and inputs (400, 64) of which four channels are twenty times larger."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((400, 64)).astype(np.float32)
    x[:, [3, 17, 40, 41]] *= 20
    return rng.standard_normal((32, 64)).astype(np.float32), x


def lost(matrix: Float, x: Float, scales: Float, form: Form = FORM) -> float:
    return float(np.square(x @ (round_scaled(matrix, scales, form) - matrix).T).sum())


def test_scales_lower_the_output_error() -> None:
    matrix, x = case()
    found = search_scales([(matrix, FORM)], x, np.abs(x).mean(0), np.arange(64))
    ones = np.ones(64, np.float32)
    assert found.power > 0
    assert lost(matrix, x, found.scales) < 0.7 * lost(matrix, x, ones)
    np.testing.assert_allclose(found.plain, lost(matrix, x, ones), rtol=1e-3)
    np.testing.assert_allclose(found.scaled, lost(matrix, x, found.scales), rtol=1e-3)
    assert found.scales[3] > found.scales[4]


def test_layers_that_read_the_same_rows_share_scales() -> None:
    (matrix, x), (other, _) = case(), case(1)
    found = search_scales([(matrix, FORM), (other * 3, Form(8, 0, True))], x, np.abs(x).mean(0), np.arange(64))
    both = [lost(matrix, x, found.scales), lost(other * 3, x, found.scales, Form(8, 0, True))]
    np.testing.assert_allclose(found.scaled, sum(both), rtol=1e-3)


def test_heads_that_share_a_channel_share_its_scale() -> None:
    matrix, x = case()
    source = np.arange(64) // 32 * 16 + np.arange(64) % 16  # two heads of 16 channels read each of two
    found = search_scales([(matrix, FORM)], x, np.abs(x).mean(0), source)
    assert found.scales.shape == (32,)
    np.testing.assert_allclose(found.scaled, lost(matrix, x, found.scales[source]), rtol=1e-3)


def test_no_scale_is_better_than_a_bad_one() -> None:
    """Exactly representable weights lose nothing, whatever the inputs are: the power stays 0."""
    _, x = case()
    matrix = np.tile(np.arange(16, dtype=np.float32) - 8, (32, 4))
    found = search_scales([(matrix, FORM)], x, np.abs(x).mean(0), np.arange(64))
    assert (found.power, found.plain) == (0, 0)
    assert (found.scales == 1).all()


def test_unused_channels_keep_finite_scales() -> None:
    matrix, x = case()
    x[:, :8] = 0
    for rows in (x, np.zeros_like(x)):
        found = search_scales([(matrix, FORM)], rows, np.abs(rows).mean(0), np.arange(64))
        assert np.isfinite(found.scales).all()
        assert (found.scales > 0).all()
