"""Small Core ML packages written by coremltools itself: one layer of each kind, and a step with a state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_export.coreml.sdk import coremltools, quiet

CONTEXT = 8


def weights(seed: int = 0) -> dict[str, NDArray[np.float16]]:
    """Constants of `layers`: weights of 32 columns, of odd numbers of them, and two that are none."""
    rng = np.random.default_rng(seed)
    shapes = {
        "plain": (64, 96),
        "odd": (96, 48),  # 48 columns: blocks of 24
        "prime": (64, 37),  # no divisor but itself
        "point": (64, 64, 1, 1),
        "kernel": (32, 3, 4, 4),
        "product": (96, 64),  # (columns, rows)
        "added": (8, 160),
    }
    return {name: (rng.standard_normal(shape) * 0.1).astype(np.float16) for name, shape in shapes.items()}


def layers(w: dict[str, NDArray[np.float16]]) -> Any:
    """x (8, 96), y (8, 48), z (8, 37), image (1, 3, 8, 8), map (1, 64, 2, 2) → one output for each constant."""
    mil = coremltools("converters.mil.mil")
    mb, types = mil.Builder, mil.types
    shapes = {"x": (8, 96), "y": (8, 48), "z": (8, 37), "image": (1, 3, 8, 8), "map": (1, 64, 2, 2), "wide": (8, 160)}
    program = mil.Program()
    specs = {name: mb.TensorSpec(shape, types.fp16) for name, shape in shapes.items()}
    with mil.Function(specs, coremltools().target.iOS18) as function:
        i = function.inputs
        c = {name: mb.const(val=value, name=name) for name, value in w.items()}
        made = [
            mb.linear(x=i["x"], weight=c["plain"], name="plain_out"),
            mb.linear(x=i["y"], weight=c["odd"], name="odd_out"),
            mb.linear(x=i["z"], weight=c["prime"], name="prime_out"),
            mb.conv(x=i["map"], weight=c["point"], name="point_out"),
            mb.conv(x=i["image"], weight=c["kernel"], strides=[4, 4], name="kernel_out"),
            mb.matmul(x=i["x"], y=c["product"], name="product_out"),
            mb.add(x=i["wide"], y=c["added"], name="added_out"),
        ]
        function.set_outputs(made)
    program.add_function("main", function)
    return converted(program)


def converted(program: Any) -> Any:
    """The program as a Core ML model for iOS 18."""
    ct = coremltools()
    with quiet():
        return ct.convert(
            program,
            source="milinternal",
            convert_to="mlprogram",
            minimum_deployment_target=ct.target.iOS18,
            compute_precision=ct.precision.FLOAT32,
            skip_model_load=True,
        )


def saved(mlmodel: Any, path: Path) -> Path:
    """The model as a package folder."""
    with quiet():
        mlmodel.save(str(path))
    return path


def one_function(specs: dict[str, Any], build: Any) -> Any:
    """A model of the function that `build(mb, inputs)` returns the outputs of."""
    mil = coremltools("converters.mil.mil")
    program = mil.Program()
    with mil.Function(specs, coremltools().target.iOS18) as function:
        function.set_outputs(build(mil.Builder, function.inputs))
    program.add_function("main", function)
    return converted(program)


def with_state() -> Any:
    """row (1, 4) is added to the state cache (8, 4), whose sum (1,) comes out."""
    mil = coremltools("converters.mil.mil")
    mb, types = mil.Builder, mil.types
    specs = {"row": mb.TensorSpec((1, 4), types.fp16), "cache": mb.StateTensorSpec((CONTEXT, 4), types.fp16)}

    def build(mb: Any, inputs: Any) -> list[Any]:
        cache = mb.add(x=mb.read_state(input=inputs["cache"]), y=inputs["row"])
        kept = mb.coreml_update_state(state=inputs["cache"], value=cache)
        return [mb.reduce_sum(x=kept, axes=[0, 1], keep_dims=False, name="total")]

    return one_function(specs, build)
