"""Chat templates that take pictures, made of a language model's own."""

from __future__ import annotations

# Contents become plain text, pictures where they stand, before the language model's own template sees them.
_FLATTEN = (
    "{%- set pictured = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- set flat = namespace(text='') -%}"
    "{%- if message['content'] is string -%}{%- set flat.text = message['content'] -%}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{%- set flat.text = flat.text + 'IMAGE\\n' -%}"
    "{%- else -%}{%- set flat.text = flat.text + part['text'] -%}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- set pictured.messages = pictured.messages + [{'role': message['role'], 'content': flat.text}] -%}"
    "{%- endfor -%}"
    "{%- set messages = pictured.messages -%}"
)
# LLaVA-1.5's conversation, for a language model that was never taught one.
_PLAIN = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{ message['content'] + ' ' }}"
    "{%- elif message['role'] == 'user' -%}{{ 'USER: ' + message['content'] + ' ' }}"
    "{%- else -%}{{ 'ASSISTANT: ' + message['content'] + 'EOS' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
)


def chat_template(own: str | None, image_token: str, eos_token: str | None) -> str:
    """Jinja2: the language model's `own` template over contents with pictures; LLaVA-1.5's where it has none."""
    flatten = _FLATTEN.replace("IMAGE", _quoted(image_token))
    return flatten + (own if own is not None else _PLAIN.replace("EOS", _quoted(eos_token or "")))


def _quoted(text: str) -> str:
    """`text` inside single quotes of Jinja2."""
    return text.replace("\\", "\\\\").replace("'", "\\'")
