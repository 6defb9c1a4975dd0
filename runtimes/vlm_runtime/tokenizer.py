"""From the text of a conversation to token ids: the checkpoint's tokenizer, and the places of the pictures' rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from vlm_models.errors import BundleError, PromptError
from vlm_models.spec import PromptSpec
from vlm_runtime.bundle import Bundle
from vlm_runtime.tiling import Layout


class Tokenizer:
    """The checkpoint's tokenizer, equal to transformers' own on the same text."""

    def __init__(self, bundle: Bundle) -> None:
        """Read the tokenizer of `bundle`. Raises BundleError when it cannot, or does not know the image token."""
        import tokenizers

        path, prompt = bundle.path(bundle.manifest.tokenizer), bundle.spec.prompt
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise BundleError(f"{path} is not a tokenizer ({_line(error)}): export again") from None
        known = self._tokenizer.token_to_id(prompt.image_token)
        if known != prompt.image_token_id:
            raise BundleError(
                f"{path} gives {prompt.image_token!r} the id {known}, the model takes {prompt.image_token_id}: "
                "tokenizer and model do not belong together"
            )
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if known not in self._tokenizer.get_added_tokens_decoder():  # else it would be cut into pieces
            self._tokenizer.add_special_tokens([tokenizers.AddedToken(prompt.image_token, normalized=False)])
        self._bos, self._special = prompt.bos_token, prompt.special_tokens

    def encode(self, text: str, *, add_special_tokens: bool | None = None) -> list[int]:
        """Token ids of `text`, with the tokenizer's special tokens unless the text has its own (or begins with BOS).

        That is what transformers does with a rendered conversation. Raises PromptError for text that is not Unicode.
        """
        if add_special_tokens is None:
            add_special_tokens = self._special and not (self._bos and text.startswith(self._bos))
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
        except Exception as error:  # a lone surrogate: UnicodeEncodeError or TypeError, by version
            raise PromptError(f"the prompt cannot be tokenized ({_line(error)}): is it valid UTF-8?") from None

    def token(self, token_id: int) -> str:
        """A token as the vocabulary has it, bytes and spaces as it writes them; "" where there is none."""
        return self._tokenizer.id_to_token(token_id) or ""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`; U+FFFD stands for bytes that are not (yet) a character."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))


def prompt_ids(
    text: str, layouts: Sequence[Layout], encode: Callable[[str], Sequence[int]], prompt: PromptSpec
) -> list[int]:
    """Token ids (S,) of a rendered conversation about pictures of `layouts`, the image token once for each row.

    `encode` gives the ids of a text with the tokenizer's special tokens. Raises PromptError when `text` holds
    `prompt.picture` more or less often than there are pictures.
    """
    first, *rest = text.split(prompt.picture)
    check_count(len(rest), len(layouts), prompt)
    if not prompt.chunked:
        whole = first + "".join(layout.text + piece for layout, piece in zip(layouts, rest, strict=True))
        return expand(encode(whole), prompt, [run for layout in layouts for run in layout.runs])
    lead, ids = list(encode("")), list(encode(first))
    for layout, piece in zip(layouts, rest, strict=True):
        said = list(encode(piece))
        ids += [prompt.image_token_id] * layout.rows + said[len(lead) if said[: len(lead)] == lead else 0 :]
    return ids


def expand(ids: Sequence[int], prompt: PromptSpec, runs: Sequence[int]) -> list[int]:
    """`ids` with the i-th image token repeated `runs[i]` times.

    Raises PromptError when there are more or fewer image tokens than `runs`.
    """
    index = np.asarray(ids, dtype=np.int64).reshape(-1)
    is_image = index == prompt.image_token_id
    check_count(int(np.count_nonzero(is_image)), len(runs), prompt)
    times = np.ones(index.size, np.int64)
    times[is_image] = runs
    expanded: list[int] = np.repeat(index, times).tolist()
    return expanded


def check_count(tokens: int, images: int, prompt: PromptSpec) -> None:
    """Raise PromptError where a prompt has more or fewer image tokens than images."""
    if tokens != images:
        raise PromptError(
            f"the prompt has {tokens} {prompt.picture}, but {images} image{'' if images == 1 else 's'} "
            f"{'was' if images == 1 else 'were'} given: write {prompt.picture} once for each image"
        )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
