"""Lines from whoever asks, by prompt_toolkit where it is installed, by readline, or from a pipe; and their history."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prompt_toolkit.document import Document
    from prompt_toolkit.key_binding import KeyPressEvent

Complete = Callable[[str], list[str]]
"""From what stands before the cursor to what may stand there instead."""
Read = Callable[[str], str]
"""From the prompt to the text entered. Raises EOFError at the end, KeyboardInterrupt for Ctrl-C."""

KEPT = 1000  # entries of the history


def history_file() -> Path:
    """Where the history is kept: `vlm-run/history` in the user's folder for state (XDG base directories)."""
    state = os.environ.get("XDG_STATE_HOME", "")
    return (Path(state) if state.startswith("/") else Path.home() / ".local" / "state") / "vlm-run" / "history"


class History:
    """What was typed, the oldest first: in a file that only its owner can read, or for this session (file None).

    A line of the file is one entry as a JSON string. A file that cannot be read or written costs the history alone.
    """

    def __init__(self, file: Path | None) -> None:
        self.entries: list[str] = []
        self._file = file
        if file is not None:
            with contextlib.suppress(OSError):
                entries = list(_entries(file))
                self.entries = entries[-KEPT:]
                if len(entries) > 2 * KEPT:
                    file.unlink()
                    self._write(file, self.entries)

    def add(self, text: str) -> None:
        """Append an entry, unless it is empty or the last one again."""
        if not text.strip() or text in self.entries[-1:]:
            return
        self.entries = [*self.entries, text][-KEPT:]
        if self._file is None:
            return
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._write(self._file, [text])

    def _write(self, path: Path, entries: Iterable[str]) -> None:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "w") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in entries)


def line_reader(complete: Complete, history: History) -> Read:
    """How lines are read here: edited where stdin is a terminal. A backslash at the end goes on in the next line."""
    if not sys.stdin.isatty():
        return lambda prompt: input()
    if importlib.util.find_spec("prompt_toolkit") is not None:
        return _with_prompt_toolkit(complete, history)
    return _with_readline(complete, history)


def _entries(file: Path) -> Iterable[str]:
    for line in file.read_text("utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, str):
                yield entry


def _with_prompt_toolkit(complete: Complete, history: History) -> Read:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import Completer, Completion
    from prompt_toolkit.history import InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.output import create_output

    class Completing(Completer):
        def get_completions(self, document: Document, complete_event: object) -> Iterable[Completion]:
            before = document.text_before_cursor
            for text in complete(before):
                yield Completion(text, start_position=-len(before), display=_last_word(text))

    keys = KeyBindings()

    @keys.add("enter")
    def enter(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\") and buffer.document.is_cursor_at_the_end:
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    session: PromptSession[str] = PromptSession(
        multiline=True,  # what is pasted stays one question; Enter is bound above
        prompt_continuation=lambda width, number, wrapped: " " * width,
        completer=Completing(),
        complete_while_typing=False,
        key_bindings=keys,
        history=InMemoryHistory(history.entries),
        output=create_output(always_prefer_tty=True),  # the answers may go into a file
    )

    def read(prompt: str) -> str:
        text = session.prompt(prompt)
        history.add(text)
        return text

    return read


def _with_readline(complete: Complete, history: History) -> Read:
    with contextlib.suppress(ImportError):  # Windows
        import readline

        matches: list[str] = []

        def completer(text: str, state: int) -> str | None:
            if state == 0:
                matches[:] = complete(text)
            return matches[state] if state < len(matches) else None

        readline.set_completer_delims("")
        readline.set_completer(completer)
        if "libedit" in (readline.__doc__ or ""):  # macOS
            readline.parse_and_bind("bind ^I rl_complete")
        else:
            readline.parse_and_bind("tab: complete")
            readline.parse_and_bind("set enable-bracketed-paste on")  # pasted lines are one question
        readline.set_auto_history(False)
        for entry in history.entries:
            readline.add_history(entry)
        return _continued(input, history, readline.add_history)
    return _continued(input, history, lambda text: None)


def _continued(line: Read, history: History, remember: Callable[[str], None]) -> Read:
    def read(prompt: str) -> str:
        if not sys.stdout.isatty():  # then input() would write the prompt among the answers
            sys.stderr.write(prompt)
            sys.stderr.flush()
            prompt = ""
        text = line(prompt)
        while text.endswith("\\"):
            text = text[:-1] + "\n" + line(" " * len(prompt))
        if text.strip() and text not in history.entries[-1:]:
            remember(text)
        history.add(text)
        return text

    return read


def _last_word(text: str) -> str:
    """What a completion is shown as: the command, or the name of the file."""
    return re.split(r"/(?=[^/]+/?$)|(?<!\\)\s", text)[-1] or text
