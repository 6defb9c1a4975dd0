"""Running `vlm-export` in this process as a shell would, and damaging checkpoints."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlm_export.cli import main


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
