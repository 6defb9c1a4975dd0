"""What each group of layers costs at each precision: size, and how far the answers move when it alone is rounded.

Groups are what a recipe can name: attention and MLP of a block of decoder layers, the head, the table of input
embeddings, vision encoder, projector. The rest of the model stays as it is while one group is tried.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vlm_export.preflight import DEFAULT_CONTEXT
from vlm_export.quality import HeldOut, Quality, ask
from vlm_export.simulate import EMBEDDING, HEAD, Rounding, decoder_linears, linear_modules, rounding, simulate
from vlm_export.target import Progress, silent
from vlm_models.processor import tokenizer_json
from vlm_models.spec import VisionSpec
from vlm_quant.recipe import Precision, Recipe
from vlm_runtime.manifest import ITEM_BYTES

if TYPE_CHECKING:
    from vlm_models.model import Model

BLOCKS = 5  # of decoder layers
_GRAPH = 4096  # bytes for a layer's nodes, and for its tensors beginning on pages (measured: 3,300)
EXACT = Precision("fp32")
STEPS = (Precision("fp16"), Precision("int8"), Precision("int4", 32), Precision("int4", 128))
"""What is tried, finest first. The table of input embeddings is left as it is stored, or int8."""


@dataclass(frozen=True)
class Group:
    """Layers that take one precision together.

    `pattern` is their rule in the part `part` (empty: the whole part); `layer` the first decoder layer that they
    change, −1 where they come before the decoder; `shapes` the (rows, columns) of their matrices.
    """

    name: str
    part: str
    pattern: str
    layer: int
    shapes: tuple[tuple[int, int], ...]
    steps: tuple[Precision, ...] = STEPS

    def bytes(self, precision: Precision) -> int:
        """On disk, scales and zero points included, as target onnx stores them."""
        kind = rounding(replace(precision, rules=((self.pattern, precision),) if self.pattern else ()), self.pattern)
        return sum(stored_bytes(rows, columns, kind) for rows, columns in self.shapes)


@dataclass(frozen=True)
class Effect:
    """One group at one precision, everything else as the checkpoint has it."""

    group: Group
    precision: Precision
    bytes: int
    quality: Quality


Choice = Mapping[Group, Precision]
"""A precision for every group of a model."""


def groups(model: Model) -> list[Group]:
    """All groups of a model, in the order of the line; together they hold every matrix that a recipe can round."""
    checkpoint, language = model.checkpoint, model.spec.language
    found = []
    for part, prefix, module in (
        ("vision", "vision_tower.", model.vision_encoder().tower),
        ("projector", "multi_modal_projector.", model.projector()),
    ):
        live = [name for name, _ in linear_modules(module) if part != "vision" or _live(model.spec.vision, name)]
        shapes = [checkpoint.shape(f"{prefix}{name}.weight") for name in live if f"{prefix}{name}.weight" in checkpoint]
        found.append(Group(part, part, "", -1, _matrices(shapes)))
    rows = _matrices([checkpoint.shape(EMBEDDING)])
    stored = Precision("fp32" if checkpoint.dtype(EMBEDDING) == "F32" else "fp16")
    found.append(Group("embedding", "embedding", "", -1, rows, (stored, Precision("int8"))))
    linears, size = decoder_linears(language), -(-language.layers // BLOCKS)
    for start in range(0, language.layers, size):
        span = range(start, min(start + size, language.layers))
        for kind, word in (("self_attn", "attention"), ("mlp", "mlp")):
            prefixes = tuple(f"layers.{layer}.{kind}." for layer in span)
            matrices = [(n.out_features, n.in_features) for n in linears if n.name.startswith(prefixes)]
            name, pattern = _layers(span), f"{_pattern(span)}.{kind}"
            found.append(Group(f"{name} {word}", "language", pattern, start, tuple(matrices)))
    head = linears[-1]
    shape = (head.out_features, head.in_features)
    found.append(Group(HEAD, "language", HEAD, language.layers, (shape,)))
    return found


def effects(model: Model, held: HeldOut, progress: Progress = silent) -> Iterator[Effect]:
    """Every group at every precision below fp16, measured one at a time."""
    found = groups(model)
    tried = [(group, step) for group in found for step in group.steps[1:]]
    for i, (group, step) in enumerate(tried):
        progress("sensitivity", i, len(tried))
        recipe = recipe_of({other: step if other is group else EXACT for other in found})
        yield Effect(group, step, group.bytes(step), ask(simulate(model, recipe), held, group.layer))
    progress("sensitivity", len(tried), len(tried))


def recipe_of(choice: Choice) -> Recipe:
    """The recipe of a choice, with as few rules as say it."""
    whole = {group.part: precision for group, precision in choice.items() if not group.pattern}
    language = {group: precision for group, precision in choice.items() if group.part == "language"}
    weighed: dict[Precision, int] = {}
    for group, precision in language.items():
        if group.name != HEAD:
            weighed[precision] = weighed.get(precision, 0) + sum(r * c for r, c in group.shapes)
    base = max(weighed, key=lambda precision: weighed[precision])
    table = whole["embedding"] if whole["embedding"].weights == "int8" else None
    return Recipe(whole["vision"], whole["projector"], replace(base, rules=_rules(language, base)), table)


def stored_bytes(rows: int, columns: int, kind: Rounding) -> int:
    """Of one matrix as target onnx stores it: float32 scales, zero points of 4 bits."""
    groups = -(-columns // kind.group) if kind.group else 1
    if kind.bits == 4:
        return rows * (groups * kind.group // 2 + 4 * groups + -(-groups // 2))
    if kind.bits == 8:
        return rows * (max(columns, groups * kind.group) + 4 * groups)
    return rows * columns * kind.bits // 8


def fixed_bytes(model: Model) -> int:
    """What no recipe makes smaller: norms, biases, convolutions, position tables, tokenizer, and what graphs add."""
    checkpoint, matrices = model.checkpoint, {linear.weight.tensor for linear in decoder_linears(model.spec.language)}
    matrices |= {EMBEDDING}
    for prefix, module in (
        ("vision_tower.", model.vision_encoder().tower),
        ("multi_modal_projector.", model.projector()),
    ):
        matrices |= {f"{prefix}{name}.weight" for name, _ in linear_modules(module)}
    rest = [name for name in checkpoint.names() if name not in matrices]
    others = sum(math.prod(checkpoint.shape(name)) for name in rest)
    language = model.spec.language
    ropes = [rope.dim for rope in (language.rope, language.rope_local) if rope is not None]
    tables = sum(ropes) * min(language.max_positions, DEFAULT_CONTEXT)  # cosines and sines, half of dim each
    graphs = _GRAPH * len(decoder_linears(language))
    return ITEM_BYTES["F32"] * (others + tables) + graphs + len(tokenizer_json(checkpoint).encode())


def _rules(language: Choice, base: Precision) -> tuple[tuple[str, Precision], ...]:
    """Of all groups that differ from `base`; neighbouring blocks of one kind together."""
    rules: list[tuple[str, Precision]] = []
    for kind in ("self_attn", "mlp"):
        blocks = [(group, p) for group, p in language.items() if group.pattern.endswith(f".{kind}")]
        runs: list[tuple[int, int, Precision]] = []
        for group, precision in blocks:
            first, last = _span(group.pattern)
            if runs and runs[-1][2] == precision:
                first = runs.pop()[0]
            runs.append((first, last, precision))
        if len(runs) == 1:
            rules += [(kind, runs[0][2])] if runs[0][2] != base else []
        else:
            rules += [(f"{_pattern(range(a, b + 1))}.{kind}", p) for a, b, p in runs if p != base]
    head = next(precision for group, precision in language.items() if group.name == HEAD)
    if rounding(base, HEAD) != rounding(replace(base, rules=((HEAD, head),)), HEAD):
        rules.append((HEAD, head))
    return tuple(rules)


def _live(vision: VisionSpec, name: str) -> bool:
    """Whether the features depend on a layer of the tower: what comes after the last that is read is not exported."""
    last = max(layer if layer >= 0 else vision.layers + 1 + layer for layer in vision.feature_layers)
    found = re.match(r"encoder\.layers\.(\d+)\.", name)
    return found is not None and int(found[1]) < last


def _span(pattern: str) -> tuple[int, int]:
    first, _, last = pattern.split(".")[1].partition("-")
    return int(first), int(last or first)


def _pattern(span: range) -> str:
    return f"layers.{span[0]}" if len(span) == 1 else f"layers.{span[0]}-{span[-1]}"


def _layers(span: range) -> str:
    return f"layer {span[0]}" if len(span) == 1 else f"layers {span[0]}-{span[-1]}"


def _matrices(shapes: Sequence[tuple[int, ...]]) -> tuple[tuple[int, int], ...]:
    return tuple((shape[0], shape[1]) for shape in shapes)
