"""The class that lmms-eval makes for `--model vlm_export`; found through `vlm_bench.lmms.manifest`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from rich.console import Console
from rich.progress import track

from vlm_bench.likelihood import losses
from vlm_bench.lmms import NAME, answer, open_bundle, pictures, question, rounds


class VLMExport(lmms):  # type: ignore[misc,unused-ignore]
    """A bundle on one of its engines, one request after another.

    `batch_size`, `max_batch_size` and `device`, which lmms-eval always gives, change nothing: an engine takes one
    prompt at a time, and which machine runs it is the bundle's matter.
    """

    def __init__(
        self,
        bundle: str,
        engine: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self._vlm = open_bundle(bundle, engine, **options)

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """One answer for each request, with its token counts."""
        found = []
        for request in self._watched(requests):
            context, given, doc_to_visual, doc_id, task, split = request.args
            said = answer(self._vlm, context, doc_to_visual(self.task_dict[task][split][doc_id]), given)
            counts = TokenCounts(input_tokens=said.prompt_tokens, output_tokens=len(said.token_ids))
            found.append(GenerationResult(said.text, counts))
        return found

    def loglikelihood(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """(mean loss per token in nats, whether greedy decoding says it) for each request.

        The loss, lower being better, and not the log-likelihood of the base class's docstring: it is what lmms-eval's
        multiple choice takes the least of, and what its own models give. lmms-eval 0.7 makes a text of whatever is
        no GenerationResult, so the pair comes in one. The choices of a question share its prefill.
        """
        found: list[tuple[float, bool]] = []
        for _, alike in groupby(self._watched(requests), key=lambda request: (request.args[0], *request.args[3:])):
            group = [request.args for request in alike]
            context, _, *where = group[0]
            doc, images = None, []
            if where:  # nowhere for acc_mutual_info: the choice alone, without any document
                doc_to_visual, doc_id, task, split = where
                doc = self.task_dict[task][split][doc_id]
                images = pictures(doc_to_visual(doc))
            answers = [args[1] if isinstance(args[1], str) else args[1](doc) for args in group]
            text = question(context, len(images), self._vlm.spec.prompt.image_token)
            found += losses(self._vlm, text, images, answers)
        return [GenerationResult(pair) for pair in found]

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[list[str]]:
        """The answers of all rounds, for each request."""
        found = []
        for request in self._watched(requests):
            context, given, doc_to_visual, doc_to_text, doc_id, task, split = request.args
            doc = self.task_dict[task][split][doc_id]
            found.append(list(rounds(self._vlm, context, doc_to_visual(doc), given, doc_to_text, doc)))
        return found

    def _watched(self, requests: Sequence[Instance]) -> Any:
        return track(requests, NAME, console=Console(stderr=True))
