"""Packing: single layers at their own precision, a quantizer's integers, int8 embeddings, all of it counted."""

from __future__ import annotations

import pytest

from vlm_export.target import find_target
from vlm_models.errors import RecipeError
from vlm_quant.recipe import PARTS, parse_recipe


@pytest.mark.parametrize("target", ["coreai"])
def test_a_target_that_takes_whole_parts_alone_refuses_rules(target: str) -> None:
    recipe = parse_recipe("language=fp16;lm_head=fp32")
    with pytest.raises(RecipeError, match="one precision for the whole language part") as caught:
        find_target(target).requires(recipe, None, [*PARTS], 64)  # type: ignore[arg-type]
    assert "leave out ;lm_head=fp32" in str(caught.value)
