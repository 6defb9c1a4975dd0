"""Clients that send too much, too slowly, half or no HTTP, or do not read: each is let go, and the others answered."""

from __future__ import annotations

import contextlib
import gc
import http.client
import json
import logging
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import uvicorn

from running import running_bundle, running_spec
from serving import CHAT, in_thread, wait_for
from vlm_runtime.server.limits import Limits
from vlm_runtime.server.options import ServerOptions
from vlm_runtime.vlm import VLM, load

BODY = json.dumps({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}).encode()
LIMITS = Limits(body_bytes=1 << 20, bodies_bytes=1 << 20, values=1000)


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> VLM:
    folder = running_bundle(tmp_path_factory.mktemp("served") / "bundle", running_spec(eos_token_ids=()))
    return load(folder, threads=1)


@pytest.fixture(autouse=True)
def _nothing_is_logged(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(logging.root, "handlers", [])  # stderr as it is now, not as it was for an earlier test
    yield
    written = capfd.readouterr().err
    assert [line for line in written.splitlines() if "Invalid HTTP request received." not in line] == []


@contextlib.contextmanager
def limited(vlm: VLM, limits: Limits = LIMITS) -> Iterator[tuple[int, uvicorn.Server]]:
    """The server's port, and the server; it answers at the end as well as at the beginning."""
    with in_thread(vlm, ServerOptions(limits=limits)) as (url, server):
        yield int(url.rpartition(":")[2]), server
        done = httpx.post(url + CHAT, content=BODY, headers={"Content-Type": "application/json"}, timeout=60)
        assert done.json()["usage"]["completion_tokens"] == 2
        numbers = httpx.get(f"{url}/metrics").text
        assert [line for line in numbers.splitlines() if re.match(r"\w*queue\w*(length|_size|ing)? 0(\.0)?$", line)]


@pytest.fixture(scope="module")
def port(vlm: VLM) -> Iterator[int]:
    with limited(vlm) as (port, _):
        yield port


def connected(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=60)


def head(length: int | None = None, *more: str, path: str = CHAT) -> bytes:
    body = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", body, *more]
    return "".join(f"{line}\r\n" for line in lines).encode("latin-1") + b"\r\n"


def rest_of(near: socket.socket) -> bytes:
    """What comes until the server closes."""
    out = b""
    with contextlib.suppress(ConnectionError):
        while piece := near.recv(65536):
            out += piece
    return out


def status(answer: bytes) -> int:
    """The status of the only answer; errors have OpenAI's form."""
    first, _, content = answer.partition(b"\r\n\r\n")
    code = int(first.split()[1])
    if code >= 400:
        assert set(json.loads(content)["error"]) == {"message", "type", "param", "code"}
    return code


def spoken(port: int, *parts: bytes) -> int:
    """Say all that and read until the server closes."""
    with connected(port) as near:
        for part in parts:
            near.sendall(part)
        return status(rest_of(near))


@pytest.mark.parametrize("start", [head(100 << 20), head(None)])
def test_100_mb_are_refused_before_they_are_read(port: int, start: bytes) -> None:
    chunk = b"x" * (1 << 20)
    framed = chunk if b"Length" in start else b"%x\r\n%b\r\n" % (len(chunk), chunk)
    with connected(port) as near:
        near.sendall(start)
        sent = 0
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                near.sendall(framed)
                sent += 1
        assert sent < 50
        assert status(rest_of(near)) == 413


def test_who_asks_first_sends_nothing(port: int) -> None:
    assert spoken(port, head(100 << 20, "Expect: 100-continue")) == 413


def test_curl_and_python_learn_why_a_body_is_too_long(port: int, tmp_path: Path) -> None:
    file = tmp_path / "body"
    file.write_bytes(b"x" * (3 << 19))
    command = ["curl", "-s", "-w", "%{http_code}", "-H", "Content-Type: application/json", "-H", "Expect:"]
    done = subprocess.run(
        [*command, "--data-binary", f"@{file}", f"http://127.0.0.1:{port}{CHAT}"], capture_output=True, text=True
    )
    assert "the body is longer than 1048576 bytes" in done.stdout
    assert done.stdout.endswith("413")
    for version in ("close", "keep-alive"):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", CHAT, file.read_bytes(), {"Content-Type": "application/json", "Connection": version})
        assert connection.getresponse().status == 413
        connection.close()


def test_a_body_of_the_allowed_length_is_read(port: int) -> None:
    full = BODY[:-1] + b" " * ((1 << 20) - len(BODY)) + b"}"
    assert spoken(port, head(len(full), "Connection: close"), full) == 200
    assert spoken(port, head(len(full) + 1, "Connection: close"), full + b" ") == 413


def test_a_body_of_many_tiny_values_is_refused_before_it_is_parsed(port: int) -> None:
    many = b'{"messages": [' + b"[]," * 1001 + b"[]]}"
    assert spoken(port, head(len(many), "Connection: close"), many) == 413


def test_bodies_of_all_clients_together_have_a_limit(port: int) -> None:
    large = BODY[:-1] + b" " * 700_000 + b"}"
    with connected(port) as first:
        first.sendall(head(len(large), "Connection: close") + large[:-1])
        with httpx.Client() as client:
            for _ in range(50):  # the server's loop has turned often enough to have read it
                client.get(f"http://127.0.0.1:{port}/health")
        answers = {spoken(port, head(len(large), "Connection: close"), large) for _ in range(3)}
        first.sendall(large[-1:])
        assert status(rest_of(first)) == 200
    assert 429 in answers
    assert spoken(port, head(len(large), "Connection: close"), large) == 200


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (b"GARBAGE\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(600), 400),
        (b"GET /health HTTP/1.1\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.com\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: a\0b\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX : a\r\n\r\n", 400),
        (b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000, 431),
        (b"GET /" + b"a" * 100_000, 431),
        (head(None).replace(b"chunked", b"gzip"), 501),
        (head(None, "Content-Length: 3") + b"zzz\r\n", 400),
        (head(5, "Content-Length: 6"), 400),
        (head(5).replace(b"5", b"-5"), 400),
        (head(5).replace(b"5", b"9" * 30), 400),
        (head(None) + b"zzz\r\n", 400),
        (head(None) + b"5\r\nhello world", 400),
        (head(None) + b"fffffffffffffffffffffff\r\n", 400),
    ],
)
def test_what_is_no_http_is_refused(port: int, said: bytes, wanted: int) -> None:
    assert spoken(port, said) == wanted


def test_garbage_after_an_answer_ends_the_connection(port: int) -> None:
    with connected(port) as near:
        near.sendall(head(len(BODY)) + BODY + b"GARBAGE\r\n\r\n")
        answer = rest_of(near)
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"HTTP/1.1 400" in answer


def test_garbage_within_an_answered_body_ends_the_connection(port: int) -> None:
    with connected(port) as near:
        near.sendall(head(None).replace(b"application/json", b"text/plain"))
        answer = near.recv(65536)
        assert answer.startswith(b"HTTP/1.1 415")
        near.sendall(b"zzz\r\n")
        assert b"HTTP/1.1" not in rest_of(near)


@pytest.mark.parametrize(
    "said",
    [b"", b"POST", head(len(BODY))[:-2], head(len(BODY)), head(len(BODY)) + BODY[:9], head(len(BODY)) + BODY],
)
@pytest.mark.parametrize("goes", ["half", "whole", "reset"])
def test_who_leaves_at_any_point_leaves_nothing_behind(vlm: VLM, said: bytes, goes: str) -> None:
    with limited(vlm) as (port, server):
        with connected(port) as near:
            near.sendall(said)
            if goes == "half":
                near.shutdown(socket.SHUT_WR)
                rest_of(near)
            if goes == "reset":
                near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        wait_for(lambda: not server.server_state.connections and not server.server_state.tasks)


IMPATIENT = Limits(header_seconds=0.2, body_seconds=0.2, stall_seconds=0.2)


def test_half_a_head_is_waited_for_only_so_long(vlm: VLM) -> None:
    with limited(vlm, IMPATIENT) as (port, _):
        assert spoken(port, b"GET /health HTTP/1.1\r\nHost: ") == 408
        with connected(port) as near:
            assert rest_of(near) == b""
        with connected(port) as near:  # also for the second request of a connection
            near.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert near.recv(65536).startswith(b"HTTP/1.1 200")
            near.sendall(b"GET")
            assert status(rest_of(near)) == 408


def test_half_a_body_is_waited_for_only_so_long(vlm: VLM) -> None:
    with limited(vlm, IMPATIENT) as (port, _):
        assert spoken(port, head(len(BODY)), BODY[:9]) == 408
        assert spoken(port, head(None), b"1\r\n{\r\n") == 408


def test_a_body_that_goes_on_after_its_answer_is_cut(vlm: VLM) -> None:
    with limited(vlm, IMPATIENT) as (port, server):
        with connected(port) as near:
            near.sendall(head(None).replace(b"application/json", b"text/plain"))
            assert near.recv(65536).startswith(b"HTTP/1.1 415")
            with contextlib.suppress(ConnectionError):
                while server.server_state.connections:
                    near.sendall(b"1\r\n{\r\n")
                    time.sleep(0.01)
        assert not server.server_state.connections


def test_who_does_not_read_is_cut(vlm: VLM) -> None:
    with limited(vlm, IMPATIENT) as (port, server), socket.socket() as near:
        near.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        near.connect(("127.0.0.1", port))
        near.settimeout(60)
        wanted = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
        with contextlib.suppress(ConnectionError):
            near.sendall(wanted * 500)
        wait_for(lambda: not server.server_state.connections)
        assert server.server_state.total_requests < 500


def test_connections_have_a_limit(vlm: VLM) -> None:
    with limited(vlm, Limits(connections=3)) as (port, server):
        with contextlib.ExitStack() as stack:
            for _ in range(3):
                stack.enter_context(connected(port))
            wait_for(lambda: len(server.server_state.connections) == 3)
            assert spoken(port) == 503
        wait_for(lambda: not server.server_state.connections)


@pytest.mark.parametrize("content", [b'{"messages": "%b"}', b'{"messages": [{"role": "user", "content": "%b"}]}'])
def test_a_refused_body_is_freed_without_the_collector(vlm: VLM, content: bytes) -> None:
    body = content % (b"x" * (20 << 20))
    with limited(vlm, Limits()) as (port, _):
        process, sizes = psutil.Process(), list[int]()
        gc.disable()
        try:
            for _ in range(12):
                assert spoken(port, head(len(body), "Connection: close"), body) == 400
                sizes.append(process.memory_info().rss >> 20)
        finally:
            gc.enable()
    assert sizes[-1] - sizes[5] < 100, sizes  # six bodies of 20 MB, once the allocator has what it wants
