"""LoRA folders as PEFT and LLaVA's own training save them, and what they compute, by hooks on transformers' modules."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

CONFIG: Mapping[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 4,
    "lora_alpha": 10,
    "lora_dropout": 0.05,
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "use_dora": False,
    "use_rslora": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "inference_mode": True,
}


def factors(shapes: Mapping[str, tuple[int, int]], rank: Callable[[str], int], seed: int = 5) -> dict[str, Tensor]:
    """lora_A and lora_B of modules (out, in), wide enough that each changes the logits clearly."""
    generator, out = torch.Generator().manual_seed(seed), {}
    for module, (rows, columns) in shapes.items():
        out[f"{module}.lora_A.weight"] = torch.randn(rank(module), columns, generator=generator) * 0.15
        out[f"{module}.lora_B.weight"] = torch.randn(rows, rank(module), generator=generator) * 0.15
    return out


def adapter(
    folder: Path, base: Path | str | None, tensors: Mapping[str, Tensor], *, file: str = "safetensors", **config: Any
) -> Path:
    """Write adapter_config.json and adapter_model, `tensors` by the names they have in the model that was trained."""
    folder.mkdir(parents=True, exist_ok=True)
    written = {**CONFIG, "base_model_name_or_path": None if base is None else str(base), **config}
    (folder / "adapter_config.json").write_text(json.dumps(written))
    named = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    if file == "safetensors":
        save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    else:
        torch.save(named, folder / "adapter_model.bin")
    return folder


def apply(model: nn.Module, tensors: Mapping[str, Tensor], scale: Callable[[str], float]) -> nn.Module:
    """The model computing x·Wᵀ + s·(x·Aᵀ)·Bᵀ in each adapted layer, its weights as they were."""
    for name, down in tensors.items():
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            added = functools.partial(_added, down, tensors[f"{module}.lora_B.weight"], scale(module))
            model.get_submodule(module).register_forward_hook(added)
    return model


def _added(down: Tensor, up: Tensor, scale: float, _: nn.Module, x: tuple[Tensor, ...], y: Tensor) -> Tensor:
    return y + scale * (x[0] @ down.T) @ up.T
