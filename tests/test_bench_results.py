"""Results keep what was measured: the schema, the file, CSV, the table, and the comparison of two runs."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from rich.console import Console

from bench_results import STAGE_MS, made_results, made_row, stat
from vlm_bench import cli, results, tables
from vlm_bench.compare import compare, read_threshold
from vlm_bench.csv_file import write_csv
from vlm_bench.results import SCHEMA, Accuracy, Condition, LoadTimes, Results, readable
from vlm_bench.results_file import read_results, write_results
from vlm_models.errors import InputError
from vlm_models.plain import to_plain

CHECK = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text("utf-8")))


def shown(what: Any, width: int = 200) -> str:
    """What the console would print."""
    stream = io.StringIO()
    Console(file=stream, width=width).print(what)
    return stream.getvalue()


def test_a_file_is_what_was_written_and_as_the_schema_says(tmp_path: Path) -> None:
    path = write_results(tmp_path / "out.json", made_results())
    assert read_results(path) == made_results()
    CHECK.validate(json.loads(path.read_bytes()))
    assert [file.name for file in tmp_path.iterdir()] == ["out.json"]


def test_a_run_cut_before_any_row_is_valid(tmp_path: Path) -> None:
    cut = dataclasses.replace(made_results(), complete=False, rows=(), accuracy=(), drift=())
    path = write_results(tmp_path / "out.json", cut)
    CHECK.validate(json.loads(path.read_bytes()))
    assert not read_results(path).complete


def test_the_schema_has_the_fields_of_the_dataclasses_and_no_others() -> None:
    schema = json.loads(SCHEMA.read_text("utf-8"))
    objects = {"Results": schema, **schema["$defs"]}
    assert set(objects) == {name for name, value in vars(results).items() if dataclasses.is_dataclass(value)}
    for name, described in objects.items():
        fields = {field.name for field in dataclasses.fields(getattr(results, name))}
        assert set(described["properties"]) == set(described["required"]) == fields, name
        assert described["additionalProperties"] is False
        hints = typing.get_type_hints(getattr(results, name))
        for field, rule in described["properties"].items():
            may_be_none = type(None) in typing.get_args(hints[field])
            says = "null" in (rule.get("type") or ()) or {"type": "null"} in rule.get("anyOf", ())
            assert may_be_none == says, f"{name}.{field}"


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda data: data["rows"][0].update(joules=1), "unknown field 'joules'"),
        (lambda data: data["rows"][0].pop("wall_ms"), "'wall_ms' is missing"),
        (lambda data: data["rows"][0]["wall_ms"].update(median="1"), "wall_ms.median: expected float"),
        (lambda data: data["rows"][0].update(kind="other"), "'other' is not one of bundle, peer"),
        (lambda data: data.update(version=2), "version '2'"),
        (lambda data: data.update(format="vlm-bundle"), 'no "format": "vlm-bench"'),
        (lambda data: data["rows"][0]["wall_ms"].update(median=float("nan")), "not valid JSON"),
    ],
)
def test_a_file_that_is_no_results_is_refused_in_one_line(
    tmp_path: Path, spoil: Callable[[dict[str, Any]], object], says: str
) -> None:
    data = to_plain(made_results())
    spoil(data)
    (tmp_path / "x.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match=says) as raised:
        read_results(tmp_path / "x.json")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"null", b"[" * 200_000])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.json"):
        read_results(tmp_path / "x.json")
    with pytest.raises(InputError, match="No such file"):
        read_results(tmp_path / "none.json")


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_results(tmp_path / "out.json", made_results())

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left"):
        write_results(path, made_results(complete=False))
    assert [file.name for file in tmp_path.iterdir()] == ["out.json"]
    assert read_results(path).complete


def test_names_that_are_no_utf8_can_be_written(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9\n")
    assert readable(name) == "caf\ufffd\ufffd"
    path = write_results(tmp_path / "out.json", made_results(command=name))
    assert read_results(path).command == "caf?\n"


def test_csv_says_not_measured_and_never_nothing(tmp_path: Path) -> None:
    bare = made_row("bare", ttft_ms=None, token_ms=None, energy=None, load_ms=LoadTimes(), stages_ms={}, precision=None)
    text = write_csv(tmp_path / "out.csv", made_results(made_row(), bare)).read_text("utf-8")
    full, empty, skipped = csv.DictReader(text.splitlines())
    assert (full["prefill_ms"], full["joules"], full["disk_mb"], full["exact demo:1"]) == ("250", "12", "160", "0.9")
    names = ("prefill_ms", "ttft_ms", "token_p50_ms", "joules", "load_cold_ms", "precision", "gpu_mb", "exact demo:1")
    assert {empty[name] for name in names} == {"not measured"}
    assert skipped["name"] == "a-peer"
    assert skipped["skipped"] == "not installed"
    assert {value for key, value in skipped.items() if key not in ("name", "skipped")} == {"not measured"}


def test_the_table_shows_ratios_and_what_was_not_measured() -> None:
    other = made_row("[bold]odd[/bold]", ttft_ms=stat(932.0), energy=None, noisy=True)
    text = shown(tables.report(made_results(made_row(), other)))
    assert "[bold]odd[/bold]" in text
    assert "932  2.00×" in text
    energy = next(line for line in text.splitlines() if "energy J" in line)
    assert "12.0" in energy
    assert "not measured" in energy
    assert "GPU" not in text  # measured of nobody
    assert "a-peer: not measured: not installed" in text
    assert "do not trust these times" in text
    assert "0.800–0.950" in text


def test_the_table_tells_of_heat_and_of_runs_that_were_cut() -> None:
    place = dataclasses.replace(
        made_results().environment,
        governor="powersave",
        power_mode="15W",
        before=Condition(40.0),
        after=Condition(95.0, 1200.0, True),
    )
    text = shown(tables.report(made_results(environment=place, complete=False)))
    for words in (
        "governor powersave",
        "power mode 15W",
        "40 °C before, 95 °C after",
        "throttled",
        "cut before its end",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("change", "regressions"),
    [
        ({}, []),
        ({"ttft_ms": stat(466 * 1.09)}, []),
        ({"ttft_ms": stat(466 * 1.11)}, ["TTFT ms"]),
        ({"ttft_ms": stat(466 * 1.5, best=466.0)}, []),  # disturbed, not slower: the best is as good as before
        ({"tokens_per_s": stat(140.0)}, ["decode tok/s"]),
        ({"tokens_per_s": stat(400.0)}, []),
        ({"peak_rss_mb": 300.0}, ["peak RSS MB"]),
        ({"peak_rss_mb": None}, []),
        ({"bytes_on_disk": 200 << 20}, ["on disk MB"]),
        ({"load_ms": LoadTimes(9000.0, 9000.0)}, []),
    ],
)
def test_regressions_are_what_is_worse_by_more_than_the_threshold(
    change: dict[str, Any], regressions: list[str]
) -> None:
    found = compare(made_results(), made_results(made_row(**change)), 0.1)
    assert [one.number for one in found.changes if one.worse] == regressions
    assert len(found.regressions) == len(regressions)


def test_a_stage_regresses_only_when_the_whole_answer_notices() -> None:
    stages = made_row().stages_ms
    slow = made_row(stages_ms={**stages, "splice": stat(2.0), "vision": stat(230.0)})
    worse = [one for one in compare(made_results(), made_results(slow), 0.1).changes if one.worse]
    assert [(one.number, one.old, one.new) for one in worse] == [("vision ms", STAGE_MS[1], 230.0)]


def test_what_is_not_measured_any_more_is_a_regression() -> None:
    found = compare(made_results(made_row(), made_row("second")), made_results(made_row()), 0.1)
    assert found.regressions == ("second: measured before, not any more",)
    with pytest.raises(InputError, match="no contestant in common: bundle-int4 before, other now"):
        compare(made_results(), made_results(made_row("other")), 0.1)


@pytest.mark.parametrize(("exact", "worse"), [(0.81, False), (0.79, True), (1.0, False)])
def test_accuracy_regresses_below_the_old_interval(exact: float, worse: bool) -> None:
    new = made_results(accuracy=(Accuracy("bundle-int4", "demo:1", 100, exact, 0.9, 0.9),))
    found = compare(made_results(), new, 0.1)
    assert [one.worse for one in found.changes if one.number == "exact on demo:1"] == [worse]


def test_runs_that_are_hard_to_compare_are_noted() -> None:
    settings = dataclasses.replace(made_results().settings, threads=4)
    place = dataclasses.replace(made_results().environment, processor="Another", governor="powersave")
    new = made_results(made_row(noisy=True), settings=settings, environment=place, complete=False)
    notes = compare(made_results(), new, 0.1).notes
    for words in ("new run was cut", "beside other work: bundle-int4", "A processor before", "governor", "threads"):
        assert any(words in note for note in notes), words
    assert compare(made_results(), made_results(), 0.1).notes == ()


@pytest.mark.parametrize(("text", "share"), [("10%", 0.1), (" 2.5 % ", 0.025), ("0.1", 0.1), ("150%", 1.5)])
def test_thresholds_are_shares_or_percents(text: str, share: float) -> None:
    assert read_threshold(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["", "%", "ten", "-5%", "0", "nan", "inf"])
def test_other_thresholds_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"10% or 0\.1"):
        read_threshold(text)


def test_compare_ends_with_the_exit_code_of_a_failed_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(new: Results, *options: str) -> tuple[object, str, str]:
        old_file = write_results(tmp_path / "old.json", made_results())
        new_file = write_results(tmp_path / "new.json", new)
        monkeypatch.setattr("sys.argv", ["vlm-bench", "--compare", str(old_file), str(new_file), *options])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0, *capsys.readouterr()

    slow = made_results(made_row(ttft_ms=stat(600.0)))
    code, out, err = run(slow)
    assert code == 1
    assert "worse" in out
    assert err.count("\n") == 1
    assert "bundle-int4: TTFT ms 466 → 600 (1.29×)" in err
    assert run(slow, "--threshold", "30%")[0] == 0
    assert run(made_results())[0] == 0
    code, _, err = run(slow, "--threshold", "much")
    assert (code, err) == (2, "error: threshold 'much': write it as 10% or 0.1\n")
