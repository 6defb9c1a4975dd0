"""Optimum's TasksManager knows no LLaVA; `register()` teaches it, and `export` runs our line under Optimum's words.

    from optimum.exporters.tasks import TasksManager
    from vlm_export import optimum

    optimum.register()
    config = TasksManager.get_exporter_config_constructor(
        "onnx", model_type="llava", task="image-text-to-text", library_name="transformers"
    )(model.config)
    optimum.export("path/or/hub-id", "bundle", exporter="onnx", precision="int4")

Written for Optimum's core (2.3); its ONNX package is neither needed nor compatible with transformers 5.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_export.export import export as export_bundle
from vlm_export.target import target_names
from vlm_models import family
from vlm_models.errors import DependencyError, InputError

if TYPE_CHECKING:
    from vlm_runtime.manifest import Manifest

TASK = "image-text-to-text"


def register() -> None:
    """Tell TasksManager that each of our targets exports `llava` for image-text-to-text; more than once does no harm.

    Raises DependencyError where Optimum is not installed.
    """
    if importlib.util.find_spec("optimum.exporters") is None:
        raise DependencyError("the Optimum exporter needs optimum: pip install 'vlm-export[optimum]'")
    from optimum.exporters.tasks import TasksManager

    config_class = _config_class()
    for target in target_names():
        TasksManager.create_register(target)("llava", TASK)(config_class)


def export(
    model_name_or_path: str | Path,
    output: str | Path,
    *,
    exporter: str = "onnx",
    task: str = TASK,
    **options: Any,
) -> Manifest:
    """Export a checkpoint to the target `exporter`; `options` are those of `vlm_export.export`.

    Raises InputError for another task, else what `vlm_export.export` raises.
    """
    register()
    if task != TASK:
        raise InputError(f"task {task!r} cannot be exported: LLaVA checkpoints take {TASK!r}")
    return export_bundle(model_name_or_path, exporter, output, **options)


def _config_class() -> Callable[..., Any]:
    """The exporter config of LLaVA: names and dynamic axes of its inputs and outputs, and dummy inputs that fit."""
    from optimum.exporters.base import ExporterConfig
    from optimum.utils import DummyTextInputGenerator, DummyVisionInputGenerator, NormalizedTextAndVisionConfig

    class PromptWithImage(DummyTextInputGenerator):  # type: ignore[misc]
        """Token ids that begin with as many image tokens as the vision tower gives rows; no padding."""

        SUPPORTED_INPUT_NAMES = ("input_ids", "attention_mask")

        def __init__(self, task: str, normalized_config: Any, **kwargs: Any) -> None:
            super().__init__(task, normalized_config, **kwargs)
            self.config = normalized_config.config
            self.image_tokens = image_tokens(self.config)
            self.sequence_length += self.image_tokens

        def generate(
            self, input_name: str, framework: str = "pt", int_dtype: str = "int64", float_dtype: str = "fp32"
        ) -> Any:
            shape = (self.batch_size, self.sequence_length)
            if input_name == "attention_mask":
                return self.random_int_tensor(shape, 2, min_value=1, framework=framework, dtype=int_dtype)
            ids = self.random_int_tensor(shape, self.vocab_size, framework=framework, dtype=int_dtype)
            ids[ids == self.config.image_token_id] = (self.config.image_token_id + 1) % self.vocab_size
            ids[:, : self.image_tokens] = self.config.image_token_id
            return ids

    class LlavaExporterConfig(ExporterConfig):  # type: ignore[misc]
        NORMALIZED_CONFIG_CLASS = NormalizedTextAndVisionConfig.with_args(
            text_config="text_config", vision_config="vision_config", allow_new=True
        )
        DUMMY_INPUT_GENERATOR_CLASSES = (PromptWithImage, DummyVisionInputGenerator)

        @property
        def inputs(self) -> dict[str, dict[int, str]]:
            rows = {0: "batch_size", 1: "sequence_length"}
            return {"input_ids": rows, "attention_mask": rows, "pixel_values": {0: "batch_size"}}

        @property
        def outputs(self) -> dict[str, dict[int, str]]:
            return {"logits": {0: "batch_size", 1: "sequence_length"}}

    return LlavaExporterConfig


def image_tokens(config: Any) -> int:
    """Rows that one picture becomes, from a LlavaConfig."""
    vision = config.vision_config
    rows: int = family.find(vision.model_type, "positions", "vision tower").positions(vision)
    return rows - int(config.vision_feature_select_strategy == "default")
