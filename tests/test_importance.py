"""Importance: what linear layers are given, equal to what hooks in transformers' own model see, for every family."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image

from checkpoints import hf_model
from conftest import MakeTiny
from vlm_export import importance as module
from vlm_export.importance import examples, importance, measure
from vlm_models.errors import CheckpointError, ImageError, PromptError
from vlm_models.model import Model, language_tensors, load_model
from vlm_models.torch_language import TorchLanguage
from vlm_quant.calibration import Calibration, Pair, read_pairs

QUESTIONS = (
    ("What colour is it?", "It is red."),
    ("How many squares are in the picture?", None),
    ("Which?", "A seven"),
)
FAMILIES = ("llama", "qwen3", "phi3", "gemma2", "gemma3_text")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    folder = tmp_path_factory.mktemp("pairs")
    rng, lines = np.random.default_rng(0), []
    for i, (prompt, answer) in enumerate(QUESTIONS):
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "prompt": prompt, "answer": answer}))
    (folder / "calibration.jsonl").write_text("\n".join(lines))
    return read_pairs(folder)


def chats(pair: Pair) -> list[list[dict[str, Any]]]:
    """The question alone, and with its answer where there is one."""
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": pair.prompt}]}
    answer = [{"role": "assistant", "content": pair.answer}] if pair.answer else []
    return [[user], [user, *answer]]


def seen_by_hooks(folder: Path, pairs: Calibration) -> Mapping[str, NDArray[np.float32]]:
    """Mean squared inputs of every Linear of transformers' model, fed by transformers' processor."""
    model, processor = hf_model(folder), transformers.AutoProcessor.from_pretrained(folder)
    inputs: dict[str, list[torch.Tensor]] = {}
    first_read = 0
    for name, part in model.named_modules():
        if isinstance(part, torch.nn.Linear) and ("language_model" in name or name == "lm_head"):

            def hook(module: Any, given: Any, output: Any, name: str = name) -> None:
                inputs.setdefault(name, []).append(given[0][0, first_read if name == "lm_head" else 0 :])

            part.register_forward_hook(hook)
    for pair in pairs.pairs:
        picture = Image.open(pair.image).convert("RGB")
        asked, said = (processor.apply_chat_template(c, add_generation_prompt=c == chats(pair)[0]) for c in chats(pair))
        question = processor(images=picture, text=asked, return_tensors="pt")["input_ids"]
        first_read = question.shape[1] - 1
        with torch.inference_mode():
            model(**processor(images=picture, text=said, return_tensors="pt"))
    means = {name: torch.cat(rows).double().pow(2).mean(0).float().numpy() for name, rows in inputs.items()}
    return {name.removeprefix("model.") + ".weight": mean for name, mean in means.items()}


@pytest.mark.parametrize("text", FAMILIES)
def test_equal_to_hooks_in_transformers(make_tiny: MakeTiny, pairs: Calibration, text: str) -> None:
    folder = make_tiny(text=text)
    model, want = load_model(folder), dict(seen_by_hooks(folder, pairs))
    got = importance(model, pairs)
    if model.spec.language.tied:
        want["language_model.embed_tokens.weight"] = want.pop("lm_head.weight")
    assert set(got) == set(want)
    for name, vector in want.items():
        assert got[name].dtype == np.float32
        np.testing.assert_allclose(got[name], vector, rtol=1e-4, atol=1e-6 * vector.mean(), err_msg=name)


def test_every_matrix_of_the_language_model_has_its_importance(make_tiny: MakeTiny, pairs: Calibration) -> None:
    """Fused matrices once, as stored; the table only where it is also the head."""
    for text, tied in (("phi3", False), ("smollm", True)):
        model = load_model(make_tiny(text=text))
        matrices = {name: shape for name, shape in language_tensors(model.spec) if len(shape) == 2}
        if not tied:
            del matrices["language_model.embed_tokens.weight"]
        got = importance(model, pairs)
        assert {name: vector.shape for name, vector in got.items()} == {n: s[1:] for n, s in matrices.items()}
        assert all((vector > 0).all() for vector in got.values())


def test_pictures_change_what_matters(tiny: Path, pairs: Calibration) -> None:
    model = load_model(tiny)
    shown = examples(model, pairs)
    told = examples(model, pairs, pictures=False)
    tokens = model.spec.prompt.image_tokens
    # The template writes the image token and a line break.
    assert all(0 < len(a.embeds) - len(b.embeds) - tokens <= 1 for a, b in zip(shown, told, strict=True))
    with_pictures, without = measure(model, shown), measure(model, told)
    name = "language_model.layers.1.mlp.down_proj.weight"
    assert not np.allclose(with_pictures[name], without[name], rtol=0.1)


def test_the_head_is_weighed_by_rows_that_are_read(tiny: Path, pairs: Calibration) -> None:
    model = load_model(tiny)
    one = Calibration(pairs.pairs[:1])
    (example,) = examples(model, one)
    ends = module.Example(example.embeds, len(example.embeds) - 1)
    head = "lm_head.weight"
    assert len(example.embeds) - example.first_read > 3
    assert not np.allclose(measure(model, [example])[head], measure(model, [ends])[head])
    name = "language_model.layers.2.mlp.down_proj.weight"
    np.testing.assert_array_equal(measure(model, [example])[name], measure(model, [ends])[name])


def test_a_layer_is_read_once_for_all_sequences(
    tiny: Path, pairs: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlm_models import torch_language

    model, reads = load_model(tiny), list[str]()
    as_float32 = torch_language.as_float32
    sequences = examples(model, pairs)

    def counted(checkpoint: Any, name: str, *span: int) -> torch.Tensor:
        reads.append(name)
        return as_float32(checkpoint, name, *span)

    monkeypatch.setattr(torch_language, "as_float32", counted)
    measure(model, sequences)
    assert len(reads) == len(set(reads))
    assert "lm_head.weight" not in reads


def test_progress_reaches_its_end(tiny: Path, pairs: Calibration) -> None:
    steps: list[tuple[str, int, int]] = []
    importance(load_model(tiny), pairs, samples=2, progress=lambda *step: steps.append(step))
    assert [step for step in steps if step[0] == "calibration"] == [("calibration", 1, 2), ("calibration", 2, 2)]
    assert [done for stage, done, _ in steps if stage == "importance"] == list(range(1, 9))
    assert steps[-1] == ("importance", 8, 8)  # 3 layers and what leads to the head, of 2 sequences


def test_a_channel_that_is_never_used_keeps_a_little(
    tiny: Path, pairs: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where all weights of a block count nothing, a quantizer may write what it likes, even what is not a number."""
    model = load_model(tiny)
    monkeypatch.setattr(TorchLanguage, "gate", lambda self, gate, up, activation: torch.zeros_like(gate))
    name = "language_model.layers.0.mlp.down_proj.weight"
    np.testing.assert_array_equal(importance(model, pairs)[name], 1.0)


def test_what_cannot_be_shown_is_one_line(tiny: Path, pairs: Calibration, tmp_path: Path) -> None:
    model = load_model(tiny)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"bad\.png is not a picture"):
        importance(model, Calibration((Pair(tmp_path / "bad.png", "What?"),)))
    twice = Pair(pairs.pairs[0].image, "Is <image> like <image>?")
    with pytest.raises(PromptError, match=r"calibration pair of 0\.png: the prompt has 2 <image>"):
        importance(model, Calibration((twice,)))


def test_numbers_beyond_float32_are_said(tiny: Path, pairs: Calibration) -> None:
    model: Model = load_model(tiny)
    broken = [module.Example(example.embeds * float("inf"), example.first_read) for example in examples(model, pairs)]
    with pytest.raises(CheckpointError, match=r"calibration gives .*self_attn.* beyond float32"):
        measure(model, broken)


def test_long_answers_are_cut(tiny: Path, pairs: Calibration) -> None:
    model = load_model(tiny)
    long = Calibration((Pair(pairs.pairs[0].image, "What?", "red " * 3000),))
    (example,) = examples(model, long)
    assert len(example.embeds) == min(model.spec.language.max_positions, model.spec.prompt.image_tokens + 1024)
    assert example.first_read < len(example.embeds)
