"""Greedy decoding by the torch decoder: token by token, or in few passes over the weights that verify drafts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from vlm_models.torch_language import TorchLanguage

Draft = Callable[[Sequence[int], int], Sequence[int]]
"""draft(tokens, n): a guess of the n greedy tokens after the prompt and `tokens`; wrong guesses cost time only."""

Blocks = Sequence[tuple[int, int]]
"""(start, stop) of rows of a prompt that see one another both ways."""

_PASSES = 4


def decode(
    language: TorchLanguage,
    embeds: Tensor,
    embed: Callable[[Sequence[int]], Tensor],
    tokens: int,
    reached: Callable[[int], None],
    *,
    blocks: Blocks = (),
) -> tuple[Tensor, list[int]]:
    """Plain greedy decoding: logits (tokens, V) and the tokens."""
    import torch

    rows, greedy = [_prefilled(language, embeds, blocks)], []
    while True:
        greedy.append(int(rows[-1].argmax()))
        reached(len(greedy))
        if len(greedy) == tokens:
            return torch.stack(rows), greedy
        rows.append(language.forward(embed(greedy[-1:]))[0])


def decode_drafts(
    language: TorchLanguage,
    embeds: Tensor,
    embed: Callable[[Sequence[int]], Tensor],
    tokens: int,
    draft: Draft | None,
    reached: Callable[[int], None],
    passes: int = _PASSES,
    *,
    blocks: Blocks = (),
) -> tuple[Tensor, list[int]]:
    """The same tokens as `decode`, or the first of them, in at most `passes` passes over the weights.

    A pass runs the drafted tokens at once and keeps those that greedy decoding would have picked, and one more. A
    prompt with blocks takes its passes before.
    """
    import torch

    rows: list[Tensor] = []
    greedy: list[int] = []
    pending = embeds  # rows that the KV cache has not seen
    if blocks:
        rows.append(_prefilled(language, embeds, blocks).clone())
        greedy.append(int(rows[0].argmax()))
        pending = embed(greedy)
    for _ in range(passes):
        if len(greedy) >= tokens:
            break
        guess = list(draft(tuple(greedy), tokens - len(greedy) - 1)) if draft is not None else []
        block = torch.cat([pending, embed(guess)]) if guess else pending
        logits = language.forward(block, last_row=not guess)[-1 - len(guess) :]
        for row, guessed in zip(logits, [*guess, None], strict=True):
            rows.append(row.clone())
            greedy.append(int(row.argmax()))
            if greedy[-1] != guessed:
                break
        reached(len(greedy))
        language.rewind(embeds.shape[0] + len(greedy) - 1)
        pending = embed(greedy[-1:])
    return torch.stack(rows[:tokens]), greedy[:tokens]


def _prefilled(language: TorchLanguage, embeds: Tensor, blocks: Blocks) -> Tensor:
    """Logits (V,) after the prompt, rows outside of blocks causal."""
    cuts = sorted({0, len(embeds), *(cut for block in blocks for cut in block)})
    for start, stop in itertools.pairwise(cuts):
        logits = language.forward(embeds[start:stop], block=(start, stop) in blocks)
    return logits[0]
