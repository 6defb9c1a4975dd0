"""Grids in groups, and GPTQ's integers on them: less output error than rounding to nearest, never off the grid."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from vlm_quant.gptq import quantize_gptq, unit_factor
from vlm_quant.grouped import Float, Form, dequantize_grouped, fit, quantize_grouped, spread

FORMS = [Form(4, 16, False), Form(4, 32, True), Form(4, 256, False), Form(4, 0, False), Form(8, 0, True)]


def weights(rows: int = 24, columns: int = 96, seed: int = 0) -> Float:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def inputs(rows: int = 500, columns: int = 96, seed: int = 1) -> NDArray[np.float64]:
    """Correlated channels of very different sizes, as hidden states have."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((columns, columns)) / np.sqrt(columns)
    return rng.standard_normal((rows, columns)) @ (mix + np.eye(columns) * 0.3) * np.exp(rng.standard_normal(columns))


def lost(matrix: Float, other: Float, x: NDArray[np.float64]) -> float:
    return float(np.square(x @ (other - matrix).T).sum())


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_nearest_is_within_half_a_step(form: Form) -> None:
    matrix = weights()
    grouped = quantize_grouped(matrix, *fit(matrix, form), form)
    off = np.abs(dequantize_grouped(grouped) - matrix) / spread(grouped.scales, grouped.group_size, 96)
    # A zero point is rounded too, so the ends of a range may be cut by half a step more.
    assert off.max() <= (0.5001 if form.symmetric else 1.0001)
    assert (grouped.integers.min(), grouped.integers.max()) >= (form.range[0], 0)
    assert grouped.integers.max() <= form.range[1]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_least_weighted_error_is_found(form: Form) -> None:
    matrix, weigh = weights(), np.geomspace(0.01, 10, 96).astype(np.float32)

    def error(*grid: Float) -> float:
        change = dequantize_grouped(quantize_grouped(matrix, *grid, form)) - matrix
        return float((np.square(change) * weigh).sum())

    assert error(*fit(matrix, form, weigh)) < error(*fit(matrix, form))


def test_groups_of_zeros_and_short_groups_are_kept() -> None:
    matrix = weights(4, 40)
    matrix[:, :16] = 0
    for form in (Form(4, 16, False), Form(4, 16, True)):
        for weigh in (None, np.ones(40, np.float32)):
            scales, zeros = fit(matrix, form, weigh)
            assert scales.shape == zeros.shape == (4, 3)
            assert (scales[:, 0] == 1).all()
            back = dequantize_grouped(quantize_grouped(matrix, scales, zeros, form))
            assert (back[:, :16] == 0).all()
            assert np.abs(back - matrix).max() < 0.7


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gptq_loses_less_than_nearest(form: Form) -> None:
    matrix, x = weights(), inputs()
    ours = quantize_gptq(matrix, x.T @ x, form)
    nearest = quantize_grouped(matrix, *fit(matrix, form), form)
    assert lost(matrix, dequantize_grouped(ours), x) < 0.8 * lost(matrix, dequantize_grouped(nearest), x)
    assert form.range[0] <= ours.integers.min() <= ours.integers.max() <= form.range[1]
    held_out = inputs(seed=1)[:0:-1]
    assert lost(matrix, dequantize_grouped(ours), held_out) < lost(matrix, dequantize_grouped(nearest), held_out)


def test_independent_inputs_leave_every_column_to_itself() -> None:
    """A diagonal Hessian moves no error, so GPTQ is rounding to nearest on its grid."""
    matrix, form = weights(), Form(4, 32, False)
    diagonal = np.linspace(1, 2, 96)
    ours = quantize_gptq(matrix, np.diag(diagonal), form)
    grid = fit(matrix, form, (diagonal / diagonal.mean()).astype(np.float32))
    np.testing.assert_array_equal(ours.integers, quantize_grouped(matrix, *grid, form).integers)


def test_channels_that_are_never_used_do_no_harm() -> None:
    matrix, x = weights(), inputs()
    x[:, 10:20] = 0
    for hessian in (x.T @ x, np.zeros((96, 96))):
        ours = dequantize_grouped(quantize_gptq(matrix, hessian, Form(4, 32, False)))
        assert np.isfinite(ours).all()
        assert np.abs(ours - matrix).max() < 2


def test_fewer_rows_than_channels_are_enough() -> None:
    matrix, x = weights(), inputs(20)
    assert np.isfinite(dequantize_grouped(quantize_gptq(matrix, x.T @ x, Form(4, 32, True)))).all()


@pytest.mark.parametrize("size", [1, 255, 256, 257, 600])
def test_the_factor_is_that_of_the_damped_hessian(size: int) -> None:
    x = inputs(3 * size, size)
    hessian, order = x.T @ x, np.random.default_rng(0).permutation(size)
    factor = unit_factor(hessian, order, 1.0).astype(np.float64)
    np.testing.assert_array_equal(factor, np.tril(factor))
    damped = hessian[order][:, order] / np.diag(hessian).mean() + np.eye(size)
    exact = np.linalg.cholesky(damped)
    np.testing.assert_allclose(factor, exact / np.diag(exact), atol=1e-4)


def test_a_hessian_that_is_not_positive_is_damped_more() -> None:
    x = inputs(20)
    hessian, order = x.T @ x, np.arange(96)
    hessian -= np.eye(96) * 0.05 * np.diag(hessian).mean()
    np.testing.assert_array_equal(unit_factor(hessian, order, 0.01), unit_factor(hessian, order, 0.1))


@pytest.mark.parametrize("columns", [7, 8, 9, 96])
def test_columns_are_rounded_as_the_inverse_says(columns: int) -> None:
    """The paper's updates, one column at a time, by the Cholesky factor of the inverse."""
    matrix, x, form = weights(24, columns), inputs(500, columns), Form(4, 16, False)
    hessian = x.T @ x
    ours = quantize_gptq(matrix, hessian, form)
    assert ours.zeros is not None
    diagonal = np.diag(hessian)
    inverse = np.linalg.inv(hessian / diagonal.mean() + 0.01 * np.eye(columns))
    scale, zero = (spread(t.astype(np.float32), 16, columns).astype(np.float64) for t in (ours.scales, ours.zeros))
    free, left = matrix.astype(np.float64), list(np.argsort(-diagonal, kind="stable"))
    integers = np.empty(matrix.shape)
    while left:
        i, *left = left
        integers[:, i] = np.clip(np.rint(free[:, i] / scale[:, i]) + zero[:, i], 0, 15)
        error = (free[:, i] - (integers[:, i] - zero[:, i]) * scale[:, i]) / inverse[i, i]
        free[:, left] -= np.outer(error, inverse[i, left])
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    assert (ours.integers == integers).mean() > 0.999
