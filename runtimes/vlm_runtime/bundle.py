"""A bundle: the folder that vlm-export writes, opened only when every file in it is the one that was written."""

from __future__ import annotations

import hashlib
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from vlm_models.errors import BundleError
from vlm_models.spec import VLMSpec
from vlm_runtime.manifest import FileEntry, Manifest, Part, read_manifest, safe_path

_BLOCK = 4 << 20


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder (absolute) and its manifest."""

    folder: Path
    manifest: Manifest

    @property
    def spec(self) -> VLMSpec:
        """The facts of the model."""
        return self.manifest.spec

    def path(self, name: str) -> Path:
        """The file `name` of the manifest. Raises BundleError for a name that would leave the folder."""
        if not safe_path(name):
            raise BundleError(f"{self.folder}: {name!r} is not a path inside the bundle")
        return self.folder / name

    def engines(self, part: str) -> list[str]:
        """Names of the engines that can run `part`, sorted. Raises BundleError for a part that no bundle has."""
        if part not in self.manifest.parts:
            raise BundleError(f"{self.folder} has no part {part!r}; it has {', '.join(self.manifest.parts)}")
        return sorted(self.manifest.parts[part])

    def part(self, part: str, engine: str) -> Part:
        """The files with which `engine` runs `part`. Raises BundleError naming the engines that there are."""
        engines = self.engines(part)
        if engine not in engines:
            raise BundleError(
                f"{self.folder} has no {part} for engine {engine!r}; it has {', '.join(engines)}: "
                f"choose one of them, or add it with vlm-export --target {engine}"
            )
        return self.manifest.parts[part][engine]


def open_bundle(folder: str | Path, *, verify: bool = True) -> Bundle:
    """Open a bundle and check that each listed file is there, inside the folder, with its size and SHA-256.

    `verify=False` leaves out the SHA-256, which reads every byte. Raises BundleError naming the file.
    """
    manifest = read_manifest(folder)
    bundle = Bundle(Path(folder).resolve(), manifest)
    for name, entry in manifest.files.items():
        _check_size(bundle, name, entry)
    if verify:
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            names = list(manifest.files)
            for name, sha256 in zip(names, pool.map(lambda n: _sha256(bundle.path(n)), names), strict=True):
                if sha256 != manifest.files[name].sha256:
                    raise BundleError(
                        f"{bundle.path(name)} does not match its sha256: the bundle is damaged; export again"
                    )
    return bundle


def _check_size(bundle: Bundle, name: str, entry: FileEntry) -> None:
    path = bundle.path(name)
    try:
        real = path.resolve(strict=True)
        status = real.stat()
    except (OSError, RuntimeError):  # RuntimeError: a loop of symbolic links
        raise BundleError(f"{path} is missing: the bundle is incomplete; copy it whole or export again") from None
    if not real.is_relative_to(bundle.folder):
        raise BundleError(f"{path} is a link out of the bundle: copy the bundle with its files, not with links")
    if not stat.S_ISREG(status.st_mode):
        raise BundleError(f"{path} is not a file: the bundle is damaged; export again")
    if status.st_size != entry.bytes:
        raise BundleError(
            f"{path} has {status.st_size} bytes instead of {entry.bytes}: the bundle is damaged; export again"
        )


def _sha256(path: Path) -> str:
    digest, block = hashlib.sha256(), memoryview(bytearray(_BLOCK))
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(block):
                digest.update(block[:count])
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror or error}") from None
    return digest.hexdigest()
