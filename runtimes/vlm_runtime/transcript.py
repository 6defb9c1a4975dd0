"""A conversation in a file: Markdown to read, or JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from vlm_models.errors import InputError


@dataclass(frozen=True)
class Exchange:
    """A question, the paths of the pictures given with it, and what was answered; not `whole` where it was stopped."""

    question: str
    pictures: tuple[str, ...]
    answer: str
    whole: bool


@dataclass(frozen=True)
class Transcript:
    """What was said with which model on which engines (by part)."""

    model: str
    engines: Mapping[str, str]
    system: str | None
    exchanges: tuple[Exchange, ...]


def save(path: Path, transcript: Transcript) -> None:
    """Write `transcript` to a new file, as JSON where its name ends with .json. Raises InputError where it cannot."""
    write = _as_json if path.suffix.lower() == ".json" else _as_markdown
    try:
        with path.open("x", encoding="utf-8", errors="replace") as file:
            file.write(write(transcript))
    except FileExistsError:
        raise InputError(f"{path} exists: give another name") from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None


def _as_json(transcript: Transcript) -> str:
    return json.dumps(asdict(transcript), indent=1, ensure_ascii=False) + "\n"


def _as_markdown(transcript: Transcript) -> str:
    engines = ", ".join(f"{part} {name}" for part, name in transcript.engines.items())
    out = [f"# {transcript.model}", f"Engines: {engines}"]
    if transcript.system:
        out.append(f"System message: {transcript.system}")
    for one in transcript.exchanges:
        out += ["---", *(f"![](<{path}>)" for path in one.pictures)]
        out.append("\n".join(f"> {line}" for line in one.question.splitlines()))
        out.append(one.answer + ("" if one.whole else " (stopped)"))
    return "\n\n".join(out) + "\n"
