"""Asking the worker, a Python process of its own, and turning what it says into errors of ours."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import IO, Any

from vlm_export.target import Progress, silent
from vlm_models.errors import CheckError, DependencyError

_KILLED = -9  # SIGKILL, which Windows does not name
# -P: the folder that the user is in may well hold one called "tensorrt".
COMMAND = (sys.executable, "-P", "-m", "vlm_export.tensorrt.worker")


def ask(request: Mapping[str, Any], *, stage: str = "", who: str = "", progress: Progress = silent) -> dict[str, Any]:
    """The worker's result. `who` names SDK, part and devices in errors, `stage` the work in `progress`.

    Raises DependencyError for an SDK that does not load, CheckError for a graph that it refuses and for a crash.
    """
    answer: dict[str, Any] = {}
    with tempfile.TemporaryFile() as noise:
        process = subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=noise)
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request).encode())
            process.stdin.close()
            for line in process.stdout:
                message = json.loads(line)
                if "progress" in message:
                    progress(stage, *message["progress"])
                else:
                    answer = message
            code = process.wait()
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
        if "result" in answer and code == 0:
            return dict(answer["result"])
        if "error" in answer:
            raise _error(answer["error"], str(request.get("probe") or request["sdk"]), who)
        raise CheckError(_crash(code, who or f"loading {request.get('probe')}", _last_line(noise)))


def _error(told: Mapping[str, Any], sdk: str, who: str) -> CheckError | DependencyError:
    words = tidy(str(told["words"]))
    if told["kind"] == "load":
        return DependencyError(f"{sdk} is installed but does not load: {words}")
    if told["kind"] == "parse":
        node = f"node {told['node']!r} ({told['operator']})" if told["operator"] else "the graph"
        more = f" (and {told['errors'] - 1} more)" if told["errors"] > 1 else ""
        return CheckError(f"{who}: refused {node}: {words!r}{more}; {_try(told['operator'])}")
    if told["kind"] == "shape":
        return CheckError(f"{who}: {words}; export the model again")
    return CheckError(f"{who}: the builder says {words!r}; try another --precision or --device-profile")


def _try(operator: str) -> str:
    if operator == "TensorScatter":
        return "try --tensorrt-kv concat, or a newer TensorRT"
    if operator in ("QuantizeLinear", "DequantizeLinear"):
        return "try another --precision (int8, fp16), or a newer TensorRT"
    return "try a newer TensorRT, or --target onnx"


def _crash(code: int, who: str, last: str) -> str:
    if code == _KILLED:
        return f"{who}: the builder was killed, as systems do when memory runs out: close other programs or add swap"
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return f"{who}: the builder crashed ({how}){f', its last words: {last!r}' if last else ''}"


def tidy(words: str, limit: int = 300) -> str:
    """The SDK's words on one line, without the places in its sources."""
    line = " ".join(re.sub(r" In \w+ at \S+", "", words).split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def _last_line(file: IO[bytes]) -> str:
    file.seek(0)
    lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return tidy(lines[-1]) if lines else ""
