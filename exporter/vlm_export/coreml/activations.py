"""Rounded activations: coremltools' insertion of quantize and dequantize, over ranges that our executor has seen.

coremltools calibrates with Core ML's own predictions, which needs a Mac; and 9.0 there keeps only the range of the last
sample, because it overwrites the range before it compares. So one of its functions is replaced while it works.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from vlm_export.coreml.sdk import coremltools, quiet
from vlm_runtime.mil import watch

Samples = Sequence[Mapping[str, NDArray[Any]]]
"""Input name → values, for each run."""

Ranges = Mapping[str, tuple[float, float]]
"""Tensor name → least and largest value, over all samples."""

Observe = Callable[[Path, Samples], Ranges]
"""Runs the .mlpackage folder for each sample; ranges of its inputs and of every float tensor that it computes."""

_OPS = ("add", "avg_pool", "max_pool")  # what coremltools would round beside conv and linear


def round_activations(mlmodel: Any, samples: Samples, observe: Observe | None = None) -> Any:
    """The model with the inputs and outputs of convolutions and linear layers rounded to int8, one scale a tensor."""
    optimize = coremltools("optimize.coreml")
    config = optimize.OptimizationConfig(
        global_config=optimize.OpLinearQuantizerConfig(mode="linear_symmetric"),
        op_type_configs=dict.fromkeys(_OPS),
    )
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "calibration.mlpackage"
        with quiet():
            mlmodel.save(str(package))
        ranges = (observe or watch.ranges)(package, samples)
    with quiet(), _calibrated(ranges):
        return optimize.linear_quantize_activations(mlmodel, config, [])


@contextlib.contextmanager
def _calibrated(ranges: Ranges) -> Iterator[None]:
    """coremltools takes `ranges` for what it would have measured."""
    module = coremltools("optimize.coreml._post_training_quantization")
    own = module._get_activation_calibration_stats

    def stats(mlmodel: Any, sample_data: Any, group: int = -1) -> dict[str, dict[str, float]]:
        outputs = {output.name for output in mlmodel.get_spec().description.output}
        return {name: {"rmin": low, "rmax": high} for name, (low, high) in ranges.items() if name not in outputs}

    module._get_activation_calibration_stats = stats
    try:
        yield
    finally:
        module._get_activation_calibration_stats = own
