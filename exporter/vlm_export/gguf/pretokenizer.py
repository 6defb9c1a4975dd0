"""Which of llama.cpp's tokenizers and pre-tokenizers a checkpoint's may be: likely ones first, to be tried in turn.

Names and what each splits on are llama.cpp's (`llama_vocab::impl::load` and `llm_tokenizer_bpe`, release 0.5.0).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # built into ByteLevel
_DIGIT = r"\p{N}"
_SPACE = "\u2581"
_CASED = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_SYMBOLS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
_START = r"[^\r\n\p{L}\p{N}]?"
_LLAMA3 = _SHORT + "|" + _START + r"\p{L}+|\p{N}{1,3}" + _SYMBOLS + _REST
_QWEN2 = _SHORT + "|" + _START + r"\p{L}+|\p{N}" + _SYMBOLS + _REST
_QWEN35 = _SHORT + "|" + _START + r"[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _REST
_TEKKEN = f"{_START}{_CASED}*{_LOWER}+|{_START}{_CASED}+{_LOWER}*" + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _REST
_GPT4O = (
    f"{_START}{_CASED}*{_LOWER}+{_SHORT}?|{_START}{_CASED}+{_LOWER}*{_SHORT}?"
    + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*"
    + _REST
)
# What a byte-level tokenizer splits on → llama.cpp's names: words taken whole (ignore_merges) and not.
_KNOWN: Mapping[tuple[str, ...], tuple[str, str]] = {
    (_GPT2,): ("gpt-2", "gpt-2"),
    (_DIGIT, _GPT2): ("smollm", "smollm"),
    (_LLAMA3,): ("llama-bpe", "dbrx"),
    (_QWEN2,): ("qwen2", "qwen2"),
    (_QWEN35,): ("qwen35", "qwen35"),
    (_TEKKEN,): ("tekken", "tekken"),
    (_GPT4O,): ("gpt-4o", "gpt-4o"),
}
# One name for each way of splitting bytes that llama.cpp has.
_NAMES = (
    "gpt-2",
    "smollm",
    "llama-bpe",
    "dbrx",
    "qwen2",
    "qwen35",
    "tekken",
    "gpt-4o",
    "granite-embed-multi-97m",  # gpt-4o with combining marks as letters
    "falcon",
    "deepseek-llm",
    "deepseek-coder",
    "deepseek-v3",
    "default",
    "stablelm2",
    "chatglm-bpe",
    "glm4",
    "starcoder",
    "command-r",
    "poro-chat",
    "viking",
    "chameleon",
    "superbpe",
    "bailingmoe",
    "seed-coder",
    "hunyuan-dense",
    "minicpm5",
    "youtu",
    "jais-2",
    "exaone-moe",
    "tiny_aya",
    "ufakzeka",
    "afmoe",
    "laguna",
    "spark2_5",
)


@dataclass(frozen=True)
class Choice:
    """One of llama.cpp's tokenizers: the values of tokenizer.ggml.model and tokenizer.ggml.pre.

    `spaces` says that tokens hold U+2581 for spaces and that bytes are written <0x00>, as SentencePiece does.
    """

    model: str
    pre: str
    spaces: bool = False


def choices(tokenizer: Mapping[str, Any], *, prefix: bool) -> list[Choice]:
    """What a tokenizer.json (of a BPE model) may be in llama.cpp, the likely ones first; `prefix`: of a Target."""
    if has_spaces(tokenizer):
        merged = [Choice("gpt2", "sarvam-moe", spaces=True), Choice("gemma4", "gemma4", spaces=True)]
        return [Choice("llama", "default", spaces=True), *([] if prefix else merged)]
    whole, merged_only = _KNOWN.get(tuple(_splits(tokenizer.get("pre_tokenizer"))), ("", ""))
    likely = whole if tokenizer["model"].get("ignore_merges") else merged_only
    return [Choice("gpt2", name) for name in dict.fromkeys([likely, *_NAMES]) if name]


def has_spaces(tokenizer: Mapping[str, Any]) -> bool:
    """True where U+2581 stands for a space, as in SentencePiece; False for GPT-2's bytes."""
    steps = [*_flat(tokenizer.get("normalizer")), *_flat(tokenizer.get("pre_tokenizer"))]
    return any(
        step.get("type") == "Metaspace" or (step.get("type") == "Replace" and step.get("content") == _SPACE)
        for step in steps
    )


def prepends(tokenizer: Mapping[str, Any]) -> bool:
    """True where a U+2581 is written before the text."""
    for step in [*_flat(tokenizer.get("normalizer")), *_flat(tokenizer.get("pre_tokenizer"))]:
        if step.get("type") == "Prepend":
            return True
        if step.get("type") == "Metaspace":
            return bool(step.get("add_prefix_space", True)) and step.get("prepend_scheme", "always") != "never"
    return False


@dataclass(frozen=True)
class Target:
    """A checkpoint's tokenizer as far as llama.cpp can be it: llama.cpp has to agree with it everywhere.

    `tokenizer` is the tokenizer.json without what llama.cpp leaves out or always does, `prefix` its add_space_prefix,
    `notes` a sentence for each such limit; with the checkpoint's own tokenizer it agrees where they do not matter.
    `described` names the checkpoint's pre-tokenizer.
    """

    tokenizer: Mapping[str, Any]
    prefix: bool
    notes: tuple[str, ...]
    described: str


def target(tokenizer: Mapping[str, Any], *, starts_with_token: bool) -> Target:
    """What llama.cpp can make of a tokenizer.json; `starts_with_token`: prompts start with a special token.

    Metaspace "first" writes a space before a text unless a special token stands there. llama.cpp writes it always
    (again after each special token) or never: what the prompts of the checkpoint need.
    """
    out, notes = dict(tokenizer), []
    if any(step.get("type") == "NFC" for step in _flat(out.get("normalizer"))):
        out["normalizer"] = _without(out["normalizer"], "NFC")
        notes.append("llama.cpp does not compose characters (NFC): decomposed accents get other ids there")
    metaspace = next((s for s in _flat(out.get("pre_tokenizer")) if s.get("type") == "Metaspace"), None)
    prefix = prepends(tokenizer)
    if runs := [token for token in out.get("added_tokens") or [] if _is_blank(token, out)]:
        out["added_tokens"] = [token for token in out["added_tokens"] if token not in runs]
        notes.append("llama.cpp reads U+2581 in a text as a space")
    if metaspace is not None:
        first = metaspace.get("prepend_scheme") == "first"
        if prefix and first and starts_with_token:
            prefix = False
            notes.append("llama.cpp writes no space before a text that starts without a special token")
        elif prefix:
            after = " and after special tokens" if first else ""
            notes.append(f"llama.cpp writes a space before every text{after}, also where one stands there")
        kept = [
            step for step in _flat(out.get("normalizer")) if step.get("content") != 2 * _SPACE
        ]  # two for a first one
        steps = [*kept, *([{"type": "Prepend", "prepend": _SPACE}] if prefix else [])]
        steps.append({"type": "Replace", "pattern": {"String": " "}, "content": _SPACE})
        split = {"type": "Split", "pattern": {"String": _SPACE}, "behavior": "MergedWithNext", "invert": False}
        out["normalizer"] = {"type": "Sequence", "normalizers": steps}
        out["pre_tokenizer"] = split if metaspace.get("split", True) else None
    return Target(out, prefix, tuple(notes), describe(tokenizer))


def _is_blank(token: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> bool:
    """A run of spaces kept as an added token (Gemma): llama.cpp would show it as it is written there."""
    blank = has_spaces(tokenizer) and not str(token["content"]).strip(_SPACE)
    return blank and not token.get("special") and token["content"] in tokenizer["model"]["vocab"]


def describe(tokenizer: Mapping[str, Any]) -> str:
    """The pre-tokenizer (and normalizer) in one short line, for messages."""
    names = [_name(step) for part in ("normalizer", "pre_tokenizer") for step in _flat(tokenizer.get(part))]
    return " + ".join(names) or "none"


def _name(step: Mapping[str, Any]) -> str:
    pattern = step.get("pattern")
    text = json.dumps(next(iter(pattern.values())), ensure_ascii=False) if isinstance(pattern, dict) else ""
    return f"{step.get('type')}({text if len(text) < 60 else text[:57] + '…'})" if text else str(step.get("type"))


def _splits(pre_tokenizer: Any) -> Iterator[str]:
    """The regular expressions that a byte-level pre-tokenizer splits on, in order; others by their JSON."""
    for step in _flat(pre_tokenizer):
        match step:
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}:
                continue
            case {"type": "ByteLevel", "add_prefix_space": False}:
                yield _GPT2
            case {"type": "Digits", "individual_digits": True}:
                yield _DIGIT
            case {"type": "Split", "pattern": {"Regex": str(regex)}, "invert": False}:
                yield regex
            case {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Removed", "invert": True}:
                yield regex
            case _:
                yield json.dumps(step, sort_keys=True)


def _flat(step: Any) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, sequences of sequences unrolled."""
    if not isinstance(step, dict):
        return
    inner = step.get("normalizers", step.get("pretokenizers"))
    if step.get("type") == "Sequence" and isinstance(inner, list):
        for one in inner:
            yield from _flat(one)
    else:
        yield step


def _without(normalizer: Any, kind: str) -> dict[str, Any] | None:
    kept = [step for step in _flat(normalizer) if step.get("type") != kind]
    return {"type": "Sequence", "normalizers": kept} if kept else None
