"""`vlm-export --inspect`: the facts are the checkpoint's own, and what a target refuses is said before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from checkpoints import copy, hf_model
from conftest import MakeTiny
from exporting import Command, command
from vlm_export.target import target_names


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    return command(monkeypatch, capfd)


def test_parameters_are_those_of_the_model_by_part(make_tiny: MakeTiny, run: Command) -> None:
    folder = make_tiny(text="qwen2", tower="siglip", dtype="bfloat16")
    ran = run(folder, "--inspect", "--json")
    assert ran.code == 0, ran.err
    found, model = json.loads(ran.out), hf_model(folder)
    parts = {
        "vision_encoder": [model.model.vision_tower],
        "projector": [model.model.multi_modal_projector],
        "language_model": [model.model.language_model, model.lm_head],
    }
    for name, modules in parts.items():
        assert found["parts"][name]["parameters"] == sum(p.numel() for m in modules for p in m.parameters()), name
        assert found["parts"][name]["stored"] == {"BF16": found["parts"][name]["parameters"]}
    assert found["parts"]["language_model"]["what"].startswith("qwen2: 3 layers of 64, 4 heads over 2")
    assert (found["family"], found["layout"]) == ("llava", "huggingface")


def test_prompt_and_tokens_are_those_of_transformers_own_processor(tiny: Path, run: Command) -> None:
    found = json.loads(run(tiny, "--inspect", "--json").out)
    processor = transformers.AutoProcessor.from_pretrained(tiny)
    question = [{"type": "image"}, {"type": "text", "text": "Describe the image."}]
    said = processor.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
    assert found["prompt"] == said
    assert found["pictures"].startswith("16 tokens each")
    assert found["image_token"] == f"'<image>', id {processor.image_token_id}"


def test_every_target_is_there_with_what_it_needs_or_why_it_cannot(make_tiny: MakeTiny, run: Command) -> None:
    ran = run(make_tiny(text="llama", text_options={"head_dim": 8}), "--inspect")
    assert ran.code == 0
    for name in target_names():
        assert sum(line.strip().startswith(name) for line in ran.out.splitlines()) == 1, name
    assert "cannot: target 'onnx' takes attention heads of multiples of 16 channels" in ran.out
    assert "to export" in ran.out


def test_disk_is_what_an_export_of_that_precision_writes(tiny: Path, run: Command, tmp_path: Path) -> None:
    needs = json.loads(run(tiny, "--inspect", "--json", "--precision", "fp32").out)["targets"]["onnx"]
    assert run(tiny, "--target", "onnx", "-o", tmp_path / "bundle", "--precision", "fp32", "--no-check").code == 0
    written = sum(
        file.stat().st_size for file in (tmp_path / "bundle").rglob("*.*") if file.suffix in (".data", ".bin")
    )
    assert 0.9 * written <= needs["disk"] <= 1.1 * written + (2 << 20)  # the graphs, and room for golden vectors


def test_nothing_to_look_at_is_one_line(tmp_path: Path, run: Command) -> None:
    assert "missing CHECKPOINT" in run("--inspect").err
    ran = run(tmp_path / "none", "--inspect")
    assert ran.code == 2
    assert len(ran.err.strip().splitlines()) == 1


def test_two_image_tokens_are_refused_with_both(make_tiny: MakeTiny, tmp_path: Path, run: Command) -> None:
    folder = copy(make_tiny(), tmp_path / "two")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "image_token_index": 400, "image_token_id": 3}))
    ran = run(folder, "--inspect")
    assert ran.code == 2
    assert "two image tokens, image_token_index 400 and image_token_id 3" in ran.err
