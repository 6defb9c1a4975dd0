"""Peers as contestants: in which environment each runs, what it needs there, and conversions that are kept."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import pkgutil
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vlm_bench import peers
from vlm_bench.contestant import Contestant
from vlm_bench.results import Skipped, readable
from vlm_models.checkpoint import open_checkpoint
from vlm_models.errors import DependencyError, InputError, VLMError
from vlm_models.family import read_spec
from vlm_models.spec import VLMSpec
from vlm_runtime.prompt import render, user_message

QUESTION = "\ue000question\ue000"
"""Stands in the rendered prompts where the question goes."""

Say = Callable[[str], None]
_RECORD = "conversion.json"
# What makes the same weights another model for a peer: tokenizer, chat template, picture processor.
_BESIDE = ("*.json", "*.jinja", "*.model")


@dataclass(frozen=True)
class Asked:
    """One --peer: NAME, NAME:PRECISION, each with =PYTHON for the interpreter of another environment."""

    name: str
    precision: str | None
    python: str | None

    @property
    def title(self) -> str:
        """Its name in the results."""
        return f"{self.name}:{self.precision}" if self.precision else self.name


@dataclass(frozen=True)
class Converted:
    """What a peer made of the checkpoint: `folder`, in `seconds`, `size` bytes; `notes` it left for people."""

    folder: Path
    seconds: float
    size: int
    notes: tuple[str, ...]

    @property
    def told(self) -> str:
        """One sentence on what the conversion took."""
        return f"converted in {self.seconds:.0f} s to {self.size / 2**20:.0f} MB, kept in {readable(self.folder)}"


@dataclass(frozen=True)
class Job:
    """What a peer is to run: `checkpoint` at `precision` by `python`, with `versions` of its packages there.

    Conversions are kept in `cache`; `say` is told what takes long.
    """

    title: str
    checkpoint: Path
    precision: str
    python: str
    versions: Mapping[str, str]
    threads: int
    cache: Path
    say: Say

    @cached_property
    def spec(self) -> VLMSpec:
        """The checkpoint's facts. Raises CheckpointError."""
        return read_spec(open_checkpoint(self.checkpoint))

    @property
    def prompts(self) -> dict[str, Any]:
        """`picture` and `plain`: the checkpoint's template around QUESTION, with and without a picture.

        `marker` is that of the question, `image_token` that of the picture; a text that starts with `bos` gets no
        further special tokens, any other all that the tokenizer adds.
        """
        spec = self.spec.prompt
        texts = {name: render([user_message(QUESTION, n, spec)], spec) for name, n in (("plain", 0), ("picture", 1))}
        return {**texts, "marker": QUESTION, "image_token": spec.image_token, "bos": spec.bos_token}

    @property
    def max_context(self) -> int:
        """Positions of prompt and answer together, as bundles have them: the model's, up to 4096."""
        return min(self.spec.language.max_positions, 4096)

    def converted(self, convert: Callable[[Path], Sequence[str]]) -> Converted:
        """What `convert(folder)` made of this checkpoint, now or before, and the notes it returned.

        Kept by checkpoint, precision, the versions of the peer's packages and our scripts; nothing half-written is.
        """
        folder = self.cache / f"{self.title.partition(':')[0]}-{self.precision}-{self._key()}"
        if not (folder / _RECORD).is_file():
            self._convert(folder, convert)
        record = json.loads((folder / _RECORD).read_text("utf-8"))
        return Converted(folder, record["seconds"], record["bytes"], tuple(record["notes"]))

    def script(self, file: str | Path, arguments: Mapping[str, Any]) -> None:
        """Run `file` in the peer's environment with `arguments` as JSON. Raises DependencyError with its last line."""
        command = [self.python, "-I", str(file), json.dumps(dict(arguments))]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=_quiet()
        )
        if done.returncode:
            lines = [line.strip() for line in done.stdout.decode("utf-8", "replace").splitlines() if line.strip()]
            last = lines[-1][:300] if lines else f"exit code {done.returncode}"
            raise DependencyError(f"its converter failed: {last}")

    def _key(self) -> str:
        beside = {path for pattern in _BESIDE for path in self.checkpoint.glob(pattern)}
        digest = hashlib.sha256(json.dumps([self.spec.fingerprint, self.precision, dict(self.versions)]).encode())
        scripts = Path(peers.__path__[0]) / self.title.partition(":")[0].replace("-", "_")
        for path in [*sorted(beside), *sorted(scripts.glob("*.py"))]:
            digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()[:16]

    def _convert(self, folder: Path, convert: Callable[[Path], Sequence[str]]) -> None:
        self.say(f"{self.title}: converting the checkpoint")
        made = _new_folder(self.cache)
        try:
            start = time.perf_counter()
            notes = convert(made)
            seconds = time.perf_counter() - start
            size = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
            record = {"seconds": round(seconds, 1), "bytes": size, "notes": list(notes), "packages": {**self.versions}}
            (made / _RECORD).write_text(json.dumps(record, indent=1) + "\n", "utf-8")
            made.chmod(0o755)  # mkdtemp's own is for the owner alone
            shutil.rmtree(folder, ignore_errors=True)
            made.rename(folder)
        except OSError as error:  # no space left, most often
            raise DependencyError(f"cannot write into {readable(self.cache)}: {error.strerror or error}") from None
        finally:
            shutil.rmtree(made, ignore_errors=True)


def peer_contestants(
    wanted: Sequence[str],
    checkpoint: Path | None,
    threads: int,
    cache: Path | None = None,
    say: Say = lambda line: None,
) -> tuple[list[Contestant], list[Skipped]]:
    """The peers asked for, on the checkpoint; those that cannot run are skipped with the reason.

    Raises InputError for a peer that does not exist, or at a precision it does not have, or without a checkpoint, and
    for a checkpoint that is none or a `cache` that cannot be written.
    """
    asked = [read_peer(text) for text in wanted]
    titles = [one.title for one in asked]
    if len(set(titles)) < len(titles):
        raise InputError("a peer is given twice: give each once, or with other precisions")
    if asked and cache is not None:
        _new_folder(cache).rmdir()
    found: list[Contestant] = []
    skipped: list[Skipped] = []
    for one in asked:
        if checkpoint is None:
            raise InputError(f"peer {one.name!r} runs the checkpoint itself: give it with --checkpoint FOLDER")
        read_spec(open_checkpoint(checkpoint))
        module, python = _module(one.name), _interpreter(one)
        precision = one.precision or module.PRECISIONS[0]
        try:
            versions = _versions(python, module.PACKAGES, module.INSTALL)
            job = Job(one.title, checkpoint, precision, python, versions, threads, cache or cache_folder(), say)
            found.append(module.contestant(job))
        except VLMError as error:  # whatever this peer cannot do with it
            skipped.append(Skipped(one.title, readable(str(error))))
    return found, skipped


def read_peer(text: str) -> Asked:
    """`NAME[:PRECISION][=PYTHON]`. Raises InputError naming what there is."""
    what, _, python = text.partition("=")
    name, _, precision = what.partition(":")
    known = peer_names()
    if name not in known:
        raise InputError(f"unknown peer {readable(name)!r}: choose one of {', '.join(known)}")
    allowed = _module(name).PRECISIONS
    if ":" in what and precision not in allowed:
        raise InputError(f"peer {name!r} has no precision {readable(precision)!r}: choose one of {', '.join(allowed)}")
    if "=" in text and not python:
        raise InputError(f"--peer {readable(text)}: give the Python of its environment after =, or leave = out")
    return Asked(name, precision or None, python or None)


def peer_names() -> list[str]:
    """All peers there are, installed or not: the packages in `peers`."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(peers.__path__) if module.ispkg)


def cache_folder() -> Path:
    """Where conversions are kept unless --peer-cache says otherwise: the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vlm-bench"


def _new_folder(cache: Path) -> Path:
    """An empty one in `cache`. Raises InputError where none can be made."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=".converting-", dir=cache))
    except OSError as error:
        raise InputError(
            f"cannot write {readable(cache)}: {error.strerror or error}: give --peer-cache FOLDER"
        ) from None


def _module(name: str) -> Any:
    return importlib.import_module(f"{peers.__name__}.{name.replace('-', '_')}")


def _interpreter(asked: Asked) -> str:
    """Its path as given: a virtual environment is known by it."""
    if asked.python is None:
        return sys.executable
    found = shutil.which(Path(asked.python).expanduser())
    if found is None:
        raise InputError(f"--peer {asked.name}={readable(asked.python)}: no such program; give a Python interpreter")
    return str(Path(found).absolute())


def _versions(python: str, packages: Mapping[str, str], install: str) -> dict[str, str]:
    """Versions of `packages` (import name → distribution) there. Raises DependencyError for what is missing."""
    code = (
        "import importlib.metadata as m, importlib.util as u, json, sys\n"
        "found = {}\n"
        "for name, package in json.loads(sys.argv[1]).items():\n"
        "    try:\n"
        "        if u.find_spec(name):\n"
        "            found[package] = 'unknown'\n"
        "            found[package] = m.version(package)\n"
        "    except ImportError:\n"
        "        pass\n"
        "print(json.dumps(found))\n"
    )
    command = [python, "-I", "-c", code, json.dumps(dict(packages))]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=60)
        found: dict[str, str] = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        raise DependencyError(f"{readable(python)} is no Python that runs: give the one of its environment") from None
    missing = [package for package in packages.values() if package not in found]
    if missing:
        raise DependencyError(f"not installed for {readable(python)}: {', '.join(missing)}; {install}")
    return found


def _quiet() -> dict[str, str]:
    """The environment of a converter, which must not look for anything on a network."""
    return {**os.environ, **OFFLINE}


OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
"""What every peer's process is started with."""
