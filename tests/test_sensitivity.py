"""Trying recipes out: a simulated model is what the target builds, questions are answered as one by one."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

from conftest import MakeTiny
from exporting import command
from vlm_export import export, goal, recommend
from vlm_export.budget import Point, front, parse_size, path, within_budget, within_kl
from vlm_export.decide import decide
from vlm_export.importance import examples
from vlm_export.pairs import calibration_pairs
from vlm_export.quality import HeldOut, Quality, ask, compared, held_out
from vlm_export.sensitivity import Effect, Group, effects, fixed_bytes, groups, recipe_of
from vlm_export.simulate import EMBEDDING, Rounding, decoder_linears, rounded, rounding, simulate
from vlm_export.target import Job, find_target, silent
from vlm_models.checkpoint import NO_SOURCES
from vlm_models.demo import scenes
from vlm_models.errors import CheckError, DependencyError, InputError, RecipeError
from vlm_models.model import Model, load_model
from vlm_quant.affine import dequantize_int4, dequantize_int8, quantize_int4, quantize_int8
from vlm_quant.calibration import Calibration, read_pairs
from vlm_quant.recipe import PRESETS, Precision, parse_recipe

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


@pytest.mark.parametrize("text", ["int8", "int4:g16", "int4;lm_head=int4;layers.1=int8"])
def test_a_simulated_decoder_gives_what_onnx_runtime_gives(tiny: Path, tmp_path: Path, text: str) -> None:
    """Far nearer to it than either is to the checkpoint: weights and the rounding of what they multiply."""
    model, recipe = load_model(tiny), parse_recipe(f"language={text}")
    embeds = np.random.default_rng(4).standard_normal((40, model.spec.language.hidden_size)).astype(np.float32) * 0.5
    job = Job(model, recipe, tmp_path, 48, ("language_model",))
    path = tmp_path / find_target("onnx").build(job)["language_model"].graph
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feeds: dict[str, Any] = {
        entry.name: np.zeros(entry.shape, np.float32)
        for entry in session.get_inputs()
        if entry.name.startswith("past_key_values.")
    }
    feeds |= {"inputs_embeds": embeds[None], "seqlens_k": np.array([39], np.int32)}
    (got, *_) = session.run(["logits"], {**feeds, "total_sequence_length": np.array(40, np.int32)})
    exact, ours, weights = (
        np.asarray(one.language_model().forward(torch.from_numpy(embeds))[0])
        for one in (model, simulate(model, recipe), simulate(model, recipe, activations=False))
    )
    theirs = got.reshape(-1)
    assert np.linalg.norm(ours - theirs) < 0.25 * np.linalg.norm(exact - theirs)
    assert np.linalg.norm(ours - theirs) < np.linalg.norm(weights - theirs)


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


@pytest.fixture(scope="module")
def probed(make_tiny: MakeTiny, pairs: Calibration) -> tuple[Model, list[Group], list[Effect]]:
    model = load_model(make_tiny(text="smollm"))
    return model, groups(model), list(effects(model, held_out(model, pairs)))


def test_groups_hold_every_matrix_of_the_model_once(make_tiny: MakeTiny) -> None:
    """But for the tower's last layer, which LLaVA does not read."""
    for text in ("llama", "phi3", "smollm"):
        model = load_model(make_tiny(text=text))
        found, checkpoint, dead = groups(model), model.checkpoint, ("position_embedding", "encoder.layers.2.")
        matrices = [name for name in checkpoint.names() if len(checkpoint.shape(name)) == 2]
        counted = sum(checkpoint.rows(name).size for name in matrices if not any(word in name for word in dead))
        counted += checkpoint.rows(EMBEDDING).size if model.spec.language.tied else 0  # looked up, and the head
        assert sum(rows * columns for group in found for rows, columns in group.shapes) == counted
        assert [group.name for group in found][-3:] == ["layer 2 attention", "layer 2 mlp", "lm_head"]


def test_each_effect_is_that_of_its_group_alone(
    probed: tuple[Model, list[Group], list[Effect]], pairs: Calibration
) -> None:
    model, found, tried = probed
    assert [(e.group, e.precision) for e in tried] == [(g, step) for g in found for step in g.steps[1:]]
    texts = {
        ("layer 1 mlp", "int8"): "language=fp32;layers.1.mlp=int8,vision=fp32,projector=fp32",
        ("lm_head", "int4:g32"): "language=fp32;lm_head=int4:g32,vision=fp32,projector=fp32",
        ("vision", "int8"): "vision=int8,language=fp32,projector=fp32",
        ("embedding", "int8"): "embedding=int8,language=fp32,vision=fp32,projector=fp32",
    }
    held = held_out(model, pairs)
    for (group, precision), text in texts.items():
        mine = next(e for e in tried if (e.group.name, str(e.precision)) == (group, precision))
        whole = ask(simulate(model, parse_recipe(text)), held)
        np.testing.assert_allclose(mine.quality.kl, whole.kl, atol=1e-6, err_msg=group)
        assert mine.quality.mean_kl > 0


def test_sizes_are_those_of_the_files(tiny: Path, tmp_path: Path) -> None:
    """But for the float tensors of norms, biases, positions and patches."""
    model = load_model(tiny)
    found = groups(model)
    everything = ("language_model", "projector", "vision_encoder")
    for text, parts in (
        ("language=int8", ("language_model",)),
        ("language=fp16;lm_head=int4:g128", ("language_model",)),
        ("language=int4;lm_head=int4,vision=int8,projector=int4", everything),
    ):
        recipe = parse_recipe(text)
        job = Job(model, recipe, tmp_path / str(len(text)), 64, parts)
        job.root.mkdir()
        written = 0
        for part in find_target("onnx").build(job).values():
            for tensor in onnx.load(job.root / part.graph, load_external_data=False).graph.initializer:
                written += int({entry.key: entry.value for entry in tensor.external_data}.get("length", 0))
        counted = 0
        for group in found:
            if f"{group.part}_model" in parts or f"{group.part}_encoder" in parts or group.part in parts:
                precision: Precision = getattr(recipe, group.part)
                counted += group.bytes(precision.rule(group.pattern) or precision if group.pattern else precision)
        assert counted <= written < counted + 12_000 * len(parts), text


def test_a_path_leads_from_the_finest_to_the_smallest(probed: tuple[Model, list[Group], list[Effect]]) -> None:
    model, found, tried = probed
    points = path(found, tried, fixed_bytes(model))
    assert points[0].recipe == PRESETS["fp16"]
    assert points[0].predicted == 0
    assert all(b.bytes < a.bytes for a, b in pairwise(points))
    assert points[-1].bytes == fixed_bytes(model) + sum(min(g.bytes(s) for s in g.steps) for g in found)
    for point in points:
        assert parse_recipe(str(point.recipe)) == point.recipe


def test_a_recipe_says_what_was_chosen(probed: tuple[Model, list[Group], list[Effect]]) -> None:
    """Whatever the choice: every layer gets the precision of its group."""
    model, found, _ = probed
    rng = np.random.default_rng(0)
    for _ in range(50):
        choice = {group: group.steps[rng.integers(len(group.steps))] for group in found}
        recipe = parse_recipe(str(recipe_of(choice)))
        by_name = {group.name: precision for group, precision in choice.items()}
        assert (recipe.vision, recipe.projector) == (by_name["vision"], by_name["projector"])
        assert (recipe.embedding is None) == (by_name["embedding"].weights != "int8")
        for linear in decoder_linears(model.spec.language)[:-1]:
            kind = "attention" if "self_attn" in linear.name else "mlp"
            wanted = by_name[f"layer {linear.name.split('.')[1]} {kind}"]
            assert rounding(recipe.language, linear.name) == rounding(wanted, linear.name), recipe
        head = by_name["lm_head"]
        assert rounding(recipe.language, "lm_head") == rounding(
            Precision("fp16", rules=(("lm_head", head),)), "lm_head"
        )


def test_a_budget_takes_the_first_recipe_that_fits_or_says_the_smallest(
    probed: tuple[Model, list[Group], list[Effect]],
) -> None:
    model, found, tried = probed
    points = path(found, tried, fixed_bytes(model))
    middle = points[len(points) // 2]
    assert within_budget(points, middle.bytes) is middle
    assert within_budget(points, middle.bytes + 1) is middle
    assert within_budget(points, 10**9) is points[0]
    with pytest.raises(InputError, match=r"^budget 0\.001 MB cannot be met: the smallest .* is [\d.]+ MB, with"):
        within_budget(points, 1000)


def test_the_smallest_recipe_that_is_good_enough_is_found_with_few_measurements(
    probed: tuple[Model, list[Group], list[Effect]],
) -> None:
    model, found, tried = probed
    points = path(found, tried, fixed_bytes(model))
    for true in (0, 1, 7, len(points) - 2, len(points) - 1):
        asked: list[int] = []

        def measure(i: int, true: int = true, asked: list[int] = asked) -> float:
            asked.append(i)
            return 0.01 if i <= true else 0.1

        assert within_kl(points, 0.05, measure) == true
        assert len(asked) <= len(points).bit_length() + 1
    with pytest.raises(CheckError, match=r"^no recipe keeps KL at 0\.05: .* has 0\.1; raise --max-kl"):
        within_kl(points, 0.05, lambda i: 0.1)


@pytest.mark.parametrize(("text", "count"), [("120MB", 120_000_000), ("1.5 GiB", 3 << 29), ("90", 90), ("2kb", 2000)])
def test_sizes_are_read(text: str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "MB", "-1MB", "12 parsecs", "0MB", "1e3", "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"^budget .* is no size: write it as 120MB"):
        parse_size(text)


def test_the_front_has_no_point_that_another_beats() -> None:
    def point(count: int, kl: float) -> Point:
        one = np.ones(2, np.int64)
        return Point(PRESETS["int8"], count, 0, 0.0, Quality(np.full(2, kl), one, one, one > 0, np.arange(2)))

    a, b, c, d = point(10, 0.5), point(20, 0.2), point(25, 0.3), point(30, 0.1)
    assert front([d, c, b, a]) == [a, b, d]
    assert front([replace(a, quality=None), c]) == [c]


def test_recommending_measures_on_pictures_that_nothing_else_has_seen(
    make_tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenes.write_pairs(tmp_path, 12)
    model, seen = load_model(make_tiny()), list[set[Path]]()
    real = recommend.held_out

    def watched(model: Model, pairs: Calibration, *rest: Any) -> HeldOut:
        seen.append({pair.image for pair in pairs.pairs})
        return real(model, pairs, *rest)

    monkeypatch.setattr(recommend, "held_out", watched)
    found = recommend.recommend(model, read_pairs(tmp_path), max_kl=1e-4, algorithm="rtn", spread=3)
    assert len(seen) == 2
    assert not seen[0] & seen[1]
    assert found.point.quality is not None
    assert found.point.quality.mean_kl <= 1e-4
    after = found.path[[p.recipe for p in found.path].index(found.point.recipe) + 1]
    worse = [p.quality.mean_kl for p in found.measured if p.recipe == after.recipe and p.quality is not None]
    assert worse, "the next smaller recipe was measured too"
    assert worse[0] > 1e-4
    told = json.loads(json.dumps(found.plain()))
    assert told["recommended"]["recipe"] == str(found.point.recipe)
    assert {point["recipe"] for point in told["measured"]} >= set(told["front"])
    small = recommend.recommend(model, read_pairs(tmp_path), budget=f"{after.bytes}", algorithm="rtn")
    assert small.point.bytes <= after.bytes


def test_goals_that_cannot_be_are_one_line(tiny: Path, pairs: Calibration) -> None:
    model = load_model(tiny)
    for given, said in (
        ({"budget": "1MB", "max_kl": 0.1}, "two goals"),
        ({"max_kl": 0.0}, "max KL 0 cannot be"),
        ({"max_kl": float("nan")}, "max KL nan cannot be"),
        ({"budget": "much"}, "is no size"),
    ):
        with pytest.raises(InputError, match=said):
            recommend.recommend(model, pairs, **given)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="measured on image-text pairs: give --calibration"):
        recommend.recommend(model, None)
    assert [recommend._fitting("awq+gptq", model.spec.language, parse_recipe(r)) for r in ("fp16", "int8", "int4")] == [
        "rtn",
        "gptq",
        "awq+gptq",
    ]
    with pytest.raises(InputError, match="at least 4 pictures that differ, here are 3"):
        recommend.recommend(model, pairs)


def test_the_command_measures_recommends_and_writes(
    make_tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    scenes.write_pairs(tmp_path / "pairs", 6)
    run, checkpoint, output = command(monkeypatch, capfd), make_tiny(), tmp_path / "report"
    goals = ("--sensitivity", "--calibration", tmp_path / "pairs", "--algorithm", "rtn", "--max-kl", "0.001")
    ran = run(checkpoint, *goals, "-o", output)
    assert ran.code == 0, ran.err
    recipe = (output / "recipe.txt").read_text().strip()
    told = json.loads((output / "sensitivity.json").read_text())
    assert told["recommended"]["recipe"] == recipe
    assert told["recommended"]["kl"] <= 0.001
    assert f"--precision '{recipe}'" in ran.out
    assert "lm_head" in ran.out
    with Image.open(output / "sensitivity.png") as picture:
        assert picture.width > 1000
        assert len(np.unique(np.asarray(picture))) > 10  # something is drawn
    assert json.loads(run(checkpoint, *goals, "--json").out)["recommended"]["recipe"] == recipe


def test_precision_auto_is_what_sensitivity_recommends(
    make_tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def found(model: Model, calibration: Calibration | None, **rest: Any) -> Any:
        given.update(rest, pairs=calibration)
        return SimpleNamespace(point=SimpleNamespace(recipe=parse_recipe("language=int8;lm_head=int4")))

    def build(job: Job) -> None:
        raise InterruptedError(str(job.recipe))

    monkeypatch.setattr(recommend, "recommend", found)
    monkeypatch.setattr(find_target("onnx"), "build", build)
    scenes.write_pairs(tmp_path / "pairs", 4)
    wishes = {"precision": "auto", "budget": "1MB", "calibration": tmp_path / "pairs", "algorithm": "rtn", "seed": 3}
    with pytest.raises(InterruptedError, match=r"^vision=fp16,projector=fp16,language=int8;lm_head=int4:g32$"):
        export(make_tiny(), "onnx", tmp_path / "bundle", check=False, **wishes)  # type: ignore[arg-type]
    assert (given["budget"], given["max_kl"], given["seed"], given["algorithm"]) == ("1MB", None, 3, "rtn")
    assert len(given["pairs"].pairs) > 20


def test_flags_that_contradict_each_other_are_one_line(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = command(monkeypatch, capfd)
    for flags, said in (
        (("--sensitivity", "--target", "onnx"), "--sensitivity exports nothing: leave out --target"),
        (("--sensitivity", "--precision", "int4"), "tries every precision: leave out --precision int4"),
        (("--sensitivity",), "measured on image-text pairs: give --calibration"),
        (("--target", "onnx", "-o", tmp_path / "o", "--budget", "1MB"), "here is one already, 'fp16'"),
        (("--target", "onnx", "-o", tmp_path / "o", "--precision", "auto"), "give --calibration"),
        (("-o", tmp_path / "o"), "missing --target"),
        (("--target", "onnx"), "missing --output"),
    ):
        ran = run(tiny, *flags)
        assert ran.code == 2, ran.err
        assert said in ran.err
        assert len(ran.err.strip().splitlines()) == 1
    assert not (tmp_path / "o").exists()


def test_without_matplotlib_nothing_is_measured(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DependencyError, match=r"needs matplotlib: pip install 'vlm-export\[sensitivity\]'"):
        goal.measured(str(tiny), None, tmp_path, "fp16", None, None, None, "rtn", 8, 0, NO_SOURCES, silent)


def test_an_export_leaves_unreadable_pictures_out_and_says_so(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenes.write_pairs(tmp_path, 12)
    (tmp_path / "00003.png").write_bytes(b"no picture")
    checkpoint = load_model(tiny).checkpoint
    everything = read_pairs(tmp_path)
    lost = [pair for pair in everything.pairs if pair.image.name == "00003.png"]
    found = calibration_pairs(checkpoint, tmp_path)
    assert found is not None
    assert (len(found.pairs), found.skipped) == (len(everything.pairs) - len(lost), len(lost))
    decided = decide(load_model(tiny), parse_recipe("int4"), found, "gptq", folder=tmp_path, samples=4)
    assert decided.record["skipped"] == len(lost)
    assert any(note.startswith(f"{len(lost)} calibration pairs left out") for note in decided.record["notes"])
    monkeypatch.setattr("vlm_export.pairs.POOL", 20)
    assert len(calibration_pairs(checkpoint, tmp_path).pairs) <= 20  # type: ignore[union-attr]
    assert calibration_pairs(checkpoint, None) is None
    (tmp_path / "00004.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"^\d+ of 20 calibration pairs have a picture that cannot be opened"):
        calibration_pairs(checkpoint, tmp_path)


def test_an_algorithm_that_is_none_is_refused_before_anything_is_measured(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenes.write_pairs(tmp_path, 4)
    monkeypatch.delattr(recommend, "held_out")
    with pytest.raises(InputError, match="unknown algorithm 'best': choose one of auto, rtn"):
        recommend.recommend(load_model(tiny), read_pairs(tmp_path), algorithm="best")


def test_lost_answers_count_unless_a_kl_was_asked_for() -> None:
    def quality(kl: float, exact: int) -> Quality:
        one = np.ones(200, np.int64)
        return Quality(np.full(200, kl), one, one, np.arange(200) < exact, np.arange(200))

    found = [quality(0.0, 190), quality(0.01, 188), quality(0.02, 187)]
    assert [recommend.judged(found.__getitem__, strict=True)(i) for i in range(3)] == pytest.approx(
        [0.0, 0.01, float("inf")]
    )
    assert recommend.judged(found.__getitem__, strict=False)(2) == pytest.approx(0.02)
