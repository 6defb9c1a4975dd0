"""Streamed text: its pieces are the decoded whole, characters come whole, stop strings never show."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from running import tokenizer
from vlm_models.errors import InputError
from vlm_runtime.text import TextStream

WORDS = ["▁", "▁hello", "▁world", "lo", "▁🙂", "a", "東", ".", "▁.", "é"]


class Decoding:
    """A tokenizers.Tokenizer as a TextStream takes it, counting the ids it is asked to decode."""

    def __init__(self, of: tokenizers.Tokenizer) -> None:
        self.of, self.decoded = of, 0

    def decode(self, ids: Sequence[int]) -> str:
        self.decoded += len(ids)
        return str(self.of.decode(list(ids), skip_special_tokens=True))


@cache
def sentencepiece() -> tokenizers.Tokenizer:
    """A Llama-2-like tokenizer: leading spaces as ▁, unknown characters as bytes."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{b:02X}>": 3 + b for b in range(256)}
    vocab |= {word: 259 + i for i, word in enumerate(WORDS)}
    made = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<s>", "</s>"])
    return made


def pieces(of: tokenizers.Tokenizer, ids: Sequence[int], stop: Sequence[str] = ()) -> list[str]:
    stream = TextStream(Decoding(of), stop)
    return [*(stream.push(i) for i in ids), stream.finish()]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 319), max_size=80))
@example([tokenizer().token_to_id("Ģ")] * 120)  # 0x80, a byte that never begins a character
@example([tokenizer().token_to_id("ð")] * 120)
def test_byte_level_pieces_are_the_decoded_whole_whatever_the_bytes(ids: list[int]) -> None:
    assert "".join(pieces(tokenizer(), ids)) == tokenizer().decode(ids, skip_special_tokens=True)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
@example("🙂🙂 👩‍👩‍👧 नमस्ते")
def test_no_character_comes_in_parts(text: str) -> None:
    ids = tokenizer().encode(text).ids
    made = pieces(tokenizer(), ids)
    assert "".join(made) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in made)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.integers(259, 258 + len(WORDS)).map(lambda i: [i]),
            st.sampled_from([[1], [2]]),
            st.characters(min_codepoint=33, exclude_categories=["Cs"]).map(lambda c: [3 + b for b in c.encode()]),
        ),
        max_size=30,
    )
)
def test_sentencepiece_keeps_every_space_and_joins_bytes(parts: list[list[int]]) -> None:
    ids = [i for part in parts for i in part]
    whole = sentencepiece().decode(ids, skip_special_tokens=True)
    made = pieces(sentencepiece(), ids)
    assert "".join(made) == whole
    assert not any("\ufffd" in piece for piece in made) or "\ufffd" in whole


def test_a_special_token_between_words_does_not_eat_the_space() -> None:
    hello, world = (sentencepiece().token_to_id(w) for w in ("▁hello", "▁world"))
    assert "".join(pieces(sentencepiece(), [hello, 2, world])) == "hello world"


def test_words_come_at_once_when_nothing_can_change_them() -> None:
    hello, world = (sentencepiece().token_to_id(w) for w in ("▁hello", "▁world"))
    assert pieces(sentencepiece(), [hello, world]) == ["hello", " world", ""]


def test_an_unfinished_character_at_the_end_is_what_decode_makes_of_it() -> None:
    ids = tokenizer().encode("a🙂").ids[:-1]
    assert "".join(pieces(tokenizer(), ids)) == tokenizer().decode(ids)


@settings(max_examples=300, deadline=None)
@given(st.text("ab<>\n🙂", max_size=40), st.lists(st.text("ab<>\n🙂", min_size=1, max_size=5), max_size=3))
@example("aaab", ["aab"])
@example("a<b><b", ["<b>"])
@example("ab", ["b", "ab"])
@example("<\n<", ["\n", "<\n<"])
def test_text_ends_before_the_stop_string_that_is_complete_first(text: str, stop: list[str]) -> None:
    ids = tokenizer().encode(text).ids
    stream = TextStream(Decoding(tokenizer()), stop)
    shown = ""
    for i in ids:
        shown += stream.push(i)
        assert not any(s in shown for s in stop)
        if stream.stopped:
            break
    shown += stream.finish()
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    assert stream.stopped == bool(ends)
    assert shown == (text[: min(ends)[1]] if ends else text)


def test_a_stop_string_across_tokens_is_held_back_and_released_when_it_is_none() -> None:
    stream = TextStream(Decoding(tokenizer()), ["</end>"])
    ids = [tokenizer().encode(c).ids[0] for c in "x</en y"]
    assert [stream.push(i) for i in ids] == ["x", "", "", "", "", "</en ", "y"]


def test_nothing_follows_a_stop_string() -> None:
    stream = TextStream(Decoding(tokenizer()), ["b"])
    a, b, c = (tokenizer().encode(x).ids[0] for x in "abc")
    assert [stream.push(i) for i in (a, b, c)] == ["a", "", ""]
    assert stream.finish() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(InputError, match="empty stop string"):
        TextStream(Decoding(tokenizer()), [""])


@pytest.mark.parametrize("token", ["a", "Ģ", "</s>"])
def test_the_work_of_a_token_does_not_grow_with_the_text(token: str) -> None:
    decoding = Decoding(tokenizer())
    stream = TextStream(decoding)
    for _ in range(1000):
        stream.push(tokenizer().token_to_id(token))
    before = decoding.decoded
    for _ in range(1000):
        stream.push(tokenizer().token_to_id(token))
    assert decoding.decoded - before <= 1000 * 5 if token == "a" else decoding.decoded - before <= 1000 * 400
