"""Sequences that pass the decoder together come out as each does alone."""

from __future__ import annotations

from pathlib import Path

import torch

from vlm_export.streaming import batches, stream
from vlm_models.model import load_model


def test_only_short_sequences_pass_together() -> None:
    assert batches([600, 600, 600]) == [range(1), range(1, 2), range(2, 3)]
    assert batches([500, 12, 1, 100]) == [range(2), range(2), range(2, 4), range(2, 4)]
    assert batches([]) == []
    lengths = [7 * i % 700 + 1 for i in range(300)]
    for i, batch in enumerate(found := batches(lengths)):
        assert i in batch
        assert found[batch.start] == batch
        assert sum(lengths[j] for j in batch[1:]) < 512


def test_sequences_do_not_touch_each_other(tiny: Path) -> None:
    model, generator = load_model(tiny), torch.Generator().manual_seed(0)
    size = model.spec.language.hidden_size
    given = [torch.randn(rows, size, generator=generator) for rows in (200, 40, 3, 600, 1, 290)]
    together = list(given)
    stream(model.checkpoint, model.spec.language, together, lambda x, linears: x, lambda: None)
    for one, ours in zip(given, together, strict=True):
        alone = [one]
        stream(model.checkpoint, model.spec.language, alone, lambda x, linears: x, lambda: None)
        torch.testing.assert_close(ours, alone[0])
        assert not torch.equal(ours, one)
