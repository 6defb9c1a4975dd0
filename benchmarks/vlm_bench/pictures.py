"""The pictures of a run: for each repetition files that no cache has seen, the same for all contestants."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from vlm_bench.stages import marked, noise
from vlm_models.errors import InputError
from vlm_runtime.image import open_image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class Pictures:
    """Numbered pictures; of `images`, or one of noise. Raises ImageError for a file that is none."""

    def __init__(self, images: Sequence[Path], folder: Path) -> None:
        self._images, self._folder = tuple(images), folder
        for path in self._images:
            open_image(path)
        self._made: tuple[int | None, list[Path]] = (None, [])

    def __len__(self) -> int:
        return len(self._images) or 1

    def files(self, repetition: int) -> list[Path]:
        """One file for each picture; those of the repetition before are gone."""
        if self._made[0] != repetition:
            for old in self._made[1]:
                old.unlink(missing_ok=True)
            if self._images:
                made = [self._mark(number, path, repetition) for number, path in enumerate(self._images)]
            else:
                made = [self._folder / f"noise-{repetition}.png"]
                noise(repetition).save(made[0])
            self._made = (repetition, made)
        return self._made[1]

    def _mark(self, number: int, path: Path, repetition: int) -> Path:
        """A copy in the picture's own kind of file, as opening it is part of what is measured."""
        with Image.open(path) as opened:
            kind = "JPEG" if opened.format == "JPEG" else "PNG"
        copy = self._folder / f"{number}-{repetition}.{kind.lower()}"
        marked(open_image(path), repetition).save(copy, kind, **({"quality": 95} if kind == "JPEG" else {}))
        return copy


def find_pictures(paths: Sequence[Path]) -> list[Path]:
    """Files as given, and the pictures of folders by name. Raises InputError for what is missing or holds none."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
            if not inside:
                raise InputError(f"{path} has no pictures: a folder with {', '.join(SUFFIXES)}, or a file")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise InputError(f"no such picture or folder: {path}")
    return found
