"""Decided models: scalings change nothing in float, roundings stand on the grids they bring, rules are respected."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from checkpoints import TEXTS
from conftest import MakeTiny
from vlm_export.algorithms import check_algorithm
from vlm_export.decide import decide, decide_on
from vlm_export.export import export
from vlm_export.importance import Example
from vlm_models.errors import CheckpointError, InputError
from vlm_models.model import Model, load_model
from vlm_quant.calibration import Calibration, read_pairs
from vlm_quant.grid import integers, values
from vlm_quant.recipe import parse_recipe

CASES: dict[str, dict[str, Any]] = {
    **{text: {"text": text} for text in TEXTS},
    "tied llama, biases": {
        "text_options": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 48}
    },
    "bfloat16": {"text": "qwen3", "dtype": "bfloat16"},
}
INT4, INT8, W8A8 = (parse_recipe(f"language={text}") for text in ("int4:g16", "int8", "w8a8"))


def sequences(model: Model, count: int = 6, seed: int = 0) -> list[Example]:
    """Random rows, a few channels of them much larger."""
    size = model.spec.language.hidden_size
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(20 + 3 * i, size, generator=generator) for i in range(count)]
    large = torch.where(torch.arange(size) % 11 == 3, 8.0, 1.0)
    return [Example(x * large, 5) for x in rows]


def logits(model: Model, given: list[Example]) -> torch.Tensor:
    language, rows = model.language_model(), []
    for example in given:
        language.rewind(0)
        rows.append(language.forward(example.embeds, last_row=False))
    return torch.cat(rows)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("algorithm", "recipe"), [("awq", INT4), ("smoothquant", INT8)])
def test_scalings_change_nothing_in_float(
    make_tiny: MakeTiny, tmp_path: Path, case: str, algorithm: str, recipe: Any
) -> None:
    model = load_model(make_tiny(**CASES[case]))
    given = sequences(model)
    scaled, record = decide_on(model, recipe, given, algorithm, symmetric=False, folder=tmp_path)
    places = {name.split(".", 2)[2] for name, numbers in record.items() if "power" in numbers}
    assert places == {
        *(f"self_attn.{part}_proj" for part in "qkvo"),
        *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
    }
    assert relative(logits(scaled, given), logits(model, given)) < 1e-5
    name = "language_model.layers.1.input_layernorm.weight"
    assert not np.allclose(scaled.checkpoint.rows(name), model.checkpoint.rows(name).astype(np.float32), rtol=0.01)


@pytest.mark.parametrize("case", ["llama", "phi3", "gemma2", "tied llama, biases"])
@pytest.mark.parametrize("algorithm", ["gptq", "awq+gptq"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_decided_weights_stand_on_their_grids(
    make_tiny: MakeTiny, tmp_path: Path, case: str, algorithm: str, symmetric: bool
) -> None:
    model = load_model(make_tiny(**CASES[case]))
    given = sequences(model, 3)
    decided, record = decide_on(model, INT4, given, algorithm, symmetric=symmetric, folder=tmp_path)
    linears = [name for name in model.checkpoint.names() if "layers." in name and name.endswith("_proj.weight")]
    linears = [name for name in linears if name.startswith("language_model.")]
    assert len(record) == 7 * 3
    for name in linears:
        grid = decided.checkpoint.grid(name)
        assert grid is not None
        assert (grid.bits, grid.group_size, grid.zeros is None) == (4, 16, symmetric)
        stored = decided.checkpoint.rows(name)
        np.testing.assert_allclose(values(integers(stored, grid), grid), stored, rtol=1e-5, atol=1e-7)
    for name in set(model.checkpoint.names()) - set(linears):
        if "norm" not in name and not name.endswith(("v_proj.bias", "up_proj.bias")):
            assert decided.checkpoint.tensors[name] is model.checkpoint.tensors[name]


def test_gptq_is_nearer_to_the_model_than_rounding(make_tiny: MakeTiny, tmp_path: Path) -> None:
    from vlm_export.simulate import simulate

    model = load_model(make_tiny())
    given, held_out = sequences(model, 40), sequences(model, 5, seed=1)
    want = logits(model, held_out)
    plain = logits(simulate(model, INT4, activations=False), held_out)
    decided, _ = decide_on(model, INT4, given, "gptq", symmetric=False, folder=tmp_path)
    ours = logits(simulate(decided, INT4, activations=False), held_out)
    assert relative(ours, want) < 0.85 * relative(plain, want)


def test_rules_and_the_head_are_respected(make_tiny: MakeTiny, tmp_path: Path) -> None:
    model = load_model(make_tiny(text_options={"tie_word_embeddings": True}))
    recipe = parse_recipe("language=int4:g32;layers.1=int8;down_proj=fp16;q_proj=int4:g16")
    decided, record = decide_on(model, recipe, sequences(model, 3), "gptq", symmetric=False, folder=tmp_path)
    forms = {}
    for name in decided.checkpoint.names():
        if (grid := decided.checkpoint.grid(name)) is not None:
            forms[name.removeprefix("language_model.layers.").removesuffix("_proj.weight")] = grid.bits, grid.group_size
    per_row = (8, 64)
    want = {f"{layer}.self_attn.{part}": (4, 32) for layer in (0, 2) for part in "kvo"}
    want |= {f"{layer}.mlp.{part}": (4, 32) for layer in (0, 2) for part in ("gate", "up")}
    want |= {f"1.self_attn.{part}": per_row for part in "kvo"} | {f"1.mlp.{part}": per_row for part in ("gate", "up")}
    want |= {f"{layer}.self_attn.q": (4, 16) for layer in range(3)}
    assert forms == want
    assert len(record) == len(want)


def test_the_same_pairs_decide_the_same(make_tiny: MakeTiny, pairs: Calibration, tmp_path: Path) -> None:
    model, made = load_model(make_tiny()), []
    for i, seed in enumerate((0, 0, 1)):
        (tmp_path / str(i)).mkdir()
        made.append(decide(model, INT4, pairs, "gptq", folder=tmp_path / str(i), samples=2, seed=seed))
    name = "language_model.layers.1.mlp.down_proj.weight"
    same, again, other = (one.model.checkpoint.rows(name) for one in made)
    np.testing.assert_array_equal(same, again)
    assert not np.array_equal(same, other)
    first = made[0].record
    assert (first["algorithm"], first["samples"], first["of"], first["seed"]) == ("gptq", 2, 3, 0)
    assert len(first["sha256"]) == 64
    assert first["sha256"] != made[2].record["sha256"]
    assert all(0 < numbers["error"] < 0.1 for numbers in first["layers"].values())
    json.dumps(first)


def test_auto_is_what_each_layer_needs(tiny: Path, pairs: Calibration, tmp_path: Path) -> None:
    model, recipe = load_model(tiny), parse_recipe("language=int4;layers.1=int8")
    decided = decide(model, recipe, pairs, folder=tmp_path)
    assert decided.record["algorithm"] == "awq+gptq+smoothquant"
    layers = decided.record["layers"]
    assert all("error" in numbers for numbers in layers.values())
    assert {name for name, numbers in layers.items() if "power" in numbers} >= {
        f"layers.{i}.mlp.up_proj" for i in (0, 1)
    }
    assert decide(model, INT8, pairs, folder=tmp_path).record["algorithm"] == "gptq+smoothquant"


def test_rounded_inputs_are_smoothed_on_grids_around_zero_too(tiny: Path, pairs: Calibration, tmp_path: Path) -> None:
    model, recipe = load_model(tiny), parse_recipe("language=w8a8;down_proj=int8;layers.1=fp8")
    decided = decide(model, recipe, pairs, symmetric=True, folder=tmp_path)
    assert decided.record["algorithm"] == "gptq+smoothquant"
    layers = decided.record["layers"]
    assert {name for name, numbers in layers.items() if "error" in numbers} == {
        f"layers.{layer}.{name}"
        for layer in (0, 2)
        for name in (
            *(f"self_attn.{one}_proj" for one in "qkvo"),
            *(f"mlp.{one}_proj" for one in ("gate", "up", "down")),
        )
    }
    smoothed = {name for name, numbers in layers.items() if "power" in numbers}
    assert smoothed
    assert not any("down_proj" in name or "layers.1" in name for name in smoothed)
    for name in ("layers.0.self_attn.q_proj", "layers.2.mlp.down_proj"):
        grid = decided.model.checkpoint.grid(f"language_model.{name}.weight")
        assert grid is not None
        assert (grid.bits, grid.zeros, grid.scales.shape[1]) == (8, None, 1)


def test_without_a_need_nothing_is_changed(tiny: Path, pairs: Calibration, tmp_path: Path) -> None:
    model = load_model(tiny)
    for algorithm, recipe, record in (
        ("rtn", INT4, {"algorithm": "rtn"}),
        ("auto", parse_recipe("fp16"), {}),
        ("auto", parse_recipe("language=q4_k_m"), {}),
    ):
        decided = decide(model, recipe, pairs, algorithm, folder=tmp_path)
        assert decided.model is model
        assert decided.record == record
    for algorithm in ("auto", "smoothquant"):  # inputs stay floats where int8 is around zero
        around_zero = decide(model, INT8, pairs, algorithm, symmetric=True, folder=tmp_path)
        assert around_zero.record == {"algorithm": "rtn"}
    plain = decide(model, INT4, None, "auto", folder=tmp_path)
    assert plain.model is model
    assert "int4 without calibration" in plain.record["notes"][0]
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_is_one_line(tiny: Path, tmp_path: Path) -> None:
    model = load_model(tiny)
    for name in ("best", "awq+", "rtn+gptq"):
        with pytest.raises(InputError, match=r"unknown algorithm '.*': choose one of auto, rtn, awq, gptq, smooth"):
            decide(model, INT4, None, name, folder=tmp_path)
    with pytest.raises(InputError, match=r"algorithm 'gptq' needs image-text pairs: give --calibration"):
        decide(model, INT4, None, "gptq", folder=tmp_path)
    for algorithm, text, words in (("awq", "int8", "int4"), ("smoothquant", "int4", "int8"), ("gptq", "fp16", "int")):
        with pytest.raises(InputError, match=f"algorithm '{algorithm}' has nothing to do: .* has no {words}"):
            decide(model, parse_recipe(f"language={text}"), None, algorithm, folder=tmp_path)
    with pytest.raises(
        InputError, match=r"'smoothquant' has nothing to do: .* no int8 layers whose inputs are rounded"
    ):
        check_algorithm("smoothquant", model.spec.language, INT8, None, 1, ("symmetric",))
    check_algorithm("smoothquant", model.spec.language, W8A8, Calibration(()), 1, ("symmetric",))
    with pytest.raises(InputError, match=r"0 calibration samples cannot be: give 1 or more"):
        decide(model, INT4, None, "gptq", folder=tmp_path, samples=0)
    broken = [replace(one, embeds=one.embeds * float("inf")) for one in sequences(model, 2)]
    with pytest.raises(CheckpointError, match=r"calibration gives 'layers\.0.* beyond float32"):
        decide_on(model, INT4, broken, "gptq", symmetric=False, folder=tmp_path)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    folder, rng = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"What is number {i}?", "utf-8")
    return read_pairs(folder)


def test_an_export_packs_what_was_decided(tiny: Path, pairs: Calibration, tmp_path: Path) -> None:
    folder, options = pairs.pairs[0].image.parent, {"precision": "language=int4:g32", "check": False}
    made = {}
    for algorithm in ("auto", "rtn"):
        manifest = export(tiny, "onnx", tmp_path / algorithm, calibration=folder, algorithm=algorithm, **options)
        made[algorithm] = manifest.parts["language_model"]["onnx"].details
    record = made["auto"]["rounding"]
    assert (record["algorithm"], record["samples"], record["of"]) == ("awq+gptq", 3, 3)
    assert record["sha256"] == pairs.sha256
    assert made["auto"]["grids"] > 0
    assert not made["auto"]["rounded_again"]
    assert made["rtn"]["rounding"] == {"algorithm": "rtn"}
    files = [(tmp_path / algorithm / "onnx/language_model.onnx.data").read_bytes() for algorithm in made]
    assert files[0] != files[1]
    assert not [p for p in (tmp_path / "auto").rglob("*") if p.suffix == ".bin" and p.name != "embedding.bin"]
    noted = export(tiny, "onnx", tmp_path / "noted", algorithm="auto", **options).parts["language_model"]["onnx"]
    assert any("int4 without calibration" in note for note in noted.details["notes"])
