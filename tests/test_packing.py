"""Packing: layers at their own precision, integers that a quantizer chose, int8 embeddings, all of it counted."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
import pytest
from gguf import quants
from numpy.typing import NDArray

import mil_programs
from bundles import HIDDEN, VOCAB, tiny_bundle, tiny_table
from conftest import MakeTiny
from vlm_export import parity, shared
from vlm_export.algorithms import form_of
from vlm_export.coreml.compress import compress
from vlm_export.gguf.layers import tensor_types
from vlm_export.gguf.tensors import gguf_name
from vlm_export.rules import check_rules, kept_note, language_layers
from vlm_export.target import Job, find_target, silent
from vlm_export.targets.onnx import language_model
from vlm_models.checkpoint import Stored
from vlm_models.errors import CheckpointError, RecipeError
from vlm_models.grid import Grid
from vlm_models.model import Model, language_tensors, load_model
from vlm_quant import affine, grid
from vlm_quant.blockwise import dequantize_blocks
from vlm_quant.grouped import Form, symmetric_group
from vlm_quant.recipe import PARTS, Precision, parse_recipe
from vlm_runtime.bundle import Bundle, open_bundle
from vlm_runtime.embedding import EmbeddingTable
from vlm_runtime.manifest import Part, Table, problems, read_manifest
from vlm_runtime.mil import Executor, open_package

WIDE = {"text_options": {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}}


def language(text: str) -> Precision:
    return parse_recipe(f"language={text}").language


def chosen(rows: int, columns: int, bits: int, group: int, *, symmetric: bool) -> tuple[NDArray[np.int16], Grid]:
    """Integers as a quantizer may choose them, whose largest one says nothing of the scale."""
    rng = np.random.default_rng(rows + columns + bits + group)
    shape = (rows, -(-columns // group))
    scales = (np.exp(rng.normal(0, 0.5, shape)) * 0.16 / 2**bits).astype(np.float32)
    if symmetric:
        numbers = rng.integers(-(2 ** (bits - 1)) + (bits == 8), 2 ** (bits - 1), (rows, columns)) // 2
        return numbers.astype(np.int16), Grid(bits, group, scales)
    zeros = rng.integers(0, 2**bits, shape).astype(np.uint8)
    return rng.integers(0, 2**bits, (rows, columns)).astype(np.int16), Grid(bits, group, scales, zeros)


def decided(model: Model, bits: int, group: int, *, symmetric: bool) -> tuple[Model, dict[str, NDArray[np.int16]]]:
    """The model with every matrix of its layers on a grid, and the integers by tensor."""
    tensors, numbers = dict(model.checkpoint.tensors), {}
    for name, shape in language_tensors(model.spec):
        if len(shape) == 2 and ".layers." in name:
            numbers[name], own = chosen(*shape, bits, group, symmetric=symmetric)
            tensors[name] = Stored("F32", grid.values(numbers[name], own), grid=own)
    return Model(dataclasses.replace(model.checkpoint, tensors=tensors), model.spec), numbers


def onnx_language(model: Model, text: str, folder: Path) -> tuple[Part, onnx.ModelProto]:
    """The language model's graph at a precision, with its weights."""
    (folder / "onnx").mkdir(parents=True)
    part = language_model(model.checkpoint, model.spec, language(text), folder / "onnx", 64, silent)
    return part, onnx.load(folder / part.graph)


def matmuls(graph: onnx.ModelProto) -> Counter[str]:
    """Matrix products by operator, those of MatMulNBits with bits and group."""
    found: Counter[str] = Counter()
    for node in graph.graph.node:
        a = {x.name: x.i for x in node.attribute}
        bits = f":{a['bits']}:g{a['block_size']}" if node.op_type == "MatMulNBits" else ""
        found[node.op_type + bits] += node.op_type.startswith("MatMul")
    return +found


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
def test_layers_are_named_as_the_walk_names_them(make_tiny: MakeTiny, family: str) -> None:
    spec = load_model(make_tiny(text=family)).spec
    tensors = {name.removeprefix("language_model.").removesuffix(".weight") for name, _ in language_tensors(spec)}
    names = {n for n in language_layers(spec.language) if not spec.language.fused or "o_proj" in n or "down" in n}
    assert names - {"lm_head"} <= tensors
    assert len(language_layers(spec.language)) == 7 * spec.language.layers + 1


def test_a_rule_that_fits_nothing_is_refused_with_the_names_that_there_are(tiny: Path) -> None:
    layers = language_layers(load_model(tiny).spec.language)
    check_rules(language("int4;lm_head=fp16;layers.0-1=int8;mlp=fp16"), layers, "language_model")
    for typo in ("lm_hed", "layers.7", "down_pro", "self_attn.mlp"):
        with pytest.raises(RecipeError, match=rf"rule {typo}=int8 fits no linear layer .* lm_head"):
            check_rules(language(f"int4;lm_head=fp16;{typo}=int8"), layers, "language_model")


@pytest.mark.parametrize(
    ("target", "text", "said"),
    [
        ("coreai", "fp16;lm_head=fp32", "one precision for the whole language part"),
        ("onnx", "int4;lm_hed=fp16", "fits no linear layer"),
        ("onnx", "int4;lm_head=q6_k", "no precision 'q6_k'"),
        ("gguf", "q4_0;lm_hed=fp16", "fits no linear layer"),
        ("gguf", "q4_0;lm_head=int4:g64", "its blocks are fixed"),
        ("gguf", "fp16;lm_head=q6_k", "as in 'language=q8_0;lm_head=q6_k'"),
        ("coreml", "int4;lm_hed=fp16", "fits no linear layer"),
        ("tensorrt", "w8a8;lm_hed=fp16", "fits no linear layer"),
        ("tensorrt", "int4;lm_head=q6_k", "no precision 'q6_k'"),
        ("coreml", "pal4;lm_head=int8", "rule lm_head=int8 cannot be"),
        ("coreml", "int4;lm_head=fp32", "rules take fp16, int8, int4"),
    ],
)
def test_what_a_target_cannot_pack_is_refused_before_work_in_one_line(
    tiny: Path, target: str, text: str, said: str
) -> None:
    spec = load_model(tiny).spec
    with pytest.raises(RecipeError) as caught:
        find_target(target).requires(parse_recipe(f"language={text}"), spec, ["language_model"], 64)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_onnx_layers_take_the_operators_and_bytes_of_their_rules(make_tiny: MakeTiny, tmp_path: Path) -> None:
    model = load_model(make_tiny(**WIDE))
    layers = model.spec.language.layers
    plain, graph = onnx_language(model, "int4:g64", tmp_path / "plain")
    assert matmuls(graph) == {"MatMulNBits:4:g64": 5 * layers, "MatMulNBits:8:g128": 1}
    assert plain.details["kept"] == {"lm_head": "int8:g128: its errors count most; a rule for it makes it smaller"}
    rules = "int4:g64;layers.0=fp16;v_proj=int4:g32;layers.1.mlp.down_proj=fp32;lm_head=int4:g16"
    mixed, graph = onnx_language(model, rules, tmp_path / "mixed")
    # v stands beside q and k, which are one matrix no more; layer 0 has four in fp16, two of them unlike v.
    counts = {"MatMul": 6 + 1, "MatMulNBits:4:g32": layers, "MatMulNBits:4:g16": 1}
    assert matmuls(graph) == {**counts, "MatMulNBits:4:g64": 6 * (layers - 1) - 1}
    assert mixed.details["linears"] == {"fp16": 6, "fp32": 1, "int4:g32": layers, "int4:g64": 11, "int4:g16": 1}
    assert {name.split(".", 2)[-1]: reason for name, reason in mixed.details["kept"].items() if "layers.1" in name} == {
        "mlp.down_proj": "fp32: asked for by a rule"
    }
    assert mixed.precision == rules
    down, spec = 256 * 512, model.spec.language
    floats = sum(a * b for name, (a, *rest) in language_tensors(model.spec) for b in rest if ".layers.0." in name)
    floats -= spec.kv_heads * spec.head_dim * 256  # v
    more = 1.5 * floats + 3.5 * down  # bytes beyond 4 bits
    head = 0.5 * spec.vocab_size * 256
    assert mixed.details["data_bytes"] - plain.details["data_bytes"] == pytest.approx(more - head, rel=0.08)


@pytest.mark.parametrize(("bits", "group", "symmetric"), [(4, 32, False), (4, 64, True), (8, 512, True)])
def test_onnx_holds_exactly_the_integers_that_were_chosen(
    make_tiny: MakeTiny, tmp_path: Path, bits: int, group: int, symmetric: bool
) -> None:
    model, numbers = decided(load_model(make_tiny(**WIDE)), bits, group, symmetric=symmetric)
    part, graph = onnx_language(model, f"int4:g{group}" if bits == 4 else "int8", tmp_path)
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in graph.graph.initializer}
    assert part.details["grids"] == 5 * model.spec.language.layers
    assert part.details["rounded_again"] == []
    for layer in range(model.spec.language.layers):
        name = f"layers.{layer}.mlp.down_proj"
        stored = numbers[f"language_model.{name}.weight"]
        if bits == 8:
            np.testing.assert_array_equal(weights[f"{name}.weight"].T, stored)
            continue
        packed = weights[f"{name}.weight"]
        digits = np.stack([packed & 15, packed >> 4], -1).reshape(stored.shape).astype(np.int16)
        np.testing.assert_array_equal(digits - (8 if symmetric else 0), stored)
        q = numbers[f"language_model.layers.{layer}.self_attn.q_proj.weight"]
        joined = weights[f"layers.{layer}.self_attn.qkv_proj.weight"][: len(q)]
        digits = np.stack([joined & 15, joined >> 4], -1).reshape(q.shape).astype(np.int16)
        np.testing.assert_array_equal(digits - (8 if symmetric else 0), q)


def test_a_grid_of_another_form_is_rounded_again_and_named(make_tiny: MakeTiny, tmp_path: Path) -> None:
    model, _ = decided(load_model(make_tiny(**WIDE)), 4, 32, symmetric=False)
    part, _ = onnx_language(model, "int4:g128", tmp_path)
    assert part.details["grids"] == 0
    assert len(part.details["rounded_again"]) == 5 * model.spec.language.layers


@pytest.mark.parametrize("columns", [64, 50])
@pytest.mark.parametrize("group", [16, 32, 64])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True)])
def test_packing_and_unpacking_give_the_same_weights(columns: int, group: int, bits: int, symmetric: bool) -> None:
    numbers, own = chosen(9, columns, bits, group, symmetric=symmetric)
    weights = grid.values(numbers, own)
    np.testing.assert_array_equal(grid.integers(weights, own), numbers)
    if bits == 4:
        packed = grid.pack_int4(weights, own)
        np.testing.assert_array_equal(affine.dequantize_int4(packed, columns), weights)
        whole = affine.dequantize_int4(packed, packed.packed.shape[1] * group)
        assert not whole[:, columns:].any(), "columns beyond the matrix stand for zeros"
    else:
        np.testing.assert_array_equal(
            affine.dequantize_int8_groups(grid.pack_int8_groups(weights, own), columns), weights
        )
    finer = grid.regrouped(own, 16, columns)
    if group >= columns or not group % 16:
        assert finer is not None
        np.testing.assert_array_equal(grid.values(numbers, finer), weights)
    assert grid.regrouped(own, 256, columns) is None or group >= columns


def test_weights_beside_their_grid_are_no_silent_rounding() -> None:
    numbers, own = chosen(4, 32, 4, 32, symmetric=False)
    moved = grid.values(numbers, own) + own.scales * np.float32(0.45)
    with pytest.raises(CheckpointError, match=r"0\.45 steps beside their grid of 4 bits"):
        grid.integers(moved, own)
    with pytest.raises(CheckpointError, match="beside their grid"):
        grid.integers(grid.values(numbers, own) + own.scales * 20, own)


@pytest.mark.parametrize(
    ("asked", "columns", "group"),
    [
        (32, 96, 32),  # as asked
        (256, 512, 256),
        (256, 576, 64),  # the largest of 128, 64, 32, 16 that divides
        (128, 320, 64),
        (64, 48, 16),
        (32, 112, 16),
        (64, 37, 37),  # any other that divides
        (32, 72, 24),
        (16, 24, 12),
        (32, 37, 0),  # finer ones are not worth it
        (32, 20, 20),
        (16, 35, 0),
    ],
)
def test_all_targets_around_zero_take_the_same_groups(asked: int, columns: int, group: int) -> None:
    assert symmetric_group(asked, columns) == group
    form = form_of(Precision("int4", asked), columns, symmetric=True)
    assert form == (Form(4, group, True) if group else Form(8, 0, True))
    assert form_of(Precision("int4", asked), columns, symmetric=False) == Form(4, asked, False)


@pytest.mark.parametrize(("bits", "group"), [(4, 16), (4, 64), (8, 64)])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_scales_of_fewer_bits_keep_the_integers(bits: int, group: int, dtype: str) -> None:
    numbers, own = chosen(9, 64, bits, group, symmetric=True)
    own.scales[:] *= np.geomspace(1, 1e3, 9, dtype=np.float32)[:, None]
    own.scales[4] = 0  # a row of zeros
    numbers[4] = 0
    weights = grid.values(numbers, own)
    got, scales = grid.pack_blocks(weights, own, dtype)
    np.testing.assert_array_equal(got, numbers)
    assert scales.dtype == dtype
    np.testing.assert_allclose(dequantize_blocks(got, scales), weights, rtol=2**-11)


def test_rows_whose_scale_float16_has_not_are_rounded_on_one_that_it_has() -> None:
    numbers, own = chosen(4, 32, 8, 32, symmetric=True)
    own.scales[1], own.scales[2], own.scales[3] = 1e-5, 2.9e-6, 1e-9
    weights = grid.values(numbers, own)
    got, scales = grid.pack_blocks(weights, own, np.float16)
    np.testing.assert_array_equal(got[:2], numbers[:2])
    assert (scales > 0).all()
    back = dequantize_blocks(got, scales)
    assert (np.abs(back - weights) <= 0.51 * scales.astype(np.float32)).all()
    plain = numbers * own.scales.astype(np.float16).astype(np.float32)
    assert np.abs(back[2] - weights[2]).max() < np.abs(plain[2] - weights[2]).max()


def gguf_language(model: Model, text: str, root: Path) -> tuple[Part, dict[str, gguf.ReaderTensor]]:
    root.mkdir()
    job = Job(model, parse_recipe(f"language={text}"), root, 64, ("language_model",), gguf_tokenizer="none")
    part = find_target("gguf").build(job)["language_model"]
    return part, {tensor.name: tensor for tensor in gguf.GGUFReader(root / part.graph).tensors}


def kinds(tensors: Mapping[str, gguf.ReaderTensor]) -> dict[str, str]:
    return {name: tensor.tensor_type.name.lower() for name, tensor in tensors.items() if tensor.data.ndim == 2}


@pytest.mark.parametrize(
    "text", ["q4_0;lm_head=fp16;layers.1=int8", "q4_k_m;lm_head=q5_0;layers.1=int8;down_proj=q6_k"]
)
def test_gguf_tensors_take_the_types_of_their_rules(make_tiny: MakeTiny, tmp_path: Path, text: str) -> None:
    """Written by ourselves, and by llama.cpp's quantizer with overrides."""
    part, tensors = gguf_language(load_model(make_tiny(**WIDE)), text, tmp_path / "out")
    found, whole = kinds(tensors), text.split(";")[0]
    assert found["output.weight"] == ("f16" if whole == "q4_0" else "q5_0")
    assert found["blk.1.attn_q.weight"] == found["blk.1.ffn_up.weight"] == "q8_0"
    assert found["blk.1.ffn_down.weight"] == ("q8_0" if whole == "q4_0" else "q6_k")
    assert found["blk.0.attn_output.weight"] == whole.removesuffix("_m")
    assert part.precision == text
    assert (part.details["kept"].get("output.weight") == "f16: asked for by a rule") is (whole == "q4_0")


def test_gguf_layers_of_one_matrix_take_one_precision(make_tiny: MakeTiny) -> None:
    spec = load_model(make_tiny(text="phi3")).spec.language
    assert set(tensor_types(language("q4_0;self_attn=int8"), spec).values()) == {"q8_0"}
    with pytest.raises(RecipeError, match="in one matrix with its neighbours"):
        tensor_types(language("q4_0;q_proj=int8"), spec)


@pytest.mark.parametrize(
    ("type", "bits", "group", "symmetric"),
    [("q4_0", 4, 64, True), ("q4_1", 4, 32, False), ("q8_0", 8, 512, True)],
)
def test_gguf_blocks_hold_exactly_the_integers_that_were_chosen(
    make_tiny: MakeTiny, tmp_path: Path, type: str, bits: int, group: int, symmetric: bool
) -> None:
    model, numbers = decided(load_model(make_tiny(**WIDE)), bits, group, symmetric=symmetric)
    part, tensors = gguf_language(model, type, tmp_path / "out")
    assert part.details["grids"] == len(numbers)
    spec = model.spec.language
    for name, integers in numbers.items():
        tensor, own = tensors[gguf_name(name, spec)], model.checkpoint.grid(name)
        assert own is not None
        want = grid.values(integers, own)
        if "q_proj" in name or "k_proj" in name:  # llama.cpp's rotated pairs are neighbours
            want = want.reshape(-1, 2, spec.head_dim // 2, want.shape[1]).swapaxes(1, 2).reshape(want.shape)
        got = quants.dequantize(tensor.data, tensor.tensor_type)
        steps = np.abs(got - want) / np.repeat(own.scales, group, 1)[:, : want.shape[1]].mean()
        assert steps.max() < (0.2 if bits == 4 else 0.4), name  # scales are fp16; another integer is a whole step


def test_coreml_layers_take_their_rules_and_their_integers(tmp_path: Path) -> None:
    weights = mil_programs.weights()
    numbers, own = chosen(64, 96, 4, 32, symmetric=True)
    point, rows = chosen(64, 64, 8, 64, symmetric=True)
    weights["plain"] = grid.values(numbers, own).astype(np.float16)
    weights["point"] = grid.values(point, rows).astype(np.float16)[:, :, None, None]
    layers = {"plain": ("a.plain", own), "point": ("b.point", rows), "odd": ("c.odd", None), "product": ("d.x", own)}
    made, details = compress(mil_programs.layers(weights), language("int4;b=int8;odd=fp16"), layers=layers)
    assert details["linears"] == {"int4:g32": 2, "fp16": 1, "int8": 3}
    assert (details["grids"], details["rounded_again"]) == (2, ["product"])
    assert details["kept"]["odd"] == "fp16: asked for by a rule"
    package = open_package(mil_programs.saved(made, tmp_path / "model.mlpackage"))
    shapes = {"x": (8, 96), "y": (8, 48), "z": (8, 37), "image": (1, 3, 8, 8), "map": (1, 64, 2, 2), "wide": (8, 160)}
    rng = np.random.default_rng(1)
    feeds = {name: rng.standard_normal(shape).astype(np.float16).astype(np.float32) for name, shape in shapes.items()}
    got: Mapping[str, Any] = Executor(package).run(feeds).outputs
    exact = feeds["x"] @ grid.values(numbers, own).T
    np.testing.assert_allclose(got["plain_out"], exact, atol=2e-3 * np.abs(exact).max())
    exact = (grid.values(point, rows) @ feeds["map"].reshape(64, 4)).reshape(1, 64, 2, 2)
    np.testing.assert_allclose(got["point_out"], exact, atol=2e-3 * np.abs(exact).max())


def with_int8_table(folder: Path) -> tuple[Bundle, affine.Int8]:
    """A tiny bundle whose table is integers."""
    bundle = open_bundle(tiny_bundle(folder))
    quantized = affine.quantize_int8(tiny_table())
    (folder / "embedding.bin").write_bytes(quantized.values.tobytes())
    (folder / "embedding.scales.bin").write_bytes(quantized.scales.astype("<f4").tobytes())
    table = Table("embedding.bin", "I8", VOCAB, HIDDEN, "embedding.scales.bin")
    return Bundle(bundle.folder, dataclasses.replace(bundle.manifest, embedding=table)), quantized


def test_an_int8_table_gives_rows_within_rounding_one_by_one_and_together(tmp_path: Path) -> None:
    bundle, quantized = with_int8_table(tmp_path / "bundle")
    table, row = EmbeddingTable(bundle), np.empty(HIDDEN, np.float32)
    ids = [3, 0, VOCAB - 1, 3]
    got, exact = table.rows(ids), tiny_table()[ids]
    assert got.dtype == np.float32
    assert (np.abs(got - exact) <= 0.501 * quantized.scales[ids, None]).all()
    for token, want in zip(ids, got, strict=True):
        table.row_into(token, row)
        np.testing.assert_array_equal(row, want)


def test_scales_of_a_table_are_checked(tmp_path: Path) -> None:
    bundle, _ = with_int8_table(tmp_path / "bundle")
    without = dataclasses.replace(bundle.manifest.embedding, scales=None)
    said = list(problems(dataclasses.replace(bundle.manifest, embedding=without)))
    assert any("table of I8 has no file of scales" in line for line in said)
    assert any("'embedding.scales.bin', which is not in 'files'" in line for line in problems(bundle.manifest))
    assert "scales" not in (tmp_path / "bundle/manifest.json").read_text("utf-8"), "older runtimes know no such field"
    assert read_manifest(tmp_path / "bundle").embedding.scales is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_table_is_written_as_integers_where_the_recipe_says_so(
    make_tiny: MakeTiny, tmp_path: Path, dtype: str
) -> None:
    model = load_model(make_tiny(dtype=dtype))
    assert parse_recipe(str(parse_recipe("language=int4,embedding=int8"))).embedding == Precision("int8")
    table = shared.write_embedding(model.checkpoint, model.spec, tmp_path, silent, int8=True)
    assert (table.dtype, table.scales) == ("I8", "embedding.scales.bin")
    values = np.fromfile(tmp_path / table.file, "i1").reshape(table.rows, table.columns)
    scales = np.fromfile(tmp_path / str(table.scales), "<f4")
    exact = affine.widen(model.checkpoint.rows("language_model.embed_tokens.weight"))
    assert (np.abs(values * scales[:, None] - exact) <= 0.501 * scales[:, None]).all()
    assert (np.abs(values).max(1) == 127).all()


@pytest.mark.parametrize("text", ["embedding=int4", "embedding=fp16", "embedding=int8;lm_head=fp16"])
def test_a_table_takes_int8_or_stays(text: str) -> None:
    with pytest.raises(RecipeError, match="give embedding=int8, or leave it out"):
        parse_recipe(text)
    assert "embedding" not in str(parse_recipe("int4"))
    assert "embedding" in PARTS


def test_parity_judges_by_the_coarsest_layer_and_advises_on_it() -> None:
    recipe = parse_recipe("language=fp16;down_proj=int4:g64,embedding=int8")
    assert parity.coarsest(recipe, parity.STAGES["inputs_embeds"]) == "int8"
    assert parity.coarsest(recipe, parity.STAGES["image_embeds"]) == "fp16"
    assert parity.coarsest(recipe, parity.STAGES["logits"]) == "int4"
    numbers = {"cosine": 0.1, "max_abs": 1.0, "relative_l2": 1.0, "threshold": {"cosine": 0.9}}
    failed = {"passed": False, "stages": {"logits": numbers}, "greedy": {"equal": 0, "of": 1}}
    advice = parity.failure(failed, recipe)
    assert advice is not None
    assert advice.endswith("try --precision vision=fp16,projector=fp16,language=fp16,embedding=int8")
    failed["stages"] = {"inputs_embeds": numbers}
    advice = parity.failure(failed, recipe)
    assert advice is not None
    assert advice.endswith("language=fp16;down_proj=int4:g64")


def test_what_was_kept_is_one_line_for_the_console() -> None:
    kept = {"a": "fp16: asked for by a rule", "b": "fp16: asked for by a rule", "c": "x", "d": "y", "e": "z"}
    (line,) = kept_note("language_model", language("int4;lm_head=fp16"), kept)
    assert line.startswith("language_model: 5 tensors are not int4:g32: 2 fp16: asked for by a rule; 1 x; 1 y; 1 more")
    assert kept_note("projector", Precision("fp16"), {}) == []
