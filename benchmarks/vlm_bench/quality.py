"""Accuracy and drift of bundles that were measured, added to the results; what fails is skipped with its reason."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from vlm_bench.entries import Chosen
from vlm_bench.measure import Watch
from vlm_bench.questions import QuestionSet
from vlm_bench.results import Results, Skipped, readable
from vlm_bench.stages import noise
from vlm_models.errors import VLMError

_LONGEST = 16  # tokens whose stages and words are compared: drift shows early


def with_accuracy(
    results: Results, bundles: Sequence[Chosen], questions: QuestionSet, checkpoint: Path | None, watch: Watch
) -> Results:
    """Scores of each bundle; KL refers to `checkpoint`, or to the first bundle."""
    from vlm_bench import accuracy

    skipped: list[Skipped] = []
    try:
        found = accuracy.measure(
            {one.name: (one.folder, one.engine) for one in bundles},
            questions,
            reference=checkpoint,
            threads=results.settings.threads,
            watch=watch,
            skip=lambda name, reason: skipped.append(Skipped(name, readable(reason))),
        )
    except VLMError as error:
        return _skipping(results, [*skipped, Skipped("accuracy", readable(str(error)))])
    return _skipping(dataclasses.replace(results, accuracy=found), skipped)


def with_drift(
    results: Results,
    bundles: Sequence[Chosen],
    images: Sequence[Path],
    prompts: Sequence[str],
    checkpoint: Path | None,
    watch: Watch,
) -> Results:
    """Each bundle beside `checkpoint`, or beside the first bundle, on the pictures measured (or one of noise)."""
    from vlm_bench.drift import Candidate, drift

    skipped: list[Skipped] = []
    with TemporaryDirectory(prefix="vlm-bench-") as folder:
        made = Path(folder) / "noise.png"
        noise(0).save(made)
        try:
            found = drift(
                [Candidate(one.name, one.folder, one.engine) for one in bundles],
                images or [made],
                prompts,
                checkpoint=checkpoint,
                max_new_tokens=min(results.settings.max_new_tokens, _LONGEST),
                threads=results.settings.threads,
                skip=lambda name, reason: skipped.append(Skipped(f"drift of {name}", readable(reason))),
                progress=watch,
            )
        except VLMError as error:
            return _skipping(results, [*skipped, Skipped("drift", readable(str(error)))])
    if not images:  # its file is gone with the folder
        found = tuple(dataclasses.replace(one, image=_noise_url()) for one in found)
    return _skipping(dataclasses.replace(results, drift=found), skipped)


def _skipping(results: Results, skipped: Sequence[Skipped]) -> Results:
    return dataclasses.replace(results, skipped=(*results.skipped, *skipped))


def _noise_url() -> str:
    buffer = io.BytesIO()
    noise(0).save(buffer, "JPEG", quality=60)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
