"""Importing the runtime costs little and brings no framework with it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "onnxruntime", "onnx", "PIL", "numpy", "tokenizers", "typer", "llama_cpp")
PROBE = """
import json, sys, time
before, start = set(sys.modules), time.process_time()
{code}
spent = time.process_time() - start
print(json.dumps([spent, sorted(m for m in sys.modules if m not in before)]))
"""


def probe(code: str) -> tuple[float, set[str]]:
    """CPU seconds that `code` takes in a fresh Python, and the modules it loads."""
    done = subprocess.run([sys.executable, "-c", PROBE.format(code=code)], capture_output=True, text=True, check=True)
    spent, modules = json.loads(done.stdout)
    return spent, set(modules)


def test_importing_the_runtime_loads_nothing_heavy_and_is_quick() -> None:
    measured = [probe("import vlm_runtime") for _ in range(3)]
    assert not measured[0][1] & set(HEAVY)
    assert min(spent for spent, _ in measured) < 0.3


@pytest.mark.parametrize(
    "module",
    [
        *("vlm", "chat", "answer", "cli", "engine", "text", "sampling", "mil.explain"),
        *(
            "engines.onnx",
            "engines.gguf",
            "engines.mil",
            "engines.coreml",
            "engines.coreai",
            "engines.tensorrt",
            "engines.tensorrt_onnx",
        ),
    ],
)
def test_no_module_of_the_runtime_loads_a_framework_or_an_sdk(module: str) -> None:
    loaded = probe(f"import vlm_runtime.{module}")[1]
    assert not loaded & {
        "torch",
        "transformers",
        "onnxruntime",
        "onnx",
        "llama_cpp",
        "tensorrt",
        "coremltools",
        "coreai",
    }
    assert not any(name.startswith(("vlm_export", "vlm_quant", "vlm_bench")) for name in loaded)


def test_the_public_names_are_there_when_used() -> None:
    import vlm_runtime

    assert set(vlm_runtime.__all__) <= set(dir(vlm_runtime))
    assert vlm_runtime.load.__module__ == "vlm_runtime.vlm"
    assert vlm_runtime.Answer.__module__ == "vlm_runtime.answer"
    assert vlm_runtime.errors.BundleError.exit_code == 2
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = vlm_runtime.nothing
