"""lmms-eval on a bundle: what it asks becomes what the runtime takes, and the real package runs local tasks of ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import vlm_runtime
from running import running_bundle
from vlm_bench import lmms
from vlm_bench.likelihood import losses
from vlm_models.demo.scenes import make_scene
from vlm_models.errors import InputError, PromptError

ROOT = Path(__file__).resolve().parent.parent
PYTHON = (
    Path(sys.prefix) / "lmms" / "bin" / "python"
)  # beside the environment of the tests, on whose packages it stands
PICTURES = """from pathlib import Path
from PIL import Image

def doc_to_visual(doc):
    return [Image.open(Path(__file__).parent / doc["image"]).convert("RGB")]

def next_round(doc, lmms_eval_specific_kwargs=None, previous_output=None, round_idx=None, previous_round_info=None):
    if round_idx is None:
        return doc["question"]
    if round_idx == 2:
        return None, None, True, previous_output, None
    return doc_to_visual(doc), f"You said {previous_output[-1]}. Sure?", False, previous_output, None

def both_rounds(doc, results):
    return {"rounds": float(len(results[0]))}
"""
COMMON = {
    "dataset_path": "json",
    "test_split": "test",
    "doc_to_visual": "!function pictures.doc_to_visual",
    "doc_to_text": '"{{question}}"',
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return running_bundle(tmp_path_factory.mktemp("lmms") / "bundle")


def test_the_entry_point_is_where_lmms_eval_looks() -> None:
    """Its group, and a name that stands for the manifest's own."""
    entries = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["entry-points"]
    assert entries["lmms_eval.models"] == {lmms.NAME: f"{lmms.__name__}:{lmms.manifest.__name__}"}


@pytest.mark.parametrize(
    ("given", "settings"),
    [
        ({}, {"max_new_tokens": 1024, "stop": []}),
        (
            {"until": "\n", "max_new_tokens": 5, "temperature": 0, "top_p": None},
            {"max_new_tokens": 5, "stop": ["\n"]},
        ),
        ({"until": ["a", ""], "do_sample": False, "temperature": 0.7}, {"max_new_tokens": 1024, "stop": ["a"]}),
        (
            {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "max_gen_toks": 4, "image_aspect_ratio": "pad"},
            {"max_new_tokens": 4, "stop": [], "temperature": 0.5, "seed": 0, "top_p": 0.9, "top_k": 3},
        ),
        ({"do_sample": True}, {"max_new_tokens": 1024, "stop": [], "temperature": 1.0, "seed": 0}),
    ],
)
def test_generation_kwargs_become_settings(given: dict[str, Any], settings: dict[str, Any]) -> None:
    assert lmms.settings(given) == settings


def test_what_a_bundle_cannot_do_is_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="num_beams=4"):
        lmms.settings({"num_beams": 4})
    for visual in ("film.mp4", {"array": [], "sampling_rate": 16000}, [{"url": "x"}]):
        with pytest.raises(InputError, match="pictures only"):
            lmms.pictures(visual)
    with pytest.raises(InputError, match="unknown model argument 'pretrained'"):
        lmms.open_bundle(str(bundle), pretrained="x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="one process"):
        lmms.open_bundle(str(bundle))


def test_engines_of_parts_survive_the_commas_of_model_args(bundle: Path) -> None:
    for engine in ("vision=onnx;language=onnx", '"vision=onnx,language=onnx"', None):
        assert set(lmms.open_bundle(str(bundle), engine, threads=1).engines.values()) == {"onnx"}


def test_placeholders_become_the_models_own() -> None:
    assert lmms.question("<image> and <image>", 2, "<|pad|>") == "<|pad|> and <|pad|>"
    assert lmms.question("<image> or not", 2, "<|pad|>") == "<image> or not"
    assert lmms.question("<image> one", 1, "<image>") == "<image> one"
    assert lmms.pictures([None, "a.PNG"]) == ["a.PNG"]


def test_answers_are_those_of_the_runtime(bundle: Path) -> None:
    vlm, picture = vlm_runtime.load(bundle), make_scene(0, "test")[0]
    expected = vlm.answer("What?", [picture], max_new_tokens=6)
    assert lmms.answer(vlm, "What?", [picture], {"max_new_tokens": 6}).token_ids == expected.token_ids
    assert lmms.answer(vlm, "<image>\nWhat?", picture, {"max_new_tokens": 6}).token_ids == expected.token_ids
    with pytest.raises(PromptError, match="2 <image>"):
        lmms.answer(vlm, "<image><image>", [picture], {})


def test_rounds_go_on_until_the_task_ends_them(bundle: Path) -> None:
    vlm, asked = vlm_runtime.load(bundle), []

    def doc_to_text(doc: str, previous_output: list[str], round_idx: int, previous_round_info: Any) -> tuple[Any, ...]:
        asked.append((doc, len(previous_output), round_idx, previous_round_info))
        return [], f"Again {round_idx}?", round_idx == 2, previous_output, {"round": round_idx}

    said = lmms.rounds(vlm, "What?", [], {"max_new_tokens": 3}, doc_to_text, "doc")
    assert asked == [("doc", 1, 1, None), ("doc", 2, 2, {"round": 1})]
    first, second = (vlm.answer(text, max_new_tokens=3).text.strip() for text in ("What?", "Again 1?"))
    assert list(said) == [first, second]


@pytest.mark.slow
def test_lmms_eval_runs_its_three_kinds_of_tasks_on_a_bundle(bundle: Path, tmp_path: Path) -> None:
    """The real package: its samples are the runtime's own answers and losses, its scores follow from them."""
    assert PYTHON.is_file(), f"{PYTHON} is missing: make .venv/lmms-installed puts lmms-eval there"
    vlm = vlm_runtime.load(bundle)
    questions = [f"What colour is number {i}?" for i in range(4)]
    pictures = [make_scene(i, "test")[0] for i in range(4)]
    answers = [vlm.answer(q, [p], max_new_tokens=4).text for q, p in zip(questions, pictures, strict=True)]
    choices = ["red", "green colour", "blue"]
    found = [losses(vlm, q, [p], choices) for q, p in zip(questions, pictures, strict=True)]
    best = [min(range(3), key=lambda i, pairs=pairs: pairs[i][0]) for pairs in found]
    targets = [(best[0] + 1) % 3, *best[1:]]  # the first choice and the last answer are wrong
    said = [*(answer.strip() for answer in answers[:3]), "something else"]
    docs = [
        {"image": f"{i}.png", "question": question, "answer": answer, "best": target}
        for i, (question, answer, target) in enumerate(zip(questions, said, targets, strict=True))
    ]
    _write_tasks(tmp_path, docs, pictures, choices)
    samples, results = _evaluate(tmp_path, bundle, "vlm_words,vlm_choice,vlm_rounds")
    assert results["vlm_words"]["exact_match,none"] == 0.75
    assert [sample["filtered_resps"] for sample in samples["vlm_words"]] == answers
    assert results["vlm_choice"]["acc,none"] == 0.75
    for sample, pairs in zip(samples["vlm_choice"], found, strict=True):
        given = [(float(loss), greedy == "True") for loss, greedy in sample["filtered_resps"]]
        assert [loss for loss, _ in given] == pytest.approx([loss for loss, _ in pairs], rel=1e-5)
        assert [greedy for _, greedy in given] == [greedy for _, greedy in pairs]
    assert results["vlm_rounds"]["rounds,none"] == 2


def _write_tasks(folder: Path, docs: list[dict[str, Any]], pictures: list[Image.Image], choices: list[str]) -> None:
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number}.png")
    data = folder / "docs.jsonl"
    data.write_text("\n".join(map(json.dumps, docs)) + "\n", "utf-8")
    (folder / "pictures.py").write_text(PICTURES, "utf-8")
    words = '"{{answer}}"'
    mean = "aggregation: mean, higher_is_better: true"
    tasks = {
        "vlm_words": {
            "output_type": "generate_until",
            "doc_to_target": words,
            "generation_kwargs": "{max_new_tokens: 4, until: [], do_sample: false}",
            "metric_list": f"[{{metric: exact_match, {mean}}}]",
        },
        "vlm_choice": {
            "output_type": "multiple_choice",
            "doc_to_target": "best",
            "doc_to_choice": json.dumps(choices),
            "metric_list": f"[{{metric: acc, {mean}}}]",
        },
        "vlm_rounds": {
            "output_type": "generate_until_multi_round",
            "doc_to_text": "!function pictures.next_round",
            "doc_to_target": words,
            "process_results": "!function pictures.both_rounds",
            "generation_kwargs": "{max_new_tokens: 4, until: []}",
            "metric_list": f"[{{metric: rounds, {mean}}}]",
        },
    }
    for name, own in tasks.items():
        fields = {"task": name, "dataset_kwargs": f"{{data_files: {{test: {json.dumps(str(data))}}}}}"} | COMMON | own
        (folder / f"{name}.yaml").write_text("".join(f"{key}: {value}\n" for key, value in fields.items()), "utf-8")


def _evaluate(folder: Path, bundle: Path, tasks: str) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]:
    """lmms-eval's samples and scores by task; it finds the model through the entry point of this checkout."""
    metadata = folder / "entry" / "vlm_export-0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.4\nName: vlm-export\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(f"[lmms_eval.models]\n{lmms.NAME} = {lmms.__name__}:manifest\n")
    sources = [str(ROOT / name) for name in ("models", "quant", "runtimes", "exporter", "benchmarks")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    command = [str(PYTHON), "-m", "lmms_eval", "--model", lmms.NAME, "--model_args", f"bundle={bundle},threads=1"]
    command += ["--tasks", tasks, "--include_path", str(folder), "--output_path", str(folder / "out"), "--log_samples"]
    env = {**os.environ, **offline, "PYTHONPATH": os.pathsep.join([str(folder / "entry"), *sources])}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder, check=False)
    results = list((folder / "out").rglob("*_results.json"))
    assert len(results) == 1, (done.stdout + done.stderr)[-3000:]
    samples = {
        name: [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for name in tasks.split(",")
        for path in (folder / "out").rglob(f"*_samples_{name}.jsonl")
    }
    scores: dict[str, Any] = json.loads(results[0].read_text("utf-8"))["results"]
    return samples, scores
