"""What a bundle's Core ML packages hold: operations by type, weights by precision, the largest tensors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from rich.table import Table

from vlm_models.errors import InputError
from vlm_runtime.bundle import Bundle
from vlm_runtime.mil.package import Package, open_package
from vlm_runtime.mil.program import Block, Function, Operation
from vlm_runtime.mil.values import Blob, Value, packed_bytes

_ENGINE = "mil"
_LARGEST = 5


@dataclass(frozen=True)
class Weights:
    """Constants in weight files: tensors and bytes by stored type; those of several functions once."""

    tensors: Counter[str]
    bytes: Counter[str]
    largest: tuple[tuple[str, str, int], ...]


def explain(bundle: Bundle) -> list[Table]:
    """Tables to print: for each package its functions, operations, weights. Raises InputError without engine "mil"."""
    tables = []
    for part, engines in bundle.manifest.parts.items():
        if _ENGINE in engines:
            package = open_package(bundle.path(engines[_ENGINE].graph).parent)
            tables += [_functions(part, package), _weights(part, package)]
    if not tables:
        held = sorted({name for engines in bundle.manifest.parts.values() for name in engines})
        raise InputError(f"--explain tells about Core ML packages; this bundle has engines {', '.join(held)}")
    return tables


def operations(function: Function) -> Counter[str]:
    """Operations by type, those of nested blocks with them and constants left out."""
    return Counter(op.type for op in _operations(function.block) if op.type != "const")


def weights(package: Package) -> Weights:
    """The constants that lie in weight files."""
    found: dict[Blob, tuple[str, Value]] = {}
    for function in package.functions.values():
        for op in _operations(function.block):
            for value in (op.attributes or {}).values():
                if isinstance(value.content, Blob):
                    found.setdefault(value.content, (op.name, value))
    sized = [(name, value, packed_bytes(value.type.dtype, _shape(value))) for name, value in found.values()]
    tensors = Counter(value.type.dtype for _, value, _ in sized)
    total: Counter[str] = Counter()
    for _, value, size in sized:
        total[value.type.dtype] += size
    largest = sorted(sized, key=lambda one: -one[2])[:_LARGEST]
    return Weights(tensors, total, tuple((name, str(value.type), size) for name, value, size in largest))


def _shape(value: Value) -> tuple[int, ...]:
    return tuple(n or 0 for n in value.type.shape or ())


def _operations(block: Block) -> Iterator[Operation]:
    for op in block.operations:
        yield op
        for inner in op.blocks:
            yield from _operations(inner)


def _functions(part: str, package: Package) -> Table:
    """One column a function: what it takes, gives and keeps, and how often each operation occurs."""
    counts = {name: operations(function) for name, function in package.functions.items()}
    table = Table("", *package.functions, title=f"{part}: functions of {package.folder.name}", title_justify="left")
    rows = {"opset": [function.opset for function in package.functions.values()]}
    for label, kind in (("inputs", "tensor"), ("states", "state")):
        rows[label] = [
            "\n".join(f"{name} {type_}" for name, type_ in function.inputs.items() if type_.kind == kind)
            for function in package.functions.values()
        ]
    rows["outputs"] = [
        "\n".join(f"{name} {type_}" for name, type_ in function.outputs().items())
        for function in package.functions.values()
    ]
    for label, cells in rows.items():
        table.add_row(label, *cells)
    table.add_section()
    totals = sum(counts.values(), Counter[str]())
    for kind in sorted(totals, key=lambda kind: (-totals[kind], kind)):
        table.add_row(kind, *(str(count[kind]) for count in counts.values()))
    table.add_section()
    table.add_row("all operations", *(str(count.total()) for count in counts.values()))
    return table


def _weights(part: str, package: Package) -> Table:
    """Bytes by stored type, then the largest tensors."""
    found = weights(package)
    table = Table("stored as", "tensors", "bytes", title=f"{part}: weights", title_justify="left")
    for dtype, size in found.bytes.most_common():
        table.add_row(dtype, str(found.tensors[dtype]), _bytes(size))
    table.add_row("all", str(found.tensors.total()), _bytes(found.bytes.total()))
    table.add_section()
    for name, type_, size in found.largest:
        table.add_row(name, type_, _bytes(size))
    return table


def _bytes(size: int) -> str:
    power = min(3, int(math.log(max(size, 1), 1024)))
    return f"{size / 1024**power:.1f} {('B', 'KiB', 'MiB', 'GiB')[power]}" if power else f"{size} B"
