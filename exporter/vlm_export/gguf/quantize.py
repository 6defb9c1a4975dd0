"""GGUF types that llama.cpp's own quantizer makes, weighed by what the inputs of each layer were measured to be."""

from __future__ import annotations

import ctypes
import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vlm_export.gguf.blocks import block, ggml_type
from vlm_export.gguf.file import FileFacts, checked
from vlm_export.gguf.tensors import gguf_name
from vlm_export.target import Progress
from vlm_models.errors import CheckError, CheckpointError
from vlm_models.spec import LanguageSpec
from vlm_quant.gguf_types import GgufType
from vlm_runtime import llama
from vlm_runtime.gguf_header import read_header

_BUFFER = 1 << 28  # bytes of rows that the quantizer holds at once
_POLL = 0.2  # seconds between looks at how far the file has grown
_BLOCK, _SMALL_BLOCK = 256, 32  # weights that share scales: of the K types and iq4_xs, and of all others
# What llama.cpp (llama-quant.cpp) takes where rows are no multiple of 256, and instead of what.
_SUBSTITUTED = {"q4_0": "q2_k or q3_k", "q5_0": "q4_k", "q5_1": "q5_k", "q8_0": "q6_k", "iq4_nl": "iq4_xs"}
# Types of small blocks that a file of small blocks has of its own accord.
_MEANT = {"iq4_nl": ("iq4_nl",), "q4_0": ("q4_0", "q4_1"), "q4_1": ("q4_1",), "q5_0": ("q5_0", "q5_1")}
_MEANT |= {"q5_1": ("q5_1",), "q8_0": ("q8_0",)}


def quantize_gguf(
    source: Path,
    out: Path,
    type: GgufType,
    importance: Mapping[str, npt.NDArray[np.float32]] | None,
    spec: LanguageSpec,
    *,
    own: Mapping[str, str] | None = None,
    threads: int,
    progress: Progress,
) -> FileFacts:
    """Write `out`: the f32, f16 or bf16 GGUF `source` at `type`, by llama.cpp's quantizer.

    `importance`: mean squared inputs (columns,) by the checkpoint's canonical tensor names; None weighs all alike.
    `own`: other ggml types ("q6_k") of single tensors, which llama.cpp takes for files of a quantized type alone. The
    result is opened again and its tensors compared with those of `source`; rows that no block of the type divides are
    stored as another type, named in the facts. Raises CheckError with llama.cpp's reason where it fails, and leaves no
    file behind then.
    """
    shapes = {name: tensor.shape[::-1] for name, tensor in read_header(source).tensors.items()}
    named = _by_gguf_name(importance or {}, spec, shapes)
    weighed = {name: vector for name, vector in named.items() if type.direct or not _rounded(type, vector.size)}
    try:
        _run(source, out, type, weighed, own or {}, threads, progress)
        types = checked(out, shapes)
        fallbacks = _fallbacks(shapes, types, type)
        for name, kind in (own or {}).items():
            fallbacks.pop(name, None)
            if types[name] != kind:
                fallbacks[name] = _other(name, types[name], kind, shapes[name][-1])
    except BaseException:
        out.unlink(missing_ok=True)
        raise
    return FileFacts(types, fallbacks)


def _by_gguf_name(
    importance: Mapping[str, npt.NDArray[np.float32]], spec: LanguageSpec, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, npt.NDArray[np.float32]]:
    """Raises CheckpointError for a vector that does not fit its matrix: it was measured on another model."""
    named = {}
    for source, vector in importance.items():
        name = gguf_name(source, spec)
        if name not in shapes or shapes[name][-1:] != vector.shape:
            raise CheckpointError(
                f"the importance of {source!r}, {vector.shape}, is of another model: measure it again"
            )
        named[name] = np.ascontiguousarray(vector, np.float32)
    return named


def _rounded(type: GgufType, columns: int) -> bool:
    """Whether such rows become a type that is plainly rounded without importance, a substitute for one of 256.

    Weighing makes llama.cpp search their scales, which come out too small on average: the errors shrink, but so do all
    logits' differences. Measured on the demo, q5_0 that way doubles the KL of answers, where iq4_nl's halves.
    """
    return bool(columns % _BLOCK) and type.name not in ("iq4_nl", "iq4_xs")


def _run(
    source: Path,
    out: Path,
    type: GgufType,
    importance: Mapping[str, npt.NDArray[np.float32]],
    own: Mapping[str, str],
    threads: int,
    progress: Progress,
) -> None:
    """llama_model_quantize in a thread of its own, so that its progress can be watched and a user can interrupt it."""
    library = llama.library()
    params = library.llama_model_quantize_default_params()
    params.nthread, params.ftype, params.max_buf_size = threads, type.file_type, _BUFFER
    entries = (library.llama_model_imatrix_data * (len(importance) + 1))()  # the last one, all zeros, ends the list
    for entry, (name, vector) in zip(entries, importance.items(), strict=False):
        entry.name, entry.size = name.encode(), vector.size
        entry.data = vector.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if importance:
        params.imatrix = ctypes.cast(entries, ctypes.POINTER(library.llama_model_imatrix_data))
    overrides = (library.llama_model_tensor_override * (len(own) + 1))()  # it, too, ends with zeros
    for override, (name, kind) in zip(overrides, own.items(), strict=False):
        override.pattern, override.type = f"^{re.escape(name)}$".encode(), int(ggml_type(kind))
    if own:
        params.tt_overrides = ctypes.cast(overrides, ctypes.POINTER(library.llama_model_tensor_override))
    codes: list[int] = []

    def work() -> None:
        arguments = os.fsencode(source), os.fsencode(out), ctypes.byref(params)
        codes.append(int(library.llama_model_quantize(*arguments)))

    llama.forget_messages()
    total = max(int(source.stat().st_size * type.bits / 16), 1)  # of an f16 source; else a guess
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_POLL)
        written = out.stat().st_size if out.exists() else 0
        progress("quantize", min(written, total - 1), total)
    if codes != [0]:
        raise CheckError(
            f"llama.cpp cannot quantize {source.name} to {type.name} ({llama.last_error()}): "
            "free some disk and memory, or choose another precision"
        )
    progress("quantize", total, total)


def _other(name: str, kind: str, asked: str, columns: int) -> str:
    """Why a tensor is not of its own type. Raises CheckError where its rows are no reason."""
    if columns % block(asked)[0]:
        return f"{kind} instead of {asked}: rows of {columns} weights are no multiple of blocks of {block(asked)[0]}"
    raise CheckError(f"llama.cpp made {name} {kind} instead of {asked}: choose another precision for it")


def _fallbacks(shapes: Mapping[str, tuple[int, ...]], types: Mapping[str, str], type: GgufType) -> dict[str, str]:
    """Why matrices did not get what llama.cpp meant for them: their rows are no multiple of its blocks."""
    reasons = {}
    for name, shape in shapes.items():
        kind, columns = types[name], shape[-1]
        if len(shape) < 2 or not columns % _BLOCK or kind in _MEANT.get(type.name, ()):
            continue
        if columns % _SMALL_BLOCK:
            reasons[name] = f"{kind}: rows of {columns} weights are no multiple of any type's blocks"
        elif kind in _SUBSTITUTED:
            meant = _SUBSTITUTED[kind]
            reasons[name] = (
                f"{kind} instead of {meant}: rows of {columns} weights are no multiple of blocks of {_BLOCK}"
            )
    return reasons
