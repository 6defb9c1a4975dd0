"""Adapters that cannot be merged exactly: one line that says what was found, what is allowed and what to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import loras
from checkpoints import copy
from exporting import Command, command
from vlm_models.checkpoint import Sources, open_checkpoint
from vlm_models.errors import CheckpointError
from vlm_models.model import load_model

run = pytest.fixture(command)
Q = "model.language_model.layers.1.self_attn.q_proj"
Tensors = dict[str, Tensor]


def pair(module: str = Q, rows: int = 64, columns: int = 64, rank: int = 4) -> Tensors:
    return {f"{module}.lora_A.weight": torch.ones(rank, columns), f"{module}.lora_B.weight": torch.ones(rows, rank)}


def refused(folder: Path, message: str, sources: Sources | None = None) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(folder, sources or Sources())
    assert "\n" not in str(caught.value)


CONFIGS: Mapping[str, tuple[dict[str, Any], str]] = {
    "another method": ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported, only LORA is; merge the adapter"),
    "no method": ({"peft_type": None}, "peft_type None is not supported"),
    "DoRA": ({"use_dora": True}, "use_dora = True is not supported, it is LoRA of another kind"),
    "biases of lora_B": ({"lora_bias": True}, "lora_bias = True is not supported"),
    "layers repeated": ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication = .* is not supported"),
    "tokens": ({"trainable_token_indices": [3]}, "trainable_token_indices = .* is not supported"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_16"}, "trained on a changed base model: convert it to plain LoRA"),
    "no rank": ({"r": None}, "r None and lora_alpha 10 of .* must be numbers"),
    "another rank": ({"r": 8}, "has lora_A of rank 4 and lora_B of rank 4, but adapter_config.json says 8"),
    "a broken pattern": ({"rank_pattern": {"q_(proj": 4}}, r"pattern 'q_\(proj' is no regular expression"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_other_kinds_of_adapters(tiny: Path, tmp_path: Path, case: str) -> None:
    config, message = CONFIGS[case]
    refused(loras.adapter(tmp_path / "lora", tiny, pair(), **config), message)


TENSORS: Mapping[str, tuple[Callable[[], Tensors], str]] = {
    "nothing": (lambda: {"model.language_model.norm.weight": torch.ones(64)}, "file holds no lora_A and lora_B"),
    "one half": (lambda: dict([*pair().items()][:1]), "has no lora_B: the adapter is incomplete"),
    "ranks that differ": (
        lambda: {**pair(), f"{Q}.lora_B.weight": torch.ones(64, 3)},
        "lora_A of rank 4 and lora_B of rank 3, but adapter_config.json says 4",
    ),
    "another width": (lambda: pair(columns=48), "for a matrix of 64 × 48, the base model's is 64 × 64: it was trained"),
    "a magnitude": (lambda: {**pair(), f"{Q}.lora_magnitude_vector": torch.ones(64)}, "of no known kind and would be"),
    "a layer too many": (
        lambda: pair("model.language_model.layers.3.self_attn.q_proj"),
        "changes 'language_model.layers.3.self_attn.q_proj.weight', which its base .* does not have: it would be drop",
    ),
    "a part that is not known": (lambda: pair("model.resampler.proj"), "changes 'model.resampler.proj.weight', which"),
    "a whole tensor of no layer": (
        lambda: {**pair(), "model.multi_modal_projector.linear_3.weight": torch.ones(64, 64)},
        "'multi_modal_projector.linear_3.weight' has no place in the model and would be dropped",
    ),
    "two adapters": (
        lambda: {**pair(), f"{Q}.lora_A.other.weight": torch.ones(4, 64)},
        "two tensors are lora_A of .*: remove one adapter",
    ),
    "a whole tensor of another shape": (
        lambda: {**pair(), "model.language_model.norm.weight": torch.ones(32)},
        r"'language_model.norm.weight' has shape \(32,\), but config.json asks for \(64,\)",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_would_be_dropped_or_do_not_fit(tiny: Path, tmp_path: Path, case: str) -> None:
    make, message = TENSORS[case]
    refused(loras.adapter(tmp_path / "lora", tiny, make()), message)


def test_a_base_that_is_missing_says_how_to_give_it(tiny: Path, tmp_path: Path, run: Command) -> None:
    gone = loras.adapter(tmp_path / "gone", "/models/gone", pair())
    ran = run(gone, "--target", "onnx", "-o", tmp_path / "bundle")
    assert ran.code == 2
    assert (
        "the adapter's base model '/models/gone' is neither a folder nor to be had from the hub: give it with --base"
        in (" ".join(ran.err.split()))
    )
    refused(loras.adapter(tmp_path / "none", None, pair()), "does not say on which base model .*: give it with --base")
    refused(gone, "no such folder: nowhere", Sources(base="nowhere"))
    assert open_checkpoint(gone, Sources(base=tiny)).adapted == {"language_model.layers.1.self_attn.q_proj.weight"}


def test_a_base_beside_the_adapter_is_found(tiny: Path, tmp_path: Path) -> None:
    copy(tiny, tmp_path / "base")
    assert open_checkpoint(loras.adapter(tmp_path / "lora", "../base", pair())).adapted


def test_an_adapter_on_an_adapter(tiny: Path, tmp_path: Path) -> None:
    first = loras.adapter(tmp_path / "first", tiny, pair())
    refused(
        loras.adapter(tmp_path / "second", first, pair()), "its base model .*first is an adapter too: merge that one"
    )
    own = loras.adapter(tmp_path / "own", tmp_path / "own", pair())
    refused(own, "is an adapter too")


def test_a_model_and_an_adapter_in_one_folder(tiny: Path, tmp_path: Path) -> None:
    both = copy(tiny, tmp_path / "both")
    loras.adapter(both, tiny, pair())
    refused(both, "holds a whole model and an adapter .* two layouts mixed: remove one")


def test_an_adapter_without_its_file(tiny: Path, tmp_path: Path) -> None:
    lora = loras.adapter(tmp_path / "lora", tiny, pair())
    (lora / "adapter_model.safetensors").unlink()
    refused(lora, "neither adapter_model.safetensors nor adapter_model.bin")


def test_code_in_what_was_trained_beside_is_not_run(tiny: Path, tmp_path: Path) -> None:
    lora, mark = loras.adapter(tmp_path / "lora", tiny, pair()), tmp_path / "mark"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (mark,)

    torch.save({"base_model.model.x": Evil()}, lora / "non_lora_trainables.bin")
    refused(lora, "holds more than tensors or is damaged, and is not executed")
    assert not mark.exists()


def test_a_tensor_that_is_saved_twice(tiny: Path, tmp_path: Path) -> None:
    norm = {"base_model.model.model.language_model.norm.weight": torch.ones(64)}
    lora = loras.adapter(tmp_path / "lora", tiny, {**pair(), "model.language_model.norm.weight": torch.ones(64)})
    torch.save(norm, lora / "non_lora_trainables.bin")
    refused(lora, "two tensors are both 'model.language_model.norm.weight': remove one of the files")


def test_a_config_that_is_no_object(tiny: Path, tmp_path: Path) -> None:
    lora = loras.adapter(tmp_path / "lora", tiny, pair())
    (lora / "adapter_config.json").write_text("[]")
    refused(lora, "adapter_config.json must hold a JSON object, not list")


def test_a_base_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(loras.adapter(tmp_path / "lora", tmp_path / "empty", pair()), "has no config.json: it is no base model")
