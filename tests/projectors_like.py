"""Tiny checkpoints with any projector, their tensors called as the original code saves them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Shapes = dict[str, tuple[int, ...]]

KINDS = ("linear", "mlp1x_gelu", "mlp2x_gelu", "mlp3x_gelu", "mlp2x_gelu_Norm", "ldpnet", "ldpnetv2")


def shapes(kind: str, rows: int, width: int) -> Shapes:
    """Names and shapes as `mm_projector` of the original checkpoints has them, written down from their files."""

    def linear(name: str, takes: int) -> Shapes:
        return {f"{name}.weight": (width, takes), f"{name}.bias": (width,)}

    def norm(name: str) -> Shapes:
        return {f"{name}.weight": (width,), f"{name}.bias": (width,)}

    if kind == "linear":
        return linear("linear", rows)
    if kind == "mlp1x_gelu":
        return linear("0", rows)
    if kind == "mlp2x_gelu":
        return linear("0", rows) | linear("2", width)
    if kind == "mlp3x_gelu":
        return linear("0", rows) | linear("2", width) | linear("4", width)
    if kind == "mlp2x_gelu_Norm":
        return linear("0", rows) | norm("1") | linear("3", width) | norm("4")
    if kind == "ldpnetv2":
        peg: Shapes = {"peg.peg.0.weight": (width, 1, 3, 3), "peg.peg.0.bias": (width,)}
        return linear("mlp.mlp.0", rows) | linear("mlp.mlp.2", width) | peg
    assert kind == "ldpnet", kind
    found = linear("model.mlp.1", rows) | linear("model.mlp.3", width)
    narrow = {64: 16, 96: 24}[width]
    for i in (1, 2):
        block = f"model.mb_block.{i}.block"
        found |= {f"{block}.0.0.weight": (width, 1, 3, 3), f"{block}.2.0.weight": (width, width, 1, 1)}
        found |= norm(f"{block}.0.1") | norm(f"{block}.2.1")
        found |= {f"{block}.1.fc1.weight": (narrow, width, 1, 1), f"{block}.1.fc1.bias": (narrow,)}
        found |= {f"{block}.1.fc2.weight": (width, narrow, 1, 1), f"{block}.1.fc2.bias": (width,)}
    return found


def with_projector(folder: Path, kind: str, *, rows: int = 48, width: int = 64, seed: int = 3) -> Path:
    """Give a one-file checkpoint another projector in place, of random weights wide enough that each matters."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "mm_projector_type": kind}))
    file = folder / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if "multi_modal_projector" not in name}
    generator = torch.Generator().manual_seed(seed)
    new = {}
    for name, shape in shapes(kind, rows, width).items() if kind != "identity" else ():
        noise = torch.randn(shape, generator=generator)
        vector = 1 + 0.2 * noise if name.endswith("weight") else 0.3 * noise
        new[f"multi_modal_projector.{name}"] = noise * 0.2 if len(shape) > 1 else vector
    save_file({**kept, **new}, file, metadata={"format": "pt"})
    return folder
