"""What a client may send to the server and what becomes of it: the right status, one line why, nothing in the log."""

from __future__ import annotations

import http.client
import io
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from answering import painted
from running import running_bundle, running_spec
from serving import CHAT, Process, data_url, serving, user
from test_serve_images import data_url as said
from test_serve_images import encoded, png, webp
from vlm_runtime.vlm import load

MESSAGES = [{"role": "user", "content": "hi"}]
KEY = "sk-a-secret-Key_0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return running_bundle(tmp_path_factory.mktemp("served") / "bundle", running_spec(eos_token_ids=()))


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Process]:
    with serving(folder, "--threads", 1, "--max-tokens", 8, "--max-body-mb", 1, "--max-images", 3) as process:
        yield process
        assert process.errors.read_text() == ""


@pytest.fixture(scope="module")
def locked(folder: Path) -> Iterator[Process]:
    """One that wants a key, and lets pages of one other site ask."""
    with serving(folder, "--threads", 1, "--allow-origin", "https://chat.example.com", key=KEY) as process:
        yield process
        assert process.errors.read_text() == ""


def why(response: httpx.Response, status: int) -> str:
    """The message of an error in OpenAI's form, which is one line."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    message = error["message"]
    assert isinstance(message, str)
    assert "\n" not in message
    assert "Traceback" not in message
    assert 0 < len(message) < 600
    assert all(value is None or isinstance(value, str) for value in error.values())
    return message


def post(server: Process, content: bytes, **headers: str) -> httpx.Response:
    head = {"Content-Type": "application/json", **{name.replace("_", "-"): v for name, v in headers.items()}}
    return httpx.post(server.url + CHAT, content=content, headers=head, timeout=60)


def ask(server: Process, **fields: Any) -> httpx.Response:
    return post(server, json.dumps({"messages": MESSAGES, **fields}).encode())


def still_answers(server: Process) -> None:
    assert ask(server, max_tokens=2).json()["usage"]["completion_tokens"] == 2


HI = json.dumps(MESSAGES).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"42",
        b'"hi"',
        b"hi",
        b"{}",
        b"\0" * 9,
        b"\xff\xfe\xfa",
        b'{"messages": "hi"}',
        b'{"messages": []}',
        b'{"messages": {}}',
        b'{"messages": [1]}',
        b'{"messages": [[]]}',
        b'{"messages": [{}]}',
        b'{"messages": [{"role": "user"}]}',
        b'{"messages": [{"role": "user", "content": null}]}',
        b'{"messages": [{"role": "user", "content": []}]}',
        b'{"messages": [{"role": "user", "content": [{"type": "text"}]}]}',
        b'{"messages": [{"role": "user", "content": [{"type": "video", "video": "x"}]}]}',
        b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "a.png"}]}]}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "\xed\xa0\x80"}]}',
        b'{"messages": [{"role": "us\\ner", "content": "hi"}]}',
        b'{"messages": [{"role": "' + b"r" * 9999 + b'", "content": "hi"}]}',
        b'{"messages": ' + HI + b', "temperature": NaN}',
        b'{"messages": ' + HI + b', "temperature": Infinity}',
        b'{"messages": ' + HI + b', "temperature": 1e999}',
        b'{"messages": ' + HI + b', "temperature": -0.1}',
        b'{"messages": ' + HI + b', "temperature": "1"}',
        b'{"messages": ' + HI + b', "top_p": 1.1}',
        b'{"messages": ' + HI + b', "seed": ' + b"9" * 5000 + b"}",
        b'{"messages": ' + HI + b', "max_tokens": 0}',
        b'{"messages": ' + HI + b', "max_tokens": true}',
        b'{"messages": ' + HI + b', "max_tokens": 1.5}',
        b'{"messages": ' + HI + b', "stop": ""}',
        b'{"messages": ' + HI + b', "stop": ["a", 1]}',
        b'{"messages": ' + HI + b', "n": 2}',
        b'{"messages": ' + HI + b', "stream": "yes"}',
        b'{"messages": ' + HI + b', "logprobs": 5}',
        b'{"messages": ' + HI + b', "tools": [{"type": "function"}]}',
        b'{"messages": ' + HI + b', "nonsense": 1}',
        b'{"messages": ' + HI + b', "' + b"x" * 9999 + b'": 1}',
        b'{"messages": ' + HI + b', "a\\r\\nb\\u0000": 1}',
        b'{"messages": ' + HI + b', "\\udc00": 1}',
        b'{"messages": ' + HI + b', "__proto__": {}}',
        b'{"messages": ' + HI + b"}}",
        b'{"messages": ' + HI + b"}" * 2 + b"\n" + b"{}",
        "{}".encode("utf-16"),
        b"[" * 200_000,
        b'{"messages":' * 50_000,
        b'{"messages": [' + b"{}," * 40_000 + b"{}]}",
    ],
)
def test_a_body_that_is_no_request_is_a_400(server: Process, content: bytes) -> None:
    assert "the server made a mistake" not in why(post(server, content), 400)


def test_the_server_answers_after_all_that(server: Process) -> None:
    still_answers(server)


def broken(kind: str, keep: float) -> bytes:
    """A picture of which only the beginning is there."""
    file = io.BytesIO()
    painted(1).save(file, kind)
    return file.getvalue()[: int(len(file.getvalue()) * keep)]


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        (said(png(20_000, 20_000)), "more than 50000000 pixels"),
        (said(png(30_000, 1)), "30000 × 1 pixels"),
        (said(webp(16_384, 16_384), "image/webp"), "16384 × 16384 pixels"),
        (said(broken("PNG", 0.5)), "is the file complete?"),
        (said(broken("JPEG", 0.5)), "is the file complete?"),
        (said(broken("WEBP", 0.5)), "no picture"),
        (said(broken("GIF", 0.5)), "is the file complete?"),
        (said(b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>"), "no picture"),
        (said(b"<svg/>", "image/svg+xml"), "is no picture"),
        (said(encoded("TIFF"), "image/tiff"), "is no picture"),
        (said(b"<html>", "image/png"), "no picture"),
        ("data:image/png;base64,!!!!", "is not base64"),
        ("data:,", "must be data:image/png;base64"),
        ("file:///etc/passwd", "allowed are data URLs"),
        ("/etc/passwd", "allowed are data URLs"),
        ("http://127.0.0.1/", "allowed are data URLs"),
        ("http://169.254.169.254/latest/meta-data/", "allowed are data URLs"),
        ("https://user:password@example.com/a.png", "must hold no user name or password"),
        ("", "allowed are data URLs"),
        ("http://" + "a" * 100_000, "at most 2048 are allowed"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_hostile_picture_is_a_400(server: Process, url: str, reason: str, stream: bool) -> None:
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
    message = why(ask(server, messages=[{"role": "user", "content": parts}], stream=stream), 400)
    assert reason in message
    assert "password" not in message.replace("no user name or password", "")


def test_more_than_is_allowed_is_a_400(server: Process) -> None:
    small = Image.new("RGB", (2, 2))
    assert "4 images: at most 3" in why(ask(server, messages=[user("hi", *[small] * 4)]), 400)
    for text in ("a" * 1537, "é" * 769):
        assert "the text has" in why(ask(server, messages=[{"role": "user", "content": text}]), 400)
        parts = [{"type": "text", "text": text[:400]}] * 4
        assert "context is 96 tokens" in why(ask(server, messages=[{"role": "user", "content": parts}]), 400)
    assert "the bundle's context is 96" in why(ask(server, messages=[{"role": "user", "content": "a " * 700}]), 400)
    still_answers(server)


@pytest.mark.parametrize(
    ("headers", "status", "reason"),
    [
        ({"Content_Type": "text/plain"}, 415, "Content-Type: application/json"),
        ({"Content_Type": ""}, 415, "Content-Type: application/json"),
        ({"Content_Type": "application/x-www-form-urlencoded"}, 415, "Content-Type: application/json"),
        ({"Content_Type": "multipart/form-data; boundary=a"}, 415, "Content-Type: application/json"),
        ({"Content_Encoding": "gzip"}, 415, "without Content-Encoding"),
        ({"Host": "evil.example.com"}, 421, "names another machine"),
        ({"Host": "127.0.0.1.evil.example.com"}, 421, "names another machine"),
        ({"Host": "["}, 421, "names another machine"),
        ({"Origin": "https://evil.example.com"}, 403, "pages of this origin may not ask"),
        ({"Origin": "null"}, 403, "pages of this origin may not ask"),
        ({"Origin": "http://127.0.0.1:1"}, 403, "pages of this origin may not ask"),
    ],
)
def test_who_may_not_ask_is_told_so(server: Process, headers: dict[str, str], status: int, reason: str) -> None:
    response = post(server, json.dumps({"messages": MESSAGES}).encode(), **headers)
    assert reason in why(response, status)
    assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:99", "127.0.0.1", "127.1.2.3:80", "[::1]:80"])
def test_names_of_this_machine_are_known(server: Process, host: str) -> None:
    assert httpx.get(f"{server.url}/health", headers={"Host": host}).status_code == 200


def test_the_own_page_may_ask(server: Process) -> None:
    response = post(server, json.dumps({"messages": MESSAGES, "max_tokens": 1}).encode(), Origin=server.url)
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/v1", 404),
        ("POST", "/v1/completions", 404),
        ("GET", "//etc/passwd", 404),
        ("GET", "/page/../../limits.py", 404),
        ("GET", "/page/%2e%2e/%2e%2e/limits.py", 404),
        ("GET", "/page/..%2f..%2flimits.py", 404),
        ("GET", "/%00", 404),
        ("GET", "/%ff%0d%0aX:%20y", 404),
        ("GET", "/" + "a" * 9000, 404),
        ("GET", "/docs", 404),
        ("GET", CHAT, 405),
        ("DELETE", "/v1/models", 405),
        ("PUT", CHAT, 405),
        ("OPTIONS", CHAT, 405),
        ("TRACE", "/health", 405),
        ("NONSENSE", "/health", 405),
    ],
)
def test_an_unknown_path_is_a_404_and_an_unknown_method_a_405(
    server: Process, method: str, path: str, status: int
) -> None:
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
    connection.putrequest(method, path)
    connection.endheaders()
    got = connection.getresponse()
    response = httpx.Response(got.status, headers=got.getheaders(), content=got.read())
    connection.close()
    assert method in why(response, status)
    assert ("allow" in response.headers) == (status == 405)


@pytest.mark.parametrize(
    "given",
    [
        *("", "Bearer", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Bearer {KEY.lower()}", f"Basic {KEY}", KEY),
        *(f"Bearer {KEY} {KEY}", f"Bearer {KEY}é", "Bearer é", f"Bearer\xa0{KEY}"),
    ],
)
def test_a_wrong_key_is_a_401(locked: Process, given: str) -> None:
    head = {b"Authorization": given.encode("latin-1"), b"Content-Type": b"application/json"}
    response = httpx.post(locked.url + CHAT, content=b"not even read", headers=head)
    message = why(response, 401)
    assert message == "missing or wrong API key: send the header Authorization: Bearer KEY"
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["code"] == "invalid_api_key"


def test_a_key_is_needed_for_all_but_the_page_and_health(locked: Process) -> None:
    closed = ["/v1/models", "/metrics", "/openapi.json", "/nothing", "/v1/chat/completions", "//", "/health/", "/Page/"]
    for path in closed:
        why(httpx.get(locked.url + path), 401)
    why(httpx.post(locked.url + "/health"), 401)
    for path in ("/", "/health"):
        assert httpx.get(locked.url + path).status_code == 200
    for path in closed[:3]:
        assert httpx.get(locked.url + path, headers={"Authorization": f"bearer {KEY}"}).status_code == 200


def test_two_keys_are_none(locked: Process) -> None:
    both = [("Authorization", "Bearer wrong"), ("Authorization", f"Bearer {KEY}")]
    why(httpx.get(f"{locked.url}/v1/models", headers=both), 401)


def test_a_listed_page_may_ask_and_read_why_not(locked: Process) -> None:
    asked = {"Origin": "https://chat.example.com"}
    flight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    before = httpx.options(locked.url + CHAT, headers=asked | flight)
    assert (before.status_code, before.headers["access-control-allow-origin"]) == (200, asked["Origin"])
    assert "authorization" in before.headers["access-control-allow-headers"]
    after = post(locked, b"", **asked)
    why(after, 401)
    assert after.headers["access-control-allow-origin"] == asked["Origin"]
    assert "access-control-allow-credentials" not in after.headers
    other = {"Origin": "https://evil.example.com"}
    for refused in (httpx.options(locked.url + CHAT, headers=other | flight), post(locked, b"", **other)):
        why(refused, 403)
        assert not [name for name in refused.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    "options",
    [["--image-host", "http://a.com"], ["--allow-origin", "chat.example.com"], ["--api-key", "two words"]],
)
def test_a_rule_that_is_none_ends_the_command(folder: Path, options: list[str]) -> None:
    code = "from vlm_runtime.server.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, str(folder), "--port", "0", *options], capture_output=True)
    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (2, b"", 1)
    assert done.stderr.startswith(b"error: ")


def test_mistakes_of_one_client_change_no_answer_of_another(server: Process, folder: Path) -> None:
    """A shared beginning, pictures that differ in one pixel, and wrong requests between: each answer is its own."""
    vlm, draw = load(folder, threads=1), random.Random(0)
    first, second = painted(0), painted(0)
    second.putpixel((0, 0), (1, 2, 3))
    for turn in range(24):
        picture, text = draw.choice([first, second]), draw.choice(["What is it?", "What is red?"])
        wanted = vlm.answer(text, [picture], max_new_tokens=8).text
        good = ask(server, messages=[user(text, picture)])
        assert good.json()["choices"][0]["message"]["content"] == wanted, turn
        url = data_url(picture)[: draw.choice([40, 900])]
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": f"secret {turn}"}]
        assert "secret" not in why(ask(server, messages=[{"role": "user", "content": parts}]), 400)
