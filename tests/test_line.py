"""The whole line in seconds: a tiny checkpoint, exported and checked, answers about a picture as transformers does."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import transformers
from PIL import Image

from checkpoints import hf_model
from vlm_export.cli import main as export_main
from vlm_runtime.cli import main as run_main

QUESTION = "What colour is the large circle?"


@pytest.mark.parametrize("target", ["onnx", "gguf"])
def test_a_checkpoint_is_exported_and_answers(
    target: str,
    tiny: Path,
    picture_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bundle = str(tmp_path / "bundle")
    line = ["vlm-export", str(tiny), "--target", target, "-o", bundle, "--precision", "fp32"]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit) as exported:
        export_main()
    assert not exported.value.code
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    greedy = manifest["parity"][target]["greedy"]
    assert (greedy["equal"], greedy["of"]) == (32, 32)
    capsys.readouterr()

    line = ["vlm-run", bundle, "--image", str(picture_file), QUESTION, "--json", "--max-new-tokens", "24"]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit) as ran:
        run_main()
    assert not ran.value.code
    answer = json.loads(capsys.readouterr().out)

    processor, model = transformers.AutoProcessor.from_pretrained(tiny), hf_model(tiny)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=Image.open(picture_file), text=prompt, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer["token_ids"] == tokens.tolist()
    assert answer["text"] == processor.tokenizer.decode(tokens, skip_special_tokens=True)
    assert (answer["prompt_tokens"], answer["image_tokens"]) == (inputs["input_ids"].shape[1], 16)
