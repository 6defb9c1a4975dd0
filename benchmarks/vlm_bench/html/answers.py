"""What was asked and answered, as a report shows it: by picture and question, equal answers together, marked word by word."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import PurePath

from vlm_bench.diff import words
from vlm_bench.html.pictures import thumbnail
from vlm_bench.results import Accuracy, Asked, Drift, Words

LIMIT = 120  # questions that a page shows; all are in the JSON
_LONGEST = 4000  # letters of one text


@dataclass(frozen=True)
class Given:
    """One answer of the contestants `names`: its difference to the reference, and whether it was counted as right."""

    names: tuple[str, ...]
    steps: tuple[Words, ...]
    exact: bool | None
    same: bool


@dataclass(frozen=True)
class Question:
    """A question with its reference answer and the answers given."""

    text: str
    reference: str
    kind: str
    given: tuple[Given, ...]

    @property
    def disputed(self) -> bool:
        """Whether someone was wrong, or all were not of one mind."""
        return len(self.given) > 1 or any(one.exact is False or not one.same for one in self.given)


@dataclass
class Shown:
    """A picture (data URL, None where it is not here) with its questions; `name` is its file's."""

    picture: str | None
    name: str
    questions: list[Question] = field(default_factory=list)


def of_accuracy(accuracy: Sequence[Accuracy]) -> tuple[list[Shown], int]:
    """Questions of all sets, disputed ones first, LIMIT at most; and how many there are."""
    asked: dict[tuple[str, str], list[tuple[str, Asked]]] = {}
    for one in accuracy:
        for question in one.per_question:
            asked.setdefault((one.set, question.id), []).append((one.name, question))
    questions = [(answers[0][1].image, _question(answers)) for answers in asked.values()]
    return _by_picture(questions), len(questions)


def of_drift(drift: Sequence[Drift]) -> tuple[list[Shown], int]:
    """Cases of the drift report in the same way: the reference is what the reference contestant answered."""
    cases: dict[tuple[str, str | None, str], list[Drift]] = {}
    for one in drift:
        cases.setdefault((one.reference, one.image, one.prompt), []).append(one)
    questions = []
    for (_, image, prompt), several in cases.items():
        answers = [(d.name, Asked("", image, prompt, d.reference_answer, d.answer)) for d in several]
        questions.append((image, _question(answers)))
    return _by_picture(questions), len(questions)


def _question(answers: Sequence[tuple[str, Asked]]) -> Question:
    first = answers[0][1]
    alike: dict[tuple[str, bool | None], list[str]] = {}
    for name, one in answers:
        alike.setdefault((one.answer, one.exact), []).append(name)
    given = tuple(_given(first.reference, answer, exact, names) for (answer, exact), names in alike.items())
    return Question(first.question, _cut(first.reference), first.kind, given)


def _given(reference: str, answer: str, exact: bool | None, names: Sequence[str]) -> Given:
    same = answer.strip() == reference.strip()
    return Given(tuple(names), words(_cut(reference.strip()), _cut(answer.strip())), exact, same)


def _by_picture(questions: Iterable[tuple[str | None, Question]]) -> list[Shown]:
    """The first LIMIT of them, disputed ones first; neighbours of one picture share it."""
    chosen = sorted(questions, key=lambda item: not item[1].disputed)[:LIMIT]
    order = list(dict.fromkeys(image for image, _ in chosen))
    chosen.sort(key=lambda item: order.index(item[0]))
    return list(_grouped(chosen))


def _grouped(questions: Sequence[tuple[str | None, Question]]) -> Iterator[Shown]:
    for image, several in groupby(questions, key=lambda item: item[0]):
        drawn = image is None or image.startswith("data:")
        yield Shown(thumbnail(image), "" if drawn else PurePath(image or "").name, [one for _, one in several])


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
