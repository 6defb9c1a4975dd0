"""Training conversations as token ids: several questions share one picture, none sees another.

The text is exactly what the checkpoint's chat template writes (template.py); a test compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlm_models.demo.parts import IMAGE_TOKENS

HEAD, MIDDLE, END = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"
PAD_ID = 2  # <|im_end|>
BLOCKED = -1e4  # added to the attention scores of what a token must not see


@dataclass(frozen=True)
class Row:
    """One picture with its questions; every list has one entry per token."""

    ids: list[int]
    positions: list[int]
    groups: list[int]  # 0: the shared prefix, 1..: the question
    answers: list[int]  # index of the question whose answer this token is, -1 for none


@dataclass(frozen=True)
class Batch:
    ids: Tensor  # (B, T)
    positions: Tensor  # (B, T)
    answers: Tensor  # (B, T)
    mask: Tensor  # (B, 1, T, T), 0 or BLOCKED


class Packer:
    """Turns (question, answer) pairs about one picture into a Row, and Rows into a Batch."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}
        self.first_image_token = len(self.ids(HEAD))

    def ids(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = self._tokenizer(text, add_special_tokens=False).input_ids
        return self._known[text]

    def row(self, pairs: list[tuple[str, str]]) -> Row:
        ids = self.ids(HEAD) + [PAD_ID] * IMAGE_TOKENS + self.ids("\n")
        prefix = len(ids)
        positions, groups, answers = list(range(prefix)), [0] * prefix, [-1] * prefix
        for index, (question, answer) in enumerate(pairs):
            asked, said = self.ids(question + MIDDLE), self.ids(answer + END)
            ids = ids + asked + said
            positions += range(prefix, prefix + len(asked) + len(said))
            groups += [index + 1] * (len(asked) + len(said))
            answers += [-1] * len(asked) + [index] * len(said)
        return Row(ids, positions, groups, answers)


def collate(rows: list[Row]) -> Batch:
    """Pad on the right; a token sees the prefix and its own question, causally."""
    length = max(len(row.ids) for row in rows)

    def padded(lists: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([items + [fill] * (length - len(items)) for items in lists])

    groups = padded([row.groups for row in rows], -1)
    seen = (groups[:, :, None] == groups[:, None]) | (groups[:, None] == 0)
    seen &= torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.zeros(len(rows), 1, length, length, dtype=torch.bfloat16).masked_fill_(~seen[:, None], BLOCKED)
    return Batch(
        padded([row.ids for row in rows], PAD_ID),
        padded([row.positions for row in rows], 0),
        padded([row.answers for row in rows], -1),
        mask,
    )
