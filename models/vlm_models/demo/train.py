"""Train the demo weights: `python -m vlm_models.demo.train --out weights.safetensors` (about an hour on two CPU cores).

Phase 1 teaches the tower to see (tower_training.py), phase 2 the language model to answer (answer_training.py). The
state is kept in the folder `--work`: run the same command again to go on after a stop.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch

from vlm_models.demo.answer_training import held_out, train_answers
from vlm_models.demo.parts import load_language_model
from vlm_models.demo.tower_training import train_tower

log = logging.getLogger(__name__)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vlm_models.demo.train", description="Train the demo weights.")
    parser.add_argument("--out", type=Path, required=True, help="the safetensors file to write")
    parser.add_argument("--work", type=Path, default=Path("demo-training"), help="folder of the resumable state")
    parser.add_argument("--tower-steps", type=int, default=800)
    parser.add_argument("--answer-steps", type=int, default=300)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(given.threads)
    given.work.mkdir(parents=True, exist_ok=True)
    language_model, tokenizer = load_language_model(torch.bfloat16)
    seer = train_tower(language_model, tokenizer, given.tower_steps, given.work / "tower.pt")
    learner = train_answers(
        seer.tower, seer.projector, language_model, tokenizer, given.answer_steps, given.work / "answers.pt", given.out
    )
    log.info("held-out exact match: %s", held_out(learner, 200))


if __name__ == "__main__":
    main()
