"""Model: a checkpoint, its spec, and the three parts made from it when asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_models.checkpoint import NO_SOURCES, Checkpoint, Sources, open_checkpoint
from vlm_models.errors import CheckpointError
from vlm_models.family import read_spec
from vlm_models.language import Attention, Linear, Norm, Rows, walk
from vlm_models.spec import VLMSpec

if TYPE_CHECKING:
    from torch import nn

    from vlm_models.torch_language import TorchLanguage
    from vlm_models.vision import Encoder

_AFTER_FEATURES = ("vision_tower.head.", "vision_tower.post_layernorm.")  # trained or not, no feature comes from them


class Model:
    """The three parts of a checkpoint. Modules are float32, in eval mode and loaded on first use."""

    def __init__(self, checkpoint: Checkpoint, spec: VLMSpec) -> None:
        self.checkpoint, self.spec = checkpoint, spec

    @cached_property
    def _vision_encoder(self) -> Encoder:
        from vlm_models.vision import load_vision_encoder

        return load_vision_encoder(self.checkpoint, self.spec)

    @cached_property
    def _projector(self) -> nn.Module:
        from vlm_models.vision import load_projector

        return load_projector(self.checkpoint, self.spec)

    def vision_encoder(self) -> Encoder:
        """pixel_values (N, 3, s, s) → image_features (N, T, F)."""
        return self._vision_encoder

    def projector(self) -> nn.Module:
        """image_features (N, T, F) → image_embeds (N, T, H)."""
        return self._projector

    def language_model(self, *, keep: bool = True) -> TorchLanguage:
        """A new decoder with an empty cache; `keep` its weights in memory, or stream them on each call."""
        from vlm_models.torch_language import TorchLanguage

        return TorchLanguage(self.checkpoint, self.spec.language, keep=keep)


def load_model(path_or_hub_id: str | Path, sources: Sources = NO_SOURCES) -> Model:
    """Open a checkpoint, read its spec and check that every tensor is there with the right shape."""
    checkpoint = open_checkpoint(path_or_hub_id, sources)
    spec = read_spec(checkpoint)
    check_tensors(checkpoint, spec)
    return Model(checkpoint, spec)


def check_tensors(checkpoint: Checkpoint, spec: VLMSpec) -> None:
    """Raises CheckpointError naming the first tensor that is missing or of a wrong shape, with both shapes."""
    from vlm_models.vision import required

    needed = {**dict(language_tensors(spec)), **required(checkpoint, spec)}
    extra = {"image_newline"} if spec.tiling is not None and spec.tiling.newline else set()
    for name in sorted(checkpoint.adapted - set(needed) - extra):
        if not name.startswith(_AFTER_FEATURES):
            raise CheckpointError(
                f"{checkpoint.folder}: the adapter's {name!r} has no place in the model and would be dropped"
            )
    for name, shape in needed.items():
        if name not in checkpoint:
            raise CheckpointError(f"{checkpoint.folder}: tensor {name!r} is missing; expected shape {shape}")
        if (found := checkpoint.shape(name)) != shape:
            raise CheckpointError(
                f"{checkpoint.folder}: tensor {name!r} has shape {found}, but config.json asks for {shape}"
            )


def language_tensors(spec: VLMSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the language model's tensors, found by walking it."""
    language = spec.language
    shapes = _Shapes()
    walk(language, shapes, None)
    yield "language_model.embed_tokens.weight", (language.vocab_size, language.hidden_size)
    yield from shapes.found.items()


class _Shapes:
    """An emitter that writes down what it is given. Fused matrices are as long as their last row range."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[int, ...]] = {}

    def _rows(self, rows: Rows, *rest: int) -> None:
        longest = max(rows.stop, self.found.get(rows.tensor, (0,))[0])
        self.found[rows.tensor] = (longest, *rest)

    def linears(self, x: None, linears: Sequence[Linear]) -> tuple[None, ...]:
        for linear in linears:
            self._rows(linear.weight, linear.in_features)
            if linear.bias is not None:
                self._rows(linear.bias)
        return (None,) * len(linears)

    def rms_norm(self, x: None, norm: Norm) -> None:
        self.found[norm.tensor] = (norm.size,)

    def head_norm(self, x: None, norm: Norm, heads: int) -> None:
        self.found[norm.tensor] = (norm.size,)

    def attention(self, q: None, k: None, v: None, attention: Attention) -> None:
        return None

    def add(self, x: None, y: None) -> None:
        return None

    def gate(self, gate: None, up: None, activation: str) -> None:
        return None

    def last_row(self, x: None) -> None:
        return None

    def softcap(self, x: None, cap: float) -> None:
        return None
