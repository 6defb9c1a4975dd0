"""Small tokenizers trained here, each built as the tokenizer.json of a known family is."""

from __future__ import annotations

import dataclasses
import functools
import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from vlm_models.checkpoint import Checkpoint
from vlm_models.spec import PromptSpec, VLMSpec

IMAGE = "<image>"
_WORDS = (
    "the The large circle is red , isn't it ? I'll say we've dogs and cats ; they're at on DON'T SHOUT : it's "
    "'fine' he'd said so I'm sure ! def f(x): return x ** 2 # done if a != b pass naïve café Größe École "
    "東京の天気は晴れです 中文字符測試 한국어 문장 ภาษาไทย Привет мир שלום עולם مرحبا بالعالم हिन्दी वाक्य 🙂 👍🏽 "
    "user assistant system USER: ASSISTANT: picture describe colour square 12 345 2026 10:30 1,000,000 0x1F ١٢٣ "
    "https://example.org/path?q=1 of that there here "
)
_GAPS = (" ", " ", " ", " ", "  ", "\n", "\n\n", "\n    ", "\t", "   ", "")


def _text() -> str:
    """The words in random order with all kinds of gaps, some digits and letters between them."""
    chance, words = random.Random(0), _WORDS.split()
    parts = []
    for _ in range(6000):
        word = chance.choice(words) if chance.random() < 0.8 else str(chance.randrange(2000))
        parts += [word, chance.choice(_GAPS)]
    return "".join(parts)


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
Json = dict[str, Any]


def byte_level(*, use_regex: bool = True, add_prefix_space: bool = False) -> Json:
    """The ByteLevel step of pre_tokenizer, post_processor and decoder."""
    return {
        "type": "ByteLevel",
        "add_prefix_space": add_prefix_space,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def split(regex: str) -> Json:
    """Split on a regular expression, then bytes."""
    isolated = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [isolated, byte_level(use_regex=False)]}


def added(token: int, content: str, **flags: bool) -> Json:
    """One entry of added_tokens."""
    usual = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": token, "content": content, **usual, **flags}


def template(bos: str, token: int) -> Json:
    """A post-processor that writes `bos` before the text."""
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [first, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [token], "tokens": [bos]}},
    }


def _json(model: Json, tokens: Sequence[Json], **parts: Any) -> Json:
    steps = {"normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None, **parts}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(tokens),
        **steps,
        "model": model,
    }


def _bpe(vocab: Mapping[str, int], merges: Sequence[Sequence[str]], **options: Any) -> Json:
    usual = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    }
    return {**usual, **options, "vocab": dict(vocab), "merges": [list(m) for m in merges]}


@functools.cache
def _trained(kind: str) -> tuple[list[str], list[list[str]]]:
    """Tokens in the order of their making and their merges: `bytes`, or words behind U+2581."""
    tokenizer = Tokenizer(models.BPE())
    if kind == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        alphabet = []
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_text().splitlines(keepends=True), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].__getitem__), model["merges"]


def bytes_like(pre: Json, specials: Sequence[str], **options: Any) -> Json:
    """A byte-level BPE with `pre` as pre-tokenizer; `options` are parts of the file, or of its model."""
    tokens, merges = _trained("bytes")
    parts = {k: options.pop(k) for k in ("normalizer", "post_processor") if k in options}
    names = [*specials, IMAGE]
    vocab = {t: i for i, t in enumerate(tokens)}
    more = [added(len(tokens) + i, name) for i, name in enumerate(names)]
    more += options.pop("more", [])
    return _json(_bpe(vocab, merges, **options), more, pre_tokenizer=pre, decoder=byte_level(), **parts)


def pieces_like(
    *,
    more: Sequence[Json] = (),
    extra: Sequence[str] = (),
    prepend: bool = True,
    image: Mapping[str, bool] | None = None,
    trained: bool = False,
    **parts: Any,
) -> Json:
    """A BPE with U+2581 and byte fallback; its merges are all the ways to build each piece, as converters write them.

    `more` and `image` (flags of the image token) are added tokens, `extra` are pieces before all others; `trained`
    keeps the merges that training found, one for each piece.
    """
    words, found = _trained("pieces")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *dict.fromkeys([*extra, "▁", *words])]
    vocab = {t: i for i, t in enumerate(tokens)}
    ranked = [t for t in dict.fromkeys([*extra, *words]) if len(t) > 1]
    merges = [(t[:i], t[i:]) for t in ranked for i in range(1, len(t)) if t[:i] in vocab and t[i:] in vocab]
    merges = [(left, right) for left, right in found] if trained else merges
    specials = [added(i, t) for i, t in enumerate(("<unk>", "<s>", "</s>"))]
    end = len(tokens)
    for token in [*more, {"content": IMAGE, "flags": dict(image or {})}]:
        known = vocab.get(token["content"])
        specials.append(added(end if known is None else known, token["content"], **token.get("flags", {})))
        end += known is None
    model = _bpe(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    steps: list[Json] = [{"type": "Prepend", "prepend": "▁"}] if prepend else []
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
    decoders: list[Json] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prepend:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    usual = {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "post_processor": template("<s>", 1),
        "decoder": {"type": "Sequence", "decoders": decoders},
    }
    return _json(model, specials, **{**usual, **parts})


def _llama3() -> Json:
    end = len(_trained("bytes")[0])
    process = {"type": "Sequence", "processors": [byte_level(), template("<|begin_of_text|>", end)]}
    names = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    return bytes_like(split(LLAMA3), names, post_processor=process, ignore_merges=True)


def _gemma() -> Json:
    runs = ["\n", "\n\n", "\n\n\n", "▁▁", "▁▁▁", "▁▁▁▁", "<table>"]
    blanks = [{"content": c, "flags": {"special": False}} for c in runs]
    turns = [{"content": c} for c in ("<start_of_turn>", "<end_of_turn>", "<unused0>")]
    words = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    return pieces_like(prepend=False, extra=runs, more=[*blanks, *turns], normalizer=replace, pre_tokenizer=words)


def _phi3() -> Json:
    names = ("<|endoftext|>", "<|assistant|>", "<|user|>", "<|end|>")
    out = pieces_like(
        more=[{"content": n, "flags": {"rstrip": n != "<|endoftext|>"}} for n in names], image={"rstrip": True}
    )
    out["added_tokens"][2]["rstrip"] = True  # </s>
    return out


def _mistral() -> Json:
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    decoder = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
    return pieces_like(
        normalizer=None, pre_tokenizer=space, decoder=decoder, more=[{"content": "[INST]"}, {"content": "[/INST]"}]
    )


def _smollm() -> Json:
    steps = [{"type": "Digits", "individual_digits": True}, byte_level()]
    return bytes_like({"type": "Sequence", "pretokenizers": steps}, CHATML)


CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LIKE: Mapping[str, Callable[[], Json]] = {
    "gpt2": lambda: bytes_like(byte_level(), CHATML[:1], post_processor=byte_level()),
    "smollm": _smollm,
    "llama3": _llama3,
    "qwen2": lambda: bytes_like(split(QWEN2), CHATML, normalizer={"type": "NFC"}, post_processor=byte_level()),
    "tekken": lambda: bytes_like(split(TEKKEN), ("<s>", "</s>", "[INST]", "[/INST]"), ignore_merges=True),
    "llama2": pieces_like,
    "mistral": _mistral,
    "gemma": _gemma,
    "phi3": _phi3,
}


ENDS = ("</s>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end|>", "<end_of_turn>")


def write_checkpoint(
    folder: Path,
    base: VLMSpec,
    source: Json,
    *,
    name: str = "ours",
    rows: int | None = None,
    config: Mapping[str, Any] | None = None,
    template: str | None = None,
) -> tuple[Checkpoint, VLMSpec]:
    """A checkpoint that is nothing but a tokenizer, and `base` as its spec: `rows` of table, this chat template."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(json.dumps(source), "utf-8")
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    known = {t["content"]: int(t["id"]) for t in source["added_tokens"]}
    prompt = PromptSpec(
        image_token=IMAGE,
        image_token_id=known[IMAGE],
        image_tokens=4,
        eos_token_ids=tuple(known[t] for t in ENDS if t in known),
        eos_token="</s>" if "</s>" in known else None,
        chat_template=template,
    )
    size = rows or max(len(source["model"]["vocab"]), *(i + 1 for i in known.values()))
    language = dataclasses.replace(base.language, vocab_size=size)
    spec = dataclasses.replace(base, name=name, prompt=prompt, language=language)
    return Checkpoint(folder, name, {}, {}, spec.fingerprint), spec
