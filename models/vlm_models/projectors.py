"""Projectors of the LLaVA line, each a module of the name that config.json has for it (`mm_projector_type`).

"mlp" is transformers' LlavaMultiModalProjector. "linear", "identity" and "mlp<N>x_gelu" are the original LLaVA's
(github.com/haotian-liu/LLaVA, llava/model/multimodal_projector/builder.py), "mlp<N>x_gelu_Norm" is Yi-VL's
(github.com/01-ai/Yi, VL/llava/model/multimodal_projector/builder.py), "ldpnet" and "ldpnetv2" are MobileVLM's (Chu et
al. 2023, arXiv 2312.16886; 2024, arXiv 2402.03766). Parameters are called as they are saved there; the single layer of
"linear", which has no name there, is `linear`.
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlm_models.checkpoint import Checkpoint
from vlm_models.errors import CheckpointError
from vlm_models.spec import ProjectorSpec, VisionSpec, VLMSpec
from vlm_models.torch_language import ACTIVATIONS

PROJECTOR_TYPES = ("linear", "identity", "mlp<N>x_gelu", "mlp<N>x_gelu_Norm", "ldpnet", "ldpnetv2")
_MLP = re.compile(r"mlp([1-9]\d?)x_gelu(_Norm)?")
_V2_SIDE = 12  # LDPv2 pools to 12 × 12 rows, whatever the tower gives


def projector_spec(kind: str, vision: VisionSpec, width: int, where: object) -> ProjectorSpec:
    """ProjectorSpec of a projector named as `mm_projector_type` does, to rows of `width`, the language model's.

    Raises CheckpointError, in which `where` names the checkpoint, for a type that is not known and for rows that the
    type cannot take: of the wrong width (identity), not a square or not to be pooled evenly (LDP).
    """
    if kind not in ("linear", "identity", "ldpnet", "ldpnetv2") and not _MLP.fullmatch(kind):
        raise CheckpointError(
            f"{where}: mm_projector_type {kind!r} is not supported; supported are {', '.join(PROJECTOR_TYPES)}"
        )
    if kind == "identity" and vision.feature_size != width:
        raise CheckpointError(
            f"{where}: without a projector (identity) the vision tower's rows of {vision.feature_size} "
            f"do not meet the language model's of {width}"
        )
    out_tokens = None
    if kind.startswith("ldpnet"):
        side = math.isqrt(vision.image_tokens)
        if side**2 != vision.image_tokens:
            raise CheckpointError(
                f"{where}: {kind} needs rows that form a square, the vision tower gives {vision.image_tokens}"
            )
        if kind == "ldpnetv2" and side % _V2_SIDE:
            raise CheckpointError(
                f"{where}: ldpnetv2 pools {_V2_SIDE} × {_V2_SIDE} rows, not evenly from {side} × {side}"
            )
        if width % 8:
            raise CheckpointError(f"{where}: {kind} needs a language model of a width that 8 divides, not {width}")
        out_tokens = (_V2_SIDE if kind == "ldpnetv2" else -(-side // 2)) ** 2
    return ProjectorSpec(vision.feature_size, width, width, "gelu", kind != "identity", kind, out_tokens)


def projector(spec: VLMSpec) -> nn.Module:
    """image_features (N, image_tokens, in_features) → image_embeds (N, tile_tokens, out_features).

    Raises CheckpointError for a kind that none of these is.
    """
    p, side = spec.projector, math.isqrt(spec.vision.image_tokens)
    if p.kind == "mlp":
        return Mlp(p)
    if p.kind == "linear":
        return Line(p)
    if p.kind == "identity":
        return Same()
    if p.kind == "ldpnet":
        return Ldp(p, side)
    if p.kind == "ldpnetv2":
        return LdpV2(p, side)
    if (match := _MLP.fullmatch(p.kind)) is not None:
        return _stack(p, int(match[1]), norms=match[2] is not None)
    raise CheckpointError(f"projector kind {p.kind!r} is not one of mlp, {', '.join(PROJECTOR_TYPES)}")


def check_widths(checkpoint: Checkpoint, module: nn.Module, spec: VLMSpec, prefix: str) -> None:
    """Raise CheckpointError with both numbers where the projector's ends do not meet tower and language model."""
    linears = [f"{prefix}{name}.weight" for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    if not linears or not all(name in checkpoint and len(checkpoint.shape(name)) == 2 for name in linears):
        return
    takes, gives = checkpoint.shape(linears[0])[1], checkpoint.shape(linears[-1])[0]
    if takes != spec.projector.in_features:
        raise CheckpointError(
            f"{checkpoint.folder}: the projector takes rows of {takes}, "
            f"but the vision tower gives rows of {spec.projector.in_features}"
        )
    if gives != spec.language.hidden_size:
        raise CheckpointError(
            f"{checkpoint.folder}: the projector gives rows of {gives}, "
            f"but the language model takes rows of {spec.language.hidden_size}"
        )


class Mlp(nn.Module):
    """Two linear layers with an activation between, as transformers has them."""

    def __init__(self, p: ProjectorSpec) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(p.in_features, p.hidden_size, bias=p.bias)
        self.linear_2 = nn.Linear(p.hidden_size, p.out_features, bias=p.bias)
        self.activation = p.activation

    def forward(self, image_features: Tensor) -> Tensor:
        return torch.as_tensor(self.linear_2(ACTIVATIONS[self.activation](self.linear_1(image_features))))


class Line(nn.Module):
    """LLaVA's first projector: one linear layer."""

    def __init__(self, p: ProjectorSpec) -> None:
        super().__init__()
        self.linear = nn.Linear(p.in_features, p.out_features)

    def forward(self, image_features: Tensor) -> Tensor:
        return torch.as_tensor(self.linear(image_features))


class Same(nn.Module):
    """No projector. A graph may not give out its input itself, and a mere copy is optimized away."""

    def forward(self, image_features: Tensor) -> Tensor:
        return torch.maximum(image_features, image_features)


def _stack(p: ProjectorSpec, depth: int, *, norms: bool) -> nn.Sequential:
    """`depth` linear layers, each with a LayerNorm behind it with `norms`, GELU between them."""
    modules: list[nn.Module] = []
    for i in range(depth):
        modules += [nn.GELU()] if i else []
        modules.append(nn.Linear(p.out_features if i else p.in_features, p.out_features))
        modules += [nn.LayerNorm(p.out_features)] if norms else []
    return nn.Sequential(*modules)


class Ldp(nn.Module):
    """MobileVLM's LDP: a two-layer MLP, then two MobileNetV3 blocks on the rows as a picture; the second halves it."""

    def __init__(self, p: ProjectorSpec, side: int) -> None:
        super().__init__()
        self.model = nn.Module()
        gap = nn.Identity()  # holds the place that the layers' saved numbers count
        self.model.mlp = nn.Sequential(
            gap, nn.Linear(p.in_features, p.out_features), nn.GELU(), nn.Linear(p.out_features, p.out_features)
        )
        self.model.mb_block = nn.Sequential(gap, _Block(p.out_features, 1), _Block(p.out_features, 2))
        self.side = side

    def forward(self, image_features: Tensor) -> Tensor:
        rows = self.model.get_submodule("mlp")(image_features)
        picture = rows.transpose(1, 2).unflatten(2, (self.side, self.side))
        return torch.as_tensor(self.model.get_submodule("mb_block")(picture).flatten(2).transpose(1, 2))


class _Block(nn.Module):
    """MobileNetV3's inverted residual (Howard et al. 2019, arXiv 1905.02244), not expanded, LayerNorm for BatchNorm.

    (N, C, h, w) → the same at stride 1, (N, C, ⌈h/2⌉, ⌈w/2⌉) at stride 2.
    """

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        depthwise = nn.Conv2d(width, width, 3, stride, padding=1, groups=width, bias=False)
        self.block = nn.Sequential(
            nn.Sequential(depthwise, _ChannelNorm(width), _HardSwish()),
            _SqueezeExcite(width),
            nn.Sequential(nn.Conv2d(width, width, 1, bias=False), _ChannelNorm(width)),
        )
        self.residual = stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x)
        return x + y if self.residual else y


class _HardSwish(nn.Module):
    """x · min(max(x + 3, 0), 6) / 6, not by torch's own, which becomes a chain of rarer operations elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        return x * functional.hardsigmoid(x)


class _ChannelNorm(nn.Module):
    """LayerNorm over the channels of (N, C, h, w)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        last = functional.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, 1e-5)
        return last.permute(0, 3, 1, 2)


class _SqueezeExcite(nn.Module):
    """Each channel scaled by what two 1 × 1 convolutions make of all channels' means (Hu et al. 2018)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        narrow = _divisible(width // 4)
        self.fc1, self.fc2 = nn.Conv2d(width, narrow, 1), nn.Conv2d(narrow, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean((2, 3), keepdim=True)
        return torch.as_tensor(x * functional.hardsigmoid(self.fc2(functional.relu(self.fc1(means)))))


def _divisible(width: int) -> int:
    """The multiple of 8 nearest to `width`, at least 8 and not under nine tenths of it: MobileNet's rule for widths."""
    near = max(8, (width + 4) // 8 * 8)
    return near if near >= 0.9 * width else near + 8


class LdpV2(nn.Module):
    """MobileVLM V2's LDPv2: a two-layer MLP, average pooling to 12 × 12, a depthwise convolution as positions."""

    def __init__(self, p: ProjectorSpec, side: int) -> None:
        super().__init__()
        width = p.out_features
        self.mlp, self.peg = nn.Module(), nn.Module()
        self.mlp.mlp = nn.Sequential(nn.Linear(p.in_features, width), nn.GELU(), nn.Linear(width, width))
        self.peg.peg = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, groups=width))
        self.side = side

    def forward(self, image_features: Tensor) -> Tensor:
        rows = self.mlp.get_submodule("mlp")(image_features)
        picture = rows.transpose(1, 2).unflatten(2, (self.side, self.side))
        pooled = functional.avg_pool2d(picture, self.side // _V2_SIDE)
        return torch.as_tensor((self.peg.get_submodule("peg")(pooled) + pooled).flatten(2).transpose(1, 2))
