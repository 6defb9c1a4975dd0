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
        ("language=int4;lm_head", "names no layers"),
        ("language=int4;=int8", "names no layers"),
        ("language=int4;lm_head=int5", "'int5'"),
    ],
)
def test_anything_else_is_refused_in_one_line_that_says_what_is_allowed(text: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_last_rule_that_fits_a_layer_gives_its_precision() -> None:
    text = "language=int4:g64;layers.0-1=int8;mlp.down_proj=int8;layers.1.mlp.down_proj=fp16;lm_head=fp32"
    language = parse_recipe(text).language
    expected = {
        "layers.0.self_attn.q_proj": "int8",
        "layers.1.mlp.down_proj": "fp16",
        "layers.10.mlp.down_proj": "int8",
        "layers.10.mlp.up_proj": "int4:g64",
        "lm_head": "fp32",
    }
    assert {name: str(language.at(name)) for name in expected} == expected
    assert language.rule("layers.10.mlp.up_proj") is None
    assert parse_recipe(str(parse_recipe(text))) == parse_recipe(text)
