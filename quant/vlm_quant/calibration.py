"""Calibration pairs: pictures with a prompt and, where known, an answer, read from a folder or a file.

Four layouts are read: a folder with calibration.jsonl or pairs.jsonl; a folder of pictures, each with a text file of
the same name that holds its prompt; a .jsonl file of {"image", "prompt", "answer"?} ("question" is read as "prompt");
a .json file as LLaVA is trained on ("image", "conversations"). Picture paths are relative to the file's folder.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from vlm_models.errors import ImageError, InputError

LISTS = ("calibration.jsonl", "pairs.jsonl")
PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
_LAYOUTS = (
    'a folder with calibration.jsonl, a folder of pictures with a .txt prompt each, a .jsonl of {"image", "prompt", '
    '"answer"}, or a LLaVA .json'
)
_CHUNK = 1 << 20
_UNREADABLE = 0.1  # share of the pairs that may be left out


@dataclass(frozen=True)
class Pair:
    """One picture, what is asked about it, and the answer where there is one."""

    image: Path
    prompt: str
    answer: str | None = None


@dataclass(frozen=True)
class Calibration:
    """Pairs in the order in which they were listed, or as `sample` chose them.

    `skipped` counts those that `readable` left out.
    """

    pairs: tuple[Pair, ...]
    skipped: int = 0

    @cached_property
    def sha256(self) -> str:
        """Over prompts, answers and the bytes of every picture: equal wherever the folder lies.

        Reads every picture once, so take it of a sample. Raises InputError for a picture that cannot be read.
        """
        known: dict[Path, str] = {}
        digest = hashlib.sha256()
        for pair in self.pairs:
            if pair.image not in known:
                known[pair.image] = _file_hash(pair.image)
            digest.update(json.dumps([known[pair.image], pair.prompt, pair.answer]).encode() + b"\n")
        return digest.hexdigest()


def read_pairs(path: str | Path) -> Calibration:
    """All pairs of a folder or file, each picture known to be there (it is not opened).

    Raises InputError, one line with the place, for a missing picture, a path that leaves the folder, a pair without
    a prompt, no pairs at all, and whatever is none of the layouts.
    """
    source = Path(path).expanduser()
    if source.is_dir():
        lists = [source / name for name in LISTS if (source / name).is_file()]
        pairs = list(_lines(lists[0]) if lists else _captioned(source))
    elif not source.is_file():
        raise InputError(f"no such calibration set: {source}; give {_LAYOUTS}")
    elif source.suffix == ".jsonl":
        pairs = list(_lines(source))
    elif source.suffix == ".json":
        pairs = list(_conversations(source))
    else:
        raise InputError(f"{source} is no calibration set: give {_LAYOUTS}")
    if not pairs:
        raise InputError(f"{source} holds no picture with a prompt: give {_LAYOUTS}")
    return Calibration(tuple(pairs))


def sample(calibration: Calibration, count: int, seed: int = 0) -> Calibration:
    """At most `count` pairs, each kind of prompt (its first two words) in proportion; the same for the same seed.

    Raises InputError for a count below 1.
    """
    if count < 1:
        raise InputError(f"{count} calibration samples cannot be: give 1 or more")
    if count >= len(calibration.pairs):
        return calibration
    kinds: dict[str, list[int]] = {}
    for i, pair in enumerate(calibration.pairs):
        kinds.setdefault(" ".join(pair.prompt.lower().split()[:2]), []).append(i)
    rng = random.Random(seed)
    placed = []  # each kind spread evenly over 0..1 from a start of its own: the first n hold its share
    for members in kinds.values():
        rng.shuffle(members)
        start = rng.random()
        placed += [((i + start) / len(members), member) for i, member in enumerate(members)]
    chosen = sorted(member for _, member in sorted(placed)[:count])
    return replace(calibration, pairs=tuple(calibration.pairs[i] for i in chosen))


def readable(calibration: Calibration, opened: Callable[[Path], object]) -> Calibration:
    """The pairs whose picture `opened` takes; those for which it raises ImageError are counted as skipped.

    Opens every picture once, so give it a sample. Raises InputError, one line, where more than a tenth of the pairs
    is lost, and where all are the same picture with the same prompt.
    """
    broken: dict[Path, str] = {}
    for image in {pair.image: None for pair in calibration.pairs}:
        try:
            opened(image)
        except ImageError as error:
            broken[image] = str(error)
    kept = tuple(pair for pair in calibration.pairs if pair.image not in broken)
    skipped = len(calibration.pairs) - len(kept)
    if skipped > _UNREADABLE * len(calibration.pairs):
        raise InputError(
            f"{skipped} of {len(calibration.pairs)} calibration pairs have a picture that cannot be opened, more than "
            f"{_UNREADABLE:.0%}; the first: {next(iter(broken.values()))}"
        )
    if len(kept) > 1 and _all_the_same(kept):
        raise InputError(
            f"all {len(kept)} calibration pairs are the same picture with the same prompt ({kept[0].prompt[:60]!r}): "
            "give pairs that differ as what the model will see"
        )
    return Calibration(kept, calibration.skipped + skipped)


def split(calibration: Calibration, share: float, seed: int = 0) -> tuple[Calibration, Calibration]:
    """Two sets without a common picture: what is calibrated with, and `share` of the pictures to measure on.

    Raises InputError for pairs of one picture alone.
    """
    pictures = list({pair.image: None for pair in calibration.pairs})
    if len(pictures) < 2:
        raise InputError(
            f"{len(pictures)} picture cannot be split: measuring needs pictures that calibration has not seen, "
            "give pairs of at least 2"
        )
    random.Random(seed).shuffle(pictures)
    held = set(pictures[: min(max(1, round(share * len(pictures))), len(pictures) - 1)])
    ours, theirs = (
        replace(calibration, pairs=tuple(pair for pair in calibration.pairs if (pair.image in held) == told))
        for told in (False, True)
    )
    return ours, theirs


def _all_the_same(pairs: Sequence[Pair]) -> bool:
    """Prompts are compared first, then the bytes of the pictures, as long as they are equal."""
    if any((pair.prompt, pair.answer) != (pairs[0].prompt, pairs[0].answer) for pair in pairs):
        return False
    first, *others = {pair.image: None for pair in pairs}
    return all(_file_hash(other) == _file_hash(first) for other in others)


def _lines(path: Path) -> Iterator[Pair]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            where = f"{path}:{number}"
            row = _object(_json(line, where), where)
            prompt = row.get("prompt", row.get("question"))
            yield _pair(path.parent, row.get("image"), prompt, row.get("answer"), where)


def _captioned(folder: Path) -> Iterator[Pair]:
    for image in sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURES):
        text = image.with_suffix(".txt")
        if not text.is_file():
            raise InputError(f"{image} has no prompt: write it into {text.name} beside it")
        yield _pair(folder, image.name, _text(text).strip(), None, str(text))


def _conversations(path: Path) -> Iterator[Pair]:
    """The first question and answer of every conversation about a picture; those without one are passed over."""
    data = _json(_text(path), str(path))
    if not isinstance(data, list):
        raise InputError(f"{path} holds a {type(data).__name__}: LLaVA's format is a list of conversations")
    for number, entry in enumerate(data):
        where = f"{path}, entry {number}"
        row = _object(entry, where)
        if "image" not in row:
            continue
        turns = row.get("conversations")
        if not isinstance(turns, Sequence) or not all(isinstance(turn, Mapping) for turn in turns):
            raise InputError(f'{where} has no "conversations": a list of {{"from", "value"}}')
        said = {kind: next((t.get("value") for t in turns if t.get("from") == kind), None) for kind in ("human", "gpt")}
        prompt = said["human"].replace("<image>", "").strip() if isinstance(said["human"], str) else None
        yield _pair(path.parent, row["image"], prompt, said["gpt"], where)


def _pair(folder: Path, image: Any, prompt: Any, answer: Any, where: str) -> Pair:
    if not isinstance(image, str) or not image:
        raise InputError(f'{where} has no picture: "image" is the path of one file')
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError(f"{where} has no prompt: write what is asked about {image!r}")
    if answer is not None and not isinstance(answer, str):
        raise InputError(f"{where}: the answer is a {type(answer).__name__}; give a text, or leave it out")
    parts = PurePosixPath(image).parts + PureWindowsPath(image).parts
    if "\0" in image or ".." in parts or PurePosixPath(image).is_absolute() or PureWindowsPath(image).is_absolute():
        raise InputError(f"{where}: {image!r} leaves the folder {folder}: pictures are named relative to it")
    file = folder / image
    if not _is_file(file):
        raise InputError(f"{where}: no such picture: {image!r} in {folder}")
    return Pair(file, prompt, answer or None)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long to be one
        return False


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f'{where} holds a {type(value).__name__}: give an object with "image" and a prompt')
    return value


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} cannot be read as JSON: {str(error).splitlines()[0]}") from None


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as text: {str(error).splitlines()[0]}") from None


def _file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    return digest.hexdigest()
