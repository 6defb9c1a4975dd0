"""The line before the model: who waits, who is sent away, who left, and how all of it ends."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from answering import painted
from running import running_bundle, running_spec
from serving import CHAT, Gated, in_thread, load_gated, serving, user, wait_for
from vlm_models.errors import CheckError
from vlm_runtime.server import cli
from vlm_runtime.server.limits import Limits
from vlm_runtime.server.options import ServerOptions
from vlm_runtime.vlm import VLM, load


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = running_spec(eos_token_ids=())
    return running_bundle(tmp_path_factory.mktemp("served") / "bundle", spec, max_context=512)


@pytest.fixture
def gated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[VLM, Gated]:
    return load_gated(folder, monkeypatch)


@pytest.fixture
def clients() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as made:
        yield made


def ask(url: str, text: str = "hi", length: int = 8, **more: Any) -> httpx.Response:
    body = {"messages": [user(text)], "max_tokens": length, **more}
    return httpx.post(url + CHAT, json=body, timeout=120)


def gauge(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return float(next(line.split()[-1] for line in lines if line.startswith(name)))


def said(response: httpx.Response) -> str:
    return str(response.json()["choices"][0]["message"]["content"])


def test_a_full_line_is_429_and_says_when_to_come_back(gated: tuple[VLM, Gated], clients: ThreadPoolExecutor) -> None:
    vlm, decoder = gated
    with in_thread(vlm, ServerOptions(queue=2)) as (url, _):
        waiting: list[Future[httpx.Response]] = []
        for n in range(3):
            waiting.append(clients.submit(ask, url, f"hi {n}"))
            wait_for(lambda n=n: gauge(url, "vlm_running") + gauge(url, "vlm_queue_length") == n + 1)
        wait_for(lambda: decoder.prefills == 1)
        full = ask(url)
        assert full.status_code == 429
        assert full.json()["error"]["type"] == "rate_limit_error"
        assert full.json()["error"]["code"] == "queue_full"
        assert 1 <= int(full.headers["retry-after"]) <= 60
        assert gauge(url, 'vlm_requests_total{outcome="queue_full"}') == 1
        decoder.let()
        assert [answer.result().status_code for answer in waiting] == [200] * 3
        assert ask(url).status_code == 200
    alone = load(vlm.bundle.folder, threads=1)
    assert [said(answer.result()) for answer in waiting] == [
        alone.answer(f"hi {n}", max_new_tokens=8).text for n in range(3)
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_the_answer_of_a_client_that_leaves_ends_at_the_next_token(gated: tuple[VLM, Gated], stream: bool) -> None:
    vlm, decoder = gated
    with in_thread(vlm) as (url, _):
        host, _, port = url.removeprefix("http://").partition(":")
        body = json.dumps({"messages": [user("hi")], "max_tokens": 300, "stream": stream}).encode()
        with socket.create_connection((host, int(port))) as connection:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            decoder.let(5)
            wait_for(lambda: decoder.steps == 5)
            if stream:
                assert b"200 OK" in connection.recv(1000)
        wait_for(lambda: gauge(url, 'vlm_requests_total{outcome="left"}') == 1)
        decoder.let()
        wait_for(lambda: gauge(url, "vlm_running") == 0)
        assert decoder.steps == 6  # the one that was under way
        assert said(ask(url)) == load(vlm.bundle.folder, threads=1).answer("hi", max_new_tokens=8).text


def test_a_client_that_leaves_the_line_costs_nothing(gated: tuple[VLM, Gated], clients: ThreadPoolExecutor) -> None:
    vlm, decoder = gated
    with in_thread(vlm, ServerOptions(queue=1)) as (url, _):
        first = clients.submit(ask, url)
        wait_for(lambda: decoder.prefills == 1)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url + CHAT, json={"messages": [user("what")]}, timeout=0.3)
        wait_for(lambda: gauge(url, "vlm_queue_length") == 0)  # and its place is free again
        second = clients.submit(ask, url, "again")
        wait_for(lambda: gauge(url, "vlm_queue_length") == 1)
        decoder.let()
        assert (first.result().status_code, second.result().status_code) == (200, 200)
        assert decoder.prefills == 2


def test_an_answer_ends_when_its_time_is_over(folder: Path) -> None:
    vlm = load(folder, threads=1)
    options = ServerOptions(limits=Limits(seconds=1e-9))
    with in_thread(vlm, options) as (url, _):
        got = ask(url, length=50).json()
        assert got["usage"]["completion_tokens"] == 1
        assert got["choices"][0]["finish_reason"] == "length"


def test_the_end_lets_the_running_answer_finish_and_sends_away_who_waits(
    gated: tuple[VLM, Gated], clients: ThreadPoolExecutor
) -> None:
    vlm, decoder = gated
    with in_thread(vlm) as (url, server):
        running = clients.submit(ask, url)
        wait_for(lambda: decoder.prefills == 1)
        waiting = clients.submit(ask, url, "what")
        wait_for(lambda: gauge(url, "vlm_queue_length") == 1)
        server.should_exit = True
        assert waiting.result().status_code == 503
        assert waiting.result().json()["error"]["code"] == "shutting_down"
        with pytest.raises(httpx.ConnectError):
            ask(url)
        decoder.let()
        assert said(running.result()) == load(vlm.bundle.folder, threads=1).answer("hi", max_new_tokens=8).text
    assert decoder.prefills == 1


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_process_after_the_answer(folder: Path, how: signal.Signals) -> None:
    with serving(folder, "--threads", 1) as server:
        body = {"messages": [user("hi", painted(0))], "max_tokens": 400, "stream": True}
        with httpx.stream("POST", server.url + CHAT, json=body, timeout=120) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(how)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert server.process.wait(60) == (0 if how == signal.SIGTERM else 130)
        assert server.errors.read_text() == ""


def test_an_answer_that_outlasts_the_grace_is_broken_off(folder: Path) -> None:
    with serving(folder, "--threads", 1, "--grace", 0) as server:
        stopped = threading.Event()

        def many() -> None:
            with contextlib.suppress(httpx.HTTPError):
                while not stopped.is_set():
                    ask(server.url, length=450)

        thread = threading.Thread(target=many)
        thread.start()
        wait_for(lambda: gauge(server.url, "vlm_running") == 1)
        server.process.terminate()
        assert server.process.wait(60) == 0
        stopped.set()
        thread.join()


def test_a_model_that_fails_is_500_and_the_next_answer_comes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = load(folder, threads=1)
    with in_thread(vlm) as (url, _):
        for error, told in ((CheckError("not a number"), "not a number"), (ValueError("a bug"), "its log says which")):

            def fail(*arguments: object, error: Exception = error) -> None:
                raise error

            with monkeypatch.context() as patch:
                patch.setattr(vlm, "speak", fail)
                for stream in (False, True):
                    got = ask(url, stream=stream)
                    assert (got.status_code, got.json()["error"]["type"]) == (500, "server_error")
                    assert told in got.json()["error"]["message"]
                    assert "a bug" not in got.text
        assert ask(url).status_code == 200


def test_a_model_that_fails_in_the_middle_ends_the_stream_with_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = load(folder, threads=1)
    speak = vlm.speak

    def break_off(request: Any) -> Any:
        pieces = speak(request)
        yield next(pieces)
        raise CheckError("not a number")

    monkeypatch.setattr(vlm, "speak", break_off)
    with in_thread(vlm) as (url, _):
        got = ask(url, stream=True)
        lines = [line for line in got.text.splitlines() if line]
        assert got.status_code == 200
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["message"] == "not a number"


def test_a_wrong_start_is_one_line_and_an_exit_code(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        wrong = [
            ([tmp_path / "none"], "no such folder"),
            ([folder, "--port", port], f"cannot listen on 127.0.0.1 port {port}"),
            ([folder, "--host", "nowhere.invalid"], "cannot listen on nowhere.invalid"),
            ([folder, "--api-key", "a b"], "the API key must be"),
            ([folder, "--image-host", "a/b"], "--image-host 'a/b' is no host"),
            ([folder, "--allow-origin", "x"], "--allow-origin 'x' is no origin"),
            ([folder, "--model-name", ""], "--model-name is empty"),
        ]
        for arguments, message in wrong:
            monkeypatch.setattr(sys, "argv", ["vlm-serve", "--port", "0", *map(str, arguments)])
            with pytest.raises(SystemExit) as end:
                cli.main()
            out, err = capsys.readouterr()
            assert (end.value.code, out, err.count("\n")) == (2, "", 1), err
            assert err.startswith("error: ")
            assert message in err


def test_help_needs_no_server_package() -> None:
    probe = "import sys; sys.argv = ['vlm-serve', '--help']\nfrom vlm_runtime.server.cli import main\ntry: main()\n"
    probe += "finally: print(*{'fastapi', 'uvicorn', 'numpy', 'torch'} & set(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "\n")
    for option in ("--port", "--api-key", "--queue", "--conversations", "--image-host", "--engine", "--grace"):
        assert option in done.stdout


def test_a_missing_package_is_named_with_its_extra(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_NEEDED", ("fastapi", "no_such_package"))
    monkeypatch.setattr(sys, "argv", ["vlm-serve", str(folder)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 3
    assert capsys.readouterr().err == "error: vlm-serve needs no_such_package: pip install 'vlm-export[serve]'\n"
