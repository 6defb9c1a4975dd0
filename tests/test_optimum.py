"""Optimum's TasksManager finds LLaVA after register(), and its dummy inputs run through transformers' model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from optimum.exporters.tasks import TasksManager

from checkpoints import hf_model
from conftest import MakeTiny
from vlm_export import optimum
from vlm_export.target import target_names
from vlm_models.errors import InputError


def test_every_target_is_registered_however_often_asked() -> None:
    optimum.register()
    optimum.register()
    for target in target_names():
        tasks = TasksManager.get_supported_tasks_for_model_type("llava", target, library_name="transformers")
        assert list(tasks) == ["image-text-to-text"]


@pytest.mark.parametrize(
    "case", [{}, {"text": "gemma2", "tower": "siglip", "strategy": "full", "image_token": "start"}]
)
def test_dummy_inputs_run_through_the_model(make_tiny: MakeTiny, case: dict[str, str]) -> None:
    optimum.register()
    model = hf_model(make_tiny(**case))
    task = TasksManager.infer_task_from_model(model)
    constructor = TasksManager.get_exporter_config_constructor(
        "onnx", model=model, task=task, library_name="transformers"
    )
    config = constructor(model.config)
    inputs = config.generate_dummy_inputs(framework="pt", batch_size=2, sequence_length=9)
    assert set(inputs) == set(config.inputs)
    assert inputs["pixel_values"].shape == (2, 3, 32, 32)
    with torch.inference_mode():
        logits = model(**inputs).logits
    assert list(config.outputs) == ["logits"]
    assert logits.shape[:2] == (2, 9 + optimum.image_tokens(model.config))
    assert torch.isfinite(logits).all()


def test_export_runs_our_line(tiny: Path, tmp_path: Path) -> None:
    manifest = optimum.export(tiny, tmp_path / "bundle", exporter="onnx", precision="fp32", greedy_tokens=4)
    assert manifest.parity["onnx"]["passed"]
    assert (tmp_path / "bundle" / "manifest.json").is_file()


def test_a_task_that_llava_has_not_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="image-text-to-text"):
        optimum.export(tiny, tmp_path / "bundle", task="text-classification")
    assert not (tmp_path / "bundle").exists()
