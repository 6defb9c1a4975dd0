"""Peers: started in their own environments on the checkpoint's weights, and honest where they cannot run."""

from __future__ import annotations

import dataclasses
import errno
import importlib
import json
import shutil
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from PIL import Image

from exporting import rewrite
from running import running_bundle
from vlm_bench import cli, html, peer, peers, run
from vlm_bench.contestant import Contestant, Running, python_argv
from vlm_bench.peer import Job, peer_contestants, read_peer
from vlm_bench.results import SCHEMA, STAGES, Settings
from vlm_bench.results_file import read_results
from vlm_export.reference import compute_reference
from vlm_models.errors import CheckpointError, DependencyError, InputError
from vlm_models.model import load_model
from vlm_runtime.prompt import render, user_message

QUESTION = "What colour is it?"
SERVE = """
def serve(folder, prompts):
    def answer(prompt, image, tokens):
        text = prompts["picture" if image else "plain"].replace(prompts["marker"], prompt)
        return {"new_tokens": tokens, "text": text, "wall_ms": 8.0, "ttft_ms": 4.0, "stages_ms": {"vision": 2.0}}
    return {"precision": open(folder + "/weights").read(), "notes": ["it is made up"]}, answer
"""
Converter = Callable[[Path], Sequence[str]]


def write_weights(folder: Path) -> Sequence[str]:
    (folder / "weights").write_bytes(b"w8a8")
    return ["rounded a little"]


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> types.ModuleType:
    """Peer "made-up", whose script speaks the protocol, beside no other; `convert` may be replaced."""
    (tmp_path / "serve.py").write_text(SERVE)
    module: Any = types.ModuleType("made_up")
    module.PRECISIONS, module.PACKAGES, module.INSTALL = ("int8", "fp16"), {"numpy": "numpy"}, "pip install numpy"
    module.convert = write_weights

    def contestant(job: Job) -> Contestant:
        made = job.converted(lambda folder: module.convert(folder))
        arguments = {"folder": str(made.folder), "prompts": job.prompts}
        argv = python_argv(f"{tmp_path}/serve.py:serve", arguments, job.python)
        return Contestant(job.title, "peer", argv, bytes_on_disk=made.size, notes=(made.told, *made.notes))

    module.contestant = contestant
    monkeypatch.setattr(peer, "peer_names", lambda: ["made-up"])
    monkeypatch.setitem(sys.modules, f"{peers.__name__}.made_up", module)
    return module


def one(name: str, checkpoint: Path, cache: Path) -> Contestant:
    """The peer of this name, which must be able to run."""
    (found,), skipped = peer_contestants([name], checkpoint, 1, cache)
    assert skipped == []
    return found


def prompt_of(checkpoint: Path) -> str:
    prompt = load_model(checkpoint).spec.prompt
    return render([user_message(QUESTION, 1, prompt)], prompt)


def test_a_peer_runs_beside_others_in_its_own_environment(made_up: Any, tiny: Path, tmp_path: Path) -> None:
    names, said = ["made-up", f"made-up:fp16={sys.executable}"], []
    found, skipped = peer_contestants(names, tiny, 1, tmp_path / "cache", said.append)
    assert (skipped, said) == ([], [f"{name}: converting the checkpoint" for name in ("made-up", "made-up:fp16")])
    results = run.measure(found, [], [QUESTION], Settings(1, 1, 3))
    assert [(row.name, row.kind, row.precision) for row in results.rows] == [
        ("made-up", "peer", "w8a8"),
        ("made-up:fp16", "peer", "w8a8"),
    ]
    row = results.rows[0]
    assert row.notes[0].startswith("converted in 0 s to 0 MB, kept in ")
    assert row.notes[1:] == ("rounded a little", "it is made up")
    assert row.bytes_on_disk == 4
    page = html.render(results)
    assert "rounded a little" in page
    with Running(found[0], 1) as running:
        running.load()
        assert running.answer(QUESTION, "a.png", 1)["text"] == prompt_of(tiny)


def test_the_command_has_peers_and_their_ratios_in_its_table(
    made_up: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, out = running_bundle(tmp_path / "bundle"), tmp_path / "out.json"
    options = ["--checkpoint", str(tiny), "--no-drift", "--runs", "1", "--idle", "0", "--threads", "1", "--decode", "3"]
    named = ["--peer", "made-up:int8", "--peer-cache", str(tmp_path / "cache"), "--peer", "made-up=none"]
    monkeypatch.setattr("sys.argv", ["vlm-bench", str(bundle), *options, *named[:4], "--json", str(out)])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        cli.main()
    text = capsys.readouterr().out
    assert not ended.value.code
    results = read_results(out)
    jsonschema.validate(json.loads(out.read_bytes()), json.loads(SCHEMA.read_bytes()))
    ours, theirs = results.rows
    assert (ours.kind, theirs.kind, theirs.name) == ("bundle", "peer", "made-up:int8")
    assert f"{theirs.wall_ms.median / ours.wall_ms.median:.2f}×" in text
    assert "made-up:int8: it is made up" in text
    assert len(list((tmp_path / "cache").iterdir())) == 1
    monkeypatch.setattr("sys.argv", ["vlm-bench", str(bundle), *options, *named])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: --peer made-up=none: no such program; give a Python interpreter\n"


def test_conversions_are_kept_by_what_they_were_made_of(made_up: Any, tiny: Path, tmp_path: Path) -> None:
    made, cache, checkpoint = [], tmp_path / "cache", tmp_path / "checkpoint"
    shutil.copytree(tiny, checkpoint)
    made_up.convert = lambda folder: made.append(1) or write_weights(folder)
    for _ in range(2):
        one("made-up", checkpoint, cache)
    assert len(made) == 1
    one("made-up:fp16", checkpoint, cache)
    assert len(made) == 2
    template = checkpoint / "chat_template.jinja"
    template.write_text(template.read_text("utf-8") + " ", "utf-8")
    one("made-up", checkpoint, cache)
    assert len(made) == 3
    rewrite(checkpoint, lambda tensors: next(iter(tensors.values())).mul_(2))
    one("made-up", checkpoint, cache)
    assert len(made) == 4
    assert len(list(cache.iterdir())) == 4


def test_a_conversion_that_fails_leaves_nothing_and_skips_the_peer(made_up: Any, tiny: Path, tmp_path: Path) -> None:
    def convert(folder: Path) -> Sequence[str]:
        (folder / "half").write_bytes(b"half")
        (tmp_path / "fails.py").write_text("print('all is well')\nraise ValueError('no such operator')\n")
        job.script(tmp_path / "fails.py", {})
        return []

    job = Job("made-up", tiny, "int8", sys.executable, {}, 1, tmp_path, print)
    made_up.convert = convert
    found, (skipped,) = peer_contestants(["made-up"], tiny, 1, tmp_path / "cache")
    assert found == []
    assert skipped.reason == "its converter failed: ValueError: no such operator"
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_checkpoint_that_a_peer_cannot_run_skips_only_that_peer(made_up: Any, tiny: Path, tmp_path: Path) -> None:
    def convert(folder: Path) -> Sequence[str]:
        raise CheckpointError("it has no graph for this model")

    made_up.convert = convert
    (skipped,) = peer_contestants(["made-up"], tiny, 1, tmp_path)[1]
    assert skipped.reason == "it has no graph for this model"

    def full(folder: Path) -> Sequence[str]:
        raise OSError(errno.ENOSPC, "No space left on device")

    made_up.convert = full
    (skipped,) = peer_contestants(["made-up"], tiny, 1, tmp_path)[1]
    assert skipped.reason == f"cannot write into {tmp_path}: No space left on device"


def test_a_peer_that_is_not_installed_has_its_reason(made_up: Any, tiny: Path, tmp_path: Path) -> None:
    made_up.PACKAGES, made_up.INSTALL = {"no_such.part": "no-such", "numpy": "numpy"}, "pip install no-such"
    found, (skipped,) = peer_contestants(["made-up"], tiny, 1, tmp_path)
    assert found == []
    assert skipped.reason == f"not installed for {sys.executable}: no-such; pip install no-such"
    no_python = shutil.which("true")
    (skipped,) = peer_contestants([f"made-up={no_python}"], tiny, 1, tmp_path)[1]
    assert skipped.reason == f"{no_python} is no Python that runs: give the one of its environment"


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["other"], "unknown peer 'other': choose one of llamacpp, onnxruntime-genai, openvino-genai, transformers"),
        (["transformers:int3"], "peer 'transformers' has no precision 'int3': choose one of fp32, bf16, fp16"),
        (["transformers:"], "peer 'transformers' has no precision ''"),
        (["transformers="], "give the Python of its environment after ="),
        (["transformers=/no/python"], "--peer transformers=/no/python: no such program; give a Python interpreter"),
        (["transformers", "transformers=python3"], "a peer is given twice"),
    ],
)
def test_mistakes_are_one_line(tiny: Path, tmp_path: Path, names: list[str], says: str) -> None:
    with pytest.raises(InputError) as raised:
        peer_contestants(names, tiny, 1, tmp_path)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_peer_needs_the_checkpoint_and_a_place_for_what_it_makes(made_up: Any, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give it with --checkpoint FOLDER"):
        peer_contestants(["made-up"], None, 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="give --peer-cache FOLDER"):
        peer_contestants(["made-up"], tiny, 1, tmp_path / "file")


def test_every_peer_says_what_to_install_and_has_its_script() -> None:
    assert peer.peer_names() == ["llamacpp", "onnxruntime-genai", "openvino-genai", "transformers"]
    for name in peer.peer_names():
        module = importlib.import_module(f"{peers.__name__}.{name.replace('-', '_')}")
        assert "pip install" in module.INSTALL
        assert f"--peer {name}=PYTHON" in module.INSTALL
        for script in Path(module.__file__ or "").parent.glob("*.py"):
            assert script.name == "__init__.py" or "vlm_" not in script.read_text("utf-8")
        assert read_peer(f"{name}:{module.PRECISIONS[0]}=/a=b").python == "/a=b"


@pytest.mark.slow
def test_transformers_answers_as_the_checkpoint_does_and_its_stages_add_up(
    tiny: Path, picture_file: Path, tmp_path: Path
) -> None:
    reference = compute_reference(load_model(tiny), picture_file, prompt_of(tiny), tokens=8)
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny, checkpoint)
    config = checkpoint / "generation_config.json"  # the second token ends the answer, were it not passed over
    config.write_text(json.dumps({**json.loads(config.read_text("utf-8")), "eos_token_id": [reference.greedy[1]]}))
    with Running(one("transformers", checkpoint, tmp_path), 1) as running:
        running.load()
        said = running.answer(QUESTION, str(picture_file), 8)
        plain = running.answer(QUESTION, None, 3)
    tokenizer = importlib.import_module("transformers").AutoTokenizer.from_pretrained(tiny)
    assert said["text"] == tokenizer.decode(list(reference.greedy[:8]), skip_special_tokens=True)
    assert (said["prompt_tokens"], said["image_tokens"]) == (len(reference.prompt_ids), 16)
    assert list(said["stages_ms"]) == list(STAGES[:-1])
    assert all(value > 0 for value in said["stages_ms"].values())
    assert sum(said["stages_ms"].values()) <= said["wall_ms"]
    assert (len(said["token_ms"]), plain["new_tokens"], plain["image_tokens"]) == (7, 3, 0)


@pytest.mark.slow
def test_transformers_never_measures_random_weights(tiny: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny, checkpoint)
    found = one("transformers", checkpoint, tmp_path)
    rewrite(checkpoint, lambda tensors: tensors.pop("multi_modal_projector.linear_1.bias"))
    with Running(found, 1) as running, pytest.raises(DependencyError, match=r"finds no .*linear_1\.bias"):
        running.load()


@pytest.mark.slow
def test_llamacpp_sees_the_picture_with_files_made_of_the_checkpoint(
    tiny_siglip: Path, picture_file: Path, tmp_path: Path
) -> None:
    model = load_model(tiny_siglip)
    square = tmp_path / "square.png"
    side = model.spec.vision.image_size
    with Image.open(picture_file) as image:
        image.convert("RGB").resize((side, side)).save(square)
    reference = compute_reference(model, square, prompt_of(tiny_siglip), tokens=6)
    found = one("llamacpp:fp32", tiny_siglip, tmp_path / "cache")
    assert "llama.cpp's own image path equals the checkpoint" in found.notes[1]
    with Running(dataclasses.replace(found, files=()), 1) as running:
        running.load()
        said, again = (running.answer(QUESTION, str(square), 6) for _ in range(2))
        plain = running.answer(QUESTION, None, 2)
    tokenizer = importlib.import_module("transformers").AutoTokenizer.from_pretrained(tiny_siglip)
    assert said["text"] == again["text"] == tokenizer.decode(list(reference.greedy[:6]), skip_special_tokens=True)
    assert said["prompt_tokens"] == len(reference.prompt_ids)
    assert said["image_tokens"] == model.spec.prompt.image_tokens
    assert set(said["stages_ms"]) == {"preprocess", "vision", "prefill", "first_token", "decode"}
    assert sum(said["stages_ms"].values()) <= said["wall_ms"]
    assert set(plain["stages_ms"]) == {"prefill", "first_token", "decode"}
    assert np.all(np.array(said["token_ms"]) > 0)
