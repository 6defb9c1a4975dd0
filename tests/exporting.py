"""Running `vlm-export` in this process as a shell would, one real export for all tests, damaging checkpoints."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import vlm_export
from vlm_export.cli import main
from vlm_export.target import Job, find_target
from vlm_runtime.manifest import Part, read_manifest


@dataclass(frozen=True)
class Ran:
    """What a command left: exit code and both streams."""

    code: int
    out: str
    err: str


Command = Callable[..., Ran]


def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """`run("checkpoint", "--target", "onnx", …)`."""

    def run(*arguments: str | Path) -> Ran:
        capfd.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["vlm-export", *map(str, arguments)])
            with pytest.raises(SystemExit) as exited:
                main()
        streams = capfd.readouterr()
        code = exited.value.code
        assert code is None or isinstance(code, int)
        return Ran(code or 0, streams.out, streams.err)

    return run


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """Let `change` edit the tensors of a one-file checkpoint in place."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


_EXPORTED: dict[Path, Path] = {}


def exported(checkpoint: Path, made: pytest.TempPathFactory) -> Path:
    """The checkpoint at fp32, with its check; exported once per session. Read only."""
    if checkpoint not in _EXPORTED:
        output = made.mktemp("export") / "bundle"
        vlm_export.export(checkpoint, ["onnx"], output, precision="fp32")
        _EXPORTED[checkpoint] = output
    return _EXPORTED[checkpoint]


def copy_parts(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let target onnx copy the parts of `bundle`, whatever the precision: tracing takes most of the time."""

    def build(job: Job) -> dict[str, Part]:
        for part in ("language_model", "projector", "vision_encoder"):
            job.progress(part, 0, 1)
            job.progress(part, 1, 1)
        shutil.copytree(bundle / "onnx", job.root / "onnx")
        return {name: engines["onnx"] for name, engines in read_manifest(bundle).parts.items()}

    monkeypatch.setattr(find_target("onnx"), "build", build)
