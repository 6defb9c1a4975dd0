"""What Python makes of pictures, prompts, tokens and logits, as JSON for the tests of the browser runtime."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from running import running_spec
from test_prompt import CONVERSATIONS, SPEC_OF
from test_tiling import spec_of
from tiled import SIZES, noise
from tokenizers_like import LIKE, write_checkpoint
from vlm_models.errors import ImageError, PromptError
from vlm_models.plain import to_plain
from vlm_models.spec import PreprocessSpec, TilingSpec, VLMSpec
from vlm_runtime.image import preprocess
from vlm_runtime.prompt import render, user_message
from vlm_runtime.sampling import Sampler, Sampling
from vlm_runtime.text import TextStream
from vlm_runtime.tiling import layout_of, pack, tiles_of
from vlm_runtime.vlm import load

Json = dict[str, Any]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def bits(values: Any) -> str:
    """The bytes of an array or a picture, base64."""
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()


def pixels(image: Image.Image) -> Json:
    """A picture as the browser runtime takes it."""
    return {"width": image.width, "height": image.height, "data": bits(image)}


def resizing() -> Iterator[Json]:
    """Each of Pillow's filters, larger and smaller, on noise and on a picture of edges."""
    sizes = [
        ((41, 57), (32, 32)),
        ((127, 31), (24, 40)),
        ((57, 41), (130, 77)),
        ((1, 300), (5, 7)),
        ((64, 64), (64, 31)),
        ((3, 2), (40, 40)),
    ]
    for filter in range(6):
        for seed, ((height, width), to) in enumerate([*sizes, ((372, 500), (96, 72))]):
            edges = np.repeat(np.eye(height, width, dtype=np.uint8)[:, :, None] * 255, 3, axis=2)
            for image in (noise((height, width), seed), Image.fromarray(edges)):
                made = image.resize(to, Image.Resampling(filter))
                yield {"image": pixels(image), "to": to, "resample": filter, "expected": bits(made)}


def preprocessing() -> Iterator[Json]:
    """Each way of resizing, cropping and padding, on pictures of all shapes; an error where Python refuses one."""
    base = PreprocessSpec(32, "shortest_edge", 32, 3, 1 / 255, MEAN, STD)
    color = (122, 116, 104)
    specs = [
        base,
        dataclasses.replace(base, size=40, resample=2),
        dataclasses.replace(base, size=24),  # smaller than the crop: black around it
        dataclasses.replace(base, pad="square", pad_color=color, rescale=0.00392156862745098),
        dataclasses.replace(base, resize="exact", crop=0, resample=1),
        dataclasses.replace(base, resize="longest_edge", crop=0, pad_color=color, least=2),
        dataclasses.replace(base, resize="none", crop=0),
        dataclasses.replace(base, resize="none", crop=32),
    ]
    for spec in specs:
        for size in [(41, 57), (57, 41), (32, 32), (31, 33), (5, 3), (200, 9), (1, 1)]:
            image = noise(size, sum(size))
            case = {"spec": to_plain(spec), "image": pixels(image)}
            try:
                yield {**case, "expected": bits(preprocess(image, spec))}
            except ImageError as error:
                yield {**case, "error": str(error)}


def tiled_specs() -> dict[str, VLMSpec]:
    """A model of each way to cut pictures."""
    next_line, onevision = spec_of("llava_next"), spec_of("llava_onevision", 4)
    base = dataclasses.replace(onevision, preprocess=dataclasses.replace(onevision.preprocess, resize="exact"))
    ratio = TilingSpec("ratio", min_tiles=1, max_tiles=6, overview="last", before="<img>", after="</img>")
    split = TilingSpec("split", longest_edge=100, max_tiles=0, overview="last", before="<f>", after="<f>", tag="<g>")
    return {
        "whole": dataclasses.replace(next_line, tiling=None),
        "anyres": next_line,
        "onevision": onevision,
        "ratio": dataclasses.replace(base, tiling=ratio),
        "split": dataclasses.replace(base, tiling=split),
        "split alone": dataclasses.replace(base, tiling=dataclasses.replace(split, max_tiles=1)),
        "split as it is": dataclasses.replace(base, tiling=dataclasses.replace(split, longest_edge=0)),
    }


def tiling() -> Iterator[Json]:
    """Layouts of pictures of many sizes, and of some their tiles and packed rows."""
    for name, spec in tiled_specs().items():
        for size in SIZES:
            for pictures in (1, 2):
                case = {"name": name, "spec": spec.to_json(), "size": size, "pictures": pictures}
                try:
                    layout = layout_of(size, spec, pictures)
                    image = noise(size) if size in SIZES[5:15] else None
                    cut = None if image is None else tiles_of(image, spec, layout)
                except ImageError as error:
                    yield {**case, "error": str(error)}
                    continue
                made = {"grid": layout.grid, "tiles": layout.tiles, "text": layout.text, "runs": layout.runs}
                if image is not None:
                    rows = np.arange(layout.tiles * spec.tile_tokens * 32) % 1009 / 64
                    newline = np.linspace(-2, 2, 32, dtype=np.float32) if spec.tiling and spec.tiling.newline else None
                    shaped = rows.astype(np.float32).reshape(layout.tiles, -1, 32)
                    case |= {
                        "image": pixels(image),
                        "pixels": bits(cut),
                        "newline": None if newline is None else bits(newline),
                        "rows": bits(pack(shaped, spec, layout, newline)),
                    }
                yield {**case, "layout": made}


def prompts() -> Iterator[Json]:
    """Conversations through each template, and questions with pictures in the middle; an error where one is refused."""
    for name, spec in SPEC_OF.items():
        asked = [user_message("Left <image> and\n<image> right?", 2, spec), user_message(" \n<image>\n What?", 1, spec)]
        for messages in [*CONVERSATIONS.values(), *([message] for message in asked)]:
            case = {"name": name, "prompt": to_plain(spec), "messages": messages}
            try:
                yield {**case, "expected": render(messages, spec)}
            except PromptError:
                yield {**case, "expected": None}


TEXTS = (
    "What colour is the large circle?",
    "  Two  blanks,\ttabs\nand\n\n\nlines \n",
    "naïve café, Größe, 東京の天気, Привет, हिन्दी वाक्य, 한국어, 🙂👍🏽 and 1234567 isn't it?",
    "<image>\nBefore and <image> after</s>",
    "def f(x): return x ** 2  # done",
    "",
)


def tokens(folder: Path) -> Iterator[Json]:
    """Tokenizers like those of known families: ids of texts, and texts of ids as they come one by one."""
    from vlm_runtime.bundle import Bundle
    from vlm_runtime.tokenizer import Tokenizer

    for name, source in LIKE.items():
        made = source()
        checkpoint, spec = write_checkpoint(folder / name, running_spec(), made)
        manifest: Any = _Told(spec, "tokenizer.json")
        ours = Tokenizer(Bundle(checkpoint.folder, manifest))
        texts = []
        for text in TEXTS:
            ids = ours.encode(text)
            stream = TextStream(ours)
            pieces = [*(stream.push(token) for token in ids), stream.finish()]
            texts.append({"text": text, "ids": ids, "decoded": ours.decode(ids), "pieces": pieces})
        yield {"name": name, "tokenizer": made, "prompt": to_plain(spec.prompt), "texts": texts}


@dataclasses.dataclass(frozen=True)
class _Told:
    """As much of a manifest as a Tokenizer reads."""

    spec: VLMSpec
    tokenizer: str


def sampling() -> Iterator[Json]:
    """Tokens drawn with each setting and some seeds."""
    random = np.random.default_rng(3)
    cases: list[Mapping[str, Any]] = [
        {},
        {"repetition_penalty": 1.3},
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 40},
        {"temperature": 1.2, "top_p": 0.9},
        {"temperature": 0.9, "min_p": 0.05},
        {"temperature": 1.5, "top_k": 300, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.1},
    ]
    for case in cases:
        for seed in (0, 7, 2**40 + 5):
            logits = (random.standard_normal((6, 1500)) * 4).astype(np.float32)
            sampler, previous = Sampler(Sampling(**case, seed=seed)), [3, 5]
            for row in logits:
                previous.append(sampler.pick(row, previous))
            names = {_camel(name): value for name, value in case.items()}
            yield {"settings": {**names, "seed": seed}, "logits": bits(logits), "expected": previous[2:]}


def answers(bundle: Path, pictures: Sequence[Image.Image], *, exact: bool = True) -> Json:
    """What the bundle says to questions about `pictures`: alone, with a stop string, in turns.

    Without `exact` only the golden vectors must come out the same elsewhere.
    """
    vlm = load(bundle, threads=1)
    asked: list[Json] = [
        {"prompt": "What colour is it?", "images": 1, "settings": {"max_new_tokens": 24}},
        {"prompt": "Naïve 東京 🙂?", "images": 0, "settings": {"max_new_tokens": 24}},
        {"prompt": "Which one?", "images": 2, "settings": {"max_new_tokens": 12, "repetition_penalty": 1.2}},
        {"prompt": "Say it.", "images": 1, "settings": {"max_new_tokens": 12}, "system": "Be brief."},
    ]
    made = []
    for case in asked:
        about = pictures[: case["images"]]
        answer = vlm.answer(case["prompt"], about, system=case.get("system"), **case["settings"])
        settings = {_camel(name): value for name, value in case["settings"].items()}
        made.append({**case, "settings": settings, **_said(answer)})
    middle = made[0]["text"][3:6]
    if middle:
        answer = vlm.answer(asked[0]["prompt"], pictures[:1], max_new_tokens=24, stop=[middle])
        made.append({**asked[0], "settings": {"maxNewTokens": 24, "stop": middle}, **_said(answer)})
    chat, turns = vlm.chat(), list[Json]()
    for prompt, about in (("What is it?", pictures[:1]), ("Sure?", []), ("And this?", pictures[1:2])):
        text = "".join(chat.ask(prompt, about, max_new_tokens=8))
        assert chat.last is not None
        turns.append({"prompt": prompt, "images": len(about), "text": text, "tokenIds": chat.last.token_ids})
    shown = [pixels(one) for one in pictures]
    return {"folder": str(bundle), "pictures": shown, "asked": made, "turns": turns, "exact": exact}


def _said(answer: Any) -> Json:
    return {
        "text": answer.text,
        "tokenIds": answer.token_ids,
        "promptTokens": answer.prompt_tokens,
        "finishReason": answer.finish_reason,
    }


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)


def write(folder: Path, name: str, cases: Any) -> None:
    """cases as `folder`/`name`.json."""
    (folder / f"{name}.json").write_text(json.dumps(cases if isinstance(cases, dict) else list(cases)), "utf-8")
