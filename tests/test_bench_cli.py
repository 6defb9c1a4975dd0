"""`vlm-bench` as a shell would: files, names, mistakes, Ctrl-C."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest

from running import running_bundle, running_spec
from vlm_bench import cli, measure, stages
from vlm_bench.entries import choose_bundles
from vlm_bench.results import SCHEMA, STAGES, Settings
from vlm_bench.results_file import read_results
from vlm_models.errors import BundleError, DependencyError, InputError

BAD_NAME = os.fsdecode(b"caf\xe9")
Bench = Callable[..., tuple[int, str, str]]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Bench:
    """`bench("bundle", "--runs", "1")`: exit code and both streams."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["vlm-bench", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as ended:
            cli.main()
        code = ended.value.code or 0
        assert isinstance(code, int)
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bundle of engine onnx. Read only."""
    return running_bundle(tmp_path_factory.mktemp("bench") / "bundle")


def test_vlm_bench_measures_bundles_and_pictures_of_any_name(
    bundle: Path, picture_file: Path, tmp_path: Path, bench: Bench
) -> None:
    odd, picture = tmp_path / "caf\u00e9 [bold]", tmp_path / f"{BAD_NAME}.png"
    shutil.copytree(bundle, odd)
    shutil.copy(picture_file, picture)
    out, table = tmp_path / "out.json", tmp_path / "out.csv"
    options = ["--runs", 2, "--idle", 0, "--max-new-tokens", 6, "--threads", 1, "--json", out, "--csv", table]
    code, text, err = bench(bundle, odd, "--image", picture, *options)
    assert (code, err) == (0, "")
    jsonschema.validate(json.loads(out.read_bytes()), json.loads(SCHEMA.read_bytes()))
    results = read_results(out)
    assert results.complete
    assert [row.name for row in results.rows] == ["bundle", "caf\u00e9 [bold]"]
    assert "caf\u00e9 [bold]" in text
    assert "caf\u00e9 [bold]" in table.read_text("utf-8")
    assert results.settings == Settings(1, 2, 6, (f"{tmp_path}/caf\ufffd.png",), (stages.QUESTION,))
    assert results.environment.packages["onnxruntime"]
    for row in results.rows:
        assert tuple(row.stages_ms) == STAGES
        assert all(stage.median > 0 for stage in row.stages_ms.values())
        assert sum(stage.median for stage in row.stages_ms.values()) == pytest.approx(row.wall_ms.median, rel=1e-9)
        before = sum(row.stages_ms[name].median for name in STAGES[:6])
        assert row.ttft_ms is not None
        assert before <= row.ttft_ms.median <= before + row.stages_ms["other"].median
        assert (row.engines["projector"], row.precision, row.kind) == ("onnx", "fp32", "bundle")
        assert (row.new_tokens, row.image_tokens, row.tiles, row.of) == (6.0, 4.0, 1.0, 2)
        assert row.token_ms is not None
        assert 0 < row.token_ms.p50 <= row.token_ms.p95 <= row.token_ms.p99
        assert row.load_ms.cold
        assert row.load_ms.warm
        assert (row.peak_rss_mb or 0) > 10
        assert row.bytes_on_disk == sum(
            file.stat().st_size for file in bundle.rglob("*") if file.is_file() and file.name != "manifest.json"
        )


@pytest.mark.slow
def test_one_run_has_accuracy_drift_and_a_page(bundle: Path, picture_file: Path, tmp_path: Path, bench: Bench) -> None:
    other = running_bundle(tmp_path / "other", seed=1)
    shutil.copy(picture_file, tmp_path / "a.png")
    row = {"image": "a.png", "question": "What?", "answer": "this"}
    (tmp_path / "set.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "prompts.txt").write_text("What is it?\n\nHow many?\n")
    out, page = tmp_path / "out.json", tmp_path / "out.html"
    options = ["--runs", 1, "--idle", 0, "--max-new-tokens", 3, "--threads", 1, "--prompts", tmp_path / "prompts.txt"]
    code, text, err = bench(
        bundle, other, *options, "--questions", tmp_path / "set.jsonl", "--json", out, "--html", page
    )
    assert (code, err) == (0, "")
    results = read_results(out)
    jsonschema.validate(json.loads(out.read_bytes()), json.loads(SCHEMA.read_bytes()))
    assert [(one.name, one.questions) for one in results.accuracy] == [("bundle", 1), ("other", 1)]
    assert [(one.reference, one.name, one.prompt) for one in results.drift] == [
        ("bundle", "other", "What is it?"),
        ("bundle", "other", "How many?"),
    ]
    assert {one.first for one in results.drift} == {"image_features"}
    assert all((one.image or "").startswith("data:image/jpeg;base64,") for one in results.drift)
    assert results.settings.prompts == ("What is it?", "How many?")
    assert "beside bundle: worst cosines" in text
    assert page.read_text("utf-8").startswith("<!DOCTYPE html>")


def test_what_fails_after_the_times_were_measured_does_not_lose_them(
    bundle: Path, tmp_path: Path, bench: Bench
) -> None:
    spec = dataclasses.replace(running_spec(), fingerprint="e" * 64)
    stranger = running_bundle(tmp_path / "stranger", spec)
    out = tmp_path / "out.json"
    options = ["--runs", 1, "--idle", 0, "--max-new-tokens", 2, "--threads", 1, "--drift", "--json", out]
    code, text, _ = bench(bundle, stranger, *options)
    results = read_results(out)
    assert code == 0
    assert results.complete
    assert len(results.rows) == 2
    assert [one.name for one in results.skipped] == ["drift of stranger"]
    assert "not of the same checkpoint as bundle" in text


def test_ctrl_c_leaves_a_valid_file_and_no_process(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "  # ignored in the background
        "from vlm_bench.cli import main; sys.argv[0] = 'vlm-bench'; main()"
    )
    line = [
        sys.executable,
        "-c",
        code,
        str(bundle),
        "--runs",
        "100000",
        "--idle",
        "0",
        "--max-new-tokens",
        "4",
        "--json",
        str(out),
    ]
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(line, env=paths, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    try:
        end = time.monotonic() + 60
        while not (out.exists() and read_results(out).rows) and time.monotonic() < end and process.poll() is None:
            time.sleep(0.05)
        children = measure.descendants(process.pid)
        os.kill(process.pid, signal.SIGINT)
        text, err = process.communicate(timeout=60)
    finally:  # 100000 repetitions must not outlive a failure
        process.kill()
    assert process.returncode == 130, err.decode()
    assert b"Traceback" not in err
    assert b"cut before its end" in text
    results = read_results(out)
    assert not results.complete
    assert results.rows[0].of >= 1
    assert children
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--runs", "0"], "runs: 0: it must be 1 or more"),
        (["--threads", "-1"], "threads: -1: it must be 1 or more"),
        (["--max-new-tokens", "0"], "max new tokens: 0: it must be 1 or more"),
        (["--max-new-tokens", "90"], "do not fit the context of 96: give --max-new-tokens"),
        (["--engine", "gguf"], "the bundle has nothing for engine 'gguf'; it has vision_encoder: onnx"),
        (["--engine", "nope"], "unknown engine 'nope': choose one of"),
        (["--engine", "vision=onnx,vision=onnx"], "each at most once"),
        (["--image", "EMPTY"], "has no pictures"),
        (["--image", "none.png"], "no such picture or folder: none.png"),
        (["--image", "TEXT"], "TEXT"),
        (["--prompts", "BLANK"], "holds no questions: write one a line"),
        (["--prompts", "LATIN"], "is not UTF-8"),
        (["--prompts", "none.txt"], "cannot read none.txt"),
        (["--peer", "nope", "--checkpoint", "CHECKPOINT"], "unknown peer 'nope'"),
        (["--checkpoint", "EMPTY"], "has no config.json"),
        (["--json", "none/out.json"], "its folder does not exist"),
        (["--csv", "EMPTY"], "it is a folder"),
        (["--device", "ssh://host", "--peer", "x"], "leave them out with --device"),
        (["--device-binaries", "EMPTY"], "give --device adb://SERIAL too"),
        (["--compare", "a.json", "b.json"], "leave the bundles out"),
    ],
)
def test_mistakes_are_one_line(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bench: Bench, arguments: list[str], says: str
) -> None:
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "CHECKPOINT").mkdir()
    (tmp_path / "CHECKPOINT" / "config.json").write_text("{}")
    (tmp_path / "TEXT").write_text("no picture")
    (tmp_path / "BLANK").write_text("\n \n")
    (tmp_path / "LATIN").write_bytes(b"caf\xe9\n")
    monkeypatch.chdir(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    code, out, err = bench(bundle, "--idle", 0, "--threads", 1, *arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_no_bundle_and_no_comparison_is_a_mistake(bench: Bench, tmp_path: Path, bundle: Path) -> None:
    assert bench("--runs", 3)[2] == "error: give at least one bundle, or --compare OLD NEW\n"
    assert "no such folder" in bench(tmp_path / "none")[2]
    assert "given twice" in bench(bundle, bundle)[2]
    odd = tmp_path / BAD_NAME
    shutil.copytree(bundle, odd)
    assert "is not UTF-8, which engines cannot open: rename it" in bench(odd)[2]


def test_engines_are_measured_where_a_bundle_holds_them(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, skipped = choose_bundles([bundle], ["onnx", "gguf"], 1)
    assert [one.name for one in chosen] == ["bundle (onnx)"]
    assert chosen[0].engine == "vision_encoder=onnx,projector=onnx,language_model=onnx"
    assert [one.name for one in skipped] == ["bundle (gguf)"]
    with pytest.raises(InputError, match="nothing for engine 'gguf'"):
        choose_bundles([bundle], ["gguf"], 1)
    with pytest.raises(BundleError):
        choose_bundles([bundle.parent], [], 1)

    def missing(bundle: object, wanted: object) -> dict[str, str]:
        raise DependencyError("engine 'onnx' needs onnxruntime: install it")

    monkeypatch.setattr("vlm_bench.entries.choose_engines", missing)
    chosen, (skip,) = choose_bundles([bundle], [], 1)
    assert (chosen, skip.name, skip.reason) == ([], "bundle", "engine 'onnx' needs onnxruntime: install it")


def test_the_command_needs_no_framework_and_no_charts_to_start() -> None:
    heavy = {"torch", "transformers", "onnx", "onnxruntime", "matplotlib", "llama_cpp", "vlm_export", "vlm_quant"}
    code = f"import sys, vlm_bench.cli; print(*sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
