"""`vlm-serve` with the real `openai` client and curl: its answers are those of `VLM.answer`, whole and streamed."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from answering import painted
from running import IMAGE_TOKENS, running_bundle, running_spec
from serving import CHAT, Process, data_url, serving, user
from vlm_runtime.server.schema import Chunk, Completion, Models
from vlm_runtime.splice import splice
from vlm_runtime.vlm import VLM, load


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = running_spec(eos_token_ids=())
    return running_bundle(tmp_path_factory.mktemp("served") / "bundle", spec, max_context=256)


@pytest.fixture(scope="module")
def vlm(folder: Path) -> VLM:
    return load(folder, threads=1)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Process]:
    with serving(folder, "--threads", 1, "--max-tokens", 100) as process:
        yield process
        assert process.errors.read_text() == ""


@pytest.fixture(scope="module")
def client(server: Process) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def numbers(server: Process) -> dict[str, float]:
    """The samples of /metrics by name and labels."""
    text = httpx.get(f"{server.url}/metrics").text
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(v for k, v in sample.labels.items() if k != "le")
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_an_answer_is_the_one_of_the_library(client: openai.OpenAI, vlm: VLM) -> None:
    wanted = vlm.answer("What is it?", [painted(0), painted(1)], system="short", max_new_tokens=12)
    messages: Any = [{"role": "system", "content": "short"}, user("What is it?", painted(0), painted(1))]
    got = client.chat.completions.create(model="tiny", messages=messages, max_tokens=12)
    assert got.choices[0].message.content == wanted.text
    assert got.choices[0].finish_reason == "length"
    assert got.usage is not None
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (wanted.prompt_tokens, 12)
    assert got.usage.total_tokens == wanted.prompt_tokens + 12
    extra = got.model_extra or {}
    assert extra["engines"] == wanted.engines
    assert set(extra["timings_ms"]) == {*wanted.timings_ms, "queue"} - {"load"}
    details: Any = got.usage.prompt_tokens_details
    assert details.image_tokens == 2 * IMAGE_TOKENS


def test_a_stream_is_the_same_answer_in_pieces(client: openai.OpenAI, vlm: VLM) -> None:
    wanted = vlm.answer("Naïve 東京?", [painted(2)], max_new_tokens=30)
    messages: Any = [user("Naïve 東京?", painted(2))]
    options: Any = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=30, stream=True, stream_options=options
        )
    )
    *body, usage = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in body) == wanted.text
    assert body[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in body] == [None] * (len(body) - 1) + ["length"]
    assert len(body) > 10
    assert usage.choices == []
    assert usage.usage is not None
    assert usage.usage.completion_tokens == 30
    assert all(chunk.usage is None for chunk in body)
    assert {chunk.id for chunk in chunks} == {body[0].id}
    assert "ttft" in (body[-1].model_extra or {})["timings_ms"]


def test_every_line_of_a_stream_and_every_answer_is_what_the_schema_says(server: Process) -> None:
    body = {"messages": [user("hi", painted(0))], "max_tokens": 5, "logprobs": True, "top_logprobs": 2}
    Completion.model_validate(httpx.post(server.url + CHAT, json=body).json(), strict=True)
    Models.model_validate(httpx.get(f"{server.url}/v1/models").json(), strict=True)
    with httpx.stream("POST", server.url + CHAT, json={**body, "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    for line in lines[:-1]:
        Chunk.model_validate(json.loads(line.removeprefix("data: ")), strict=True)


def test_curl_gets_an_answer(server: Process, vlm: VLM) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}], "max_completion_tokens": 7})
    command = ["curl", "--silent", "--show-error", "--fail-with-body", "--json", body, server.url + CHAT]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == vlm.answer("hi", max_new_tokens=7).text


@pytest.mark.parametrize(
    ("asked", "settings"),
    [
        ({"temperature": 1.9, "seed": 3}, {"temperature": 1.9, "seed": 3}),
        ({"temperature": 1.9, "seed": -3}, {"temperature": 1.9, "seed": 2**64 - 3}),
        ({"temperature": 1.5, "seed": 4, "top_p": 0.9}, {"temperature": 1.5, "seed": 4, "top_p": 0.9}),
        ({"temperature": 1.5, "seed": 4, "top_p": 0}, {}),
        ({"top_k": 3, "temperature": 1, "seed": 1}, {"top_k": 3, "temperature": 1.0, "seed": 1}),
        ({"min_p": 0.1, "temperature": 1, "seed": 1}, {"min_p": 0.1, "temperature": 1.0, "seed": 1}),
        ({"repetition_penalty": 9}, {"repetition_penalty": 9.0}),
        ({"stop": " It"}, {"stop": [" It"]}),
        ({"stop": ["nothing", "\n"]}, {"stop": ["nothing", "\n"]}),
    ],
)
def test_settings_reach_the_answer(server: Process, vlm: VLM, asked: dict[str, Any], settings: dict[str, Any]) -> None:
    wanted = vlm.answer("hi", max_new_tokens=20, **settings)
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 20, **asked}
    (choice,) = httpx.post(server.url + CHAT, json=body).json()["choices"]
    assert choice["message"]["content"] == wanted.text
    assert choice["finish_reason"] == wanted.finish_reason
    assert (wanted.finish_reason == "stop") == ("stop" in asked)


def test_an_answer_is_as_long_as_asked_as_allowed_or_as_there_is_room(server: Process) -> None:
    for words, asked, wanted in (("hi", 5, 5), ("hi", 5000, 100), ("hi", None, 100), ("hello " * 30, 99, 99)):
        body: dict[str, Any] = {"messages": [{"role": "user", "content": words}]}
        got = httpx.post(server.url + CHAT, json=body | ({"max_tokens": asked} if asked else {})).json()
        made = got["usage"]["completion_tokens"]
        assert made == min(wanted, 256 - got["usage"]["prompt_tokens"])
        assert got["choices"][0]["finish_reason"] == "length"


def test_logprobs_are_those_of_the_model(server: Process, vlm: VLM) -> None:
    body = {"messages": [{"role": "user", "content": "Naïve 東京 🙂"}], "max_tokens": 20}
    body |= {"logprobs": True, "top_logprobs": 3, "temperature": 1.7, "seed": 8}
    got = httpx.post(server.url + CHAT, json=body).json()["choices"][0]
    content = got["logprobs"]["content"]
    assert len(content) == 20
    said = b"".join(bytes(one["bytes"]) for one in content)
    assert said.decode("utf-8", "replace") == got["message"]["content"]
    vlm.decoder.rewind(0)
    ids = vlm.tokenizer.encode("<|user|>Naïve 東京 🙂</s>\n<|assistant|>")
    logits = vlm.decoder.prefill(splice(ids, [], vlm.embedding)).astype(np.float64)
    logprobs = logits - logits.max() - math.log(np.exp(logits - logits.max()).sum())
    best = np.argsort(-logprobs)[:3]
    first = content[0]["top_logprobs"]
    assert [one["logprob"] for one in first] == pytest.approx(logprobs[best].tolist(), abs=1e-4)
    assert [bytes(one["bytes"]).decode("utf-8", "replace") for one in first] == [
        vlm.tokenizer.decode([int(token)]) for token in best
    ]
    chosen = {one["logprob"] for one in content[0]["top_logprobs"]}
    assert content[0]["logprob"] in chosen or content[0]["logprob"] < min(chosen)


def test_a_stream_scores_each_token_once(server: Process) -> None:
    body = {"messages": [{"role": "user", "content": "東京"}], "max_tokens": 30, "logprobs": True, "stop": "\n It"}
    whole = httpx.post(server.url + CHAT, json=body).json()["choices"][0]["logprobs"]["content"]
    streamed = []
    with httpx.stream("POST", server.url + CHAT, json={**body, "stream": True}) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                chosen = json.loads(line.removeprefix("data: "))["choices"][0]["logprobs"]
                streamed += chosen["content"] if chosen else []
    assert [one["token"] for one in streamed] == [one["token"] for one in whole]
    assert whole[0]["top_logprobs"] == []


def test_a_conversation_goes_on_where_it_was_and_its_picture_is_not_encoded_again(
    server: Process, client: openai.OpenAI, vlm: VLM
) -> None:
    before = numbers(server)
    messages: Any = [user("What colour is it?", painted(7))]
    first = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8)
    messages += [first.choices[0].message, user("It is red")]
    second = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8)
    chat = vlm.chat()
    assert "".join(chat.ask("What colour is it?", [painted(7)], max_new_tokens=8)) == first.choices[0].message.content
    assert "".join(chat.ask("It is red", max_new_tokens=8)) == second.choices[0].message.content
    assert first.usage is not None
    assert second.usage is not None
    details: Any = second.usage.prompt_tokens_details
    assert details.cached_tokens >= first.usage.prompt_tokens
    after = numbers(server)

    def grew(name: str) -> float:
        return after[name] - before[name]

    assert (grew("vlm_image_cache_total{hit}"), grew("vlm_image_cache_total{miss}")) == (1, 1)
    assert grew("vlm_prefix_cache_total{hit}") >= 1
    assert grew("vlm_requests_total{answered}") == 2
    assert grew("vlm_generated_tokens_total") == 16
    assert grew("vlm_prompt_tokens_total") == first.usage.prompt_tokens + second.usage.prompt_tokens
    assert grew("vlm_ttft_seconds_count") == grew("vlm_decode_tokens_per_second_count") == 2
    assert grew("vlm_queue_wait_seconds_count") == 2
    assert after["vlm_queue_length"] == after["vlm_running"] == 0


def test_pictures_stand_where_they_were_between_the_texts(server: Process, vlm: VLM) -> None:
    def picture(seed: int) -> dict[str, Any]:
        return {"type": "image_url", "image_url": {"url": data_url(painted(seed)), "detail": "high"}}

    content = [{"type": "text", "text": "It "}, picture(0), {"type": "text", "text": " is "}, picture(1)]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 9}
    got = httpx.post(server.url + CHAT, json=body).json()["choices"][0]["message"]["content"]
    text = "<|user|>It <image>\n is <image>\n</s>\n<|assistant|>"
    assert got == vlm.answer(text, [painted(0), painted(1)], raw=True, max_new_tokens=9).text


def test_answers_of_32_mixed_clients_are_those_of_one_after_another(server: Process, vlm: VLM) -> None:
    """Same pictures, other pictures and none, streamed and whole, drawn and greedy: nothing gets mixed up."""
    asked = []
    for n in range(32):
        images = [painted(n % 3)] if n % 4 else []
        words = ("hi", "What is it?", "It is red", "café 🙂", "colour")[n % 5]
        draw: dict[str, Any] = {"temperature": 1.5, "seed": n} if n % 3 == 0 else {}
        asked.append((words, images, 6 + n % 7, draw))

    def ask(n: int) -> str:
        words, images, length, draw = asked[n]
        body = {"messages": [user(words, *images)], "max_tokens": length, **draw}
        if n % 2:
            return str(httpx.post(server.url + CHAT, json=body, timeout=120).json()["choices"][0]["message"]["content"])
        with httpx.stream("POST", server.url + CHAT, json={**body, "stream": True}, timeout=120) as response:
            lines = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]
        return "".join(line["choices"][0]["delta"].get("content", "") for line in lines)

    with ThreadPoolExecutor(32) as clients:
        got = list(clients.map(ask, range(32)))
    wanted = [vlm.answer(words, images, max_new_tokens=n, **draw).text for words, images, n, draw in asked]
    assert got == wanted


@pytest.mark.parametrize(
    ("change", "status", "param", "message"),
    [
        ({"nothing": 1}, 400, "nothing", "unknown field 'nothing': leave it out"),
        ({"model": "gpt"}, 404, "model", "there is no model 'gpt': this server has 'tiny'"),
        ({"n": 2}, 400, "n", "n: Input should be less than or equal to 1"),
        ({"temperature": "1"}, 400, "temperature", "temperature: Input should be a valid number"),
        ({"tools": ["x"]}, 400, "tools", "at most 0 items"),
        ({"messages": []}, 400, "messages", "at least 1 item"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0", "'assistant'"),
        ({"messages": [{"role": "user", "content": "x <image>"}]}, 400, "messages", "the prompt has 1 <image>, but 0"),
        ({"messages": [{"role": "user", "content": "hello " * 300}]}, 400, "messages", "the bundle's context is 256"),
        ({"top_logprobs": 3}, 400, None, "top_logprobs needs logprobs = true"),
        ({"stop": ""}, 400, "stop", "at least 1 character"),
        ({"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
    ],
)
def test_a_mistake_is_one_line_in_the_form_of_the_api(
    server: Process, change: dict[str, Any], status: int, param: str | None, message: str
) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, **change}
    for stream in (False, True):
        got = httpx.post(server.url + CHAT, json=body | {"stream": stream})
        error = got.json()["error"]
        assert (got.status_code, error["type"]) == (status, "invalid_request_error")
        assert error["param"] == param
        assert message in error["message"]
        assert "\n" not in error["message"]


def test_the_client_raises_its_own_errors(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "hi"}]
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        client.chat.completions.create(model="gpt-4o", messages=messages)
    with pytest.raises(openai.BadRequestError, match="unknown field 'reasoning_effort'") as wrong:
        client.chat.completions.create(model="tiny", messages=messages, reasoning_effort="low")
    assert wrong.value.code == "unknown_parameter"
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_fields_that_change_nothing_are_taken(server: Process, vlm: VLM) -> None:
    body = {"messages": [{"role": "user", "content": "hi", "name": "me"}], "max_tokens": 4, "model": "tiny"}
    body |= {"n": 1, "user": "me", "tools": [], "tool_choice": "none", "metadata": {"a": "b"}, "store": False}
    body |= {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "response_format": {"type": "text"}}
    body |= {"stop": None, "seed": None, "stream": None, "logprobs": False, "service_tier": "auto"}
    got = httpx.post(server.url + CHAT, json=body)
    assert got.json()["choices"][0]["message"]["content"] == vlm.answer("hi", max_new_tokens=4).text


def test_the_model_says_what_runs_it(server: Process) -> None:
    (model,) = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert model["id"] == "tiny"
    assert model["engines"] == dict.fromkeys(("vision_encoder", "projector", "language_model"), "onnx")
    assert model["precisions"] == dict.fromkeys(model["engines"], "fp32")
    assert model["max_context"] == 256
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok", "api_key": False}
