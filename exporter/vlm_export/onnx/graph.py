"""A streaming ONNX writer: weights go straight into one external data file, the graph holds only names and offsets."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, ValueInfoProto, helper

OPSET = 23
_IR_VERSION = {21: 10, 23: 11, 24: 12}  # opset → the format's version that came with it
MICROSOFT = "com.microsoft"
_INLINE = 256  # bytes up to which a tensor stays in the graph, where shape inference can read it
_PAGE = 4096


@dataclass(frozen=True)
class Region:
    """Room for one (rows, …) tensor in the data file; filled in any order, from any thread."""

    file: int
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def write(self, start: int, rows: NDArray[Any]) -> None:
        """Rows start… of the tensor."""
        assert (rows.dtype, rows.shape[1:]) == (self.dtype, self.shape[1:]), (rows.shape, self.shape)
        _write(self.file, np.ascontiguousarray(rows), self.offset + start * self.size // self.shape[0])

    def write_columns(self, start: int, columns: NDArray[Any]) -> None:
        """Columns start… of a matrix; `columns` is (rows, count)."""
        assert (columns.dtype, len(columns)) == (self.dtype, self.shape[0]), (columns.shape, self.shape)
        for row, values in enumerate(np.ascontiguousarray(columns)):
            _write(self.file, values, self.offset + (row * self.shape[1] + start) * self.dtype.itemsize)


def _write(file: int, array: NDArray[Any], offset: int) -> None:
    data = memoryview(cast(Any, array.reshape(-1).view(np.uint8)))
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


class Graph:
    """One graph under construction at `path` with its weights in `path` + ".data".

    Use as a context manager and call `save` last; nodes must be added in an order in which they can run.
    """

    def __init__(self, path: Path, name: str, opset: int = OPSET) -> None:
        self.opset = opset
        self.path, self.data_path, self.name = path, path.with_name(path.name + ".data"), name
        self.nodes: list[NodeProto] = []
        self._inputs: list[ValueInfoProto] = []
        self._outputs: list[ValueInfoProto] = []
        self._tensors: dict[str, TensorProto] = {}
        self._file = os.open(self.data_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self.size = 0

    def __enter__(self) -> Graph:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)

    def input(self, name: str, dtype: int, shape: Sequence[int | str]) -> str:
        """Declare a graph input; a text in `shape` names a dynamic dimension."""
        self._inputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))
        return name

    def output(self, name: str, dtype: int, shape: Sequence[int | str]) -> None:
        """Declare a graph output."""
        self._outputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))

    def node(
        self,
        op: str,
        inputs: Sequence[str],
        outputs: str | Sequence[str],
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """Add a node, named after its first output, which is returned; an absent input or output is an empty name."""
        names = [outputs] if isinstance(outputs, str) else list(outputs)
        used = list(inputs)
        while used and not used[-1]:
            used.pop()
        self.nodes.append(helper.make_node(op, used, names, f"{names[0]}.{op}", domain=domain, **attributes))
        return names[0]

    def tensor(self, name: str, array: NDArray[Any]) -> str:
        """A constant, written now; the same name is written once."""
        if name in self._tensors:
            return name
        if array.nbytes <= _INLINE:
            self._tensors[name] = onnx.numpy_helper.from_array(np.ascontiguousarray(array), name)
        else:
            self.reserve(name, array.shape, array.dtype).write(0, array)
        return name

    def reserve(self, name: str, shape: Sequence[int], dtype: Any, *, int4: bool = False) -> Region:
        """Room for a constant of the given shape, to be filled before `save`.

        With `int4` two values lie in each byte of the last axis, the first in the low nibble: the region takes bytes.
        """
        assert name not in self._tensors, name
        size, align = math.prod(shape) * np.dtype(dtype).itemsize, 64
        if size >= _PAGE:  # large tensors start on a page, where ONNX Runtime can map them
            align = _PAGE
        region = Region(self._file, -(-self.size // align) * align, tuple(shape), np.dtype(dtype))
        self.size = region.offset + region.size
        proto = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(region.dtype), dims=list(shape))
        if int4:
            proto.data_type, proto.dims[-1] = TensorProto.INT4, 2 * shape[-1]
        proto.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self.data_path.name), ("offset", region.offset), ("length", region.size)):
            proto.external_data.add(key=key, value=str(value))
        self._tensors[name] = proto
        return region

    def save(self, metadata: Mapping[str, str]) -> None:
        """Write the graph with its metadata properties and check it; the data file is complete by now."""
        os.ftruncate(self._file, self.size)
        os.fsync(self._file)
        graph = helper.make_graph(self.nodes, self.name, self._inputs, self._outputs, list(self._tensors.values()))
        domains = {MICROSOFT: 1, "": self.opset} if any(n.domain == MICROSOFT for n in self.nodes) else {"": self.opset}
        opsets = [helper.make_opsetid(domain, version) for domain, version in domains.items()]
        version = _IR_VERSION[self.opset]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=version, producer_name="vlm-export")
        helper.set_model_props(model, dict(metadata))
        onnx.save(model, self.path)
        onnx.checker.check_model(self.path)
