"""Calibration pairs: every layout is read, every mistake is one line that names the place, samples stand for all."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vlm_models.demo import scenes
from vlm_models.errors import InputError
from vlm_quant.calibration import Calibration, Pair, read_pairs, readable, sample, split
from vlm_runtime.image import open_image

ROWS = [
    {"image": "a.png", "prompt": "What is it?", "answer": "A dot"},
    {"image": "deep/b.png", "prompt": "Where is it?"},
    {"image": "a.png", "prompt": "How many?", "answer": "One"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "deep").mkdir()
    for i, name in enumerate(("a.png", "deep/b.png")):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / name)
    return tmp_path


def write(folder: Path, rows: list[Any], name: str = "calibration.jsonl") -> Path:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return folder / name


def told(pairs: Calibration, folder: Path) -> list[tuple[str, str, str | None]]:
    return [(p.image.relative_to(folder).as_posix(), p.prompt, p.answer) for p in pairs.pairs]


WANTED = [("a.png", "What is it?", "A dot"), ("deep/b.png", "Where is it?", None), ("a.png", "How many?", "One")]


def test_a_folder_and_its_list_read_alike(folder: Path) -> None:
    path = write(folder, ROWS)
    assert told(read_pairs(folder), folder) == WANTED
    assert read_pairs(path) == read_pairs(folder) == read_pairs(str(path))


def test_pairs_of_the_demo_world_are_read_with_question_for_prompt(tmp_path: Path) -> None:
    scenes.write_pairs(tmp_path, 2)
    pairs = read_pairs(tmp_path).pairs
    _, objects = scenes.make_scene(0, "test")
    assert [(p.prompt, p.answer) for p in pairs if p.image.name == "00000.png"] == [
        (question, answer) for _, question, answer in scenes.questions(objects, 0)
    ]


def test_pictures_with_text_files_of_the_same_name(folder: Path) -> None:
    (folder / "a.txt").write_text("What is it?\n", "utf-8")
    assert told(read_pairs(folder), folder) == [("a.png", "What is it?", None)]


def test_llava_conversations_give_their_first_turn(folder: Path) -> None:
    turns = [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A dot"},
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "Yes"},
    ]
    data = [{"id": 1, "image": "deep/b.png", "conversations": turns}, {"id": 2, "conversations": turns}]
    (folder / "train.json").write_text(json.dumps(data), "utf-8")
    assert told(read_pairs(folder / "train.json"), folder) == [("deep/b.png", "What is it?", "A dot")]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([*ROWS, {"image": "no.png", "prompt": "?"}], r"calibration.jsonl:4: no such picture: 'no\.png' in"),
        ([{"image": "a.png"}], r"calibration.jsonl:1 has no prompt: write what is asked about 'a\.png'"),
        ([{"image": "a.png", "prompt": "  "}], "1 has no prompt"),
        ([{"prompt": "What?"}], r'1 has no picture: "image" is the path of one file'),
        ([{"image": ["a.png"], "prompt": "What?"}], "1 has no picture"),
        ([{"image": "../a.png", "prompt": "What?"}], r"'\.\./a\.png' leaves the folder"),
        ([{"image": "deep/../../a.png", "prompt": "What?"}], "leaves the folder"),
        ([{"image": "deep\\..\\a.png", "prompt": "What?"}], "leaves the folder"),
        ([{"image": "/etc/passwd", "prompt": "What?"}], "leaves the folder"),
        ([{"image": "C:\\a.png", "prompt": "What?"}], "leaves the folder"),
        ([{"image": "a\0.png", "prompt": "What?"}], "leaves the folder"),
        ([{"image": "deep", "prompt": "What?"}], "no such picture"),
        ([{"image": "a" * 5000, "prompt": "What?"}], "no such picture"),
        ([{"image": "a.png", "prompt": "What?", "answer": 7}], "the answer is a int; give a text, or leave it out"),
        (["What is it?"], "1 holds a str: give an object"),
        ([], "holds no picture with a prompt: give a folder with calibration.jsonl"),
    ],
)
def test_a_bad_list_is_refused_in_one_line(folder: Path, rows: list[Any], said: str) -> None:
    write(folder, rows)
    with pytest.raises(InputError, match=said) as caught:
        read_pairs(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("calibration.jsonl", b'{"image": ', r"calibration.jsonl:1 cannot be read as JSON"),
        ("calibration.jsonl", b"\xff\xfe", r"calibration.jsonl cannot be read as text"),
        ("train.json", b'{"image": "a.png"}', r"train.json holds a dict: LLaVA's format is a list"),
        ("train.json", b'[{"image": "a.png"}]', r'entry 0 has no "conversations"'),
        ("train.json", b'[{"image": "a.png", "conversations": [1]}]', r'entry 0 has no "conversations"'),
        ("train.json", b'[{"image": "a.png", "conversations": [{"from": "gpt", "value": "Hi"}]}]', "has no prompt"),
        ("train.json", b"[]", "holds no picture with a prompt"),
        ("train.json", b"[" * 100_000, "cannot be read as JSON"),
        ("list.csv", b"a.png,What?", "is no calibration set"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(folder: Path, name: str, text: bytes, said: str) -> None:
    (folder / name).write_bytes(text)
    with pytest.raises(InputError, match=said) as caught:
        read_pairs(folder / name)
    assert "\n" not in str(caught.value)


def test_what_is_not_there_and_what_lacks_its_prompt(folder: Path) -> None:
    with pytest.raises(InputError, match=r"no such calibration set: .*nothing"):
        read_pairs(folder / "nothing")
    with pytest.raises(InputError, match=r"a\.png has no prompt: write it into a\.txt beside it"):
        read_pairs(folder)
    (folder / "a.txt").write_text(" \n", "utf-8")
    with pytest.raises(InputError, match=r"a\.txt has no prompt"):
        read_pairs(folder)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda t: json.dumps({"image": t, "prompt": t}).encode()))
def test_any_list_gives_pairs_inside_the_folder_or_one_line(folder: Path, data: bytes) -> None:
    (folder / "calibration.jsonl").write_bytes(data)
    pairs, said = (), "nothing"
    try:
        pairs = read_pairs(folder).pairs
    except InputError as error:
        said = str(error)
    assert len(said.splitlines()) == 1
    assert all(p.image.is_file() and p.image.resolve().is_relative_to(folder.resolve()) for p in pairs)


def test_the_hash_follows_the_content_alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    write(folder, ROWS)
    first = read_pairs(folder).sha256
    other = shutil.copytree(folder, tmp_path_factory.mktemp("other") / "copy")
    assert read_pairs(other).sha256 == first
    Image.new("RGB", (4, 4), (9, 9, 9)).save(other / "deep/b.png")
    assert read_pairs(other).sha256 != first
    write(other, [{**ROWS[0], "answer": "A cross"}, *ROWS[1:]])
    shutil.copy(folder / "deep/b.png", other / "deep/b.png")
    assert read_pairs(other).sha256 != first
    assert sample(read_pairs(folder), 1).sha256 != first


def test_a_sample_is_seeded_and_holds_every_kind_in_proportion() -> None:
    prompts = ["What color is the circle?"] * 60 + ["How many objects?"] * 30 + ["Describe the image."] * 10
    everything = Calibration(tuple(Pair(Path(f"{i}.png"), prompt) for i, prompt in enumerate(prompts)))
    for seed in range(20):
        chosen = sample(everything, 20, seed)
        kinds = Counter(pair.prompt for pair in chosen.pairs)
        assert len(chosen.pairs) == 20
        for prompt, share in ((prompts[0], 12), (prompts[60], 6), (prompts[90], 2)):
            assert abs(kinds[prompt] - share) <= 1
        assert sample(everything, 20, seed) == chosen
    assert sample(everything, 20, 1) != sample(everything, 20, 2)
    assert sample(everything, 100) is everything
    with pytest.raises(InputError, match="0 calibration samples cannot be"):
        sample(everything, 0)


def pictured(folder: Path, count: int, broken: int = 0, *, same: bool = False) -> Calibration:
    """Pairs of `count` pictures, of which the first `broken` are no pictures."""
    for i in range(count):
        Image.new("RGB", (4, 4), (0 if same else i, 0, 0)).save(folder / f"{i}.png")
        if i < broken:
            (folder / f"{i}.png").write_bytes(b"\x89PNG no picture")
    return Calibration(tuple(Pair(folder / f"{i}.png", "What is it?") for i in range(count)))


def test_unreadable_pictures_are_skipped_and_counted_up_to_a_tenth(tmp_path: Path) -> None:
    kept = readable(pictured(tmp_path, 20, broken=2), open_image)
    assert (len(kept.pairs), kept.skipped) == (18, 2)
    assert [pair.image.name for pair in kept.pairs] == [f"{i}.png" for i in range(2, 20)]
    with pytest.raises(InputError, match=r"^3 of 20 calibration pairs .* more than 10%; the first: .*0\.png") as caught:
        readable(pictured(tmp_path, 20, broken=3), open_image)
    assert "\n" not in str(caught.value)


def test_a_picture_is_opened_once_however_many_questions_it_has(folder: Path) -> None:
    opened: list[Path] = []
    write(folder, ROWS)
    assert readable(read_pairs(folder), opened.append) == read_pairs(folder)
    assert [path.name for path in opened] == ["a.png", "b.png"]


def test_pairs_that_are_all_the_same_are_refused_whatever_their_files_are_called(tmp_path: Path) -> None:
    same = pictured(tmp_path, 3, same=True)
    with pytest.raises(InputError, match=r"^all 3 calibration pairs are the same picture with the same prompt"):
        readable(same, open_image)
    other = Pair(same.pairs[0].image, "Where is it?")
    assert len(readable(Calibration((*same.pairs, other)), open_image).pairs) == 4
    assert len(readable(Calibration(same.pairs[:1]), open_image).pairs) == 1
    assert len(readable(pictured(tmp_path, 3), open_image).pairs) == 3


def test_what_is_measured_on_shares_no_picture_with_what_is_calibrated_with(tmp_path: Path) -> None:
    scenes.write_pairs(tmp_path, 12)
    pairs = read_pairs(tmp_path)
    ours, held = split(pairs, 0.25, seed=3)
    seen, measured = ({pair.image for pair in part.pairs} for part in (ours, held))
    assert (len(seen), len(measured)) == (9, 3)
    assert not seen & measured
    assert sorted(map(str, {*ours.pairs, *held.pairs})) == sorted(map(str, pairs.pairs))
    assert split(pairs, 0.25, seed=3) == (ours, held) != split(pairs, 0.25, seed=4)
    assert len({pair.image for pair in split(pairs, 0.999)[0].pairs}) == 1
    with pytest.raises(InputError, match=r"^1 picture cannot be split"):
        split(Calibration(pairs.pairs[:2]), 0.5)
