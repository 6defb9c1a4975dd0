"""Splicing: the same numbers in the same places as transformers' masked_scatter, or an error with both counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bundles import HIDDEN, IMAGE_ID, VOCAB, tiny_bundle, tiny_table
from vlm_models.errors import BundleError, PromptError
from vlm_runtime.bundle import open_bundle
from vlm_runtime.embedding import EmbeddingTable
from vlm_runtime.splice import splice


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingTable:
    return EmbeddingTable(open_bundle(tiny_bundle(tmp_path_factory.mktemp("splice") / "bundle")))


def scattered(ids: list[int], rows: np.ndarray) -> np.ndarray:
    """What LlavaModel.forward does in transformers."""
    embeds = torch.from_numpy(tiny_table())[torch.tensor(ids, dtype=torch.long)]
    mask = (torch.tensor(ids) == IMAGE_ID).unsqueeze(-1).expand_as(embeds)
    return np.asarray(embeds.masked_scatter(mask, torch.from_numpy(rows)))


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, VOCAB - 1) | st.just(IMAGE_ID), max_size=40), cuts=st.lists(st.integers(0, 40)))
def test_splice_equals_masked_scatter(table: EmbeddingTable, ids: list[int], cuts: list[int]) -> None:
    places = ids.count(IMAGE_ID)
    rows = np.random.default_rng(len(ids)).normal(0, 1, (places, HIDDEN)).astype(np.float32)
    pictures = np.split(rows, sorted(min(c, places) for c in cuts))
    out = splice(ids, pictures, table)
    assert out.dtype == np.float32
    assert out.flags.c_contiguous
    np.testing.assert_array_equal(out, scattered(ids, rows) if ids else np.empty((0, HIDDEN), np.float32))


def test_pictures_keep_their_order(table: EmbeddingTable) -> None:
    pictures = [np.full((2, HIDDEN), n, np.float32) for n in (10, 20)]
    out = splice([1, IMAGE_ID, IMAGE_ID, 2, IMAGE_ID, IMAGE_ID], pictures, table)
    assert out[:, 0].tolist()[1:3] == [10, 10]
    assert out[:, 0].tolist()[4:] == [20, 20]


@pytest.mark.parametrize("given", [0, 1, 3])
def test_more_or_fewer_rows_than_image_tokens_are_refused(table: EmbeddingTable, given: int) -> None:
    rows = [np.zeros((given, HIDDEN), np.float32)] if given else []
    with pytest.raises(PromptError, match=f"2 image tokens, but {len(rows)} pictures give {given} rows"):
        splice([IMAGE_ID, 1, IMAGE_ID], rows, table)


@pytest.mark.parametrize("shape", [(1, HIDDEN + 1), (1, HIDDEN - 1), (1, 1, HIDDEN), (1,)])
def test_rows_of_another_model_are_refused(table: EmbeddingTable, shape: tuple[int, ...]) -> None:
    with pytest.raises(BundleError, match="the parts are not of the same model"):
        splice([IMAGE_ID], [np.zeros(shape, np.float32)], table)


def test_the_row_of_the_image_token_need_not_be_in_the_table(tmp_path: Path) -> None:
    table = EmbeddingTable(open_bundle(tiny_bundle(tmp_path / "bundle")))
    table.image_token_id = VOCAB + 9
    out = splice([VOCAB + 9, 1], [np.ones((1, HIDDEN), np.float32)], table)
    assert out[0].tolist() == [1.0] * HIDDEN
