"""Question sets: what each layout gives, and one line for whatever is none."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlm_bench.questions import SENTENCE, Question, read_questions
from vlm_models.demo.scenes import make_scene, write_pairs
from vlm_models.errors import InputError


def test_the_demos_questions_are_those_held_out() -> None:
    found = read_questions("demo:3")
    assert found.name == "demo:3"
    assert {question.image for question in found.questions} == {0, 1, 2}
    assert SENTENCE not in {question.kind for question in found.questions}
    first = found.questions[0]
    shown = first.shown()
    assert shown is not None
    assert shown.startswith("data:image/jpeg;base64,")
    picture = Image.open(io.BytesIO(base64.b64decode(shown.partition(",")[2])))
    assert picture.size == make_scene(0, "test")[0].size
    assert np.array_equal(np.asarray(first.pictures()[0]), np.asarray(make_scene(0, "test")[0]))
    assert len(read_questions("demo", limit=7).questions) == 7


def test_a_folder_and_its_lines_are_read_with_ids_kinds_and_several_answers(tmp_path: Path) -> None:
    path = write_pairs(tmp_path / "set", 2)
    found = read_questions(tmp_path / "set")
    assert found.questions == read_questions(path).questions
    assert {question.kind for question in found.questions} >= {"color", "count"}
    assert found.questions[0].image == tmp_path / "set" / "00000.png"
    lines = [
        {"image": "00001.png", "question": "What?", "answers": ["a", "b"], "question_id": 17, "category": "words"},
        {"prompt": "No picture?", "answer": "Right"},
    ]
    own = tmp_path / "set" / "own.jsonl"
    own.write_text("\ufeff" + "\n\n".join(map(json.dumps, lines)), "utf-8")
    first, second = read_questions(own).questions
    assert first == Question("17", tmp_path / "set" / "00001.png", "What?", ("a", "b"), "words")
    assert (second.image, second.pictures(), second.shown(), second.id) == (None, [], None, "3")


def test_llavas_json_gives_the_first_question_of_each_conversation(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "é.png")
    turns = [
        {"from": "human", "value": "<image>\nWhat is this?"},
        {"from": "gpt", "value": "A cat."},
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "Yes."},
    ]
    file = tmp_path / "llava.json"
    file.write_text(json.dumps([{"id": "x1", "image": "é.png", "conversations": turns}]), "utf-8")
    assert read_questions(file).questions == (Question("x1", tmp_path / "é.png", "What is this?", ("A cat.",)),)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("q.jsonl", "", "holds no questions"),
        ("q.json", "[]", "holds no questions"),
        ("q.json", "{}", "list of conversations"),
        ("q.json", '[{"id": 1}]', 'no "conversations"'),
        ("q.json", '[{"conversations": [{"from": "human", "value": "What?"}]}]', "entry 0 has no answer"),
        ("q.jsonl", "{", "q.jsonl:1 cannot be read as JSON"),
        ("q.jsonl", "[]", "q.jsonl:1 holds a list"),
        ("q.jsonl", '{"answer": "a"}', "no question"),
        ("q.jsonl", '{"question": "q", "answer": []}', "empty list of answers"),
        ("q.jsonl", '{"question": "q", "answer": 3}', "no answer"),
        ("q.jsonl", '{"question": "q", "answer": "a", "image": "../a.png"}', "leaves the folder"),
        ("q.jsonl", '{"question": "q", "answer": "a", "image": "/a.png"}', "leaves the folder"),
        ("q.jsonl", '{"question": "q", "answer": "a", "image": "none.png"}', "no such picture"),
        ("q.jsonl", '{"question": "q", "answer": "a", "image": "\\ud800.png"}', "no such picture"),
        ("q.jsonl", '{"question": "q", "answer": "a", "image": 3}', "path of one file"),
        ("q.jsonl", '{"question": "q", "answer": "a", "kind": 3}', "the kind a text"),
        ("q.txt", "?", "no questions that can be read"),
        ("folder", None, "has no questions.jsonl or pairs.jsonl"),
        ("none.jsonl", None, "no such questions"),
    ],
)
def test_what_is_no_question_set_is_one_line(tmp_path: Path, name: str, text: str | None, told: str) -> None:
    (tmp_path / "folder").mkdir()
    if text is not None:
        (tmp_path / name).write_text(text, "utf-8")
    with pytest.raises(InputError, match=told) as error:
        read_questions(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("source", ["demo:0", "demo:", "demo:x", "demo:-1", "demo:²"])
def test_a_demo_of_no_pictures_is_refused(source: str) -> None:
    with pytest.raises(InputError, match="demo:N"):
        read_questions(source)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read as text"):
        read_questions(tmp_path / "q.jsonl")
