"""What is known to go wrong with a package on a device, looked for in the package before it is published.

Each rule is a report that somebody made of Core ML, named beside it. None of them says that a package will load: only a
device does. A finding that Core ML refuses ends the export, the others are notes for the manifest.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vlm_models.errors import CheckError
from vlm_runtime.mil.package import Package, open_package
from vlm_runtime.mil.program import Block, Function, Operation
from vlm_runtime.mil.values import NUMPY, TensorType

OPSET = "CoreML8"  # iOS 18 and macOS 15: states, int4, several functions
_SPECIFICATION = 9
_RANK = 5
_ROW = 64  # bytes to which the Neural Engine pads the last axis of a tensor
_UINT16 = 1 << 16
_ENGINE_WEIGHTS = 1 << 30
_DEVICES = {"4 GB": 4 << 30, "6 GB": 6 << 30, "8 GB": 8 << 30}
_DYNAMIC = frozenset(("cond", "while_loop", "non_zero", "range_1d", "shape"))
_STATEFUL = frozenset(("read_state", "write_state", "coreml_update_state"))

# coremltools 9.0's operations up to iOS 18, less random numbers, lists, and what only its own frontends make.
# fmt: off
OPERATIONS = _STATEFUL | frozenset((
    "abs", "acos", "add", "affine", "argsort", "asin", "atan", "atanh", "avg_pool", "band_part", "batch_norm",
    "batch_to_space", "cast", "ceil", "clamped_relu", "clip", "concat", "cond", "const",
    "constexpr_affine_dequantize", "constexpr_blockwise_shift_scale", "constexpr_cast", "constexpr_lut_to_dense",
    "constexpr_lut_to_sparse", "constexpr_sparse_blockwise_shift_scale", "constexpr_sparse_to_dense", "conv",
    "conv_quantized", "conv_transpose", "cos", "cosh", "crop", "crop_resize", "cumsum", "depth_to_space",
    "dequantize", "einsum", "elu", "equal", "erf", "exp", "exp2", "expand_dims", "fill", "fill_like", "flatten2d",
    "floor", "floor_div", "gather", "gather_along_axis", "gather_nd", "gelu", "greater", "greater_equal", "gru",
    "identity", "instance_norm", "inverse", "l2_norm", "l2_pool", "layer_norm", "leaky_relu", "less", "less_equal",
    "linear", "linear_activation", "local_response_norm", "log", "logical_and", "logical_not", "logical_or",
    "logical_xor", "lstm", "matmul", "max_pool", "maximum", "minimum", "mod", "mul", "non_maximum_suppression",
    "non_zero", "not_equal", "one_hot", "pad", "pixel_shuffle", "pixel_unshuffle", "pow", "prelu", "quantize",
    "range_1d", "real_div", "reduce_argmax", "reduce_argmin", "reduce_l1_norm", "reduce_l2_norm", "reduce_log_sum",
    "reduce_log_sum_exp", "reduce_max", "reduce_mean", "reduce_min", "reduce_prod", "reduce_sum", "reduce_sum_square",
    "relu", "relu6", "resample", "reshape", "reshape_like", "resize", "resize_bilinear", "resize_nearest_neighbor",
    "reverse", "reverse_sequence", "rnn", "round", "rsqrt", "scaled_dot_product_attention", "scaled_tanh", "scatter",
    "scatter_along_axis", "scatter_nd", "select", "shape", "sigmoid", "sigmoid_hard", "sign", "silu", "sin", "sinh",
    "slice_by_index", "slice_by_size", "slice_update", "sliding_windows", "softmax", "softplus",
    "softplus_parametric", "softsign", "space_to_batch", "space_to_depth", "split", "sqrt", "square", "squeeze",
    "stack", "sub", "tan", "tanh", "threshold", "thresholded_relu", "tile", "topk", "transpose", "upsample_bilinear",
    "upsample_nearest_neighbor", "while_loop",
))
# fmt: on


@dataclass(frozen=True)
class Finding:
    """One sentence about a package; `refused` where Core ML would not take it."""

    text: str
    refused: bool = False


def lint(folder: Path) -> list[str]:
    """Findings on the package `folder`, one sentence each, those that Core ML refuses first.

    Raises BundleError for a package that cannot be read.
    """
    found = findings(open_package(folder))
    return [f"Core ML refuses it: {f.text}" for f in found if f.refused] + [f.text for f in found if not f.refused]


def notes(folder: Path) -> list[str]:
    """As `lint`, but raises CheckError for the first finding that Core ML refuses."""
    found = findings(open_package(folder))
    for finding in found:
        if finding.refused:
            raise CheckError(f"{folder.name} would not load: {finding.text}; this is a fault of vlm-export, report it")
    return [finding.text for finding in found]


def findings(package: Package) -> list[Finding]:
    """All findings, in the order of the rules; each sentence once, whatever the number of functions."""
    rules: tuple[Callable[[Function], Iterator[Finding]], ...]
    rules = (_operations, _ranks, _indices, _alignment, _dynamic)
    found = [*_target(package), *_states(package), *_features(package)]
    found += [finding for rule in rules for function in package.functions.values() for finding in rule(function)]
    found += _memory(package)
    return list(dict.fromkeys(found))


def _target(package: Package) -> Iterator[Finding]:
    if package.version > _SPECIFICATION:
        yield Finding(f"specification version {package.version} is newer than iOS 18's {_SPECIFICATION}", refused=True)
    for function in package.functions.values():
        if function.opset != OPSET:
            yield Finding(
                f"function {function.name!r} is of opset {function.opset}, not {OPSET} (iOS 18)", refused=True
            )


def _states(package: Package) -> Iterator[Finding]:
    """coremltools issues 2275 and 2278: "MIL program input 'k_cache' not found" when loading; 2537: fixed shapes."""
    for name, function in package.functions.items():
        described = package.descriptions[name]
        states = {key: type for key, type in function.inputs.items() if type.kind == "state"}
        for key, type in states.items():
            if key not in described.states:
                yield Finding(f"state {key!r} of function {name!r} is not in the description", refused=True)
            if type.dtype != "fp16" or type.shape is None or None in type.shape:
                yield Finding(f"state {key!r} is {type}: states are fp16 and of a fixed shape", refused=True)
        for key in described.states.keys() - states.keys():
            yield Finding(f"state {key!r} is described, but no input of function {name!r}", refused=True)


def _features(package: Package) -> Iterator[Finding]:
    """What an app feeds and reads: float16, float32, int32, of the shapes that the program has."""
    for name, function in package.functions.items():
        described = package.descriptions[name]
        types = {**function.inputs, **function.outputs()}
        for key, feature in {**described.inputs, **described.outputs}.items():
            if feature.dtype not in ("fp16", "fp32", "int32"):
                yield Finding(f"{key!r} of function {name!r} is of a type that no MLMultiArray has", refused=True)
            type = types.get(key)
            if type is None:
                yield Finding(f"{key!r} is described, but not in function {name!r}", refused=True)
            elif type.shape != feature.shape or type.dtype != feature.dtype:
                told = f"{feature.dtype}[{', '.join(map(str, feature.shape))}]"
                yield Finding(f"{key!r} of function {name!r} is described as {told}, it is {type}", refused=True)


def _operations(function: Function) -> Iterator[Finding]:
    for type in sorted({op.type for op in _all(function.block)} - OPERATIONS):
        yield Finding(f"operation {type!r} is not one of iOS 18's", refused=True)


def _ranks(function: Function) -> Iterator[Finding]:
    for op in _all(function.block):
        if op.type == "const" or op.type.startswith("constexpr_"):
            continue  # the palette of a convolution has six
        for name, type in op.outputs:
            if type.shape is None:
                yield Finding(f"{op.type} {name!r} has no rank", refused=True)
            elif len(type.shape) > _RANK:
                yield Finding(f"{op.type} {name!r} has {len(type.shape)} axes, more than {_RANK}", refused=True)


def _indices(function: Function) -> Iterator[Finding]:
    """The Neural Engine turns indices into 16 bits (executorch pull request 7616)."""
    types = dict(function.inputs) | {name: type for op in _all(function.block) for name, type in op.outputs}
    for op in _all(function.block):
        if op.type not in ("gather", "gather_along_axis", "gather_nd"):
            continue
        (table,) = op.inputs["x"]
        shape = types[table].shape if isinstance(table, str) else table.type.shape
        longest = max((n or 0 for n in shape or ()), default=0)
        if longest > _UINT16:
            yield Finding(f"{op.type} {op.name!r} picks among {longest} rows: a 16-bit index reaches {_UINT16}")


def _alignment(function: Function) -> Iterator[Finding]:
    """ml-ane-transformers: the last axis is padded to 64 bytes, so a last axis of 1 takes 32 times its size."""
    padded: dict[str, tuple[TensorType, float]] = {}
    sizes = 0
    for op in _all(function.block):
        if op.type == "const" or op.type.startswith("constexpr_"):
            continue
        for name, type in op.outputs:
            if type.kind != "tensor" or not type.shape or None in type.shape or type.dtype != "fp16":
                continue
            sizes += 1
            last = _bytes(type) / max(1, math.prod(n or 0 for n in type.shape[:-1]))
            waste = math.ceil(last / _ROW) * _ROW / max(1.0, last)
            if waste >= 2:
                padded[name] = (type, waste)
    if padded:
        name, (type, waste) = max(padded.items(), key=lambda item: item[1][1] * _bytes(item[1][0]))
        yield Finding(
            f"function {function.name!r}: the Neural Engine pads {len(padded)} of {sizes} tensors to twice their size "
            f"or more; the largest is {name!r} {type}, {waste:.0f} times"
        )


def _dynamic(function: Function) -> Iterator[Finding]:
    found = Counter(op.type for op in _all(function.block) if op.type in _DYNAMIC)
    if found:
        named = ", ".join(f"{count} {type}" for type, count in sorted(found.items()))
        yield Finding(f"function {function.name!r} has {named}, which the Neural Engine does not run")


def _memory(package: Package) -> Iterator[Finding]:
    """Weights as stored, states, and the largest two tensors that are alive together. Estimates, not measured."""
    weights = sum(path.stat().st_size for path in package.folder.rglob("*.bin"))
    states = max((sum(map(_bytes, _of_kind(f, "state"))) for f in package.functions.values()), default=0)
    work = max(
        (_bytes(type) for f in package.functions.values() for op in f.block.operations if op.type != "const"
         and not op.type.startswith("constexpr_") for _, type in op.outputs), default=0,
    )  # fmt: skip
    total = weights + states + 2 * work
    if weights > _ENGINE_WEIGHTS:
        yield Finding(
            f"{weights / 1e9:.2f} GB of weights: the Neural Engine of iPhones and iPads was reported to take no more "
            "than about 1 GB in one package (ml-stable-diffusion splits its models there); the GPU takes them"
        )
    small = [name for name, memory in _DEVICES.items() if total > memory // 2]
    if small:
        yield Finding(
            f"it takes about {total / 1e9:.2f} GB when it runs; an app may use about half of a device's memory, "
            f"so not on those of {', '.join(small)}"
        )


def _of_kind(function: Function, kind: str) -> list[TensorType]:
    return [type for type in function.inputs.values() if type.kind == kind]


def _bytes(type: TensorType) -> int:
    numpy = NUMPY.get(type.dtype)
    return 0 if numpy is None or type.shape is None else numpy.itemsize * math.prod(n or 0 for n in type.shape)


def _all(block: Block) -> Iterator[Operation]:
    for op in block.operations:
        yield op
        for inner in op.blocks:
            yield from _all(inner)
