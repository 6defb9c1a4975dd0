"""llama.cpp's tokenizer on a vocabulary without a model, compared with the checkpoint's tokenizer text by text."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFValueType, GGUFWriter

from vlm_export.gguf.architecture import Value
from vlm_models.errors import CheckpointError
from vlm_runtime import llama

_STRING = 3  # llama_model_kv_override_type


@dataclass(frozen=True)
class Case:
    """A text and what the checkpoint's tokenizer makes of it: its ids, those with special tokens, and back to text."""

    text: str
    ids: tuple[int, ...]
    special: tuple[int, ...]
    decoded: str


@dataclass(frozen=True)
class Difference:
    """A text on which two tokenizers disagree."""

    text: str
    expected: str
    got: str

    def __str__(self) -> str:
        return f"{_short(self.text)} gives {_cut(self.got)} instead of {_cut(self.expected)}"


def cases(tokenizer: Any, texts: Sequence[str]) -> list[Case]:
    """What `tokenizer` (of the tokenizers library) makes of each text."""
    out = []
    for text in texts:
        ids = tuple(tokenizer.encode(text, add_special_tokens=False).ids)
        special = tuple(tokenizer.encode(text, add_special_tokens=True).ids)
        out.append(Case(text, ids, special, str(tokenizer.decode(list(ids), skip_special_tokens=False))))
    return out


def write_vocabulary(path: Path, fields: Mapping[str, Value]) -> None:
    """A GGUF without tensors: what llama.cpp loads when only the vocabulary is asked for."""
    writer = GGUFWriter(path, "llama")
    kinds = {
        bool: GGUFValueType.BOOL,
        int: GGUFValueType.UINT32,
        float: GGUFValueType.FLOAT32,
        str: GGUFValueType.STRING,
    }
    for key, value in fields.items():
        if value != []:
            writer.add_key_value(key, value, GGUFValueType.ARRAY if isinstance(value, list) else kinds[type(value)])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


class LoadedVocabulary:
    """llama.cpp's tokenizer; made by `loaded`."""

    def __init__(self, library: Any, model: Any) -> None:
        self._lib = library
        self._vocab = library.llama_model_get_vocab(model)
        self.size = int(library.llama_vocab_n_tokens(self._vocab))

    def encode(self, text: str, *, add_special: bool = False) -> list[int]:
        """Token ids; special tokens written in `text` are read as such, as the tokenizers library does."""
        data = text.encode("utf-8")
        room = len(data) + 8
        ids = (ctypes.c_int32 * room)()
        count = self._lib.llama_tokenize(self._vocab, data, len(data), ids, room, add_special, True)
        if count < 0:
            room = -count
            ids = (ctypes.c_int32 * room)()
            count = self._lib.llama_tokenize(self._vocab, data, len(data), ids, room, add_special, True)
        return list(ids[:count])

    def pieces(self, ids: Sequence[int]) -> str:
        """The texts of `ids` one after the other, as a server streams them."""
        out = b""
        for token in ids:
            room = 64
            while True:
                buffer = ctypes.create_string_buffer(room)
                count = self._lib.llama_token_to_piece(self._vocab, token, buffer, room, 0, True)
                if count >= 0:
                    break
                room = -count
            out += buffer.raw[:count]
        return out.decode("utf-8", "replace")

    def ends(self, token: int) -> bool:
        """Whether an answer ends at this token."""
        return bool(self._lib.llama_vocab_is_eog(self._vocab, token))


@contextlib.contextmanager
def loaded(path: Path, **override: str) -> Iterator[LoadedVocabulary]:
    """Load the vocabulary of a GGUF, with other values of the string keys in `override` (model, pre, name).

    Raises CheckpointError with llama.cpp's reason, DependencyError where llama-cpp-python is not installed.
    """
    lib = llama.library()
    keys = {"model": "tokenizer.ggml.model", "pre": "tokenizer.ggml.pre", "name": "general.name"}
    overrides = (lib.llama_model_kv_override * (len(override) + 1))()  # the last one, empty, ends the list
    for entry, (name, value) in zip(overrides, override.items(), strict=False):
        entry.tag, entry.key, entry.value.val_str = _STRING, keys[name].encode(), value.encode()[:127]
    params = lib.llama_model_default_params()
    params.vocab_only, params.n_gpu_layers, params.kv_overrides = True, 0, overrides
    llama.forget_messages()
    model = lib.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise CheckpointError(f"llama.cpp does not take the vocabulary: {llama.last_error()}")
    try:
        yield LoadedVocabulary(lib, model)
    finally:
        lib.llama_model_free(model)


def differences(
    vocab: LoadedVocabulary, expected: Sequence[Case], *, leading_space: bool = False
) -> Iterator[Difference]:
    """The texts whose ids, ids with special tokens, or text again are not as expected, in their order.

    With `leading_space` llama.cpp's text may start with the space that it wrote before the text itself.
    """
    for case in expected:
        ids = vocab.encode(case.text)
        special = vocab.encode(case.text, add_special=True)
        text = vocab.pieces(ids)
        if ids != list(case.ids):
            yield _ids(case.text, case.ids, ids)
        elif special != list(case.special):
            yield _ids(case.text, case.special, special)
        elif text != case.decoded and not (leading_space and text == f" {case.decoded}"):
            yield Difference(case.text, _short(case.decoded), _short(text))


def _ids(text: str, expected: Sequence[int], got: Sequence[int]) -> Difference:
    """From the first id that differs."""
    start = next(
        (i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), min(len(expected), len(got))
    )
    at = f"ids from {start}: "
    return Difference(text, at + str(list(expected[start : start + 4])), at + str(list(got[start : start + 4])))


def _short(text: str) -> str:
    return _cut(ascii(text) if any(ord(c) < 32 or c in "\u2028\u2029\x85" for c in text) else repr(text))


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}…"
