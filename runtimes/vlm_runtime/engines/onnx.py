"""Engine "onnx": ONNX Runtime on the CPU, or on a CUDA device where asked."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm_models.errors import BundleError, InputError, PromptError
from vlm_runtime.engine import Floats, Options
from vlm_runtime.onnx_session import PROVIDERS, check_installed, open_session

if TYPE_CHECKING:
    from vlm_runtime.bundle import Bundle

NAME = "onnx"
_PREFILL_ROWS = 192  # at once on the CPU: attention computes a whole rectangle, half of it in vain for long blocks


def available() -> None:
    """Raises DependencyError where ONNX Runtime is not installed."""
    check_installed(NAME)


def encoder(bundle: Bundle, part: str, options: Options) -> OnnxEncoder:
    """The vision encoder or the projector of a bundle."""
    return OnnxEncoder(_session(bundle, part, options))


def decoder(bundle: Bundle, options: Options) -> OnnxDecoder:
    """The language model of a bundle, with room for min(asked, bundle's) positions."""
    if options.kv_cache not in (None, "f32") or options.flash_attention is not None:
        raise InputError(
            "engine 'onnx' has an f32 KV cache and no choice of attention: leave out --kv-cache and --flash-attention, "
            "or use --engine language=gguf"
        )
    language = bundle.spec.language
    return OnnxDecoder(
        _session(bundle, "language_model", options),
        hidden_size=language.hidden_size,
        vocab_size=language.vocab_size,
        cache=(language.layers, language.kv_heads, language.head_dim),
        max_context=min(options.max_context or bundle.manifest.max_context, bundle.manifest.max_context),
        prefill_chunk=options.prefill_chunk,
    )


class OnnxEncoder:
    """A graph of one input and one output."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._input, self._output = session.get_inputs()[0].name, session.get_outputs()[0].name

    def run(self, x: Floats) -> Floats:
        """(N, …) → (N, rows, channels)."""
        (y,) = self._session.run([self._output], {self._input: np.ascontiguousarray(x, np.float32)})
        return np.asarray(y, np.float32)


class OnnxDecoder:
    """The fused decoder graph: keys and values are written in place, into buffers bound as both past and present.

    On the CPU all bound values are NumPy arrays that ONNX Runtime reads and writes where they lie, so that one decode
    step binds nothing. Pages of the cache that were never reached cost no memory.
    """

    def __init__(
        self,
        session: Any,
        *,
        hidden_size: int,
        vocab_size: int,
        cache: tuple[int, int, int],
        max_context: int,
        prefill_chunk: int,
    ) -> None:
        self.max_context, self.position = max_context, 0
        self._session, self._chunk, self._cache = session, prefill_chunk, cache
        # On a device ONNX Runtime copies inputs when they are bound, so there each step binds them anew.
        self._aliased = session.get_providers()[0] == PROVIDERS["cpu"]
        if self._aliased:
            self._chunk = min(self._chunk, _PREFILL_ROWS)
        self._embed = _aligned((1, 1, hidden_size))
        self._logits = _aligned((1, 1, vocab_size))
        self._row: Floats = self._embed[0, 0]
        self._last: Floats = self._logits[0, 0]
        self._seqlens_k = np.zeros(1, np.int32)
        self._total = np.zeros((), np.int32)
        takes = [one.name for one in session.get_inputs()]
        self._block = np.zeros((), np.bool_) if "block" in takes else None
        self._keys_and_values = _cache(session, cache, max_context)
        self._prefill, self._decode = self._binding(), self._binding()
        self._decode.bind_ortvalue_input("inputs_embeds", _value(self._embed))

    def another(self) -> OnnxDecoder:
        """An empty KV cache of its own over the same session."""
        return OnnxDecoder(
            self._session,
            hidden_size=self._embed.shape[2],
            vocab_size=self._logits.shape[2],
            cache=self._cache,
            max_context=self.max_context,
            prefill_chunk=self._chunk,
        )

    def prefill(self, embeds: Floats) -> Floats:
        """Append rows (S, H) in chunks of one length, as far as that goes; the logits (V,) after the last one."""
        if embeds.ndim != 2 or embeds.shape[0] == 0 or embeds.shape[1] != self._embed.shape[2]:
            raise ValueError(f"prefill takes (S, {self._embed.shape[2]}) with S > 0, got {embeds.shape}")
        self._check_room(embeds.shape[0])
        embeds = np.ascontiguousarray(embeds, np.float32)
        chunk = math.ceil(len(embeds) / math.ceil(len(embeds) / self._chunk))
        for start in range(0, len(embeds), chunk):
            rows = embeds[start : start + chunk]
            self._prefill.bind_ortvalue_input("inputs_embeds", _value(rows[None]))
            self._run(self._prefill, rows.shape[0])
        return self._last

    def prefill_block(self, embeds: Floats) -> Floats:
        """Append rows (S, H) which see each other, in one piece; the logits (V,) after the last one."""
        if self._block is None:
            raise BundleError("language_model lets no row see those after it: export the model again")
        chunk, self._chunk = self._chunk, len(embeds)
        self._block[...] = True
        try:
            return self.prefill(embeds)
        finally:
            self._chunk = chunk
            self._block[...] = False

    def decode(self, embed: Floats) -> Floats:
        """Append one row (H,); its logits (V,)."""
        if self.position >= self.max_context:
            self._check_room(1)
        self._row[...] = embed
        if not self._aliased:
            self._decode.bind_ortvalue_input("inputs_embeds", _value(self._embed))
        self._run(self._decode, 1)
        return self._last

    def rewind(self, position: int) -> None:
        """Forget all rows from `position` on."""
        if not 0 <= position <= self.position:
            raise ValueError(f"cannot rewind to {position}: {self.position} rows are in the cache")
        self.position = position

    def _run(self, binding: Any, rows: int) -> None:
        self._seqlens_k[0] = self.position + rows - 1
        self._total[()] = self.position + rows
        if not self._aliased:
            self._bind_lengths(binding)
        self._session.run_with_iobinding(binding)
        self.position += rows

    def _binding(self) -> Any:
        binding = self._session.io_binding()
        for past, value in self._keys_and_values.items():
            binding.bind_ortvalue_input(past, value)
            binding.bind_ortvalue_output(past.replace("past_key_values", "present"), value)
        binding.bind_ortvalue_output("logits", _value(self._logits))
        self._bind_lengths(binding)
        return binding

    def _bind_lengths(self, binding: Any) -> None:
        binding.bind_ortvalue_input("seqlens_k", _value(self._seqlens_k))
        binding.bind_ortvalue_input("total_sequence_length", _value(self._total))
        if self._block is not None:
            binding.bind_ortvalue_input("block", _value(self._block))

    def _check_room(self, rows: int) -> None:
        if self.position + rows > self.max_context:
            raise PromptError(
                f"{self.position} + {rows} tokens do not fit the context of {self.max_context}: "
                "shorten the prompt or export with a larger --max-context"
            )


def _session(bundle: Bundle, part: str, options: Options) -> Any:
    available()
    return open_session(bundle, part, bundle.part(part, NAME).graph, options)


def _cache(session: Any, cache: tuple[int, int, int], max_context: int) -> dict[str, Any]:
    """Zeroed key and value buffers (1, KV, positions, D) by input name, as long as the graph declares them."""
    layers, kv_heads, head_dim = cache
    declared = {i.name: i.shape for i in session.get_inputs() if i.name.startswith("past_key_values.")}
    names = [f"past_key_values.{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]
    if set(declared) != set(names):
        raise BundleError(f"language_model has {len(declared)} KV cache inputs, its spec says {len(names)}")
    values = {}
    for name in names:
        _, heads, positions, channels = declared[name]
        if (heads, channels) != (kv_heads, head_dim):
            raise BundleError(f"language_model: {name} is {declared[name]}, its spec says {kv_heads} × {head_dim}")
        length = positions if isinstance(positions, int) else max_context
        if length < max_context:
            raise BundleError(f"language_model: {name} holds {length} positions, the manifest says {max_context}")
        values[name] = _value(_aligned((1, kv_heads, length, head_dim)))
    return values


def _aligned(shape: tuple[int, ...]) -> Floats:
    """Zeros starting at a cache line, in pages that the system hands out when they are first written."""
    size = int(np.prod(shape)) * 4
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(np.float32).reshape(shape)


def _value(array: Any) -> Any:
    """An OrtValue over the memory of a contiguous array, which it keeps alive."""
    import onnxruntime as ort

    return ort.OrtValue.ortvalue_from_numpy(array)
