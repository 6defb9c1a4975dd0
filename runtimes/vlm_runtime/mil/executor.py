"""The executor: runs the functions of an opened package with NumPy, op by op, in the precision that is declared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm_models.errors import BundleError
from vlm_runtime.mil.constants import Constants, call
from vlm_runtime.mil.package import Package
from vlm_runtime.mil.plan import Step, plan
from vlm_runtime.mil.program import Block, Function, Operation
from vlm_runtime.mil.values import NUMPY, Array, TensorType, Value
from vlm_runtime.mil.wire import Unsound

Observer = Callable[[str, str, Array], None]
"""Called with the operation's type ("input" for what the function is given), the value's name and the value."""

State = dict[str, Array]


@dataclass(frozen=True)
class Overflow:
    """A float16 result that lost numbers: `largest` of those computed (not a number: there were none before it)."""

    name: str
    op: str
    largest: float


@dataclass(frozen=True)
class Outcome:
    """Outputs by name (floats as float32) and the operations that overflowed, in order."""

    outputs: Mapping[str, Array]
    overflows: tuple[Overflow, ...]


class Executor:
    """Functions of one package, sharing their decoded weights.

    `exact` leaves out the rounding to float16: what the same program gives in float32.
    """

    def __init__(self, package: Package, *, exact: bool = False) -> None:
        self.package, self._exact = package, exact
        self._constants = Constants(package)
        self._prepared: dict[str, _Prepared] = {}

    def new_state(self, function: str | None = None) -> State:
        """Zeros for each state of a function; other functions of the package may share it."""
        described = self.package.descriptions[self._name(function)].states
        dtype = np.float32 if self._exact else np.float16
        return {name: np.zeros(feature.shape, dtype) for name, feature in described.items()}

    def run(
        self,
        feeds: Mapping[str, Array],
        state: State | None = None,
        *,
        function: str | None = None,
        observer: Observer | None = None,
    ) -> Outcome:
        """Run a function (None: the default one). `state` is changed; `feeds` are not.

        Raises BundleError for feeds that are not the function's inputs and for a program that cannot be run.
        """
        name = self._name(function)
        if name not in self._prepared:
            self._prepared[name] = _Prepared(self.package.functions[name], self._constants)
        prepared = self._prepared[name]
        run = _Run(self, prepared, state if state is not None else {}, observer)
        with np.errstate(all="ignore"):
            return run.all(feeds)

    def _name(self, function: str | None) -> str:
        name = self.package.default if function is None else function
        if name not in self.package.functions:
            raise BundleError(
                f"{self.package.folder} has no function {name!r}; it has {', '.join(self.package.functions)}"
            )
        return name


class _Prepared:
    """A function with its constants decoded and its steps planned."""

    def __init__(self, function: Function, constants: Constants) -> None:
        self.function = function
        self.constants = constants.of(function)
        self._plans: dict[int, tuple[Step, ...]] = {id(function.block): plan(function.block, self.constants)}

    def steps(self, block: Block) -> tuple[Step, ...]:
        if id(block) not in self._plans:
            self._plans[id(block)] = plan(block, self.constants, nested=True)
        return self._plans[id(block)]


class _Run:
    """One run of a function."""

    def __init__(self, executor: Executor, prepared: _Prepared, state: State, observer: Observer | None) -> None:
        self._executor, self._prepared, self._state, self._observer = executor, prepared, state, observer
        self._values: dict[str, Array] = {}
        self._overflows: list[Overflow] = []

    def all(self, feeds: Mapping[str, Array]) -> Outcome:
        function = self._prepared.function
        try:
            self._take(function, feeds)
        except Unsound as error:
            raise BundleError(f"{self._executor.package.folder}: {error}: give {function.name!r} that") from None
        self._block(function.block)
        outputs = {name: self._value(name) for name in function.block.outputs}
        return Outcome(
            {name: _float32(value) for name, value in outputs.items()},
            tuple(self._overflows),
        )

    def _take(self, function: Function, feeds: Mapping[str, Array]) -> None:
        tensors = {name: type_ for name, type_ in function.inputs.items() if type_.kind == "tensor"}
        states = {name for name, type_ in function.inputs.items() if type_.kind == "state"}
        if set(feeds) != set(tensors) or not states <= set(self._state):
            raise BundleError(
                f"{self._executor.package.folder}: {function.name!r} takes {_listed(tensors)} and states "
                f"{_listed(sorted(states))}; it was given {_listed(feeds)} and {_listed(self._state)}"
            )
        for name, type_ in tensors.items():
            given = Operation("input", {}, ((name, type_),))
            self._keep(given, name, type_, np.asarray(feeds[name]))
        for name in states:
            _check_shape(given_state := self._state[name], function.inputs[name], name)
            if given_state.dtype not in (np.float16, np.float32):
                raise BundleError(f"state {name!r} is {given_state.dtype}: make it with new_state()")

    def _block(self, block: Block) -> None:
        for step in self._prepared.steps(block):
            try:
                self._step(step)
            except Unsound as error:
                self._refuse(step.op, str(error))
            except (ValueError, IndexError, TypeError, KeyError, ArithmeticError, MemoryError, AttributeError) as error:
                self._refuse(step.op, f"{type(error).__name__}: {error}")
            for name in step.forget:
                self._values.pop(name, None)

    def _refuse(self, op: Operation, reason: str) -> None:
        line = " ".join(reason.split())[:200]
        folder = self._executor.package.folder
        raise BundleError(
            f"{folder}: {op.type} {op.name[:80]!r} cannot be run ({line}): export the model again"
        ) from None

    def _step(self, step: Step) -> None:
        op = step.op
        if op.type in ("read_state", "write_state", "coreml_update_state"):
            results: Sequence[Array] = self._stateful(op)
        elif op.type == "cond":
            chosen = op.blocks[0 if bool(self._argument(op.inputs["pred"])) else 1]
            self._block(chosen)
            results = [self._value(name) for name in chosen.outputs]
        else:
            inputs: dict[str, Any] = {
                name: [self._one(a) for a in arguments] if name == "values" else self._argument(arguments)
                for name, arguments in op.inputs.items()
            }
            if step.in_place:
                inputs["in_place"] = True
            results = call(op, inputs)
        if len(results) != len(op.outputs):
            raise Unsound(f"{len(op.outputs)} results are declared, {len(results)} come out")
        for (name, type_), value in zip(op.outputs, results, strict=True):
            self._keep(op, name, type_, value)

    def _stateful(self, op: Operation) -> list[Array]:
        named = op.inputs["state" if op.type == "coreml_update_state" else "input"][0]
        if not isinstance(named, str) or named not in self._state:
            raise Unsound("it names no state")
        if op.type != "read_state":
            value = self._argument(op.inputs["value" if op.type == "coreml_update_state" else "data"])
            held = self._state[named]
            if value.shape != held.shape:
                raise Unsound(f"{value.shape} is written to a state of {held.shape}")
            if value is not held:  # else slice_update has written in place
                self._state[named] = value.astype(held.dtype)
        return [] if op.type == "write_state" else [self._state[named]]

    def _argument(self, arguments: tuple[str | Value, ...]) -> Any:
        if len(arguments) != 1:
            raise Unsound(f"{len(arguments)} values where one belongs")
        return self._one(arguments[0])

    def _one(self, argument: str | Value) -> Any:
        return self._value(argument) if isinstance(argument, str) else self._executor.package.constant(argument)

    def _value(self, name: str) -> Any:
        value = self._values.get(name)
        return self._prepared.constants[name] if value is None else value

    def _keep(self, op: Operation, name: str, type_: TensorType, value: Array) -> None:
        """Hold a result as its declared type says."""
        if type_.kind == "tensor":
            value = self._declared(op, name, type_, np.asarray(value))
            _check_shape(value, type_, name)
        self._values[name] = value
        if self._observer is not None:
            self._observer(op.type, name, value)

    def _declared(self, op: Operation, name: str, type_: TensorType, value: Array) -> Array:
        if type_.dtype == "fp16":
            if value.dtype == np.float16 or self._executor._exact:
                return value if value.dtype.kind == "f" else value.astype(np.float32)
            half = value.astype(np.float16)
            if not np.isfinite(half).all():
                self._report(op, name, value, half)
            return half.astype(np.float32)
        if type_.dtype not in NUMPY:
            raise Unsound(f"a result of type {type_.dtype}")
        return value.astype(NUMPY[type_.dtype], copy=False)

    def _report(self, op: Operation, name: str, value: Array, half: Array) -> None:
        """Numbers beyond float16 that were finite, or the first that are none; infinities of a mask are meant."""
        lost = np.isinf(half) & np.isfinite(value)
        if lost.any():
            self._overflows.append(Overflow(name, op.type, float(np.abs(value[lost]).max())))
        elif np.isnan(half).any() and not any(np.isnan(one.largest) for one in self._overflows):
            self._overflows.append(Overflow(name, op.type, float("nan")))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _check_shape(value: Array, type_: TensorType, name: str) -> None:
    declared = type_.shape
    if declared is not None and (
        len(declared) != value.ndim or any(n not in (None, m) for n, m in zip(declared, value.shape, strict=True))
    ):
        raise Unsound(f"{name!r} is declared as {type_}, it is {value.shape}")


def _float32(value: Any) -> Any:
    return value.astype(np.float32) if isinstance(value, np.ndarray) and value.dtype == np.float16 else value
