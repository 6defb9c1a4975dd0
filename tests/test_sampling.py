"""Sampling has the maths of transformers' logits processors, in their order, and is reproducible."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from vlm_models.errors import CheckError, InputError
from vlm_runtime.sampling import Sampler, Sampling, distribution


def reference(logits: np.ndarray, sampling: Sampling, previous: list[int]) -> np.ndarray:
    """Probabilities (V,) by transformers' own processors."""
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        processors.append(MinPLogitsWarper(sampling.min_p))
    scores = processors(torch.tensor([previous], dtype=torch.long), torch.tensor(logits, dtype=torch.float64)[None])
    return scores.softmax(-1)[0].numpy()


def ours(logits: np.ndarray, sampling: Sampling, previous: list[int]) -> np.ndarray:
    """Probabilities (V,) by ours."""
    ids, probabilities = distribution(logits, sampling, previous)
    out = np.zeros(len(logits))
    out[ids] = probabilities
    return out


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    vocab=st.sampled_from([2, 3, 50, 700, 5000]),
    temperature=st.floats(0.05, 5),
    top_k=st.sampled_from([0, 1, 2, 5, 60, 1000]),
    top_p=st.sampled_from([1.0, 0.01, 0.313, 0.5417, 0.9071, 0.9999]),
    min_p=st.sampled_from([0.0, 0.0173, 0.2091, 1.0]),
    penalty=st.sampled_from([1.0, 0.7, 1.3, 5.0]),
)
def test_every_distribution_is_that_of_transformers(
    seed: int, vocab: int, temperature: float, top_k: int, top_p: float, min_p: float, penalty: float
) -> None:
    random = np.random.default_rng(seed)
    logits = (random.standard_normal(vocab) * 4).astype(np.float32)
    previous = random.integers(0, vocab, 6).tolist()
    sampling = Sampling(temperature, top_k, top_p, min_p, penalty)
    np.testing.assert_allclose(ours(logits, sampling, previous), reference(logits, sampling, previous), atol=1e-5)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_tokens_as_good_as_the_kth_stay(top_k: int) -> None:
    logits = np.array([1, 3, 3, 3, 0], np.float32)
    sampling = Sampling(1.0, top_k=top_k)
    np.testing.assert_allclose(ours(logits, sampling, []), reference(logits, sampling, []), atol=1e-6)


def test_the_nucleus_of_a_flat_distribution_is_half_of_it() -> None:
    logits = np.zeros(5000, np.float32)
    logits[:2500] = 1e-3  # a flat distribution: half of the probability needs 2,500 tokens
    assert np.count_nonzero(ours(logits, Sampling(1.0, top_p=0.5), [])) == pytest.approx(2499, abs=2)


def test_the_draws_follow_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    sampler = Sampler(Sampling(1.0, seed=3))
    counts = np.bincount([sampler.pick(logits, []) for _ in range(4000)], minlength=3) / 4000
    np.testing.assert_allclose(counts, [0.5, 0.3, 0.2], atol=0.03)


def test_draws_from_many_tokens_follow_the_distribution_too() -> None:
    logits = np.random.default_rng(2).standard_normal(1000).astype(np.float32) * 2
    sampler = Sampler(Sampling(1.0, seed=3))
    counts = np.bincount([sampler.pick(logits, []) for _ in range(20000)], minlength=1000)
    expected = ours(logits, Sampling(1.0), []) * 20000
    likely = expected > 20
    assert ((counts - expected)[likely] ** 2 / expected[likely]).sum() / likely.sum() < 1.5  # chi square


def test_the_same_seed_draws_the_same_tokens_and_another_does_not() -> None:
    logits = np.random.default_rng(0).standard_normal((40, 1000)).astype(np.float32)

    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(1.0, top_p=0.95, seed=seed))
        return [sampler.pick(row, []) for row in logits]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(None) != draw(None)


def test_greedy_takes_the_best_after_the_penalty_and_leaves_the_logits() -> None:
    logits = np.array([2.0, 1.9, -1.0], np.float32)
    assert Sampler(Sampling()).pick(logits, [0]) == 0
    assert Sampler(Sampling(repetition_penalty=1.5)).pick(logits, [0]) == 1
    assert logits.tolist() == np.array([2.0, 1.9, -1.0], np.float32).tolist()


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logits_that_are_not_numbers_are_an_error_not_a_token(temperature: float) -> None:
    with pytest.raises(CheckError, match="nan"):
        Sampler(Sampling(temperature)).pick(np.array([0.0, np.nan, 1.0], np.float32), [])


def test_a_vanishing_temperature_is_greedy_without_overflow() -> None:
    logits = np.array([-1e4, 1e4, 9e3], np.float32)
    assert Sampler(Sampling(1e-6, top_p=0.9, seed=0)).pick(logits, []) == 1


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("temperature", -0.1, "0 (greedy) or more"),
        ("temperature", math.nan, "0 (greedy) or more"),
        ("temperature", math.inf, "0 (greedy) or more"),
        ("top_k", -1, "0 (off) or more"),
        ("top_p", 0.0, "more than 0 and at most 1"),
        ("top_p", 1.1, "more than 0 and at most 1"),
        ("min_p", -0.1, "from 0 (off) to 1"),
        ("min_p", 2.0, "from 0 (off) to 1"),
        ("repetition_penalty", 0.0, "more than 0"),
        ("seed", -1, "0 or more"),
    ],
)
def test_a_value_out_of_range_says_what_is_allowed(field: str, value: float, allowed: str) -> None:
    with pytest.raises(InputError) as error:
        Sampling(**{field: value})  # type: ignore[arg-type]
    assert str(error.value).startswith(f"{field} is {value}: it must be ")
    assert allowed in str(error.value)
