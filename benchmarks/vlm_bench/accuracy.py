"""Answers scored, beside latency; `python -m vlm_bench.accuracy BUNDLE` scores one bundle and prints JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

import vlm_runtime
from vlm_bench import scores
from vlm_bench.likelihood import Reference, bundle_reference, checkpoint_reference, mean_divergence
from vlm_bench.questions import Question, QuestionSet, demo_questions, read_questions
from vlm_bench.results import Accuracy, Asked, readable
from vlm_models.command import run
from vlm_models.errors import InputError, VLMError
from vlm_runtime.manifest import NAME as MANIFEST

Ask = Callable[[Question], str]
"""A contestant's answer to one question."""
Watch = Callable[[str, int, int], None]
"""Called with (what is done, done, of)."""
Skip = Callable[[str, str], None]
"""Called with (what could not be measured, why)."""

LONGEST = 32  # tokens of an answer; those of the usual sets are a word or a few
DEMO_LONGEST = 12  # the demo's have at most three


def measure(
    bundles: Mapping[str, tuple[Path, str | None]],
    questions: QuestionSet,
    *,
    reference: Path | None = None,
    threads: int | None = None,
    max_new_tokens: int = LONGEST,
    watch: Watch = lambda what, done, of: None,
    skip: Skip | None = None,
) -> tuple[Accuracy, ...]:
    """Ask each bundle, name → (folder, engine as for `vlm_runtime.load`), every question; one is open at a time.

    KL is measured to `reference`, the folder of a bundle or a checkpoint; without one to the first of several bundles,
    for those of the same checkpoint. Raises what `vlm_runtime.load` does, PromptError for a question that a bundle has
    no room for, CheckpointError, and InputError where a bundle and the `reference` that was given are of different
    checkpoints; with `skip` the other bundles and scores go on, and it is told.
    """
    compared = None if reference is None else read_reference(reference, questions, threads=threads, watch=watch)
    found = []
    for name, (folder, engine) in bundles.items():
        with _skipping(f"accuracy of {name}", skip):
            vlm = vlm_runtime.load(folder, engine=engine, threads=threads)
            answers = ask_all(name, asker(vlm, max_new_tokens), questions, watch)
            kl, to = None, None
            if compared is not None and (reference is not None or vlm.spec.fingerprint == compared.fingerprint):
                with _skipping(f"KL of {name}", skip):
                    kl, to = mean_divergence(vlm, compared), compared.name
            found.append(score(name, questions, answers, kl=kl, kl_reference=to))
            if compared is None and len(bundles) > 1:
                compared = bundle_reference(name, vlm, questions)
    return tuple(found)


def read_reference(
    folder: Path, questions: QuestionSet, *, threads: int | None = None, watch: Watch = lambda what, done, of: None
) -> Reference:
    """What KL is measured to: a bundle's folder, or that of a checkpoint. Raises InputError where it is neither."""
    name = readable(folder.resolve().name)

    def reached(done: int, of: int) -> None:
        watch(f"reference {name}", done, of)

    if (folder / MANIFEST).is_file():
        return bundle_reference(name, vlm_runtime.load(folder, threads=threads), questions, reached)
    if (folder / "config.json").is_file():
        return checkpoint_reference(folder, questions, reached)
    raise InputError(f"{readable(folder)} is no reference: give a bundle (with {MANIFEST}) or a checkpoint's folder")


def asker(vlm: vlm_runtime.VLM, max_new_tokens: int = LONGEST) -> Ask:
    """Greedy answers of an opened bundle."""
    return lambda question: vlm.answer(question.text, question.pictures(), max_new_tokens=max_new_tokens).text


def ask_all(name: str, ask: Ask, questions: QuestionSet, watch: Watch = lambda what, done, of: None) -> tuple[str, ...]:
    """The answers to all questions, in their order."""
    answers = []
    for done, question in enumerate(questions.questions):
        watch(name, done, len(questions.questions))
        answers.append(ask(question))
    return tuple(answers)


def score(
    name: str,
    questions: QuestionSet,
    answers: Sequence[str],
    *,
    kl: float | None = None,
    kl_reference: str | None = None,
) -> Accuracy:
    """The scores of `answers`, one for each question. Raises InputError for a set without questions."""
    if not questions.questions:
        raise InputError(f"{questions.name} holds no questions: nothing to score")
    asked = tuple(
        Asked(
            id=question.id,
            image=question.shown(),
            question=question.text,
            reference=" | ".join(question.references),
            answer=answer.strip(),
            kind=question.kind,
            exact=scores.exact(answer, question.references),
            anls=scores.anls(answer, question.references),
        )
        for question, answer in zip(questions.questions, answers, strict=True)
    )
    held = [scores.contains(a, q.references) for q, a in zip(questions.questions, answers, strict=True)]
    right = [bool(one.exact) for one in asked]
    return Accuracy(
        name=name,
        set=questions.name,
        questions=len(asked),
        exact=_mean(right),
        contains=_mean(held),
        anls=_mean([one.anls or 0.0 for one in asked]),
        kl=kl,
        kl_reference=kl_reference,
        interval=scores.interval(sum(right), len(right)),
        kinds=_by_kind([one.kind for one in asked], right),
        per_question=asked,
    )


def accuracy(bundle: Path, pictures: int) -> dict[str, float]:
    """Share of answers equal to the letter, by question kind, on the demo's first `pictures` held-out pictures."""
    asked = tuple(demo_questions(pictures))
    model = vlm_runtime.load(bundle)
    right = [
        model.answer(question.text, question.pictures(), max_new_tokens=DEMO_LONGEST).text.strip()
        in question.references
        for question in track(asked, "asking", console=Console(stderr=True), transient=True)
    ]
    return dict(_by_kind([question.kind for question in asked], right))


@contextmanager
def _skipping(what: str, skip: Skip | None) -> Iterator[None]:
    try:
        yield
    except VLMError as error:
        if skip is None:
            raise
        skip(what, str(error))


def _by_kind(kinds: Sequence[str], right: Sequence[bool]) -> Mapping[str, float]:
    """Share of right answers of each kind, in the order in which kinds come; of none where no question has a kind."""
    by: dict[str, list[bool]] = {}
    for kind, one in zip(kinds, right, strict=True):
        by.setdefault(kind, []).append(one)
    return {kind: _mean(all_of_it) for kind, all_of_it in by.items() if kind}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def command(
    bundle: Annotated[Path, typer.Argument(help="A bundle; of the demo checkpoint where no questions are given.")],
    pictures: Annotated[
        int, typer.Option(min=1, help="The demo's held-out pictures, about five questions each.")
    ] = 100,
    questions: Annotated[str | None, typer.Option(help="A set of your own: .jsonl, or LLaVA's .json.")] = None,
    reference: Annotated[
        Path | None, typer.Option(help="A bundle or checkpoint to which KL is measured; with --questions.")
    ] = None,
) -> None:
    """Print one JSON object: for the demo the share of answers equal to the letter by question kind, and their mean.

    For --questions all scores: exact, contains and ANLS of normalised answers, KL where there is a reference.
    """
    if questions is None:
        if reference is not None:
            raise InputError("--reference is for --questions: add --questions demo")
        kinds = accuracy(bundle, pictures)
        mean = sum(kinds.values()) / len(kinds)
        typer.echo(json.dumps({"pictures": pictures, "mean": round(mean, 4), "kinds": kinds}))
        return
    asked = read_questions(questions)
    (found,) = measure({readable(bundle.resolve().name): (bundle, None)}, asked, reference=reference)
    names = ("set", "questions", "exact", "interval", "contains", "anls", "kl", "kl_reference", "kinds")
    typer.echo(json.dumps({name: getattr(found, name) for name in names}))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command(no_args_is_help=True)(command)
    run(app)
