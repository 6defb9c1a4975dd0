"""A MIL program as frozen values: functions of blocks of operations, checked to be in order. Source: MIL.proto."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from vlm_runtime.mil.values import TensorType, Value, read_type, read_value
from vlm_runtime.mil.wire import Unsound, entries, fields, message, messages, text

_MAX_NESTING = 8


@dataclass(frozen=True)
class Operation:
    """One operation. Each input is a tuple of names or constants: one, or several where MIL takes a list."""

    type: str
    inputs: Mapping[str, tuple[str | Value, ...]]
    outputs: tuple[tuple[str, TensorType], ...]
    blocks: tuple[Block, ...] = ()
    attributes: Mapping[str, Value] | None = None

    @property
    def name(self) -> str:
        """The name of its first output; the operation's type when it has none."""
        return self.outputs[0][0] if self.outputs else self.type

    def names(self) -> Iterator[str]:
        """The names that it reads, those inside its blocks left out."""
        for arguments in self.inputs.values():
            yield from (one for one in arguments if isinstance(one, str))


@dataclass(frozen=True)
class Block:
    """Operations in order; `inputs` of a nested block are its own names."""

    inputs: tuple[tuple[str, TensorType], ...]
    operations: tuple[Operation, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Function:
    """A function: named inputs (tensors and states) and the block of its opset."""

    name: str
    opset: str
    inputs: Mapping[str, TensorType]
    block: Block

    def outputs(self) -> dict[str, TensorType]:
        """Declared types of its outputs."""
        types = dict(self.inputs) | {name: type_ for op in self.block.operations for name, type_ in op.outputs}
        return {name: types[name] for name in self.block.outputs}


def read_program(data: memoryview) -> dict[str, Function]:
    """The functions of the bytes of a Program. Raises Unsound for one that uses what it has not computed."""
    functions = {name: _function(name, value) for name, value in entries(fields(data), 2)}
    if not functions:
        raise Unsound("the program has no function")
    for function in functions.values():
        _check(function.block, set(function.inputs), function.name)
    return functions


def _function(name: str, data: memoryview) -> Function:
    found = fields(data)
    opset = text(message(found, 2))
    blocks = dict(entries(found, 3))
    if opset not in blocks:
        raise Unsound(f"function {name!r} has no block for its opset {opset!r}")
    return Function(name, opset, dict(_named_types(messages(found, 1))), _block(blocks[opset], 0))


def _named_types(items: Iterator[memoryview]) -> Iterator[tuple[str, TensorType]]:
    for item in items:
        found = fields(item)
        yield text(message(found, 1)), read_type(message(found, 2))


def _block(data: memoryview, depth: int) -> Block:
    if depth > _MAX_NESTING:
        raise Unsound("blocks are nested too deep")
    found = fields(data)
    return Block(
        tuple(_named_types(messages(found, 1))),
        tuple(_operation(item, depth) for item in messages(found, 3)),
        tuple(text(item) for item in messages(found, 2)),
    )


def _operation(data: memoryview, depth: int) -> Operation:
    found = fields(data)
    return Operation(
        text(message(found, 1)),
        {name: tuple(_bindings(argument)) for name, argument in entries(found, 2)},
        tuple(_named_types(messages(found, 3))),
        tuple(_block(item, depth + 1) for item in messages(found, 4)),
        {name: read_value(value) for name, value in entries(found, 5) if name != "name"},
    )


def _bindings(argument: memoryview) -> Iterator[str | Value]:
    for item in messages(fields(argument), 1):
        found = fields(item)
        name = message(found, 1)
        yield text(name) if name is not None else read_value(message(found, 2))


def _check(block: Block, known: set[str], where: str) -> None:
    """Each name is written once and before it is read, so that no value depends on itself."""
    known = set(known)
    for name, _ in block.inputs:
        _define(name, known, where)
    for op in block.operations:
        for name in op.names():
            if name not in known:
                raise Unsound(f"{where}: {op.type} reads {name[:80]!r} before it is computed")
        for inner in op.blocks:
            _check(inner, known, where)
        for name, _ in op.outputs:
            _define(name, known, where)
    for name in block.outputs:
        if name not in known:
            raise Unsound(f"{where}: the output {name[:80]!r} is not computed")


def _define(name: str, known: set[str], where: str) -> None:
    if not name or name in known:
        raise Unsound(f"{where}: {name[:80]!r} is computed twice" if name else f"{where}: a value has no name")
    known.add(name)
