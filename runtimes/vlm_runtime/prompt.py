"""From a conversation to its text: the checkpoint's chat template, in a sandbox."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

from vlm_models.errors import PromptError
from vlm_models.spec import PromptSpec
from vlm_runtime.tokenizer import check_count

if TYPE_CHECKING:
    import jinja2

Message = Mapping[str, Any]  # {"role": str, "content": str or a list of {"type": "image"} and {"type": "text", "text"}}

MAX_RENDERED = 4_000_000  # characters of one rendered conversation
_DUMPED = "'type':"  # a list of parts written out as Python shows it, by a template that takes text only


def user_message(text: str, images: int, prompt: PromptSpec) -> dict[str, Any]:
    """A user's turn with `images` pictures: where `text` holds `prompt.picture`, else before the text.

    Raises PromptError when the text holds it more or less often than there are pictures.
    """
    pieces = text.split(prompt.picture)
    if len(pieces) == 1:
        text_parts = [{"type": "text", "text": text}] if text or not images else []
        return {"role": "user", "content": [{"type": "image"}] * images + text_parts}
    check_count(len(pieces) - 1, images, prompt)
    parts: list[dict[str, str]] = []
    leading = True  # the space around pictures that come before any text is the template's to write
    for i, piece in enumerate(pieces):
        if i:
            parts.append({"type": "image"})
        if leading and (i or not piece.strip()):
            piece = piece.lstrip()
        leading = leading and not piece
        if piece:
            parts.append({"type": "text", "text": piece})
    return {"role": "user", "content": parts}


def render(messages: Sequence[Message], prompt: PromptSpec, *, add_generation_prompt: bool = True) -> str:
    """The conversation as text, by the checkpoint's template, or as LLaVA-1.5 writes it where there is none.

    Raises PromptError, one line, for a message that is not one and for whatever the template raises.
    """
    for message in messages:
        _check_message(message)
    if prompt.chat_template is None:
        return _llava(messages, prompt, add_generation_prompt)
    form = _form(prompt)
    return _run([form.fit(m, prompt.picture) for m in messages], prompt, add_generation_prompt)


@dataclass(frozen=True)
class _Form:
    """What a template takes: which roles as a list of parts, and where it writes a user's pictures."""

    lists: frozenset[str]
    images: Literal["in place", "first", "as text"]

    def fit(self, message: Message, image_token: str) -> dict[str, Any]:
        """`message` as this template takes it."""
        role, content = message["role"], message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
        if role not in self.lists:
            return {**message, "content": _flat(parts, image_token)}
        kinds = [p["type"] for p in parts]
        if self.images == "first" and "image" in kinds[kinds.index("text") if "text" in kinds else len(kinds) :]:
            parts = [{"type": "text", "text": _flat(parts, image_token)}]
        return {**message, "content": parts}


@functools.lru_cache(maxsize=16)
def _form(prompt: PromptSpec) -> _Form:
    """Find out by trying what the template of `prompt` does with text, image, text in one message."""
    before, after, token = "vlmbefore", "vlmafter", prompt.picture
    text, image, last = {"type": "text", "text": before}, {"type": "image"}, {"type": "text", "text": after}
    lists, images = set(), "as text"
    for parts in ([text, image, last], [image, last]):
        out = _try([{"role": "user", "content": parts}], prompt)
        if out.count(token) == 1 and after in out and (text not in parts or before in out) and _DUMPED not in out:
            lists.add("user")
            in_place = text in parts and out.index(before) < out.index(token) < out.index(after)
            images = "in place" if in_place else "first"
            break
    user = {"role": "user", "content": [last] if lists else after}
    for role in ("system", "assistant"):
        taken = []
        for content in ([text], before):
            message = {"role": role, "content": content}
            out = _try([message, user] if role == "system" else [user, message], prompt)
            taken.append(before in out and _DUMPED not in out)
        if taken[0] and (lists or not taken[1]):
            lists.add(role)
    return _Form(frozenset(lists), images)  # type: ignore[arg-type]


def _try(messages: Sequence[Message], prompt: PromptSpec) -> str:
    try:
        return _run(messages, prompt, add_generation_prompt=False)
    except PromptError:
        return ""


def _run(messages: Sequence[Message], prompt: PromptSpec, add_generation_prompt: bool) -> str:
    tokens = {"bos_token": prompt.bos_token, "eos_token": prompt.eos_token, "image_token": prompt.image_token}
    given = {name: token for name, token in tokens.items() if token is not None}
    out: list[str] = []
    length = 0
    try:
        template = _template(prompt.chat_template or "")
        for piece in template.generate(
            messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **given
        ):
            out.append(piece)
            length += len(piece)
            if length > MAX_RENDERED:
                raise PromptError(f"the chat template writes more than {MAX_RENDERED} characters: it is refused")
    except PromptError:
        raise
    except Exception as error:  # a template is a program: it raises what it likes
        raise PromptError(f"the checkpoint's chat template refuses the conversation: {_line(error)}") from None
    return "".join(out)


@functools.lru_cache(maxsize=16)
def _template(source: str) -> jinja2.Template:
    """`source` compiled as transformers compiles chat templates, without access to Python's internals."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} … {% endgeneration %} marks what a model is trained on; here it is only its body."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


def _llava(messages: Sequence[Message], prompt: PromptSpec, add_generation_prompt: bool) -> str:
    out = []
    for message in messages:
        content = message["content"]
        text = content if isinstance(content, str) else _flat(content, prompt.picture)
        match message["role"]:
            case "system":
                out.append(f"{text} ")
            case "user":
                out.append(f"USER: {text} ")
            case "assistant":
                out.append(f"ASSISTANT: {text}{prompt.eos_token or ''}")
            case role:
                raise PromptError(f"unknown role {role!r}: choose one of system, user, assistant")
    return "".join(out) + ("ASSISTANT:" if add_generation_prompt else "")


def _flat(parts: Iterable[Mapping[str, str]], image_token: str) -> str:
    """Parts as one text: pictures before any text on lines of their own, later ones where they stand."""
    out = ""
    leading = True
    for part in parts:
        leading = leading and part["type"] == "image"
        out += part["text"] if part["type"] == "text" else image_token + ("\n" if leading else "")
    return out


def _check_message(message: Message) -> None:
    allowed = "a role and a content, which is text or a list of {'type': 'image'} and {'type': 'text', 'text': …}"
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise PromptError(f"a message has {allowed}")
    content = message.get("content")
    if isinstance(content, str):
        return
    if not isinstance(content, list | tuple):
        raise PromptError(f"a message has {allowed}")
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "image" and not (kind == "text" and isinstance(part.get("text"), str)):
            raise PromptError(f"a message has {allowed}")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
