"""The prompt at int8: integer products in the fast form, chunks of one length, and a benchmark that measures both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from conftest import MakeTiny
from vlm_bench.first_token import earlier, first_token, kept
from vlm_bench.int8_speed import built, cosines, divergence, faster, long_prompts, make_language, make_vision, reference
from vlm_bench.int8_speed import languages as languages_of
from vlm_bench.measure import Stat
from vlm_export.importance import Example
from vlm_models.demo.scenes import write_calibration
from vlm_models.errors import InputError
from vlm_models.model import Model, load_model
from vlm_quant.calibration import read_pairs
from vlm_runtime.bundle import Bundle
from vlm_runtime.engine import Options, find_engine

CONTEXT = 420
RNG = np.random.default_rng(5)


@pytest.fixture(scope="module")
def model(make_tiny: MakeTiny) -> Model:
    return load_model(make_tiny())


@pytest.fixture(scope="module")
def languages(model: Model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    folder = tmp_path_factory.mktemp("languages")
    (folder / "fp32").mkdir()
    (folder / "int8").mkdir()
    return {p: built(model, f"language={p}", ("language_model",), folder / p, CONTEXT) for p in ("fp32", "int8")}


def rows(model: Model, count: int) -> np.ndarray:
    return (RNG.standard_normal((count, model.spec.language.hidden_size)) * 0.5).astype(np.float32)


@pytest.mark.parametrize(
    ("asked", "count", "lengths"),
    [
        (512, 400, [134, 134, 132]),
        (512, 193, [97, 96]),
        (512, 192, [192]),
        (512, 1, [1]),
        (8, 20, [7, 7, 6]),
    ],
)
def test_prompts_run_in_chunks_of_one_length_that_attention_likes(
    model: Model,
    languages: dict[str, Bundle],
    asked: int,
    count: int,
    lengths: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """600 rows at once cost a tenth more at int8 than four times 150: attention masks half of what it computes."""
    decoder = find_engine("onnx").decoder(languages["int8"], Options(threads=1, prefill_chunk=asked))
    run, seen = decoder._run, []  # type: ignore[attr-defined]

    def watched(binding: object, chunk: int) -> None:
        seen.append(chunk)
        run(binding, chunk)

    monkeypatch.setattr(decoder, "_run", watched)
    decoder.prefill(rows(model, count))
    assert seen == lengths
    assert decoder.position == count


def test_a_prompt_in_chunks_says_what_it_says_row_by_row(model: Model, languages: dict[str, Bundle]) -> None:
    """Each row is rounded by itself, so that only float32 sums differ; a range for all rows of a chunk would not do."""
    prompt = rows(model, 200)
    prompt[0] *= 100
    got = [
        find_engine("onnx").decoder(languages["int8"], Options(threads=1, prefill_chunk=n)).prefill(prompt).copy()
        for n in (192, 3)
    ]
    np.testing.assert_allclose(got[0], got[1], atol=0.01 * np.abs(got[1]).max())


def test_every_product_of_int8_is_of_unsigned_rows_and_signed_weights(languages: dict[str, Bundle]) -> None:
    """ONNX Runtime multiplies signed rows at a tenth of the speed on x86 without instructions for them."""
    bundle = languages["int8"]
    graph = onnx.load(bundle.path(bundle.part("language_model", "onnx").graph), load_external_data=False).graph
    dtypes = {tensor.name: tensor.data_type for tensor in graph.initializer}
    made = {node.output[0]: node for node in graph.node}
    products = [node for node in graph.node if node.op_type == "MatMulIntegerToFloat"]
    assert len(products) == 15  # qkv, o, gate, up, down in each of three layers
    assert not [node for node in graph.node if node.op_type in ("MatMul", "Gemm")]
    for node in products:
        rounding = made[node.input[0]]
        assert rounding.op_type == "QuantizeLinear"
        zeros = made[rounding.input[2]]  # 128 a row
        assert dtypes[zeros.input[2]] == dtypes[node.input[4]] == TensorProto.UINT8
        assert dtypes[node.input[1]] == TensorProto.INT8
    # Four inputs a layer are rounded, each once, in no more operators than these.
    assert len({node.input[0] for node in products}) == 12
    kinds = [node.op_type for node in graph.node]
    assert [kinds.count(op) for op in ("Abs", "ReduceMax", "Div")] == [12, 12, 0]
    assert kinds.count("QuantizeLinear") == 12 + 2  # and the zeros of all rows, and of the last row


def test_long_prompts_end_with_their_own_question() -> None:
    examples = [Example(torch.full((20 + i, 4), float(i)), 15 + i) for i in range(6)]
    for example, long in zip(examples, long_prompts(examples, 100), strict=True):
        added = len(long.embeds) - len(example.embeds)
        assert 60 < len(long.embeds) <= 100
        assert torch.equal(long.embeds[added:], example.embeds)
        assert long.first_read == example.first_read + added
        assert len(torch.unique(long.embeds[:, 0])) >= 4  # of as many others


def test_divergence_is_none_at_fp32_and_small_at_int8(model: Model, languages: dict[str, Bundle]) -> None:
    examples = [Example(torch.from_numpy(rows(model, 30 + i)), 24) for i in range(3)]
    found = divergence(languages, reference(model, examples))
    assert found["fp32"]["kl"] < 1e-7 < found["int8"]["kl"] < 0.05
    assert found["fp32"]["top1"] == 1
    low, high = found["int8"]["kl_interval"]
    assert low <= found["int8"]["kl"] <= high


def test_projected_rows_at_int8_point_where_those_of_fp32_do(model: Model, tmp_path: Path) -> None:
    towers = {}
    for precision in ("fp32", "int8"):
        (tmp_path / precision).mkdir()
        towers[precision] = built(model, precision, ("vision_encoder", "projector"), tmp_path / precision)
    size = model.spec.vision.image_size
    found = cosines(towers, iter(RNG.standard_normal((2, 3, size, size)).astype(np.float32)))
    assert list(found) == ["int8"]
    assert 0.999 < found["int8"]["least"] <= found["int8"]["mean"] < 1
    assert set(make_vision(towers["int8"], 1)(0)) == {
        f"{stage}_{unit}" for stage in ("vision", "projector") for unit in ("ms", "cpu_ms")
    }


def test_a_repeat_times_prompt_and_decode_apart(model: Model, languages: dict[str, Bundle]) -> None:
    rep = make_language(languages["int8"], 1, rows(model, 40), 3)
    assert rep(0).keys() == rep(1).keys() == {"prefill_ms", "prefill_cpu_ms", "decode_ms", "decode_cpu_ms"}
    assert all(value > 0 for value in rep(2).values())


def test_the_first_token_is_the_sum_of_its_stages_where_all_were_timed() -> None:
    def stats(**medians: float) -> dict[str, Stat]:
        return {
            f"{k}_{unit}": Stat(v * n, v, v, 3, 3) for k, v in medians.items() for n, unit in ((1, "ms"), (2, "cpu_ms"))
        }

    results = {"fp32": stats(prefill=9), "int8": stats(prefill=4), "vision int8": stats(vision=7, projector=1)}
    assert first_token(results) == {
        "int8, ms": {"vision": 7, "projector": 1, "prefill": 4, "sum": 12},
        "int8, cpu_ms": {"vision": 14, "projector": 2, "prefill": 8, "sum": 24},
    }


def test_graphs_that_were_kept_are_found_by_their_folders(
    model: Model, languages: dict[str, Bundle], tmp_path: Path
) -> None:
    with kept(tmp_path / "kept") as work:
        built(model, "language=int8", ("language_model",), work / languages["int8"].folder.name, CONTEXT)
    found = earlier(languages, tmp_path / "kept")
    assert {name: bundle.folder.parent for name, bundle in found.items()} == {"int8 before": tmp_path / "kept"}
    assert make_language(found["int8 before"], 1, rows(model, 8), 1)(0)["prefill_ms"] > 0
    with pytest.raises(InputError, match="not empty"), kept(tmp_path / "kept"):
        pass
    with pytest.raises(InputError, match="holds none of"):
        earlier(languages, tmp_path)


def test_ratios_are_above_one_for_what_is_faster() -> None:
    def stat(median: float) -> dict[str, Stat]:
        return {"prefill_ms": Stat(median, median, median, 3, 3)}

    results = {"fp32": stat(400), "int8": stat(160), "vision fp32": {}}
    assert faster(results, "fp32", "prefill_ms") == {"fp32": 1, "int8": 2.5}


def test_calibrated_variants_are_other_weights_in_the_same_form(model: Model, tmp_path: Path) -> None:
    """Outliers are moved into the weights by --calibration, at no cost when it runs."""
    pairs = read_pairs(write_calibration(tmp_path / "pairs", 2))
    (tmp_path / "work").mkdir()
    found = languages_of(model, ("int8", "int8 smoothed", "int8 auto"), pairs, tmp_path / "work", 64)
    graphs, data = [], []
    for bundle in found.values():
        path = bundle.path(bundle.part("language_model", "onnx").graph)
        graphs.append([node.op_type for node in onnx.load(path, load_external_data=False).graph.node])
        data.append(path.with_name("language_model.onnx.data").read_bytes())
    assert graphs[0] == graphs[1] == graphs[2]
    assert len(set(data)) == 3
