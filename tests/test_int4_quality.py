"""The comparison of algorithms: every variant on the same questions, ratios paired with the right base."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from conftest import MakeTiny
from vlm_bench import int4_quality
from vlm_bench.int4_quality import Measured, Variant, asked, measure, perplexity, rows, shown, texts, variants
from vlm_export.quality import Quality, held_out, joined
from vlm_models.model import load_model
from vlm_quant.recipe import parse_recipe


def quality(kl: float, pictures: int = 4) -> Quality:
    one = np.ones(2 * pictures, np.int64)
    return Quality(kl * np.arange(1, 2 * pictures + 1), one, one, one > 0, np.arange(2 * pictures) // 2)


def test_every_set_and_algorithm_of_a_group_size_follows_its_baseline() -> None:
    found = variants([32, 128])
    assert found[:3] == [Variant("language=fp16"), Variant("language=int8"), Variant("language=int4:g32")]
    assert len(found) == len(set(found)) == 2 + 2 * (1 + 3 * 2)
    assert all(parse_recipe(variant.recipe) for variant in found)


def test_ratios_are_to_the_same_bits_and_to_the_same_algorithm_on_texts() -> None:
    base, text, image = (
        Variant("language=int4:g32", *rest) for rest in ((), ("gptq", "text-only"), ("gptq", "image-text"))
    )
    found = {
        variant: Measured(quality(kl), quality(10 * kl), 5.0)
        for variant, kl in ((base, 0.4), (text, 0.2), (image, 0.1), (Variant("language=int8"), 0.01))
    }
    table = rows(found)
    assert [sorted(key for key in row if key.startswith("to ")) for row in table] == [
        [],
        ["to rtn"],
        ["to rtn", "to text-only"],
        [],
    ]
    assert table[2]["to rtn"]["answers"]["kl_ratio"] == pytest.approx(0.25)
    assert table[2]["to text-only"]["words"]["kl_ratio"] == pytest.approx(0.5)
    assert table[2]["to text-only"]["words"]["kl_ratio_interval"] == pytest.approx([0.5, 0.5])
    json.dumps(table)
    assert shown(table, "KL").row_count == 4


def test_sets_of_questions_are_joined_without_mixing_their_pictures() -> None:
    whole = joined([quality(0.1), quality(0.2), quality(0.3, 3)])
    assert whole.pictures.tolist() == [i // 2 for i in range(22)]
    assert whole.mean_kl == pytest.approx(np.concatenate([quality(0.1).kl, quality(0.2).kl, quality(0.3, 3).kl]).mean())


def test_variants_are_asked_and_read_the_same_text(
    make_tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int4_quality, "_WINDOW", 48)
    monkeypatch.setattr(int4_quality, "_WINDOWS", 2)
    model = load_model(make_tiny())
    pairs = asked(tmp_path, 3)
    chosen = [
        Variant("language=fp32"),
        Variant("language=int4:g16"),
        Variant("language=int4:g16", "gptq", "image-text"),
    ]
    parts = [held_out(model, asked(tmp_path, 2)), held_out(model, asked(tmp_path, 2, 2))]
    found = dict(measure(model, chosen, pairs, parts, held_out(model, pairs, prompts=True)))
    exact, nearest, gptq = found.values()
    assert exact.answers.kl.max() < 1e-6
    assert exact.answers.tokens.sum() < exact.words.tokens.sum()
    assert min(nearest.answers.mean_kl, nearest.words.mean_kl, gptq.words.mean_kl) > 1e-6
    assert gptq.words.mean_kl != nearest.words.mean_kl
    assert exact.perplexity == pytest.approx(perplexity(model, texts(model)), rel=1e-4)
    assert len(texts(model)) == 2


def test_answers_are_the_short_ones(tmp_path: Path) -> None:
    pairs = asked(tmp_path, 3, 5).pairs
    assert {pair.image.name for pair in pairs} == {"00005.png", "00006.png", "00007.png"}
    assert all(pair.answer and len(pair.answer.split()) <= 2 for pair in pairs)
