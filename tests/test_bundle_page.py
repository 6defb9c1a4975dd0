"""runtimes/BUNDLE.md is enough: a reader written from it alone sees what this one sees and keeps the golden vectors."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import second_reader
import second_reader_text
import vlm_export
from bundles import HIDDEN, SPEC, VOCAB, tiny_bundle, tiny_table
from exporting import exported
from running import entry, running_bundle, running_spec
from second_reader_pictures import cut, preprocess, resize
from test_prompt import PARTS, TEXTS
from tiled import SIZES, noise, tiny_tiled
from vlm_models.errors import PromptError
from vlm_models.spec import PreprocessSpec, TilingSpec
from vlm_runtime.bundle import open_bundle
from vlm_runtime.embedding import EmbeddingTable
from vlm_runtime.image import preprocess as our_preprocess
from vlm_runtime.manifest import Table, read_manifest, write_manifest
from vlm_runtime.prompt import render, user_message
from vlm_runtime.tiling import layout_of, pack, tiles_of
from vlm_runtime.tokenizer import Tokenizer, prompt_ids
from vlm_runtime.vlm import load

TEMPLATES: dict[str, str | None] = {**PARTS, **TEXTS, "none": None}
ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "runtimes" / "BUNDLE.md").read_text("utf-8")
SCHEMA = json.loads((ROOT / "runtimes" / "vlm_runtime" / "manifest.schema.json").read_text("utf-8"))
EDGE, ROWS, WIDTH = 28, 16, 32
GRIDS = tuple((rows * EDGE, columns * EDGE) for rows in range(1, 5) for columns in range(1, 5))
TILINGS = {
    "whole": None,
    "anyres": TilingSpec("anyres", GRIDS[:6], newline=True),
    "anyres of OneVision": TilingSpec("anyres", GRIDS, newline=True, single=True, max_grid=4),
    "ratio": TilingSpec("ratio", min_tiles=1, max_tiles=7, overview="last", before="<img>", after="</img>"),
    "split": TilingSpec("split", max_tiles=0, longest_edge=90, before="<f>", after="<f>", tag="<g>", overview="last"),
    "split without limit": TilingSpec("split", max_tiles=0, before="<f>", tag="<g>", overview="last"),
    "split into none": TilingSpec("split", max_tiles=1, longest_edge=90, before="<f>", overview="last"),
}


def replayed(bundle: Path) -> dict[str, Any]:
    """What the second reader, in a process of its own, says of the golden vectors; it loads nothing of ours."""
    probe = "import json, sys; sys.argv = ['reader', sys.argv[1]]; sys.path.insert(0, 'tests')\nimport second_reader\n"
    probe += "from pathlib import Path\nout = second_reader.replay(Path(sys.argv[1]))\n"
    probe += "print(json.dumps([out, [m for m in sys.modules if m.startswith('vlm_')]]))"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", probe, str(bundle)], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    report, ours = json.loads(done.stdout)
    assert ours == []
    return dict(report)


def test_the_second_reader_keeps_the_golden_vectors(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    check_replay(exported(tiny, tmp_path_factory))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_the_second_reader_keeps_the_golden_vectors_of_tiles(family: str, tmp_path: Path) -> None:
    vlm_export.export(tiny_tiled(tmp_path / "tiled", family), ["onnx"], tmp_path / "bundle", precision="fp32")
    check_replay(tmp_path / "bundle")


def check_replay(bundle: Path) -> None:
    report = replayed(bundle)
    assert {name: stage["kept"] for name, stage in report["stages"].items()} == dict.fromkeys(
        second_reader.STAGES, True
    )
    assert report["ids_equal"]
    assert report["prompt_equal"]
    assert report["greedy"]["equal"] == report["greedy"]["said"]["equal"] == report["greedy"]["said"]["of"]


def test_a_damaged_stage_is_seen_by_the_second_reader(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    bundle = exported(tiny, tmp_path_factory)
    about, want = second_reader.read_safetensors(bundle / "golden" / "golden.safetensors")
    assert (about["image"], want["pixel_values"].ndim) == ("image.png", 4)
    assert second_reader.distances(want["logits"], want["logits"])["relative_l2"] == 0
    assert second_reader.distances(want["logits"], want["logits"] * 1.001)["relative_l2"] > 1e-4


def test_every_field_of_the_manifest_stands_on_the_page() -> None:
    def names(schema: dict[str, Any]) -> set[str]:
        inner = [one for key in ("properties", "$defs") for one in schema.get(key, {}).items()]
        properties = set(schema.get("properties", {}))
        return properties.union(*(names(one) for _, one in inner if isinstance(one, dict)))

    graphs = set(SCHEMA["$defs"]["LanguageSpec"]["properties"]) | set(SCHEMA["$defs"]["RopeSpec"]["properties"])
    written = set(re.findall(r"[A-Za-z0-9_]+", " ".join(re.findall(r"`([^`]+)`", PAGE))))
    wanted = names(SCHEMA) - graphs - {"equal", "of"}
    assert wanted <= written, wanted - written
    assert {"vocab_size", "hidden_size", "layers", "kv_heads", "head_dim", "embed_multiplier", "both_ways"} <= written
    for rule in SCHEMA["$defs"]["TilingSpec"]["properties"]["rule"]["enum"]:
        assert f'Tiles by "{rule}"' in PAGE


@pytest.mark.parametrize("resample", range(6))
def test_resizing_by_the_page_is_pillows(resample: int) -> None:
    for (h, w), (m, n) in zip(SIZES, reversed(SIZES), strict=True):
        if h * w * m * n < 40_000_000:
            picture = noise((h, w), resample)
            want = np.asarray(picture.resize((n, m), Image.Resampling(resample)))
            np.testing.assert_array_equal(resize(np.asarray(picture), n, m, resample), want, f"{h}×{w} to {m}×{n}")


@pytest.mark.parametrize("size", [(41, 57), (57, 41), (40, 40), (9, 80), (13, 1)])
@pytest.mark.parametrize("rule", ["shortest_edge", "longest_edge", "exact", "none"])
@pytest.mark.parametrize("pad", ["none", "square"])
def test_pixel_values_by_the_page_are_the_runtimes(size: tuple[int, int], rule: Any, pad: Any) -> None:
    picture = noise(size)
    spec = PreprocessSpec(
        28, rule, 27, 3, 1 / 255, (0.48, 0.45, 0.4), (0.26, 0.2613, 0.27), pad, (122, 1, 255), least=2
    )
    want = our_preprocess(picture, spec)
    np.testing.assert_array_equal(preprocess(np.asarray(picture), dataclasses.asdict(spec)), want)


@pytest.mark.parametrize("name", TILINGS)
def test_tiles_and_packing_by_the_page_are_the_runtimes(name: str) -> None:
    base, tiling = running_spec(), TILINGS[name]
    spec = dataclasses.replace(
        base,
        vision=dataclasses.replace(base.vision, image_size=EDGE, image_tokens=ROWS),
        prompt=dataclasses.replace(base.prompt, image_tokens=ROWS, before="<a>", after="<b>"),
        preprocess=PreprocessSpec(EDGE, "exact", 0, 3, 1 / 255, (0.5, 0.4, 0.3), (0.5, 0.4, 0.3), pad_color=(9, 8, 7)),
        tiling=tiling,
    )
    random = np.random.default_rng(1)
    newline = random.standard_normal(WIDTH).astype(np.float32) if tiling and tiling.newline else None
    plain = json.loads(json.dumps(spec.to_json()))
    for size in [size for size in SIZES if max(size) <= 700] + [(1, 90), (90, 1)]:
        for pictures in (1, 2):
            picture = noise(size)
            layout = layout_of(size, spec, pictures)
            tiles, text, runs, packing = cut(np.asarray(picture), plain, pictures, newline)
            assert (text, tuple(runs)) == (layout.text, layout.runs), size
            np.testing.assert_array_equal(tiles, tiles_of(picture, spec, layout), f"{size}")
            rows = random.standard_normal((layout.tiles, ROWS, WIDTH)).astype(np.float32)
            np.testing.assert_array_equal(packing(rows), pack(rows, spec, layout, newline), f"{size}")


@pytest.mark.parametrize("name", TEMPLATES)
def test_conversations_by_the_page_are_the_runtimes(name: str) -> None:
    spec = dataclasses.replace(running_spec().prompt, chat_template=TEMPLATES[name])
    plain = dataclasses.asdict(spec)
    said = [("What is it?", 1), ("<image> and <image>: which?", 2), (" \n<image>\n hi", 1), ("hi", 0), ("", 2), ("", 0)]
    for system in (None, "Be short."):
        for text, pictures in said:
            head = [] if system is None else [{"role": "system", "content": system}]
            answered = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes."}]
            ours, theirs = user_message(text, pictures, spec), second_reader_text.question(text, pictures, plain)
            assert ours == theirs
            messages = [*head, *answered, ours]
            try:
                want = render(messages, spec)
            except PromptError:
                with pytest.raises(Exception):  # noqa: B017, PT011 - whatever the template raises
                    second_reader_text.render(messages, plain)
                continue
            assert second_reader_text.render(messages, plain) == want


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("placeholder", [None, "<picture>"])
def test_token_ids_by_the_page_are_the_runtimes(tmp_path: Path, chunked: bool, placeholder: str | None) -> None:
    spec = running_spec(chunked=chunked, placeholder=placeholder, before="It is ", after="é")
    bundle = open_bundle(running_bundle(tmp_path / "bundle", spec))
    ours = Tokenizer(bundle)
    theirs = second_reader_text.open_tokenizer(bundle.folder / "tokenizer.json", dataclasses.asdict(spec.prompt))
    layout = layout_of((30, 40), spec)
    for text in ("", "What is it? {}", "{}{} 東京 {}", "<s>USER: {}"):
        text = text.replace("{}", spec.prompt.picture)
        count = text.count(spec.prompt.picture)
        got = second_reader_text.token_ids(
            text, [(layout.text, list(layout.runs))] * count, theirs, dataclasses.asdict(spec.prompt)
        )
        assert got == prompt_ids(text, [layout] * count, ours.encode, spec.prompt)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "I8"])
def test_embeddings_by_the_page_are_the_runtimes(tmp_path: Path, dtype: str) -> None:
    folder = embedded(tmp_path / "bundle", dtype)
    bundle = open_bundle(folder)
    ids = [3, 0, 36, 3]
    rows = second_reader.open_table(folder, json.loads((folder / "manifest.json").read_text()))
    np.testing.assert_array_equal(rows(ids), EmbeddingTable(bundle).rows(ids))


def embedded(folder: Path, dtype: str) -> Path:
    """A bundle whose table is of `dtype`, scaled by 3 as Gemma scales it."""
    spec = dataclasses.replace(SPEC, language=dataclasses.replace(SPEC.language, embed_multiplier=3.0))
    tiny_bundle(folder, spec, "F32" if dtype == "I8" else dtype)
    if dtype != "I8":
        return folder
    levels = np.clip(tiny_table() * 40, -127, 127).astype(np.int8)
    (folder / "embedding.bin").write_bytes(levels.tobytes())
    (folder / "embedding.scales.bin").write_bytes(np.linspace(0.01, 0.02, VOCAB, dtype="<f4").tobytes())
    manifest = read_manifest(folder)
    files = {**manifest.files, **{n: entry(folder / n) for n in ("embedding.bin", "embedding.scales.bin")}}
    table = Table("embedding.bin", "I8", VOCAB, HIDDEN, "embedding.scales.bin")
    write_manifest(folder, dataclasses.replace(manifest, files=files, embedding=table))
    return folder


@pytest.mark.parametrize("dynamic", [False, True], ids=["declared", "named"])
def test_answers_by_the_page_are_the_runtimes(tmp_path: Path, dynamic: bool) -> None:
    folder = running_bundle(tmp_path / "bundle", dynamic=dynamic)
    reader, vlm = second_reader.Reader(folder), load(folder, threads=1)
    pictures = [noise((40, 50)), noise((31, 20), 1)]
    message = second_reader_text.question("What is it?", 2, reader.prompt)
    stages = reader.stages([np.asarray(p) for p in pictures], second_reader_text.render([message], reader.prompt))
    answer = vlm.answer("What is it?", pictures, max_new_tokens=12)
    assert len(stages["prompt_ids"]) == answer.prompt_tokens
    assert tuple(reader.greedy(stages["logits"], 12)) == answer.token_ids
