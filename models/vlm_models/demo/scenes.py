"""The demo world: pictures of one to three coloured shapes or digits, with questions whose answers are known.

A picture is a pure function of (split, seed): the splits "train", "test" and "calibration" never share a random stream.
"""

import argparse
import json
import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

SIZE = 72  # pixels a side
HALF = SIZE // 2
SHAPES = ("circle", "square", "triangle", "cross")
KINDS = (*SHAPES, "digit")
COLORS = {
    "red": (220, 35, 35),
    "green": (35, 160, 60),
    "blue": (40, 75, 225),
    "yellow": (240, 205, 10),
    "purple": (150, 50, 180),
    "orange": (250, 120, 20),
}
PLACES = ("top left", "top right", "bottom left", "bottom right")
COUNTS = ("one", "two", "three")
QUESTION_KINDS = ("color", "shape", "count", "place", "digit", "yes/no", "describe")

Question = tuple[str, str, str]  # kind, question, answer


@dataclass(frozen=True)
class Object:
    kind: str
    color: str
    place: int  # index into PLACES, reading order
    value: int = -1  # the digit drawn, -1 for a shape


def make_scene(seed: int, split: str = "train") -> tuple[Image.Image, tuple[Object, ...]]:
    """The picture of this seed (RGB, 72 x 72) and its objects in reading order."""
    pixels, objects, _ = draw_scene(seed, split)
    return Image.fromarray(pixels), objects


def draw_scene(seed: int, split: str = "train") -> tuple[NDArray[np.uint8], tuple[Object, ...], NDArray[np.float32]]:
    """Pixels (72, 72, 3), objects, and how far each object covers each pixel (objects, 72, 72)."""
    rng = random.Random(f"{split}-{seed}")
    base = rng.choice((rng.uniform(5, 60), rng.uniform(200, 240)))
    canvas = np.empty((SIZE, SIZE, 3), np.float32)
    canvas[:] = [base + rng.uniform(-8, 8) for _ in range(3)]
    count = rng.randint(1, 3)
    kinds = rng.sample(SHAPES, count)
    if rng.random() < 0.6:
        kinds[rng.randrange(count)] = "digit"
    colors = rng.sample(list(COLORS), count)
    places = sorted(rng.sample(range(4), count))
    objects = []
    cover = np.zeros((count, SIZE, SIZE), np.float32)
    for i, (kind, color, place) in enumerate(zip(kinds, colors, places, strict=True)):
        value = rng.randrange(10) if kind == "digit" else -1
        side = rng.randint(26, 32)
        mask = _mask(kind, value, side, rng.uniform(-10, 10))
        top, left = ((HALF - side) // 2 + rng.randint(-2, 2) for _ in range(2))
        y, x = place // 2 * HALF + top, place % 2 * HALF + left
        paint = np.array([c + rng.uniform(-12, 12) for c in COLORS[color]], np.float32)
        window = canvas[y : y + side, x : x + side]
        window += mask[..., None] * (paint - window)
        cover[i, y : y + side, x : x + side] = mask
        objects.append(Object(kind, color, place, value))
    noise = np.random.default_rng(rng.getrandbits(32)).standard_normal((SIZE, SIZE, 1), np.float32)
    canvas += noise * rng.uniform(0, 8)
    return canvas.clip(0, 255).astype(np.uint8), tuple(objects), cover


def _mask(kind: str, value: int, side: int, angle: float) -> NDArray[np.float32]:
    """Coverage (side, side) in 0..1 of one object, drawn three times larger."""
    image = Image.new("L", (3 * side, 3 * side))
    draw = ImageDraw.Draw(image)
    center = radius = 1.5 * side
    if kind == "digit":
        draw.text((center, center), str(value), font=_font(int(3.6 * side)), fill=255, anchor="mm", stroke_width=4)
    elif kind == "circle":
        draw.ellipse((3, 3, 3 * side - 4, 3 * side - 4), fill=255)
    elif kind == "square":
        reach = 0.82 * radius
        draw.rectangle((center - reach, center - reach, center + reach, center + reach), fill=255)
    elif kind == "triangle":
        corners = np.deg2rad((-90, 30, 150))
        points = np.stack((center + radius * np.cos(corners), 1.12 * center + radius * np.sin(corners)), 1)
        draw.polygon([(float(x), float(y)) for x, y in points], fill=255)
    else:  # cross
        arm, reach = 0.28 * radius, 0.97 * radius
        draw.rectangle((center - arm, center - reach, center + arm, center + reach), fill=255)
        draw.rectangle((center - reach, center - arm, center + reach, center + arm), fill=255)
    image = image.rotate(angle, Image.Resampling.BILINEAR).resize((side, side), Image.Resampling.BOX)
    return np.asarray(image, np.float32) / np.float32(255)


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def questions(objects: tuple[Object, ...], seed: int) -> list[Question]:
    """One (kind, question, answer) of each kind that the scene allows; which object is asked about follows the seed."""
    rng = random.Random(seed)
    asked = [_question(kind, objects, rng) for kind in QUESTION_KINDS]
    return [item for item in asked if item is not None]


def describe(objects: tuple[Object, ...]) -> str:
    """A sentence naming colour, kind and place of every object."""
    parts = [f"{_a(f'{o.color} {_name(o)}')} at the {PLACES[o.place]}" for o in objects]
    text = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    return text[0].upper() + text[1:] + "."


def _question(kind: str, objects: tuple[Object, ...], rng: random.Random) -> Question | None:
    one = rng.choice(objects)
    names = (one.kind, f"{one.color} {one.kind}", f"{one.color} object")
    match kind:
        case "color":
            return kind, f"What color is the {one.kind}?", one.color.capitalize()
        case "shape":
            return kind, f"What is the {one.color} object?", one.kind.capitalize()
        case "count":
            return kind, "How many objects are in the image?", COUNTS[len(objects) - 1].capitalize()
        case "place":
            return kind, f"Where is the {rng.choice(names)}?", PLACES[one.place].capitalize()
        case "digit":
            values = [o.value for o in objects if o.kind == "digit"]
            return (kind, "What digit is in the image?", str(values[0])) if values else None
        case "yes/no":
            if rng.random() < 0.5:
                return kind, f"Is there {_a(rng.choice(names))}?", "Yes"
            return kind, f"Is there {_a(_absent(objects, rng))}?", "No"
        case _:
            return kind, "Describe the image.", describe(objects)


def _absent(objects: tuple[Object, ...], rng: random.Random) -> str:
    """A name that fits none of the objects."""
    kinds, colors = {o.kind for o in objects}, {o.color for o in objects}
    pairs = {(o.color, o.kind) for o in objects}
    kind = rng.choice([k for k in KINDS if k not in kinds])
    color = rng.choice([c for c in COLORS if c not in colors])
    pair = rng.choice([(c, k) for c in COLORS for k in KINDS if (c, k) not in pairs])
    return rng.choice((kind, f"{color} object", " ".join(pair)))


def _name(one: Object) -> str:
    return f"digit {one.value}" if one.kind == "digit" else one.kind


def _a(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def write_pairs(folder: Path, count: int, split: str = "test") -> Path:
    """Write `count` pictures and pairs.jsonl (image, question, answer, kind), a question a line; return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "pairs.jsonl"
    with path.open("w", encoding="utf-8") as lines:
        for seed in range(count):
            image, objects = make_scene(seed, split)
            name = f"{seed:05d}.png"
            image.save(folder / name)
            for kind, question, answer in questions(objects, seed):
                row = {"image": name, "question": question, "answer": answer, "kind": kind}
                lines.write(json.dumps(row) + "\n")
    return path


def write_calibration(folder: Path, count: int = 64) -> Path:
    """Write `count` pictures and calibration.jsonl (image, prompt, answer), a question a line; return its path.

    The pictures are drawn as those for training, from seeds that neither training nor the held-out sets use.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "calibration.jsonl"
    with path.open("w", encoding="utf-8") as lines:
        for seed in range(count):
            image, objects = make_scene(seed, "calibration")
            name = f"{seed:02d}.png"
            image.save(folder / name)
            for _, question, answer in questions(objects, seed):
                lines.write(json.dumps({"image": name, "prompt": question, "answer": answer}) + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vlm_models.demo.scenes", description="Write demo pictures.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--split", choices=("train", "test"), default="test")
    given = parser.parse_args()
    write_pairs(given.folder, given.count, given.split)


if __name__ == "__main__":
    main()
