"""LoRA adapters as PEFT saves them (Hu et al. 2021, arXiv 2106.09685; github.com/huggingface/peft, tuners/lora).

adapter_config.json says what they are; adapter_model.safetensors or .bin holds `<module>.lora_A.weight` (r, in) and
`<module>.lora_B.weight` (out, r) of each adapted layer, W + scale · B · A, and layers that were trained whole. LLaVA's
training adds non_lora_trainables.bin with what it trained beside (projector, embeddings, …).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_models.checkpoint import ADAPTER, PIECES, Array, LowRank, Stored, read_json
from vlm_models.errors import CheckpointError
from vlm_models.weights import read_pickled, read_safetensors

_SIDE = re.compile(r"^(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<side>[AB])(?:\.(?!weight$)\w+)?(?:\.weight)?$")
_WHOLE = re.compile(r"\.(?:modules_to_save(?:\.\w+(?=\.(?:weight|bias)$))?|base_layer)(?=\.)")
_OUTER = "base_model.model."
# Keys of adapter_config.json that change what is computed, with what leaves W + scale · B · A as it is.
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "use_dora": (None, False),
    "use_qalora": (None, False),
    "use_bdlora": (None, False),
    "lora_bias": (None, False),
    "layer_replication": (None, [], False),
    "target_parameters": (None, [], False),
    "trainable_token_indices": (None, [], {}, False),
    "alora_invocation_tokens": (None, [], False),
    "arrow_config": (None, {}, False),
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
}
_CHANGED_BASE = "an adapter that was trained on a changed base model: convert it to plain LoRA (PEFT does so on saving)"


@dataclass(frozen=True)
class Adapter:
    """`low_rank` by the name of the module in the model that was trained, `whole` tensors by their names in it."""

    base: str | None
    low_rank: Mapping[str, LowRank]
    whole: Mapping[str, Stored]


def read_adapter(folder: Path) -> Adapter:
    """The adapter of a folder. Raises CheckpointError, naming file or tensor, for what would not be applied exactly."""
    config = read_json(folder / ADAPTER, "is no adapter")
    _check(folder, config)
    sides: dict[str, dict[str, Array]] = {}
    embeddings: set[str] = set()
    whole: dict[str, Stored] = {}
    for name, stored in _tensors(folder):
        if (match := _SIDE.match(name)) is not None:
            module, side = match["module"].removeprefix(_OUTER), match["side"]
            if side in sides.setdefault(module, {}):
                raise CheckpointError(f"{folder}: two tensors are lora_{side} of {module!r}: remove one adapter")
            sides[module][side] = stored.array
            embeddings |= {module} if match["kind"] else set()
        elif "lora_" in name:
            raise CheckpointError(f"{folder}: tensor {name!r} of the adapter is of no known kind and would be dropped")
        else:
            _put(folder, whole, _WHOLE.sub("", name), stored)
    for name, stored in _others(folder):
        _put(folder, whole, name, stored)
    if not sides:
        raise CheckpointError(f"{folder}: {ADAPTER} is there, but the adapter's file holds no lora_A and lora_B")
    low_rank = {m: _low_rank(folder, config, m, pair, m in embeddings) for m, pair in sides.items()}
    base = config.get("base_model_name_or_path")
    return Adapter(base if isinstance(base, str) and base else None, low_rank, whole)


def scale_of(folder: Path, config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """Rank and scale of a module: lora_alpha / r, or lora_alpha / √r (rsLoRA, Kalajdzievski 2023), its own if any."""
    rank = _pattern(config.get("rank_pattern"), module, config.get("r"))
    alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise CheckpointError(f"{folder / ADAPTER}: r {rank!r} and lora_alpha {alpha!r} of {module!r} must be numbers")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern(patterns: object, module: str, default: Any) -> Any:
    """The value of the first pattern that is the module's name, or its end after a dot, as PEFT matches them."""
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        try:
            if re.match(rf"(?:.*\.)?(?:{pattern})$", module):
                return value
        except re.error as error:
            raise CheckpointError(f"{ADAPTER}: pattern {str(pattern)[:80]!r} is no regular expression") from error
    return default


def _check(folder: Path, config: Mapping[str, Any]) -> None:
    if str(config.get("peft_type")).upper() != "LORA":
        raise CheckpointError(
            f"{folder / ADAPTER}: peft_type {config.get('peft_type')!r} is not supported, only LORA is; merge the "
            "adapter into its base model and export that"
        )
    for key, plain in _PLAIN.items():
        if (value := config.get(key)) not in plain:
            what = (
                _CHANGED_BASE if key == "init_lora_weights" else "LoRA of another kind: merge it and export the whole"
            )
            raise CheckpointError(f"{folder / ADAPTER}: {key} = {str(value)[:80]} is not supported, it is {what}")


def _low_rank(
    folder: Path, config: Mapping[str, Any], module: str, pair: Mapping[str, Array], embedding: bool
) -> LowRank:
    for side in "AB":
        if side not in pair:
            raise CheckpointError(f"{folder}: {module!r} has no lora_{side}: the adapter is incomplete")
    rank, scale = scale_of(folder, config, module)
    down, up = pair["A"], pair["B"]  # (r, in, …) and (out, r, …): of an embedding (r, rows) and (columns, r)
    up = up.reshape(up.shape[0], -1)
    down = down.reshape(down.shape[0], -1)
    if (down.shape[0], up.shape[1]) != (rank, rank):
        raise CheckpointError(
            f"{folder}: {module!r} has lora_A of rank {down.shape[0]} and lora_B of rank {up.shape[1]}, "
            f"but {ADAPTER} says {rank}"
        )
    # fan_in_fan_out is for layers that keep their matrix turned (GPT-2); none here does, and PEFT ignores it then.
    return LowRank(down.T, up.T, scale) if embedding else LowRank(up, down, scale)


def _tensors(folder: Path) -> Iterator[tuple[str, Stored]]:
    for name, read in (("adapter_model.safetensors", read_safetensors), ("adapter_model.bin", read_pickled)):
        if (folder / name).is_file():
            return read(folder / name)
    raise CheckpointError(f"{folder} has {ADAPTER}, but neither adapter_model.safetensors nor adapter_model.bin")


def _others(folder: Path) -> Iterator[tuple[str, Stored]]:
    """What was trained beside the adapter; the first of the files has what the second has."""
    file = next((folder / name for name in PIECES if (folder / name).is_file()), None)
    return iter(()) if file is None else read_pickled(file)


def _put(folder: Path, whole: dict[str, Stored], name: str, stored: Stored) -> None:
    name = name.removeprefix(_OUTER)
    if name in whole:
        raise CheckpointError(f"{folder}: two tensors are both {name!r}: remove one of the files")
    whole[name] = stored
