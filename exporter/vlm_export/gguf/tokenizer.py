"""The checkpoint's tokenizer as GGUF fields, proved against the checkpoint's own by running llama.cpp's on them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vlm_export.gguf.architecture import Value
from vlm_export.gguf.corpus import texts, texts_with
from vlm_export.gguf.pretokenizer import Choice, Target, choices, has_spaces, target
from vlm_export.gguf.vocab_check import (
    Case,
    Difference,
    LoadedVocabulary,
    cases,
    differences,
    loaded,
    write_vocabulary,
)
from vlm_export.gguf.vocabulary import Vocabulary, read_vocabulary, scores
from vlm_export.target import Progress, silent
from vlm_models.checkpoint import Checkpoint
from vlm_models.errors import CheckpointError, PromptError
from vlm_models.processor import read_tokenizer_config, tokenizer_json
from vlm_models.spec import PromptSpec, VLMSpec
from vlm_runtime.prompt import render, user_message

Mode = Literal["checked", "none"]

_WHAT_TO_DO = "--gguf-tokenizer none writes a GGUF without vocabulary, which vlm-run reads and llama-server does not"
_TRIED = 96  # added tokens of one vocabulary that texts are made with
# Rendered as vlm_runtime.prompt renders a conversation of a checkpoint without a template: LLaVA-1.5's form.
_LLAVA = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' }}{% elif message['role'] == 'assistant' %}{{ 'ASSISTANT: ' }}"
    "{% elif message['role'] != 'system' %}{{ raise_exception('unknown role ' ~ message['role']) }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% set at = namespace(start=true) %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ IMAGE }}{% if at.start %}{{ '\\n' }}{% endif %}"
    "{% else %}{% set at.start = false %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ EOS }}{% else %}{{ ' ' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@dataclass(frozen=True)
class TokenizerFields:
    """`values` are GGUF keys (tokenizer.* and general.name) for the file; `details` go into `Part.details`.

    `details` holds model, pre, texts (compared), equal (ids as the checkpoint's own gives them), also_ends (tokens at
    which llama.cpp ends an answer of its own accord) and notes: what llama.cpp does otherwise, whatever a file says.
    """

    values: Mapping[str, Value]
    details: Mapping[str, Any]


def tokenizer_fields(
    checkpoint: Checkpoint, spec: VLMSpec, *, mode: Mode = "checked", progress: Progress = silent
) -> TokenizerFields:
    """The tokenizer of `checkpoint` for a GGUF file: of llama.cpp's, the one whose ids are right on every text.

    `mode` "none" leaves the vocabulary out. Raises CheckpointError naming the pre-tokenizer and the first text that
    differs where llama.cpp has none that is right, DependencyError where llama-cpp-python is not installed.
    """
    template = chat_template(spec.prompt)
    if mode == "none":
        none: dict[str, Value] = {"tokenizer.ggml.model": "none", "tokenizer.chat_template": template}
        note = "the GGUF has no vocabulary: vlm-run runs it, llama-server does not"
        return TokenizerFields({**none, "general.name": spec.name}, {"model": "none", "notes": [note]})
    source = json.loads(tokenizer_json(checkpoint))
    _check_supported(checkpoint, source)
    able = target(source, starts_with_token=_starts_with_token(source, spec.prompt))
    own = _tokenizer(source, spec.prompt)
    limited = any(source.get(key) is not value for key, value in able.tokenizer.items())
    other = _tokenizer(able.tokenizer, spec.prompt) if limited else own
    what = f"{checkpoint.folder}: the tokenizer"
    tokens = read_vocabulary(other, able.tokenizer, spec.language.vocab_size, what)
    specials = {**_specials(own, tokens, checkpoint, spec), "tokenizer.chat_template": template}
    chosen = [*texts(), *texts_with(_telling(tokens, spec.prompt))]
    table = len(tokens.texts)
    expected = [case for case in cases(other, chosen) if max(case.special, default=0) < table]
    proof = _prove(checkpoint, spec, able, tokens, specials, other, expected, progress)
    real = cases(own, [case.text for case in expected]) if limited else expected
    same = [a.ids == b.ids and a.special == b.special for a, b in zip(expected, real, strict=True)]
    equal = sum(one and case.text not in proof.excused for one, case in zip(same, expected, strict=True))
    values = {**_vocabulary_fields(proof.choice, able, tokens), **specials, "general.name": proof.name}
    notes = [*(able.notes if not all(same) else ()), *proof.notes]
    found = {"model": proof.choice.model, "pre": proof.choice.pre, "texts": len(expected), "equal": equal}
    return TokenizerFields(values, {**found, "also_ends": list(proof.also_ends), "notes": notes})


def chat_template(prompt: PromptSpec) -> str:
    """The checkpoint's Jinja template, or LLaVA-1.5's form where it has none."""
    if prompt.chat_template is not None:
        return prompt.chat_template
    return _LLAVA.replace("IMAGE", json.dumps(prompt.image_token)).replace("EOS", json.dumps(prompt.eos_token or ""))


@dataclass(frozen=True)
class _Proof:
    """The tokenizer and general.name with which llama.cpp agrees, but for `excused` texts with the image token."""

    choice: Choice
    name: str
    excused: frozenset[str]
    also_ends: tuple[str, ...]
    notes: tuple[str, ...]


def _prove(
    checkpoint: Checkpoint,
    spec: VLMSpec,
    able: Target,
    tokens: Vocabulary,
    specials: Mapping[str, Value],
    other: Any,
    expected: Sequence[Case],
    progress: Progress,
) -> _Proof:
    """Try llama.cpp's tokenizers until one agrees. llama.cpp cuts a prompt at its own image marker, never at ours."""
    tried = [(c, n) for c in choices(able.tokenizer, prefix=able.prefix) for n in _names(spec.name, tokens)]
    order = {case.text: i for i, case in enumerate(expected)}
    furthest: tuple[int, Difference] | None = None
    with tempfile.TemporaryDirectory() as folder:
        files: dict[str, Path] = {}
        for done, (choice, name) in enumerate(tried):
            progress("tokenizer", done, len(tried))
            if choice.model not in files:
                files[choice.model] = Path(folder) / f"{choice.model}.gguf"
                write_vocabulary(files[choice.model], {**_vocabulary_fields(choice, able, tokens), **specials})
            excused = set()
            try:
                with loaded(files[choice.model], pre=choice.pre, name=name) as vocab:
                    for difference in differences(vocab, expected, leading_space=choice.spaces):
                        if not _by_blanks(vocab, other, difference.text, spec.prompt.image_token, choice.spaces):
                            break
                        excused.add(difference.text)
                    else:
                        progress("tokenizer", len(tried), len(tried))
                        return _Proof(choice, name, frozenset(excused), *_ends(vocab, tokens, spec.prompt, excused))
            except CheckpointError as error:
                difference = Difference("", "", str(error))
            at = order[difference.text]
            if furthest is None or at > furthest[0]:
                furthest = at, difference
    assert furthest is not None
    raise CheckpointError(
        f"{checkpoint.folder}: llama.cpp has no tokenizer like this one (pre-tokenizer "
        f"{able.described}): {furthest[1]}; {_WHAT_TO_DO}"
    )


def _by_blanks(vocab: LoadedVocabulary, other: Any, text: str, image_token: str, spaces: bool) -> bool:
    """Whether nothing but the blanks around the image token makes llama.cpp's ids of `text` other ones."""
    bare = image_token.join(piece.strip() for piece in text.split(image_token))
    return bare != text and not list(differences(vocab, cases(other, [bare]), leading_space=spaces))


def _starts_with_token(source: Mapping[str, Any], prompt: PromptSpec) -> bool:
    """Whether the prompts of this checkpoint start with an added token (not with text), its own BOS left aside."""
    try:
        text = render([user_message("text", 1, prompt)], prompt)
    except PromptError:
        return False
    return any(text.startswith(str(token["content"])) for token in source.get("added_tokens") or [])


def _names(name: str, tokens: Vocabulary) -> list[str]:
    """Values of general.name to try: llama.cpp strips blanks after special tokens in a model called Phi-3."""
    plain = name.replace("hi-3", "hi 3").replace("hi3", "hi 3").replace("HI-3", "HI 3").replace("HI3", "HI 3")
    return list(dict.fromkeys([name, plain, *([f"{name} (phi-3)"] if tokens.strips else [])]))


def _ends(
    vocab: LoadedVocabulary, tokens: Vocabulary, prompt: PromptSpec, excused: set[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Tokens that end an answer in llama.cpp only, and notes: on those that do not end it there, on blanks."""
    also = [tokens.texts[i] for i in sorted(tokens.added) if i not in prompt.eos_token_ids and vocab.ends(i)]
    missing = [tokens.texts[i] for i in prompt.eos_token_ids if i < len(tokens.texts) and not vocab.ends(i)]
    notes = [f"llama.cpp does not end an answer at {', '.join(missing)}"] if missing else []
    if excused:
        notes.append(f"llama.cpp reads blanks around {prompt.image_token} otherwise")
    return tuple(also), tuple(notes)


def _vocabulary_fields(choice: Choice, able: Target, tokens: Vocabulary) -> dict[str, Value]:
    """tokenizer.ggml.*: what the vocabulary is, for one of llama.cpp's tokenizers."""
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in able.tokenizer["model"]["merges"]]
    fields: dict[str, Value] = {
        "tokenizer.ggml.model": choice.model,
        "tokenizer.ggml.pre": choice.pre,
        "tokenizer.ggml.tokens": list(tokens.texts),
        "tokenizer.ggml.token_type": list(tokens.types),
    }
    if choice.model == "llama":
        fields["tokenizer.ggml.scores"] = scores(tokens.texts, merges)
        fields["tokenizer.ggml.add_space_prefix"] = able.prefix
    else:
        fields["tokenizer.ggml.merges"] = [" ".join(merge) for merge in merges]
    return fields


def _specials(own: Any, tokens: Vocabulary, checkpoint: Checkpoint, spec: VLMSpec) -> dict[str, Value]:
    """Ids of the special tokens, and what is written before and after a text."""
    ids = {text: i for i, text in enumerate(tokens.texts)}
    config = read_tokenizer_config(checkpoint)

    def named(key: str) -> int | None:
        value = config.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        return ids.get(text) if isinstance(text, str) else None

    plain, full = own.encode("a", add_special_tokens=False).ids, own.encode("a", add_special_tokens=True).ids
    start = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
    before, after = full[:start], full[start + len(plain) :]
    if len(before) > 1 or len(after) > 1:
        raise CheckpointError(
            f"{checkpoint.folder}: the tokenizer writes {len(before)} special tokens before a text and {len(after)} "
            f"after it, llama.cpp writes at most one each; {_WHAT_TO_DO}"
        )
    endings = list(dict.fromkeys(i for i in spec.prompt.eos_token_ids if i < len(tokens.texts)))
    named_eos = named("eos_token")
    eos = after[0] if after else named_eos if named_eos in endings or not endings else endings[0]
    others = [i for i in endings if i != eos]
    bos = before[0] if before else named("bos_token")
    found = {
        "bos": eos if bos is None else bos,  # llama.cpp would take id 1 or 11
        "eos": eos,
        "eot": others[0] if others else None,
        "eom": others[1] if len(others) > 1 else None,
        "unknown": named("unk_token"),
        "padding": named("pad_token"),
    }
    values: dict[str, Value] = {
        f"tokenizer.ggml.{name}_token_id": int(token) for name, token in found.items() if token is not None
    }
    return {
        **values,
        "tokenizer.ggml.add_bos_token": bool(before),
        "tokenizer.ggml.add_eos_token": bool(after),
    }


def _telling(tokens: Vocabulary, prompt: PromptSpec) -> list[str]:
    """The added tokens that texts are made with: all where there are few, else those of every kind first."""
    found = [tokens.texts[i] for i in sorted(tokens.added, key=lambda i: (tokens.plain(i), i))]
    known = [t for t in found if t != prompt.image_token]
    return ([prompt.image_token] if prompt.image_token in found else []) + known[: _TRIED - 1]


def _tokenizer(source: Mapping[str, Any], prompt: PromptSpec) -> Any:
    """The tokenizers library's, as the runtime uses it."""
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer.from_str(json.dumps(source))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if prompt.image_token_id not in tokenizer.get_added_tokens_decoder():
        tokenizer.add_special_tokens([AddedToken(prompt.image_token, normalized=False)])
    return tokenizer


def _check_supported(checkpoint: Checkpoint, source: Mapping[str, Any]) -> None:
    """Raises CheckpointError for what no choice can express, before llama.cpp sees it."""
    for reason in _unsupported(source):
        raise CheckpointError(f"{checkpoint.folder}: {reason}; {_WHAT_TO_DO}")


def _unsupported(source: Mapping[str, Any]) -> Iterator[str]:
    model = source.get("model") or {}
    kind = model.get("type") or ("BPE" if "merges" in model else "unknown")
    if kind != "BPE":
        yield f"the tokenizer is {kind}, GGUF files of this exporter take BPE (byte-level, or SentencePiece's)"
    elif not model.get("merges"):
        yield "the tokenizer is a BPE without merges, which llama.cpp does not read"
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        yield "the tokenizer marks the inside or the end of words, which llama.cpp's BPE does not know"
    if has_spaces(source):
        missing = [f"<0x{i:02X}>" for i in range(256) if f"<0x{i:02X}>" not in model.get("vocab", {})]
        if missing:
            yield f"the tokenizer lacks {len(missing)} tokens for bytes ({missing[0]} …), which llama.cpp needs"
