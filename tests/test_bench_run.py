"""Runs: contestants in processes of their own take turns, and what they say becomes rows, whatever breaks."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench_results import made_up
from running import running_bundle
from vlm_bench import energy, measure, memory, overhead_of_measuring, run, stages
from vlm_bench.contestant import Contestant, Running, cores, python_argv
from vlm_bench.pictures import Pictures, find_pictures
from vlm_bench.results import Results, Settings
from vlm_models.errors import DependencyError, ImageError

ASKED = Settings(threads=1, runs=3, max_new_tokens=4)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bundle of engine onnx. Read only."""
    return running_bundle(tmp_path_factory.mktemp("bench") / "bundle")


def asked(folder: Path) -> list[list[str]]:
    """What the contestants of `folder` were asked, in order: name, prompt, picture's digest."""
    return [line.split() for line in (folder / "log").read_text().splitlines()]


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
