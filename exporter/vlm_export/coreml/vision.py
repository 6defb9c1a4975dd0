"""Vision encoder and projector as Core ML packages: the checkpoint's own modules, traced, then compressed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from vlm_export.coreml.activations import Observe, Samples
from vlm_export.coreml.compress import Named, compress
from vlm_export.coreml.sdk import coremltools, quiet
from vlm_export.reference import pixel_values
from vlm_export.target import Progress, silent
from vlm_models.errors import RecipeError
from vlm_models.model import Model
from vlm_quant.calibration import Calibration, sample
from vlm_quant.coreml_types import coreml_type
from vlm_quant.recipe import Precision
from vlm_runtime.image import open_image

EncoderPart = Literal["vision_encoder", "projector"]

PICTURES = 32  # of the calibration pairs whose activations are looked at
_FP16_MAX = float(np.finfo(np.float16).max)


def convert_encoder(
    model: Model,
    part: EncoderPart,
    precision: Precision,
    path: Path,
    *,
    calibration: Calibration | None = None,
    observe: Observe | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write `part` as the package `path` (a folder), and return the plain values for `Part.details`.

    vision_encoder: pixel_values (1, 3, s, s) → image_features (1, T, F); projector: image_features → image_embeds
    (1, T, H); float32 at fp32, float16 otherwise, in and out. "w8a8" calibrates on pictures of `calibration`.
    Raises RecipeError for weights beyond float16, for a precision the part cannot take, for "w8a8" without pairs;
    DependencyError where coremltools is missing.
    """
    samples: Samples = ()
    if coreml_type(precision, part).activations and calibration is not None:
        samples = list(_samples(model, part, calibration, progress))
    progress(part, 0, 2)
    mlmodel = _converted(model, part, half=precision.weights != "fp32")
    progress(part, 1, 2)
    mlmodel, details = compress(
        mlmodel,
        precision,
        part=part,
        layers=_layers(model, part),
        samples=samples,
        observe=observe,
        progress=progress,
    )
    if path.exists():
        shutil.rmtree(path)
    mlmodel.user_defined_metadata.update({"vlm.fingerprint": model.spec.fingerprint, "vlm.part": part})
    with quiet():
        mlmodel.save(str(path))
    progress(part, 2, 2)
    return details


def _converted(model: Model, part: EncoderPart, *, half: bool) -> Any:
    """The part as an ML program for iOS 18 and macOS 15. Its shapes are fixed: one picture a call."""
    ct = coremltools()
    vision, projector = model.spec.vision, model.spec.projector
    if part == "vision_encoder":
        module: torch.nn.Module = model.vision_encoder()
        shape: tuple[int, ...] = (1, 3, vision.image_size, vision.image_size)
    else:
        module, shape = model.projector(), (1, vision.image_tokens, projector.in_features)
    if half:
        _check_fp16(module)
    source, result = names(part)
    dtype = np.float16 if half else np.float32
    with quiet(), torch.no_grad():
        trace: Any = torch.jit.trace  # has no types
        traced = trace(module, torch.zeros(shape), check_trace=False)
        return ct.convert(
            traced,
            convert_to="mlprogram",
            minimum_deployment_target=ct.target.iOS18,
            compute_precision=ct.precision.FLOAT16 if half else ct.precision.FLOAT32,
            inputs=[ct.TensorType(name=source, shape=shape, dtype=dtype)],
            outputs=[ct.TensorType(name=result, dtype=dtype)],
            skip_model_load=True,
        )


def names(part: EncoderPart) -> tuple[str, str]:
    """What a part's input and output are called."""
    return ("pixel_values", "image_features") if part == "vision_encoder" else ("image_features", "image_embeds")


def _layers(model: Model, part: EncoderPart) -> dict[str, Named]:
    """Constants of the weights, which coremltools names after the module's parameters."""
    module = model.vision_encoder() if part == "vision_encoder" else model.projector()
    return {name.replace(".", "_"): (name.removesuffix(".weight"), None) for name, _ in module.named_parameters()}


def _check_fp16(module: torch.nn.Module) -> None:
    for name, tensor in module.named_parameters():
        if (largest := float(tensor.detach().abs().max())) > _FP16_MAX:
            raise RecipeError(f"weight {name!r} is beyond float16 (up to {largest:.3g}): use fp32 for this part")


def _samples(
    model: Model, part: EncoderPart, calibration: Calibration, progress: Progress
) -> Iterator[dict[str, NDArray[Any]]]:
    """What the part is given for pictures of the pairs, each picture once."""
    pictures = sorted({pair.image for pair in sample(calibration, PICTURES).pairs})
    for i, picture in enumerate(pictures):
        values = pixel_values(model, open_image(picture))
        if part == "projector":
            with torch.inference_mode():
                values = model.vision_encoder()(torch.from_numpy(values)).numpy()
        yield from ({names(part)[0]: tile[None]} for tile in values)
        progress("calibration", i + 1, len(pictures))
