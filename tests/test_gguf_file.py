"""The GGUF writer: every row at its place, every type as llama.cpp's own package makes it, and every file read back."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, quants

from conftest import MakeTiny
from vlm_export.gguf import file
from vlm_export.gguf.architecture import Architecture
from vlm_export.gguf.blocks import largest
from vlm_export.gguf.file import FileFacts, checked, write_gguf
from vlm_export.gguf.tensors import Tensor, exact_type, tensors
from vlm_export.target import silent
from vlm_models.errors import CheckError, CheckpointError, RecipeError
from vlm_models.model import load_model
from vlm_quant.gguf_types import GGUF_TYPES

ARCH = Architecture("llama", {"llama.block_count": 1, "llama.rope.freq_base": 1e4})
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
DIRECT = [type.name for type in GGUF_TYPES.values() if type.direct]


def matrix(name: str, rows: int, columns: int, dtype: str = "F32", **changes: Any) -> tuple[Tensor, np.ndarray]:
    values = np.random.default_rng(rows * columns).standard_normal((rows, columns)).astype(DTYPES[dtype])
    tensor = Tensor(name, values.shape, dtype, True, f"source of {name}", lambda a, b: values[a:b], lambda: None)
    return dataclasses.replace(tensor, **changes), values


def vector(name: str, size: int) -> Tensor:
    values = np.arange(size, dtype=np.float32)
    return Tensor(name, (size,), "F32", False, name, lambda a, b: values[a:b], lambda: None)


def write(path: Path, parts: list[Tensor], type: str, tokenizer: dict[str, Any] | None = None) -> FileFacts:
    return write_gguf(path, ARCH, {"vlm.part": "x"}, parts, GGUF_TYPES[type], tokenizer or {}, progress=silent)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("type", DIRECT)
def test_rows_in_any_number_of_ranges_are_what_the_package_makes_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, type: str, dtype: str
) -> None:
    monkeypatch.setattr(file, "CHUNK", 3 * 64)
    (tensor, values), (small, _) = matrix("blk.0.ffn_up.weight", 100, 64, dtype), matrix("output.weight", 7, 32)
    facts = write(tmp_path / "x.gguf", [small, tensor, vector("output_norm.weight", 5)], type)
    head, found, norm = GGUFReader(tmp_path / "x.gguf").tensors
    want = quants.quantize(values.astype(np.float32), GGMLQuantizationType[type.upper()])
    assert found.data.tobytes() == want.tobytes()
    assert facts.types[found.name] == found.tensor_type.name.lower() == type
    assert facts.types[head.name] == ("q8_0" if type[:2] in ("q4", "q5") else type)
    assert norm.data.tolist() == [0, 1, 2, 3, 4]
    assert not facts.fallbacks


def test_the_header_says_what_was_given(tmp_path: Path) -> None:
    tokenizer = {"tokenizer.ggml.tokens": ["<s>", "\u00e9"], "tokenizer.ggml.token_type": [3, 1], "tokenizer.x": True}
    empty = {"tokenizer.ggml.merges": []}
    write(tmp_path / "x.gguf", [matrix("output.weight", 2, 32)[0]], "q8_0", tokenizer | empty)
    fields = {name: f.contents() for name, f in GGUFReader(tmp_path / "x.gguf").fields.items()}
    assert fields["general.architecture"] == "llama"
    assert (fields["general.file_type"], fields["general.quantization_version"]) == (7, 2)
    assert (fields["llama.block_count"], fields["llama.rope.freq_base"], fields["vlm.part"]) == (1, 10000.0, "x")
    assert {key: fields[key] for key in tokenizer} == tokenizer
    assert "tokenizer.ggml.merges" not in fields


def test_rows_that_no_block_divides_are_f16_and_named_with_the_reason(tmp_path: Path) -> None:
    odd, values = matrix("blk.0.ffn_down.weight", 4, 40)
    facts = write(tmp_path / "x.gguf", [odd, matrix("output.weight", 4, 64)[0]], "q4_0")
    assert facts.types == {odd.name: "f16", "output.weight": "q8_0"}
    assert list(facts.fallbacks) == [odd.name]
    assert "rows of 40 weights are not a multiple of q4_0's blocks of 32" in facts.fallbacks[odd.name]
    assert (GGUFReader(tmp_path / "x.gguf").tensors[0].data == values.astype(np.float16)).all()


def test_weights_beyond_fp16_are_refused_before_they_become_infinite(tmp_path: Path) -> None:
    large = np.full((2, 32), 1e5, np.float32)
    tensor, _ = matrix("output.weight", 2, 32, read=lambda a, b: large[a:b])
    with pytest.raises(RecipeError, match=r"source of output.weight reaches 1e\+05, beyond f16: choose bf16 or fp32"):
        write(tmp_path / "x.gguf", [tensor], "f16")
    write(tmp_path / "x.gguf", [tensor], "bf16")
    write(tmp_path / "x.gguf", [tensor], "q8_0")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("type", ["f16", "q8_0", "q5_1"])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, type: str, bad: float) -> None:
    values = np.ones((2, 64), np.float32)
    values[1, 40] = bad
    tensor, _ = matrix("blk.0.ffn_up.weight", 2, 64, read=lambda a, b: values[a:b])
    with pytest.raises(CheckpointError, match=r"source of blk.0.ffn_up.weight holds weights that are not finite"):
        write(tmp_path / "x.gguf", [tensor], type)


@pytest.mark.parametrize("type", [type for type in DIRECT if type not in ("f32", "bf16")])
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_weight_of_a_type_is_written_and_a_larger_one_refused(tmp_path: Path, type: str, sign: int) -> None:
    values = np.zeros((1, 64), np.float32)
    values[0, 7] = sign * largest(type)
    tensor, _ = matrix("blk.0.ffn_up.weight", 1, 64, read=lambda a, b: values[a:b])
    write(tmp_path / "x.gguf", [tensor], type)
    (found,) = GGUFReader(tmp_path / "x.gguf").tensors
    got = quants.dequantize(found.data, found.tensor_type)[0]
    assert np.isfinite(got).all()
    assert got[7] == pytest.approx(values[0, 7], rel=0.13)
    values *= 1.01
    with pytest.raises(RecipeError, match=f"beyond {type}: choose bf16 or fp32"):
        write(tmp_path / "x.gguf", [tensor], type)


def test_no_thread_reads_more_than_a_chunk_and_pages_are_dropped(tmp_path: Path) -> None:
    read, released = [], []
    rows = np.ones((4096, 4096), np.float16)

    def reading(start: int, stop: int) -> np.ndarray:
        read.append((start, stop))
        return rows[start:stop]

    parts = [
        matrix(name, 1, 32, "F16", shape=rows.shape, read=reading, release=lambda: released.append(1))[0]
        for name in "ab"
    ]
    write(tmp_path / "x.gguf", parts, "q8_0")
    assert max(stop - start for start, stop in read) * 4096 <= file.CHUNK
    assert sorted(read) == sorted([(n, n + 512) for n in range(0, 4096, 512)] * 2)
    assert len(released) == 2


def test_a_file_that_is_not_what_was_written_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write(path, [matrix("output.weight", 4, 32)[0]], "f16")
    shapes = {"output.weight": (4, 32)}
    assert checked(path, shapes) == {"output.weight": "f16"}
    for wrong, types, message in (
        ({**shapes, "output_norm.weight": (4,)}, None, "without its tensor 'output_norm.weight'"),
        ({"output.weight": (32, 4)}, None, r"has shape \(4, 32\) instead of \(32, 4\)"),
        ({}, None, "holds a tensor 'output.weight' that the model does not have"),
        (shapes, {"output.weight": "q8_0"}, "is f16 instead of q8_0"),
    ):
        with pytest.raises(CheckError, match=message):
            checked(path, wrong, types)
    whole = path.read_bytes()
    for cut in (whole[:-64], whole[:100], b"", b"GGML" + whole[4:]):
        path.write_bytes(cut)
        with pytest.raises(CheckError, match=r"x\.gguf cannot be read back") as caught:
            checked(path, shapes)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_exact_type_rounds_nothing(make_tiny: MakeTiny, tmp_path: Path, dtype: str) -> None:
    model = load_model(make_tiny(text="qwen2", dtype=dtype))
    parts = tensors(model.checkpoint, model.spec)
    type = exact_type(parts)
    assert type == {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[dtype]
    write(tmp_path / "x.gguf", parts, type)
    for stored, tensor in zip(GGUFReader(tmp_path / "x.gguf").tensors, parts, strict=True):
        got = quants.dequantize(stored.data, stored.tensor_type)
        assert (got == model.checkpoint.rows(tensor.source).astype(np.float32)).all()
