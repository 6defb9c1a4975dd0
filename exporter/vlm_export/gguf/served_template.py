"""The chat template for llama-server: it lets the checkpoint's own template see the picture.

llama-server joins a message with a picture into one text, its media marker where the picture was, and a template that
writes a newline or tags around a picture never learns of it. The template written here takes the text apart again,
renders the checkpoint's template with a picture in the message, and puts the marker in the place of the image token.
"""

from __future__ import annotations

import dataclasses
import json

from vlm_models.errors import PromptError
from vlm_models.spec import PromptSpec
from vlm_runtime.prompt import Message, render, user_message

MARKER = "<__media__>"
"""llama.cpp's own marker; llama-server adds random characters before the last underscores."""

# Only a user's messages are looked into: llama.cpp finds out by trying which others the template reads.
_BEFORE = (
    "{% set vlm = namespace(marker='', messages=[]) %}"
    "{% for message in messages %}"
    "{% set at = namespace(parts=[], text='', first=true) %}"
    "{% if message['role'] == 'user' %}"
    "{% set given = message['content'] %}"
    "{% for part in ([{'type': 'text', 'text': given}] if given is string else given) %}"
    "{% if part['type'] == 'text' and '<__media' in part['text'] %}"
    "{% for piece in part['text'].split('<__media') %}"
    "{% if loop.first %}{% set at.text = piece %}{% else %}"
    "{% set name = piece.split('__>')[0] %}"
    "{% set vlm.marker = '<__media' + name + '__>' %}"
    "{% set at.parts = at.parts + [{'type': 'image'}] %}"
    "{% set at.text = piece[(name|length) + 3:] %}"
    "{% endif %}"
    "{% if at.text %}{% set at.parts = at.parts + [{'type': 'text', 'text': at.text}] %}{% endif %}"
    "{% endfor %}"
    "{% else %}{% set at.parts = at.parts + [part] %}{% endif %}"
    "{% endfor %}"
    "{% endif %}"
    "CONTENT"
    "{% endfor %}"
    "{% set messages = vlm.messages %}"
    "{% set rendered %}"
)
_AFTER = "{% endset %}{{ rendered.replace(IMAGE, vlm.marker) if vlm.marker else rendered }}"
_LIST = (
    "{% if vlm.marker and message['role'] == 'user' %}"
    "{% set vlm.messages = vlm.messages + [{'role': message['role'], 'content': at.parts}] %}"
    "{% else %}{% set vlm.messages = vlm.messages + [message] %}{% endif %}"
)
# For a template that takes texts only: pictures before any text on lines of their own, as vlm_runtime writes them.
_TEXT = (
    "{% if message['role'] == 'user' %}"
    "{% set at.text = '' %}{% for part in at.parts %}"
    "{% if part['type'] == 'image' %}{% set at.text = at.text + IMAGE + ('\\n' if at.first else '') %}"
    "{% else %}{% set at.text = at.text + part['text'] %}{% set at.first = false %}{% endif %}"
    "{% endfor %}"
    "{% set vlm.messages = vlm.messages + [{'role': message['role'], 'content': at.text}] %}"
    "{% else %}{% set vlm.messages = vlm.messages + [message] %}{% endif %}"
)


def served_template(template: str, prompt: PromptSpec) -> str:
    """`template` for llama-server; itself where taking the text apart would not give what vlm_runtime renders.

    `template` is what `prompt` is rendered with, or LLaVA-1.5's form as Jinja where the checkpoint has none.
    """
    image = json.dumps(prompt.image_token)
    for content in (_LIST, _TEXT):
        before, after = (piece.replace("CONTENT", content).replace("IMAGE", image) for piece in (_BEFORE, _AFTER))
        served = before + template.removesuffix("\n") + after
        if all(_same(served, prompt, turns) for turns in _conversations(prompt)):
            return served
    return template


def _conversations(prompt: PromptSpec) -> list[tuple[Message, ...]]:
    """What must come out right: a picture and a question, a second question, and no picture at all."""
    asked, answer = user_message("What is this?", 1, prompt), {"role": "assistant", "content": "A cat."}
    again, plain = {"role": "user", "content": "Sure?"}, {"role": "user", "content": "Hello"}
    return [(asked,), (asked, answer, again), (plain,), (plain, answer, asked)]


def _same(served: str, prompt: PromptSpec, messages: tuple[Message, ...]) -> bool:
    """Whether `served` makes of joined messages what the checkpoint's template makes of the real ones."""
    joined = [{**message, "content": _joined(message)} for message in messages]
    try:
        wanted = render(messages, prompt).replace(prompt.image_token, MARKER)
        return render(joined, dataclasses.replace(prompt, chat_template=served)) == wanted
    except PromptError:
        return False


def _joined(message: Message) -> str:
    """A message's content as llama-server joins it."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(MARKER if part["type"] == "image" else part["text"] for part in content)
