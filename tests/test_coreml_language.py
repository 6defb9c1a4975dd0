"""The Core ML language model, converted for every family and run from its package by our executor, against the walk."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from conftest import MakeTiny
from test_families import CASES
from vlm_export.coreml import decoder
from vlm_export.coreml.convert import convert_language, function_rows
from vlm_models.errors import CheckpointError, InputError
from vlm_models.model import Model, load_model
from vlm_quant.recipe import Precision
from vlm_runtime.mil import Executor, open_package

CONTEXT, PREFILL, PROMPT, STEPS = 48, 16, 29, 16
FP16, FP32 = Precision("fp16"), Precision("fp32")
VISION_ONLY = {"two feature layers", "all rows of a later layer", "an early layer, no projector bias", "patch 14"}
LANGUAGES = [case for case in CASES if case not in VISION_ONLY]

Floats = NDArray[np.float32]
Convert = Callable[..., Path]


class Session:
    """A package's functions as an engine calls them: padded chunks, then rows one by one; caches begin as rubbish."""

    def __init__(self, path: Path, spec: Any, padding: float = 0.0, visible: bool = True) -> None:
        package = open_package(path)
        self.executor, self.spec, self.padding, self.visible = Executor(package), spec, padding, visible
        self.io = "key_cache" in package.functions["decode"].inputs and not self.executor.new_state("decode")
        shape = (spec.layers, spec.kv_heads, CONTEXT, spec.head_dim)
        self.caches = {name: np.full(shape, 99, np.float16) for name in ("key_cache", "value_cache")}
        if self.io:
            self.caches = {name: cache.astype(np.float32) for name, cache in self.caches.items()}
        self.position = 0
        self.overflows: tuple[Any, ...] = ()

    def run(self, function: str, size: int, rows: Floats) -> Floats:
        """Logits (V,) of the last of `rows` (n ≤ size, H)."""
        n = len(rows)
        at = self.position + np.arange(size)[:, None]
        hidden = (np.arange(CONTEXT)[None] > at) & self.visible
        feeds = {
            "inputs_embeds": np.concatenate([rows, np.full((size - n, rows.shape[1]), self.padding, np.float32)])[None],
            "position": np.array([self.position], np.int32),
            "causal_mask": np.where(hidden, np.float32(decoder.MASKED), np.float32(0))[None, None],
            "last_row": np.array([n - 1], np.int32),
        }
        outcome = self.executor.run(
            {**feeds, **(self.caches if self.io else {})}, None if self.io else self.caches, function=function
        )
        if self.io:
            for name, new in (("key_cache", "new_keys"), ("value_cache", "new_values")):
                self.caches[name][:, :, self.position : self.position + n] = outcome.outputs[new][:, :, :n]
        self.position += n
        self.overflows += outcome.overflows
        logits: Floats = outcome.outputs["logits"]
        assert logits.shape == (1, self.spec.vocab_size)
        return logits[0].copy()

    def all(self, rows: Floats, size: int = PREFILL) -> Floats:
        """Logits (1 + STEPS, V): after the first PROMPT rows, and after each row that follows."""
        last = [self.run("prefill", size, rows[i : min(i + size, PROMPT)]) for i in range(0, PROMPT, size)][-1]
        return np.stack([last, *(self.run("decode", 1, rows[i : i + 1]) for i in range(PROMPT, len(rows)))])


@pytest.fixture(scope="session")
def convert(make_tiny: MakeTiny, tmp_path_factory: pytest.TempPathFactory) -> Convert:
    """`convert(case, precision, kv=…, layout=…)`: the package, made once per set of arguments. Read only."""
    made: dict[str, Path] = {}

    def make(case: str, precision: Precision = FP16, **options: Any) -> Path:
        key = repr((case, precision, sorted(options.items())))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("coreml") / "language_model.mlpackage"
            model = load_model(make_tiny(**CASES[case]))
            options = {"prefill": (PREFILL,), **options}
            convert_language(model, precision, made[key], max_context=CONTEXT, **options)
        return made[key]

    return make


def reference(model: Model, scale: float = 0.5) -> tuple[Floats, Floats]:
    """Rows (PROMPT + STEPS, H), the last STEPS of them looked up as greedy decoding asks; logits after each of those."""
    language = model.language_model()
    table = model.checkpoint.rows("language_model.embed_tokens.weight")
    shape = (PROMPT, model.spec.language.hidden_size)
    rows = np.random.default_rng(4).standard_normal(shape).astype(np.float32) * np.float32(scale)
    logits = [language.forward(torch.from_numpy(rows))[0].numpy()]
    for _ in range(STEPS):
        row = table[logits[-1].argmax()].astype(np.float32) * np.float32(model.spec.language.embed_multiplier)
        rows = np.concatenate([rows, row[None]])
        logits.append(language.forward(torch.from_numpy(rows[-1:]))[0].numpy())
    return rows, np.stack(logits)


def relative(got: Floats, want: Floats) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize("case", LANGUAGES)
def test_every_family_agrees_over_prefill_and_decode(make_tiny: MakeTiny, convert: Convert, case: str) -> None:
    """Layouts and cache policies take turns, so that each stands with many families."""
    turn = LANGUAGES.index(case)
    path = convert(case, kv=("state", "io")[turn % 2], layout=("plain", "ane")[turn // 2 % 2])
    model = load_model(make_tiny(**CASES[case]))
    rows, want = reference(model)
    session = Session(path, model.spec.language)
    got = session.all(rows)
    assert relative(got, want) <= 1e-2
    assert got.argmax(-1).tolist() == want.argmax(-1).tolist()
    assert session.overflows == ()
