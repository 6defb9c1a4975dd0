"""Engine "mil": prompts in padded chunks, both kinds of cache, the context's last rows, packages that do not fit."""

from __future__ import annotations

import dataclasses
import io
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from bundles import tiny_bundle
from milpackages import coremltools, mb, numbers, package, state, tensor
from vlm_models.errors import BundleError, InputError, PromptError
from vlm_runtime.bundle import Bundle
from vlm_runtime.cli import app
from vlm_runtime.engine import Options, find_engine
from vlm_runtime.engines import mil
from vlm_runtime.engines.mil import MilDecoder, MilEncoder
from vlm_runtime.manifest import Part, read_manifest
from vlm_runtime.mil import open_package
from vlm_runtime.mil.explain import explain

CONTEXT, HIDDEN = 10, 4
ROWS = numbers((CONTEXT, HIDDEN), 1)


def decoder_package(path: Path, rows: int, kv: str) -> Path:
    """One "layer" whose logits are the mean of all rows seen so far, its cache written as an exported one's."""

    def build(inputs_embeds: Any, position: Any, causal_mask: Any, last_row: Any, key_cache: Any, value_cache: Any):  # type: ignore[no-untyped-def]
        new = mb().expand_dims(x=inputs_embeds, axes=[1])
        begin = mb().concat(values=[np.int32([0, 0]), position, np.int32([0])], axis=0)
        end = mb().concat(
            values=[np.int32([1, 1]), mb().add(x=position, y=np.int32([rows])), np.int32([HIDDEN])], axis=0
        )
        held = []
        for one in (key_cache, value_cache):
            before = mb().read_state(input=one) if kv == "state" else one
            after = mb().slice_update(x=before, update=new, begin=begin, end=end)
            held.append(mb().coreml_update_state(state=one, value=after) if kv == "state" else after)
        mixed = mb().matmul(x=mb().softmax(x=causal_mask, axis=-1), y=mb().add(x=held[0], y=held[1]))
        last = mb().gather(x=mb().mul(x=mixed, y=np.float16(0.5)), indices=last_row, axis=2)
        logits = mb().reshape(x=last, shape=[1, HIDDEN], name="logits")
        news = [mb().identity(x=new, name=f"new_{kind}s") for kind in ("key", "value")]
        return logits if kv == "state" else [logits, *news]

    shape = (1, 1, CONTEXT, HIDDEN)
    inputs = {
        "inputs_embeds": tensor((1, rows, HIDDEN)),
        "position": tensor((1,), "int32"),
        "causal_mask": tensor((1, 1, rows, CONTEXT)),
        "last_row": tensor((1,), "int32"),
        **{f"{kind}_cache": state(shape) if kv == "state" else tensor(shape) for kind in ("key", "value")},
    }
    return package(path, inputs, build)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By kind of cache: functions of 4 rows and of 1, merged."""
    folder, found = tmp_path_factory.mktemp("decoders"), {}
    for kv in ("state", "io"):
        utils = coremltools().models.utils
        merged = utils.MultiFunctionDescriptor()
        for name, rows in (("prefill", 4), ("decode", 1)):
            one = decoder_package(folder / f"{kv}-{name}.mlpackage", rows, kv)
            merged.add_function(str(one), src_function_name="main", target_function_name=name)
        merged.default_function_name = "prefill"
        found[kv] = folder / f"{kv}.mlpackage"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            utils.save_multifunction(merged, str(found[kv]))
    return found


def seen(count: int) -> Any:
    return pytest.approx(ROWS[:count].mean(0), abs=3e-3)


@pytest.mark.parametrize("kv", ["state", "io"])
def test_chunks_padding_steps_and_rewind_see_the_rows_that_were_given(kv: str, packages: dict[str, Path]) -> None:
    decoder = MilDecoder(open_package(packages[kv]), CONTEXT)
    assert decoder.prefill(ROWS[:6]) == seen(6)  # a full chunk and a padded one
    assert decoder.decode(ROWS[6]) == seen(7)
    assert decoder.prefill(ROWS[7:]) == seen(10)  # three rows and three places: a chunk of four does not fit
    assert decoder.position == CONTEXT
    with pytest.raises(PromptError, match=r"10 \+ 1 tokens do not fit the context of 10"):
        decoder.decode(ROWS[0])
    decoder.rewind(3)
    assert decoder.prefill(ROWS[3:5]) == seen(5)
    for i in range(5, CONTEXT):
        assert decoder.decode(ROWS[i]) == seen(i + 1)
    with pytest.raises(ValueError, match="cannot rewind to 11"):
        decoder.rewind(11)


def test_a_smaller_context_is_kept_to(packages: dict[str, Path]) -> None:
    decoder = MilDecoder(open_package(packages["state"]), 5)
    with pytest.raises(PromptError, match="0 \\+ 6 tokens do not fit the context of 5"):
        decoder.prefill(ROWS[:6])
    assert decoder.prefill(ROWS[:5]) == seen(5)
    with pytest.raises(ValueError, match="prefill takes"):
        decoder.prefill(ROWS[:0])


def test_a_package_of_fewer_positions_than_the_manifest_says_is_refused(packages: dict[str, Path]) -> None:
    with pytest.raises(BundleError, match="holds 10 positions, the manifest says 11"):
        MilDecoder(open_package(packages["state"]), CONTEXT + 1)


def test_an_encoder_takes_several_pictures_and_is_no_decoder(tmp_path: Path, packages: dict[str, Path]) -> None:
    def build(pixel_values: Any) -> Any:
        return mb().reshape(x=pixel_values, shape=[1, 4, 3], name="image_features")

    folder = package(tmp_path / "p.mlpackage", {"pixel_values": tensor((1, 3, 2, 2), "fp32")}, build)
    encoder, x = MilEncoder(open_package(folder)), numbers((2, 3, 2, 2), 2)
    np.testing.assert_array_equal(encoder.run(x), x.reshape(2, 4, 3))
    with pytest.raises(ValueError, match="takes rows of"):
        encoder.run(x[:, :, :1])
    with pytest.raises(BundleError, match="not an encoder"):
        MilEncoder(open_package(packages["state"]))
    with pytest.raises(BundleError, match="'main' takes pixel_values and gives image_features; a language model takes"):
        MilDecoder(open_package(folder), CONTEXT)


def test_explain_tells_operations_weights_and_functions(tmp_path: Path, packages: dict[str, Path]) -> None:
    folder = tiny_bundle(tmp_path / "bundle")
    shutil.copytree(packages["state"], folder / "coreml/language_model.mlpackage")
    manifest = read_manifest(folder)
    part = Part("coreml/language_model.mlpackage/Manifest.json", (), "fp16")
    held = Bundle(folder, dataclasses.replace(manifest, parts={"language_model": {"mil": part}}))
    console = Console(width=160, record=True, file=io.StringIO())
    for table in explain(held):
        console.print(table)
    text = console.export_text()
    for wanted in ("prefill", "decode", "key_cache fp16[1, 1, 10, 4]", "slice_update", "logits fp16[1, 4]"):
        assert wanted in text
    with pytest.raises(InputError, match="this bundle has engines onnx"):
        explain(Bundle(folder, manifest))
    done = CliRunner().invoke(app, [str(folder), "a prompt", "--explain"])
    assert "--explain runs nothing" in str(done.exception)


def test_options_of_other_engines_are_refused() -> None:
    assert find_engine("mil") is mil  # type: ignore[comparison-overlap]
    mil.available()
    for options in (Options(device="cuda"), Options(kv_cache="f16"), Options(flash_attention=True)):
        with pytest.raises(InputError, match="engine 'mil' runs on the CPU"):
            mil.decoder(None, options)  # type: ignore[arg-type]
