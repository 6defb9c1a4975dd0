"""Trying recipes out: a simulated model is what the target builds, questions are answered as one by one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import MakeTiny
from vlm_export.importance import examples
from vlm_export.quality import ask, compared, held_out
from vlm_export.simulate import Rounding, decoder_linears, rounded, rounding, simulate
from vlm_models.errors import RecipeError
from vlm_models.model import load_model
from vlm_quant.affine import dequantize_int4, dequantize_int8, quantize_int4, quantize_int8
from vlm_quant.calibration import Calibration, read_pairs
from vlm_quant.recipe import Precision, parse_recipe

ASKED = (("What colour is it?", "It is red."), ("How many squares?", "Two"), ("What colour?", None))
FAMILIES = ("llama", "phi3", "gemma2", "gemma3_text", "qwen3", "smollm")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    folder, rng = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    lines = []
    for i in range(3):
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        for prompt, answer in ASKED[: 3 - i]:
            lines.append(json.dumps({"image": f"{i}.png", "prompt": prompt, "answer": answer}))
    (folder / "calibration.jsonl").write_text("\n".join(lines))
    return read_pairs(folder)


@pytest.mark.parametrize("text", FAMILIES)
def test_questions_asked_together_are_answered_as_one_by_one(
    make_tiny: MakeTiny, pairs: Calibration, text: str
) -> None:
    model = load_model(make_tiny(text=text))
    held = held_out(model, pairs)
    assert len(held.packed.embeds) < sum(len(q.embeds) for q in held.questions) - 20  # rows of pictures are shared
    at = 0
    for question in held.questions:
        logits = model.language_model().forward(question.embeds[: question.read.stop], last_row=False)
        want = logits[question.first :].log_softmax(-1).numpy()
        np.testing.assert_allclose(held.log_probs[at : at + len(want)], want, atol=2e-4)
        at += len(want)
    assert at == len(held.log_probs)


def test_a_pair_without_an_answer_takes_the_checkpoints_own(tiny: Path, pairs: Calibration) -> None:
    model = load_model(tiny)
    held = held_out(model, pairs)
    own = examples(model, held.pairs)
    said = [q for q, pair in zip(held.questions, held.pairs.pairs, strict=True) if pair.answer is None]
    assert len(said) == 1
    language, rows = model.language_model(), own[2].embeds
    best = int(language.forward(rows)[0].argmax())
    assert said[0].answer[0] == best
    at = sum(len(q.answer) for q in held.questions[:2])
    assert [int(row.argmax()) for row in held.log_probs[at : at + len(said[0].answer)]] == list(said[0].answer)


def test_the_checkpoint_itself_loses_nothing_and_coarser_recipes_lose_more(tiny: Path, pairs: Calibration) -> None:
    model = load_model(tiny)
    held = held_out(model, pairs)
    same = ask(simulate(model, parse_recipe("fp32")), held)
    assert np.abs(same.kl).max() < 1e-6
    assert same.top1 == 1.0
    found = [ask(simulate(model, parse_recipe(text)), held).mean_kl for text in ("int8", "int4", "language=int4:g256")]
    assert 0 < found[0] < found[1] < found[2]


def test_beginning_at_a_later_layer_changes_nothing(tiny: Path, pairs: Calibration) -> None:
    model = load_model(tiny)
    held = held_out(model, pairs)
    layers = model.spec.language.layers
    for text, layer in (
        ("language=fp32;layers.2=int4", 2),
        ("language=fp32;layers.1.mlp=int8", 1),
        ("language=fp32;lm_head=int4", layers),
    ):
        variant = simulate(model, parse_recipe(f"vision=fp32,projector=fp32,{text}"))
        whole, late = ask(variant, held), ask(variant, held, layer)
        np.testing.assert_allclose(late.kl, whole.kl, atol=1e-6)
        assert late.kl.max() > 1e-7


def test_weights_are_those_that_the_target_stores(make_tiny: MakeTiny) -> None:
    model = load_model(make_tiny(text="phi3"))
    recipe = parse_recipe("language=int4;layers.1=int8;lm_head=fp32,vision=int8,projector=int4:g16")
    variant = simulate(model, recipe)
    for linear in decoder_linears(model.spec.language):
        rows = (linear.weight.tensor, linear.weight.start, linear.weight.stop)
        plain, got = model.checkpoint.rows(*rows), variant.checkpoint.rows(*rows)
        want = plain
        if linear.name.startswith("layers.1."):
            want = dequantize_int8(quantize_int8(plain))
        elif linear.name != "lm_head":
            want = dequantize_int4(quantize_int4(plain, 32), plain.shape[1])
        np.testing.assert_array_equal(got, want)
    name = "multi_modal_projector.linear_1.weight"
    want = dequantize_int4(quantize_int4(model.checkpoint.rows(name), 16), model.checkpoint.shape(name)[1])
    np.testing.assert_array_equal(variant.checkpoint.rows(name), want)
    module = variant.vision_encoder().tower.get_submodule("encoder.layers.0.mlp.fc1")
    plain = model.checkpoint.rows("vision_tower.encoder.layers.0.mlp.fc1.weight")
    np.testing.assert_array_equal(module.weight.detach().numpy(), dequantize_int8(quantize_int8(plain)))


def test_a_tied_table_is_looked_up_as_it_is_and_rounded_as_head(make_tiny: MakeTiny) -> None:
    model = load_model(make_tiny(text="smollm"))
    table = "language_model.embed_tokens.weight"
    plain = model.checkpoint.rows(table)
    variant = simulate(model, parse_recipe("language=int4;lm_head=int4"))
    assert model.spec.language.tied
    assert variant.checkpoint.rows(table) is not None
    np.testing.assert_array_equal(variant.checkpoint.rows(table), plain)
    assert not np.array_equal(variant.checkpoint.rows("lm_head.weight"), plain)
    rounded_table = simulate(model, parse_recipe("language=fp32,embedding=int8")).checkpoint
    np.testing.assert_array_equal(rounded_table.rows(table), dequantize_int8(quantize_int8(plain)))
    np.testing.assert_array_equal(rounded_table.rows("lm_head.weight"), plain)


def test_what_a_layer_is_given_is_rounded_by_row_or_group() -> None:
    x = torch.tensor([[127.0, 0.4, 0.6, -3.5], [0.0, 0.0, 0.0, 0.0]])
    assert rounded(x, Rounding(8)).tolist() == [[127.0, 0.0, 1.0, -4.0], [0.0, 0.0, 0.0, 0.0]]
    assert rounded(x, Rounding(16)) is x
    torch.testing.assert_close(rounded(x, Rounding(4, 2))[0, 2:], torch.tensor([0.606, -3.5]), atol=1e-3, rtol=0)


def test_what_a_recipe_makes_of_a_layer() -> None:
    whole = Precision("int4", 64, rules=(("layers.0-1", Precision("int8")), ("v_proj", Precision("fp16"))))
    assert rounding(whole, "layers.2.mlp.up_proj") == Rounding(4, 64)
    assert rounding(whole, "layers.1.mlp.up_proj") == Rounding(8)
    assert rounding(whole, "layers.1.self_attn.v_proj") == Rounding(16)
    assert rounding(whole, "lm_head") == rounding(Precision("int8"), "lm_head") == Rounding(8, 128)
    assert rounding(Precision("int8", rules=(("lm_head", Precision("int4")),)), "lm_head") == Rounding(4, 32)
    with pytest.raises(RecipeError, match=r"^precision 'q4_k_m' cannot be tried without its target"):
        rounding(parse_recipe("q4_k_m").language, "layers.0.mlp.up_proj")


def test_differences_on_the_same_questions(tiny: Path, pairs: Calibration) -> None:
    model = load_model(tiny)
    held = held_out(model, pairs)
    fine, coarse = (ask(simulate(model, parse_recipe(text)), held) for text in ("int8", "language=int4:g256"))
    between = compared(fine, coarse)
    assert 0 < between["kl_ratio_interval"][0] <= between["kl_ratio_interval"][1] < 1
    assert compared(fine, fine)["kl_ratio_interval"] == pytest.approx([1, 1])
    low, high = coarse.numbers()["kl_interval"]  # type: ignore[misc]
    assert low <= coarse.mean_kl <= high
