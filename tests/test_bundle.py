"""A bundle opens only when every file is the one that was written; its embedding rows are the checkpoint's."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.gemma.modeling_gemma import GemmaTextScaledWordEmbedding

from bundles import HIDDEN, SPEC, VOCAB, tiny_bundle, tiny_table
from vlm_models.errors import BundleError, PromptError
from vlm_runtime.bundle import open_bundle
from vlm_runtime.embedding import EmbeddingTable
from vlm_runtime.manifest import read_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_bundle(tmp_path / "bundle")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("shared") / "bundle")


def refusal(folder: Path, *, verify: bool = True) -> str:
    with pytest.raises(BundleError) as error:
        open_bundle(folder, verify=verify)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_sound_bundle_opens_and_says_what_can_run_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    bundle = open_bundle("bundle")
    assert bundle.spec == SPEC
    assert bundle.engines("language_model") == ["onnx"]
    assert bundle.path(bundle.part("projector", "onnx").graph).read_bytes() == b"projector"
    monkeypatch.chdir("/")
    assert bundle.path("golden.npz").is_file()


def test_an_engine_or_part_that_is_not_there_is_named_with_those_that_are(folder: Path) -> None:
    bundle = open_bundle(folder)
    with pytest.raises(BundleError, match=r"no projector for engine 'gguf'; it has onnx: .*--target gguf"):
        bundle.part("projector", "gguf")
    with pytest.raises(BundleError, match="no part 'decoder'; it has vision_encoder, projector, language_model"):
        bundle.engines("decoder")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "", "."])
def test_a_path_out_of_the_bundle_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(BundleError, match="not a path inside the bundle"):
        open_bundle(folder).path(name)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_one_flipped_bit_anywhere_is_refused_naming_the_file(shared: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(read_manifest(shared).files)))
    good = (shared / name).read_bytes()
    damaged = bytearray(good)
    damaged[data.draw(st.integers(0, len(good) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        (shared / name).write_bytes(bytes(damaged))
        assert refusal(shared).startswith(f"{shared / name} does not match its sha256")
        open_bundle(shared, verify=False)
    finally:
        (shared / name).write_bytes(good)


@pytest.mark.parametrize("verify", [True, False])
def test_a_file_that_is_missing_short_long_or_no_file_is_refused(folder: Path, verify: bool) -> None:
    path = folder / "onnx" / "projector.onnx.data"
    good = path.read_bytes()
    for content in (good[:-1], good + b"x", b""):
        path.write_bytes(content)
        assert f"{path} has {len(content)} bytes instead of {len(good)}" in refusal(folder, verify=verify)
    path.unlink()
    assert f"{path} is missing" in refusal(folder, verify=verify)
    path.mkdir()
    assert f"{path} is not a file" in refusal(folder, verify=verify)


def test_a_link_out_of_the_bundle_is_refused_and_one_inside_is_taken(folder: Path, tmp_path: Path) -> None:
    path, outside = folder / "golden.npz", tmp_path / "outside"
    shutil.move(path, outside)
    path.symlink_to(outside)
    assert f"{path} is a link out of the bundle" in refusal(folder)
    path.unlink()
    path.symlink_to(path)
    assert f"{path} is missing" in refusal(folder)
    path.unlink()
    shutil.move(outside, folder / "same")
    path.symlink_to("same")
    open_bundle(folder)


def test_a_folder_link_out_of_the_bundle_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.move(folder / "onnx", tmp_path / "elsewhere")
    (folder / "onnx").symlink_to(tmp_path / "elsewhere")
    assert "is a link out of the bundle" in refusal(folder)


def test_a_bundle_reached_through_a_link_opens(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    assert open_bundle(tmp_path / "link").folder == folder.resolve()


def test_files_larger_than_a_block_are_hashed_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm_runtime.bundle._BLOCK", 7)
    open_bundle(folder)
    path = folder / "embedding.bin"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    assert "does not match its sha256" in refusal(folder)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("multiplier", [1.0, 8.0**0.5])
def test_rows_equal_transformers_embedding(tmp_path: Path, dtype: str, multiplier: float) -> None:
    spec = dataclasses.replace(SPEC, language=dataclasses.replace(SPEC.language, embed_multiplier=multiplier))
    table = EmbeddingTable(open_bundle(tiny_bundle(tmp_path / "bundle", spec, dtype)))
    stored = tiny_table(dtype)
    bf16 = dtype == "BF16"
    weight = torch.from_numpy(stored.view(np.int16)).view(torch.bfloat16) if bf16 else torch.from_numpy(stored)
    module = GemmaTextScaledWordEmbedding(VOCAB, HIDDEN, 0, embed_scale=multiplier)
    module.weight.data = weight.float()
    ids = [3, 0, VOCAB - 1, 3, 11]
    wanted = module(torch.tensor(ids)).detach().numpy()
    rows = table.rows(ids)
    assert rows.dtype == np.float32
    assert rows.flags.c_contiguous
    np.testing.assert_array_equal(rows, wanted)
    out = np.full(HIDDEN, np.nan, np.float32)
    for token, row in zip(ids, wanted, strict=True):
        table.row_into(token, out)
        np.testing.assert_array_equal(out, row)
    assert table.rows([]).shape == (0, HIDDEN)


@pytest.mark.parametrize("token", [-1, VOCAB, 10**9])
def test_an_id_outside_the_table_is_refused(folder: Path, token: int) -> None:
    table = EmbeddingTable(open_bundle(folder))
    with pytest.raises(PromptError, match=f"token id {token} is outside the embedding table of {VOCAB} rows"):
        table.rows([1, token, 2])
    with pytest.raises(PromptError, match=f"token id {token} is outside"):
        table.row_into(token, np.empty(HIDDEN, np.float32))


def test_rows_do_not_change_the_file(folder: Path) -> None:
    table = EmbeddingTable(open_bundle(folder))
    table.rows([1, 2])[...] = 7
    open_bundle(folder)
    np.testing.assert_array_equal(table.rows([1, 2]), tiny_table()[1:3])


def test_a_table_cut_after_opening_is_refused(folder: Path) -> None:
    bundle = open_bundle(folder)
    (folder / "embedding.bin").write_bytes(tiny_table().tobytes()[:-4])
    with pytest.raises(BundleError, match="does not hold 37 × 8 numbers of F32"):
        EmbeddingTable(bundle)
    (folder / "embedding.bin").write_bytes(b"")
    with pytest.raises(BundleError, match="cannot map"):
        EmbeddingTable(bundle)


def test_these_modules_import_without_torch_pillow_tokenizers_or_jinja() -> None:
    code = (
        "import sys, vlm_runtime.bundle, vlm_runtime.embedding, vlm_runtime.image, vlm_runtime.prompt, "
        "vlm_runtime.splice; print([m for m in ('torch', 'transformers', 'PIL', 'tokenizers', 'jinja2', 'onnxruntime')"
        " if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
