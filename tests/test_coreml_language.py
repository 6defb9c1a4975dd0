"""The Core ML language model, converted for every family and run from its package by our executor, against the walk."""

from __future__ import annotations

import dataclasses
import tempfile
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
from vlm_export.coreml.sdk import coremltools
from vlm_models.errors import CheckpointError, InputError
from vlm_models.model import Model, load_model
from vlm_quant.recipe import Precision
from vlm_runtime.engines.mil import MilDecoder
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
    """`convert(case, precision, kv=…, layout=…)`: the package, made once per set of arguments. Read only.

    Layouts and cache policies take turns by default, so that each stands with many families.
    """
    made: dict[str, Path] = {}

    def make(case: str, precision: Precision = FP16, **options: Any) -> Path:
        turn = LANGUAGES.index(case)
        turns = {"kv": ("state", "io")[turn % 2], "layout": ("plain", "ane")[turn // 2 % 2]}
        options = {"prefill": (PREFILL,), **turns, **options}
        key = repr((case, precision, sorted(options.items())))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("coreml") / "language_model.mlpackage"
            model = load_model(make_tiny(**CASES[case]))
            convert_language(model, precision, made[key], max_context=CONTEXT, **options)
        return made[key]

    return make


def reference(model: Model, scale: float = 0.5) -> tuple[Floats, Floats]:
    """Rows (PROMPT + STEPS, H), the last STEPS looked up as greedy decoding asks; logits after each of those."""
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


def checked(make_tiny: MakeTiny, case: str, path: Path, bound: float, scale: float = 0.5) -> Session:
    """The package's prompt and greedy steps are the reference's, and nothing overflowed."""
    model = load_model(make_tiny(**CASES[case]))
    rows, want = reference(model, scale)
    session = Session(path, model.spec.language)
    got = session.all(rows)
    assert relative(got, want) <= bound
    assert got.argmax(-1).tolist() == want.argmax(-1).tolist()
    assert session.overflows == ()
    return session


@pytest.mark.parametrize("case", LANGUAGES)
def test_every_family_agrees_over_prefill_and_decode(make_tiny: MakeTiny, convert: Convert, case: str) -> None:
    checked(make_tiny, case, convert(case), 1e-2)


@pytest.mark.parametrize(("kv", "bound"), [("io", 1e-5), ("state", 2e-3)])
def test_fp32_is_exact_but_for_the_state_which_core_ml_holds_in_float16(
    make_tiny: MakeTiny, convert: Convert, kv: str, bound: float
) -> None:
    checked(make_tiny, "phi3", convert("phi3", FP32, kv=kv), bound)
    function = open_package(convert("phi3", FP32, kv=kv)).functions["decode"]
    assert function.inputs["inputs_embeds"].dtype == function.outputs()["logits"].dtype == "fp32"
    assert function.inputs["key_cache"].dtype == ("fp16" if kv == "state" else "fp32")


def test_channels_in_the_thousands_pass_through_float16_norms(make_tiny: MakeTiny, convert: Convert) -> None:
    """Squares of them are beyond float16, which a norm written out in float16 would not survive."""
    checked(make_tiny, "llama", convert("llama"), 1e-2, scale=2000)


def test_padding_is_never_seen(make_tiny: MakeTiny, convert: Convert) -> None:
    model = load_model(make_tiny(**CASES["mistral"]))
    rows, _ = reference(model)
    clean, dirty = (Session(convert("mistral"), model.spec.language, padding).all(rows) for padding in (0.0, 30.0))
    assert np.array_equal(clean, dirty)


def test_the_engine_fills_the_context_to_its_last_position(make_tiny: MakeTiny, convert: Convert) -> None:
    """The last rows leave no room for a padded chunk, which would be written beyond the cache."""
    model = load_model(make_tiny(**CASES["gemma3_text"]))
    rows, _ = reference(model)
    rows = np.concatenate([rows, rows[: CONTEXT - len(rows)]])
    want = model.language_model().forward(torch.from_numpy(rows)).numpy()[0]
    engine = MilDecoder(open_package(convert("gemma3_text")), CONTEXT)
    engine.prefill(rows[:5])
    engine.prefill(rows[5:38])
    engine.rewind(35)
    got = engine.prefill(rows[35:])
    assert engine.position == CONTEXT
    assert relative(got, want) <= 1e-2


def test_a_rewound_cache_goes_on_as_a_new_one(make_tiny: MakeTiny, convert: Convert) -> None:
    model = load_model(make_tiny(**CASES["gemma2"]))
    rows, _ = reference(model)
    session = Session(convert("gemma2"), model.spec.language)
    first = session.all(rows)
    session.position = PREFILL
    again = session.run("prefill", PREFILL, rows[PREFILL:PROMPT])
    assert np.array_equal(again, first[0])


def test_a_lost_mask_or_position_would_be_seen(make_tiny: MakeTiny, convert: Convert) -> None:
    model = load_model(make_tiny(**CASES["llama"]))
    rows, want = reference(model)
    unmasked = Session(convert("llama"), model.spec.language, visible=False)
    assert not relative(unmasked.all(rows), want) <= 1e-2
    shifted = Session(convert("llama"), model.spec.language)
    shifted.run("prefill", PREFILL, rows[:PREFILL])
    shifted.position += 1
    assert not relative(shifted.run("prefill", PREFILL, rows[PREFILL:PROMPT]), want[0]) <= 1e-2


def test_functions_share_one_copy_of_the_weights_and_nothing_is_left_behind(
    make_tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "temporary"
    elsewhere.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    model = load_model(make_tiny())
    path = tmp_path / "language_model.mlpackage"
    details = convert_language(model, FP16, path, max_context=CONTEXT, prefill=(PREFILL, 4, 400))
    assert details["functions"] == {"prefill": 16, "prefill_4": 4, "prefill_48": 48, "decode": 1}
    assert details["kv"] == "state"
    assert details["cache"] == "fp16"
    names = [n for n in model.checkpoint.names() if n.startswith(("language_model.", "lm_head."))]
    numbers = sum(int(np.prod(model.checkpoint.shape(n))) for n in names if "embed_tokens" not in n)
    assert sum(f.stat().st_size for f in path.rglob("weight.bin")) < 1.1 * 2 * numbers
    package = open_package(path)
    assert package.default == "prefill"
    assert package.metadata == {"vlm.fingerprint": model.spec.fingerprint, "vlm.part": "language_model"}
    assert {p.name for p in tmp_path.iterdir()} == {"language_model.mlpackage", "temporary"}
    assert list(elsewhere.iterdir()) == []
    assert tempfile.tempdir == str(elsewhere)
    rows, want = reference(model)
    whole, pieces = Session(path, model.spec.language), Session(path, model.spec.language)
    assert relative(whole.run("prefill_48", 48, rows[:PROMPT]), want[0]) <= 1e-2
    for function, size, start, stop in (("prefill_4", 4, 0, 3), ("prefill", 16, 3, 19), ("prefill", 16, 19, PROMPT)):
        last = pieces.run(function, size, rows[start:stop])
    assert relative(last, want[0]) <= 1e-2


def test_coremltools_reads_the_merged_package_and_finds_the_checkpoints_weights(
    make_tiny: MakeTiny, convert: Convert
) -> None:
    """The merge on the disk is ours, so the reader is Apple's."""
    path, model = convert("llama"), load_model(make_tiny(**CASES["llama"]))
    specification = coremltools("models.utils").load_spec(str(path))
    load = coremltools("converters.mil.frontend.milproto.load").load
    program = load(specification, specification.specificationVersion, str(path / "Data/com.apple.CoreML/weights"))
    assert set(program.functions) == {"prefill", "decode"}
    assert [f.name for f in specification.description.functions] == ["prefill", "decode"]
    for described in specification.description.functions:
        function = program.functions[described.name]
        assert sorted(s.name for s in described.state) == ["key_cache", "value_cache"]
        assert {i.name for i in described.input} | {"key_cache", "value_cache"} == set(function.inputs)
        constants = {op.name: op.outputs[0].val for op in function.operations if op.op_type == "const"}
        for layer in range(model.spec.language.layers):
            for name in ("self_attn.q_proj", "mlp.down_proj"):
                want = model.checkpoint.rows(f"language_model.layers.{layer}.{name}.weight").astype(np.float16)
                assert np.array_equal(constants[f"layers_{layer}_{name.replace('.', '_')}_weight"], want)


@pytest.mark.parametrize(("weights", "layout", "cosine"), [("int8", "ane", 0.999), ("int4", "plain", 0.9)])
def test_fewer_bits_stay_near(make_tiny: MakeTiny, convert: Convert, weights: str, layout: str, cosine: float) -> None:
    path = convert("llama", Precision(weights), layout=layout)  # type: ignore[arg-type]
    model = load_model(make_tiny(**CASES["llama"]))
    rows, want = reference(model)
    got = Session(path, model.spec.language).all(rows)
    assert float((got * want).sum() / np.linalg.norm(got) / np.linalg.norm(want)) >= cosine
    assert relative(got, want) > 1e-3


def test_a_wide_head_is_split_for_the_neural_engine(
    make_tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "ANE_CHANNELS", 100)
    model = load_model(make_tiny())
    path = tmp_path / "language_model.mlpackage"
    convert_language(model, FP16, path, max_context=CONTEXT, layout="ane", prefill=(PREFILL,))
    checked(make_tiny, "llama", path, 1e-2)
    types = Counter(op.type for op in open_package(path).functions["decode"].block.operations)
    assert types["conv"] > 22
    assert types["linear"] == 0


def test_what_cannot_be_converted_is_refused_in_one_line(make_tiny: MakeTiny, tmp_path: Path) -> None:
    model, path = load_model(make_tiny()), tmp_path / "language_model.mlpackage"
    for options, message in (
        ({"kv": "paged"}, "unknown KV cache policy 'paged': choose one of state, io"),
        ({"layout": "tiled"}, "unknown layout 'tiled': choose one of plain, ane"),
        ({"prefill": ()}, "prefill lengths none"),
        ({"prefill": (16, 0)}, "prefill lengths 16, 0"),
    ):
        with pytest.raises(InputError, match=message):
            convert_language(model, FP16, path, max_context=CONTEXT, **options)
    language = dataclasses.replace(model.spec.language, activation="quick_gelu")
    strange = Model(model.checkpoint, dataclasses.replace(model.spec, language=language))
    with pytest.raises(CheckpointError, match="activation 'quick_gelu' has no Core ML form: supported are silu"):
        convert_language(strange, FP16, path, max_context=CONTEXT)
    assert list(tmp_path.iterdir()) == []


def test_weights_beyond_float16_are_refused_by_name(make_tiny: MakeTiny, tmp_path: Path) -> None:
    model = load_model(make_tiny())
    name = "language_model.layers.1.mlp.up_proj.weight"
    stored = model.checkpoint.tensors[name]
    large = dataclasses.replace(stored, array=np.full_like(stored.array, 7e4), map=None)
    checkpoint = dataclasses.replace(model.checkpoint, tensors={**model.checkpoint.tensors, name: large})
    path = tmp_path / "language_model.mlpackage"
    with pytest.raises(CheckpointError, match=rf"{name}' has weights beyond float16's 65504: export it at fp32"):
        convert_language(Model(checkpoint, model.spec), FP16, path, max_context=CONTEXT)
    assert list(tmp_path.iterdir()) == []


def test_prefill_lengths_are_cut_to_the_context() -> None:
    assert function_rows((64,), 4096) == {"prefill": 64, "decode": 1}
    assert function_rows((64, 256, 512), 128) == {"prefill": 64, "prefill_128": 128, "decode": 1}
