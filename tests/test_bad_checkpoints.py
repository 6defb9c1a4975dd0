"""Bad input to vlm-export: one line that names what is wrong, exit code 2, nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from checkpoints import copy
from conftest import MakeTiny
from exporting import Command, command, rewrite
from vlm_export import preflight
from vlm_models.checkpoint import open_checkpoint
from vlm_models.errors import CheckpointError
from vlm_models.model import load_model
from vlm_quant.recipe import parse_recipe

run = pytest.fixture(command)
Damage = Callable[[Path], object]
DOWN, NORM = "language_model.model.layers.1.mlp.down_proj.weight", "language_model.model.norm.weight"
TOWER = "vision_tower.encoder.layers.0.mlp.fc1.weight"


def stored_name(folder: Path, end: str) -> str:
    """The tensor's name as the file spells it."""
    (name,) = (n for n in load_file(folder / "model.safetensors") if n.endswith(end))
    return name


def without(end: str) -> Damage:
    return lambda folder: rewrite(folder, lambda t: t.pop(stored_name(folder, end)))


def reshaped(end: str) -> Damage:
    def change(folder: Path) -> None:
        name = stored_name(folder, end)
        rewrite(folder, lambda t: t.update({name: t[name][:-1].clone()}))

    return change


def with_value(end: str, value: float) -> Damage:
    def change(folder: Path) -> None:
        name = stored_name(folder, end)
        rewrite(folder, lambda t: t[name].view(-1)[-1:].fill_(value))

    return change


def config(**values: Any) -> Damage:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)


def header_only(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 4)


def index(*files: str) -> Damage:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001.safetensors")
        names = [NORM, DOWN]
        weight_map = dict(zip(names, files, strict=True))
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return change


BAD: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "no folder": (shutil.rmtree, ("no such folder", "checkpoint")),
    "no config": (lambda f: (f / "config.json").unlink(), ("no config.json",)),
    "broken config": (lambda f: (f / "config.json").write_text('{"model_type": '), ("config.json", "JSON")),
    "family": (config(model_type="blip-2"), ("'blip-2'", "not supported", "llava")),
    "language": (config(text_config={"model_type": "mamba"}), ("'mamba'", "llama", "qwen2")),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ("no model.safetensors",)),
    "missing": (without("layers.1.mlp.down_proj.weight"), ("layers.1.mlp.down_proj.weight", "missing", "(64, 112)")),
    "missing in tower": (without("encoder.layers.0.mlp.fc1.weight"), (TOWER, "missing", "(96, 48)")),
    "shape": (reshaped("layers.1.mlp.down_proj.weight"), ("down_proj.weight", "(63, 112)", "(64, 112)")),
    "shape in tower": (reshaped("encoder.layers.0.mlp.fc1.weight"), (TOWER, "(95, 48)", "(96, 48)")),
    "truncated": (truncated, ("model.safetensors is truncated", "tensor")),
    "header": (header_only, ("truncated",)),
    "nan": (with_value("layers.1.mlp.down_proj.weight", float("nan")), ("layers.1.mlp.down_proj.weight", "NaN")),
    "inf": (with_value("model.norm.weight", float("-inf")), ("norm.weight", "infinity")),
    "outside": (index("model-00001.safetensors", "../model.safetensors"), ("'../model.safetensors'", "outside")),
    "absolute": (index("model-00001.safetensors", "/etc/passwd"), ("'/etc/passwd'", "outside")),
    "shard": (index("model-00001.safetensors", "model-00002.safetensors"), ("model-00002.safetensors is missing",)),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ("tokenizer",)),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), ("tokenizer",)),
    "no processor": (lambda f: (f / "processor_config.json").unlink(), ("preprocessor_config.json",)),
}


@pytest.mark.parametrize("name", BAD)
def test_a_damaged_checkpoint_is_one_line(tiny: Path, tmp_path: Path, run: Command, name: str) -> None:
    damage, says = BAD[name]
    checkpoint = copy(tiny, tmp_path / "checkpoint")
    damage(checkpoint)
    ran = run(checkpoint, "--target", "onnx", "-o", tmp_path / "out")
    assert ran.code == 2
    assert ran.out == ""
    assert ran.err.startswith("error: ")
    assert len(ran.err.splitlines()) == 1, ran.err
    for text in says:
        assert text in ran.err
    assert [p.name for p in tmp_path.iterdir() if p.name != "checkpoint"] == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--target", "onx"), "unknown target 'onx': choose one of coreai, coreml, gguf, onnx, tensorrt"),
        (("--target", "onnx", "--precision", "int3"), "int3"),
        (("--target", "onnx", "--precision", "language=int4:g31"), "int4:g31"),
        (("--target", "onnx", "--max-context", "99999"), "max context 99999 cannot be: this model takes 1 to 512"),
        (("--target", "onnx", "--max-context", "16"), "max context 16 leaves no room for a question"),
        (("--target", "onnx", "--max-context", "60"), "raise --max-context, lower --greedy-tokens, or give --no-check"),
        (("--target", "onnx", "--greedy-tokens", "0"), "greedy tokens 0"),
    ],
)
def test_a_value_that_cannot_be_is_one_line(
    tiny: Path, tmp_path: Path, run: Command, arguments: tuple[str, ...], says: str
) -> None:
    ran = run(tiny, *arguments, "-o", tmp_path / "out")
    assert (ran.code, len(ran.err.splitlines())) == (2, 1)
    assert says in ran.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_an_output_that_exists_is_kept(tiny: Path, tmp_path: Path, run: Command, kind: str) -> None:
    output = tmp_path / "out"
    if kind == "folder":
        output.mkdir()
        (output / "thesis.txt").write_text("mine")
    else:
        output.write_text("mine")
    ran = run(tiny, "--target", "onnx", "-o", output)
    assert (ran.code, len(ran.err.splitlines())) == (2, 1)
    assert "exists and is not a bundle; choose another -o or remove it" in ran.err
    assert (output / "thesis.txt" if kind == "folder" else output).read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_output_in_the_checkpoint_is_refused(tiny: Path, tmp_path: Path, run: Command) -> None:
    checkpoint = copy(tiny, tmp_path / "checkpoint")
    before = sorted(checkpoint.rglob("*"))
    for output in (checkpoint, checkpoint / "onnx"):
        ran = run(checkpoint, "--target", "onnx", "-o", output)
        assert ran.code == 2
        assert "is in the checkpoint" in ran.err
    assert sorted(checkpoint.rglob("*")) == before


def test_a_disk_too_small_says_need_and_have(
    tiny: Path, tmp_path: Path, run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 30, 0, 12345))
    ran = run(tiny, "--target", "onnx", "-o", tmp_path / "out")
    assert (ran.code, len(ran.err.splitlines())) == (2, 1)
    assert f"MiB in {tmp_path}, which has 12.1 KiB free" in ran.err
    assert list(tmp_path.iterdir()) == []


def test_a_pickle_is_read_as_tensors(tiny: Path, tmp_path: Path) -> None:
    checkpoint = copy(tiny, tmp_path / "checkpoint")
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    pickled, safe = load_model(checkpoint).checkpoint, open_checkpoint(tiny)
    assert pickled.names() == safe.names()
    assert all(np.array_equal(pickled.rows(name), safe.rows(name)) for name in safe.names())


def test_a_pickle_that_is_a_program_is_not_run(tiny: Path, tmp_path: Path, run: Command) -> None:
    checkpoint, canary = copy(tiny, tmp_path / "checkpoint"), tmp_path / "canary"

    class Program:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (canary,)

    torch.save({"language_model.model.norm.weight": Program()}, checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    ran = run(checkpoint, "--target", "onnx", "-o", tmp_path / "out")
    assert (ran.code, len(ran.err.splitlines())) == (2, 1)
    assert "is not executed; save it again as safetensors" in ran.err
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), "-nan"])
def test_a_bad_weight_is_found_in_every_dtype(
    make_tiny: MakeTiny, tmp_path: Path, dtype: str, value: float | str
) -> None:
    checkpoint = copy(make_tiny(dtype=dtype), tmp_path / "checkpoint")
    preflight.finite(open_checkpoint(checkpoint))
    number = float("nan") if value == "-nan" else float(value)
    name = stored_name(checkpoint, "layers.2.mlp.gate_proj.weight")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        bad = torch.tensor(number, dtype=tensors[name].dtype)
        tensors[name][3, 5] = torch.copysign(bad, torch.tensor(-1.0, dtype=bad.dtype)) if value == "-nan" else bad

    rewrite(checkpoint, change)
    with pytest.raises(CheckpointError, match=r"'language_model\.layers\.2\.mlp\.gate_proj\.weight' holds NaN"):
        preflight.finite(open_checkpoint(checkpoint))


def test_the_largest_finite_numbers_are_fine(make_tiny: MakeTiny, tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        checkpoint = copy(make_tiny(dtype=name), tmp_path / name)
        weight, limit = stored_name(checkpoint, "layers.0.mlp.up_proj.weight"), torch.finfo(dtype)
        rewrite(checkpoint, lambda t, w=weight, x=limit: t[w][0, :2].copy_(torch.tensor([x.max, x.min])))  # type: ignore[misc]
        preflight.finite(open_checkpoint(checkpoint))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_the_disk_estimate_covers_what_is_written(tiny: Path, precision: str) -> None:
    model = load_model(tiny)
    sizes = {"fp32": 4.0, "fp16": 2.0, "int8": 1.0, "int4": 0.5}
    weights = sum(int(np.prod(model.checkpoint.shape(n))) for n in model.checkpoint.names())
    parts = ["vision_encoder", "projector", "language_model"]
    needed = preflight.bytes_needed(model, parse_recipe(precision), {"onnx": parts}, False)
    assert needed > weights * sizes[precision]
    twice = preflight.bytes_needed(model, parse_recipe(precision), {"onnx": parts, "gguf": parts[-1:]}, False)
    assert 1 < twice / needed < 2
