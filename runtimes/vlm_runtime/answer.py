"""One answer: pictures encoded, prompt prefilled, tokens decoded until the end; text comes while it is made."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypedDict, cast

import numpy as np

from vlm_models.errors import InputError
from vlm_runtime.blocks import Blocks, prefill, whole_blocks
from vlm_runtime.embedding import EmbeddingTable
from vlm_runtime.engine import Decoder, Floats, Shared
from vlm_runtime.sampling import Sampler, Sampling
from vlm_runtime.splice import splice
from vlm_runtime.text import Decodes, TextStream
from vlm_runtime.tiling import Layout

if TYPE_CHECKING:
    from PIL import Image

Key = int | bytes


class Settings(TypedDict, total=False):
    """Keywords of `generate`, `answer` and `ask`: the length, the texts that end an answer, and `Sampling`'s fields."""

    max_new_tokens: int
    stop: Sequence[str]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | None


@dataclass(frozen=True)
class Answer:
    """What was said, and what it took.

    `token_ids` are all generated ids, the one that ended the answer included. `prompt_tokens` counts the prompt with
    its `image_tokens`; `cached_tokens` of them lay in the KV cache already. `timings_ms`: load (of the bundle, once),
    preprocess, vision, projector, prefill, ttft (from the call to the first token), decode (all further tokens).
    `finish_reason`: "stop" (end token or stop string), "length" (max_new_tokens, or `Request.watch` said so),
    "context" (no room left).
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    image_tokens: int
    engines: Mapping[str, str]
    timings_ms: Mapping[str, float]
    finish_reason: Literal["stop", "length", "context"]
    cached_tokens: int = 0


@dataclass(frozen=True)
class Picture:
    """A preprocessed picture: pixel values (tiles, 3, s, s), their layout, and what tells it from others.

    `image` is the picture itself where it would be cut differently among more or fewer of them.
    """

    pixels: Floats
    layout: Layout
    digest: bytes
    image: Image.Image | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Request:
    """A checked prompt: expanded `ids`, what each row will be (`keys`), pictures of `image_tokens` rows in all.

    `blocks` are rows that see one another; `room` is how many tokens fit after it; `reuse` keeps the beginning that
    the KV cache already holds. `watch` is given each token and the logits (V,) it was picked from, which the next step
    overwrites; where it returns False the answer ends.
    """

    ids: tuple[int, ...]
    keys: tuple[Key, ...]
    pictures: tuple[Picture, ...]
    image_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]
    max_new_tokens: int
    room: int
    reuse: bool
    started: float
    timings_ms: dict[str, float] = field(default_factory=dict)
    blocks: Blocks = ()
    watch: Callable[[int, Floats], bool] | None = None


class Context:
    """A decoder and what lies in its KV cache: a token id per row, or the digest of the picture."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder, self._keys, self.turn = decoder, list[Key](), 0

    @property
    def rows(self) -> int:
        """How many rows of the cache are known."""
        return len(self._keys)

    def common(self, keys: Sequence[Key], blocks: Blocks) -> int:
        """Length of the longest common beginning, all but one key at most."""
        limit = min(len(self._keys), self._decoder.position, len(keys) - 1)
        return whole_blocks(next((i for i in range(limit) if self._keys[i] != keys[i]), limit), blocks)

    def another(self) -> Context | None:
        """A further KV cache over the same weights, empty; None where the engine has one only."""
        if not hasattr(self._decoder, "another"):
            return None
        return Context(cast(Shared, self._decoder).another())

    def begin(self, keys: Sequence[Key], reuse: bool, blocks: Blocks) -> int:
        """A new turn: rewind to the longest common beginning; its length."""
        self.turn += 1
        common = self.common(keys, blocks) if reuse else 0
        del self._keys[common:]
        self._decoder.rewind(common)
        return common

    def lend(self) -> Decoder:
        """The decoder, for others to use: nothing is known of its cache from here on."""
        self.turn += 1
        self._keys.clear()
        return self._decoder

    def prefill(self, embeds: Floats, keys: Sequence[Key], blocks: Blocks) -> Floats:
        """Append rows (S, H), `blocks` of which see one another; logits (V,)."""
        logits = prefill(self._decoder, embeds, blocks)
        self._keys.extend(keys)
        return logits

    def decode(self, embed: Floats, key: Key) -> Floats:
        """Append one row (H,); logits (V,)."""
        logits = self._decoder.decode(embed)
        self._keys.append(key)
        return logits


@dataclass(frozen=True)
class Speaker:
    """What an answer is made with: `picture_rows` gives (T, H) and adds to the timings it is handed."""

    context: Context
    embedding: EmbeddingTable
    tokenizer: Decodes
    eos_token_ids: frozenset[int]
    engines: Mapping[str, str]
    picture_rows: Callable[[Picture, dict[str, float]], Floats]


def speak(speaker: Speaker, request: Request) -> Generator[str, None, Answer]:
    """Yield the pieces of the answer; returns the whole."""
    times, sampler, text = request.timings_ms, Sampler(request.sampling), TextStream(speaker.tokenizer, request.stop)
    limit, row = min(request.max_new_tokens, request.room), np.empty(speaker.embedding.columns, np.float32)
    said, generated, pieces, ids = 0.0, list[int](), list[str](), list(request.ids)
    reason: Literal["stop", "length", "context"] = "length" if limit == request.max_new_tokens else "context"
    logits, cached = _prefill(speaker, request)
    turn = speaker.context.turn
    token = sampler.pick(logits, ids)
    clock = time.perf_counter()
    times["ttft"] = (clock - request.started) * 1e3
    while True:
        generated.append(token)
        ids.append(token)
        ended = request.watch is not None and not request.watch(token, logits)
        if token in speaker.eos_token_ids:
            reason = "stop"
            break
        if piece := text.push(token):
            pieces.append(piece)
            said += time.perf_counter() - clock
            yield piece
            clock = time.perf_counter()
        if text.stopped:
            reason = "stop"
            break
        if ended:
            reason = "length"
            break
        if len(generated) == limit:
            break
        if speaker.context.turn != turn:
            raise InputError(
                "this answer was broken off by a later one of the same model: finish one, or load it twice"
            )
        speaker.embedding.row_into(token, row)
        logits = speaker.context.decode(row, token)
        token = sampler.pick(logits, ids)
    times["decode"] = (said + time.perf_counter() - clock) * 1e3
    if piece := text.finish():
        pieces.append(piece)
        yield piece
    return Answer(
        text="".join(pieces),
        token_ids=tuple(generated),
        prompt_tokens=len(request.ids),
        image_tokens=request.image_tokens,
        engines=dict(speaker.engines),
        timings_ms=times,
        finish_reason=reason,
        cached_tokens=cached,
    )


def milliseconds(start: float) -> float:
    """Since `start`, a reading of `time.perf_counter`."""
    return (time.perf_counter() - start) * 1e3


def split_settings(settings: Settings) -> tuple[Sampling, tuple[str, ...], int]:
    """Sampling, stop strings and length. Raises InputError for a value out of range."""
    rest = dict(settings)
    length, stop = rest.pop("max_new_tokens", 256), rest.pop("stop", ())
    if not isinstance(length, int) or length < 1:
        raise InputError(f"max_new_tokens is {length}: it must be 1 or more")
    stop = (stop,) if isinstance(stop, str) else tuple(stop)  # type: ignore[arg-type]
    return Sampling(**rest), stop, length  # type: ignore[arg-type]


def _prefill(speaker: Speaker, request: Request) -> tuple[Floats, int]:
    """Encode the pictures whose rows are not in the KV cache, splice, prefill; logits (V,), and how much was there."""
    times = request.timings_ms
    times.update(vision=0.0, projector=0.0)
    kept = speaker.context.begin(request.keys, request.reuse, request.blocks)
    known = sum(isinstance(key, bytes) for key in request.keys[:kept])
    rows, end = [], 0
    for picture in request.pictures:
        end += picture.layout.rows
        if end > known:
            rows.append(speaker.picture_rows(picture, times)[known - end :])
    start = time.perf_counter()
    blocks = [(a - kept, b - kept) for a, b in request.blocks if a >= kept]
    embeds = splice(request.ids[kept:], rows, speaker.embedding)
    logits = speaker.context.prefill(embeds, request.keys[kept:], blocks)
    times["prefill"] = milliseconds(start)
    return logits, kept
