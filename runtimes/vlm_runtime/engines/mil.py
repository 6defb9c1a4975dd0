"""Engine "mil": Core ML packages run by our own executor with NumPy, on any machine; slower than Core ML."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vlm_models.errors import BundleError, InputError, PromptError
from vlm_runtime.engine import Floats, Options
from vlm_runtime.mil import Executor, Outcome, Overflow, Package, open_package
from vlm_runtime.mil.values import NUMPY

if TYPE_CHECKING:
    from vlm_runtime.bundle import Bundle

NAME = "mil"
MASKED = -1e4  # added to the scores of rows that a row must not see: float16 holds sums of two of them


def available() -> None:
    """NumPy is all it needs."""


def encoder(bundle: Bundle, part: str, options: Options) -> MilEncoder:
    """The vision encoder or the projector of a bundle."""
    return MilEncoder(part_package(bundle, part, options))


def decoder(bundle: Bundle, options: Options) -> MilDecoder:
    """The language model of a bundle, with room for min(asked, bundle's) positions."""
    package = part_package(bundle, "language_model", options)
    return MilDecoder(package, min(options.max_context or bundle.manifest.max_context, bundle.manifest.max_context))


def part_package(bundle: Bundle, part: str, options: Options) -> Package:
    """The opened package of one part, checked to be of this bundle's model."""
    if options.device != "cpu" or options.kv_cache is not None or options.flash_attention is not None:
        raise InputError(
            "engine 'mil' runs on the CPU with the package's own KV cache: "
            "leave out --device, --kv-cache and --flash-attention"
        )
    path = bundle.path(bundle.part(part, NAME).graph).parent
    package = open_package(path)
    written = package.metadata
    if written.get("vlm.part") != part or written.get("vlm.fingerprint") != bundle.spec.fingerprint:
        raise BundleError(f"{path.name} is a part of another model: it is not the {part} of {bundle.spec.name}")
    return package


class MilEncoder:
    """A function of one input and one output, for one picture at a time. `overflows`: so far, by the value's name."""

    def __init__(self, package: Package) -> None:
        self.executor, self.overflows = Executor(package), dict[str, Overflow]()
        description = package.descriptions[package.default]
        if len(description.inputs) != 1 or len(description.outputs) != 1 or description.states:
            raise BundleError(f"{package.folder} is not an encoder: it needs one input, one output and no state")
        ((self._input, feature),), (self._output,) = description.inputs.items(), description.outputs
        self._shape = feature.shape[1:]

    def run(self, x: Floats) -> Floats:
        """(N, …) → (N, rows, channels)."""
        if x.shape[1:] != self._shape:
            raise ValueError(f"the package takes rows of {self._shape}, got {x.shape}")
        outcomes = [self.executor.run({self._input: x[i : i + 1]}) for i in range(len(x))]
        for outcome in outcomes:
            _count(self.overflows, outcome)
        return np.concatenate([o.outputs[self._output] for o in outcomes]).astype(np.float32, copy=False)


@dataclass(frozen=True)
class _Form:
    """What a decoder package looks like: rows a function takes by its name, the cache's shape and how it is passed."""

    rows: dict[str, int]
    context: int
    hidden_size: int
    vocab_size: int
    cache: dict[str, tuple[int, ...]]
    cache_type: str
    stateful: bool


class MilDecoder:
    """Functions of fixed numbers of rows over one cache; a chunk that is too short is padded behind.

    Padding is written to the cache behind the last row, where nothing sees it before the next rows overwrite it.
    `overflows`: the operations that lost numbers to float16 so far, by the value's name.
    """

    def __init__(self, package: Package, max_context: int) -> None:
        self._form = _form(package)
        if self._form.context < max_context:
            raise BundleError(f"{package.folder} holds {self._form.context} positions, the manifest says {max_context}")
        self.executor, self.overflows = Executor(package), dict[str, Overflow]()
        self.max_context, self.position = max_context, 0
        dtype = NUMPY[self._form.cache_type]
        self._cache = {name: np.zeros(shape, dtype) for name, shape in self._form.cache.items()}
        self._logits = np.zeros(self._form.vocab_size, np.float32)

    def prefill(self, embeds: Floats) -> Floats:
        """Append rows (S, H) in chunks; the logits (V,) after the last one."""
        if embeds.ndim != 2 or embeds.shape[0] == 0 or embeds.shape[1] != self._form.hidden_size:
            raise ValueError(f"prefill takes (S, {self._form.hidden_size}) with S > 0, got {embeds.shape}")
        self._check_room(embeds.shape[0])
        start = 0
        while start < len(embeds):
            function = self._choose(len(embeds) - start)
            rows = embeds[start : start + self._form.rows[function]]
            self._run(function, rows)
            start += len(rows)
        return self._logits

    def decode(self, embed: Floats) -> Floats:
        """Append one row (H,); its logits (V,)."""
        self._check_room(1)
        self._run(self._choose(1), np.asarray(embed).reshape(1, -1))
        return self._logits

    def rewind(self, position: int) -> None:
        """Forget all rows from `position` on."""
        if not 0 <= position <= self.position:
            raise ValueError(f"cannot rewind to {position}: {self.position} rows are in the cache")
        self.position = position

    def _choose(self, wanted: int) -> str:
        """The function that needs the fewest calls for `wanted` rows and pads the least."""
        room = self._form.context - self.position
        fitting = {name: rows for name, rows in self._form.rows.items() if rows <= room}
        if not fitting:
            raise BundleError(f"no function of the language model takes the last {room} rows of its cache")
        return min(fitting, key=lambda name: (-min(fitting[name], wanted), fitting[name]))

    def _run(self, function: str, given: Floats) -> None:
        """Rows (n, H) through a function of n rows or more."""
        form, count, rows = self._form, len(given), self._form.rows[function]
        embeds = np.zeros((1, rows, form.hidden_size), np.float32)
        embeds[0, :count] = given
        places = np.arange(form.context) - np.arange(self.position, self.position + rows)[:, None]
        feeds = {
            "inputs_embeds": embeds,
            "position": np.array([self.position], np.int32),
            "causal_mask": np.where(places <= 0, np.float32(0), np.float32(MASKED))[None, None],
            "last_row": np.array([count - 1], np.int32),
        }
        if form.stateful:
            outcome = self.executor.run(feeds, self._cache, function=function)
        else:
            outcome = self.executor.run(feeds | self._cache, function=function)
        outputs = outcome.outputs
        _count(self.overflows, outcome)
        if not form.stateful:
            for kind in ("key", "value"):
                new = outputs[f"new_{kind}s"]
                self._cache[f"{kind}_cache"][:, :, self.position : self.position + count] = new[:, :, :count]
        self._logits[...] = outputs["logits"].reshape(-1)
        self.position += count

    def _check_room(self, rows: int) -> None:
        if self.position + rows > self.max_context:
            raise PromptError(
                f"{self.position} + {rows} tokens do not fit the context of {self.max_context}: "
                "shorten the prompt or export with a larger --max-context"
            )


def _form(package: Package) -> _Form:
    """The form of a language model's package. Raises BundleError for one that is none, or whose functions differ."""
    rows, forms = {}, set()
    for name, function in package.functions.items():
        stateful = any(type_.kind == "state" for type_ in function.inputs.values())
        shapes = {key: type_.shape or () for key, type_ in function.inputs.items()}
        outputs = {key: type_.shape or () for key, type_ in function.outputs().items()}
        wanted = {"inputs_embeds": 3, "position": 1, "causal_mask": 4, "last_row": 1, "key_cache": 4, "value_cache": 4}
        results = {"logits"} if stateful else {"logits", "new_keys", "new_values"}
        if {key: len(shape) for key, shape in shapes.items()} != wanted or set(outputs) != results:
            raise BundleError(
                f"{package.folder}: {name!r} takes {', '.join(shapes)} and gives {', '.join(outputs)}; "
                f"a language model takes {', '.join(wanted)} and gives {', '.join(sorted(results))}"
            )
        types = {function.inputs[key].dtype for key in ("key_cache", "value_cache")}
        if not types <= {"fp16", "fp32"} or len(types) > 1:
            raise BundleError(
                f"{package.folder}: the KV cache of {name!r} is {', '.join(sorted(types))}, not fp16 or fp32"
            )
        cache, mask, embeds = shapes["key_cache"], shapes["causal_mask"], shapes["inputs_embeds"]
        fixed = (*cache, *mask, *embeds, *outputs["logits"])
        if None in fixed or cache != shapes["value_cache"] or mask != (1, 1, embeds[1], cache[2]) or embeds[0] != 1:
            raise BundleError(f"{package.folder}: the shapes of {name!r} do not fit one another: {shapes}")
        rows[name] = int(embeds[1] or 0)
        forms.add((cache, types.pop(), embeds[2], outputs["logits"][-1], stateful))
    if len(forms) != 1 or min(rows.values()) < 1:
        raise BundleError(f"{package.folder}: its functions differ in cache, hidden size or vocabulary")
    ((shape, dtype, hidden_size, vocab_size, stateful),) = forms
    caches = {name: tuple(int(n or 0) for n in shape) for name in ("key_cache", "value_cache")}
    return _Form(rows, caches["key_cache"][2], int(hidden_size or 0), int(vocab_size or 0), caches, dtype, stateful)


def _count(known: dict[str, Overflow], outcome: Outcome) -> None:
    for overflow in outcome.overflows:
        known.setdefault(overflow.name, overflow)
