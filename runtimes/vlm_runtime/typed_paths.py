"""Paths as people type them or drop them into a terminal: quoted, with `\\ ` for a space, with `~` and patterns."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from vlm_models.errors import InputError

_PATTERN = re.compile(r"[*?\[]")


def given_paths(text: str) -> list[Path]:
    """The paths in `text`: one that is a file as it stands, spaces included, or several as in a shell, with patterns.

    Raises InputError for a quote that does not end, and for a pattern that nothing fits.
    """
    if (whole := given_path(text)).exists():
        return [whole]
    found: list[Path] = []
    for word in _words(text):
        path = Path(word).expanduser()
        if _PATTERN.search(word) and not path.exists():
            fitting = _fitting(path)
            if not fitting:
                raise InputError(f"no picture fits {word}")
            found += fitting
        else:
            found.append(path)
    return found if any(path.exists() for path in found) else [whole]


def given_path(text: str) -> Path:
    """`text` as one path, with or without quotes, spaces allowed."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    try:
        return Path(text).expanduser()
    except RuntimeError:  # ~somebody who is not there
        return Path(text)


def dropped_files(line: str) -> list[Path] | None:
    """The files that a line consists of, as a terminal writes what is dropped on it; None for any other line."""
    if line[:1] not in ("/", "~", "'", '"'):
        return None
    with contextlib.suppress(InputError, OSError, ValueError, RuntimeError):
        paths = [Path(word).expanduser() for word in _words(line)]
        if paths and all(path.is_absolute() and path.is_file() for path in paths):
            return paths
    return None


def complete_path(text: str, suffixes: Sequence[str] = ()) -> list[str]:
    """`text` with its last word, a path as in a shell, completed: folders, and files with one of the suffixes."""
    begun = re.search(r"(?:\\.|[^\s\\'\"])*$|(?:'[^']*|\"[^\"]*)$", text)
    before, word = (text[: begun.start()], begun.group()) if begun else (text, "")
    quote = word[:1] if word[:1] in ("'", '"') else ""
    plain = word[1:] if quote else re.sub(r"\\(.)", r"\1", word)
    folder, _, name = plain.rpartition("/")
    shown = plain[: len(plain) - len(name)]
    found = []
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        for entry in sorted(os.scandir(Path(folder or ("/" if shown else ".")).expanduser()), key=lambda e: e.name):
            if not entry.name.startswith(name) or (entry.name.startswith(".") and not name.startswith(".")):
                continue
            if entry.is_dir():
                found.append(shown + entry.name + "/")
            elif not suffixes or entry.name.lower().endswith(tuple(suffixes)):
                found.append(shown + entry.name)
    if quote:
        return [before + quote + path + ("" if path.endswith("/") else quote) for path in found]
    return [before + re.sub(r"([\s\\'\"*?\[])", r"\\\1", path) for path in found]


def _fitting(pattern: Path) -> list[Path]:
    with contextlib.suppress(ValueError, OSError):
        found = Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor)))
        return sorted(path for path in found if pattern.name.startswith(".") or not path.name.startswith("."))
    return []


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text, posix=os.name != "nt")
    except ValueError:
        raise InputError(f"a quote does not end in {text}") from None
