"""Builds one engine in a process of its own, so that its memory comes back and a crash of the SDK stays there.

Reads a request (JSON) from stdin; writes lines of JSON to stdout: {"progress": [done, of]}, then {"result": …} or
{"error": {"kind", "words", …}}. Everything that the SDK itself prints goes to stderr.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from vlm_export.tensorrt.shapes import position_values, shapes

_BITS = {"FLOAT": 32, "HALF": 16, "BF16": 16, "INT8": 8, "FP8": 8, "INT4": 4, "INT32": 32, "INT64": 64, "BOOL": 8}
_FLOATS = ("FLOAT", "HALF", "BF16", "INT8", "FP8", "INT4")  # whole numbers of 32 and 64 bits are places and shapes
Tell = Callable[[dict[str, Any]], None]


class RefusedError(Exception):
    """What the SDK does not take: `told` goes back as it is."""

    def __init__(self, kind: str, words: str, **told: Any) -> None:
        super().__init__(words)
        self.told = {"kind": kind, "words": words, **told}


def main() -> None:
    """Serve the one request on stdin."""
    # A descriptor of our own: what the SDK prints to stdout must not stand between our lines.
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)

    def tell(message: dict[str, Any]) -> None:
        lines.write(json.dumps(message) + "\n")

    request = json.loads(sys.stdin.read())
    try:
        name = request.get("probe") or request["sdk"]
        try:
            trt = importlib.import_module(name)
        except ImportError as error:
            raise RefusedError("load", str(error)) from error
        tell({"result": _probe(trt) if "probe" in request else _build(trt, request, tell)})
    except RefusedError as refused:
        tell({"error": refused.told})


def _probe(trt: Any) -> dict[str, Any]:
    """Version, and what it builds for without such a GPU: TensorRT-RTX's list of SM86, SM120, …"""
    names = getattr(getattr(trt, "ComputeCapability", None), "__members__", {})
    known = [f"{name[2:-1]}.{name[-1]}" for name in names if name.startswith("SM")]
    return {"version": trt.__version__, "capabilities": known}


def _build(trt: Any, request: Mapping[str, Any], tell: Tell) -> dict[str, Any]:
    began = time.perf_counter()
    log = _logger(trt)
    builder = trt.Builder(log)
    if not builder:
        raise RefusedError("build", log.words() or "no builder could be made")
    # TensorRT 10 has to be told; later ones know no other networks.
    strong = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strong is None else 1 << int(strong))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(request["graph"]):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        first = errors[0] if errors else None
        node, operator = (first.node_name(), first.node_operator()) if first else ("", "")
        words = first.desc() if first else log.words()
        raise RefusedError("parse", words, node=node, operator=operator, errors=len(errors))
    config = builder.create_builder_config()
    profile, given = _profile(builder, network, request["io"])
    if config.add_optimization_profile(profile) < 0:
        raise RefusedError("build", log.words() or "the ranges of the inputs were refused")
    if request["capabilities"]:
        config.num_compute_capabilities = len(request["capabilities"])
        for i, capability in enumerate(request["capabilities"]):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability.replace('.', '')}"), i)
    cache = Path(request["timing_cache"]) if request["timing_cache"] else None
    if cache is not None:
        config.set_timing_cache(config.create_timing_cache(cache.read_bytes() if cache.exists() else b""), False)
    if hasattr(trt, "IProgressMonitor"):
        config.progress_monitor = _monitor(trt, tell)
    facts = _facts(trt, network)
    path = Path(request["engine"])
    with path.open("wb") as file:
        if not _write(trt, builder, network, config, file):
            raise RefusedError("build", log.words() or "the builder gave no engine and no reason")
        file.flush()
        os.fsync(file.fileno())
    if cache is not None and (timed := config.get_timing_cache()) is not None:
        partial = cache.with_name(f".{cache.name}.partial")
        partial.write_bytes(memoryview(timed.serialize()))
        partial.replace(cache)
    seconds = round(time.perf_counter() - began, 2)
    return {"bytes": path.stat().st_size, "seconds": seconds, "peak_rss": _peak(), "shapes": given, **facts}


def _write(trt: Any, builder: Any, network: Any, config: Any, file: IO[bytes]) -> bool:
    """Build into the file: in pieces where the SDK can, which spares a copy of the engine in memory."""
    if not hasattr(builder, "build_serialized_network_to_stream"):
        engine = builder.build_serialized_network(network, config)
        return engine is not None and file.write(engine) > 0

    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        def write(self, data: bytes) -> int:
            return file.write(data)

    return bool(builder.build_serialized_network_to_stream(network, config, Writer()))


def _profile(builder: Any, network: Any, io: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The optimization profile, and the three shapes of each input that is not fixed."""
    profile, given = builder.create_optimization_profile(), {}
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        dimensions = tuple(tensor.shape)
        if tensor.is_shape_tensor:
            profile.set_shape_input(tensor.name, *((value,) for value in position_values(io)))
        three = shapes(tensor.name, dimensions, io)
        if three is None:
            raise RefusedError("shape", f"its input {tensor.name!r} is {list(dimensions)}, of which no range is known")
        if -1 in dimensions:
            profile.set_shape(tensor.name, *three)
            given[tensor.name.partition(".")[0]] = [list(shape) for shape in three]  # layers are alike
    return profile, given


def _facts(trt: Any, network: Any) -> dict[str, Any]:
    """What the parser made of the graph: layers by kind, and weights by type, scales and tables left out."""
    layers, constants, scales = Counter[str](), {}, set()
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        kind = str(layer.type.name)
        if kind in ("QUANTIZE", "DEQUANTIZE"):
            scales |= {layer.get_input(j).name for j in range(1, layer.num_inputs) if layer.get_input(j) is not None}
        if kind == "CONSTANT":
            tensor = layer.get_output(0)
            constants[tensor.name] = (str(tensor.dtype.name), trt.volume(tensor.shape), len(tensor.shape))
        if kind != "ATTENTION_OUTPUT":  # one attention is a pair of layers
            layers["ATTENTION" if kind == "ATTENTION_INPUT" else kind] += 1
    weights = Counter[str]()
    for name, (dtype, count, rank) in constants.items():
        if rank > 1 and name not in scales and dtype in _FLOATS:
            weights[dtype] += count
    size = sum(count * _BITS.get(dtype, 8) // 8 for dtype, count, _ in constants.values())
    return {"layers": dict(sorted(layers.items())), "weights": dict(sorted(weights.items())), "constant_bytes": size}


def _logger(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)

        def words(self) -> str:
            """The first thing that went wrong; the rest follows from it."""
            return self.errors[0] if self.errors else ""

    return Log()


def _monitor(trt: Any, tell: Tell) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Steps of the outermost phase, and of those right inside it."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.top, self.of, self.done, self.told = "", 1, 0, -1
            self.inner: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self.top, self.of, self.done = phase, max(steps, 1), 0
            elif parent == self.top:
                self.inner[phase] = max(steps, 1)

        def step_complete(self, phase: str, step: int) -> bool:
            if phase == self.top:
                self.done = step + 1
            elif phase not in self.inner:
                return True
            part = 0.0 if phase == self.top else min(1.0, (step + 1) / self.inner[phase])
            if (now := min(100, int(100 * (self.done + part) / self.of))) > self.told:
                self.told = now
                tell({"progress": [now, 100]})
            return True

        def phase_finish(self, phase: str) -> None:
            self.inner.pop(phase, None)

    return Monitor()


def _peak() -> int | None:
    """Most memory this process has had, in bytes. Not ru_maxrss, which starts with what its parent had."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), None)


if __name__ == "__main__":
    main()
