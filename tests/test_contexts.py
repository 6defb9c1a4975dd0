"""Several KV caches: conversations that take turns go on where they were, and none sees another's rows."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from answering import Counted, from_scratch, painted
from ggufs import language_gguf
from running import entry, running_bundle, running_spec
from vlm_models.errors import InputError
from vlm_runtime.bundle import open_bundle
from vlm_runtime.contexts import Contexts
from vlm_runtime.engines import onnx
from vlm_runtime.manifest import Part, write_manifest
from vlm_runtime.vlm import VLM, load

SPEC = running_spec(eos_token_ids=())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose language model both engines can run."""
    folder = running_bundle(tmp_path_factory.mktemp("running") / "bundle", SPEC, max_context=256)
    (folder / "gguf").mkdir()
    name = "gguf/language_model.gguf"
    language_gguf(folder / name, SPEC)
    manifest = open_bundle(folder).manifest
    parts = {**manifest.parts, "language_model": {**manifest.parts["language_model"]}}
    parts["language_model"]["gguf"] = Part(name, (name,), "fp32", {})
    write_manifest(
        folder, dataclasses.replace(manifest, parts=parts, files={**manifest.files, name: entry(folder / name)})
    )
    return folder


def talk(vlm: VLM, names: str) -> dict[str, list[tuple[int, ...]]]:
    """One turn for each letter, each letter a conversation of its own about a picture of its own; token ids."""
    chats = {name: vlm.chat() for name in names}
    got: dict[str, list[tuple[int, ...]]] = {name: [] for name in names}
    for name in names:
        images = [] if got[name] else [painted(ord(name))]
        list(chats[name].ask("What colour is it?", images, max_new_tokens=6))
        last = chats[name].last
        assert last is not None
        got[name].append(last.token_ids)
    return got


@pytest.mark.parametrize("engine", ["onnx", "gguf"])
def test_conversations_that_take_turns_answer_as_if_each_were_alone(folder: Path, engine: str) -> None:
    alone = load(folder, engine=f"language={engine}", threads=1)
    for conversations, order in ((2, "ababab"), (2, "abcabcab"), (3, "abcbca")):
        vlm = load(folder, engine=f"language={engine}", threads=1, conversations=conversations)
        got = talk(vlm, order)
        for name in set(order):
            assert got[name] == talk(alone, name * order.count(name))[name], (conversations, order, name)


@pytest.mark.parametrize("engine", ["onnx", "gguf"])
def test_a_conversation_that_comes_back_prefills_only_what_is_new(folder: Path, engine: str) -> None:
    for conversations, again in ((1, False), (2, True)):
        vlm = load(folder, engine=f"language={engine}", threads=1, conversations=conversations)
        one, other = vlm.chat(), vlm.chat()
        list(one.ask("What colour is it?", [painted(0)], max_new_tokens=6))
        list(other.ask("hi", [painted(1)], max_new_tokens=6))
        first = one.last
        list(one.ask("and", max_new_tokens=6))
        assert first is not None
        assert one.last is not None
        assert (one.last.cached_tokens >= first.prompt_tokens) == again


def test_the_least_recently_used_goes_first(folder: Path) -> None:
    vlm = load(folder, threads=1, conversations=2)
    a, b, c = vlm.chat(), vlm.chat(), vlm.chat()
    for chat, seed in ((a, 0), (b, 1), (a, None), (c, 2)):
        list(chat.ask("What colour is it?", [] if seed is None else [painted(seed)], max_new_tokens=6))
    for chat, kept in ((a, True), (c, True), (b, False)):
        list(chat.ask("and", max_new_tokens=6))
        assert chat.last is not None
        assert (chat.last.cached_tokens > 20) == kept


def test_a_common_beginning_that_is_short_does_not_end_another_conversation(folder: Path) -> None:
    vlm = load(folder, threads=1, conversations=2)
    long, other = vlm.chat("short"), vlm.chat("short")
    list(long.ask("It is red, green or blue. " * 4, [painted(0)], max_new_tokens=20))
    list(other.ask("hi", max_new_tokens=4))
    list(long.ask("and", max_new_tokens=4))
    assert long.last is not None
    assert long.last.cached_tokens > 50


def test_answers_that_run_at_once_have_a_cache_each(folder: Path) -> None:
    vlm, alone = load(folder, threads=1, conversations=2), load(folder, threads=1)
    one = vlm.generate("hi", [painted(0)], max_new_tokens=9)
    text = next(iter(one))
    two = vlm.generate("It is", [painted(1)], max_new_tokens=9)
    assert "".join(two) == alone.answer("It is", [painted(1)], max_new_tokens=9).text
    assert text + "".join(one) == alone.answer("hi", [painted(0)], max_new_tokens=9).text


def test_who_uses_the_decoder_itself_spoils_no_conversation(folder: Path) -> None:
    vlm = load(folder, threads=1, conversations=2)
    chat = vlm.chat()
    said = "".join(chat.ask("hi", max_new_tokens=5))
    list(vlm.chat().ask("what", [painted(3)], max_new_tokens=5))
    text = f"<|user|>hi</s>\n<|assistant|>{said}</s>\n<|user|>It</s>\n<|assistant|>"
    wanted = from_scratch(vlm, text, [], 4)
    list(chat.ask("It", max_new_tokens=4))
    assert chat.last is not None
    assert list(chat.last.token_ids) == wanted


def test_where_no_memory_is_left_the_caches_that_are_there_are_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(self: object) -> None:
        raise InputError("no memory")

    monkeypatch.setattr(onnx.OnnxDecoder, "another", none)
    assert talk(load(folder, threads=1, conversations=3), "abab") == talk(load(folder, threads=1), "abab")


def test_an_engine_with_one_cache_has_one(folder: Path) -> None:
    class One(Counted):
        def __getattr__(self, name: str) -> object:
            if name == "another":
                raise AttributeError(name)
            return getattr(self.of, name)

    vlm = load(folder, threads=1)
    vlm._contexts = Contexts(One(vlm.decoder), 4)
    assert talk(vlm, "abab") == talk(load(folder, threads=1), "abab")


def test_no_conversation_at_all_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="conversations is 0: it must be 1 or more"):
        load(folder, threads=1, conversations=0)
