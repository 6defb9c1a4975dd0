"""Chat templates for llama-server: the checkpoint's own where nothing else would render the same."""

from __future__ import annotations

import dataclasses

import pytest

from vlm_export.gguf.served_template import MARKER, served_template
from vlm_models.spec import PromptSpec
from vlm_runtime.prompt import render, user_message

SPEC = PromptSpec("<image>", 5, 16, (2,), "<s>", "</s>", None)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + m['role'] + '\n' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ '\n\n<image>\n\n' }}{% else %}{{ c['text'] | trim }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<end_of_turn>\n' }}{% endfor %}\n"
)
TEXTS = "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] }}{% endfor %}"


@pytest.mark.parametrize("template", [GEMMA, TEXTS])
@pytest.mark.parametrize("marker", [MARKER, "<__media_Pm4DGuMoLnn1TVqYmMwEsLX3xarYrGG0__>"])
def test_the_joined_text_renders_as_the_message_with_its_picture(template: str, marker: str) -> None:
    spec = dataclasses.replace(SPEC, chat_template=template)
    served = dataclasses.replace(SPEC, chat_template=served_template(template, spec))
    assert served.chat_template != template
    wanted = render([user_message("What?", 1, spec)], spec).replace("<image>", marker)
    assert render([{"role": "user", "content": f"{marker}What?"}], served) == wanted
    assert wanted.count(marker) == 1


def test_text_alone_renders_as_before_also_where_the_template_ends_in_a_newline() -> None:
    spec = dataclasses.replace(SPEC, chat_template=GEMMA)
    served = dataclasses.replace(SPEC, chat_template=served_template(GEMMA, spec))
    for content in ("Hello", "A <image> in words, </s> too", "__media__ <_media"):
        messages = [{"role": "user", "content": content}]
        assert render(messages, served) == render(messages, spec)


@pytest.mark.parametrize("template", ["\n" + GEMMA, "{{ raise_exception('never') }}", "{% for m in messages %}"])
def test_a_template_that_would_change_is_left_as_it_is(template: str) -> None:
    assert served_template(template, dataclasses.replace(SPEC, chat_template=template)) == template
