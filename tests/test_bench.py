"""Measurements measure what they say: order, medians, a worker's errors, every number of vlm-bench."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers

from checkpoints import tiny_llava
from running import running_bundle
from vlm_bench import accuracy, measure, overhead, reference_shape, stages
from vlm_bench.worker import workers
from vlm_models.demo.scenes import make_scene
from vlm_models.errors import BundleError, InputError
from vlm_models.model import load_model


def test_contestants_take_turns_and_the_warm_up_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[str, int]] = []

    def contestant(name: str, times: Mapping[int, float]) -> measure.Rep:
        def rep(number: int) -> Mapping[str, float]:
            order.append((name, number))
            return {"ms": times[number], "tokens_per_s": 1 / times[number]}

        return rep

    monkeypatch.setattr(measure, "busy_seconds", lambda: 0.0)
    slow, fast = {0: 99.0, 1: 4.0, 2: 8.0, 3: 6.0}, {0: 99.0, 1: 2.0, 2: 2.0, 3: 5.0}
    results = measure.interleave({"slow": contestant("slow", slow), "fast": contestant("fast", fast)}, 3, idle_s=0)
    assert order == [(name, n) for n in range(4) for name in ("slow", "fast")]
    assert results["slow"]["ms"] == measure.Stat(6.0, 4.0, 8.0, 3, 3)
    assert results["slow"]["tokens_per_s"].best == 1 / 4.0
    assert measure.ratio(results, "fast", "slow", "ms") == 2.0 / 6.0


def test_repeats_beside_other_work_are_left_out_where_enough_are_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"busy": 0.0}

    def rep(number: int) -> Mapping[str, float]:
        clock["busy"] += 1000.0 if number in (2, 4) else 0.0
        return {"ms": float(number)}

    monkeypatch.setattr(measure, "busy_seconds", lambda: clock["busy"])
    assert measure.interleave({"it": rep}, 5, idle_s=0)["it"]["ms"] == measure.Stat(3.0, 1.0, 5.0, 3, 5)
    # Two quiet ones are too few: all count.
    assert measure.interleave({"it": rep}, 4, idle_s=0)["it"]["ms"] == measure.Stat(2.5, 1.0, 4.0, 2, 4)


def test_an_error_in_a_worker_reaches_the_person(tmp_path: Path) -> None:
    with (
        pytest.raises(BundleError, match="none"),
        workers({"x": ("vlm_bench.overhead:make", (str(tmp_path / "none"), 1, 8))}, 1),
    ):
        pass


def test_context_that_is_too_short_is_refused(tmp_path: Path) -> None:
    model = stages.open_endless(running_bundle(tmp_path / "bundle"), None, 1)
    with pytest.raises(InputError, match="context of 96"):
        stages.check_room(model, 90, 7)


def test_overhead_is_a_share_of_the_token(tmp_path: Path) -> None:
    values = overhead.make(str(running_bundle(tmp_path / "bundle")), 1, 16)(1)
    assert 0 < values["own_percent"] < 100
    assert values["own_us"] > 0


@pytest.mark.parametrize("shape", reference_shape.VOCAB)
def test_the_reference_shape_is_a_checkpoint(shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own way of writing, on small sizes: transformers finds every tensor, and so do we."""
    config = reference_shape._config(shape)
    assert config.text_config.num_hidden_layers == {"1.5b": 28, "7b": 32, "135m": 30}[shape]
    tied = config.tie_word_embeddings
    small = {"intermediate_size": 16, "num_attention_heads": 2}
    vision = {**small, "hidden_size": 16}
    text = {**small, "hidden_size": 16, "num_key_value_heads": 1, "num_hidden_layers": 1}
    for part, sizes in ((config.vision_config, vision), (config.text_config, text)):
        for name, value in sizes.items():
            setattr(part, name, value)
    config.text_config.layer_types = ["full_attention"]
    config.vision_config.num_hidden_layers = 2
    monkeypatch.setattr(reference_shape, "_config", lambda _: config)
    monkeypatch.setattr(reference_shape, "_SHARD", 1_000_000)
    folder = reference_shape.write(tmp_path / "shape", shape=shape)
    assert len(list(folder.glob("*.safetensors"))) > 1
    model, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=config.dtype, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert (model.lm_head.weight.data_ptr() == model.model.language_model.embed_tokens.weight.data_ptr()) is tied
    assert load_model(folder).spec.prompt.image_token_id == reference_shape.SPECIAL[shape][3]
    with pytest.raises(InputError, match="exists"):
        reference_shape.write(folder)


def test_the_tiny_checkpoints_of_one_seed_are_equal(tiny: Path, tmp_path: Path) -> None:
    again = tiny_llava(tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()


def test_accuracy_counts_exact_answers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class Always:
        def answer(self, question: str, images: object, max_new_tokens: int) -> SimpleNamespace:
            return SimpleNamespace(text=" Two\n" if "How many" in question else "two")

    monkeypatch.setattr(accuracy.vlm_runtime, "load", lambda bundle: Always())
    found = accuracy.accuracy(Path("bundle"), 12)
    twos = sum(len(make_scene(seed, "test")[1]) == 2 for seed in range(12))
    assert 0 < twos < 12
    assert found["count"] == twos / 12
    assert {share for kind, share in found.items() if kind != "count"} == {0.0}
    assert "describe" not in found
