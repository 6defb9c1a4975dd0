"""Engine "tensorrt_onnx": the graphs that TensorRT is given, run by ONNX Runtime on the CPU or a CUDA device.

It says what the engines should say, on a machine where they cannot run; where they can, engine "tensorrt" is faster.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vlm_models.errors import BundleError, InputError
from vlm_runtime.engine import Floats, Options
from vlm_runtime.engines.onnx import OnnxEncoder
from vlm_runtime.manifest import Part
from vlm_runtime.onnx_session import check_installed, open_session
from vlm_runtime.stepwise import STORED, StepDecoder, store
from vlm_runtime.tensorrt_io import LanguageIO, check_graph, language_io

if TYPE_CHECKING:
    from vlm_runtime.bundle import Bundle

NAME = "tensorrt_onnx"
_TYPES = {"tensor(float)": ("fp32", 1), "tensor(float16)": ("fp16", 10), "tensor(bfloat16)": ("bf16", 16)}  # ONNX's
_INT64 = 7


def available() -> None:
    """Raises DependencyError where ONNX Runtime is not installed."""
    check_installed(NAME)


def encoder(bundle: Bundle, part: str, options: Options) -> OnnxEncoder:
    """The vision encoder or the projector of a bundle."""
    available()
    return OnnxEncoder(_session(bundle, part, options))


def decoder(bundle: Bundle, options: Options) -> TensorRTOnnxDecoder:
    """The language model of a bundle, with room for min(asked, bundle's) positions."""
    available()
    if options.kv_cache is not None or options.flash_attention is not None:
        raise InputError(
            "engine 'tensorrt_onnx' has the graph's own KV cache and attention: "
            "leave out --kv-cache and --flash-attention, or use --engine language=gguf"
        )
    io = language_io(bundle.part("language_model", NAME), bundle.spec.language)
    limit = min(bundle.manifest.max_context, io.max_context)
    return TensorRTOnnxDecoder(
        _session(bundle, "language_model", options),
        io,
        hidden_size=bundle.spec.language.hidden_size,
        vocab_size=bundle.spec.language.vocab_size,
        max_context=min(options.max_context or limit, limit),
        prefill_chunk=min(options.prefill_chunk, io.prefill_chunk),
        device=options.device,
    )


class TensorRTOnnxDecoder(StepDecoder):
    """Keys and values stay in buffers that are bound by address: one each to scatter into, two to take turns at concat.

    Buffers hold bfloat16 as uint16, which has no type in NumPy; the binding says what it is.
    """

    def __init__(
        self,
        session: Any,
        io: LanguageIO,
        *,
        hidden_size: int,
        vocab_size: int,
        max_context: int,
        prefill_chunk: int,
        device: str,
    ) -> None:
        super().__init__(hidden_size, max_context, prefill_chunk)
        self._session, self._io, self._device = session, io, device
        dtype, self._type = _check(session, io)
        self._length = max_context if io.kv == "concat" else io.max_context
        elements = io.kv_heads * self._length * io.head_dim
        turns = 2 if io.kv == "concat" else 1
        self._caches = {names: [_zeros(elements, STORED[dtype], device) for _ in range(turns)] for names in io.caches()}
        self._embeds = np.zeros((1, prefill_chunk, hidden_size), STORED[dtype])
        self._at = np.zeros(1, np.int64)
        self._logits = np.zeros((1, vocab_size), np.float32)
        self._row: Floats = self._logits[0]
        self._binding = session.io_binding()
        self._binding.bind_output("logits", "cpu", 0, 1, self._logits.shape, self._logits.ctypes.data)

    def _step(self, rows: Floats) -> Floats:
        count, binding = len(rows), self._binding
        store(self._embeds[0, :count], rows)
        self._at[0] = self.position
        shape = (1, count, self._hidden_size)
        binding.bind_input("inputs_embeds", "cpu", 0, self._type, shape, self._embeds.ctypes.data)
        binding.bind_input("position", "cpu", 0, _INT64, (1,), self._at.ctypes.data)
        before, after = self._cache_shapes(count)
        for (past, present), buffers in self._caches.items():
            binding.bind_input(past, self._device, 0, self._type, before, buffers[0].data_ptr())
            binding.bind_output(present, self._device, 0, self._type, after, buffers[-1].data_ptr())
            buffers.reverse()
        self._session.run_with_iobinding(binding)
        return self._row

    def _cache_shapes(self, rows: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        io, concat = self._io, self._io.kv == "concat"
        lengths = (self.position, self.position + rows) if concat else (self._length, self._length)
        before, after = ((1, io.kv_heads, length, io.head_dim) for length in lengths)
        return before, after

    def _forget(self, position: int) -> None:
        """A grown cache lies head after head without gaps, so the heads move together; a fixed one stays as it is."""
        if self._io.kv == "scatter":
            return
        heads, channels = self._io.kv_heads, self._io.head_dim
        for buffers in self._caches.values():
            flat = buffers[0].numpy()
            held = flat[: heads * self.position * channels].reshape(heads, self.position, channels)
            flat[: heads * position * channels] = held[:, :position].flatten()
            buffers[0].update_inplace(flat)


def _session(bundle: Bundle, part: str, options: Options) -> Any:
    held: Part = bundle.part(part, NAME)
    on_cpu = check_graph(held) if options.device == "cpu" else None
    return open_session(bundle, part, on_cpu or held.graph, options, exact=True)  # as TensorRT does


def _check(session: Any, io: LanguageIO) -> tuple[str, int]:
    """(type, ONNX number of the type) of embeddings and cache. Raises BundleError for a graph unlike its manifest."""
    inputs = {i.name: i for i in session.get_inputs()}
    outputs = {o.name for o in session.get_outputs()}
    caches = io.caches()
    wanted = {"inputs_embeds", "position", *(past for past, _ in caches)}
    if set(inputs) != wanted or outputs != {"logits", *(present for _, present in caches)}:
        raise BundleError(
            f"language_model takes {len(inputs)} inputs and gives {len(outputs)} outputs; as {io.kv!r} it takes "
            f"inputs_embeds, position and {len(caches)} of the KV cache: export the model again"
        )
    types = {value.type for name, value in inputs.items() if name != "position"}
    if len(types) != 1 or not types <= set(_TYPES):
        raise BundleError(f"language_model mixes {', '.join(sorted(types))} in its inputs: export the model again")
    length = io.max_context if io.kv == "scatter" else None
    for past, _ in caches:
        _, heads, positions, channels = inputs[past].shape
        if (heads, channels) != (io.kv_heads, io.head_dim) or (length or positions) != positions:
            raise BundleError(
                f"language_model: {past} is {inputs[past].shape}, the manifest says "
                f"{io.kv_heads} × {length or 'any'} × {io.head_dim}: export the model again"
            )
    return _TYPES[types.pop()]


def _zeros(elements: int, dtype: type[Any], device: str) -> Any:
    """An OrtValue of zeros; on the CPU in pages that the system hands out when they are first written."""
    import onnxruntime as ort

    return ort.OrtValue.ortvalue_from_numpy(np.zeros(elements, dtype), device)
