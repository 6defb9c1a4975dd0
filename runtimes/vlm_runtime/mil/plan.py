"""When each value of a block is last read: what to forget, and which cache may be written where it lies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from vlm_runtime.mil.program import Block, Operation

# Operations whose result is always new memory; of every other one it is taken to share memory with all that it read.
_NEW = frozenset(("add", "concat", "conv", "gather", "linear", "matmul", "mul", "softmax", "sub"))
_WRITES = frozenset(("write_state", "coreml_update_state"))
_READS = _WRITES | {"read_state"}


@dataclass(frozen=True)
class Step:
    """An operation, the names that nobody reads after it, and whether its slice_update may write into its input."""

    op: Operation
    forget: tuple[str, ...]
    in_place: bool = False


def plan(block: Block, constants: Iterable[str], *, nested: bool = False) -> tuple[Step, ...]:
    """The steps of a block in order, those that give `constants` left out.

    A cache of many layers is updated layer by layer; copying all of it each time would cost more than the arithmetic.
    """
    fixed = set(constants)
    ops = [op for op in block.operations if not any(name in fixed for name, _ in op.outputs)]
    last = _last_reads(ops, block)
    memory = _Memory(ops, last)
    steps = []
    for i, op in enumerate(ops):
        in_place = not nested and memory.follow(i, op)
        own = [name for name, _ in op.outputs]
        forget = {name for name in (*_reads(op), *own) if last.get(name, i) <= i and name not in fixed}
        steps.append(Step(op, tuple(sorted(forget)) if not nested else (), in_place))
    return tuple(steps)


def _last_reads(ops: list[Operation], block: Block) -> dict[str, int]:
    last = {name: i for i, op in enumerate(ops) for name in _reads(op)}
    return last | dict.fromkeys(block.outputs, len(ops))


def _reads(op: Operation) -> Iterable[str]:
    """The names that an operation and its blocks read."""
    yield from op.names()
    for block in op.blocks:
        for inner in block.operations:
            yield from _reads(inner)
        yield from block.outputs


@dataclass
class _Memory:
    """Which names may share memory: `of[name]` are the places it may lie in, "state:" and "new:" ones our own."""

    ops: list[Operation]
    last: Mapping[str, int]
    of: dict[str, frozenset[str]] = field(default_factory=dict)

    def follow(self, i: int, op: Operation) -> bool:
        """Note where the results of operation `i` lie; whether it is a slice_update that may write in place."""
        in_place = op.type == "slice_update" and self._alone(i, op)
        if op.type in _READS:
            places = frozenset(f"state:{name}" for name in op.names() if f"state:{name}")
        elif op.type in _NEW or (op.type == "slice_update" and not in_place):
            places = frozenset((f"new:{i}",))
        else:
            read = [name for name in _reads(op) if op.type != "slice_update" or name in op.inputs["x"]]
            places = frozenset().union(*(self._places(name) for name in read)) or frozenset((f"new:{i}",))
        for name, _ in op.outputs:
            self.of[name] = places
        return in_place

    def _places(self, name: str) -> frozenset[str]:
        return self.of.get(name, frozenset((f"given:{name}",)))

    def _alone(self, i: int, op: Operation) -> bool:
        """Whether nobody reads after `i` what slice_update would overwrite."""
        source = op.inputs.get("x", ("",))[0]
        if not isinstance(source, str):
            return False
        places = self._places(source)
        if any(place.startswith("given:") for place in places):
            return False
        if any(self.last.get(name, -1) > i for name, where in self.of.items() if where & places):
            return False
        states = {place.removeprefix("state:") for place in places if place.startswith("state:")}
        return all(self._written_back(i, op.name, state) for state in states)

    def _written_back(self, i: int, result: str, state: str) -> bool:
        """Whether the next that happens to `state` is that the result is written to it."""
        for op in self.ops[i + 1 :]:
            if op.blocks:
                return False
            if op.type in _READS and state in op.names():
                return op.type in _WRITES and result in op.names()
        return False
