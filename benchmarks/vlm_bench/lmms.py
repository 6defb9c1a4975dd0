"""`lmms-eval --model vlm_export --model_args bundle=FOLDER --tasks …`: lmms-eval's tasks on a bundle.

lmms-eval (0.7 and later) finds `manifest` through the entry point group "lmms_eval.models", wherever both packages are
installed. `vlm_bench.lmms_model` holds the model's class, which needs lmms-eval; this module does not.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_models.errors import InputError

if TYPE_CHECKING:
    from vlm_runtime.answer import Answer
    from vlm_runtime.vlm import VLM

NAME = "vlm_export"
PLACEHOLDER = "<image>"  # lmms-eval's word for a picture within a text
LONGEST = 1024  # tokens of an answer where a task does not say: lmms-eval's own models take as many
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def manifest() -> Any:
    """What lmms-eval asks for at its start: the model's name and where its class is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(NAME, simple_class_path="vlm_bench.lmms_model.VLMExport")


def open_bundle(bundle: str, engine: str | None = None, **options: Any) -> VLM:
    """The bundle as --model_args says: `engine` as for vlm-run, parts apart by ";" or quoted; `threads`, `max_context`.

    Raises InputError for an argument that there is not, and where lmms-eval was started as several processes.
    """
    import vlm_runtime

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("--model vlm_export runs in one process: start lmms-eval without accelerate or torchrun")
    allowed = ("threads", "max_context", "verify")
    if unknown := sorted(set(options) - set(allowed)):
        raise InputError(f"unknown model argument {unknown[0]!r}: choose from bundle, engine, {', '.join(allowed)}")
    name = engine.strip("\"'").replace(";", ",") if engine is not None else None
    given = {key: value for key, value in options.items() if value is not None}
    return vlm_runtime.load(str(bundle).strip("\"'"), engine=name, **given)


def question(context: str, images: int, token: str) -> str:
    """A task's text as `VLM.answer` takes it: its placeholders become the model's image `token`.

    Placeholders are left as they are where there are not as many as pictures and the model's token is another word.
    """
    if token != PLACEHOLDER and images and context.count(PLACEHOLDER) == images:
        return context.replace(PLACEHOLDER, token)
    return context


def pictures(visuals: Any) -> list[Any]:
    """The pictures of what a task's doc_to_visual gave: PIL images, or paths of picture files.

    Raises InputError for video and sound, which bundles do not take.
    """
    found = []
    for visual in visuals if isinstance(visuals, list | tuple) else [visuals]:
        if visual is None:
            continue
        path = isinstance(visual, str | os.PathLike)
        if (path and Path(visual).suffix.lower() not in _PICTURES) or isinstance(visual, Mapping):
            raise InputError(f"the task gives {str(visual)[:200]!r}: a bundle takes pictures only; choose another task")
        found.append(visual)
    return found


def settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """A task's generation_kwargs as keywords of `VLM.answer`: greedy unless it asks for sampling.

    Raises InputError for beam search. Keys that belong to other models are passed over, as lmms-eval's own models do.
    """
    beams = given.get("num_beams") or 1
    if beams != 1:
        raise InputError(f"the task asks for num_beams={beams}: bundles decode greedily or sample; set num_beams=1")
    until = given.get("until") or ()
    stop = [until] if isinstance(until, str) else list(until)
    out: dict[str, Any] = {
        "max_new_tokens": int(given.get("max_new_tokens") or given.get("max_gen_toks") or LONGEST),
        "stop": [text for text in stop if text],
    }
    temperature = given.get("temperature")
    if given.get("do_sample", bool(temperature)):
        out["temperature"] = 1.0 if temperature is None else float(temperature)
        out["seed"] = 0  # the same answers in every run
        out |= {name: kind(given[name]) for name, kind in (("top_p", float), ("top_k", int)) if given.get(name)}
    return out


def answer(vlm: VLM, context: str, visuals: Any, given: Mapping[str, Any]) -> Answer:
    """The answer to one request of generate_until. Raises PromptError where text and pictures do not fit."""
    images = pictures(visuals)
    return vlm.answer(question(context, len(images), vlm.spec.prompt.image_token), images, **settings(given))


def rounds(vlm: VLM, context: str, visuals: Any, given: Mapping[str, Any], doc_to_text: Any, doc: Any) -> Sequence[str]:
    """The answers of one multi-round request: after each round the task's doc_to_text gives the next, or ends it."""
    said: list[str] = []
    info = None
    for number in range(1, 1000):
        said = [*said, answer(vlm, context, visuals, given).text.strip()]
        visuals, context, ended, said, info = doc_to_text(
            doc, previous_output=said, round_idx=number, previous_round_info=info
        )
        if ended:
            return said
    raise InputError("the task asks for 1000 rounds or more: it never says that it is over")
