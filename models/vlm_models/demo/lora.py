"""Low-rank adaptation (LoRA): y = W x + scale * B A x on every linear layer of the language model's decoder."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RANK = 16
SCALE = 2.0  # alpha / rank


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trained low-rank one; A (rank, in) starts random, B (out, rank) at zero."""

    def __init__(self, linear: nn.Linear, rank: int = RANK) -> None:
        super().__init__()
        self.linear = linear
        self.active = True
        self.lora_a = nn.Parameter(torch.empty(rank, linear.in_features))
        self.lora_b = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        if not self.active:
            return y
        low = F.linear(x, self.lora_a.to(x.dtype))
        return y + F.linear(low, SCALE * self.lora_b.to(x.dtype))


def attach(model: nn.Module, rank: int = RANK) -> dict[str, LoRALinear]:
    """Replace every linear layer of `model` by a LoRALinear around it; return them by name."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    layers = {}
    for name, linear in linears.items():
        parent, _, child = name.rpartition(".")
        layers[name] = LoRALinear(linear, rank)
        setattr(model.get_submodule(parent), child, layers[name])
    return layers


@contextmanager
def switched_off(layers: dict[str, LoRALinear]) -> Iterator[None]:
    """Inside, the model is the base model."""
    for layer in layers.values():
        layer.active = False
    try:
        yield
    finally:
        for layer in layers.values():
            layer.active = True


def tensors(layers: dict[str, LoRALinear]) -> dict[str, Tensor]:
    """`{name}.lora_a` and `{name}.lora_b` of every layer."""
    pairs = (("lora_a", "lora_b"),)
    return {f"{n}.{part}": getattr(x, part).detach() for n, x in layers.items() for ab in pairs for part in ab}


@torch.no_grad()
def merge(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Add scale * B A, in fp32, to the weight of every linear layer named in `weights`."""
    for name, a in weights.items():
        if name.endswith(".lora_a"):
            linear = model.get_submodule(name.removesuffix(".lora_a"))
            b = weights[name.removesuffix("a") + "b"]
            assert isinstance(linear, nn.Linear)
            delta = SCALE * b.float() @ a.float()
            linear.weight.copy_(linear.weight.float() + delta)
