"""What is measured on a device: files of this machine by the names they have there, and the rest of the command."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vlm_bench.pictures import find_pictures
from vlm_bench.questions import DEMO, LISTS, read_questions
from vlm_runtime.bundle import open_bundle
from vlm_runtime.manifest import NAME


@dataclass(frozen=True)
class Job:
    """A command of vlm-bench, its options by their names there; `typed` is the line itself, for the results."""

    bundles: tuple[Path, ...]
    images: tuple[Path, ...] = ()
    prompts: Path | None = None
    questions: str | None = None
    engines: tuple[str, ...] = ()
    runs: int = 5
    max_new_tokens: int = 64
    threads: int | None = None
    idle_s: float = 8.0
    typed: str = ""

    def command(self) -> list[str]:
        """The arguments of vlm-bench on the device, where `inputs` lie in its working directory."""
        words = [_bundle(number, path) for number, path in enumerate(self.bundles)]
        for name in self.images_there():
            words += ["--image", name]
        words += ["--prompts", f"prompts/{self.prompts.name}"] if self.prompts else []
        if self.questions is not None:
            path = Path(self.questions).expanduser()
            there = "questions" if path.is_dir() else f"questions/{path.name}"
            words += ["--questions", there if _is_file(self.questions) else self.questions]
        words += [word for engine in self.engines for word in ("--engine", engine)]
        words += ["--runs", str(self.runs), "--max-new-tokens", str(self.max_new_tokens), "--idle", str(self.idle_s)]
        return words + (["--threads", str(self.threads)] if self.threads is not None else [])

    def images_there(self) -> dict[str, Path]:
        """The pictures and folders of them: path on the device → path here."""
        return {f"images/{number}/{path.resolve().name}": path for number, path in enumerate(self.images)}


def inputs(job: Job) -> dict[str, Path]:
    """Every file that the job reads: its path on the device → the file here. Raises InputError, BundleError."""
    files: dict[str, Path] = {}
    for number, folder in enumerate(job.bundles):
        bundle = open_bundle(folder, verify=False)
        for name in (NAME, *bundle.manifest.files):
            files[f"{_bundle(number, folder)}/{name}"] = bundle.folder / name
    for there, path in job.images_there().items():
        for file in find_pictures([path]):
            files[f"{there}/{file.name}" if path.is_dir() else there] = file
    if job.prompts is not None:
        files[f"prompts/{job.prompts.name}"] = job.prompts
    if job.questions is not None and _is_file(job.questions):
        files.update(_asked(job.questions))
    return files


def _bundle(number: int, folder: Path) -> str:
    return f"bundles/{number}/{folder.resolve().name}"


def _asked(source: str) -> Iterator[tuple[str, Path]]:
    """A set of questions of one's own: its file, or the folder's list, and each picture that it names."""
    path = Path(source).expanduser()
    folder = path if path.is_dir() else path.parent
    pictures = [question.image for question in read_questions(path).questions if isinstance(question.image, Path)]
    lists = [folder / name for name in LISTS if (folder / name).is_file()][:1] if path.is_dir() else [path]
    yield from ((f"questions/{file.relative_to(folder).as_posix()}", file) for file in (*lists, *pictures))


def _is_file(questions: str | None) -> bool:
    return questions is not None and questions.partition(":")[0] != DEMO
