"""The prompt of the check as the checkpoint's own code writes and reads it; the bundle has to come to the same ids.

Neither the bundle's template nor the runtime takes part: transformers renders Hugging Face's layouts,
`vlm_models.conversation` what LLaVA's original code writes turn by turn.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_models.conversation import question, render
from vlm_models.errors import CheckpointError
from vlm_models.family import family_of
from vlm_models.original.files import CONFIG, END, IMAGE, PATCH, SOURCE, START, load_tokenizer
from vlm_models.processor import transformers_tokenizer

if TYPE_CHECKING:
    from PIL import Image

    from vlm_models.checkpoint import Checkpoint
    from vlm_models.model import Model


def question_text(model: Model, text: str) -> str:
    """A question about one picture as the conversation that the checkpoint was trained on. Raises CheckpointError."""
    checkpoint, picture = model.checkpoint, model.spec.prompt.picture
    if (written := checkpoint.conversation) is not None and written.conversation is not None:
        return render(written.conversation, [question(written.picture, text)])
    if (own := getattr(family_of(checkpoint), "question", None)) is not None:
        return str(own(picture, text))
    tokenizer = transformers_tokenizer(checkpoint)
    template = _template(checkpoint) or tokenizer.chat_template
    if not template:
        return f"USER: {picture}\n{text} ASSISTANT:"  # LLaVA-1.5's, which has none
    parts: list[Any] = [{"type": "image"}, {"type": "text", "text": text}]
    refusal = ""
    for content in (parts, f"{picture}\n{text}"):  # templates of text models take no parts
        try:
            out = tokenizer.apply_chat_template(
                [{"role": "user", "content": content}],
                chat_template=template,
                tokenize=False,
                add_generation_prompt=True,
            )
        except Exception as error:  # a template is a program: it raises what it likes
            refusal = " ".join(str(error).split())[:200]
            continue
        if out.count(picture) == 1 and text in out and "'type':" not in out:
            return str(out)
    raise CheckpointError(
        f"{checkpoint.folder}: transformers cannot ask about a picture with the checkpoint's chat template "
        f"({refusal or f'it writes {picture} not once'}): save the processor's template beside the model"
    )


def _template(checkpoint: Checkpoint) -> Any:
    """What transformers takes for the processor's template."""
    from transformers import ProcessorMixin

    mixin: Any = ProcessorMixin
    try:
        found = mixin.get_processor_dict(checkpoint.files, local_files_only=True)[0].get("chat_template")
    except (OSError, ValueError, KeyError):  # a folder without a processor, whose tokenizer has the template
        return None
    return found.get("default") if isinstance(found, dict) else found


@lru_cache(maxsize=2)
def _tokenizer(source: Path) -> Any:
    """The checkpoint's, with the tokens that LLaVA's `load_pretrained_model` (llava/model/builder.py) adds."""
    config, tokenizer = json.loads((source / CONFIG).read_text("utf-8")), load_tokenizer(source)
    if config.get("mm_use_im_start_end"):
        patch = [PATCH] if config.get("mm_use_im_patch_token", True) else []
        tokenizer.add_tokens([*patch, START, END], special_tokens=True)
    return tokenizer


def original_ids(
    checkpoint: Checkpoint, prompt: str, pictures: Sequence[Image.Image], rows: Callable[[Image.Image], int], token: int
) -> list[int]:
    """Token ids as LLaVA's `tokenizer_image_token` (llava/mm_utils.py) gives them, `token` once for each row.

    By transformers' tokenizer of the files that the checkpoint has; `rows` says how many a picture takes.
    """
    tokenizer = _tokenizer(checkpoint.files / SOURCE)
    bos = tokenizer.bos_token
    written = isinstance(bos, str) and prompt.startswith(bos)
    chunks = [list(tokenizer(chunk)["input_ids"]) for chunk in prompt.split(IMAGE)]
    first, *others = chunks
    lead = [tokenizer.bos_token_id] if first[:1] == [tokenizer.bos_token_id] else []
    ids = first[1:] if written and first[:2] == lead * 2 else first
    for picture, chunk in zip(pictures, others, strict=True):
        ids = [*ids, *[token] * rows(picture), *chunk[1 if lead and chunk[:1] == lead else 0 :]]
    return ids
