"""Constants of a program, decoded once for all functions of a package: const and constexpr_* operations."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_models.errors import BundleError
from vlm_runtime.mil import ops_elementwise, ops_matrix, ops_tensor, ops_weights
from vlm_runtime.mil.package import Package, opening
from vlm_runtime.mil.program import Block, Function, Operation
from vlm_runtime.mil.values import NUMPY, Array, Blob, Value
from vlm_runtime.mil.wire import Unsound

OPS: Mapping[str, Callable[..., Any]] = ops_elementwise.OPS | ops_matrix.OPS | ops_tensor.OPS | ops_weights.OPS  # type: ignore[operator]
_HERE = frozenset(("const", "cond", "read_state", "write_state", "coreml_update_state"))
_PARAMETERS = {name: frozenset(inspect.signature(function).parameters) for name, function in OPS.items()}
_SMALL = 4096  # bytes of an immediate constant that may be part of a key


def call(op: Operation, inputs: dict[str, Any]) -> Sequence[Array]:
    """The results of an operation."""
    result = OPS[op.type](**inputs)
    return result if isinstance(result, tuple) else (result,)


def known(op: Operation, package: Package) -> None:
    """Raises BundleError for an operation, or an input of one, that is not implemented."""
    if op.type in _HERE:
        return
    if op.type not in OPS:
        raise BundleError(
            f"{package.folder}: operation {op.type!r} ({op.name[:80]!r}) is not one that engine 'mil' runs"
        )
    strange = set(op.inputs) | {name for name in op.attributes or {} if name != "val"}
    if strange := strange - (_PARAMETERS[op.type] - {"in_place"}):
        raise BundleError(f"{package.folder}: operation {op.type!r} has the unknown input {sorted(strange)[0][:80]!r}")


class Constants:
    """Decoded constants of a package. Floats are held as float32 and are not to be written to."""

    def __init__(self, package: Package) -> None:
        self._package = package
        self._decoded: dict[Any, Any] = {}

    def of(self, function: Function) -> Mapping[str, Any]:
        """Name → value of each constant that an operation of `function` reads. Raises BundleError."""
        ops = list(_operations(function.block))
        for op in ops:
            known(op, self._package)
        with opening(self._package.folder):
            return _Decoding(self._package, self._decoded, ops).read(function)


class _Decoding:
    """The constants of one function."""

    def __init__(self, package: Package, decoded: dict[Any, Any], ops: list[Operation]) -> None:
        self._package, self._decoded, self._ops = package, decoded, ops
        self._by_name = {
            name: op for op in ops for name, _ in op.outputs if op.type == "const" or op.type.startswith("constexpr_")
        }

    def read(self, function: Function) -> dict[str, Any]:
        wanted = [name for op in self._ops if op.outputs and op.name not in self._by_name for name in op.names()]
        wanted += [name for op in self._ops if not op.outputs for name in op.names()]
        wanted += [name for block in _blocks(function.block) for name in block.outputs]
        values = {name: self._value(name) for name in dict.fromkeys(wanted) if name in self._by_name}
        # Constants that only other constants read are steps of no plan either.
        return {**dict.fromkeys(self._by_name), **values}

    def _value(self, name: str) -> Any:
        op = self._by_name[name]
        place = [output for output, _ in op.outputs].index(name)
        key = self._key(name)
        if key not in self._decoded:
            value = self._computed(op)[place]
            if isinstance(value, np.ndarray):
                value = value.astype(np.float32) if value.dtype == np.float16 else value
                value.setflags(write=False)
            self._decoded[key] = value
        return self._decoded[key]

    def _computed(self, op: Operation) -> Sequence[Any]:
        if op.type == "const":
            return (self._package.constant(_content(op)),)
        inputs = {name: self._argument(arguments) for name, arguments in op.inputs.items()}
        inputs |= {name: self._package.constant(value) for name, value in (op.attributes or {}).items()}
        try:
            with np.errstate(all="ignore"):
                results = call(op, inputs)
                return [
                    self._rounded(value, type_.dtype) for value, (_, type_) in zip(results, op.outputs, strict=True)
                ]
        except (ValueError, IndexError, TypeError, KeyError, ArithmeticError, MemoryError) as error:
            raise Unsound(f"{op.type} {op.name[:80]!r}: {error}") from None

    def _argument(self, arguments: tuple[str | Value, ...]) -> Any:
        """An input of a constexpr: a constant, or another constexpr's result."""
        if len(arguments) != 1:
            raise Unsound(f"{len(arguments)} values where one belongs")
        (one,) = arguments
        if isinstance(one, Value):
            return self._package.constant(one)
        if one not in self._by_name:
            raise Unsound(f"a constant depends on {one[:80]!r}, which is none")
        op = self._by_name[one]
        return self._computed(op)[[name for name, _ in op.outputs].index(one)]

    def _rounded(self, value: Any, dtype: str) -> Any:
        """In the declared type: Core ML decompresses into float16 where the weight is one."""
        if dtype not in NUMPY:
            raise Unsound(f"a constant of type {dtype}")
        return np.asarray(value).astype(NUMPY[dtype], copy=False)

    def _key(self, name: str) -> Any:
        """What the constant is made of, so that functions with the same weights decode them once."""
        op = self._by_name[name]
        if op.type == "const":
            return self._value_key(_content(op), name)
        inputs = tuple(
            (word, self._key(one) if isinstance(one, str) and one in self._by_name else self._value_key(one, name))
            for word, arguments in sorted(op.inputs.items())
            for one in arguments
        )
        attributes = tuple((word, self._value_key(one, name)) for word, one in sorted((op.attributes or {}).items()))
        return op.type, name if len(op.outputs) > 1 else None, str(op.outputs[0][1]), inputs, attributes

    def _value_key(self, value: str | Value, name: str) -> Any:
        if isinstance(value, Value):
            content = value.content
            if isinstance(content, Blob | str):
                return str(value.type), content
            if isinstance(content, np.ndarray) and content.nbytes <= _SMALL:
                return str(value.type), content.tobytes()
        return id(value), name


def _content(op: Operation) -> Value:
    value = (op.attributes or {}).get("val")
    if value is None:
        raise Unsound(f"const {op.name[:80]!r} has no value")
    return value


def _operations(block: Block) -> Iterator[Operation]:
    for one in _blocks(block):
        yield from one.operations


def _blocks(block: Block) -> Iterator[Block]:
    yield block
    for op in block.operations:
        for inner in op.blocks:
            yield from _blocks(inner)
