"""Recipes: what can be typed after --precision, and what is said about everything else."""

from __future__ import annotations

import pytest

from vlm_models.errors import RecipeError
from vlm_quant.recipe import PRESETS, Precision, Recipe, parse_recipe


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_being_written_down(name: str) -> None:
    assert parse_recipe(str(parse_recipe(name))) == parse_recipe(name)


def test_parts_left_out_take_fp16_and_both_spellings_are_read() -> None:
    fp16 = Precision("fp16")
    assert parse_recipe("language=int4:g128") == Recipe(fp16, fp16, Precision("int4", 128))
    both = parse_recipe(" vision_encoder = int8 , language_model=int4")
    assert both == Recipe(Precision("int8"), fp16, Precision("int4", 32))
    assert str(both) == "vision=int8,projector=fp16,language=int4:g32"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("int5", "'int5': choose one of fp32, fp16, int8, int4"),
        ("", "choose one of fp32"),
        ("int4:g64", "or name parts"),
        ("tower=int8", "unknown part 'tower'"),
        ("language=int3", "'int3'"),
        ("language=int4:g48", "g16, g32, g64, g128, g256"),
        ("language=int8:g32", "only int4 has groups"),
        ("language=int4:", "only int4 has groups"),
        ("vision=int8,vision_encoder=fp16", "twice"),
        ("vision=int8,", "choose one of"),
    ],
)
def test_anything_else_is_refused_in_one_line_that_says_what_is_allowed(text: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
