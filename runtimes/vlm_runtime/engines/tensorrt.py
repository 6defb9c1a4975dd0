"""Engine "tensorrt": engines of TensorRT or TensorRT-RTX on an NVIDIA GPU. Not measured: no such GPU has run it yet.

It takes the engine files that the bundle lists for this GPU's compute capability and the SDK's own version. Keys and
values never leave the GPU; embeddings go to it and logits come back through pinned memory, in the order of one stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vlm_models.errors import BundleError, DependencyError, InputError
from vlm_runtime.cuda import Gpu, Graph, Memory, check_device
from vlm_runtime.engine import Floats, Options
from vlm_runtime.stepwise import STORED, StepDecoder, load, store
from vlm_runtime.tensorrt_engine import SDKS, Context, OpenEngine, engine_files, fitting, installed
from vlm_runtime.tensorrt_io import LanguageIO, language_io

if TYPE_CHECKING:
    from vlm_runtime.bundle import Bundle

NAME = "tensorrt"


def available() -> None:
    """Raises DependencyError where the SDK, cuda-python or an NVIDIA GPU is missing."""
    if not any(map(installed, SDKS)):
        raise DependencyError(
            "engine 'tensorrt' needs TensorRT or TensorRT-RTX: pip install 'vlm-export[tensorrt]', "
            "or use --engine tensorrt_onnx, which runs the same graphs"
        )
    check_device(NAME)


def encoder(bundle: Bundle, part: str, options: Options) -> TensorRTEncoder:
    """The vision encoder or the projector of a bundle."""
    return TensorRTEncoder(_open(bundle, part))


def decoder(bundle: Bundle, options: Options) -> TensorRTDecoder:
    """The language model of a bundle, with room for min(asked, bundle's) positions."""
    if options.kv_cache is not None or options.flash_attention is not None:
        raise InputError(
            "engine 'tensorrt' has the engine's own KV cache and attention: "
            "leave out --kv-cache and --flash-attention, or use --engine language=gguf"
        )
    io = language_io(bundle.part("language_model", NAME), bundle.spec.language)
    limit = min(bundle.manifest.max_context, io.max_context)
    return TensorRTDecoder(
        _open(bundle, "language_model"),
        io,
        hidden_size=bundle.spec.language.hidden_size,
        vocab_size=bundle.spec.language.vocab_size,
        max_context=min(options.max_context or limit, limit),
        prefill_chunk=min(options.prefill_chunk, io.prefill_chunk),
    )


@dataclass(frozen=True)
class _Buffers:
    """Pinned arrays for one shape of input, and the memory of both on the GPU."""

    given: NDArray[Any]
    made: NDArray[Any]
    on_gpu: tuple[Memory, Memory]


class TensorRTEncoder:
    """An engine of one input and one output; more pictures than it was built for go through it in turns."""

    def __init__(self, engine: OpenEngine) -> None:
        if len(engine.inputs) != 1 or len(engine.outputs) != 1:
            raise BundleError(f"{engine.name} has {len(engine.inputs)} inputs and {len(engine.outputs)} outputs, not 1")
        self._engine, self._context = engine, engine.context()
        (self._input,), (self._output,) = engine.inputs, engine.outputs
        self._most = engine.largest(self._input)[0]
        self._buffers: _Buffers | None = None

    def run(self, x: Floats) -> Floats:
        """(N, …) → (N, rows, channels)."""
        return np.concatenate([self._turn(x[n : n + self._most]) for n in range(0, len(x), self._most)])

    def _turn(self, x: Floats) -> Floats:
        gpu, buffers = self._engine.gpu, self._buffers
        if buffers is None or buffers.given.shape != x.shape:
            buffers = self._buffers = self._allocate(x.shape)
        store(buffers.given, x)
        gpu.upload(buffers.on_gpu[0].address, buffers.given)
        self._context.run()
        gpu.download(buffers.made, buffers.on_gpu[1].address)
        gpu.synchronize()
        return load(buffers.made)

    def _allocate(self, shape: tuple[int, ...]) -> _Buffers:
        """Memory for inputs of `shape`, bound to the context."""
        engine, context = self._engine, self._context
        context.shape(self._input, shape)
        given = engine.gpu.pinned(shape, STORED[engine.dtype(self._input)])
        made = engine.gpu.pinned(context.output_shape(self._output), STORED[engine.dtype(self._output)])
        on_gpu = Memory(engine.gpu, given.nbytes), Memory(engine.gpu, made.nbytes)
        for name, memory in zip((self._input, self._output), on_gpu, strict=True):
            context.bind(name, memory.address)
        return _Buffers(given, made, on_gpu)


class TensorRTDecoder(StepDecoder):
    """The decoder: a fixed cache that each step writes where it lies, or a growing one in two buffers that take turns.

    With a fixed cache one decode step is the same work each time, so it runs as a CUDA graph: TensorRT-RTX captures it
    by itself, for TensorRT it is captured here, with the copies to and from the host, after one step without.
    """

    def __init__(
        self,
        engine: OpenEngine,
        io: LanguageIO,
        *,
        hidden_size: int,
        vocab_size: int,
        max_context: int,
        prefill_chunk: int,
    ) -> None:
        _check(engine, io, hidden_size, vocab_size)
        super().__init__(hidden_size, max_context, min(prefill_chunk, engine.largest("inputs_embeds")[1]))
        self._gpu, self._io, gpu = engine.gpu, io, engine.gpu
        self._length = max_context if io.kv == "concat" else io.max_context
        dtype, turns = STORED[io.dtype], 2 if io.kv == "concat" else 1
        self._row_bytes = io.head_dim * np.dtype(dtype).itemsize
        size = io.kv_heads * self._length * self._row_bytes
        self._caches = {names: [Memory(gpu, size) for _ in range(turns)] for names in io.caches()}
        self._embeds = gpu.pinned((self._chunk, hidden_size), dtype)
        self._position = gpu.pinned((1,), np.int64)
        self._logits = gpu.pinned((vocab_size,), np.float32)
        self._on_gpu = [Memory(gpu, host.nbytes) for host in (self._embeds, self._position, self._logits)]
        self._host_position = engine.on_host("position")
        self._prefill = self._bound(engine.context())
        steady = io.kv == "scatter" and not self._host_position
        self._decode = self._bound(engine.context(graphs=True)) if steady else self._prefill
        self._captures = steady and not engine.captures
        self._steps = 0
        self._graph: Graph | None = None
        if steady:
            self._shapes(self._decode, 1)

    def _step(self, rows: Floats) -> Floats:
        count = len(rows)
        store(self._embeds[:count], rows)
        self._position[0] = self.position
        context = self._decode if count == 1 else self._prefill
        if context is self._prefill:
            self._shapes(context, count)
        if self._io.kv == "concat":
            self._turn(context)
        if count == 1 and self._captures:
            self._captured_step()
        else:
            self._enqueue(context, count)
        self._gpu.synchronize()
        return self._logits

    def _captured_step(self) -> None:
        """The first step runs as it is, for TensorRT settles its memory in it; the second captures, the rest replay."""
        if self._steps == 1:
            self._graph = self._gpu.capture(lambda: self._enqueue(self._decode, 1))
        self._steps += 1
        if self._graph is None:
            self._enqueue(self._decode, 1)
        else:
            self._graph.launch()

    def _enqueue(self, context: Context, rows: int) -> None:
        embeds, position, logits = self._on_gpu
        self._gpu.upload(embeds.address, self._embeds[:rows])
        if not self._host_position:
            self._gpu.upload(position.address, self._position)
        context.run()
        self._gpu.download(self._logits, logits.address)

    def _bound(self, context: Context) -> Context:
        """The context with the addresses that never change."""
        embeds, position, logits = self._on_gpu
        context.bind("inputs_embeds", embeds.address)
        context.bind("position", self._position.ctypes.data if self._host_position else position.address)
        context.bind("logits", logits.address)
        if self._io.kv == "scatter":
            for (before, after), (memory,) in self._caches.items():
                context.bind(before, memory.address)
                context.bind(after, memory.address)
        return context

    def _shapes(self, context: Context, rows: int) -> None:
        io = self._io
        context.shape("inputs_embeds", (1, rows, self._hidden_size))
        context.shape("position", (1,))
        length = self.position if io.kv == "concat" else self._length
        for before in self._caches:
            context.shape(before[0], (1, io.kv_heads, length, io.head_dim))

    def _turn(self, context: Context) -> None:
        """Read what the last step wrote, write to the other buffer."""
        for (before, after), buffers in self._caches.items():
            context.bind(before, buffers[0].address)
            context.bind(after, buffers[1].address)
            buffers.reverse()

    def _forget(self, position: int) -> None:
        """A grown cache lies head after head without gaps, so the heads move together; a fixed one stays as it is."""
        if self._io.kv == "scatter" or position == 0:
            return
        kept, held = position * self._row_bytes, self.position * self._row_bytes
        for buffers in self._caches.values():
            self._gpu.copy_blocks(buffers[1].address, kept, buffers[0].address, held, kept, self._io.kv_heads)
            buffers.reverse()
        self._gpu.synchronize()


def _open(bundle: Bundle, part: str) -> OpenEngine:
    """The engine of one part that fits this machine. Raises DependencyError or BundleError, before it is read."""
    available()
    files, gpu = engine_files(bundle, part, NAME), Gpu(NAME)
    return OpenEngine(bundle, fitting(bundle, part, files, gpu), gpu)


def _check(engine: OpenEngine, io: LanguageIO, hidden_size: int, vocab_size: int) -> None:
    """Raises BundleError for an engine that takes or gives other than the manifest says."""
    length = -1 if io.kv == "concat" else io.max_context
    cache = (io.dtype, (1, io.kv_heads, length, io.head_dim))
    wanted = {"inputs_embeds": (io.dtype, (1, -1, hidden_size)), "position": ("INT64", (1,))}
    wanted |= {"logits": ("fp32", (1, vocab_size))} | {name: cache for names in io.caches() for name in names}
    found = {name: (engine.dtype(name), engine.shape(name)) for name in (*engine.inputs, *engine.outputs)}
    for name in sorted(wanted.keys() | found.keys()):
        if name not in wanted or name not in found or not _like(found[name], wanted[name]):
            raise BundleError(
                f"the engine {engine.name} has {name} of {found.get(name, 'no kind')}, its manifest says "
                f"{wanted.get(name, 'nothing of it')}: build it again with vlm-export --build"
            )


def _like(found: tuple[str, tuple[int, ...]], wanted: tuple[str, tuple[int, ...]]) -> bool:
    """The same type, and no size that is fixed to another."""
    (type_, shape), (wanted_type, sizes) = found, wanted
    return (
        type_ == wanted_type
        and len(shape) == len(sizes)
        and all(s in (-1, w) for s, w in zip(shape, sizes, strict=True))
    )
