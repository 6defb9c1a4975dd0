"""Prompts: the token ids that transformers' own processor gives, pictures where they belong, bad ones in one line."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import AddedToken, decoders, models, normalizers, processors, trainers
from tokenizers import Tokenizer as Backend

from bundles import SPEC, tiny_bundle
from checkpoints import CHATML, TEXT, WITH_BOS, tiny_tokenizer
from vlm_models.errors import BundleError, PromptError
from vlm_models.spec import PromptSpec
from vlm_runtime.bundle import open_bundle
from vlm_runtime.manifest import FileEntry, read_manifest, write_manifest
from vlm_runtime.prompt import MAX_RENDERED, render, user_message
from vlm_runtime.tokenizer import Tokenizer, expand

PICTURE = Image.new("RGB", (40, 30), "red")
T = 16  # image tokens of a 32 × 32 picture with patches of 8
# llava-hf/llava-1.5-7b-hf: every picture first, then every text.
LLAVA_15 = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# llava-hf/llava-interleave-qwen-0.5b-hf
INTERLEAVE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}"
    "{% endfor %}{{'<|im_end|>'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Gemma: BOS, no system role, "model" for assistant, text trimmed, turns must alternate.
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}"
    "{% endif %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' }}{% if message['content'] is string %}"
    "{{ message['content'] | trim }}{% else %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}{{ '<image>' }}{% else %}"
    "{{ item['text'] | trim }}{% endif %}{% endfor %}{% endif %}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
# Templates of text models, which know no parts: Llama 2, and ChatML with a default system message.
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}"
    "{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
SMOLLM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DUMPS = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
PARTS = {"chatml": CHATML, "bos": WITH_BOS, "llava15": LLAVA_15, "interleave": INTERLEAVE, "gemma": GEMMA}
TEXTS = {"llama2": LLAMA_2, "smollm": SMOLLM, "dumps": DUMPS}


def metaspace(adds_bos: bool) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of Llama's older kind: spaces as ▁, one before the first word, bytes for the unknown."""
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    backend.train_from_iterator(
        [TEXT.replace(" ", "▁")], trainers.BpeTrainer(vocab_size=460, special_tokens=specials, show_progress=False)
    )
    backend.add_special_tokens([AddedToken("<image>", normalized=False, special=True)])
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def prompt_spec(tokenizer: Any, template: str | None = None) -> PromptSpec:
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    return PromptSpec("<image>", image_id, T, (2,), tokenizer.bos_token, tokenizer.eos_token, template)


def ours(folder: Path, tokenizer: Any, prompt: PromptSpec | None = None) -> Tokenizer:
    """The runtime's tokenizer, from a bundle that holds `tokenizer`."""
    spec = dataclasses.replace(SPEC, prompt=prompt or prompt_spec(tokenizer))
    tiny_bundle(folder, spec)
    content = tokenizer.backend_tokenizer.to_str().encode()
    (folder / "tokenizer.json").write_bytes(content)
    manifest = read_manifest(folder)
    entry = FileEntry(hashlib.sha256(content).hexdigest(), len(content))
    write_manifest(folder, dataclasses.replace(manifest, files={**manifest.files, "tokenizer.json": entry}))
    return Tokenizer(open_bundle(folder))


def processor(tokenizer: Any, template: str | None) -> Any:
    return transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def say(role: str, text: str, images: int = 0) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


def theirs(messages: list[dict[str, Any]], tokenizer: Any, template: str) -> list[int]:
    """The ids that transformers feeds to the model, pictures and all."""
    given = [
        {**m, "content": [{**p, "image": PICTURE} if p["type"] == "image" else p for p in m["content"]]}
        for m in messages
    ]
    out = processor(tokenizer, template).apply_chat_template(
        given, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    ids = out["input_ids"]
    return list(ids[0] if isinstance(ids[0], list) else ids)


KINDS = {
    "bytes-end": lambda bos: tiny_tokenizer("end", bos),
    "bytes-start": lambda bos: tiny_tokenizer("start", bos),
    "bytes-middle": lambda bos: tiny_tokenizer("middle", bos),
    "metaspace": metaspace,
}
CONVERSATIONS = {
    "question": [say("user", "What colour is the large circle?", 1)],
    "no picture": [say("user", "Naïve café, 東京 🙂?")],
    "two pictures": [say("user", "Which of these is red?", 2)],
    "three turns": [
        say("user", "What is this?", 1),
        say("assistant", "A circle."),
        say("user", "And this? <b> & 'this'", 1),
    ],
    "system": [say("system", "Answer in one word."), say("user", "What is it?", 1)],
}


@pytest.mark.parametrize("adds_bos", [False, True], ids=["", "adds-bos"])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_equal_transformers_processor(tmp_path: Path, kind: str, adds_bos: bool) -> None:
    tokenizer = KINDS[kind](adds_bos)
    mine = ours(tmp_path / "bundle", tokenizer)
    for name, template in PARTS.items():
        prompt = prompt_spec(tokenizer, template)
        for title, messages in CONVERSATIONS.items():
            if name == "gemma" and title == "system":
                continue
            images = sum(p["type"] == "image" for m in messages for p in m["content"])
            ids = expand(mine.encode(render(messages, prompt)), prompt, [prompt.image_tokens] * images)
            assert ids == theirs(messages, tokenizer, template), (name, title)


TEXT_WITH_TOKENS = st.lists(
    st.sampled_from(["<image>", "<s>", "</s>", "\n", " ", "<|im_end|>", "circle", "a", "é", "🙂", "<", "image>"])
    | st.text(max_size=6),
    max_size=8,
).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adds_bos", [False, True], ids=["", "adds-bos"])
def test_encode_equals_transformers_tokenizer_on_any_text(tmp_path: Path, kind: str, adds_bos: bool) -> None:
    tokenizer = KINDS[kind](adds_bos)
    mine = ours(tmp_path / "bundle", tokenizer)

    @settings(max_examples=60, deadline=None)
    @given(text=TEXT_WITH_TOKENS)
    def check(text: str) -> None:
        bos_once = not text.startswith(tokenizer.bos_token)
        ids = mine.encode(text)
        assert ids == tokenizer(text, add_special_tokens=bos_once)["input_ids"]
        assert mine.encode(text, add_special_tokens=True) == tokenizer(text)["input_ids"]
        assert mine.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True)
        assert mine.decode(ids, skip_special_tokens=False) == tokenizer.decode(ids)

    check()


def test_bos_is_never_written_twice(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer("end", adds_bos=True)
    mine = ours(tmp_path / "bundle", tokenizer)
    for template in (CHATML, WITH_BOS):
        ids = mine.encode(render([say("user", "Hi")], prompt_spec(tokenizer, template)))
        assert ids.count(tokenizer.bos_token_id) == 1
        assert ids[0] == tokenizer.bos_token_id


def test_padding_and_truncation_of_the_file_are_not_applied(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    text = "What colour is the large circle?"
    assert ours(tmp_path / "bundle", tokenizer).encode(text) == tiny_tokenizer()(text)["input_ids"]


def test_an_image_token_that_the_tokenizer_would_cut_is_one_token(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    backend = Backend(models.BPE(vocab={"a": 0, "<image>": 1, "<": 2, "i": 3}, merges=[]))
    object.__setattr__(tokenizer, "_tokenizer", backend)
    mine = ours(tmp_path / "bundle", tokenizer, PromptSpec("<image>", 1, T, (0,)))
    assert mine.encode("a<image>a") == [0, 1, 0]


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    wrong = dataclasses.replace(prompt_spec(tokenizer), image_token_id=7)
    with pytest.raises(BundleError, match=r"gives '<image>' the id \d+, the model takes 7"):
        ours(tmp_path / "a", tokenizer, wrong)
    with pytest.raises(BundleError, match=r"gives '<pic>' the id None"):
        ours(tmp_path / "b", tokenizer, dataclasses.replace(wrong, image_token="<pic>"))
    bundle = open_bundle(tmp_path / "a")
    bundle.path("tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer(bundle)


def test_text_that_is_not_unicode_is_a_prompt_error(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="is it valid UTF-8"):
        ours(tmp_path / "bundle", tiny_tokenizer()).encode("a\udcff")


SPEC_OF = {name: PromptSpec("<image>", 5, T, (2,), "<s>", "</s>", t) for name, t in {**PARTS, **TEXTS}.items()}
PLAIN = PromptSpec("<image>", 5, T, (2,), "<s>", "</s>", None)


def chat(text: str, images: int, prompt: PromptSpec) -> str:
    return render([user_message(text, images, prompt)], prompt)


@pytest.mark.parametrize("name", SPEC_OF)
def test_pictures_come_first_where_the_text_does_not_place_them(name: str) -> None:
    out = chat("What?", 2, SPEC_OF[name])
    assert out.count("<image>") == 2
    assert out.rindex("<image>") < out.index("What?")
    assert "'type'" not in out
    assert out == chat("<image>\n<image>What?", 2, SPEC_OF[name]) == chat(" <image> <image>\nWhat?", 2, SPEC_OF[name])


@pytest.mark.parametrize("name", SPEC_OF)
def test_pictures_stand_where_the_text_places_them(name: str) -> None:
    out = chat("In <image> and not <image> now", 2, SPEC_OF[name])
    first, second = out.index("<image>"), out.rindex("<image>")
    assert first != second
    assert out.index("In") < first < out.index("and not") < second < out.index("now")
    mixed = chat("<image> or <image>?", 2, SPEC_OF[name])
    assert mixed.index("<image>") < mixed.index("or") < mixed.rindex("<image>") < mixed.index("?")
    assert mixed.count("<image>") == 2


@pytest.mark.parametrize("name", SPEC_OF)
def test_system_and_earlier_answers_reach_the_prompt_as_text(name: str) -> None:
    talk = [user_message("First?", 1, SPEC_OF[name]), {"role": "assistant", "content": "Answer1"}]
    talk.append(user_message("Second?", 0, SPEC_OF[name]))
    out = render(talk, SPEC_OF[name])
    assert out.index("<image>") < out.index("First?") < out.index("Answer1") < out.index("Second?")
    assert "'type'" not in out
    if name == "gemma":
        with pytest.raises(PromptError, match="System role not supported"):
            render([{"role": "system", "content": "Be brief"}, *talk], SPEC_OF[name])
        return
    for content in ("Be brief", [{"type": "text", "text": "Be brief"}]):
        out = render([{"role": "system", "content": content}, *talk], SPEC_OF[name])
        assert out.index("Be brief") < out.index("First?")
        assert "'type'" not in out


@pytest.mark.parametrize("name", ["llama2", "smollm"])
def test_templates_of_text_models_equal_transformers_on_text(name: str) -> None:
    tokenizer = tiny_tokenizer()
    talk = [{"role": "user", "content": "<image>\nHi"}, {"role": "assistant", "content": "Yes"}]
    talk.append({"role": "user", "content": "Why?"})
    wanted = tokenizer.apply_chat_template(
        talk, chat_template=SPEC_OF[name].chat_template, tokenize=False, add_generation_prompt=True
    )
    given = [user_message("Hi", 1, SPEC_OF[name]), talk[1], user_message("Why?", 0, SPEC_OF[name])]
    assert render(given, SPEC_OF[name]) == wanted


def test_without_a_template_the_prompt_is_llava_15s() -> None:
    assert chat("What is it?", 1, PLAIN) == "USER: <image>\nWhat is it? ASSISTANT:"
    assert chat("What is it?", 0, PLAIN) == "USER: What is it? ASSISTANT:"
    assert chat("Is <image> it?", 1, PLAIN) == "USER: Is <image> it? ASSISTANT:"
    talk = [{"role": "system", "content": "S."}, say("user", "a?", 1), {"role": "assistant", "content": "b"}]
    assert render([*talk, say("user", "c?")], PLAIN) == "S. USER: <image>\na? ASSISTANT: b</s>USER: c? ASSISTANT:"
    with pytest.raises(PromptError, match="unknown role 'tool'"):
        render([{"role": "tool", "content": "x"}], PLAIN)


@pytest.mark.parametrize(("text", "images"), [("<image>", 0), ("<image> <image>", 1), ("<image>", 2)])
def test_more_or_fewer_places_than_pictures_are_refused_with_both_numbers(text: str, images: int) -> None:
    places = text.count("<image>")
    words = f"the prompt has {places} <image>, but {images} image"
    with pytest.raises(PromptError, match=words):
        user_message(text, images, PLAIN)
    ids = [1] + [5] * places
    with pytest.raises(PromptError, match=words):
        expand(ids, PLAIN, [PLAIN.image_tokens] * images)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=30))
def test_expand_repeats_the_image_token_and_nothing_else(ids: list[int]) -> None:
    wanted = [i for token in ids for i in ([token] * T if token == 5 else [token])]
    out = expand(ids, PLAIN, [PLAIN.image_tokens] * ids.count(5))
    assert out == wanted
    assert all(type(i) is int for i in out)


EVIL = {
    "raises": "{{ raise_exception('no\nthanks') }}",
    "syntax": "{% for %}",
    "unknown tag": "{% surprise %}",
    "internals": "{{ messages.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__()[0] }}",
    "changes": "{{ messages.append(1) }}",
    "attribute": "{{ messages[0]['content'].nothing.more }}",
    "type": "{{ 1 + 'a' }}",
    "zero": "{{ 1 // 0 }}",
    "endless": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "long": "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "range": "{% for i in range(10**12) %}{% endfor %}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
}


@pytest.mark.parametrize("name", EVIL)
def test_a_template_that_misbehaves_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(PromptError, match="chat template") as error:
        chat("Hi", 0, dataclasses.replace(PLAIN, chat_template=EVIL[name]))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_a_template_may_not_write_more_than_the_limit() -> None:
    template = "{% for i in range(" + str(MAX_RENDERED // 100) + ") %}" + "x" * 101 + "{% endfor %}"
    with pytest.raises(PromptError, match=f"more than {MAX_RENDERED} characters"):
        chat("Hi", 0, dataclasses.replace(PLAIN, chat_template=template))


def test_templates_have_what_transformers_gives_them() -> None:
    template = (
        "{%- for m in messages %}\n    {%- if loop.index > 1 %}{% break %}{% endif %}\n"
        "{{ {'b': '<é>', 'a': 1} | tojson }}|{{ strftime_now('%Y') | length }}|{{ tools is none }}|"
        "{{ documents is none }}|{{ pad_token is defined }}|{{ add_generation_prompt }}|"
        "{{ bos_token }}{{ eos_token }}\n"
        "{% generation %}{{ m.role }}{% endgeneration %}\n{%- endfor %}"
    )
    tokenizer = tiny_tokenizer()
    talk = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    wanted = tokenizer.apply_chat_template(
        talk, chat_template=template.replace("pad_token", "sep_token"), tokenize=False, add_generation_prompt=True
    )
    assert render(talk, dataclasses.replace(PLAIN, chat_template=template)) == wanted


@pytest.mark.parametrize(
    "message",
    [
        *[{}, {"role": "user"}, {"role": 1, "content": "a"}, {"role": "user", "content": None}, "user"],
        {"role": "user", "content": [{"type": "video"}]},
        {"role": "user", "content": [{"type": "text"}]},
        {"role": "user", "content": ["text"]},
    ],
    ids=str,
)
def test_what_is_not_a_message_is_refused(message: Any) -> None:
    with pytest.raises(PromptError, match="a message has a role and a content"):
        render([message], PLAIN)
