"""The whole line on tiny checkpoints: what export writes, what it leaves when it fails, and what it adds to."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file

import vlm_export
from conftest import MakeTiny
from exporting import copy_parts, exported
from vlm_export import golden, parity, preflight, shared
from vlm_export.target import Job, find_target, silent, target_names
from vlm_models.checkpoint import open_checkpoint
from vlm_models.errors import CheckError, CheckpointError, DependencyError, InputError
from vlm_models.family import read_spec
from vlm_runtime.bundle import open_bundle
from vlm_runtime.embedding import EmbeddingTable
from vlm_runtime.engine import engine_names, find_engine
from vlm_runtime.image import open_image, preprocess
from vlm_runtime.manifest import Part, read_manifest
from vlm_runtime.tokenizer import Tokenizer, expand

# The module: `vlm_export.export` is the function.
LINE = sys.modules["vlm_export.export"]


@pytest.fixture(scope="session")
def bundle(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tiny, tmp_path_factory)


@pytest.fixture
def copied(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_parts(bundle, monkeypatch)


@pytest.fixture
def other_target(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A second target "other", whose parts are one small file each; `fails` makes its build raise."""

    def build(job: Job) -> dict[str, Part]:
        if target.fails is not None:
            raise target.fails
        (job.root / "other").mkdir()
        parts = {}
        for part in job.parts:
            (job.root / "other" / part).write_text(part)
            parts[part] = Part(f"other/{part}", (f"other/{part}",), "fp16")
        target.context = job.max_context
        return parts

    target = SimpleNamespace(
        ENGINES=dict.fromkeys(("vision_encoder", "projector", "language_model"), "other"),
        RUN_BY=("other",),
        GRIDS="own",
        requires=lambda *_: None,
        bytes_needed=lambda *_: 1000,
        build=build,
        fails=None,
        context=0,
    )
    find = find_target
    for module in (LINE, preflight):
        monkeypatch.setattr(module, "find_target", lambda name: target if name == "other" else find(name))
    return target


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_bundle_is_whole_and_proven(bundle: Path, tiny: Path) -> None:
    manifest = open_bundle(bundle).manifest
    assert set(contents(bundle)) == {*manifest.files, "manifest.json"}
    assert manifest.spec.fingerprint == open_checkpoint(tiny).fingerprint
    assert manifest.max_context == 512
    assert manifest.recipes == {"onnx": "vision=fp32,projector=fp32,language=fp32"}
    found = manifest.parity["onnx"]
    assert found["passed"]
    assert found["greedy"] == {"equal": 32, "of": 32, "threshold": 32}
    assert found["stages"]["logits"]["relative_l2"] <= 1e-5
    assert {"torch", "transformers", "onnx", "onnxruntime", "vlm-export"} <= set(manifest.tools)
    assert list(bundle.parent.iterdir()) == [bundle]


def test_the_manifest_fits_its_json_schema(bundle: Path) -> None:
    schema = json.loads(resources.files("vlm_runtime").joinpath("manifest.schema.json").read_text("utf-8"))
    jsonschema.validate(json.loads((bundle / "manifest.json").read_text("utf-8")), schema)


def test_the_golden_vectors_replay(bundle: Path) -> None:
    opened = open_bundle(bundle)
    assert opened.manifest.golden == golden.VECTORS
    vectors = load_file(bundle / golden.VECTORS)
    with safe_open(bundle / golden.VECTORS, framework="numpy") as file:
        about = file.metadata()
    pixels = preprocess(open_image(bundle / golden.PICTURE), opened.spec.preprocess)
    np.testing.assert_allclose(vectors["pixel_values"], pixels[None], atol=1e-5)
    ids = expand(Tokenizer(opened).encode(about["prompt"]), opened.spec.prompt, [opened.spec.prompt.image_tokens])
    assert vectors["prompt_ids"].tolist() == ids
    text = np.array(ids) != opened.spec.prompt.image_token_id
    rows = EmbeddingTable(opened).rows([i for i, t in zip(ids, text, strict=True) if t])
    np.testing.assert_allclose(vectors["inputs_embeds"][text], rows, atol=1e-6)
    np.testing.assert_array_equal(vectors["inputs_embeds"][~text], vectors["image_embeds"][0])
    assert vectors["logits"].argmax() == vectors["greedy_tokens"][0]
    assert vectors["greedy_tokens"].shape == (32,)


@pytest.mark.parametrize(("dtype", "stored"), [("bfloat16", "BF16"), ("float16", "F16"), ("float32", "F32")])
def test_the_embedding_table_is_the_checkpoints_bytes(
    make_tiny: MakeTiny, tmp_path: Path, dtype: str, stored: str
) -> None:
    checkpoint = open_checkpoint(make_tiny(dtype=dtype))
    table = shared.write_embedding(checkpoint, read_spec(checkpoint), tmp_path, silent)
    rows = checkpoint.rows("language_model.embed_tokens.weight")
    assert (tmp_path / table.file).read_bytes() == rows.tobytes()
    assert (table.dtype, table.rows, table.columns) == (stored, *rows.shape)


@pytest.mark.usefixtures("copied")
def test_without_the_check_nothing_is_claimed(tiny: Path, tmp_path: Path) -> None:
    manifest = vlm_export.export(tiny, "onnx", tmp_path / "out", check=False, max_context=40)
    assert manifest == read_manifest(tmp_path / "out")
    assert (manifest.parity, manifest.golden, manifest.max_context) == ({}, None, 40)
    assert not (tmp_path / "out" / "golden").exists()


@pytest.mark.usefixtures("copied")
def test_missed_parity_raises_and_the_bundle_says_so(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(parity.LOGITS, "int8", {"cosine": 1.1})
    with pytest.raises(CheckError, match=r"logits cosine .* < 1\.1 at language=int8; try --precision .*language=fp16"):
        vlm_export.export(tiny, "onnx", tmp_path / "out", precision="int8", greedy_tokens=3)
    found = open_bundle(tmp_path / "out").manifest.parity["onnx"]
    assert not found["passed"]
    assert found["greedy"]["of"] == 3


def test_a_target_is_added_and_the_old_files_are_kept(
    bundle: Path, tiny: Path, tmp_path: Path, other_target: SimpleNamespace
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    for name, data in contents(bundle).items():
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).write_bytes(data)
    before = contents(output)
    manifest = vlm_export.export(tiny, "other", output, check=False)
    opened, after = open_bundle(output), contents(output)
    assert opened.manifest == manifest
    assert {n: d for n, d in after.items() if not n.startswith("other/")} == {
        **before,
        "manifest.json": after["manifest.json"],
    }
    assert opened.engines("projector") == ["onnx", "other"]
    assert list(manifest.recipes) == ["onnx", "other"]
    assert manifest.parity == read_manifest(bundle).parity
    assert other_target.context == manifest.max_context
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("error", [RuntimeError("broken SDK"), KeyboardInterrupt(), InputError("no")], ids=repr)
def test_a_failed_addition_leaves_the_old_bundle_as_it_was(
    bundle: Path, tiny: Path, other_target: SimpleNamespace, error: BaseException
) -> None:
    before = contents(bundle)
    other_target.fails = error
    with pytest.raises(type(error)):
        vlm_export.export(tiny, "other", bundle, check=False)
    assert contents(bundle) == before
    assert list(bundle.parent.iterdir()) == [bundle]


def test_another_checkpoint_is_not_added(bundle: Path, make_tiny: MakeTiny, other_target: SimpleNamespace) -> None:
    before = contents(bundle)
    with pytest.raises(InputError, match="is a bundle of another checkpoint; choose another -o or remove it"):
        vlm_export.export(make_tiny(seed=3), "other", bundle, check=False)
    assert contents(bundle) == before


@pytest.mark.parametrize("stage", ["weights", "embedding", "language_model", "reference", "parity", "hash"])
@pytest.mark.usefixtures("copied")
def test_ctrl_c_in_any_stage_leaves_nothing(tiny: Path, tmp_path: Path, stage: str) -> None:
    def interrupt(name: str, done: int, of: int) -> None:
        if name == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vlm_export.export(tiny, "onnx", tmp_path / "deep" / "out", progress=interrupt, greedy_tokens=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_kill_9_leaves_no_bundle_and_the_rerun_works(tiny: Path, tmp_path: Path) -> None:
    script = (
        "import sys, time, vlm_export\n"
        "def progress(stage, done, of):\n"
        "    if stage == 'parity': print('there', flush=True); time.sleep(60)\n"
        "vlm_export.export(sys.argv[1], 'onnx', sys.argv[2], greedy_tokens=2, progress=progress)\n"
    )
    output = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tiny), str(output)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    (partial,) = tmp_path.iterdir()
    assert partial.name == f".out.partial-{process.pid}"
    assert (partial / "onnx" / "language_model.onnx").exists()
    assert not list(tmp_path.rglob("manifest.json"))
    vlm_export.export(tiny, "onnx", output, greedy_tokens=2)
    assert list(tmp_path.iterdir()) == [output]
    assert open_bundle(output).manifest.parity["onnx"]["passed"]


def test_a_context_that_the_model_does_not_have_is_refused(tiny: Path, tmp_path: Path) -> None:
    for context in (0, -1, 513):
        with pytest.raises(InputError, match=f"max context {context} cannot be: this model takes 1 to 512 positions"):
            vlm_export.export(tiny, "onnx", tmp_path / "out", max_context=context)


def test_no_target_and_unknown_targets_are_told_apart(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no target given"):
        vlm_export.export(tiny, [], tmp_path / "out")
    with pytest.raises(InputError, match=r"unknown target 'onx': choose one of .*onnx"):
        vlm_export.export(tiny, ["onnx", "onx"], tmp_path / "out")
    with pytest.raises(CheckpointError, match="no such folder"):
        vlm_export.export(tmp_path / "nowhere", "onnx", tmp_path / "out")


def test_a_missing_sdk_is_not_an_unknown_name(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnx", None)
        patch.delitem(sys.modules, "vlm_export.targets.onnx", raising=False)
        for name in [n for n in sys.modules if n.startswith("vlm_export.onnx")]:
            patch.delitem(sys.modules, name)
        with pytest.raises(DependencyError, match=r"target 'onnx' needs onnx: pip install 'vlm-export\[onnx\]'"):
            find_target("onnx")

    def absent(*given: object) -> None:
        raise ModuleNotFoundError("No module named 'transformers'", name="transformers.models")

    monkeypatch.setattr("vlm_models.model.load_model", absent)
    with pytest.raises(DependencyError, match=r"needs transformers: pip install 'vlm-export\[export\]'"):
        vlm_export.export(tiny, "onnx", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_engine_is_said_before_anything_is_built(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent() -> None:
        raise DependencyError("engine 'onnx' needs onnxruntime")

    monkeypatch.setattr(find_engine("onnx"), "available", absent)
    monkeypatch.setattr(find_target("onnx"), "build", lambda *_, **__: pytest.fail("built"))
    with pytest.raises(DependencyError, match="needs onnxruntime"):
        vlm_export.export(tiny, "onnx", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_targets_are_found_by_file_name() -> None:
    assert "onnx" in target_names()
    for name in target_names():
        target = find_target(name)
        assert set(target.ENGINES) == {"vision_encoder", "projector", "language_model"}
        assert {*target.ENGINES.values(), *target.RUN_BY} <= set(engine_names())
        assert {*target.ENGINES.values()} <= {*target.RUN_BY, *target_names()}
        assert all(callable(f) for f in (target.requires, target.bytes_needed, target.build, target.checks))


@pytest.mark.usefixtures("copied")
def test_progress_of_every_stage_ends_where_it_said(tiny: Path, tmp_path: Path) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}
    vlm_export.export(
        tiny,
        "onnx",
        tmp_path / "out",
        greedy_tokens=2,
        progress=lambda stage, done, of: seen.setdefault(stage, []).append((done, of)),
    )
    stages = {"weights", "embedding", "language_model", "projector", "vision_encoder", "reference", "parity", "hash"}
    assert stages <= set(seen)
    for stage in stages:
        done, of = seen[stage][-1]
        assert done == of, stage
        assert all(0 <= d <= o for d, o in seen[stage])


def test_the_golden_picture_of_an_older_bundle_is_kept(tmp_path: Path) -> None:
    path = golden.write_picture(tmp_path)
    Image.new("RGB", (9, 9)).save(path)
    with Image.open(golden.write_picture(tmp_path)) as image:
        assert image.size == (9, 9)


def test_manifest_values_are_frozen(bundle: Path) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        read_manifest(bundle).golden = None  # type: ignore[misc]
