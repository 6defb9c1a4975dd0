"""Opening checkpoints: every spelling and file layout, and nothing but CheckpointError on damaged or hostile files."""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoints import respell
from conftest import MakeTiny
from vlm_models.checkpoint import Sources, open_checkpoint
from vlm_models.errors import CheckpointError
from vlm_models.model import load_model


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """A checkpoint that may be damaged."""
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def rewrite_header(path: Path, change: Any) -> None:
    """Apply `change` to the parsed header of a safetensors file, keeping the data."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


@pytest.mark.parametrize("style", ["4.3x", "4.5x", "5.x"])
def test_every_spelling_gives_the_same_tensors(tiny: Path, copy: Path, style: str) -> None:
    respell(copy, style)
    one, other = open_checkpoint(tiny), open_checkpoint(copy)
    assert one.names() == other.names()
    assert all(np.array_equal(one.rows(n), other.rows(n)) for n in one.names())
    assert one.fingerprint == other.fingerprint


def test_shards_are_read_as_one_file(tiny: Path, make_tiny: MakeTiny) -> None:
    whole, shards = open_checkpoint(tiny), open_checkpoint(make_tiny(max_shard_size="100KB"))
    assert (shards.folder / "model.safetensors.index.json").is_file()
    assert all(np.array_equal(whole.rows(n), shards.rows(n)) for n in whole.names())


def test_rows_are_views_that_can_be_released_and_read_again(tiny: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    name = "language_model.embed_tokens.weight"
    before = checkpoint.rows(name, 3, 9).copy()
    checkpoint.release(name)
    assert np.array_equal(checkpoint.rows(name)[3:9], before)
    assert not checkpoint.rows(name).flags.writeable


def test_another_weight_is_another_fingerprint(copy: Path) -> None:
    before = open_checkpoint(copy).fingerprint
    file = copy / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    assert open_checkpoint(copy).fingerprint != before


def test_a_pickle_of_tensors_is_read_like_safetensors(tiny: Path, copy: Path) -> None:
    from safetensors.torch import load_file

    state = {k: v.bfloat16() for k, v in load_file(copy / "model.safetensors").items()}
    torch.save(state, copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    one, other = open_checkpoint(tiny), open_checkpoint(copy)
    assert one.names() == other.names()
    assert {other.dtype(n) for n in other.names()} == {"BF16"}
    name = "multi_modal_projector.linear_1.weight"
    assert np.allclose(one.rows(name), other.rows(name).astype(np.float32), rtol=1e-2)


def test_a_hostile_pickle_is_refused_and_not_executed(copy: Path, tmp_path: Path) -> None:
    trace = tmp_path / "executed"

    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (trace,)

    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Hostile()}))
    with pytest.raises(CheckpointError, match="not executed"):
        open_checkpoint(copy)
    assert not trace.exists()


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", ""])
def test_an_index_that_points_outside_is_refused(copy: Path, file: str) -> None:
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": file}}))
    with pytest.raises(CheckpointError, match="outside its folder"):
        open_checkpoint(copy)


def test_a_missing_shard_is_named(copy: Path) -> None:
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-2.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors is missing"):
        open_checkpoint(copy)


def test_a_truncated_file_is_named(copy: Path) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="truncated"):
        open_checkpoint(copy)


def test_two_spellings_of_one_tensor_are_refused(copy: Path) -> None:
    def double(header: dict[str, Any]) -> None:
        name = next(n for n in header if n.startswith("vision_tower."))
        header["model." + name] = header[name]

    rewrite_header(copy / "model.safetensors", double)
    with pytest.raises(CheckpointError, match="two tensors are both"):
        open_checkpoint(copy)


def test_missing_and_wrong_shaped_tensors_are_named_with_both_shapes(copy: Path) -> None:
    def drop(header: dict[str, Any]) -> None:
        header.pop(next(n for n in header if n.endswith("layers.1.mlp.up_proj.weight")))

    def reshape(header: dict[str, Any]) -> None:
        entry = next(e for n, e in header.items() if n.endswith("layers.0.mlp.up_proj.weight"))
        entry["shape"] = entry["shape"][::-1]

    rewrite_header(copy / "model.safetensors", reshape)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight' has shape \(\d+, \d+\), but .* asks for \(\d+, \d+\)"):
        load_model(copy)
    rewrite_header(copy / "model.safetensors", reshape)
    rewrite_header(copy / "model.safetensors", drop)
    with pytest.raises(CheckpointError, match=r"language_model\.layers\.1\.mlp\.up_proj\.weight' is missing"):
        load_model(copy)


def test_unsupported_types_and_families_are_listed(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    for change, message in (
        ({"model_type": "blip"}, "'blip' is not supported; supported are .*llava"),
        ({"text_config": {**config["text_config"], "model_type": "mamba"}}, "'mamba' is not supported; .*qwen2"),
        ({"vision_config": {**config["vision_config"], "model_type": "dinov2"}}, "'dinov2' .*siglip_vision_model"),
        ({"vision_feature_layer": 99}, "vision_feature_layer 99 is outside"),
        ({"text_config": {**config["text_config"], "hidden_size": "many"}}, "is not a valid config"),
    ):
        (copy / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(CheckpointError, match=message):
            load_model(copy)


def test_no_folder_and_no_config_say_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="could not be had from the hub"):
        open_checkpoint("nobody/nothing")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damaged_header_raises_anything_else(copy: Path, data: st.DataObject) -> None:
    file = copy / "model.safetensors"
    raw = bytearray(file.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, 8 + length - 1))] = data.draw(st.integers(0, 255))
    broken = copy.parent / "broken"
    shutil.copytree(copy, broken, dirs_exist_ok=True)
    (broken / "model.safetensors").write_bytes(raw)
    with contextlib.suppress(CheckpointError):
        load_model(broken)


@pytest.mark.parametrize("name", ["base", "vision_tower", "conversation"])
def test_a_source_that_would_change_nothing_is_refused(tiny: Path, name: str) -> None:
    with pytest.raises(
        CheckpointError, match=f"Hugging Face's layout, so that --{name.replace('_', '-')} would change"
    ):
        open_checkpoint(tiny, Sources(**{name: "llava_v1"}))
