"""Which constants of a program are the weights of layers, read from its protobuf: no weight is loaded for it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SMALL = 1024  # numbers below which a constant is not worth its scales
_WEIGHT = {"linear": "weight", "conv": "weight", "conv_transpose": "weight", "matmul": "y"}
_FLOATS = {10: "fp16", 11: "fp32"}  # FLOAT16 and FLOAT32 of MIL.proto's DataType


@dataclass(frozen=True)
class Layer:
    """A weight by the name of its constant: the operation that takes it, its shape, the axes of its rows and columns.

    Rows are the outputs of a layer, columns its inputs; a kernel's places are axes of their own.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    rows: int
    columns: int

    @property
    def places(self) -> int:
        """Numbers of the kernel: 1 for linear layers."""
        return math.prod(self.shape) // self.shape[self.rows] // self.shape[self.columns]


@dataclass(frozen=True)
class Constants:
    """Float constants of two axes or more and 1024 numbers or more: weights, and the others with what they are."""

    layers: Mapping[str, Layer]
    others: Mapping[str, str]


def constants(spec: Any) -> Constants:
    """What the program of a Core ML specification holds, over all functions. Only top-level blocks are looked at."""
    layers: dict[str, Layer] = {}
    others: dict[str, str] = {}
    for function in spec.mlProgram.functions.values():
        operations = function.block_specializations[function.opset].operations
        made = {op.outputs[0].name: op for op in operations if op.type == "const"}
        users: dict[str, list[Any]] = defaultdict(list)
        for op in operations:
            for argument in op.inputs.values():
                for binding in argument.arguments:
                    if binding.name in made:
                        users[binding.name].append(op)
        for name, op in made.items():
            kind, shape = _type(op)
            if kind is None or len(shape) < 2 or math.prod(shape) < SMALL:
                continue  # biases and norms are small
            found = {_layer(name, shape, user, made) for user in users[name]}
            only = found.pop() if len(found) == 1 else None
            if only is not None:
                layers[name] = only
            else:
                by = "/".join(sorted({user.type for user in users[name]})) or "an output"
                others[name] = f"{kind}: {math.prod(shape)} numbers of {by}, which are no layer's weights"
    return Constants(layers, others)


def _type(const: Any) -> tuple[str | None, tuple[int, ...]]:
    tensor = const.outputs[0].type.tensorType
    return _FLOATS.get(tensor.dataType), tuple(d.constant.size for d in tensor.dimensions)


def _layer(name: str, shape: tuple[int, ...], user: Any, made: Mapping[str, Any]) -> Layer | None:
    """The constant as that user's weight, or None where it is something else to it."""
    bound = user.inputs[_WEIGHT[user.type]].arguments if user.type in _WEIGHT else ()
    if [binding.name for binding in bound] != [name]:
        return None
    if any(b.name == name for key, a in user.inputs.items() if key != _WEIGHT[user.type] for b in a.arguments):
        return None
    if user.type == "matmul":
        if len(shape) != 2:
            return None
        turned = not _flag(user, "transpose_y", made)
    else:
        turned = user.type == "conv_transpose"
    return Layer(name, user.type, shape, int(turned), int(not turned))


def _flag(op: Any, name: str, made: Mapping[str, Any]) -> bool:
    if name not in op.inputs:
        return False
    binding = op.inputs[name].arguments[0]
    value = made[binding.name].attributes["val"] if binding.name in made else binding.value
    return bool(value.immediateValue.tensor.bools.values[0])
