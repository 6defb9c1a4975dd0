"""The server under schemathesis: what the OpenAPI page says is true of every answer, and no request breaks it.

The requests are the same each time. Left out is `positive_data_acceptance`: no schema can say which conversations
fit the context, or which text is a picture.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from running import running_bundle, running_spec
from serving import CHAT, Process, serving

KEY = "sk-a-secret-Key_0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return running_bundle(tmp_path_factory.mktemp("served") / "bundle", running_spec(eos_token_ids=()))


def fuzzed(server: Process, folder: Path, *options: str) -> None:
    """Fail with what schemathesis says where it finds something, or the server logs more than who spoke no HTTP."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "--no-color"]
    checks = ["--checks", "all", "--exclude-checks", "positive_data_acceptance", "--generation-deterministic"]
    done = subprocess.run([*command, *checks, *options], capture_output=True, text=True, cwd=folder.parent)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    log = [line for line in server.errors.read_text().splitlines() if "Invalid HTTP request received." not in line]
    assert log == []


@pytest.mark.slow
def test_no_request_breaks_what_the_schema_says(folder: Path) -> None:
    with serving(folder, "--threads", 1, "--max-tokens", 4, "--max-body-mb", 1) as server:
        fuzzed(server, folder, "--phases", "coverage,fuzzing", "--max-examples", "50")
        asked = {"messages": [{"role": "user", "content": "hi"}]}
        assert httpx.post(server.url + CHAT, json=asked, timeout=60).json()["usage"]["completion_tokens"] == 4


@pytest.mark.slow
def test_no_request_goes_round_the_key(folder: Path) -> None:
    with serving(folder, "--threads", 1, "--max-tokens", 1, key=KEY) as server:
        schema = httpx.get(f"{server.url}/openapi.json", headers={"Authorization": f"Bearer {KEY}"})
        file = folder.parent / "openapi.json"
        file.write_text(schema.text)
        given = ["--header", f"Authorization: Bearer {KEY}", "--phases", "fuzzing", "--max-examples", "5"]
        command = [sys.executable, "-m", "schemathesis.cli", "run", str(file), "--url", server.url, "--no-color"]
        checks = ["--checks", "ignored_auth,not_a_server_error,status_code_conformance", "--generation-deterministic"]
        done = subprocess.run([*command, *checks, *given], capture_output=True, text=True, cwd=folder.parent)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
