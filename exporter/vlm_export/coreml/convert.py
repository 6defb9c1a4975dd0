"""The language model as a Core ML package: functions "prefill" and "decode" of one walk, sharing their weights.

Each function takes inputs_embeds (1, S, H), position int32 (1,) of the first row, causal_mask (1, 1, S, C) to add to
the scores, and last_row int32 (1,), the row whose logits (1, V) are wanted; rows after it are padding. position + S is
at most C. The KV cache key_cache, value_cache (layers, kv_heads, C, head_dim) is a state, or with kv "io" an input;
then new_keys and new_values (layers, kv_heads, S, head_dim) are outputs, which the caller writes there at `position`.
"""

from __future__ import annotations

import contextlib
import gc
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from vlm_export.coreml.compress import Named, compress
from vlm_export.coreml.decoder import KV, Inputs, Layout, MilLanguage, Shape, Var
from vlm_export.coreml.functions import merge
from vlm_export.coreml.sdk import coremltools, quiet
from vlm_export.target import Progress, silent
from vlm_models.errors import InputError
from vlm_models.language import walk
from vlm_models.model import Model
from vlm_quant.recipe import Precision

PART = "language_model"
PREFILL = (64,)
PASSES = ("merge_consecutive_reshapes", "const_deduplication", "dead_code_elimination")


def convert_language(
    model: Model,
    precision: Precision,
    path: Path,
    *,
    max_context: int,
    kv: KV = "state",
    layout: Layout = "plain",
    prefill: Sequence[int] = PREFILL,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write the package `path` (language_model.mlpackage) and say what is in it.

    `prefill` are the rows of the prefill functions, none longer than the context: the first one is "prefill", others
    "prefill_<rows>". A state is float16 also at fp32, since Core ML has no other. Meanwhile every function is a package
    beside `path`, one of them in float too. Raises InputError for options that are not, CheckpointError for what Core
    ML cannot express, RecipeError for a precision it does not have, DependencyError without coremltools.
    """
    _check(kv, layout, prefill, max_context)
    names = function_rows(prefill, max_context)
    dtype = np.float32 if precision.weights == "fp32" else np.float16
    details: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        packages = {}
        for done, (name, rows) in enumerate(names.items()):
            shape = Shape(rows, max_context, layout, kv, dtype)
            packages[name] = Path(temporary) / f"{name}.mlpackage"
            stages = _Stages(progress, done, len(names), model.spec.language.layers + 2)
            details = convert_function(model, precision, shape, packages[name], stages, progress)
        merge(packages, path, {"vlm.fingerprint": model.spec.fingerprint, "vlm.part": PART})
    progress(PART, 1, 1)
    cache = "fp32" if kv == "io" and dtype is np.float32 else "fp16"
    return {"functions": names, "kv": kv, "cache": cache, "layout": layout, "max_context": max_context, **details}


def function_rows(prefill: Sequence[int], max_context: int) -> dict[str, int]:
    """Function → rows it takes."""
    sizes = list(dict.fromkeys(min(rows, max_context) for rows in prefill))
    names = {"prefill" if i == 0 else f"prefill_{rows}": rows for i, rows in enumerate(sizes)}
    return {**names, "decode": 1}


def _check(kv: str, layout: str, prefill: Sequence[int], max_context: int) -> None:
    for what, given, allowed in (("KV cache policy", kv, get_args(KV)), ("layout", layout, get_args(Layout))):
        if given not in allowed:
            raise InputError(f"unknown {what} {given!r}: choose one of {', '.join(allowed)}")
    if not prefill or min(prefill) < 1 or max_context < 1:
        raise InputError(
            f"prefill lengths {', '.join(map(str, prefill)) or 'none'} in a context of {max_context}: "
            "give at least one length, and all of 1 row or more"
        )


def convert_function(
    model: Model,
    precision: Precision,
    shape: Shape,
    path: Path,
    reached: Callable[[int], None] = lambda done: None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """One function, "main", compressed and saved as a package of its own; `reached` hears how many layers are done."""
    ct = coremltools()
    program, layers = emit(model, shape, reached)
    with _scratch(path.parent):
        with quiet():
            mlmodel = ct.convert(
                program,
                source="milinternal",
                convert_to="mlprogram",
                minimum_deployment_target=ct.target.iOS18,
                compute_precision=ct.precision.FLOAT32,  # every type is chosen by the emitter
                compute_units=ct.ComputeUnit.CPU_ONLY,
                pass_pipeline=_pipeline(ct),
                skip_model_load=True,
            )
        # The weights are on the disk now, from where they are compressed; programs are cycles that hold them in memory.
        mlmodel._mil_program = program = None
        gc.collect()
        mlmodel, details = compress(mlmodel, precision, part=PART, layers=layers, progress=progress)
        with quiet():
            mlmodel.save(str(path))
    mlmodel = None
    if precision.weights not in ("fp16", "fp32"):
        gc.collect()
    return dict(details)


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[None]:
    """Temporary files go into `folder` and end with this; coremltools leaves its own until Python ends."""
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        tempfile.tempdir = temporary
        try:
            yield
        finally:
            tempfile.tempdir = before


def _pipeline(ct: Any) -> Any:
    """The passes that such a graph profits from; coremltools' other 80 take minutes and rewrite indices as 16 bits."""
    pipeline = ct.PassPipeline.EMPTY
    for name in PASSES:
        pipeline.append_pass(f"common::{name}")
    return pipeline


def emit(
    model: Model, shape: Shape, reached: Callable[[int], None] = lambda done: None
) -> tuple[Any, dict[str, Named]]:
    """The walk as a MIL program of one function, "main", and what the constants of its weights are."""
    mil = coremltools("converters.mil.mil")
    types, mb = mil.types, mil.Builder
    spec = model.spec.language
    kind = types.fp16 if shape.dtype is np.float16 else types.fp32
    cache = (spec.layers, spec.kv_heads, shape.context, spec.head_dim)
    held = mb.StateTensorSpec(cache, types.fp16) if shape.kv == "state" else mb.TensorSpec(cache, kind)
    specs = {
        "inputs_embeds": mb.TensorSpec((1, shape.rows, spec.hidden_size), kind),
        "position": mb.TensorSpec((1,), types.int32),
        "causal_mask": mb.TensorSpec((1, 1, shape.rows, shape.context), kind),
        "last_row": mb.TensorSpec((1,), types.int32),
        "key_cache": held,
        "value_cache": mb.StateTensorSpec(cache, types.fp16) if shape.kv == "state" else mb.TensorSpec(cache, kind),
    }
    target = coremltools().target.iOS18
    program = mil.Program()
    with mil.Function(specs, target) as function:
        given: dict[str, Var] = dict(function.inputs)
        embeds = given.pop("inputs_embeds")
        emitter = MilLanguage(model.checkpoint, spec, shape, Inputs(**given), reached)
        logits = emitter.leave(walk(spec, emitter, emitter.enter(embeds)))
        function.set_outputs([logits] if shape.kv == "state" else [logits, *emitter.new_rows()])
    program.add_function("main", function)
    return program, emitter.layers


class _Stages:
    """Progress within one of several functions."""

    def __init__(self, progress: Progress, function: int, functions: int, steps: int) -> None:
        self._progress, self._start, self._of = progress, function * steps, functions * steps

    def __call__(self, done: int) -> None:
        self._progress(PART, self._start + done, self._of)
