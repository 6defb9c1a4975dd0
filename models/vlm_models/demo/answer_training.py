"""Phase 2: LoRA, projector and tower learn to answer; loss on the answers only, and plain text is kept as it was."""

from __future__ import annotations

import logging
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from vlm_models.demo import lora
from vlm_models.demo.conversation import Batch, Packer, collate
from vlm_models.demo.parts import IMAGE_TOKENS, to_pixels, tower_features, trained_parameters
from vlm_models.demo.scenes import QUESTION_KINDS, draw_scene, questions
from vlm_models.demo.text_replay import base_answers, replay_loss

log = logging.getLogger(__name__)

PICTURES = 16  # a step
FIRST_SEED = 10_000_000  # pictures that phase 1 did not see
RATES = {"lora": 1e-3, "projector": 5e-4, "tower": 1e-4}
REPLAY_EVERY, REPLAY_WEIGHT = 4, 1.0
DESCRIBE_SHARE = 0.25  # its sentences are long: a picture that is described is asked little else
QUESTIONS = {True: 1, False: 4}  # beside the description, or alone: rows of about the same length


@dataclass(frozen=True)
class Learner:
    tower: Any
    projector: Any
    language_model: Any
    layers: dict[str, lora.LoRALinear]
    packer: Packer

    def state(self) -> dict[str, Tensor]:
        """The weights by the names that weights.safetensors uses."""
        parts = {"vision_tower": self.tower.state_dict(), "multi_modal_projector": self.projector.state_dict()}
        tensors = {f"{part}.{name}": tensor for part, state in parts.items() for name, tensor in state.items()}
        return tensors | {f"language_model.{name}": tensor for name, tensor in lora.tensors(self.layers).items()}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        for name, tensor in self.state().items():
            tensor.copy_(state[name])

    def embed_pictures(self, pixels: Tensor) -> Tensor:
        """(B, 3, 72, 72) -> (B, 36, 576)"""
        with torch.autocast("cpu", torch.bfloat16):
            embedded: Tensor = self.projector(tower_features(self.tower, pixels))
        return embedded

    def answer_logits(self, pictures: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits at the answers' tokens, the true ids there, and the row and question of each."""
        embedded = self.language_model.get_input_embeddings()(batch.ids)
        first = self.packer.first_image_token
        after = embedded[:, first + IMAGE_TOKENS :]
        embedded = torch.cat([embedded[:, :first], pictures.to(embedded.dtype), after], 1)
        hidden = self.language_model.model(
            inputs_embeds=embedded, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
        ).last_hidden_state
        row, column = (batch.answers >= 0).nonzero(as_tuple=True)
        logits = self.language_model.lm_head(hidden[row, column - 1]).float()
        return logits, batch.ids[row, column], row, batch.answers[row, column]


@torch.no_grad()
def held_out(learner: Learner, pictures: int) -> dict[str, float]:
    """Exact match by question kind: all true tokens being the likeliest ones is what greedy decoding needs."""
    hits, totals = dict.fromkeys(QUESTION_KINDS, 0), dict.fromkeys(QUESTION_KINDS, 0)
    for first in range(0, pictures, 20):
        scenes = [draw_scene(seed, "test") for seed in range(first, first + 20)]
        asked = [questions(objects, first + i) for i, (_, objects, _) in enumerate(scenes)]
        rows = [learner.packer.row([item[1:] for item in items]) for items in asked]
        embedded = learner.embed_pictures(to_pixels(np.stack([pixels for pixels, _, _ in scenes])))
        logits, gold, row, question = learner.answer_logits(embedded, collate(rows))
        good = logits.argmax(-1) == gold
        for i, items in enumerate(asked):
            for j, (kind, _, _) in enumerate(items):
                totals[kind] += 1
                hits[kind] += bool(good[(row == i) & (question == j)].all())
    return {kind: round(hits[kind] / max(1, totals[kind]), 3) for kind in QUESTION_KINDS}


def training_batch(learner: Learner, step: int, rng: random.Random) -> tuple[Tensor, Batch]:
    seeds = range(FIRST_SEED + step * PICTURES, FIRST_SEED + (step + 1) * PICTURES)
    scenes = [draw_scene(seed, "train") for seed in seeds]
    rows = []
    for seed, (_, objects, _) in zip(seeds, scenes, strict=True):
        *short, description = questions(objects, seed)
        described = rng.random() < DESCRIBE_SHARE
        again = next(q for q in questions(objects, seed + 1) if q[0] == "yes/no")  # the slowest kind to learn
        asked = [*rng.sample(short, QUESTIONS[described]), again, *[description] * described]
        rows.append(learner.packer.row([item[1:] for item in asked]))
    return to_pixels(np.stack([pixels for pixels, _, _ in scenes])), collate(rows)


def save_weights(learner: Learner, path: Path) -> None:
    """The shipped file: tower, projector and LoRA in fp16."""
    state = {name: tensor.half().contiguous() for name, tensor in learner.state().items()}
    save_file(state, path, metadata={"format": "pt"})


def train_answers(
    tower: Any, projector: Any, language_model: Any, tokenizer: Any, steps: int, state_path: Path, out: Path
) -> Learner:
    """Train, resuming from `state_path` where it exists; `out` is rewritten at every checkpoint."""
    torch.manual_seed(0)
    replays = base_answers(language_model, tokenizer)
    log.info("base answers: %s", tokenizer.decode(replays[0].ids))
    layers = lora.attach(language_model.model)
    learner = Learner(tower, projector, language_model, layers, Packer(tokenizer))
    parts = {
        "lora": [p for layer in layers.values() for p in (layer.lora_a, layer.lora_b)],
        "projector": list(projector.parameters()),
        "tower": trained_parameters(tower),
    }
    every = [p for group in parts.values() for p in group]
    groups = [{"params": parameters, "lr": RATES[name]} for name, parameters in parts.items()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01, betas=(0.9, 0.98))
    step = 0
    if state_path.exists():
        saved = torch.load(state_path)
        learner.load(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
    start, first = time.monotonic(), step
    average, divergence = 0.0, 0.0
    while step < steps:
        share = min(1.0, (step + 1) / 30) * max(0.02, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group, rate in zip(optimizer.param_groups, RATES.values(), strict=True):
            group["lr"] = rate * share
        rng = random.Random(step)
        pixels, batch = training_batch(learner, step, rng)
        logits, gold, _, _ = learner.answer_logits(learner.embed_pictures(pixels), batch)
        loss = answers = F.cross_entropy(logits, gold)
        if step % REPLAY_EVERY == 0:
            kept = replay_loss(language_model, replays, rng)
            loss, divergence = loss + REPLAY_WEIGHT * kept, kept.item()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(every, 1.0)
        optimizer.step()
        step += 1
        average = answers.item() if step == first + 1 else 0.9 * average + 0.1 * answers.item()
        if step % 10 == 0:
            pace = (time.monotonic() - start) / (step - first)
            log.info(
                "answers step %d/%d loss %.3f, text KL %.3f, %.2f s a step", step, steps, average, divergence, pace
            )
        if step % 50 == 0 or step == steps:
            log.info("  held-out exact match: %s", held_out(learner, 60))
            torch.save({"model": learner.state(), "optimizer": optimizer.state_dict(), "step": step}, state_path)
            save_weights(learner, out)
    return learner
