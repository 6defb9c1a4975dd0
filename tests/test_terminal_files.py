"""Paths as people type them: spaces, quotes, patterns; what Tab makes of a beginning; the history's file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlm_models.errors import InputError
from vlm_runtime.line_editor import KEPT, History, history_file
from vlm_runtime.transcript import Exchange, Transcript, save
from vlm_runtime.typed_paths import complete_path, dropped_files, given_paths

NAMES = ("a.png", "b c.png", "it's.jpg", "[x].png", "notes.txt", ".hidden.png")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "pictures").mkdir()
    for name in NAMES:
        (tmp_path / "pictures" / name).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / "pictures"


@pytest.mark.parametrize(
    ("typed", "names"),
    [
        ("pictures/b c.png", ["b c.png"]),
        ('"pictures/b c.png"', ["b c.png"]),
        (r"pictures/b\ c.png pictures/a.png", ["b c.png", "a.png"]),
        ("'pictures/b c.png' \"pictures/it's.jpg\"", ["b c.png", "it's.jpg"]),
        ("pictures/*.png", ["[x].png", "a.png", "b c.png"]),
        ("pictures/[x].png", ["[x].png"]),
        ("~/pictures/a.png", ["a.png"]),
        ("pictures/none here.png", ["none here.png"]),
    ],
)
def test_paths_are_read_as_people_write_them(folder: Path, typed: str, names: list[str]) -> None:
    assert [path.absolute() for path in given_paths(typed)] == [folder / name for name in names]


@pytest.mark.parametrize(("typed", "message"), [("'a b", "a quote does not end"), ("*.bmp", "no picture fits")])
def test_a_path_that_cannot_be_is_told_in_one_line(folder: Path, typed: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        given_paths(typed)


def test_only_a_line_of_nothing_but_files_is_a_drop(folder: Path) -> None:
    one, other = folder / "a.png", folder / "b c.png"
    assert dropped_files(f"'{other}' {one} ") == [other, one]
    for line in (f"{one} what is it?", "pictures/a.png", "/none.png", "'", "~nobody/x", str(folder), "hello"):
        assert dropped_files(line) is None


def test_tab_completes_the_last_word_so_that_it_reads_as_that_path(folder: Path) -> None:
    pictures = (".png", ".jpg")
    assert complete_path("pic", pictures) == ["pictures/"]
    every = complete_path("x.png pictures/", pictures)
    assert every == [rf"x.png pictures/{name}" for name in (r"\[x].png", "a.png", r"b\ c.png", r"it\'s.jpg")]
    for typed in complete_path("pictures/") + complete_path('"pictures/b'):
        (path,) = given_paths(typed)
        assert path.is_file(), typed
    assert complete_path("~/pictures/a") == ["~/pictures/a.png"]
    assert complete_path(r"pictures/b\ ") == [r"pictures/b\ c.png"]
    assert complete_path("none/") == complete_path("~nobody/") == []


def test_the_history_keeps_the_newest_and_survives_what_is_not_one(tmp_path: Path) -> None:
    file = tmp_path / "state" / "history"
    history = History(file)
    for text in ("one", "one", " ", "two\nlines", "\udc80"):
        history.add(text)
    assert History(file).entries == ["one", "two\nlines", "\udc80"]
    with file.open("ab") as stream:
        stream.write(b'not json\n{"a": 1}\n\xff\n"last"\n')
    assert History(file).entries[-2:] == ["\udc80", "last"]
    file.write_text("".join(f"{json.dumps(str(n))}\n" for n in range(3 * KEPT)))
    assert History(file).entries == [str(n) for n in range(2 * KEPT, 3 * KEPT)]
    assert len(file.read_text().splitlines()) == KEPT
    blocked = History(tmp_path / "state" / "history" / "below a file")
    blocked.add("kept for this session")
    assert blocked.entries == ["kept for this session"]


def test_the_history_follows_the_folder_for_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "there"))
    assert history_file() == tmp_path / "there" / "vlm-run" / "history"
    for unset in ("", "relative"):
        monkeypatch.setenv("XDG_STATE_HOME", unset)
        assert history_file() == tmp_path / ".local" / "state" / "vlm-run" / "history"


def test_a_conversation_is_written_whole_and_never_over_a_file(tmp_path: Path) -> None:
    said = (Exchange("What\nis it?", ("a b.png",), "Red.", True), Exchange("Sure?", (), "Ye", False))
    transcript = Transcript("tiny", {"vision_encoder": "onnx"}, "be short", said)
    save(tmp_path / "chat.json", transcript)
    plain = json.loads((tmp_path / "chat.json").read_text())
    assert plain["exchanges"][1] == {"question": "Sure?", "pictures": [], "answer": "Ye", "whole": False}
    assert (plain["model"], plain["system"]) == ("tiny", "be short")
    save(tmp_path / "chat.md", transcript)
    text = (tmp_path / "chat.md").read_text()
    for part in ("# tiny", "be short", "![](<a b.png>)", "> What\n> is it?", "\nRed.\n", "Ye (stopped)"):
        assert part in text
    with pytest.raises(InputError, match="exists: give another name"):
        save(tmp_path / "chat.md", transcript)
    with pytest.raises(InputError, match="cannot write"):
        save(tmp_path / "none" / "chat.md", transcript)
