"""Runs in the peer's environment: `optimum-cli export openvino` with the checkpoint's own tokenizer."""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from optimum.commands.optimum_cli import main
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

_TOWER = re.compile(r"(^|\.)vision_tower\.(?!vision_model\.)")
_PICTURES, _INDEX = "preprocessor_config.json", "model.safetensors.index.json"


def convert(checkpoint: str, folder: str, precision: str) -> None:
    """Write the pipeline into `folder`; `precision` is that of the weights of all parts it applies to."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        source = readable(Path(checkpoint), Path(scratch))
        options = ["-m", str(source), "--task", "image-text-to-text", "--weight-format", precision, folder]
        sys.argv = ["optimum-cli", "export", "openvino", *options]
        main()
        # OpenVINO GenAI reads this file, which newer transformers keep inside processor_config.json.
        if not (Path(folder) / _PICTURES).is_file():
            (Path(folder) / _PICTURES).write_text(json.dumps(_pictures(Path(checkpoint)), indent=1), "utf-8")


def readable(checkpoint: Path, scratch: Path) -> Path:
    """The checkpoint, or a copy with names that this transformers knows.

    transformers from 5.6 on writes vision_tower.encoder…, earlier ones read vision_tower.vision_model.encoder… and make
    random weights of what they do not find. Raises ValueError where some are missing all the same.
    """
    if not missing(checkpoint):
        return checkpoint
    copy = scratch / "checkpoint"
    copy.mkdir()
    for path in checkpoint.iterdir():
        if path.suffix == ".safetensors":
            tensors = {_TOWER.sub(r"\1vision_tower.vision_model.", n): t for n, t in load_file(path).items()}
            save_file(tensors, copy / path.name, {"format": "pt"})
        elif path.name == _INDEX:
            index = json.loads(path.read_text("utf-8"))
            files = {_TOWER.sub(r"\1vision_tower.vision_model.", n): f for n, f in index["weight_map"].items()}
            (copy / _INDEX).write_text(json.dumps({**index, "weight_map": files}), "utf-8")
        elif path.is_file():
            shutil.copy(path, copy)
    if names := missing(copy):
        raise ValueError(f"transformers finds no {names[0]} and {len(names) - 1} other tensors: take another version")
    return copy


def missing(checkpoint: Path) -> list[str]:
    """Names that transformers would make random weights for."""
    load: Any = AutoModelForImageTextToText
    _, info = load.from_pretrained(checkpoint, dtype=torch.float16, output_loading_info=True)
    return sorted(info["missing_keys"])


def _pictures(checkpoint: Path) -> Any:
    for name, key in ((_PICTURES, None), ("processor_config.json", "image_processor")):
        if (checkpoint / name).is_file():
            found = json.loads((checkpoint / name).read_text("utf-8"))
            if key is None or key in found:
                return found if key is None else found[key]
    raise ValueError(f"the checkpoint has no {_PICTURES}")


if __name__ == "__main__":
    convert(**json.loads(sys.argv[1]))
