"""A bundle ready to answer: `load(folder).generate("What is this?", images=["a.png"])` yields text."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from collections import OrderedDict
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Unpack

import numpy as np

from vlm_models.errors import PromptError
from vlm_runtime.answer import Answer, Picture, Request, Settings, Speaker, milliseconds, speak, split_settings
from vlm_runtime.blocks import blocks_of
from vlm_runtime.bundle import Bundle, open_bundle
from vlm_runtime.chat import Chat, system_message
from vlm_runtime.contexts import Contexts
from vlm_runtime.embedding import EmbeddingTable
from vlm_runtime.engine import Decoder, Encoder, Floats, KVCache, Options, choose_engines, find_engine
from vlm_runtime.image import open_image
from vlm_runtime.prompt import render, user_message
from vlm_runtime.tiling import image_newline, layout_of, pack, tiles_of
from vlm_runtime.tokenizer import Tokenizer, check_count, prompt_ids

if TYPE_CHECKING:
    from PIL import Image

    Source = str | os.PathLike[str] | bytes | Image.Image

_PICTURES_KEPT = 8
_TILES_AT_ONCE = 4


def load(
    folder: str | Path,
    *,
    engine: str | None = None,
    threads: int | None = None,
    max_context: int | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
    kv_cache: KVCache | None = None,
    flash_attention: bool | None = None,
    conversations: int = 1,
    verify: bool = True,
) -> VLM:
    """Open the bundle in `folder` with all its parts.

    `engine` is one name ("gguf") or one per part ("vision=onnx,language=gguf"); without it each part gets the first
    engine that the bundle holds and this machine can run. `threads`: one per physical core unless given. `max_context`
    lowers the bundle's own, which saves memory. `kv_cache` ("f32", "f16", "q8_0") and `flash_attention` are for engines
    that have a choice (gguf). `conversations`: how many KV caches there may be, so that as many chats go on where they
    were (onnx, gguf; other engines have one). `verify=False` skips the SHA-256 of the files.
    Raises BundleError, InputError, or DependencyError where an engine or a device is missing.
    """
    start = time.perf_counter()
    import jinja2  # noqa: F401 - loaded with the bundle, so that the first answer does not wait for it
    import PIL.Image  # noqa: F401

    options = Options(
        threads=threads,
        max_context=max_context,
        device=device,
        kv_cache=kv_cache,
        flash_attention=flash_attention,
    )
    bundle = open_bundle(folder, verify=verify)
    vlm = VLM(bundle, choose_engines(bundle, engine), options, conversations)
    vlm.load_ms = milliseconds(start)
    return vlm


class VLM:
    """The parts of one bundle, opened: `generate`, `answer` and `chat` use them, one at a time.

    `vision_encoder`, `projector` and `decoder` are engines; `engines` says which, by part; `embedding` and
    `tokenizer` are the bundle's; `max_context` is how many tokens prompt and answer may have together; `encoded`
    counts the pictures that went through the vision encoder.
    """

    def __init__(self, bundle: Bundle, engines: Mapping[str, str], options: Options, conversations: int = 1) -> None:
        """Raises BundleError, InputError or DependencyError, as `load` does."""
        self.bundle, self.spec, self.engines, self.load_ms = bundle, bundle.spec, dict(engines), 0.0
        self.tokenizer, self.embedding = Tokenizer(bundle), EmbeddingTable(bundle)
        self.vision_encoder = find_engine(engines["vision_encoder"]).encoder(bundle, "vision_encoder", options)
        self.projector = find_engine(engines["projector"]).encoder(bundle, "projector", options)
        decoder = find_engine(engines["language_model"]).decoder(bundle, options)
        self.max_context = decoder.max_context
        self._newline = image_newline(bundle)
        self._alone_matters = self.spec.tiling is not None and self.spec.tiling.single
        self._rows: OrderedDict[bytes, Floats] = OrderedDict()  # of the last pictures, by digest
        self._rows_kept, self.encoded = max(_PICTURES_KEPT, conversations), 0
        self._contexts = Contexts(decoder, conversations)
        self._speaker = Speaker(
            context=self._contexts.first,
            embedding=self.embedding,
            tokenizer=self.tokenizer,
            eos_token_ids=frozenset(self.spec.prompt.eos_token_ids),
            engines=self.engines,
            picture_rows=self._picture_rows,
        )

    @property
    def decoder(self) -> Decoder:
        """The language model; who uses it directly ends what a chat had in its KV cache, and costs it time only."""
        return self._contexts.first.lend()

    def generate(
        self,
        prompt: str,
        images: Sequence[Source] = (),
        *,
        system: str | None = None,
        raw: bool = False,
        **settings: Unpack[Settings],
    ) -> Iterator[str]:
        """Yield the answer to `prompt` about `images` piece by piece.

        The checkpoint's chat template is applied, pictures first, unless the prompt itself holds the image token once
        for each; `raw` takes the prompt as it is. Raises PromptError, ImageError or InputError before any work.
        """
        return self._generate(prompt, images, system, raw, settings)

    def answer(
        self,
        prompt: str,
        images: Sequence[Source] = (),
        *,
        system: str | None = None,
        raw: bool = False,
        **settings: Unpack[Settings],
    ) -> Answer:
        """The same as `generate`, all at once and with what it took."""
        pieces = self._generate(prompt, images, system, raw, settings)
        while True:
            try:
                next(pieces)
            except StopIteration as stop:
                return _answer(stop)

    def chat(self, system: str | None = None) -> Chat:
        """A conversation of several turns that keeps its KV cache from turn to turn."""
        return Chat(self, system)

    def encode_image(self, image: Source, pictures: int = 1) -> Floats:
        """The rows (R, H) of one of the `pictures` pictures of a prompt; those of the last few are kept."""
        return self._picture_rows(self.picture(image, pictures), {"vision": 0.0, "projector": 0.0})

    def picture(self, image: Source, pictures: int = 1) -> Picture:
        """One of the `pictures` pictures of a prompt, opened and preprocessed. Raises ImageError."""
        opened = open_image(image)
        layout = layout_of((opened.height, opened.width), self.spec, pictures)
        pixels = tiles_of(opened, self.spec, layout)
        digest = hashlib.sha256(repr(layout).encode() + pixels.tobytes()).digest()
        return Picture(pixels, layout, digest, opened if self._alone_matters else None)

    def request(
        self,
        text: str,
        images: Sequence[Source],
        settings: Settings,
        *,
        pictures: Sequence[Picture] = (),
        started: float,
        reuse: bool = False,
    ) -> Request:
        """Check a rendered prompt about known `pictures` and then `images`. Raises what `generate` does."""
        sampling, stop, max_new_tokens = split_settings(settings)
        spec, count = self.spec.prompt, len(pictures) + len(images)
        check_count(text.count(spec.picture), count, spec)
        start = time.perf_counter()
        known = pictures if not images else [self._among(picture, count) for picture in pictures]
        pictures = (*known, *(self.picture(image, count) for image in images))
        times = {"load": self.load_ms, "preprocess": milliseconds(start) if images else 0.0}
        ids = prompt_ids(text, [picture.layout for picture in pictures], self.tokenizer.encode, spec)
        image_tokens = sum(picture.layout.rows for picture in pictures)
        if len(ids) >= self.max_context:
            raise PromptError(
                f"the prompt has {len(ids)} tokens ({image_tokens} of them image tokens{self._shares(pictures)}) and "
                f"the bundle's context is {self.max_context}: shorten it, or export with a larger --max-context"
            )
        if not ids:
            raise PromptError("the prompt is empty: write a question")
        digests = (picture.digest for picture in pictures for _ in range(picture.layout.rows))
        return Request(
            ids=tuple(ids),
            keys=tuple(next(digests) if token == spec.image_token_id else token for token in ids),
            pictures=pictures,
            image_tokens=image_tokens,
            blocks=blocks_of(ids, self.spec),
            sampling=sampling,
            stop=(*stop, *spec.stop),
            max_new_tokens=max_new_tokens,
            room=self.max_context - len(ids),
            reuse=reuse,
            started=started,
            timings_ms=times,
        )

    def speak(self, request: Request) -> Generator[str, None, Answer]:
        """Yield the answer to a checked request; returns the whole."""
        context = self._contexts.take(request)
        return (yield from speak(dataclasses.replace(self._speaker, context=context), request))

    def _generate(
        self, prompt: str, images: Sequence[Source], system: str | None, raw: bool, settings: Settings
    ) -> Generator[str, None, Answer]:
        started = time.perf_counter()
        if raw and system is not None:
            raise PromptError("a raw prompt is taken as it is: write the system message into it")
        if not raw:
            prompt = render(
                [*system_message(system), user_message(prompt, len(images), self.spec.prompt)], self.spec.prompt
            )
        return self.speak(self.request(prompt, images, settings, started=started))

    def _among(self, picture: Picture, pictures: int) -> Picture:
        """A known picture as one of so many in its prompt."""
        if picture.image is None or layout_of(picture.layout.size, self.spec, pictures) == picture.layout:
            return picture
        return self.picture(picture.image, pictures)

    def _shares(self, pictures: Sequence[Picture]) -> str:
        """What each picture took, where that depends on the picture."""
        if self.spec.tiling is None:
            return ""
        each = [f"{p.layout.rows} for {p.layout.size[1]} × {p.layout.size[0]} pixels" for p in pictures[:3]]
        return f": {', '.join(each)}{', …' if len(pictures) > 3 else ''}"

    def _picture_rows(self, picture: Picture, times: dict[str, float]) -> Floats:
        if picture.digest in self._rows:
            self._rows.move_to_end(picture.digest)
            return self._rows[picture.digest]
        self.encoded += 1
        start = time.perf_counter()
        features = _in_turns(self.vision_encoder, picture.pixels)
        times["vision"] += milliseconds(start)
        start = time.perf_counter()
        rows = pack(_in_turns(self.projector, features), self.spec, picture.layout, self._newline)
        times["projector"] += milliseconds(start)
        self._rows[picture.digest] = rows
        if len(self._rows) > self._rows_kept:
            self._rows.popitem(last=False)
        return rows


def _in_turns(encoder: Encoder, x: Floats) -> Floats:
    """All tiles of a picture, a few at a time: attention within a tile takes T² numbers a head."""
    if len(x) <= _TILES_AT_ONCE:
        return encoder.run(x)
    return np.concatenate([encoder.run(x[n : n + _TILES_AT_ONCE]) for n in range(0, len(x), _TILES_AT_ONCE)])


def _answer(stop: StopIteration) -> Answer:
    assert isinstance(stop.value, Answer)
    return stop.value
