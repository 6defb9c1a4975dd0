"""Keeps the language model what it was on plain text: KL to the base model on its own answers to short prompts."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_models.demo.conversation import HEAD, MIDDLE, PAD_ID

PROMPTS = (
    "What is the capital of Japan?", "What is the capital of Italy?", "What is the capital of Egypt?",
    "Name three primary colors.", "Write a sentence about the sea.", "What is two plus two?",
    "Tell me a short story about a cat.", "How do plants make food?", "Give me a recipe for pancakes.",
    "What is a computer?", "Why is the sky blue?", "Who wrote Romeo and Juliet?", "List four animals that can fly.",
    "Explain gravity to a child.", "What is the largest planet?", "Say hello in Spanish.", "What do bees do?",
    "How many days are in a week?", "Describe a sunny day.", "What is the opposite of hot?",
    "Write a haiku about autumn.", "What is photosynthesis?", "How does a bicycle work?", "Name a famous painter.",
    "What is water made of?", "Give one tip for sleeping well.", "What is music?", "Where do penguins live?",
    "What color is grass?", "How many legs does a spider have?", "What shape is a wheel?", "Is the earth round?",
    "Can you help me write an email?", "Hello!", "Who are you?", "What is a triangle?", "Where is Berlin?",
    "Is there life on Mars?", "Translate 'good morning' into French.", "What is the boiling point of water?",
)  # fmt: skip
ANSWER_TOKENS = 32


@dataclass(frozen=True)
class Replay:
    ids: Tensor  # (T,) prompt and the base model's answer
    prompt: int  # tokens of the prompt
    log_probs: Tensor  # (answer, vocabulary) bf16, of the base model


@torch.no_grad()
def base_answers(language_model: Any, tokenizer: Any) -> list[Replay]:
    """The base model's greedy answers to PROMPTS and its distribution at each of their tokens."""
    texts = [f"{HEAD}{prompt}{MIDDLE}" for prompt in PROMPTS]
    lengths = [len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
    asked = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    said = language_model.generate(
        **asked, max_new_tokens=ANSWER_TOKENS, do_sample=False, pad_token_id=PAD_ID, eos_token_id=PAD_ID
    )[:, asked.input_ids.shape[1] :]
    replays = []
    for text, length, answer in zip(texts, lengths, said.tolist(), strict=True):
        if PAD_ID in answer:
            answer = answer[: answer.index(PAD_ID) + 1]
        ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids + answer)
        logits = language_model(ids[None]).logits[0, length - 1 : -1]
        replays.append(Replay(ids, length, logits.float().log_softmax(-1).bfloat16()))
    return replays


def replay_loss(language_model: Any, replays: list[Replay], rng: random.Random, count: int = 6) -> Tensor:
    """Mean KL(base || model) per answer token over `count` random prompts."""
    chosen = rng.sample(replays, count)
    length = max(len(replay.ids) for replay in chosen)
    ids = torch.full((count, length), PAD_ID)
    scored = torch.zeros(count, length, dtype=torch.bool)
    for row, replay in enumerate(chosen):
        ids[row, : len(replay.ids)] = replay.ids
        scored[row, replay.prompt - 1 : len(replay.ids) - 1] = True
    hidden = language_model.model(ids, use_cache=False).last_hidden_state[scored]
    log_probs = language_model.lm_head(hidden).float().log_softmax(-1)
    target = torch.cat([replay.log_probs for replay in chosen]).float()
    return F.kl_div(log_probs, target, log_target=True, reduction="batchmean")
