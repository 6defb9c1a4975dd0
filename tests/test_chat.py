"""Conversations: only what is new is prefilled, the tokens are those from scratch, mistakes leave them usable."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from answering import Counted, from_scratch, load_counted, painted
from running import IMAGE_TOKENS, running_bundle, running_spec, tokenizer
from vlm_models.errors import ImageError, InputError, PromptError
from vlm_runtime.vlm import VLM, load


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return running_bundle(tmp_path_factory.mktemp("running") / "bundle", running_spec(eos_token_ids=()))


@pytest.fixture(scope="module")
def vlm(folder: Path) -> VLM:
    return load(folder, threads=1)


@pytest.fixture
def counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[VLM, Counted, Counted]:
    return load_counted(folder, monkeypatch)


def test_a_conversation_prefills_only_what_is_new_and_answers_as_from_scratch(
    counted: tuple[VLM, Counted, Counted],
) -> None:
    vlm, vision, decoder = counted
    chat = vlm.chat()
    one = "".join(chat.ask("hi", [painted(0)], max_new_tokens=5))
    before = decoder.rows
    two = "".join(chat.ask("It is red", max_new_tokens=5))
    text = f"<|user|><image>\nhi</s>\n<|assistant|>{one}</s>\n<|user|>It is red</s>\n<|assistant|>"
    assert chat.last is not None
    total = len(vlm.tokenizer.encode(text)) + IMAGE_TOKENS - 1
    assert chat.last.prompt_tokens == total
    assert decoder.rows - before < total - 15  # the first turn, its picture included, stayed in the cache
    assert vision.runs == 1
    assert list(chat.last.token_ids) == from_scratch(vlm, text, [painted(0)], 5)
    assert two == tokenizer().decode(chat.last.token_ids)


def test_another_picture_in_the_same_place_is_not_taken_from_the_cache(vlm: VLM) -> None:
    text = "<|user|><image>\nhi</s>\n<|assistant|>"
    for seed in (0, 1):
        chat = vlm.chat()
        list(chat.ask("hi", [painted(seed)], max_new_tokens=4))
        assert chat.last is not None
        assert list(chat.last.token_ids) == from_scratch(vlm, text, [painted(seed)], 4)


def test_a_picture_in_a_later_turn_comes_where_it_was_given(vlm: VLM) -> None:
    chat = vlm.chat(system="short")
    one = "".join(chat.ask("hi", max_new_tokens=3))
    list(chat.ask("and", [painted(2)], max_new_tokens=3))
    text = f"<|system|>short</s>\n<|user|>hi</s>\n<|assistant|>{one}</s>\n<|user|><image>\nand</s>\n<|assistant|>"
    assert chat.last is not None
    assert list(chat.last.token_ids) == from_scratch(vlm, text, [painted(2)], 3)


def test_a_conversation_survives_other_answers_in_between(vlm: VLM) -> None:
    chat, alone = vlm.chat(), vlm.chat()
    for text in ("hi", "more"):
        list(chat.ask(text, max_new_tokens=4))
    wanted = chat.last
    list(alone.ask("hi", max_new_tokens=4))
    vlm.answer("What is it?", [painted(0)], max_new_tokens=4)
    list(alone.ask("more", max_new_tokens=4))
    assert wanted is not None
    assert alone.last is not None
    assert alone.last.token_ids == wanted.token_ids


def test_ctrl_c_leaves_the_conversation_usable(counted: tuple[VLM, Counted, Counted]) -> None:
    vlm, _, decoder = counted
    chat = vlm.chat()
    decoder.fail_at = 6
    said = ""
    pieces = chat.ask("hi", [painted(0)], max_new_tokens=50)
    with contextlib.suppress(KeyboardInterrupt):
        for piece in pieces:
            said += piece
    assert said
    assert chat.last is None
    decoder.fail_at = -1
    list(chat.ask("It", max_new_tokens=4))
    text = f"<|user|><image>\nhi</s>\n<|assistant|>{said}</s>\n<|user|>It</s>\n<|assistant|>"
    assert chat.last is not None
    assert list(chat.last.token_ids) == from_scratch(vlm, text, [painted(0)], 4)


def test_a_turn_that_is_closed_early_keeps_what_was_said(vlm: VLM) -> None:
    chat = vlm.chat()
    pieces = chat.ask("hi", max_new_tokens=50)
    said = next(pieces)
    assert isinstance(pieces, Iterator)
    pieces.close()  # type: ignore[attr-defined]
    list(chat.ask("It", max_new_tokens=4))
    assert chat.last is not None
    text = f"<|user|>hi</s>\n<|assistant|>{said}</s>\n<|user|>It</s>\n<|assistant|>"
    assert list(chat.last.token_ids) == from_scratch(vlm, text, [], 4)


def test_a_refused_turn_leaves_the_conversation_as_it_was(vlm: VLM) -> None:
    chat = vlm.chat()
    list(chat.ask("hi", max_new_tokens=3))
    with pytest.raises(PromptError, match="the bundle's context is 96"):
        chat.ask("hello " * 100)
    with pytest.raises(ImageError):
        chat.ask("what", [b"nothing"])
    list(chat.ask("It", max_new_tokens=4))
    again = vlm.chat()
    list(again.ask("hi", max_new_tokens=3))
    list(again.ask("It", max_new_tokens=4))
    assert chat.last is not None
    assert again.last is not None
    assert chat.last.token_ids == again.last.token_ids


def test_reset_forgets_all_but_the_system_message(vlm: VLM) -> None:
    chat, fresh = vlm.chat("short"), vlm.chat("short")
    list(chat.ask("hi", [painted(0)], max_new_tokens=3))
    chat.reset()
    list(chat.ask("It", max_new_tokens=4))
    list(fresh.ask("It", max_new_tokens=4))
    assert chat.last is not None
    assert fresh.last is not None
    assert chat.last.token_ids == fresh.last.token_ids


def test_a_question_asked_again_is_answered_as_if_the_first_answer_had_not_been(vlm: VLM) -> None:
    chat, fresh = vlm.chat(), vlm.chat()
    with pytest.raises(InputError, match="no question to ask again"):
        chat.retry()
    one = "".join(chat.ask("hi", [painted(0)], max_new_tokens=3))
    assert "".join(chat.retry(max_new_tokens=3)) == one
    drawn = "".join(chat.retry(max_new_tokens=3, temperature=1e6, seed=1))
    assert drawn == "".join(fresh.ask("hi", [painted(0)], max_new_tokens=3, temperature=1e6, seed=1)) != one
    for each in (chat, fresh):
        list(each.ask("It", max_new_tokens=4))
    assert chat.last is not None
    assert fresh.last is not None
    assert (chat.last.token_ids, chat.last.image_tokens) == (fresh.last.token_ids, IMAGE_TOKENS)
    chat.reset()
    with pytest.raises(InputError):
        chat.retry()


def test_a_question_that_failed_before_a_word_can_be_asked_again(counted: tuple[VLM, Counted, Counted]) -> None:
    vlm, _, decoder = counted
    chat = vlm.chat()
    decoder.fail_at = 1
    with pytest.raises(KeyboardInterrupt):
        list(chat.ask("hi", [painted(0)], max_new_tokens=4, stop=["never seen"]))
    decoder.fail_at = -1
    list(chat.retry(max_new_tokens=4))
    assert chat.last is not None
    assert list(chat.last.token_ids) == from_scratch(vlm, "<|user|><image>\nhi</s>\n<|assistant|>", [painted(0)], 4)
