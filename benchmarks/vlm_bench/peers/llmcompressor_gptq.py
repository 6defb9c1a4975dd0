"""llm-compressor's GPTQ on a language model, in its own environment: writes the weights that it rounded, as float32.

Arguments: MODEL_FOLDER CALIBRATION.safetensors BITS GROUP_SIZE (symmetric | asymmetric) OUT.safetensors. The
calibration file holds embeddings (S, H), one tensor a sequence: what the decoder of a vision-language model is given.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


class Sequences(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """One sequence of embeddings an item."""

    def __init__(self, path: str) -> None:
        self.rows = list(load_file(path).values())

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"inputs_embeds": self.rows[i]}


def main(folder: str, calibration: str, bits: str, group: str, grid: str, out: str) -> None:
    """Quantize all linear layers but the head, with activation order, and save every weight."""
    tokenizer: Any = PreTrainedTokenizerFast
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weights = QuantizationArgs(
        num_bits=int(bits), type="int", symmetric=grid == "symmetric", strategy="group", group_size=int(group)
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    oneshot(
        model=model,
        processor=tokenizer(tokenizer_file=f"{folder}/tokenizer.json"),  # wanted, not used
        dataset=torch.utils.data.DataLoader(Sequences(calibration), batch_size=1),
        recipe=GPTQModifier(config_groups={"all": scheme}, ignore=["lm_head"], actorder="static"),
    )
    rounded = {}
    with torch.no_grad():
        for name, module in model.named_modules():
            if hasattr(module, "weight_scale"):
                zero = getattr(module, "weight_zero_point", None)
                args = module.quantization_scheme.weights
                rounded[f"{name}.weight"] = fake_quantize(module.weight, module.weight_scale, zero, args)
    save_file({name: weight.float().contiguous() for name, weight in rounded.items()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
