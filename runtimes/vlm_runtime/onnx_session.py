"""ONNX Runtime sessions for the parts of a bundle, on the CPU or on a CUDA device where asked."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from vlm_models.errors import BundleError, DependencyError
from vlm_runtime.engine import Options, physical_cpus, thread_count

if TYPE_CHECKING:
    from vlm_runtime.bundle import Bundle

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def check_installed(engine: str) -> None:
    """Raises DependencyError, naming the extra, where ONNX Runtime is not installed."""
    if importlib.util.find_spec("onnxruntime") is None:
        raise DependencyError(f"engine {engine!r} needs onnxruntime: pip install 'vlm-export[cpu]'")


def open_session(bundle: Bundle, part: str, graph: str, options: Options, *, exact: bool = False) -> Any:
    """A session for the file `graph`, checked to be `part` of this bundle's model.

    `exact` multiplies dequantized weights with x as it is, where ONNX Runtime would round x to 8 bits for speed.
    Raises BundleError, or DependencyError where ONNX Runtime cannot use the device.
    """
    import onnxruntime as ort

    provider, path = PROVIDERS[options.device], bundle.path(graph)
    if provider not in ort.get_available_providers():
        raise DependencyError(_no_device(options.device, "this onnxruntime is built without it"))
    settings = ort.SessionOptions()
    settings.log_severity_level = 4
    threads, cpus = thread_count(options), physical_cpus()
    settings.intra_op_num_threads, settings.inter_op_num_threads = threads, 1
    if 1 < threads == len(cpus):  # all cores are ours: workers that stay on theirs decode about 10 % faster
        workers = ";".join(str(cpu + 1) for cpu in cpus[1:])  # counted from 1; the calling thread is none of them
        settings.add_session_config_entry("session.intra_op_thread_affinities", workers)
    if exact:
        settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if part != "language_model":  # it runs once, then its threads must not spin against the decoder's
        settings.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        session = ort.InferenceSession(path, settings, providers=list(dict.fromkeys([provider, PROVIDERS["cpu"]])))
    except Exception as error:  # ONNX Runtime's errors have no common base but this
        reason = str(error).splitlines()[0][:200]
        raise BundleError(f"{path.name} cannot be opened by ONNX Runtime ({reason}): export the model again") from None
    if session.get_providers()[0] != provider:  # ONNX Runtime falls back to the CPU without a word
        raise DependencyError(_no_device(options.device, "its libraries or driver did not load"))
    written = session.get_modelmeta().custom_metadata_map
    if written.get("vlm.part") != part or written.get("vlm.fingerprint") != bundle.spec.fingerprint:
        raise BundleError(f"{path.name} is a part of another model: it is not the {part} of {bundle.spec.name}")
    return session


def _no_device(device: str, reason: str) -> str:
    return f"ONNX Runtime cannot use device {device!r} ({reason}): pip install 'vlm-export[gpu]', or use --device cpu"
