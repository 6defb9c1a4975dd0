"""llama.cpp through llama-cpp-python: imported once, of the one version whose C structs are known, and quiet.

Struct layouts change from release to release and ctypes cannot see it, so that a library of another version would
read wrong fields without a word. Everything of this project that calls llama.cpp gets it here.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import re
from collections import deque
from pathlib import Path
from typing import Any

from vlm_models.errors import BundleError, DependencyError

VERSION = "0.3.36"
"""The llama-cpp-python release whose structs this package was written against."""

_NATIVE_VERSION = "0.5.0"
_OVERRIDES = ("LLAMA_CPP_LIB_PATH", "MTMD_CPP_LIB")
_INSTALL = "pip install 'vlm-export[gguf]' (builds llama.cpp from source, minutes)"
_WARN, _ERROR, _CONTINUED = 3, 4, 5
# Fields near the start, the middle and the end of each struct: with another layout some read back wrong.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama_context_default_params": {
        "n_ctx": 512,
        "n_batch": 2048,
        "n_ubatch": 512,
        "flash_attn_type": -1,
        "type_k": 1,
        "type_v": 1,
        "offload_kqv": True,
        "no_perf": True,
        "op_offload": True,
        "swa_full": True,
        "kv_unified": False,
        "n_samplers": 0,
    },
    "llama_model_default_params": {
        "split_mode": 1,
        "main_gpu": 0,
        "vocab_only": False,
        "check_tensors": False,
        "use_extra_bufts": True,
        "no_alloc": False,
    },
    "llama_model_quantize_default_params": {
        "nthread": 0,
        "output_tensor_type": 43,
        "token_embedding_type": 43,
        "quantize_output_tensor": True,
        "pure": False,
        "dry_run": False,
        "max_buf_size": 8 << 30,
    },
}
_GENERIC = re.compile(r"failed to load model( from .*)?$|failed to decode, ret")
_messages: deque[tuple[int, str]] = deque(maxlen=200)
_callbacks: list[Any] = []  # ctypes callbacks live as long as llama.cpp may call them


def check_installed() -> None:
    """Raises DependencyError where llama-cpp-python is missing, of another version, or told to use another library."""
    if importlib.util.find_spec("llama_cpp") is None:
        raise DependencyError(f"GGUF needs llama-cpp-python {VERSION}: {_INSTALL}")
    try:
        found = importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        found = "of unknown version"
    if found != VERSION:
        raise DependencyError(
            f"llama-cpp-python {found} is installed, its C structs are known for {VERSION} only: {_INSTALL}"
        )
    for name in _OVERRIDES:
        if name in os.environ:
            raise DependencyError(
                f"{name} is set: a llama.cpp library other than the one built with llama-cpp-python {VERSION} has "
                "other structs; unset it"
            )


@functools.cache
def library() -> Any:
    """The module `llama_cpp`, initialised, its log kept for `last_messages`. Raises DependencyError."""
    check_installed()
    try:
        module: Any = importlib.import_module("llama_cpp")
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:200]
        raise DependencyError(f"llama-cpp-python {VERSION} does not load ({reason}): {_INSTALL}") from None
    _check_structs(module)
    module.llama_log_set(_listener(module), None)
    module.llama_backend_init()
    return module


@functools.cache
def multimodal() -> Any:
    """The module `llama_cpp.mtmd_cpp` (llama.cpp's own image path), quiet like `library()`. Raises DependencyError."""
    listener = _listener(library())
    try:
        module: Any = importlib.import_module("llama_cpp.mtmd_cpp")
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:200]
        raise DependencyError(f"llama-cpp-python {VERSION} has no multimodal library ({reason}): {_INSTALL}") from None
    module.mtmd_log_set(listener, None)
    module.mtmd_helper_log_set(listener, None)
    return module


def last_messages() -> list[str]:
    """The warnings and errors that llama.cpp logged since `forget_messages`, oldest first, the last 200 at most."""
    return [text for _, text in _messages]


def forget_messages() -> None:
    """Empty what `last_messages` returns; call it before the work whose messages are wanted."""
    _messages.clear()


def last_error() -> str:
    """The reason in llama.cpp's last errors, one line without the name of its function."""
    errors = [text for level, text in _messages if level == _ERROR] or last_messages()
    telling = [
        text for text in errors if not re.search(r"failed to load model( from .*)?$|failed to decode, ret", text)
    ] or errors
    reason = re.sub(r"^\w+: (?:error loading model: )?", "", telling[-1]) if telling else "it gave no reason"
    return reason if len(reason) <= 200 else f"{reason[:199]}…"


def load_model(path: Path | str, *, vocab_only: bool = False, gpu: bool = False) -> int:
    """A llama_model pointer, to be freed by `library().llama_model_free`; `gpu` places all layers on the device.

    Raises BundleError with llama.cpp's reason, or DependencyError where `gpu` is asked of a build without one.
    """
    lib = library()
    if gpu and not lib.llama_supports_gpu_offload():
        raise DependencyError(
            "this llama.cpp is built without a GPU: CMAKE_ARGS='-DGGML_CUDA=ON' pip install --no-cache-dir "
            f"--force-reinstall --no-deps llama-cpp-python=={VERSION}, or use --device cpu"
        )
    params = lib.llama_model_default_params()
    params.vocab_only, params.n_gpu_layers = vocab_only, -1 if gpu else 0
    forget_messages()
    model = lib.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise BundleError(f"{Path(path).name} cannot be opened by llama.cpp ({last_error()}): export the model again")
    return int(model)


def _listener(module: Any) -> Any:
    """The one log callback; a line may come in pieces."""
    if _callbacks:
        return _callbacks[0]
    pieces: list[str] = []
    level_of_line = 0

    def listen(level: int, text: bytes, _: Any) -> None:
        nonlocal level_of_line
        if level != _CONTINUED:
            level_of_line = level
            pieces.clear()
        pieces.append(text.decode("utf-8", "replace"))
        if pieces[-1].endswith("\n"):
            if level_of_line in (_WARN, _ERROR):
                _messages.append((level_of_line, " ".join("".join(pieces).split())))
            pieces.clear()

    _callbacks.append(module.llama_log_callback(listen))
    return _callbacks[0]


def _check_structs(module: Any) -> None:
    """Raises DependencyError unless version and defaults that llama.cpp reports are those of the known structs."""
    version = module.llama_version().decode()  # "-dev" follows where the build knew no git tag
    if version.partition("-")[0] != _NATIVE_VERSION:
        raise DependencyError(
            f"llama-cpp-python {VERSION} came with llama.cpp {version} instead of {_NATIVE_VERSION}: {_INSTALL}"
        )
    for function, expected in _DEFAULTS.items():
        params = getattr(module, function)()
        for name, value in expected.items():
            if (got := getattr(params, name)) != value:
                raise DependencyError(
                    f"llama-cpp-python {VERSION} does not fit its library ({function}().{name} is {got!r}, "
                    f"not {value!r}): {_INSTALL}"
                )


def address(pointer: Any) -> int:
    """The address in a ctypes pointer, 0 for NULL; `ctypes.cast` would leave a reference cycle at each call."""
    return ctypes.c_void_p.from_buffer(pointer).value or 0
