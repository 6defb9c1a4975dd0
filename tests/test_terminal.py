"""The chat in a real terminal: Ctrl-C stops answers and not the program, history and completion work, both editors."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from running import running_bundle, running_spec
from terminals import CTRL_C, CTRL_D, TAB, UP, WITHOUT_PROMPT_TOOLKIT, chat
from vlm_runtime.vlm import load

EDITORS = pytest.mark.parametrize("before", ["", WITHOUT_PROMPT_TOOLKIT], ids=["prompt_toolkit", "readline"])
# The first picture and the first long prompt take until they are interrupted; the decoder's every step takes a while.
SLOW = """
import time
from vlm_runtime.engines import onnx
run, prefill, decode = onnx.OnnxEncoder.run, onnx.OnnxDecoder.prefill, onnx.OnnxDecoder.decode
slow = {slow!r}
def wait(what, seconds):
    if what in slow:
        slow.clear()
        sys.stderr.write(what.upper() + "\\n")
        sys.stderr.flush()
        time.sleep(seconds)
def slow_run(self, x):
    wait("vision", 600)
    return run(self, x)
def slow_prefill(self, rows):
    out = prefill(self, rows)  # interrupted when the rows are in the cache and nobody knows yet
    wait("prefill", 600)
    return out
def slow_decode(self, row):
    if "decode" in slow and self.position > 40:
        wait("decode", 600)
    return decode(self, row)
onnx.OnnxEncoder.run, onnx.OnnxDecoder.prefill, onnx.OnnxDecoder.decode = slow_run, slow_prefill, slow_decode
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return running_bundle(tmp_path_factory.mktemp("running") / "bundle", running_spec(eos_token_ids=()))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (20, 30), "red").save(tmp_path / "a picture.png")
    return tmp_path / "a picture.png"


@pytest.mark.parametrize("at", ["vision", "prefill", "decode"])
def test_ctrl_c_stops_an_answer_at_any_stage_and_the_next_one_is_right(bundle: Path, picture: Path, at: str) -> None:
    with chat(bundle, "-i", picture, "--max-new-tokens", 40, before=SLOW.format(slow={at})) as screen:
        screen.wait(">")
        screen.enter("hi")
        screen.wait(at.upper())
        screen.type(CTRL_C)
        screen.wait("(stopped)")
        screen.enter("/reset")
        screen.enter(f"/image {picture}")
        screen.enter("hi")
        screen.wait("[1 picture]")
        screen.enter("/stats")
        screen.wait("ended by length")
        screen.enter("/save " + str(picture.with_name("said.json")))
        screen.wait("saved 1 question")
        screen.wait(">")
        screen.type(CTRL_D)
        assert screen.ended() == 0
    (said,) = json.loads(picture.with_name("said.json").read_text())["exchanges"]
    want = load(bundle, threads=1).answer("hi", [picture], max_new_tokens=40).text
    assert (said["answer"], said["pictures"], said["whole"]) == (want, [str(picture)], True)


def test_pictures_of_a_question_that_was_stopped_before_a_word_wait_for_the_next(bundle: Path, picture: Path) -> None:
    with chat(bundle, "-i", picture, "--max-new-tokens", 4, before=SLOW.format(slow={"prefill"})) as screen:
        screen.wait("[1 picture] >")
        screen.enter("hi")
        screen.wait("PREFILL")
        screen.type(CTRL_C)
        screen.wait("(stopped)")
        screen.wait("[1 picture] >")
        screen.enter("/retry")
        screen.enter("/save " + str(picture.with_name("said.json")))
        screen.wait("saved 1 question")
    (said,) = json.loads(picture.with_name("said.json").read_text())["exchanges"]
    assert said["pictures"] == [str(picture)]


@EDITORS
def test_ctrl_c_clears_a_line_and_ctrl_d_ends(bundle: Path, before: str, tmp_path: Path) -> None:
    with chat(bundle, "--max-new-tokens", 3, before=before) as screen:
        screen.wait(">")
        screen.type("not this")
        screen.wait("this")
        screen.interrupt("Ctrl-D or /quit ends")
        screen.enter("hi")
        screen.enter(f"/save {tmp_path}/said.json")
        screen.wait("saved 1 question")
        screen.wait(">")
        screen.type(CTRL_D)
        assert screen.ended() == 0
    (said,) = json.loads((tmp_path / "said.json").read_text())["exchanges"]
    assert said["question"] == "hi"


@EDITORS
def test_what_was_typed_comes_back_in_the_next_session_and_nobody_else_can_read_it(
    bundle: Path, before: str, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    with chat(bundle, "--max-new-tokens", 3, before=before, state=state) as screen:
        screen.wait(">")
        screen.enter("what is\\")
        screen.enter("red")
        screen.enter("/quit")
        assert screen.ended() == 0
    file = state / "vlm-run" / "history"
    assert [json.loads(line) for line in file.read_text().splitlines()] == ["what is\nred", "/quit"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    with chat(bundle, "--max-new-tokens", 3, before=before, state=state) as screen:
        screen.wait(">")
        screen.type(UP + UP)
        screen.enter("")
        screen.enter(f"/save {tmp_path}/said.json")
        screen.wait("saved 1 question")
    (said,) = json.loads((tmp_path / "said.json").read_text())["exchanges"]
    assert said["question"] == "what is\nred"


def test_a_private_chat_leaves_no_history(bundle: Path, tmp_path: Path) -> None:
    with chat(bundle, "--private", "--max-new-tokens", 3, state=tmp_path / "state") as screen:
        screen.wait(">")
        screen.enter("hi")
        screen.enter("/quit")
        assert screen.ended() == 0
    assert not (tmp_path / "state").exists()


@EDITORS
def test_tab_completes_commands_and_paths(bundle: Path, before: str, picture: Path) -> None:
    with chat(bundle, "--max-new-tokens", 3, before=before) as screen:
        screen.wait(">")
        screen.type("/im" + TAB)
        screen.wait("age")
        screen.type(f"{picture.parent}/a" + TAB)
        screen.wait("picture.png")
        screen.enter("")
        screen.wait("20 × 30 pixels")


@EDITORS
def test_pasted_lines_are_one_question(bundle: Path, before: str, tmp_path: Path) -> None:
    with chat(bundle, "--max-new-tokens", 3, before=before) as screen:
        screen.wait(">")
        screen.type("\x1b[200~what\nis it\x1b[201~")
        screen.enter("")
        screen.enter(f"/save {tmp_path}/said.json")
        screen.wait("saved 1 question")
    (said,) = json.loads((tmp_path / "said.json").read_text())["exchanges"]
    assert said["question"] == "what\nis it"


@EDITORS
def test_answers_may_go_into_a_file_while_one_types(bundle: Path, before: str, tmp_path: Path) -> None:
    with chat(bundle, "--max-new-tokens", 5, before=before, stdout=tmp_path / "answers") as screen:
        screen.wait(">")
        screen.enter("hi")
        screen.enter("/quit")
        assert screen.ended() == 0
    assert (tmp_path / "answers").read_text() == load(bundle, threads=1).answer("hi", max_new_tokens=5).text + "\n"


def test_an_answer_cannot_write_control_codes_to_the_terminal(bundle: Path) -> None:
    evil = "from vlm_runtime.text import TextStream\nTextStream.push = lambda *_: '\\x1b]0;owned\\x07'"
    with chat(bundle, "--max-new-tokens", 2, before=evil) as screen:
        screen.wait(">")
        screen.enter("hi")
        screen.wait("\ufffd]0;owned\ufffd")


def test_ctrl_c_ends_a_chat_from_a_pipe(bundle: Path) -> None:
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\nimport sys\n"
    code += SLOW.format(slow={"decode"}) + "from vlm_runtime.cli import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(bundle), "--max-new-tokens", "60"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write("hi\nhi\n")
        process.stdin.flush()
        assert process.stderr.readline() == "DECODE\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(90) == 130
