"""Nothing looks like a bundle until it is one, and an older bundle is never lost."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bundles import SPEC, tiny_bundle
from vlm_export import write
from vlm_export.target import silent
from vlm_models.errors import InputError
from vlm_runtime.bundle import open_bundle
from vlm_runtime.manifest import Manifest, read_manifest


def hidden(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def new_version(output: Path) -> tuple[Path, Manifest]:
    """A draft folder's content: all of the old bundle and one more file."""
    old = read_manifest(output)
    folder = output.parent / f".{output.name}.partial-{os.getpid()}"
    folder.mkdir()
    write.reuse(output, old.files, folder)
    (folder / "more.bin").write_bytes(b"more")
    entries = write.hash_files(folder, ["more.bin"], silent)
    return folder, dataclasses.replace(old, files={**old.files, **entries})


def test_hashes_are_those_of_the_bundle_reader(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "b")
    seen: list[tuple[int, int]] = []
    entries = write.hash_files(bundle, write.files_in(bundle), lambda _, done, of: seen.append((done, of)))
    assert entries == dict(read_manifest(bundle).files)
    total = sum(e.bytes for e in entries.values())
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)


def test_an_exception_removes_the_draft_and_the_parents_it_made(tmp_path: Path) -> None:
    def failing() -> None:
        with write.draft(tmp_path / "a" / "b" / "out") as folder:
            (folder / "onnx").mkdir()
            (folder / "onnx" / "weights").write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        failing()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    def failing() -> None:
        with write.draft(tmp_path / "out"):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(InputError, match=r"disk of .* is full"):
        failing()
    assert list(tmp_path.iterdir()) == []


def test_publish_is_all_or_nothing(tmp_path: Path) -> None:
    source = tiny_bundle(tmp_path / "source")
    manifest, output = read_manifest(source), tmp_path / "made" / "out"
    with write.draft(output) as folder:
        write.reuse(source, manifest.files, folder)
        assert not output.exists()
        assert not (folder / "manifest.json").exists()
        write.publish(folder, output, manifest)
    assert open_bundle(output).manifest == manifest
    assert hidden(output.parent) == []


def test_a_new_version_replaces_the_old_one_whole(tmp_path: Path) -> None:
    output = tiny_bundle(tmp_path / "out")
    folder, manifest = new_version(output)
    write.publish(folder, output, manifest)
    assert open_bundle(output).manifest == manifest
    assert hidden(tmp_path) == []
    # Two names for external data would make onnx refuse it.
    assert all(p.stat().st_nlink == 1 for p in output.rglob("*") if p.is_file())


def test_the_old_version_comes_back_when_the_new_one_cannot_be_put(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tiny_bundle(tmp_path / "out")
    before = read_manifest(output)
    folder, manifest = new_version(output)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self == folder:
            raise OSError(errno.EIO, "I/O error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(InputError, match="cannot be written: I/O error"):
        write.publish(folder, output, manifest)
    monkeypatch.undo()
    assert open_bundle(output).manifest == before


def test_a_bundle_behind_a_link_is_replaced_where_it_is(tmp_path: Path) -> None:
    real = tiny_bundle(tmp_path / "real")
    (tmp_path / "link").symlink_to(real)
    folder, manifest = new_version(tmp_path / "link")
    write.publish(folder, tmp_path / "link", manifest)
    assert (tmp_path / "link").is_symlink()
    assert open_bundle(real).manifest == manifest
    assert [n for n in hidden(tmp_path) if "old" in n] == []


def test_killed_between_the_two_renames_the_old_version_is_put_back(tmp_path: Path) -> None:
    output, pid = tiny_bundle(tmp_path / "out"), dead_pid()
    before = read_manifest(output)
    folder, _ = new_version(output)
    folder.rename(tmp_path / f".out.partial-{pid}")
    output.rename(tmp_path / f".out.old-{pid}")
    assert write.existing_bundle(output, SPEC.fingerprint, ["gguf"], None) == before
    assert open_bundle(output).manifest == before
    assert hidden(tmp_path) == []


def test_leftovers_of_the_dead_are_cleared_and_of_the_living_kept(tmp_path: Path) -> None:
    for name in (f".out.partial-{dead_pid()}", ".out.partial-1", ".output.partial-999999999", ".out.partial-x"):
        (tmp_path / name).mkdir()
    write.recover(tmp_path / "out")
    assert hidden(tmp_path) == [".out.partial-1", ".out.partial-x", ".output.partial-999999999"]


def test_kill_9_leaves_only_a_hidden_folder_without_manifest(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from vlm_export import write\n"
        "with write.draft(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'weights').write_bytes(b'half'); print('there', flush=True); time.sleep(60)\n"
    )
    output = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", script, str(output)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    write.recover(output)  # a living export is left alone
    assert hidden(tmp_path) == [f".out.partial-{process.pid}"]
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert [p.name for p in tmp_path.rglob("*")] == [f".out.partial-{process.pid}", "weights"]
    write.recover(output)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("checkpoint", "is in the checkpoint"),
        ("checkpoint/onnx", "is in the checkpoint"),
        ("other/../checkpoint/x/y", "is in the checkpoint"),
        ("link/out", "is in the checkpoint"),
        ("file/out", "is not a folder"),
        ("/", "name of a new folder"),
    ],
)
def test_an_output_that_cannot_be_is_refused(tmp_path: Path, output: str, message: str) -> None:
    checkpoint = tmp_path / "checkpoint"
    for folder in (checkpoint, tmp_path / "other"):
        folder.mkdir()
    (tmp_path / "link").symlink_to(checkpoint)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=message):
        write.check_output(tmp_path / output, checkpoint)


def test_an_output_above_the_checkpoint_or_beside_it_is_taken(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    write.check_output(tmp_path / "checkpoint-onnx", tmp_path / "checkpoint")
    write.check_output(tmp_path / "deep" / "er" / "out", tmp_path / "checkpoint")


def test_only_a_bundle_of_the_same_checkpoint_without_the_target_is_added_to(tmp_path: Path) -> None:
    output = tiny_bundle(tmp_path / "out")
    there = read_manifest(output)
    assert write.existing_bundle(tmp_path / "new", SPEC.fingerprint, ["onnx"], None) is None
    assert write.existing_bundle(output, SPEC.fingerprint, ["gguf"], None) == there
    assert write.existing_bundle(output, SPEC.fingerprint, ["gguf"], there.max_context) == there
    with pytest.raises(InputError, match="of another checkpoint; choose another -o or remove it"):
        write.existing_bundle(output, "0" * 64, ["gguf"], None)
    with pytest.raises(InputError, match="holds target 'onnx' already"):
        write.existing_bundle(output, SPEC.fingerprint, ["gguf", "onnx"], None)
    with pytest.raises(InputError, match="has a context of 64, not 32"):
        write.existing_bundle(output, SPEC.fingerprint, ["gguf"], 32)


@pytest.mark.parametrize("kind", ["file", "empty", "full", "dangling"])
def test_anything_else_that_exists_is_refused_and_kept(tmp_path: Path, kind: str) -> None:
    output = tmp_path / "out"
    if kind == "file":
        output.write_text("mine")
    elif kind == "dangling":
        output.symlink_to(tmp_path / "nowhere")
    else:
        output.mkdir()
        if kind == "full":
            (output / "thesis.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="exists and is not a bundle; choose another -o or remove it"):
        write.existing_bundle(output, SPEC.fingerprint, ["onnx"], None)
    assert sorted(tmp_path.rglob("*")) == before
