"""VLMSpec: what an image-text model is, as frozen values without any tensor; written into the manifest as it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vlm_models.plain import from_plain, to_plain


@dataclass(frozen=True)
class VisionSpec:
    """The vision tower and what LLaVA takes from it.

    One square tile of `image_size` pixels gives `image_tokens` rows of `feature_size` numbers: the hidden states
    of `feature_layers` (indices into hidden_states as transformers counts them, 0 = embeddings, negative from the
    end) concatenated; `select_strategy` "default" drops the first row (the class token), "full" keeps all.
    """

    model_type: str
    image_size: int
    patch_size: int
    hidden_size: int
    layers: int
    feature_layers: tuple[int, ...]
    select_strategy: Literal["default", "full"]
    image_tokens: int

    @property
    def feature_size(self) -> int:
        """Width of one feature row."""
        return self.hidden_size * len(self.feature_layers)


@dataclass(frozen=True)
class ProjectorSpec:
    """(rows, in_features) → (rows, out_features); `kind` "mlp" is two linear layers with an activation between.

    Other kinds are those of `vlm_models.projectors` or of the family itself. `out_tokens` is how many rows come out for
    one tile where a projector gives fewer than it takes.
    """

    in_features: int
    hidden_size: int
    out_features: int
    activation: str
    bias: bool
    kind: str = "mlp"
    out_tokens: int | None = None


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding of one kind of layer; `vlm_models.rope.inv_freq` turns it into frequencies.

    `dim` is the number of rotated channels of a head (less than head_dim for partial rotary). `scaling` holds the
    numbers of the scaling type under the names transformers gives them (factor, low_freq_factor, …).
    """

    theta: float
    dim: int
    type: Literal["default", "linear", "llama3", "yarn"] = "default"
    scaling: Mapping[str, float] = dataclasses.field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class LanguageSpec:
    """A decoder of the Llama line: everything the walk in `vlm_models.language` needs to know.

    `rope` is the rotary embedding of full layers, `rope_local` that of sliding layers where it differs (Gemma 3).
    `windows[i]` is the number of positions layer i attends to including its own, or 0 for all of them.
    `norm_offset` is added to each RMSNorm weight (1 for Gemma). `embed_multiplier` scales looked-up embeddings.
    `fused` says that q,k,v and gate,up are stored as one matrix each (Phi-3). `both_ways` says which rows of a prompt
    see those after them too: none, those of each picture among themselves (Gemma 3), or all of them (PaliGemma,
    whatever the windows).
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    activation: str
    rope: RopeSpec
    max_positions: int
    tied: bool
    windows: tuple[int, ...]
    rope_local: RopeSpec | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    norm_offset: float = 0.0
    fused: bool = False
    embed_multiplier: float = 1.0
    attention_scale: float = 0.0
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    both_ways: Literal["none", "pictures", "prompt"] = "none"


@dataclass(frozen=True)
class PreprocessSpec:
    """How pixels are made: resize, centre crop, scale, normalise, in this order, as the checkpoint's processor does.

    `resize` "shortest_edge" keeps the aspect ratio, as does "longest_edge", which fills the rest of the square with
    `pad_color` and leaves no edge below `least` pixels; "exact" squashes to `size` × `size`, "none" leaves the picture.
    `crop` is the edge of the centre crop (0: none). `resample` is Pillow's filter number. `pad` "square" first pads
    to a square with `pad_color` (LLaVA-1.5's original preprocessing).
    """

    size: int
    resize: Literal["shortest_edge", "longest_edge", "exact", "none"]
    crop: int
    resample: int
    rescale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    pad: Literal["none", "square"] = "none"
    pad_color: tuple[int, int, int] = (0, 0, 0)
    least: int = 1


@dataclass(frozen=True)
class TilingSpec:
    """How one picture becomes several tiles of the tower's size, and their projected rows one sequence.

    `rule` names the module of `vlm_runtime.tilings` that does it: "anyres" (LLaVA-NeXT and OneVision: the best of
    `resolutions`, (height, width) in pixels, with `max_grid` tiles' worth of rows at most where that is not 0), "ratio"
    (InternVL: the grid of `min_tiles` to `max_tiles` whose aspect ratio is closest), "split" (Idefics3: tiles of a
    picture whose longer edge is `longest_edge`, where that is not 0; `max_tiles` 1: none but the overview, 0: as many
    as it takes). `overview` says where the whole picture stands among the tiles, `newline` whether the checkpoint has a
    row that ends each line of patches, `single` that only a picture which is alone in its prompt is cut into tiles.
    `before` and `after` are the texts around the rows of a picture ("split": `before` comes before every tile), `tag`
    the one that marks those of the overview.
    """

    rule: Literal["anyres", "ratio", "split"]
    resolutions: tuple[tuple[int, int], ...] = ()
    min_tiles: int = 1
    max_tiles: int = 1
    longest_edge: int = 0
    max_grid: int = 0
    overview: Literal["none", "first", "last"] = "first"
    newline: bool = False
    single: bool = False
    before: str = ""
    after: str = ""
    tag: str = ""


@dataclass(frozen=True)
class PromptSpec:
    """How a conversation becomes token ids. `chat_template` is Jinja2, or None where the checkpoint has none.

    `bos_token`/`eos_token` are texts for the template; `eos_token_ids` end an answer. A template writes `placeholder`
    (by default `image_token`) for one picture; `image_token` is what each of its rows has in the prompt, of which
    there are `image_tokens`, or at least so many where the picture's shape decides (`VLMSpec.tiling`). With `chunked`
    the text around placeholders is tokenized piece by piece, BOS before the first alone (original LLaVA). An answer
    also ends where one of the texts `stop` begins. `before` and `after` are texts around the rows of a picture that is
    not cut into tiles; without `special_tokens` the template writes all that there are, BOS among them.
    """

    image_token: str
    image_token_id: int
    image_tokens: int
    eos_token_ids: tuple[int, ...]
    bos_token: str | None = None
    eos_token: str | None = None
    chat_template: str | None = None
    placeholder: str | None = None
    chunked: bool = False
    stop: tuple[str, ...] = ()
    before: str = ""
    after: str = ""
    special_tokens: bool = True

    @property
    def picture(self) -> str:
        """What stands for one picture in a rendered conversation."""
        return self.placeholder or self.image_token


@dataclass(frozen=True)
class VLMSpec:
    """A checkpoint's facts: family (the model_type of config.json), its three parts, preprocessing and prompt.

    `fingerprint` names the checkpoint: SHA-256 over its config and samples of every tensor. Without `tiling` a picture
    is one tile.
    """

    family: str
    name: str
    fingerprint: str
    vision: VisionSpec
    projector: ProjectorSpec
    language: LanguageSpec
    preprocess: PreprocessSpec
    prompt: PromptSpec
    tiling: TilingSpec | None = None

    @property
    def tile_tokens(self) -> int:
        """Rows that the projector gives for one tile."""
        return self.projector.out_tokens or self.vision.image_tokens

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists, as they stand in manifest.json."""
        return dict(to_plain(self))

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> VLMSpec:
        """The inverse of `to_json`. Raises InputError naming the field that is missing, unknown or of a wrong type."""
        return from_plain(VLMSpec, data, "spec")
