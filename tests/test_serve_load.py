"""The load benchmark: it counts every answer, and an answer that is not the one made alone fails it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from running import running_bundle, running_spec
from vlm_bench import server_load
from vlm_bench.server_client import talks_of
from vlm_models.errors import CheckError, InputError


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = running_spec(eos_token_ids=())
    return running_bundle(tmp_path_factory.mktemp("served") / "bundle", spec, max_context=512)


def test_every_answer_is_compared_and_the_numbers_are_saved(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    server_load.command(bundle, clients=6, seconds=1, pictures=4, conversations=2, tokens=6, threads=1, save=True)
    (path,) = (tmp_path / "benchmarks/results").glob("server-load-*.json")
    found = json.loads(path.read_text())
    load = found["load"]
    assert load["answers"] >= 6
    assert (load["wrong"], load["refused_429"]) == (0, 0)
    assert load["queue_ms"]["p50"] <= load["queue_ms"]["p95"] <= load["ttft_ms"]["p95"] <= load["total_ms"]["p99"]
    assert load["memory_mb"]["highest"] >= load["memory_mb"]["first"] > 10
    assert found["turns"]["of"] == 1
    made = (
        found["metrics"]['vlm_prefix_cache_total{result="hit"}']
        + found["metrics"]['vlm_prefix_cache_total{result="miss"}']
    )
    assert made == load["answers"] + 2
    assert f"{load['answers']} answers in" in capsys.readouterr().out


def test_a_wrong_answer_fails_it(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: object) -> list[tuple[str, str]]:
        return [("one thing", "another")] * 200

    monkeypatch.setattr(server_load, "references", wrong)
    with pytest.raises(CheckError, match=r"(\d+) of \1 answers are not those made alone"):
        server_load.command(bundle, clients=2, seconds=0.2, pictures=2, conversations=1, tokens=4, threads=1)


def test_a_server_that_does_not_start_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="vlm-serve does not start"), server_load.serving(tmp_path, ()):
        pass


def test_talks_of_one_client_are_about_pictures_of_their_own() -> None:
    alone, crowd = talks_of(6)
    assert len({talk.seed for talk in alone}) == len(alone) == 2
    assert {talk.seed for talk in crowd} == {2, 3, 4, 5}
    assert all(talk.questions[0] != talk.questions[1] for talk in [*alone, *crowd])
