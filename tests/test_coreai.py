"""Core AI assets, written from checkpoints and run by Apple's own runtime through engine coreai, against the walk."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import importlib.util
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from conftest import MakeTiny
from test_families import CASES
from vlm_export.coreai.convert import EncoderPart, convert_encoder, convert_language
from vlm_export.export import export
from vlm_export.targets import coreai as target
from vlm_models.errors import BundleError, CheckpointError, DependencyError, InputError, PromptError, RecipeError
from vlm_models.model import Model, load_model
from vlm_quant.recipe import Precision, parse_recipe
from vlm_runtime.bundle import Bundle
from vlm_runtime.engine import Options
from vlm_runtime.engines import coreai as engine
from vlm_runtime.manifest import Part

CONTEXT, PROMPT, STEPS = 48, 29, 16
BOUNDS = {"fp32": 1e-4, "fp16": 1e-2}
VISION_ONLY = {"two feature layers", "all rows of a later layer", "an early layer, no projector bias", "patch 14"}
LANGUAGES = [case for case in CASES if case not in VISION_ONLY]
QUICK = {"llama": "fp16", "gemma3_text": "fp32"}  # converting one takes seconds

Floats = NDArray[np.float32]
Convert = Callable[[str, str], Path]


def bundle_of(asset: Path, model: Model, context: int = CONTEXT, **spec: Any) -> Bundle:
    """A bundle of one part, as far as an engine looks at it."""
    part = Part(f"{asset.name}/metadata.json", (), "")
    manifest = SimpleNamespace(max_context=context, parts={asset.stem: {"coreai": part}})
    facts = dataclasses.replace(model.spec, **spec)
    inside = SimpleNamespace(spec=facts, manifest=manifest, part=lambda *_: part, path=lambda name: asset.parent / name)
    return cast(Bundle, inside)


@pytest.fixture(scope="module")
def convert(make_tiny: MakeTiny, tmp_path_factory: pytest.TempPathFactory) -> Convert:
    """`convert(case, precision)`: the language model's asset, written once. Read only."""
    made: dict[tuple[str, str], Path] = {}

    def write(case: str, precision: str) -> Path:
        if (case, precision) not in made:
            path = tmp_path_factory.mktemp("coreai") / "language_model.aimodel"
            model = load_model(make_tiny(**CASES[case]))
            convert_language(model, parse_recipe(precision).language, path, max_context=CONTEXT)
            made[case, precision] = path
        return made[case, precision]

    return write


def opened(make_tiny: MakeTiny, case: str, path: Path, **options: Any) -> engine.CoreAIDecoder:
    return engine.decoder(bundle_of(path, load_model(make_tiny(**CASES[case]))), Options(**options))


def prompt(model: Model) -> Floats:
    rows = np.random.default_rng(5).standard_normal((PROMPT, model.spec.language.hidden_size)) * 0.5
    return rows.astype(np.float32)


def embedding(model: Model, token: int) -> Floats:
    row = model.checkpoint.rows("language_model.embed_tokens.weight", token, token + 1)[0].astype(np.float32)
    return row * np.float32(model.spec.language.embed_multiplier)


def relative(got: Floats, want: Floats) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize(
    ("case", "precision"),
    [
        *(pytest.param(case, precision, id=f"{case}-{precision}") for case, precision in QUICK.items()),
        *(
            pytest.param(case, ("fp32", "fp16")[i % 2], marks=pytest.mark.slow, id=f"{case}-{('fp32', 'fp16')[i % 2]}")
            for i, case in enumerate(LANGUAGES)
            if case not in QUICK
        ),
    ],
)
def test_every_family_agrees_over_prefill_and_greedy_decode(
    make_tiny: MakeTiny, convert: Convert, case: str, precision: str
) -> None:
    model = load_model(make_tiny(**CASES[case]))
    decoder, language = opened(make_tiny, case, convert(case, precision)), model.language_model()
    rows = prompt(model)
    got, want = [decoder.prefill(rows).copy()], [language.forward(torch.from_numpy(rows))[0].numpy()]
    for _ in range(STEPS):
        row = embedding(model, int(want[-1].argmax()))
        got.append(decoder.decode(row).copy())
        want.append(language.forward(torch.from_numpy(row[None]))[0].numpy())
    assert relative(np.stack(got), np.stack(want)) <= BOUNDS[precision]
    lost = [float((truth.max() - truth[row.argmax()]) / truth.std()) for row, truth in zip(got, want, strict=True)]
    # Apple's CPU runtime adds up in float16; a random model's best two may be closer than that.
    assert max(lost) <= (0.0 if precision == "fp32" else 0.02)


def test_chunks_and_a_rewound_cache_give_what_the_whole_gives(make_tiny: MakeTiny, convert: Convert) -> None:
    """The windows of gemma3 show a position that is off by one."""
    case, path = "gemma3_text", convert("gemma3_text", "fp32")
    rows = prompt(load_model(make_tiny(**CASES[case])))
    whole = opened(make_tiny, case, path).prefill(rows).copy()
    pieces = opened(make_tiny, case, path, prefill_chunk=7)
    assert relative(pieces.prefill(rows).copy(), whole) <= 1e-5
    pieces.decode(rows[0])
    pieces.rewind(12)
    for row in rows[12:]:
        last = pieces.decode(row)
    assert pieces.position == PROMPT
    assert relative(last, whole) <= 1e-5
    pieces.rewind(11)
    assert relative(pieces.prefill(rows[12:]).copy(), whole) > 1e-3


def test_what_does_not_fit_is_refused(make_tiny: MakeTiny, convert: Convert) -> None:
    decoder = opened(make_tiny, "llama", convert("llama", "fp16"), max_context=20)
    hidden = load_model(make_tiny()).spec.language.hidden_size
    assert decoder.max_context == 20
    with pytest.raises(PromptError, match="0 \\+ 21 tokens do not fit the context of 20"):
        decoder.prefill(np.zeros((21, hidden), np.float32))
    decoder.prefill(np.zeros((20, hidden), np.float32))
    with pytest.raises(PromptError, match="20 \\+ 1 tokens"):
        decoder.decode(np.zeros(hidden, np.float32))
    with pytest.raises(ValueError, match="cannot rewind to 21"):
        decoder.rewind(21)
    for shape in ((0, hidden), (2, hidden + 1)):
        with pytest.raises(ValueError, match="prefill takes"):
            decoder.prefill(np.zeros(shape, np.float32))


def test_an_asset_of_another_model_or_part_is_refused(make_tiny: MakeTiny, convert: Convert, tmp_path: Path) -> None:
    path, model = convert("llama", "fp16"), load_model(make_tiny())
    with pytest.raises(BundleError, match="is a part of another model"):
        engine.decoder(bundle_of(path, model, fingerprint="0" * 64), Options())
    with pytest.raises(BundleError, match="it is not the projector"):
        engine.encoder(bundle_of(path, model), "projector", Options())
    with pytest.raises(BundleError, match="holds 48 positions, the manifest says 64"):
        engine.decoder(bundle_of(path, model, context=64), Options())
    for options in ({"device": "cuda"}, {"kv_cache": "f16"}, {"flash_attention": True}):
        with pytest.raises(InputError, match="leave out --device, --kv-cache and --flash-attention"):
            engine.decoder(bundle_of(path, model), Options(**options))


@pytest.mark.parametrize(
    "damage", ["no program", "empty program", "rubbish", "truncated", "no metadata", "bad metadata"]
)
def test_a_damaged_asset_is_refused_in_one_line(
    make_tiny: MakeTiny, convert: Convert, tmp_path: Path, damage: str
) -> None:
    path = Path(shutil.copytree(convert("llama", "fp16"), tmp_path / "language_model.aimodel"))
    program, metadata = path / "main.mlirb", path / "metadata.json"
    whole = program.read_bytes()
    changes: dict[str, Callable[[], object]] = {
        "no program": program.unlink,
        "empty program": lambda: program.write_bytes(b""),
        "rubbish": lambda: program.write_bytes(bytes(range(256)) * 16),
        "truncated": lambda: program.write_bytes(whole[: len(whole) // 2]),
        "no metadata": metadata.unlink,
        "bad metadata": lambda: metadata.write_text("{"),
    }
    changes[damage]()
    with pytest.raises(BundleError) as refused:
        engine.decoder(bundle_of(path, load_model(make_tiny())), Options())
    assert "\n" not in str(refused.value)


def test_it_runs_inside_an_event_loop_says_nothing_and_leaves_nothing(
    make_tiny: MakeTiny,
    convert: Convert,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path, rows = convert("llama", "fp16"), prompt(load_model(make_tiny()))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    capfd.readouterr()

    async def run() -> Floats:
        decoder = opened(make_tiny, "llama", path)
        assert list(tmp_path.iterdir()) != []
        return decoder.prefill(rows).copy()

    logits = asyncio.run(run())
    gc.collect()
    assert np.isfinite(logits).all()
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("case", "precision"), [("siglip", "fp32"), ("clip", "fp16"), ("two feature layers", "fp32")])
def test_towers_and_projectors_agree(make_tiny: MakeTiny, tmp_path: Path, case: str, precision: str) -> None:
    model = load_model(make_tiny(**CASES.get(case, {"tower": case})))
    size, recipe = model.spec.vision.image_size, Precision(cast(Any, precision))
    pixels = np.random.default_rng(3).standard_normal((2, 3, size, size)).astype(np.float32)
    with torch.inference_mode():
        features = model.vision_encoder()(torch.from_numpy(pixels))
        embeds = model.projector()(features)
    stages: dict[EncoderPart, tuple[Floats, Floats]] = {
        "vision_encoder": (pixels, features.numpy()),
        "projector": (features.numpy(), embeds.numpy()),
    }
    for part, (given, want) in stages.items():
        path = tmp_path / f"{part}.aimodel"
        convert_encoder(model, part, recipe, path)
        got = engine.encoder(bundle_of(path, model), part, Options()).run(given)
        assert got.dtype == np.float32
        assert relative(got, want) <= BOUNDS[precision]
        with pytest.raises(ValueError, match="the asset takes rows of"):
            engine.encoder(bundle_of(path, model), part, Options()).run(given[:, 1:])
    assert all(p.dtype == torch.float32 for p in model.vision_encoder().parameters())


def test_what_cannot_be_expressed_is_refused_before_work(
    make_tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(make_tiny())
    parts = ("language_model", "projector", "vision_encoder")
    target.requires(parse_recipe("fp16"), model.spec, parts, 4096)
    for precision in ("int8", "int4", "language=q4_k_m"):
        with pytest.raises(RecipeError, match=r"target 'coreai' has no precision .*: choose of fp32, fp16"):
            target.requires(parse_recipe(precision), model.spec, parts, 4096)
    strange = dataclasses.replace(
        model.spec, language=dataclasses.replace(model.spec.language, activation="quick_gelu")
    )
    with pytest.raises(CheckpointError, match="activation 'quick_gelu' has no Core AI form: supported are silu"):
        target.requires(parse_recipe("fp16"), strange, parts, 4096)
    with pytest.raises(CheckpointError, match="needs a context of 3 positions or more, got 2"):
        target.requires(parse_recipe("fp16"), model.spec, parts, 2)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DependencyError, match=r"pip install 'vlm-export\[coreai\]'"):
        target.requires(parse_recipe("fp16"), model.spec, parts, 4096)
    with pytest.raises(DependencyError, match=r"pip install 'vlm-export\[coreai\]'"):
        engine.available()


def test_weights_beyond_float16_are_refused_by_name(make_tiny: MakeTiny, tmp_path: Path) -> None:
    model = load_model(make_tiny())
    name = "language_model.layers.1.mlp.up_proj.weight"
    stored = model.checkpoint.tensors[name]
    large = dataclasses.replace(stored, array=np.full_like(stored.array, 7e4), map=None)
    checkpoint = dataclasses.replace(model.checkpoint, tensors={**model.checkpoint.tensors, name: large})
    with pytest.raises(CheckpointError, match=rf"{name}' has weights beyond float16's 65504: export it at fp32"):
        convert_language(
            Model(checkpoint, model.spec), Precision("fp16"), tmp_path / "language_model.aimodel", max_context=CONTEXT
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_whole_bundle_passes_parity_and_answers(
    tiny: Path, picture_file: Path, tmp_path: Path, precision: str
) -> None:
    import vlm_runtime

    manifest = export(tiny, "coreai", tmp_path / "bundle", precision=precision, max_context=128)
    record = manifest.parity["coreai"]
    assert record["passed"]
    assert record["stages"]["logits"]["relative_l2"] <= BOUNDS[precision]
    # At fp16 one of 32 near ties of a random model goes the other way: Apple's CPU runtime adds up in float16.
    assert record["stages"]["logits"]["top1"] >= (1.0 if precision == "fp32" else 0.9)
    assert precision == "fp16" or record["greedy"]["equal"] == record["greedy"]["of"] == 32
    assert record["device"]["measured"] is False
    parts = {name: engines["coreai"] for name, engines in manifest.parts.items()}
    assert set(parts) == {"language_model", "projector", "vision_encoder"}
    written = {file.relative_to(tmp_path / "bundle").as_posix() for file in (tmp_path / "bundle/coreai").rglob("*.*")}
    assert {file for part in parts.values() for file in part.files} == {
        w for w in written if not w.endswith(".aimodel")
    }
    answer = vlm_runtime.load(tmp_path / "bundle").answer("What is it?", [picture_file], max_new_tokens=4)
    assert set(answer.engines.values()) == {"coreai"}
