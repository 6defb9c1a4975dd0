"""llama.cpp's quantizer through quantize_gguf: every type, weighed errors, fallbacks named, failures in one line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import quants
from numpy.typing import NDArray

from conftest import MakeTiny
from vlm_export.gguf import quantize
from vlm_export.gguf.architecture import architecture
from vlm_export.gguf.file import FileFacts, write_gguf
from vlm_export.gguf.quantize import quantize_gguf
from vlm_export.gguf.tensors import gguf_name, tensors
from vlm_export.target import silent
from vlm_models.errors import CheckError, CheckpointError
from vlm_models.model import Model, load_model
from vlm_quant.gguf_types import GGUF_TYPES
from vlm_runtime.gguf_header import check_language_model, read_header

BY_QUANTIZER = [name for name, type in GGUF_TYPES.items() if not type.direct]
WIDE = {"text_options": {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}}
FUSED = {**WIDE, "text": "phi3"}
Importance = Mapping[str, NDArray[np.float32]]


def written(model: Model, path: Path, type: str = "f32") -> Path:
    own = {"vlm.fingerprint": model.spec.fingerprint, "vlm.part": "language_model"}
    parts = tensors(model.checkpoint, model.spec)
    arch = architecture(model.spec.language, 128)
    write_gguf(path, arch, own, parts, GGUF_TYPES[type], {"tokenizer.ggml.model": "none"}, progress=silent)
    return path


def quantized(model: Model, source: Path, out: Path, type: str, importance: Importance | None = None) -> FileFacts:
    language = model.spec.language
    return quantize_gguf(source, out, GGUF_TYPES[type], importance, language, threads=1, progress=silent)


def values(path: Path) -> dict[str, NDArray[np.float32]]:
    """All tensors, dequantized."""
    return {t.name: quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}


def uneven(model: Model) -> dict[str, NDArray[np.float32]]:
    """A made importance: a few channels of each block count a hundred times as much as the others."""
    rng = np.random.default_rng(5)
    matrices = {t.source: t.shape[1] for t in tensors(model.checkpoint, model.spec) if t.matrix}
    return {name: np.where(rng.random(columns) < 0.1, 100, 1).astype(np.float32) for name, columns in matrices.items()}


@pytest.mark.parametrize("type", BY_QUANTIZER)
def test_every_type_is_made_and_read_back(make_tiny: MakeTiny, tmp_path: Path, type: str) -> None:
    model = load_model(make_tiny(**WIDE))
    source, out = written(model, tmp_path / "exact.gguf"), tmp_path / "out.gguf"
    facts = quantized(model, source, out, type)
    matrices = {name: kind for name, kind in facts.types.items() if kind != "f32"}
    exact, got = values(source), values(out)
    assert set(matrices) == {name for name, array in exact.items() if array.ndim == 2}
    assert facts.fallbacks == {}
    assert any(kind == type.rsplit("_", 1)[0] or kind == type for kind in matrices.values())
    for name in matrices:
        error = np.linalg.norm(got[name] - exact[name]) / np.linalg.norm(exact[name])
        assert error <= {"int8": 0.02, "int4": 0.09, "int3": 0.22, "int2": 0.35}[GGUF_TYPES[type].weights], name
    header = read_header(out)
    check_language_model(header, out, model.spec)  # vlm.fingerprint and vlm.part came through
    field = gguf.GGUFReader(out).get_field("general.file_type")
    assert field is not None
    assert field.contents() == GGUF_TYPES[type].file_type


@pytest.mark.parametrize("options", [WIDE, FUSED])
@pytest.mark.parametrize("type", ["q4_k_m", "iq4_xs", "iq4_nl", "q4_0", "q2_k"])
def test_importance_lowers_the_weighed_error(
    make_tiny: MakeTiny, tmp_path: Path, type: str, options: Mapping[str, object]
) -> None:
    """Of every matrix: a vector that went to another tensor, or nowhere, would leave its errors as they were."""
    model = load_model(make_tiny(**options))
    source, importance = written(model, tmp_path / "exact.gguf"), uneven(model)
    plain_facts = quantized(model, source, tmp_path / "plain.gguf", type)
    facts = quantized(model, source, tmp_path / "weighed.gguf", type, importance)
    exact, plain, weighed = values(source), values(tmp_path / "plain.gguf"), values(tmp_path / "weighed.gguf")
    compared = 0
    for name, vector in importance.items():
        place = gguf_name(name, model.spec.language)
        if plain_facts.types[place] != facts.types[place] or facts.types[place] == "q8_0":
            continue
        before, after = (((v[place] - exact[place]) ** 2 * vector).sum() for v in (plain, weighed))
        assert after < 0.97 * before, place
        compared += 1
    assert compared >= len(importance) - 3


def test_vectors_of_importance_are_not_mixed_up(make_tiny: MakeTiny, tmp_path: Path) -> None:
    """One matrix alone is weighed: it changes, and no other."""
    model = load_model(make_tiny(**WIDE))
    source, name = written(model, tmp_path / "exact.gguf"), "language_model.layers.1.mlp.gate_proj.weight"
    quantized(model, source, tmp_path / "plain.gguf", "q4_k_s")
    quantized(model, source, tmp_path / "one.gguf", "q4_k_s", {name: uneven(model)[name]})
    plain, one = values(tmp_path / "plain.gguf"), values(tmp_path / "one.gguf")
    assert [n for n in plain if not np.array_equal(plain[n], one[n])] == ["blk.1.ffn_gate.weight"]


def test_rows_that_no_block_divides_are_named(make_tiny: MakeTiny, tmp_path: Path) -> None:
    model = load_model(make_tiny())  # rows of 64 and 112 weights
    source = written(model, tmp_path / "exact.gguf")
    facts = quantized(model, source, tmp_path / "out.gguf", "q4_k_m", uneven(model))
    small = "rows of 64 weights are no multiple of blocks of 256"
    assert facts.types["blk.1.attn_q.weight"] == "q5_0"
    assert facts.fallbacks["blk.1.attn_q.weight"] == f"q5_0 instead of q4_k: {small}"
    assert facts.fallbacks["output.weight"] == f"q8_0 instead of q6_k: {small}"
    odd = "f16: rows of 112 weights are no multiple of any type's blocks"
    assert facts.fallbacks["blk.0.ffn_down.weight"] == odd
    assert set(facts.fallbacks) == {t.name for t in tensors(model.checkpoint, model.spec) if t.matrix}


@pytest.mark.parametrize(("type", "changes"), [("q4_k_m", False), ("iq4_xs", True)])
def test_substitutes_are_weighed_where_that_helps(
    make_tiny: MakeTiny, tmp_path: Path, type: str, changes: bool
) -> None:
    """q5_0 for q4_k stays plainly rounded, whose errors have no sign; iq4_nl for iq4_xs searches its scales anyway."""
    model = load_model(make_tiny())
    source, place = written(model, tmp_path / "exact.gguf"), "blk.1.ffn_gate.weight"
    quantized(model, source, tmp_path / "plain.gguf", type)
    quantized(model, source, tmp_path / "weighed.gguf", type, uneven(model))
    plain, weighed = values(tmp_path / "plain.gguf"), values(tmp_path / "weighed.gguf")
    assert np.array_equal(plain[place], weighed[place]) is not changes


@pytest.mark.parametrize("type", ["iq4_nl", "q4_0", "q5_0"])
def test_types_of_small_blocks_fall_back_only_where_they_must(make_tiny: MakeTiny, tmp_path: Path, type: str) -> None:
    options = {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 6, "num_key_value_heads": 3}
    model = load_model(make_tiny(text_options=options))
    source = written(model, tmp_path / "exact.gguf")
    facts = quantized(model, source, tmp_path / "out.gguf", type, uneven(model))
    assert facts.types["blk.2.attn_q.weight"] == type
    assert set(facts.fallbacks) == {"output.weight"}


@pytest.mark.parametrize("type", ["f16", "bf16"])
def test_the_source_may_be_a_half(make_tiny: MakeTiny, tmp_path: Path, type: str) -> None:
    model = load_model(make_tiny(**WIDE, dtype={"f16": "float16", "bf16": "bfloat16"}[type]))
    for name in (type, "f32"):
        quantized(model, written(model, tmp_path / f"{name}.gguf", name), tmp_path / f"{name}-q.gguf", "q4_k_m")
    half, single = values(tmp_path / f"{type}-q.gguf"), values(tmp_path / "f32-q.gguf")
    assert all(np.array_equal(half[name], single[name]) for name in single)


def test_threads_change_nothing(make_tiny: MakeTiny, tmp_path: Path) -> None:
    model = load_model(make_tiny(**WIDE))
    source, language = written(model, tmp_path / "exact.gguf"), model.spec.language
    for threads in (1, 2):
        out = tmp_path / f"{threads}.gguf"
        quantize_gguf(source, out, GGUF_TYPES["q4_k_m"], uneven(model), language, threads=threads, progress=silent)
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "2.gguf").read_bytes()


def test_progress_grows_to_its_end(make_tiny: MakeTiny, tmp_path: Path) -> None:
    model, steps = load_model(make_tiny(**WIDE)), list[tuple[str, int, int]]()
    source = written(model, tmp_path / "exact.gguf")
    quantize_gguf(
        source,
        tmp_path / "out.gguf",
        GGUF_TYPES["iq4_xs"],
        None,
        model.spec.language,
        threads=1,
        progress=lambda *step: steps.append(step),
    )
    done = [step[1] for step in steps]
    assert done == sorted(done)
    assert steps[-1][1] == steps[-1][2]
    assert {step[0] for step in steps} == {"quantize"}


def test_failures_are_one_line_with_llama_cpps_reason(make_tiny: MakeTiny, tmp_path: Path) -> None:
    model = load_model(make_tiny(**WIDE))
    source, out = written(model, tmp_path / "rounded.gguf", "q8_0"), tmp_path / "out.gguf"
    with pytest.raises(CheckError, match=r"cannot quantize rounded\.gguf to q4_k_m .*requantizing from type q8_0"):
        quantized(model, source, out, "q4_k_m")
    assert not out.exists()
    exact = written(model, tmp_path / "exact.gguf")
    with pytest.raises(CheckError, match=r"llama\.cpp cannot quantize exact\.gguf") as caught:
        quantized(model, exact, tmp_path / "no-such-folder/out.gguf", "q4_k_m")
    assert "\n" not in str(caught.value)


def test_an_output_without_tensors_is_not_taken(
    make_tiny: MakeTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp has reported success on files that hold nothing."""
    model = load_model(make_tiny(**WIDE))
    source, out = written(model, tmp_path / "exact.gguf"), tmp_path / "out.gguf"
    library = quantize.llama.library()

    def empty(source: bytes, out: bytes, params: object) -> int:
        writer = gguf.GGUFWriter(out.decode(), "llama")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return 0

    monkeypatch.setattr(library, "llama_model_quantize", empty)
    with pytest.raises(CheckError, match=r"was written without its tensor 'token_embd\.weight'"):
        quantized(model, source, out, "q4_k_m")
    assert not out.exists()


def test_importance_of_another_model_is_refused(make_tiny: MakeTiny, tmp_path: Path) -> None:
    model = load_model(make_tiny(**WIDE))
    source, out = written(model, tmp_path / "exact.gguf"), tmp_path / "out.gguf"
    name = "language_model.layers.0.mlp.down_proj.weight"
    with pytest.raises(CheckpointError, match=r"importance of '.*down_proj\.weight', \(7,\), is of another model"):
        quantized(model, source, out, "q4_k_m", {name: np.ones(7, np.float32)})
    far = name.replace("layers.0", "layers.9")
    with pytest.raises(CheckpointError, match="is of another model"):
        quantized(model, source, out, "q4_k_m", {far: np.ones(512, np.float32)})
