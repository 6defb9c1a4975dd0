"""Runs: contestants in processes of their own take turns, and what they say becomes rows, whatever breaks."""

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
import numpy as np
import pytest
from PIL import Image

from bench_results import made_up
from running import running_bundle
from vlm_bench import cli, energy, measure, memory, overhead_of_measuring, run, stages
from vlm_bench.contestant import Contestant, Running, cores, python_argv
from vlm_bench.entries import choose_bundles, peer_contestants
from vlm_bench.pictures import Pictures, find_pictures
from vlm_bench.results import SCHEMA, STAGES, Results, Settings
from vlm_bench.results_file import read_results
from vlm_models.errors import BundleError, DependencyError, ImageError, InputError

ASKED = Settings(threads=1, runs=3, max_new_tokens=4)
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


def asked(folder: Path) -> list[list[str]]:
    """What the contestants of `folder` were asked, in order: name, prompt, picture's digest."""
    return [line.split() for line in (folder / "log").read_text().splitlines()]


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


def test_contestants_take_turns_on_the_same_pictures(tmp_path: Path) -> None:
    saved: list[Results] = []
    contestants = [made_up(tmp_path, "one"), made_up(tmp_path, "two")]
    results = run.measure(contestants, [], ["a", "b"], ASKED, save=saved.append)
    lines = asked(tmp_path)
    assert [line[:2] for line in lines] == [
        [name, prompt] for _ in range(4) for name in ("one", "two") for prompt in "ab"
    ]
    by_repetition = [{line[2] for line in lines[n : n + 4]} for n in range(0, 16, 4)]
    assert all(len(digests) == 1 for digests in by_repetition)
    assert len(set().union(*by_repetition)) == 4  # a picture that no cache has seen in each repetition
    assert [[row.of for row in one.rows] for one in saved] == [[], [1, 1], [2, 2], [3, 3]]
    assert not any(one.complete for one in saved)
    one = results.rows[0]
    assert (one.kind, one.precision, one.engines) == ("peer", "fp8", {"language_model": "made-up"})
    assert results.environment.packages["made-up"] == "1.0"
    # Repetitions 1 to 3 had mean walls of 23.5, 25.5 and 27.5; stages of the middle one add up to its wall.
    assert (one.wall_ms.median, one.wall_ms.best, one.wall_ms.worst) == (25.5, 23.5, 27.5)
    assert {name: stage.median for name, stage in one.stages_ms.items()} == {
        "preprocess": 1.0,
        "vision": 2.0,
        "prefill": 8.5,
        "decode": 4.0,
        "other": 10.0,
    }
    assert one.token_ms is not None
    assert one.token_ms.p50 == 2.0
    assert one.tokens_per_s is not None
    assert one.tokens_per_s.median == pytest.approx(500.0)
    assert (one.bytes_on_disk, one.load_ms.cold, one.gpu_mb, one.energy) == (7, None, None, None)


def test_what_a_contestant_does_not_tell_is_not_measured(tmp_path: Path) -> None:
    script = tmp_path / "bare.py"
    script.write_text("def make():\n    return {}, lambda prompt, image, n: {'new_tokens': n}\n")
    bare = Contestant("bare", "peer", python_argv(f"{script}:make", {}))
    (row,) = run.measure([bare], [], ["a"], dataclasses.replace(ASKED, runs=1)).rows
    assert row.stages_ms == {}
    assert (row.ttft_ms, row.token_ms, row.tokens_per_s, row.precision, row.tiles) == (None,) * 5
    assert row.wall_ms.median > 0


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ({"dies_at": 3}, "its process ended with exit code 7: Killed by the test"),
        ({"raises_at": 3}, "ValueError: no more"),
        ({"cannot_load": "No module named 'made_up'"}, "ImportError: No module named 'made_up'"),
    ],
)
def test_a_contestant_that_breaks_down_does_not_take_the_others_along(
    tmp_path: Path, broken: dict[str, object], reason: str
) -> None:
    results = run.measure([made_up(tmp_path, "bad", **broken), made_up(tmp_path, "good")], [], ["a"], ASKED)
    good = next(row for row in results.rows if row.name == "good")
    assert good.of == 3
    (skipped,) = results.skipped
    assert skipped.name == "bad"
    assert reason in skipped.reason
    first = {name: 1 if name.endswith("_at") else value for name, value in broken.items()}
    with pytest.raises(DependencyError, match=reason.split(":")[0]):
        run.measure([made_up(tmp_path, "bad", **first)], [], ["a"], ASKED)


def test_another_environment_needs_nothing_of_ours(tmp_path: Path) -> None:
    script = tmp_path / "peer.py"
    script.write_text(
        "import sys\ndef make():\n    names = [n.partition('.')[0] for n in sys.modules]\n"
        "    return {'others': sorted(set(names) - set(sys.stdlib_module_names) - {'contestant', '__main__'})}, None\n"
    )
    argv = python_argv(f"{script}:make", {}, os.path.realpath(sys.executable))
    with Running(Contestant("x", "peer", (argv[0], "-S", *argv[1:])), 1) as running:
        assert running.load()["facts"]["others"] == []


def test_contestants_that_do_not_fit_the_memory_together_run_in_heats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_mb", lambda: 100.0)
    large = [dataclasses.replace(made_up(tmp_path, name), bytes_on_disk=35 << 20) for name in ("one", "two", "three")]
    results = run.measure(large, [], ["a"], dataclasses.replace(ASKED, runs=1))
    assert [line[0] for line in asked(tmp_path)] == ["one", "two", "one", "two", "three", "three"]
    assert [row.name for row in results.rows] == ["one", "two", "three"]


def test_repetitions_beside_other_work_make_a_row_noisy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"busy": 0.0}

    def busy() -> float:
        clock["busy"] += 1000.0
        return clock["busy"]

    monkeypatch.setattr(measure, "busy_seconds", busy)
    (row,) = run.measure([made_up(tmp_path, "one")], [], ["a"], ASKED).rows
    assert (row.noisy, row.quiet, row.of) == (True, 0, 3)
    monkeypatch.setattr(measure, "busy_seconds", lambda: 0.0)
    (row,) = run.measure([made_up(tmp_path, "one")], [], ["a"], ASKED).rows
    assert (row.noisy, row.quiet) == (False, 3)


def test_energy_is_that_of_one_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting:
        source = "made up"
        total = 0.0

        def __init__(self, root: Path) -> None: ...

        def joules(self) -> float:
            self.total += 3.0
            return self.total

        def close(self) -> None: ...

    monkeypatch.setattr(run, "Meter", Counting)
    (row,) = run.measure([made_up(tmp_path, "one")], [], ["a", "b"], ASKED).rows
    assert row.energy is not None
    assert (row.energy.joules, row.energy.per_token, row.energy.source) == (3.0, 0.75, "made up")
    assert energy.Meter is not Counting


def test_a_throttle_counter_that_rises_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter([5, 5, 6, 6, 6, 6, 6])
    monkeypatch.setattr(run.environment, "throttle_events", lambda root: next(counts))
    saved: list[Results] = []
    run.measure([made_up(tmp_path, "one")], [], ["a"], ASKED, save=saved.append)
    assert [one.environment.after.throttled for one in saved] == [False, True, True, True]


def test_ctrl_c_leaves_a_valid_file_and_no_process(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    code = "import sys; from vlm_bench.cli import main; sys.argv[0] = 'vlm-bench'; main()"
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
    end = time.monotonic() + 60
    while not (out.exists() and read_results(out).rows) and time.monotonic() < end and process.poll() is None:
        time.sleep(0.05)
    children = measure.descendants(process.pid)
    os.kill(process.pid, signal.SIGINT)
    text, err = process.communicate(timeout=60)
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


def test_a_peer_that_is_not_installed_has_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "some_peer"
    package.mkdir()
    package.joinpath("__init__.py").write_text(
        "from vlm_models.errors import DependencyError\n"
        "def contestant(checkpoint, threads):\n    raise DependencyError('some-peer is missing: pip install it')\n"
    )
    monkeypatch.setattr("vlm_bench.peers.__path__", [str(tmp_path)])
    assert peer_contestants(["some-peer"], tmp_path, 1)[1][0].reason == "some-peer is missing: pip install it"
    monkeypatch.delitem(sys.modules, "vlm_bench.peers.some_peer")
    with pytest.raises(InputError, match="unknown peer 'other': choose one of some-peer"):
        peer_contestants(["other"], tmp_path, 1)
    with pytest.raises(InputError, match="--checkpoint FOLDER"):
        peer_contestants(["some-peer"], None, 1)


def test_pictures_keep_their_kind_and_are_new_each_time(tmp_path: Path, picture_file: Path) -> None:
    photo, text = tmp_path / "photo.JPG", tmp_path / "text.png"
    Image.fromarray(np.full((40, 60, 3), 90, np.uint8)).save(photo, "JPEG")
    text.write_text("no picture")
    with pytest.raises(ImageError, match="text"):
        Pictures([text], tmp_path)
    text.unlink()
    (tmp_path / "notes.txt").write_text("not taken")
    found = find_pictures([tmp_path, picture_file])
    assert found == [photo, picture_file]
    pictures = Pictures(found, tmp_path / "..")
    first = pictures.files(0)
    assert [file.suffix for file in first] == [".jpeg", ".png"]
    contents = [file.read_bytes() for file in first]
    second = pictures.files(1)
    assert not any(file.exists() for file in first)
    assert all(file.read_bytes() not in contents for file in second)


def test_cores_are_as_many_as_threads() -> None:
    here = os.sched_getaffinity(0)
    assert len(cores(1)) == 1
    assert set(cores(1)) <= here
    assert set(cores(10_000)) == here


def test_measuring_can_be_taken_off_again(bundle: Path, tmp_path: Path) -> None:
    model = stages.open_endless(bundle, None, 1)
    clock = stages.Clock(model)
    image = tmp_path / "noise.png"
    stages.noise(1).save(image)
    said = clock.answer("Hello", str(image), 5)
    assert len(said["token_ms"]) == 4
    assert sum(said["stages_ms"].values()) <= said["wall_ms"]
    clock.remove()
    assert not {"prefill", "decode"} & set(vars(model.decoder))
    assert "picture" not in vars(model)
    model.answer("Hello", [image], max_new_tokens=2)
    assert len(clock._ends) == 4


def test_what_measuring_adds_is_measured_on_the_same_answers(bundle: Path, tmp_path: Path) -> None:
    values = overhead_of_measuring.make(str(bundle), str(tmp_path), 1, 4, 2)(0)
    assert set(values) == {"without_ms", "with_ms", "added_percent"}
    assert values["with_ms"] > 0
