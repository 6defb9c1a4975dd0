"""Over which ranges linear layers are given numbers: pictures and whole conversations through the checkpoint itself.

For precisions that round activations too. Every layer's inputs go into a histogram as they come, so memory does not
grow with the pictures; of the language model the hidden states of all sequences are held.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlm_export.importance import Example, examples
from vlm_export.reference import pixel_values
from vlm_export.streaming import Rows, stream
from vlm_export.target import Progress, silent
from vlm_models.errors import CheckpointError
from vlm_models.language import Linear
from vlm_quant.calibration import Calibration, sample
from vlm_quant.ranges import Histogram, Method
from vlm_runtime.image import open_image

if TYPE_CHECKING:
    from vlm_models.checkpoint import Checkpoint
    from vlm_models.model import Model

ActivationRanges = Mapping[str, tuple[float, float]]
"""Linear layer → the (low, high) to which its inputs are rounded."""

SAMPLES = 32


def vision_ranges(
    model: Model,
    calibration: Calibration,
    *,
    samples: int = SAMPLES,
    method: Method = "minmax",
    seed: int = 0,
    progress: Progress = silent,
) -> ActivationRanges:
    """Of vision encoder and projector, over the pictures of at most `samples` pairs, each picture once.

    Layers are named as in the modules: "tower.encoder.layers.0.mlp.fc1", "linear_1".
    Raises ImageError for a file that is no picture, CheckpointError where numbers overflow.
    """
    pictures = sorted({pair.image for pair in sample(calibration, samples, seed).pairs})
    encoder, projector = model.vision_encoder(), model.projector()
    seen = _Seen()
    hooks = [hook for module in (encoder, projector) for hook in _watch(module, seen)]
    try:
        for i, picture in enumerate(pictures):
            pixels = torch.from_numpy(pixel_values(model, open_image(picture)))
            with torch.inference_mode():
                projector(encoder(pixels))
            progress("calibration", i + 1, len(pictures))
    finally:
        for hook in hooks:
            hook.remove()
    return seen.ranges(method, model.checkpoint)


def language_ranges(
    model: Model,
    calibration: Calibration,
    *,
    samples: int = SAMPLES,
    method: Method = "minmax",
    seed: int = 0,
    progress: Progress = silent,
) -> ActivationRanges:
    """Of the language model, over pictures with their questions and answers of at most `samples` pairs.

    Layers are named as in the walk: "layers.0.mlp.down_proj", "lm_head" (its rows are those whose logits are read).
    Raises ImageError or PromptError for a pair that cannot be shown, CheckpointError where numbers overflow.
    """
    sequences = examples(model, sample(calibration, samples, seed), progress=progress)
    seen, done = _Seen(), itertools.count(1)
    of = (model.spec.language.layers + 1) * len(sequences)
    inputs = functools.partial(_inputs, seen, sequences)
    states = [example.embeds for example in sequences]
    stream(model.checkpoint, model.spec.language, states, inputs, lambda: progress("ranges", next(done), of))
    return seen.ranges(method, model.checkpoint)


class _Seen:
    """Histograms of what layers are given; layers that read the same tensor have one together."""

    def __init__(self) -> None:
        self._histograms: dict[str, Histogram] = {}
        self._last: tuple[Tensor, str] | None = None

    def observe(self, layer: str, x: Tensor) -> None:
        if self._last is not None and self._last[0] is x:
            self._histograms[layer] = self._histograms[self._last[1]]
            return
        self._histograms.setdefault(layer, Histogram()).observe(x.numpy())
        self._last = x, layer

    def ranges(self, method: Method, checkpoint: Checkpoint) -> ActivationRanges:
        found: dict[str, tuple[float, float]] = {}
        for layer, histogram in self._histograms.items():
            if not histogram.finite:
                raise CheckpointError(
                    f"{checkpoint.folder}: calibration gives {layer!r} inputs beyond float32: a damaged weight?"
                )
            found[layer] = histogram.range(method)
        return found


def _watch(module: nn.Module, seen: _Seen) -> Iterator[Any]:
    """Show `seen` what every nn.Linear of the module is given, until the hooks are removed."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):

            def hook(layer: nn.Module, given: tuple[Tensor, ...], name: str = name) -> None:
                seen.observe(name, given[0])

            yield layer.register_forward_pre_hook(hook)


def _inputs(seen: _Seen, sequences: Sequence[Example], x: Rows, linears: Sequence[Linear]) -> Rows:
    """x, shown to `seen` as it is computed."""

    def shown(i: int) -> Tensor:
        rows = x(i)
        read = rows[sequences[i].first_read :] if linears[0].name == "lm_head" else rows
        for linear in linears:
            seen.observe(linear.name, read)
        return rows

    return Rows(shown)
