"""The chat of `vlm-run`: questions, pictures and commands in a terminal or from a pipe, answers as they are made."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

import typer

from vlm_models.errors import InputError, VLMError
from vlm_runtime.answer import Answer, Settings, split_settings
from vlm_runtime.image import open_image
from vlm_runtime.line_editor import History, history_file, line_reader
from vlm_runtime.transcript import Exchange, Transcript, save
from vlm_runtime.typed_paths import complete_path, dropped_files, given_path, given_paths

if TYPE_CHECKING:
    from PIL import Image

    from vlm_runtime.vlm import VLM

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_CONTROLS = {c: 0xFFFD for c in (*range(32), *range(127, 160)) if chr(c) not in "\n\t"}


def run_chat(vlm: VLM, system: str | None, images: Sequence[Path], settings: Settings, *, private: bool) -> None:
    """Answer questions until the input ends; mistakes are told and the chat goes on.

    In a terminal Ctrl-C stops the answer that is being made, or clears the line; in a pipe it ends the program.
    `private` keeps what is typed out of the history file. Raises ImageError for `images` that cannot be read.
    """
    terminal = Terminal(vlm, system, settings)
    terminal.image_files(images)
    typing = sys.stdin.isatty()
    read = line_reader(terminal.complete, History(history_file() if typing and not private else None))
    if typing:
        engines = ", ".join(dict.fromkeys(vlm.engines.values()))
        _tell(f"{vlm.spec.name} · {engines} · {vlm.max_context} tokens of context · /help lists the commands")
    with _ctrl_c(_ignore) if typing else contextlib.nullcontext():
        while True:
            waiting = f"[{count} picture{'s' * (count > 1)}] " if (count := len(terminal.waiting)) else ""
            try:
                with _ctrl_c(_raise) if typing else contextlib.nullcontext():
                    line = read(f"{waiting}> ")
            except KeyboardInterrupt:
                if not typing:
                    raise
                _tell("(Ctrl-D or /quit ends)")
                continue
            except EOFError:
                return
            except UnicodeDecodeError:
                _tell("error: that line is not UTF-8: it was left out")
                continue
            try:
                if not terminal.enter(line.strip()):
                    return
            except VLMError as error:
                _tell(f"error: {error}")


class Terminal:
    """What a chat has: its conversation, the pictures `waiting` for the next question, settings and a record."""

    def __init__(self, vlm: VLM, system: str | None, settings: Settings) -> None:
        self.waiting: list[tuple[str, Image.Image]] = []
        self._vlm, self._system, self._settings = vlm, system, settings
        self._chat = vlm.chat(system)
        self._record: list[Exchange] = []
        self._asked: tuple[str, tuple[str, ...]] = ("", ())
        self._recorded = False  # whether the last question has its place in the record
        self._commands: dict[str, tuple[Callable[[str], None], str, str]] = {
            "image": (self._image, "PATH …", "adds pictures to your next question (patterns like *.png too)"),
            "retry": (self._retry, "", "asks the last question again"),
            "reset": (self._reset, "", "starts anew, without the pictures"),
            "system": (self._set_system, "TEXT", "starts anew with this system message; off: with none"),
            "set": (self._set, "NAME VALUE", "changes how answers are made: temperature, max_new_tokens, …"),
            "stats": (self._stats, "", "times, tokens/s and context of the last answer"),
            "save": (self._save, "FILE", "writes the conversation: Markdown, or JSON into FILE.json"),
            "help": (self._help, "", "lists the commands"),
        }

    def enter(self, line: str) -> bool:
        """Do what one entered line says; False when the chat is over. Raises VLMError for a mistake in it."""
        word, _, rest = line.partition(" ")
        if line == "/quit":
            return False
        if word[1:] in self._commands and word.startswith("/"):
            self._commands[word[1:]][0](rest.strip())
        elif (dropped := dropped_files(line)) is not None:
            self.image_files(dropped)
        elif line.startswith("/") and not set(" \n/") & set(line[1:]):
            raise InputError(f"unknown command {line}: choose one of {', '.join(self._names())}")
        elif line:
            pieces = self._chat.ask(line, [image for _, image in self.waiting], **self._settings)
            self._asked, self._recorded = (line, tuple(path for path, _ in self.waiting)), False
            self._answer(pieces)
        return True

    def image_files(self, paths: Sequence[Path]) -> None:
        """Add pictures to the next question, all of them or none. Raises ImageError."""
        self.waiting += [(str(path), open_image(path)) for path in paths]

    def complete(self, text: str) -> list[str]:
        """What the beginning of a line may go on to."""
        word, space, rest = text.partition(" ")
        if not space:
            return [f"{name} " for name in self._names() if name.startswith(word)] if word else []
        if word == "/image":
            return [f"{word} {path}" for path in complete_path(rest, SUFFIXES)]
        if word == "/save":
            return [f"{word} {path}" for path in complete_path(rest)]
        if word == "/set" and " " not in rest:
            return [f"{word} {name} " for name in Settings.__annotations__ if name.startswith(rest)]
        return []

    def _names(self) -> list[str]:
        return [f"/{name}" for name in (*self._commands, "quit")]

    def _answer(self, pieces: Iterator[str]) -> None:
        """Stream one answer; Ctrl-C stops it and keeps what was said. Pictures wait on where nothing was."""
        said, terminal, stopped = list[str](), sys.stdout.isatty(), False
        try:
            with _ctrl_c(_raise) if sys.stdin.isatty() else contextlib.nullcontext(), contextlib.closing(pieces):  # type: ignore[type-var]
                for piece in pieces:
                    said.append(piece)
                    typer.echo(piece.translate(_CONTROLS) if terminal else piece, nl=False)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            stopped = True
        finally:
            if said or self._chat.last is not None:
                typer.echo()
        if stopped:
            _tell("(stopped)")
        if said or self._chat.last is not None:
            if self._recorded:
                self._record.pop()
            else:
                del self.waiting[: len(self._asked[1])]
            self._record.append(Exchange(*self._asked, "".join(said), whole=not stopped))
            self._recorded = True

    def _image(self, given: str) -> None:
        if given:
            self.image_files(given_paths(given))
        elif not self.waiting:
            raise InputError("/image needs the path of a picture")
        for number, (path, image) in enumerate(self.waiting, 1):
            if sys.stdin.isatty():
                _tell(f"  {number}. {path}, {image.width} × {image.height} pixels")

    def _retry(self, _: str) -> None:
        if self._recorded and self._settings.get("temperature", 0.0) == 0.0:
            _tell("(temperature is 0, so the answer is the same: /set temperature 0.7)")
        self._answer(self._chat.retry(**self._settings))

    def _reset(self, _: str) -> None:
        self._chat.reset()
        self.waiting.clear()
        self._record.clear()

    def _set_system(self, text: str) -> None:
        if not text:
            _tell(f"system message: {self._system}" if self._system else "there is no system message")
            return
        self._system = None if text == "off" else text
        self._chat = self._vlm.chat(self._system)
        self._record.clear()

    def _set(self, text: str) -> None:
        name, _, value = (piece.strip() for piece in text.partition(" "))
        if not name:
            _tell(", ".join(f"{key} {value!r}" for key, value in self._settings.items()))
            return
        if name not in Settings.__annotations__:
            raise InputError(f"/set knows no {name!r}: choose one of {', '.join(Settings.__annotations__)}")
        changed = cast(Settings, {**self._settings, name: _setting(name, value)})
        split_settings(changed)
        self._settings = changed

    def _stats(self, _: str) -> None:
        if self._chat.last is None:
            raise InputError("there is no whole answer yet: ask something, and let it end")
        for line in statistics(self._chat.last, self._vlm.max_context):
            _tell(line)

    def _save(self, name: str) -> None:
        if not name:
            raise InputError("/save needs the name of a file: /save chat.md, or /save chat.json")
        path = given_path(name)
        save(path, Transcript(self._vlm.spec.name, dict(self._vlm.engines), self._system, tuple(self._record)))
        _tell(f"saved {len(self._record)} question{'s' * (len(self._record) != 1)} in {path}")

    def _help(self, _: str) -> None:
        for name, (_do, arguments, meaning) in self._commands.items():
            _tell(f"  {f'/{name} {arguments}':19}{meaning}")
        _tell(f"  {'/quit, Ctrl-D':19}ends")
        _tell("Ctrl-C stops an answer. A line that ends with \\ goes on in the next, as does Alt-Enter.")


def statistics(answer: Answer, max_context: int) -> list[str]:
    """What an answer took, in lines to read: its stages, tokens/s, and how full the context of so many tokens is."""
    times = answer.timings_ms
    stages = [f"{name} {times[name]:.0f} ms" for name in ("preprocess", "vision", "projector", "prefill")]
    count, decode = len(answer.token_ids), times["decode"]
    rate = f": {(count - 1) / decode * 1e3:.1f} tokens/s" if count > 1 and decode > 0 else ""
    used = answer.prompt_tokens + count
    return [
        f"{' · '.join(stages)} · first token after {times['ttft']:.0f} ms",
        f"{count} token{'s' * (count != 1)}, {decode:.0f} ms after the first{rate}; ended by {answer.finish_reason}",
        f"context: {used} of {max_context} tokens, {answer.image_tokens} of them pictures; "
        f"{answer.cached_tokens} were in the KV cache already",
    ]


def _setting(name: str, value: str) -> Any:
    """The value that `/set` gives a setting. Raises InputError for one that is no number where it must be."""
    if name == "stop":
        return (value.encode("latin-1", "backslashreplace").decode("unicode_escape"),) if value else ()
    if name == "seed" and value == "none":
        return None
    whole = name in ("max_new_tokens", "top_k", "seed")
    try:
        return int(value) if whole else float(value)
    except ValueError:
        raise InputError(f"/set {name} takes a {'whole ' if whole else ''}number, not {value!r}") from None


def _tell(line: str) -> None:
    """What is no answer goes to stderr."""
    typer.echo(line.translate(_CONTROLS) if sys.stderr.isatty() else line, err=True)


@contextlib.contextmanager
def _ctrl_c(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _raise(_signal: int, _frame: FrameType | None) -> None:
    """Once: a second Ctrl-C would meet what tidies up after the first."""
    signal.signal(signal.SIGINT, _ignore)
    raise KeyboardInterrupt


def _ignore(_signal: int, _frame: FrameType | None) -> None:
    """Between an answer and the next line there is nothing to stop."""
