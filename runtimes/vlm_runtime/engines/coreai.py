"""Engine "coreai": Core AI assets run by Apple's own runtime, on Linux on its CPU, on macOS 27 where Core AI chooses.

Beta: the only file of the runtime that calls the package coreai. Linux lowers an asset when it is opened, into a
temporary folder of the weights' size.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib
import importlib.util
import json
import os
import threading
import weakref
from collections.abc import Coroutine, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from vlm_models.errors import BundleError, DependencyError, InputError, PromptError
from vlm_runtime.engine import Floats, Options

if TYPE_CHECKING:
    from vlm_runtime.bundle import Bundle

NAME = "coreai"
Array = NDArray[Any]
T = TypeVar("T")
_ENCODERS = {"vision_encoder": ("pixel_values", "image_features"), "projector": ("image_features", "image_embeds")}
_DTYPES = {"float32": np.float32, "float16": np.float16}


def available() -> None:
    """Raises DependencyError where coreai-core is not installed."""
    if importlib.util.find_spec("coreai") is None:
        raise DependencyError("engine 'coreai' needs coreai-core: pip install 'vlm-export[coreai]'")


def encoder(bundle: Bundle, part: str, options: Options) -> CoreAIEncoder:
    """The vision encoder or the projector of a bundle."""
    return CoreAIEncoder(_function(bundle, part, options), *_ENCODERS[part])


def decoder(bundle: Bundle, options: Options) -> CoreAIDecoder:
    """The language model of a bundle, with room for min(asked, bundle's) positions."""
    limit = bundle.manifest.max_context
    return CoreAIDecoder(
        _function(bundle, "language_model", options), min(options.max_context or limit, limit), options.prefill_chunk
    )


class Function:
    """The function "main" of one asset, loaded: `run` is the asynchronous call made synchronous.

    Apple's interface is asynchronous and needs its event loop alive between calls, so each function has a thread with
    a loop of its own; that also works where the caller runs in a loop. `close` ends both and removes the lowered
    program; leaving the last reference does the same.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._loop = asyncio.new_event_loop()
        self._scope = contextlib.AsyncExitStack()
        thread = threading.Thread(target=self._loop.run_forever, name=f"coreai {path.stem}", daemon=True)
        thread.start()
        try:
            self._main = _wait(self._loop, _open(self._scope, path))
        except Exception as error:  # Apple's errors have no common base but this
            _close(self._loop, thread, self._scope)
            raise BundleError(
                f"{path.name} cannot be opened by Core AI ({_reason(error)}): export the model again"
            ) from None
        # Made last, so that it runs before what the lowered program's folder does at the end of the process.
        self.close = weakref.finalize(self, _close, self._loop, thread, self._scope)
        about = self._main.desc
        self.inputs = {name: _described(about.input_descriptor(name)) for name in about.input_names}
        self.states = {name: _described(about.state_descriptor(name)) for name in about.state_names}
        self.outputs = {name: _described(about.output_descriptor(name)) for name in about.output_names}

    def run(self, inputs: Mapping[str, Array], states: Mapping[str, Any] | None = None) -> dict[str, Array]:
        """Outputs by name. `inputs` are contiguous arrays of the declared types; `states` are changed in place."""
        given = {name: array_of(value) for name, value in inputs.items()}
        try:
            return _wait(self._loop, _call(self._main, given, dict(states or {})))
        except Exception as error:
            raise BundleError(f"{self.path.name} cannot be run by Core AI ({_reason(error)})") from None


class CoreAIEncoder:
    """A function of one input and one output, for one picture at a time."""

    def __init__(self, function: Function, source: str, result: str) -> None:
        self._function, self._source, self._result = function, source, result
        if set(function.inputs) != {source} or set(function.outputs) != {result} or function.states:
            raise BundleError(f"{function.path.name} does not take {source} and give {result}: export the model again")
        self._shape, self._dtype = function.inputs[source]

    def run(self, x: Floats) -> Floats:
        """(N, …) → (N, rows, channels)."""
        if x.shape[1:] != self._shape[1:]:
            raise ValueError(f"the asset takes rows of {self._shape[1:]}, got {x.shape}")
        given = np.ascontiguousarray(x, self._dtype)
        rows = [self._function.run({self._source: given[i : i + 1]})[self._result] for i in range(len(given))]
        return np.concatenate(rows).astype(np.float32, copy=False)


class CoreAIDecoder:
    """The decoder with its KV cache, which Core AI writes in place; a prompt goes in in chunks of any size."""

    def __init__(self, function: Function, max_context: int, prefill_chunk: int) -> None:
        self._function, self._chunk = function, prefill_chunk
        self.max_context, self.position = max_context, 0
        self._hidden_size, self._dtype = _checked(function, max_context)
        self._states = {name: array_of(np.zeros(shape, dtype)) for name, (shape, dtype) in function.states.items()}
        self._positions = np.arange(max_context, dtype=np.int32)[None]
        self._logits = np.zeros(function.outputs["logits"][0][-1], np.float32)

    def prefill(self, embeds: Floats) -> Floats:
        """Append rows (S, H) in chunks; the logits (V,) after the last one."""
        if embeds.ndim != 2 or embeds.shape[0] == 0 or embeds.shape[1] != self._hidden_size:
            raise ValueError(f"prefill takes (S, {self._hidden_size}) with S > 0, got {embeds.shape}")
        self._check_room(embeds.shape[0])
        for start in range(0, embeds.shape[0], self._chunk):
            self._run(embeds[start : start + self._chunk])
        return self._logits

    def decode(self, embed: Floats) -> Floats:
        """Append one row (H,); its logits (V,)."""
        self._check_room(1)
        self._run(np.asarray(embed).reshape(1, -1))
        return self._logits

    def rewind(self, position: int) -> None:
        """Forget all rows from `position` on."""
        if not 0 <= position <= self.position:
            raise ValueError(f"cannot rewind to {position}: {self.position} rows are in the cache")
        self.position = position

    def _run(self, rows: Floats) -> None:
        end = self.position + len(rows)
        given = {
            "inputs_embeds": np.ascontiguousarray(rows[None], self._dtype),
            "position_ids": np.ascontiguousarray(self._positions[:, :end]),
        }
        self._logits[...] = self._function.run(given, self._states)["logits"].reshape(-1)
        self.position = end

    def _check_room(self, rows: int) -> None:
        if self.position + rows > self.max_context:
            raise PromptError(
                f"{self.position} + {rows} tokens do not fit the context of {self.max_context}: "
                "shorten the prompt or export with a larger --max-context"
            )


def array_of(array: Array) -> Any:
    """An NDArray of Core AI's."""
    return importlib.import_module("coreai.runtime").NDArray(array)


async def _open(scope: contextlib.AsyncExitStack, path: Path) -> Any:
    asset = importlib.import_module("coreai.authoring.asset").AIModelAsset.load(path)
    model = await scope.enter_async_context(asset.executable())
    with _no_log():
        return model.load_function("main")


async def _call(function: Any, inputs: Mapping[str, Any], states: Mapping[str, Any]) -> dict[str, Array]:
    outputs = await function(inputs, state=states)
    return {name: np.array(value.numpy()) for name, value in outputs.items()}  # a copy: the view's memory is reused


def _wait(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, T]) -> T:
    return asyncio.run_coroutine_threadsafe(coroutine, loop).result()


def _close(loop: asyncio.AbstractEventLoop, thread: threading.Thread, scope: contextlib.AsyncExitStack) -> None:
    if threading.current_thread() is thread:  # collected as garbage in there, where waiting would never end
        loop.stop()
        return
    _wait(loop, scope.aclose())
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@contextlib.contextmanager
def _no_log() -> Iterator[None]:
    """Nothing on stderr: the runtime writes there, past Python, which function it loads."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:  # noqa: PTH123
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _described(descriptor: Any) -> tuple[tuple[int, ...], type[Any]]:
    """Shape (-1 where it is open) and NumPy type."""
    return tuple(-1 if n is None else int(n) for n in descriptor.shape), _DTYPES.get(str(descriptor.dtype), np.int32)


def _function(bundle: Bundle, part: str, options: Options) -> Function:
    """One part, opened and checked to be of this bundle's model. Raises DependencyError, InputError or BundleError."""
    available()
    if options.device != "cpu" or options.kv_cache is not None or options.flash_attention is not None:
        raise InputError(
            "engine 'coreai' lets Core AI choose where it runs, with the asset's own KV cache: "
            "leave out --device, --kv-cache and --flash-attention"
        )
    path = bundle.path(bundle.part(part, NAME).graph).parent
    written = _marks(path)
    if written.get("vlm.part") != part or written.get("vlm.fingerprint") != bundle.spec.fingerprint:
        raise BundleError(f"{path.name} is a part of another model: it is not the {part} of {bundle.spec.name}")
    return Function(path)


def _marks(path: Path) -> Mapping[str, Any]:
    """What was written into an asset beside its program, which must have the hash that was written with it.

    Raises BundleError for a damaged asset. Apple's reader must not see one: without its program it ends the process.
    """
    try:
        marks: dict[str, Any] = json.loads((path / "metadata.json").read_bytes())["creatorDefinedMetadata"]
        with (path / "main.mlirb").open("rb") as program:
            digest = hashlib.file_digest(program, "sha256").digest()
        sound = digest == (path / "main.hash").read_bytes() and isinstance(marks, dict)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleError(f"{path.name} is damaged ({_reason(error)}): export the model again") from None
    if not sound:
        raise BundleError(
            f"{path.name} is damaged: its program is not the one that was written; export the model again"
        )
    return marks


def _checked(function: Function, max_context: int) -> tuple[int, type[Any]]:
    """Hidden size and float type of a language model. Raises BundleError for one of another form."""
    inputs, states, outputs = function.inputs, function.states, function.outputs
    shapes = {name: shape for name, (shape, _) in {**inputs, **states}.items()}
    wanted = {"inputs_embeds": 3, "position_ids": 2, "k_cache": 5, "v_cache": 5}
    if {name: len(shape) for name, shape in shapes.items()} != wanted or set(outputs) != {"logits"}:
        raise BundleError(
            f"{function.path.name} takes {', '.join(shapes)} and gives {', '.join(outputs)}; "
            f"a language model takes {', '.join(wanted)} and gives logits: export the model again"
        )
    if shapes["k_cache"] != shapes["v_cache"] or shapes["k_cache"][3] < max_context:
        raise BundleError(
            f"{function.path.name} holds {shapes['k_cache'][3]} positions, the manifest says {max_context}"
        )
    return shapes["inputs_embeds"][2], inputs["inputs_embeds"][1]


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
