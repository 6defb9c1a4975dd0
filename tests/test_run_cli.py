"""`vlm-run`: what it prints where, its exit codes, and a chat that goes on after mistakes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from running import IMAGE_TOKENS, running_bundle, running_spec
from vlm_models.errors import VLMError
from vlm_runtime import cli
from vlm_runtime.vlm import load

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return running_bundle(tmp_path_factory.mktemp("running") / "bundle", running_spec(eos_token_ids=()))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process: exit code, stdout, stderr."""

    def call(*arguments: object, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vlm-run", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as end:
            cli.main()
        code = end.value.code
        assert code is None or isinstance(code, int)
        return code or 0, *capsys.readouterr()

    return call


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (20, 30), "red").save(tmp_path / "a picture.png")
    return tmp_path / "a picture.png"


def test_an_answer_is_streamed_and_ends_with_a_newline(bundle: Path, run: Run, picture: Path) -> None:
    code, out, err = run(bundle, "--image", picture, "What is it?", "--max-new-tokens", 9)
    want = load(bundle, threads=1).answer("What is it?", [picture], max_new_tokens=9).text
    assert (code, out, err) == (0, want + "\n", "")


def test_json_is_one_object_with_all_that_a_program_needs(bundle: Path, run: Run, picture: Path) -> None:
    code, out, err = run(bundle, "-i", picture, "-i", picture, "What is it?", "--max-new-tokens", 9, "--json")
    assert (code, err, out.count("\n")) == (0, "", 1)
    answer = json.loads(out)
    assert set(answer) == {
        *("text", "token_ids", "prompt_tokens", "image_tokens", "cached_tokens"),
        *("engines", "timings_ms", "finish_reason"),
    }
    assert len(answer["token_ids"]) == 9
    assert answer["image_tokens"] == 2 * IMAGE_TOKENS
    assert answer["engines"] == {"vision_encoder": "onnx", "projector": "onnx", "language_model": "onnx"}
    assert set(answer["timings_ms"]) == {"load", "preprocess", "vision", "projector", "prefill", "ttft", "decode"}
    assert answer["finish_reason"] == "length"


def test_raw_takes_the_prompt_as_it_is(bundle: Path, run: Run, picture: Path) -> None:
    _, out, _ = run(bundle, "-i", picture, "It is <image>", "--raw", "--json", "--max-new-tokens", 2)
    vlm = load(bundle, threads=1)
    assert json.loads(out)["prompt_tokens"] == len(vlm.tokenizer.encode("It is <image>")) + IMAGE_TOKENS - 1


def test_options_reach_the_answer(bundle: Path, run: Run) -> None:
    text = load(bundle, threads=1).answer("hi", max_new_tokens=9).text
    stop = ["--stop", text[2], "--stop", text[4]]
    assert run(bundle, "hi", "--max-new-tokens", 9, *stop)[1] == text[: min(text.index(text[2]), 4)] + "\n"
    draw = [
        bundle,
        "hi",
        "--max-new-tokens",
        20,
        "--temperature",
        60,
        "--top-k",
        200,
        "--top-p",
        0.99,
        "--min-p",
        0.001,
    ]
    assert run(*draw, "--seed", 1)[1] == run(*draw, "--seed", 1)[1] != run(*draw, "--seed", 2)[1]
    greedy = run(bundle, "hi", "--max-new-tokens", 20)[1]
    assert run(bundle, "hi", "--max-new-tokens", 20, "--repetition-penalty", 9)[1] != greedy
    assert run(bundle, "hi", "--max-new-tokens", 20, "--system", "be kind")[1] != greedy
    assert json.loads(run(bundle, "hi", "--json", "--max-context", 30, "--threads", 1)[1])["finish_reason"] == "context"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{none}", "hi"], 2, "no such folder"),
        (["{bundle}", "hi", "--image", "{none}.png"], 2, "no such image"),
        (["{bundle}", "<image>"], 2, "the prompt has 1 <image>, but 0 images were given"),
        (["{bundle}", "hi", "--engine", "onxx"], 2, "unknown engine 'onxx': choose one of"),
        (["{bundle}", "hi", "--device", "tpu"], 2, "unknown device 'tpu': choose one of cpu, cuda"),
        (["{bundle}", "hi", "--device", "cuda"], 3, "cannot use device 'cuda'"),
        (["{bundle}", "hi", "--temperature", "-1"], 2, "temperature is -1.0: it must be"),
        (["{bundle}", "hi", "--stop", ""], 2, "an empty stop string"),
        (["{bundle}", "hello " * 200], 2, "the bundle's context is 96"),
        (["{bundle}", "--json"], 2, "--json needs a prompt"),
        (["{bundle}", "--raw"], 2, "--raw needs a prompt"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_an_exit_code(
    bundle: Path, run: Run, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    given = [a.format(bundle=bundle, none=tmp_path / "none") for a in arguments]
    got, out, err = run(*given)
    assert (got, out) == (code, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["--nothing"], ["x", "y", "z"], ["x", "y", "--top-k", "many"]])
def test_wrong_usage_exits_with_2(run: Run, arguments: list[str]) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert "Usage: vlm-run" in err


def test_a_flipped_byte_is_refused_unless_the_check_is_left_out(run: Run, tmp_path: Path) -> None:
    folder = running_bundle(tmp_path / "bundle")
    table = bytearray((folder / "embedding.bin").read_bytes())
    table[-1] ^= 1
    (folder / "embedding.bin").write_bytes(table)
    code, _, err = run(folder, "hi")
    assert code == 2
    assert "embedding.bin does not match its sha256" in err
    assert run(folder, "hi", "--no-verify", "--max-new-tokens", 2)[0] == 0


def test_a_bug_keeps_its_traceback(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("vlm_runtime.vlm.load", broken)
    monkeypatch.setattr(sys, "argv", ["vlm-run", str(bundle), "hi"])
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main()


def test_a_chat_answers_each_line_and_goes_on_after_mistakes(
    bundle: Path, run: Run, picture: Path, tmp_path: Path
) -> None:
    lines = [
        "hi",
        f"/image {tmp_path}/none.png",
        f'/image "{picture}"',
        "/nothing",
        "",
        "hello " * 200,
        "It",
        "/quit",
        "x",
    ]
    code, out, err = run(bundle, "--max-new-tokens", 5, stdin="\n".join(lines))
    chat = load(bundle, threads=1).chat()
    want = "".join(chat.ask("hi", max_new_tokens=5)) + "\n"
    want += "".join(chat.ask("It", [picture], max_new_tokens=5)) + "\n"
    assert (code, out) == (0, want)
    assert [line.split(":")[1].strip() for line in err.splitlines()] == [
        "no such image",
        "unknown command /nothing",
        err.splitlines()[2].split(":")[1].strip(),
    ]
    assert "the bundle's context is 96" in err.splitlines()[2]


def test_pictures_of_the_command_line_go_with_the_first_question(bundle: Path, run: Run, picture: Path) -> None:
    _, out, _ = run(bundle, "--image", picture, "--max-new-tokens", 5, stdin="hi\nhi\n/reset\nhi\n")
    chat = load(bundle, threads=1).chat()
    want = ["".join(chat.ask("hi", [picture], max_new_tokens=5)), "".join(chat.ask("hi", max_new_tokens=5))]
    chat.reset()
    assert out == "".join(f"{text}\n" for text in [*want, "".join(chat.ask("hi", max_new_tokens=5))])


def test_commands_of_a_chat_work_from_a_pipe(bundle: Path, run: Run, picture: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.png"
    Image.new("RGB", (9, 9), "blue").save(other)
    lines = [
        *("/retry", "/stats", "/image", "/save", "/set heat 3", "/set seed x", "/set temperature -1", "/set top_k"),
        *(f"'{picture}' {other}", "hi", "/stats", "/retry", "/set max_new_tokens 3", "a"),
        *("/set", "/system be kind", "/system", "hi", "/save chat.json", "/save chat.json", "/system off", "/system"),
        *("/help", "hi", "/reset", "/save empty.md"),
    ]
    saved = [
        f"/save {tmp_path}/{line[6:]}" if line.startswith("/save c") or "/save e" in line else line for line in lines
    ]
    code, out, err = run(bundle, "--max-new-tokens", 5, stdin="\n".join(saved))
    chat, kind = (vlm := load(bundle, threads=1)).chat(), vlm.chat("be kind")
    want = ["".join(chat.ask("hi", [picture, other], max_new_tokens=5))] * 2
    want += ["".join(chat.ask("a", max_new_tokens=3))]
    want += ["".join(kind.ask("hi", max_new_tokens=3)), "".join(vlm.chat().ask("hi", max_new_tokens=3))]
    assert (code, out) == (0, "".join(f"{text}\n" for text in want))
    (said,) = json.loads((tmp_path / "chat.json").read_text())["exchanges"]
    assert said == {"question": "hi", "pictures": [], "answer": want[3], "whole": True}
    for told in (
        *("no question to ask again", "no whole answer yet", "/image needs", "/save needs", "knows no 'heat'"),
        *("takes a whole number, not 'x'", "temperature is -1.0", "takes a whole number, not ''", "of 96 tokens"),
        *(
            "8 of them pictures",
            "temperature is 0",
            "max_new_tokens 3",
            "system message: be kind",
            "saved 1 question in",
        ),
        *("chat.json exists", "in the KV cache already", "there is no system message", "/retry", "saved 0 questions"),
    ):
        assert told in err


def test_every_error_of_the_tree_has_its_exit_code(bundle: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def every(of: type[VLMError]) -> list[type[VLMError]]:
        return [of, *(e for sub in of.__subclasses__() for e in every(sub))]

    for error in every(VLMError):

        def fail(*arguments: object, error: type[VLMError] = error, **options: object) -> None:
            raise error("what happened")

        monkeypatch.setattr("vlm_runtime.vlm.load", fail)
        assert run(bundle, "hi") == (error.exit_code, "", "error: what happened\n")


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-c", "from vlm_runtime.cli import main; main()", *map(str, arguments)]


def test_help_is_quick_and_names_every_option() -> None:
    probe = "import sys, time; sys.argv = ['vlm-run', '--help']\nfrom vlm_runtime.cli import main\ntry: main()\n"
    probe += "finally: print(time.process_time(), 'torch' in sys.modules, 'numpy' in sys.modules, file=sys.stderr)"
    environment = {**os.environ, "COLUMNS": "100", "TERM": "dumb"}
    done = [
        subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, env=environment) for _ in range(3)
    ]
    assert done[0].returncode == 0
    for option in ("--image", "--engine", "--max-new-tokens", "--temperature", "--seed", "--stop", "--raw", "--json"):
        assert option in done[0].stdout
    assert 'vlm-run BUNDLE --image cat.png "What is this?"' in done[0].stdout
    spent = [d.stderr.split() for d in done]
    assert {tuple(s[1:]) for s in spent} == {("False", "False")}
    assert min(float(s[0]) for s in spent) < 0.5


def test_a_reader_that_goes_away_ends_it_quietly(bundle: Path) -> None:
    process = subprocess.Popen(
        command(bundle, "hi", "--max-new-tokens", 60), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate(timeout=60)
    assert err == b""


def test_a_terminal_without_the_characters_does_not_end_the_answer(bundle: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command(bundle, "東", "--max-new-tokens", 40), capture_output=True, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
