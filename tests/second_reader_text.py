"""The text of the second reader, written from runtimes/BUNDLE.md alone: a conversation to token ids."""

from __future__ import annotations

import json
from datetime import datetime

import jinja2
import tokenizers
from jinja2.ext import Extension
from jinja2.nodes import Scope
from jinja2.sandbox import ImmutableSandboxedEnvironment


def question(text, pictures, prompt):
    placeholder = prompt.get("placeholder") or prompt["image_token"]
    pieces = text.split(placeholder)
    if len(pieces) == 1:
        return {
            "role": "user",
            "content": [{"type": "image"}] * pictures + ([text_part(text)] if text or not pictures else []),
        }
    assert len(pieces) - 1 == pictures
    parts, leading = [], True
    for i, piece in enumerate(pieces):
        if i:
            parts.append({"type": "image"})
        if leading:
            piece = piece.lstrip() if i or not piece.strip() else piece
        leading = leading and not piece
        parts += [text_part(piece)] if piece else []
    return {"role": "user", "content": parts}


def text_part(text):
    return {"type": "text", "text": text}


def flat(content, placeholder):
    if isinstance(content, str):
        return content
    out, only_pictures = "", True
    for part in content:
        only_pictures = only_pictures and part["type"] == "image"
        out += part["text"] if part["type"] == "text" else placeholder + "\n" * only_pictures
    return out


class Generation(Extension):
    tags = frozenset({"generation"})

    def parse(self, parser):
        line = next(parser.stream).lineno
        return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def raise_exception(text):
    raise jinja2.TemplateError(text)


def template_of(prompt):
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, **{"ensure_ascii": False, **options})
    environment.globals.update(raise_exception=raise_exception, strftime_now=lambda form: datetime.now().strftime(form))
    template = environment.from_string(prompt["chat_template"])
    named = {name: prompt[name] for name in ("bos_token", "eos_token", "image_token") if prompt.get(name) is not None}

    def run(messages, generate):
        return template.render(messages=messages, tools=None, documents=None, add_generation_prompt=generate, **named)

    return run


def render(messages, prompt):
    placeholder = prompt.get("placeholder") or prompt["image_token"]
    if prompt.get("chat_template") is None:
        forms = {"system": "{} ", "user": "USER: {} ", "assistant": "ASSISTANT: {}" + (prompt.get("eos_token") or "")}
        out = [forms[m["role"]].replace("{}", flat(m["content"], placeholder), 1) for m in messages]
        return "".join(out) + "ASSISTANT:"
    run = template_of(prompt)

    def attempt(*messages):
        try:
            return run(messages, False)
        except Exception:
            return ""

    a, b, lists, anywhere = "SecondReaderA", "SecondReaderB", set(), False
    for parts in ([text_part(a), {"type": "image"}, text_part(b)], [{"type": "image"}, text_part(b)]):
        out = attempt({"role": "user", "content": parts})
        texts = [part["text"] for part in parts if part["type"] == "text"]
        if out.count(placeholder) == 1 and all(text in out for text in texts) and "'type':" not in out:
            lists.add("user")
            anywhere = len(texts) == 2 and out.index(a) < out.index(placeholder) < out.index(b)
            break
    user = {"role": "user", "content": [text_part(b)] if lists else b}
    for role in ("system", "assistant"):
        passes = []
        for content in ([text_part(a)], a):
            message = {"role": role, "content": content}
            out = attempt(message, user) if role == "system" else attempt(user, message)
            passes.append(a in out and "'type':" not in out)
        if passes[0] and (lists or not passes[1]):
            lists.add(role)

    def given(message):
        content = message["content"]
        if message["role"] not in lists:
            return {**message, "content": flat(content, placeholder)}
        content = [text_part(content)] if isinstance(content, str) else content
        kinds = [part["type"] for part in content]
        if not anywhere and "text" in kinds and "image" in kinds[kinds.index("text") :]:
            content = [text_part(flat(content, placeholder))]
        return {**message, "content": content}

    return run([given(message) for message in messages], True)


def open_tokenizer(path, prompt):
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    assert tokenizer.token_to_id(prompt["image_token"]) == prompt["image_token_id"]
    if prompt["image_token_id"] not in tokenizer.get_added_tokens_decoder():
        tokenizer.add_special_tokens([tokenizers.AddedToken(prompt["image_token"], normalized=False)])
    return tokenizer


def token_ids(text, pictures, tokenizer, prompt):
    """`pictures` are (text in the prompt, rows of each run)."""

    def encode(text):
        bos = prompt.get("bos_token")
        special = prompt.get("special_tokens", True) and not (bos and text.startswith(bos))
        return tokenizer.encode(text, add_special_tokens=special).ids

    image, pieces = prompt["image_token_id"], text.split(prompt.get("placeholder") or prompt["image_token"])
    assert len(pieces) == 1 + len(pictures)
    if prompt.get("chunked"):
        empty, ids = encode(""), encode(pieces[0])
        for (_, runs), piece in zip(pictures, pieces[1:], strict=True):
            more = encode(piece)
            ids = ids + [image] * sum(runs) + (more[len(empty) :] if more[: len(empty)] == empty else more)
        return ids
    whole = pieces[0] + "".join(said + piece for (said, _), piece in zip(pictures, pieces[1:], strict=True))
    runs = [run for _, runs in pictures for run in runs]
    return [one for token in encode(whole) for one in [token] * (runs.pop(0) if token == image else 1)]
