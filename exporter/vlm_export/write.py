"""Nothing that looks like a bundle until it is one: files go into a hidden sibling, manifest last, then one rename."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vlm_export.target import Progress
from vlm_models.errors import BundleError, InputError
from vlm_runtime.manifest import NAME, FileEntry, Manifest, read_manifest, write_manifest

_BLOCK = 4 << 20
_THREADS = 2


def check_output(output: Path, checkpoint: Path) -> None:
    """Refuse an output that would land in the checkpoint, or whose place cannot take a folder."""
    place, source = output.absolute().resolve(), checkpoint.resolve()
    if place == source or source in place.parents:
        raise InputError(f"{output} is in the checkpoint {checkpoint}: choose an -o outside of it")
    if not place.name:
        raise InputError(f"{output} cannot be an output: give the name of a new folder")
    above = next(p for p in place.parents if p.exists())
    if not above.is_dir():
        raise InputError(f"{above} is not a folder: choose another -o")
    if not os.access(above, os.W_OK | os.X_OK):
        raise InputError(f"{above} cannot be written to: choose another -o")


def existing_bundle(output: Path, fingerprint: str, targets: Sequence[str], max_context: int | None) -> Manifest | None:
    """The manifest of the bundle at `output` that targets can be added to; None when nothing is there.

    Raises InputError for anything else that exists: not a bundle, of another checkpoint, with the target already in it.
    """
    recover(output)
    if not os.path.lexists(output):
        return None
    try:
        manifest = read_manifest(output)
    except BundleError:
        raise InputError(f"{output} exists and is not a bundle; choose another -o or remove it") from None
    if manifest.spec.fingerprint != fingerprint:
        raise InputError(f"{output} exists and is a bundle of another checkpoint; choose another -o or remove it")
    if there := [t for t in targets if t in manifest.recipes]:
        raise InputError(f"{output} exists and holds target {there[0]!r} already; choose another -o or remove it")
    if max_context not in (None, manifest.max_context):
        raise InputError(
            f"{output} has a context of {manifest.max_context}, not {max_context}; "
            f"leave --max-context out or choose another -o"
        )
    return manifest


@contextlib.contextmanager
def draft(output: Path) -> Iterator[Path]:
    """A hidden folder beside `output` to write into; gone at the end, whatever happens, unless `publish` renamed it."""
    made = _make_parents(output)
    folder = _hidden(output, "partial")
    try:
        folder.mkdir()
        yield folder
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"the disk of {output} is full: free some space or choose another -o") from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()  # empty again: the export failed


def reuse(old: Path, files: Iterable[str], folder: Path) -> None:
    """Put files of the bundle `old` into `folder`: links where the file system has them, else copies.

    The links last until `publish` removes the old folder: onnx refuses external data with two names.
    """
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(old / name, folder / name)
        except OSError:
            shutil.copyfile(old / name, folder / name)


def publish(folder: Path, output: Path, manifest: Manifest) -> None:
    """Write the manifest and rename `folder` to `output`. An older bundle there steps aside first, and goes last:

    killed between the two renames, it is found and put back by `recover`.
    """
    write_manifest(folder, manifest)
    _sync(folder)
    place, old = output.resolve(), _hidden(output, "old")
    replaces = place.exists()
    try:
        if replaces:
            place.rename(old)
        folder.rename(place)
    except BaseException as error:  # Ctrl-C too: the older bundle comes back
        recover(output)
        if isinstance(error, OSError):
            raise InputError(f"{output} cannot be written: {error.strerror or error}; choose another -o") from None
        raise
    _sync(place.parent)
    if replaces:
        shutil.rmtree(old, ignore_errors=True)


def recover(output: Path) -> None:
    """Clear what dead exports of `output` left beside it, and put back a bundle that one of them had set aside."""
    for path, kind in _leftovers(output):
        if kind == "old" and not output.exists():
            path.rename(output.resolve())
        else:
            shutil.rmtree(path, ignore_errors=True)


def hash_files(folder: Path, names: Iterable[str], progress: Progress) -> dict[str, FileEntry]:
    """SHA-256 and size of each file, two at a time, the largest first."""
    sizes = {name: (folder / name).stat().st_size for name in names}
    order = sorted(sizes, key=lambda name: (-sizes[name], name))
    total, done = sum(sizes.values()), 0
    progress("hash", 0, total)

    def digest(name: str) -> str:
        nonlocal done
        sha, block = hashlib.sha256(), bytearray(_BLOCK)
        with (folder / name).open("rb", buffering=0) as file:
            while count := file.readinto(block):
                sha.update(memoryview(block)[:count])
                done += count
                progress("hash", min(done, total), total)
        return sha.hexdigest()

    with ThreadPoolExecutor(_THREADS) as pool:
        digests = dict(zip(order, pool.map(digest, order), strict=True))
    progress("hash", total, total)
    return {name: FileEntry(digests[name], sizes[name]) for name in sorted(sizes)}


def files_in(folder: Path) -> set[str]:
    """Relative paths, with `/`, of all files of a folder but its manifest."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name for name in names if name != NAME}


def _hidden(output: Path, kind: str) -> Path:
    place = output.resolve()
    return place.with_name(f".{place.name}.{kind}-{os.getpid()}")


def _leftovers(output: Path) -> Iterator[tuple[Path, str]]:
    place = output.resolve()
    pattern = re.compile(rf"\.{re.escape(place.name)}\.(old|partial)-(\d+)")
    if not place.parent.is_dir():
        return
    found = [(path, match) for path in place.parent.iterdir() if (match := pattern.fullmatch(path.name))]
    for path, match in sorted(found, key=lambda pair: pair[0]):  # "old" sorts before "partial"
        if not _alive(int(match[2])):
            yield path, match[1]


def _alive(pid: int) -> bool:
    """Whether another process of that number runs; our own number on a leftover was a dead process's."""
    if pid == os.getpid():
        return False
    if os.name == "nt":
        return True  # os.kill would end it there
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _make_parents(output: Path) -> list[Path]:
    """Create missing parents; returns those created, innermost first."""
    missing = [p for p in output.absolute().parents if not p.exists()]
    try:
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{output} cannot be made: {error.strerror or error}; choose another -o") from None
    return missing


def _sync(folder: Path) -> None:
    if os.name == "nt":
        return  # folders cannot be opened there
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
