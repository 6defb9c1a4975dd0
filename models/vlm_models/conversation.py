"""Conversations of LLaVA's original layout: written turn by turn as its code does, and as a Jinja chat template.

The two ways share the data alone, so that each can be checked by the other. Names, texts and styles are those of
`conv_templates` in LLaVA's conversation.py (https://github.com/haotian-liu/LLaVA) and of its descendants.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Style = Literal["single", "two", "mpt", "chatml", "llama_2", "llama_3", "gemma", "plain", "yi"]


@dataclass(frozen=True)
class Conversation:
    """How turns become one text: `system` after `header`, then each turn by `style` with `roles` and separators.

    `sep2` ends an answer where that is another text than `sep`, which ends a question. `start` is a token that the
    text begins with. `asks_system` is False where a conversation has no place for a system message.
    """

    name: str
    style: Style
    system: str
    roles: tuple[str, str]
    sep: str
    sep2: str = ""
    header: str = ""
    start: str = ""
    asks_system: bool = True

    @property
    def stop(self) -> str:
        """What ends an answer: a token's text where the tokenizer has it, else plain text."""
        return self.sep2 if self.style in ("two", "llama_2") else self.sep.rstrip("\n") or self.sep


@dataclass(frozen=True)
class Written:
    """A conversation as one checkpoint writes it: `picture` stands for one picture, tokens around it included.

    Without `conversation` its tokenizer's own chat template does. `whole` says that a text is tokenized at once, and
    not in pieces around its pictures.
    """

    conversation: Conversation | None
    picture: str
    whole: bool = False


def question(picture: str, text: str, pictures: int = 1) -> str:
    """A user's turn with `pictures` pictures before the text, each on a line of its own."""
    return f"{picture}\n" * pictures + text


def render(conversation: Conversation, turns: Sequence[str], system: str | None = None) -> str:
    """The text of `turns`, a question first and then by turns; after a question comes the beginning of its answer."""
    c, system = conversation, conversation.system if system is None else system
    open_answer = len(turns) % 2 == 1
    speakers = [c.roles[i % 2] for i in range(len(turns) + open_answer)]
    said: list[str | None] = [*turns, *([None] if open_answer else [])]
    match c.style:
        case "single" | "two":
            out, ends = system + c.sep, (c.sep, c.sep2 if c.style == "two" else c.sep)
            for i, (role, text) in enumerate(zip(speakers, said, strict=True)):
                out += f"{role}:" if text is None else f"{role}: {text}{ends[i % 2]}"
        case "yi":
            out = f"{system}\n\n{c.sep} "
            for role, text in zip(speakers, said, strict=True):
                out += f"{role}:" if text is None else f"{role}: {text}\n{c.sep} "
        case "mpt" | "gemma":
            out = "" if c.style == "gemma" else c.header + system + c.sep
            for role, text in zip(speakers, said, strict=True):
                out += role if text is None else role + text + c.sep
        case "chatml":
            out = f"{c.header}{system}{c.sep}\n"
            for role, text in zip(speakers, said, strict=True):
                out += f"{role}\n" if text is None else f"{role}\n{text}{c.sep}\n"
        case "llama_3":
            heading = "<|start_header_id|>{}<|end_header_id|>\n\n".format
            out = c.start + heading("system") + system + c.sep
            for role, text in zip(speakers, said, strict=True):
                out += heading(role) + ("" if text is None else text + c.sep)
        case "llama_2":
            out = ""
            for i, text in enumerate(turns):
                if i % 2:
                    out += f" {text} {c.sep2}"
                else:
                    told = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system and i == 0 else ""
                    out += f"{c.sep if i else ''}[INST] {told}{text} [/INST]"
        case "plain":
            out = system + "".join(text + (c.sep, c.sep2)[i % 2] for i, text in enumerate(turns))
    return out


@dataclass(frozen=True)
class _Affixes:
    """What stands around the texts: of the system message, of a question (and of one that is not the first), …"""

    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    opens: str
    again: str = ""
    inside: bool = False  # the system message stands within the first question


def _affixes(c: Conversation) -> _Affixes:
    user, assistant = c.roles
    match c.style:
        case "single" | "two":
            end = c.sep2 if c.style == "two" else c.sep
            return _Affixes(("", c.sep), (f"{user}: ", c.sep), (f"{assistant}: ", end), f"{assistant}:")
        case "yi":
            end = f"\n{c.sep} "
            return _Affixes(("", f"\n{end}"), (f"{user}: ", end), (f"{assistant}: ", end), f"{assistant}:")
        case "mpt" | "gemma":
            return _Affixes((c.header, c.sep), (user, c.sep), (assistant, c.sep), assistant)
        case "chatml":
            end = f"{c.sep}\n"
            return _Affixes((c.header, end), (f"{user}\n", end), (f"{assistant}\n", end), f"{assistant}\n")
        case "llama_3":
            before = [f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ("system", user, assistant)]
            return _Affixes((c.start + before[0], c.sep), (before[1], c.sep), (before[2], c.sep), before[2])
        case "llama_2":
            told = ("<<SYS>>\n", "\n<</SYS>>\n\n")
            return _Affixes(told, ("[INST] ", " [/INST]"), (" ", f" {c.sep2}"), "", c.sep, inside=True)
        case "plain":
            return _Affixes(("", ""), ("", c.sep), ("", c.sep2), "")


# Pictures before any text stand on lines of their own, later ones where they stand in the text.
_TEMPLATE = (
    "{%- macro said(content) -%}{%- if content is string -%}{{ content }}{%- else -%}"
    "{%- set at = namespace(leading=true) -%}{%- for part in content -%}"
    "{%- if part['type'] == 'image' -%}{{ PICTURE }}{%- if at.leading -%}{{ '\\n' }}{%- endif -%}"
    "{%- else -%}{%- set at.leading = false -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{%- endmacro -%}"
    "{%- set now = namespace(system=SYSTEM, asked=false) -%}"
    "{%- if messages and messages[0]['role'] == 'system' -%}REFUSE"
    "{%- set now.system = said(messages[0]['content']) -%}{%- endif -%}"
    "HEAD"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ AGAIN if now.asked else '' }}{{ USER }}INSIDE"
    "{{ said(message['content']) }}{{ USER_END }}{%- set now.asked = true -%}"
    "{%- elif message['role'] == 'assistant' -%}{{ ASSISTANT }}{{ said(message['content']) }}{{ ASSISTANT_END }}"
    "{%- elif message['role'] != 'system' or not loop.first -%}"
    "{{ raise_exception('a message of role ' ~ message['role'] ~ ' has no place here') }}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ OPENS }}{%- endif -%}"
)


def chat_template(c: Conversation, picture: str) -> str:
    """The same as a Jinja chat template for messages of text and pictures, as transformers renders them."""
    a = _affixes(c)
    system = "{{ BEFORE }}{{ now.system }}{{ AFTER }}"
    pieces = {
        "REFUSE": "" if c.asks_system else "{{ raise_exception('System role not supported') }}",
        "HEAD": "" if a.inside or not c.asks_system else system,
        "INSIDE": "{%- if now.system and not now.asked -%}" + system + "{%- endif -%}" if a.inside else "",
    }
    texts = {
        "PICTURE": picture,
        "SYSTEM": c.system,
        "BEFORE": a.system[0],
        "AFTER": a.system[1],
        "AGAIN": a.again,
        "USER_END": a.user[1],
        "USER": a.user[0],
        "ASSISTANT_END": a.assistant[1],
        "ASSISTANT": a.assistant[0],
        "OPENS": a.opens,
    }
    out = _TEMPLATE
    for name, piece in pieces.items():
        out = out.replace(name, piece)
    for name, text in texts.items():
        out = out.replace(f"{{{{ {name} }}}}", "{{ " + _quoted(text) + " }}")
    return out.replace("system=SYSTEM", f"system={_quoted(c.system)}").replace(
        "{{ AGAIN if", f"{{{{ {_quoted(a.again)} if"
    )


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
