"""What was asked and answered, as a report shows it: by picture, equal answers together, marked word by word."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from vlm_bench.diff import words
from vlm_bench.html.pictures import thumbnail
from vlm_bench.results import Accuracy, Asked, Drift, Words

LIMIT = 120  # questions that a page shows; all are in the JSON
_LONGEST = 4000  # letters of one text


@dataclass(frozen=True)
class Given:
    """One answer of the contestants `names`: its difference to the reference, and whether it was counted as right.

    `same` is whether it reads as the reference does; `unanimous` where several were asked and all said it.
    """

    names: tuple[str, ...]
    steps: tuple[Words, ...]
    exact: bool | None
    same: bool
    unanimous: bool


@dataclass(frozen=True)
class Question:
    """A question about `image` (a path, a data URL or None) with its reference answer and the answers given."""

    image: str | None
    text: str
    reference: str
    kind: str
    given: tuple[Given, ...]

    @property
    def disputed(self) -> bool:
        """Whether someone was wrong, or not all said the same."""
        return len(self.given) > 1 or any(
            not one.exact if one.exact is not None else not one.same for one in self.given
        )


@dataclass(frozen=True)
class Shown:
    """A picture (data URL, None where it is not here) with its questions; `name` is its file's."""

    picture: str | None
    name: str
    questions: tuple[Question, ...]

    @property
    def count(self) -> int:
        return len(self.questions)


def of_accuracy(accuracy: Sequence[Accuracy]) -> list[Question]:
    """Questions of all sets, disputed ones first."""
    asked: dict[tuple[str, str], list[tuple[str, Asked]]] = {}
    for one in accuracy:
        for question in one.per_question:
            asked.setdefault((one.set, question.id), []).append((one.name, question))
    return sorted(map(_question, asked.values()), key=lambda question: not question.disputed)


def of_drift(drift: Sequence[Drift]) -> list[Question]:
    """Cases of the drift report in the same way: the reference is what the reference contestant answered."""
    cases: dict[tuple[str, str | None, str], list[tuple[str, Asked]]] = {}
    for one in drift:
        asked = Asked("", one.image, one.prompt, one.reference_answer, one.answer)
        cases.setdefault((one.reference, one.image, one.prompt), []).append((one.name, asked))
    return sorted(map(_question, cases.values()), key=lambda question: not question.disputed)


def by_picture(questions: Iterable[Question]) -> list[Shown]:
    """Questions about one picture together, pictures in the order of their first question."""
    together: dict[str | None, list[Question]] = {}
    for question in questions:
        together.setdefault(question.image, []).append(question)
    return [Shown(thumbnail(image), _file_name(image), tuple(several)) for image, several in together.items()]


def _question(answers: Sequence[tuple[str, Asked]]) -> Question:
    first = answers[0][1]
    alike: dict[tuple[str, bool | None], list[str]] = {}
    for name, one in answers:
        alike.setdefault((one.answer, one.exact), []).append(name)
    alone = len(alike) == 1 and len(answers) > 1
    given = tuple(_given(first.reference, answer, exact, names, alone) for (answer, exact), names in alike.items())
    return Question(first.image, first.question, _cut(first.reference), first.kind, given)


def _given(reference: str, answer: str, exact: bool | None, names: Sequence[str], unanimous: bool) -> Given:
    reference, answer = reference.strip(), answer.strip()
    return Given(tuple(names), words(_cut(reference), _cut(answer)), exact, answer == reference, unanimous)


def _file_name(image: str | None) -> str:
    return "" if image is None or image.startswith("data:") else PurePath(image).name


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
