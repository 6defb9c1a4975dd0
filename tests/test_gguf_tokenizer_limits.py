"""What llama.cpp's tokenizers cannot be: refused in one line before llama.cpp ends the process, or said in a note."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tokenizers_like import IMAGE, LIKE, LLAMA3, Json, byte_level, bytes_like, pieces_like, split, write_checkpoint
from vlm_export.gguf import tokenizer as gguf_tokenizer
from vlm_export.gguf.pretokenizer import choices
from vlm_export.gguf.tokenizer import chat_template, tokenizer_fields
from vlm_export.gguf.vocab_check import loaded, write_vocabulary
from vlm_export.gguf.vocabulary import read_vocabulary
from vlm_models.checkpoint import Checkpoint
from vlm_models.errors import CheckpointError
from vlm_models.model import load_model
from vlm_models.spec import PromptSpec, VLMSpec
from vlm_runtime.prompt import render, user_message

Made = Callable[..., tuple[Checkpoint, VLMSpec]]


@pytest.fixture(scope="module")
def make(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """`make(source, name=…, rows=…, config=…, template=…)`: a checkpoint with this tokenizer.json, and its spec."""
    base, folder = load_model(tiny).spec, tmp_path_factory.mktemp("tokenizers")
    count = itertools.count()
    return lambda source, **options: write_checkpoint(folder / str(next(count)), base, source, **options)


def test_an_unknown_spelling_of_a_known_split_is_found_by_trying(make: Made) -> None:
    regex = LLAMA3.replace("'s|'t|'re|'ve|'m|'ll|'d", "'d|'ll|'m|'re|'s|'t|'ve")
    source = {**LIKE["llama3"](), "pre_tokenizer": split(regex)}
    assert choices(source, prefix=False)[0].pre == "gpt-2"
    assert tokenizer_fields(*make(source)).values["tokenizer.ggml.pre"] == "llama-bpe"


def test_a_split_that_llama_cpp_lacks_is_refused_in_one_line(make: Made) -> None:
    source = bytes_like(split(r"\p{L}{1,2}|\P{L}+"), ["<|endoftext|>"])
    checkpoint, spec = make(source)
    with pytest.raises(CheckpointError) as error:
        tokenizer_fields(checkpoint, spec)
    message = str(error.value)
    assert "\n" not in message
    assert r"\\p{L}{1,2}" in message
    assert "instead of" in message
    assert "--gguf-tokenizer none" in message


def _unigram() -> Json:
    source = pieces_like()
    vocab = [[t, -float(i)] for t, i in source["model"]["vocab"].items()]
    return {**source, "model": {"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": True}}


def _word_piece() -> Json:
    source = LIKE["gpt2"]()
    vocab = {**source["model"]["vocab"], "[UNK]": 9000}
    model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "vocab": vocab}
    return {**source, "model": {**model, "max_input_chars_per_word": 100}}


def _missing_byte() -> Json:
    source = pieces_like()
    vocab = source["model"]["vocab"]
    vocab["<gone>"] = vocab.pop("<0xE2>")
    return source


def _word_ends() -> Json:
    return bytes_like(byte_level(), ["<|endoftext|>"], end_of_word_suffix="</w>")


def _two_before() -> Json:
    source = LIKE["llama2"]()
    first = source["post_processor"]["single"][0]
    source["post_processor"]["single"].insert(0, first)
    return source


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (_unigram, "Unigram"),
        (_word_piece, "WordPiece"),
        (_missing_byte, "<0xE2>"),
        (_word_ends, "end of words"),
        (_two_before, "2 special tokens before"),
    ],
)
def test_what_llama_cpp_cannot_hold_is_refused_before_it_is_asked(
    source: Callable[[], Json], said: str, make: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("llama.cpp would end the process")

    made = source()
    vocab = made["model"]["vocab"]
    rows = len(vocab) + 8
    checkpoint, spec = make(made, rows=rows)
    monkeypatch.setattr(gguf_tokenizer, "loaded", never)
    with pytest.raises(CheckpointError, match=said) as error:
        tokenizer_fields(checkpoint, spec)
    assert "\n" not in str(error.value)
    assert "--gguf-tokenizer none" in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(16))
def test_a_changed_tokenizer_is_proved_or_refused_and_never_ends_the_process(seed: int, make: Made) -> None:
    chance = random.Random(seed)
    source = LIKE[chance.choice(list(LIKE))]()
    other = LIKE[chance.choice(list(LIKE))]()
    model, merges = source["model"], source["model"]["merges"]
    for change in chance.sample(range(7), 2):
        match change:
            case 0:
                chance.shuffle(merges)
            case 1:
                del merges[chance.randrange(1, len(merges)) :]
            case 2:
                flag = chance.choice(["rstrip", "lstrip", "single_word", "normalized", "special"])
                chance.choice(source["added_tokens"])[flag] = chance.random() < 0.7
            case 3:
                source["pre_tokenizer"] = other["pre_tokenizer"]
            case 4:
                source["normalizer"] = other["normalizer"]
            case 5:
                source["decoder"], source["post_processor"] = other["decoder"], None
            case 6:
                model["ignore_merges"], model["byte_fallback"] = True, not model["byte_fallback"]
    checkpoint, spec = make(source, name=chance.choice(["ours", "phi3"]))
    with contextlib.suppress(CheckpointError):
        details = tokenizer_fields(checkpoint, spec).details
        assert details["notes"] or details["equal"] == details["texts"]


def test_texts_that_llama_cpp_would_confuse_are_refused() -> None:
    source = LIKE["gpt2"]()
    source["model"]["vocab"] |= {"x\0y": 7001}
    with pytest.raises(CheckpointError, match="and 7001"):
        read_vocabulary(Tokenizer.from_str(json.dumps(source)), source, 7003, "here: the tokenizer")


def test_rows_without_a_token_are_unused_and_tokens_without_a_row_are_left_out(make: Made) -> None:
    source = LIKE["smollm"]()
    image = next(t["id"] for t in source["added_tokens"] if t["content"] == IMAGE)
    more = tokenizer_fields(*make(source, rows=image + 30)).values
    assert len(more["tokenizer.ggml.tokens"]) == image + 30  # type: ignore[arg-type]
    assert more["tokenizer.ggml.token_type"][image:] == [3] + [5] * 29  # type: ignore[index]
    fewer = tokenizer_fields(*make(source, rows=image)).values
    assert len(fewer["tokenizer.ggml.tokens"]) == image  # type: ignore[arg-type]


def test_the_ends_of_an_answer_are_known_to_llama_cpp(make: Made, tmp_path: Path) -> None:
    """Three of them: under eos, eot and eom; the tokenizer's own first."""
    names = ["<stop one>", "<stop two>", "<stop three>"]
    checkpoint, spec = make(bytes_like(byte_level(), names), config={"eos_token": names[1], "bos_token": None})
    ids = [t["id"] for t in bytes_like(byte_level(), names)["added_tokens"][:3]]
    spec = dataclasses.replace(spec, prompt=dataclasses.replace(spec.prompt, eos_token_ids=tuple(ids)))
    found = tokenizer_fields(checkpoint, spec)
    assert found.values["tokenizer.ggml.eos_token_id"] == ids[1]
    assert found.details["notes"] == []
    write_vocabulary(tmp_path / "v.gguf", found.values)
    with loaded(tmp_path / "v.gguf") as vocab:
        assert [i for i in range(vocab.size) if vocab.ends(i)] == ids


def test_ends_of_llama_cpps_own_are_recorded(make: Made) -> None:
    checkpoint, spec = make(LIKE["smollm"]())
    spec = dataclasses.replace(
        spec, prompt=dataclasses.replace(spec.prompt, eos_token_ids=spec.prompt.eos_token_ids[:1])
    )
    assert tokenizer_fields(checkpoint, spec).details["also_ends"] == ["<|endoftext|>"]


def test_a_fourth_end_is_said_not_to_end(make: Made) -> None:
    names = [f"<stop {i}>" for i in range(4)]
    checkpoint, spec = make(bytes_like(byte_level(), names))
    ids = tuple(t["id"] for t in bytes_like(byte_level(), names)["added_tokens"][:4])
    spec = dataclasses.replace(spec, prompt=dataclasses.replace(spec.prompt, eos_token_ids=ids))
    assert tokenizer_fields(checkpoint, spec).details["notes"] == ["llama.cpp does not end an answer at <stop 3>"]


def test_blanks_after_special_tokens_need_the_name_phi_3(make: Made) -> None:
    """llama.cpp takes that rule from general.name, and fails on other tokenizers of such a name."""
    assert tokenizer_fields(*make(LIKE["phi3"]())).values["general.name"] == "ours (phi-3)"
    assert tokenizer_fields(*make(LIKE["phi3"](), name="llava-phi-3")).values["general.name"] == "llava-phi-3"
    renamed = tokenizer_fields(*make(LIKE["smollm"](), name="llava-Phi-3"))
    assert renamed.values["general.name"] == "llava-Phi 3"
    assert renamed.details["equal"] == renamed.details["texts"]


def test_blanks_around_the_image_token_alone_do_not_refuse_a_tokenizer(make: Made) -> None:
    source = LIKE["phi3"]()
    source["added_tokens"][-1]["rstrip"] = False
    found = tokenizer_fields(*make(source))
    assert f"llama.cpp reads blanks around {IMAGE} otherwise" in found.details["notes"]
    assert 0 < found.details["texts"] - found.details["equal"] < 12


@pytest.mark.parametrize(("template", "prefix"), [("[INST]", False), ("USER: ", True)])
def test_metaspace_first_follows_the_checkpoints_prompts(template: str, prefix: bool, make: Made) -> None:
    written = "{% for m in messages %}" + template + "<image> {{ m['content'] }}{% endfor %}"
    found = tokenizer_fields(*make(LIKE["mistral"](), template=written))
    assert found.values["tokenizer.ggml.add_space_prefix"] is prefix
    assert found.values["tokenizer.chat_template"] == written


def test_pieces_without_all_their_merges_take_a_tokenizer_that_reads_merges(make: Made) -> None:
    """As training leaves them: "the" is t + he only, so that th stays th; by scores llama.cpp would make th + e too."""
    words = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    steps = {"normalizer": replace, "pre_tokenizer": words, "post_processor": None}
    source = pieces_like(prepend=False, extra=["th", "he", "the"], trained=True, **steps)
    kept = [m for m in source["model"]["merges"] if "".join(m) not in ("th", "he", "the") and "\n" not in "".join(m)]
    source["model"]["merges"] = [["t", "h"], ["h", "e"], ["t", "he"], *kept]
    found = tokenizer_fields(*make(source))
    assert found.values["tokenizer.ggml.pre"] == "sarvam-moe"
    assert found.details["equal"] == found.details["texts"]


def test_without_a_tokenizer_llama_cpp_loads_the_file(make: Made, tmp_path: Path) -> None:
    checkpoint, spec = make(_word_ends(), name="phi-3 like")
    found = tokenizer_fields(checkpoint, spec, mode="none")
    assert found.values["tokenizer.ggml.model"] == "none"
    write_vocabulary(tmp_path / "v.gguf", {**found.values, "llama.vocab_size": spec.language.vocab_size})
    with loaded(tmp_path / "v.gguf") as vocab:
        assert vocab.size == spec.language.vocab_size


@pytest.mark.parametrize(
    "messages",
    [
        [user_message("What is it?", 1, PromptSpec(IMAGE, 1, 4, ()))],
        [user_message("What are they?", 2, PromptSpec(IMAGE, 1, 4, ()))],
        [user_message("Between <image> two <image> words", 2, PromptSpec(IMAGE, 1, 4, ()))],
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi 'there' \"you\"\n"},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": [{"type": "text", "text": "And?"}, {"type": "image"}]},
        ],
    ],
)
@pytest.mark.parametrize("going_on", [True, False])
def test_the_template_of_a_checkpoint_without_one_is_what_the_runtime_writes(messages: Any, going_on: bool) -> None:
    prompt = PromptSpec(IMAGE, 1, 4, (2,), eos_token="</s>")
    written = dataclasses.replace(prompt, chat_template=chat_template(prompt))
    assert render(messages, written, add_generation_prompt=going_on) == render(
        messages, prompt, add_generation_prompt=going_on
    )
