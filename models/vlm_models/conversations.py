"""The conversations that LLaVA's original code and its descendants know by name, and which one a checkpoint takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vlm_models.conversation import Conversation
from vlm_models.errors import CheckpointError

_POLITE = "The assistant gives helpful, detailed, and polite answers to the {}'s questions."
_USER = f"A chat between a curious user and an artificial intelligence assistant. {_POLITE.format('user')}"
_HUMAN = f"A chat between a curious human and an artificial intelligence assistant. {_POLITE.format('human')}"
_LLAMA_2 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
_META = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)
_MPT = "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
_ORCA = (
    "You are MistralOrca, a large language model trained by Alignment Lab AI. Write out your reasoning step-by-step "
    "to be sure you get the right answers!"
)
_YI = (
    "This is a chat between an inquisitive human and an AI assistant. Assume the role of the AI assistant. "
    "Read all the images carefully, and respond to the human's questions with informative, helpful, detailed and "
    "polite answers. 这是一个好奇的人类和一个人工智能助手之间的对话。假设你扮演这个AI助手的角色。"
    "仔细阅读所有的图像，并对人类的问题做出信息丰富、有帮助、详细的和礼貌的回答。"
)
_CAPITALS, _IM = ("USER", "ASSISTANT"), ("<|im_start|>user\n", "<|im_start|>assistant\n")
_IM_SYSTEM, _IM_END = "<|im_start|>system\n", "<|im_end|>"


def _im(name: str, system: str) -> Conversation:
    return Conversation(name, "mpt", system, _IM, _IM_END, header=_IM_SYSTEM)


_KNOWN = (
    Conversation("llava_v0", "single", _HUMAN, ("Human", "Assistant"), "###"),
    Conversation("vicuna_v1", "two", _USER, _CAPITALS, " ", "</s>"),
    Conversation("llava_v1", "two", _HUMAN, _CAPITALS, " ", "</s>"),
    Conversation("llama_2", "llama_2", _META, _CAPITALS, "<s>", "</s>"),
    Conversation("llava_llama_2", "llama_2", _LLAMA_2, _CAPITALS, "<s>", "</s>"),
    Conversation("mistral_instruct", "llama_2", "", _CAPITALS, "", "</s>"),
    _im("mpt", _MPT),
    _im("chatml_direct", "Answer the questions."),
    _im("mistral_orca", _ORCA),
    Conversation(
        *("mistral_zephyr", "mpt", "You are a helpful AI assistant."),
        *(("<|user|>\n", "<|assistant|>\n"), "</s>"),
        header="<|system|>\n",
    ),
    Conversation(
        *("qwen_1_5", "chatml", "You are a helpful assistant.", ("<|im_start|>user", "<|im_start|>assistant")),
        *(_IM_END,),
        header=_IM_SYSTEM,
    ),
    Conversation("llama_3", "llama_3", _LLAMA_2, ("user", "assistant"), "<|eot_id|>", start="<|begin_of_text|>"),
    Conversation(
        *("gemma_instruct", "gemma", "", ("<start_of_turn>user\n", "<start_of_turn>model\n"), "<end_of_turn>\n"),
        asks_system=False,
    ),
    Conversation("plain", "plain", "", ("", ""), "\n"),
    Conversation("mm_default", "yi", _YI, ("Human", "Assistant"), "###"),
    Conversation("bunny", "two", _USER, _CAPITALS, " ", "<|endoftext|>"),
    Conversation("bunny_llama", "two", _USER, _CAPITALS, " ", "<|end_of_text|>"),
)
CONVERSATIONS: Mapping[str, Conversation] = {c.name: c for c in _KNOWN}
# The original's other names. Its "v0" shows a sample dialogue first, which no model was trained to need.
_ALIASES = {
    "v0": "llava_v0",
    "v1": "vicuna_v1",
    "mistral": "mistral_instruct",
    "mistral_direct": "chatml_direct",
    "llava_mistral_instruct": "mistral_instruct",
    "llava_llama_3": "llama_3",
    "chatml": "chatml_direct",
    "minicpm": "vicuna_v1",
}


OWN = "tokenizer"
"""The name for what the tokenizer's own chat template writes."""


@dataclass(frozen=True)
class Traces:
    """What a checkpoint shows of the conversation it was trained on.

    `names` are those of its folder and of `_name_or_path`; `language` is its language model's model_type, `projector`
    its mm_projector_type, `model_type` that of the original config; `tokens` are those of TELLING that it has,
    `template` whether that has a chat template.
    """

    names: tuple[str, ...]
    model_type: str
    language: str
    projector: str
    tokens: frozenset[str]
    template: bool = False


def named(name: str) -> Conversation | None:
    """The conversation of that name, None for the tokenizer's own. Raises CheckpointError listing all of them."""
    found = CONVERSATIONS.get(_ALIASES.get(name, name))
    if found is None and name != OWN:
        allowed = ", ".join(sorted({*CONVERSATIONS, *_ALIASES, OWN}))
        raise CheckpointError(f"unknown conversation {name!r}: choose one of {allowed}")
    return found


def choose(traces: Traces) -> tuple[str, str]:
    """Name of the conversation and why, in words.

    By what only one line of models has; then by name, in the order of the original's run_llava.py; else llava_v1.
    """
    names = [name.lower() for name in traces.names]
    for name, holds, why in (
        ("mm_default", "norm" in traces.projector.lower(), f"projector {traces.projector} is Yi-VL's"),
        *_of_language(traces),
    ):
        if holds:
            return name, why
    for part, name in _BY_NAME:
        for given in names:
            if part in given:
                return name, f"the name {given!r} has {part!r}"
    if "<|im_start|>" in traces.tokens:
        return "chatml_direct", "the tokenizer has <|im_start|>"
    if traces.projector == "linear":
        return "llava_v0", "nothing in the folder says which, and a linear projector is of the first LLaVA"
    return "llava_v1", "nothing in the folder says which"


_BY_NAME = (
    ("llama-2", "llava_llama_2"),
    ("llama2", "llava_llama_2"),
    ("mistral", "mistral_instruct"),
    ("34b", "chatml_direct"),
    ("mobilevlm", "vicuna_v1"),
    ("sharegpt4v", "vicuna_v1"),
    ("v1", "llava_v1"),
    ("v0", "llava_v0"),
)


def _of_language(traces: Traces) -> tuple[tuple[str, bool, str], ...]:
    bunny, tokens = "bunny" in traces.model_type, traces.tokens
    ended = "<|end_of_text|>" in tokens
    return (
        ("bunny_llama", bunny and ended, f"model_type {traces.model_type} and a tokenizer with <|end_of_text|>"),
        ("bunny", bunny and "<|endoftext|>" in tokens, f"model_type {traces.model_type}"),
        ("vicuna_v1", bunny, f"model_type {traces.model_type}"),
        (
            OWN,
            traces.template and traces.model_type == "llava-qwen2",
            "nanoLLaVA's code takes its tokenizer's template",
        ),
        ("llama_3", "<|start_header_id|>" in tokens, "the tokenizer has <|start_header_id|>"),
        ("gemma_instruct", traces.language.startswith("gemma"), f"the language model is {traces.language}"),
        ("qwen_1_5", traces.language.startswith("qwen"), f"the language model is {traces.language}"),
        ("mistral_instruct", traces.language == "mistral", "the language model is mistral"),
        ("vicuna_v1", traces.projector.startswith("ldp"), f"projector {traces.projector} is MobileVLM's"),
    )


TELLING = ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "<|endoftext|>", "<|end_of_text|>")
