"""Question sets with known answers: the demo's held-out pictures, LLaVA's JSON, or a .jsonl of one's own."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from vlm_bench.results import readable
from vlm_models.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

DEMO = "demo"
DEMO_PICTURES = 40
SENTENCE = "describe"  # the demo's one kind whose answers are whole sentences: left out, as in the demo's own mean
LISTS = ("questions.jsonl", "pairs.jsonl")
_LAYOUTS = (
    'demo, demo:PICTURES, a .jsonl of {"image", "question", "answer"}, a folder with pairs.jsonl, or a .json as LLaVA '
    "is trained on"
)


@dataclass(frozen=True)
class Question:
    """One question about one picture, a file or one that the demo draws (its number); any of `references` is right.

    `image` None is a question without a picture. `kind` groups questions, "" where the set has no kinds.
    """

    id: str
    image: Path | int | None
    text: str
    references: tuple[str, ...]
    kind: str = ""

    def pictures(self) -> list[Path | Image.Image]:
        """What `VLM.answer` takes as images: none or one."""
        return [] if self.image is None else [_drawn(self.image) if isinstance(self.image, int) else self.image]

    def file(self, folder: Path) -> Path | None:
        """The picture as a file; one that the demo draws is written into `folder`, once."""
        if not isinstance(self.image, int):
            return self.image
        path = folder / f"{self.image:05d}.png"
        if not path.is_file():
            _drawn(self.image).save(path)
        return path

    def shown(self) -> str | None:
        """The picture as `Asked.image` holds it: a file's path, or a data URL of one that was drawn."""
        if not isinstance(self.image, int):
            return None if self.image is None else readable(self.image)
        buffer = io.BytesIO()
        _drawn(self.image).save(buffer, "JPEG", quality=85)
        return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


@dataclass(frozen=True)
class QuestionSet:
    """A named set; `name` is what was given, without the folders."""

    name: str
    questions: tuple[Question, ...]


def read_questions(source: str | Path, *, limit: int | None = None) -> QuestionSet:
    """The questions of `source`, the first `limit` of them.

    `demo` is the demo's held-out pictures, `demo:N` the first N of them. A .jsonl line is {"image", "question" or
    "prompt", "answer" (a text, or a list of texts each of which is right), "id"?, "kind"?}. Of a LLaVA .json the first
    question and answer of each conversation are taken. Pictures are named relative to the file's folder.
    Raises InputError, one line with the place: no such set, no questions, no answer, a picture that is not there.
    """
    text = str(source)
    if text == DEMO or text.startswith(f"{DEMO}:"):
        found, name = demo_questions(_pictures(text)), text
    else:
        path = Path(source).expanduser()
        found, name = _file(path), readable(path.name)
    kept = tuple(islice(found, limit))
    if not kept:
        raise InputError(f"{readable(source)} holds no questions: give {_LAYOUTS}")
    return QuestionSet(name, kept)


def demo_questions(pictures: int) -> Iterator[Question]:
    """About five questions about each of the demo's first `pictures` held-out pictures, one of each kind."""
    from vlm_models.demo.scenes import make_scene, questions

    for seed in range(pictures):
        _, objects = make_scene(seed, "test")
        for kind, question, answer in questions(objects, seed):
            if kind != SENTENCE:
                yield Question(f"{seed}-{kind}", seed, question, (answer,), kind)


def _drawn(seed: int) -> Image.Image:
    from vlm_models.demo.scenes import make_scene

    return make_scene(seed, "test")[0]


def _pictures(source: str) -> int:
    _, colon, count = source.partition(":")
    if not colon:
        return DEMO_PICTURES
    if not (count.isascii() and count.isdigit()) or not int(count):
        raise InputError(f"{source!r}: write demo:N, N pictures, 1 or more")
    return int(count)


def _file(path: Path) -> Iterator[Question]:
    if path.is_dir():
        lists = [path / name for name in LISTS if (path / name).is_file()]
        if not lists:
            raise InputError(f"{readable(path)} has no {' or '.join(LISTS)}: give {_LAYOUTS}")
        return _lines(lists[0])
    if not path.is_file():
        raise InputError(f"no such questions: {readable(path)}; give {_LAYOUTS}")
    match path.suffix.lower():
        case ".jsonl":
            return _lines(path)
        case ".json":
            return _conversations(path)
    raise InputError(f"{readable(path)} holds no questions that can be read: give {_LAYOUTS}")


def _lines(path: Path) -> Iterator[Question]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            where = f"{readable(path)}:{number}"
            row = _object(_json(line, where), where)
            text = row.get("question", row.get("prompt", row.get("text")))
            answer = row.get("answer", row.get("answers"))
            name = row.get("id", row.get("question_id", number))
            kind = row.get("kind", row.get("category", ""))
            yield _question(name, path.parent, row.get("image"), text, answer, kind, where)


def _conversations(path: Path) -> Iterator[Question]:
    data = _json(_text(path), readable(path))
    if not isinstance(data, list):
        raise InputError(f"{readable(path)} holds a {type(data).__name__}: LLaVA's format is a list of conversations")
    for number, entry in enumerate(data):
        where = f"{readable(path)}, entry {number}"
        row = _object(entry, where)
        turns = row.get("conversations")
        if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
            raise InputError(f'{where} has no "conversations": a list of {{"from", "value"}}')
        said = {kind: next((t.get("value") for t in turns if t.get("from") == kind), None) for kind in ("human", "gpt")}
        text = said["human"].replace("<image>", "").strip() if isinstance(said["human"], str) else None
        yield _question(row.get("id", number), path.parent, row.get("image"), text, said["gpt"], "", where)


def _question(name: Any, folder: Path, image: Any, text: Any, answer: Any, kind: Any, where: str) -> Question:
    if not isinstance(text, str) or not text.strip():
        raise InputError(f'{where} has no question: write it as "question"')
    references = [answer] if isinstance(answer, str) else answer
    if not isinstance(references, list) or not all(isinstance(r, str) and r.strip() for r in references):
        raise InputError(f"{where} has no answer: give a text, or a list of texts each of which is right")
    if not references:
        raise InputError(f"{where} has an empty list of answers: give one or more")
    if not isinstance(name, str | int) or not isinstance(kind, str):
        raise InputError(f"{where}: the id is a text or a number, the kind a text")
    return Question(str(name), _picture(folder, image, where), text, tuple(references), kind)


def _picture(folder: Path, image: Any, where: str) -> Path | None:
    if image is None:
        return None
    if not isinstance(image, str) or not image:
        raise InputError(f'{where}: "image" is the path of one file')
    parts: Sequence[str] = PurePosixPath(image).parts + PureWindowsPath(image).parts
    if "\0" in image or ".." in parts or PurePosixPath(image).is_absolute() or PureWindowsPath(image).is_absolute():
        raise InputError(f"{where}: {image!r} leaves the folder {readable(folder)}: name pictures relative to it")
    file = folder / image
    try:
        there = file.is_file()
    except (OSError, UnicodeEncodeError):  # a name too long to be one, or half of a character
        there = False
    if not there:
        raise InputError(f"{where}: no such picture: {image!r} in {readable(folder)}")
    return file


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f'{where} holds a {type(value).__name__}: give an object with "image", "question", "answer"')
    return value


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} cannot be read as JSON: {str(error).splitlines()[0]}") from None


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        raise InputError(f"{readable(path)} cannot be read as text: {str(error).splitlines()[0]}") from None
