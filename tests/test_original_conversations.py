"""Conversations of the original layout: texts as its code writes them, and the bundle's template writes the same."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from checkpoints import tiny_tokenizer
from vlm_models.conversation import chat_template, question, render
from vlm_models.conversations import CONVERSATIONS, Traces, choose, named
from vlm_models.errors import CheckpointError, PromptError
from vlm_models.spec import PromptSpec
from vlm_runtime import prompt as runtime

WRAPPED = "<im_start><image><im_end>"
TALKS = {
    "a picture": ["What is this?"],
    "a second question": ["What is this?", "A cat.", "Sure?"],
    "an answer last": ["What is this?", "A cat."],
}


def messages(turns: list[str], pictures: int, system: str | None = None) -> list[dict[str, Any]]:
    """The turns as transformers has them, the pictures before the first question."""
    out: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    for i, text in enumerate(turns):
        images = [{"type": "image"}] * (pictures if i == 0 else 0)
        out.append({"role": ("user", "assistant")[i % 2], "content": [*images, {"type": "text", "text": text}]})
    return out


def spec(name: str, picture: str = "<image>") -> PromptSpec:
    template = chat_template(CONVERSATIONS[name], picture)
    return PromptSpec("<image>", 5, 4, (2,), "<s>", "</s>", template, chunked=True)


@pytest.mark.parametrize("picture", ["<image>", WRAPPED], ids=["bare", "wrapped"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_template_writes_what_the_original_code_writes(name: str, picture: str) -> None:
    tokenizer, template = tiny_tokenizer(), chat_template(CONVERSATIONS[name], picture)
    for turns in TALKS.values():
        for pictures in (0, 1, 2):
            wanted = render(CONVERSATIONS[name], [question(picture, turns[0], pictures), *turns[1:]])
            given = messages(turns, pictures)
            opens = len(turns) % 2 == 1
            assert runtime.render(given, spec(name, picture), add_generation_prompt=opens) == wanted
            theirs = tokenizer.apply_chat_template(
                given, chat_template=template, tokenize=False, add_generation_prompt=opens
            )
            assert theirs == wanted
            assert wanted.count("<image>") == pictures


@pytest.mark.parametrize("name", [n for n, c in CONVERSATIONS.items() if c.asks_system])
def test_a_system_message_takes_the_place_of_the_own(name: str) -> None:
    wanted = render(CONVERSATIONS[name], ["Who?", "Me.", "Why?"], system="Be brief & 'kind'.")
    assert "Be brief & 'kind'." in wanted
    for content in ("Be brief & 'kind'.", [{"type": "text", "text": "Be brief & 'kind'."}]):
        given = [{"role": "system", "content": content}, *messages(["Who?", "Me.", "Why?"], 0)]
        assert runtime.render(given, spec(name)) == wanted


def test_gemma_has_no_place_for_a_system_message() -> None:
    with pytest.raises(PromptError, match="System role not supported"):
        runtime.render(messages(["Who?"], 0, system="Be brief"), spec("gemma_instruct"))


@pytest.mark.parametrize("role", ["tool", "system"])
def test_a_role_without_a_place_is_refused(role: str) -> None:
    with pytest.raises(PromptError, match=f"a message of role {role} has no place here"):
        runtime.render([*messages(["Who?"], 0), {"role": role, "content": "x"}], spec("llava_v1"))


def test_pictures_within_the_text_stay_there() -> None:
    prompt = spec("vicuna_v1", WRAPPED)
    text = runtime.render([runtime.user_message("Is <image> like <image>?", 2, prompt)], prompt)
    assert text.endswith(f" USER: Is {WRAPPED} like {WRAPPED}? ASSISTANT:")


V1 = "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
V1 += "and polite answers to the human's questions."
EXPECTED = {
    "llava_v0": f"{V1}###Human: <image>\nQ?###Assistant: A.###Human: R?###Assistant:",
    "llava_v1": f"{V1} USER: <image>\nQ? ASSISTANT: A.</s>USER: R? ASSISTANT:",
    "vicuna_v1": f"{V1.replace('human', 'user')} USER: <image>\nQ? ASSISTANT: A.</s>USER: R? ASSISTANT:",
    "bunny": f"{V1.replace('human', 'user')} USER: <image>\nQ? ASSISTANT: A.<|endoftext|>USER: R? ASSISTANT:",
    "mistral_instruct": "[INST] <image>\nQ? [/INST] A. </s>[INST] R? [/INST]",
    "llava_llama_2": "[INST] <<SYS>>\nYou are a helpful language and vision assistant. You are able to understand the "
    "visual content that the user provides, and assist the user with a variety of tasks using natural language.\n"
    "<</SYS>>\n\n<image>\nQ? [/INST] A. </s><s>[INST] R? [/INST]",
    "chatml_direct": "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nQ?<|im_end|>"
    "<|im_start|>assistant\nA.<|im_end|><|im_start|>user\nR?<|im_end|><|im_start|>assistant\n",
    "qwen_1_5": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nQ?<|im_end|>\n"
    "<|im_start|>assistant\nA.<|im_end|>\n<|im_start|>user\nR?<|im_end|>\n<|im_start|>assistant\n",
    "gemma_instruct": "<start_of_turn>user\n<image>\nQ?<end_of_turn>\n<start_of_turn>model\nA.<end_of_turn>\n"
    "<start_of_turn>user\nR?<end_of_turn>\n<start_of_turn>model\n",
    "plain": "<image>\nQ?\nA.R?\n",
}


@pytest.mark.parametrize("name", EXPECTED)
def test_texts_are_those_of_the_original_code(name: str) -> None:
    assert render(CONVERSATIONS[name], [question("<image>", "Q?"), "A.", "R?"]) == EXPECTED[name]


def test_yi_and_llama_3_are_written_as_their_code_writes_them() -> None:
    yi = render(CONVERSATIONS["mm_default"], ["Q?", "A.", "R?"])
    assert yi.endswith("和礼貌的回答。\n\n### Human: Q?\n### Assistant: A.\n### Human: R?\n### Assistant:")
    llama = render(CONVERSATIONS["llama_3"], ["Q?", "A.", "R?"])
    assert llama.startswith("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language")
    assert llama.endswith(
        "<|start_header_id|>user<|end_header_id|>\n\nQ?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA."
        "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nR?<|eot_id|><|start_header_id|>assistant"
        "<|end_header_id|>\n\n"
    )


STOPS = {"llava_v0": "###", "vicuna_v1": "</s>", "mistral_instruct": "</s>", "qwen_1_5": "<|im_end|>"}
STOPS |= {"gemma_instruct": "<end_of_turn>", "mm_default": "###", "plain": "\n", "bunny": "<|endoftext|>"}


@pytest.mark.parametrize("name", STOPS)
def test_answers_end_where_the_original_code_ends_them(name: str) -> None:
    assert CONVERSATIONS[name].stop == STOPS[name]


def traces(*names: str, **found: Any) -> Traces:
    return Traces(
        names=names,
        model_type=found.get("model_type", "llava_llama"),
        language=found.get("language", "llama"),
        projector=found.get("projector", "mlp2x_gelu"),
        tokens=frozenset(found.get("tokens", ())),
        template=found.get("template", False),
    )


CHOSEN = {
    "llava-v1.5-7b": (traces("llava-v1.5-7b"), "llava_v1"),
    "llava-v1.6-34b": (traces("llava-v1.6-34b"), "chatml_direct"),
    "llava-v1.6-mistral-7b": (traces("llava-v1.6-mistral-7b", language="mistral"), "mistral_instruct"),
    "llava-llama-2-13b-chat": (traces("llava-llama-2-13b-chat"), "llava_llama_2"),
    "Chinese-LLaVA by its base": (traces("mine", "Chinese-Llama-2-7b"), "llava_llama_2"),
    "MobileVLM": (traces("MobileVLM-1.7B", projector="ldpnet"), "vicuna_v1"),
    "MobileVLM renamed": (traces("mine", projector="ldpnetv2"), "vicuna_v1"),
    "Yi-VL": (traces("Yi-VL-6B", projector="mlp2x_gelu_Norm"), "mm_default"),
    "ShareGPT4V": (traces("ShareGPT4V-7B"), "vicuna_v1"),
    "Bunny": (
        traces("x", model_type="bunny-qwen2", language="qwen2", tokens=["<|endoftext|>", "<|im_start|>"]),
        "bunny",
    ),
    "Bunny Llama 3": (
        traces("x", model_type="bunny-llama", tokens=["<|end_of_text|>", "<|start_header_id|>"]),
        "bunny_llama",
    ),
    "nanoLLaVA": (traces("x", model_type="llava-qwen2", language="qwen2", template=True), "tokenizer"),
    "LLaVA on Qwen": (traces("llava-v1-q", language="qwen2", tokens=["<|im_start|>"]), "qwen_1_5"),
    "LLaVA on Llama 3": (traces("llava-v1-l3", tokens=["<|start_header_id|>"]), "llama_3"),
    "LLaVA on Gemma": (traces("x", language="gemma"), "gemma_instruct"),
    "ChatML tokens alone": (traces("x", tokens=["<|im_start|>"]), "chatml_direct"),
    "nothing said": (traces("x"), "llava_v1"),
    "nothing said, first LLaVA": (traces("x", projector="linear"), "llava_v0"),
}


@pytest.mark.parametrize("case", CHOSEN)
def test_the_conversation_is_found_as_the_original_code_finds_it(case: str) -> None:
    found, wanted = CHOSEN[case]
    name, why = choose(found)
    assert name == wanted
    assert named(name) is CONVERSATIONS.get(name)
    assert why


def test_unknown_names_list_all_that_are_known() -> None:
    with pytest.raises(
        CheckpointError, match=r"unknown conversation 'v9': choose one of bunny, .*, tokenizer, v0, v1, vicuna_v1$"
    ):
        named("v9")
    assert named("v1") is CONVERSATIONS["vicuna_v1"]
    assert named("mistral") is CONVERSATIONS["mistral_instruct"]


def test_a_template_of_other_words_is_another_text() -> None:
    """The comparison is sharp: one blank more is seen."""
    changed = dataclasses.replace(CONVERSATIONS["llava_v1"], sep="  ")
    prompt = dataclasses.replace(spec("llava_v1"), chat_template=chat_template(changed, "<image>"))
    text = runtime.render(messages(["Q?"], 1), prompt)
    assert text != render(CONVERSATIONS["llava_v1"], [question("<image>", "Q?")])
