"""A CLIP tower whose rows llama.cpp puts in order itself: its LLaVA graph appends the class row and then drops row 0.

The graph runs on [patch 0, …, patch N-1, class] and hands rows 1 … N to the projector, so that patch 0 is lost and the
class row is taken for a picture's (ggml-org/llama.cpp#25814). Here one more block stands before the tower's own. Its
attention moves every row on by one place: row r attends to row r-1 alone, found by position codes that are added with
the position embeddings. Nothing but rounding is left of the detour, and any llama.cpp with that graph can run it; one
whose graph is mended needs the tower as it was.

To carry the codes the tower gets some channels more. A layer norm over more channels equals the old one up to a
factor where the old channels have a mean of 0, so every weight that writes to them is centred, and the mean, which
only the projector needs, goes into a channel of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_export.gguf.tower import Tower, Weight

Floats = NDArray[np.float32]

_SCORE = 25.0  # nats by which a wrong place loses at least: its weight in the softmax is 1e-11
_SMALL = 2.0**-20  # of the rows as they were, which stay beneath the moved ones
_MEAN = 2.0**-3  # the mean's channel must not count in a layer norm
_CODE = 1e-4  # of the position codes to the position embeddings, for the same reason


@dataclass(frozen=True)
class _Widths:
    """The tower as it was (n channels, d to a head, N patches) and as it becomes, and where its new channels are."""

    heads: int
    d: int
    patches: int

    @property
    def n(self) -> int:
        return self.heads * self.d

    @property
    def bits(self) -> int:
        """Channels of the code of a place among the patches and the class row."""
        return self.patches.bit_length()

    @property
    def query(self) -> int:
        """First channel of the place to look for; those of the own place follow, then a constant."""
        return self.n

    @property
    def key(self) -> int:
        return self.n + self.bits

    @property
    def one(self) -> int:
        return self.n + 2 * self.bits

    @property
    def no_code(self) -> int:
        """Nothing, as the codes' channels would hold it: what a layer norm takes off every channel, to be put back."""
        return self.one + 1

    @property
    def nothing(self) -> int:
        """The same for the tower's own channels."""
        return self.one + 2

    @property
    def mean(self) -> int:
        return self.one + 3

    @property
    def loud(self) -> int:
        """Two channels that make up all of the first block's layer norm, which so becomes linear."""
        return self.one + 4

    @property
    def wide_d(self) -> int:
        """Channels to a head, with room for the new ones and for two products of each bit; a multiple of 8."""
        return max(-(-(self.loud + 2) // (8 * self.heads)), -(-2 * self.bits // 8)) * 8

    @property
    def wide(self) -> int:
        return self.heads * self.wide_d


def in_order(tower: Tower) -> Tower:
    """A CLIP `tower` with the block that moves its rows."""
    keys, old = dict(tower.keys), tower.weights
    heads, n = int(keys["attention.head_count"]), int(keys["embedding_length"])
    w = _Widths(heads, n // heads, (int(keys["image_size"]) // int(keys["patch_size"])) ** 2)
    eps, spread = float(keys["attention.layer_norm_epsilon"]) * w.n / w.wide, _spread(old)
    keys["embedding_length"], keys["attention.layer_norm_epsilon"] = w.wide, eps
    keys["block_count"] = int(keys["block_count"]) + 1
    keys["vlm.class_row"] = "appended"  # by the llama.cpp that this file is for
    keys["feature_layer"] = [layer + 1 for layer in keys["feature_layer"]]
    weights = _embeddings(old, w, spread) | _moving_block(w, eps, spread)
    for name, weight in old.items():
        if name.startswith("v.blk."):
            _, _, block, part, kind = name.split(".")
            weights[f"v.blk.{int(block) + 1}.{part}.{kind}"] = _own_block(weight, part, kind, w)
    weights |= {name: weight for name, weight in old.items() if name.startswith("mm.")}
    weights["mm.0.weight"] = _first_projection(old["mm.0.weight"], w)
    return Tower(keys, weights)


def _embeddings(old: Mapping[str, Weight], w: _Widths, spread: float) -> dict[str, Weight]:
    """Patches and class row centred; positions in the order of the graph's rows, with codes."""

    def positions() -> Floats:
        stored = old["v.position_embd.weight"].read().reshape(w.patches + 1, w.n)
        table = np.zeros((w.patches + 1, w.wide), np.float32)
        table[:, : w.n] = _centred(np.roll(stored, -1, axis=0), 1)
        norm = np.linalg.norm(table[:, : w.n], axis=1).mean()
        sizes = np.full((w.patches + 1, 1), _CODE * norm)
        # The layer norm divides codes by a row's norm, which is known for the class row: it gets one like the others'.
        row = table[-1, : w.n] + _centred(old["v.class_embd"].read(), 0)
        sizes[-1] = _CODE * np.linalg.norm(row) / math.sqrt(spread)
        places = np.arange(w.patches + 1)
        table[:, w.query : w.key] = sizes * _code(np.roll(places, 1), w.bits)
        table[:, w.key : w.one] = sizes * _code(places, w.bits)
        table[:, w.one : w.one + 1] = sizes
        return table

    def norm(kind: str) -> Callable[[], Floats]:
        def read() -> Floats:
            out = np.zeros(w.wide, np.float32)
            out[: w.n] = old[f"v.pre_ln.{kind}"].read() * _SMALL
            if kind == "weight":
                out[: w.n] *= math.sqrt(w.n / w.wide)
                out[w.query : w.nothing] = _SMALL / (_CODE * math.sqrt(w.wide))
            else:
                out[w.loud], out[w.loud + 1] = 1.0, -1.0
            return out

        return read

    patch, row = old["v.patch_embd.weight"], old["v.class_embd"]
    return {
        "v.class_embd": Weight((w.wide,), False, lambda: _padded(_centred(row.read(), 0), w.wide, 0)),
        "v.patch_embd.weight": Weight(
            (w.wide, *patch.shape[1:]), True, lambda: _padded(_centred(patch.read(), 0), w.wide, 0)
        ),
        "v.position_embd.weight": Weight((w.patches + 1, w.wide), False, positions),
        "v.pre_ln.weight": Weight((w.wide,), False, norm("weight")),
        "v.pre_ln.bias": Weight((w.wide,), False, norm("bias")),
    }


def _spread(old: Mapping[str, Weight]) -> float:
    """The largest norm of a row before pre_ln over the mean norm of a position: by how much codes may shrink."""
    patch, positions = old["v.patch_embd.weight"].read(), _centred(old["v.position_embd.weight"].read(), 1)
    kernel = _centred(patch.reshape(len(patch), -1), 0)
    # Normalised pixels of the extremes: flat, striped and noisy patches at full contrast.
    y, x = np.mgrid[0 : patch.shape[-2], 0 : patch.shape[-1]]
    shades = [np.ones_like(x)] + [np.sign(np.sin(math.pi / 2**p * (axis + 0.5))) for p in range(4) for axis in (x, y)]
    shades.append(np.random.default_rng(0).choice([-1, 1], x.shape))
    colours = [np.array([1 - 2 * (i >> c & 1) for c in range(3)])[:, None, None] for i in range(8)]
    patches = np.stack([2.2 * shade * colour for shade in shades for colour in colours]).reshape(-1, kernel.shape[1])
    norms, row = np.linalg.norm(positions, axis=1), _centred(old["v.class_embd"].read(), 0)
    rows = max(np.linalg.norm(patches @ kernel.T, axis=1).max(), np.linalg.norm(row))
    return float((rows + norms.max()) / norms.mean())


def _moving_block(w: _Widths, eps: float, spread: float) -> dict[str, Weight]:
    """Block 0: row r becomes row r-1, row 0 the last one. Its MLP adds nothing."""
    sigma = math.sqrt(2.0 / w.wide + eps)  # of the loud channels alone
    gain = math.sqrt(_SCORE / 2 * math.sqrt(w.wide_d)) * spread
    scale = np.zeros(w.wide, np.float32)
    scale[: w.mean] = sigma / _SMALL

    def lookup(first: int, constant: float) -> Floats:
        # Scores are -2 for each wrong bit, 0 at the place looked for, whatever factor a row's norm brings.
        out = np.zeros((w.heads, w.wide_d, w.wide), np.float32)
        for i in range(w.bits):  # each bit's product, and 1 off: no sum on the way is larger than fp16 holds
            out[:, 2 * i, first + i], out[:, 2 * i + 1, w.one] = gain, constant * gain
        out[:, : 2 * w.bits, w.no_code] = -out.sum(-1)[:, : 2 * w.bits]
        return out.reshape(w.wide, w.wide)

    def values() -> Floats:
        out = np.zeros((w.wide, w.wide), np.float32)
        out[: w.n, : w.n] = np.eye(w.n)
        out[: w.n, w.nothing] = -1
        return out

    def output() -> Floats:
        out = np.zeros((w.wide, w.wide), np.float32)
        out[: w.n, : w.n] = np.eye(w.n)
        return _writing(out[: w.n], w)

    quiet = np.zeros(w.wide, np.float32)
    quiet[w.loud], quiet[w.loud + 1] = -1.0, 1.0
    block = {
        "ln1.weight": scale,
        "attn_q.weight": lambda: lookup(w.query, -1.0),
        "attn_k.weight": lambda: lookup(w.key, 1.0),
        "attn_v.weight": values,
        "attn_out.weight": output,
        "attn_out.bias": quiet,
        "ffn_up.weight": np.zeros((32, w.wide), np.float32),
        "ffn_down.weight": np.zeros((w.wide, 32), np.float32),
    }
    zeros = {"ln1.bias": w.wide, "ln2.weight": w.wide, "ln2.bias": w.wide, "ffn_up.bias": 32, "ffn_down.bias": w.wide}
    zeros |= {f"attn_{letter}.bias": w.wide for letter in "qkv"}
    return {f"v.blk.0.{name}": _made(value, w) for name, value in block.items()} | {
        f"v.blk.0.{name}": _made(np.zeros(size, np.float32), w) for name, size in zeros.items()
    }


def _made(value: Any, w: _Widths) -> Weight:
    if callable(value):
        return Weight((w.wide, w.wide), True, value)
    return Weight(value.shape, value.ndim > 1, lambda: value)


def _own_block(weight: Weight, part: str, kind: str, w: _Widths) -> Weight:
    """One tensor of a block of the checkpoint's, for the wider tower."""
    read = weight.read
    if part in ("ln1", "ln2"):
        factor = np.float32(math.sqrt(w.n / w.wide) if kind == "weight" else 1.0)
        return Weight((w.wide,), False, lambda: _padded(read() * factor, w.wide, 0))
    if part in ("attn_q", "attn_k", "attn_v"):
        # The graph divides scores by the root of a head's channels, which are more now.
        factor = np.float32(math.sqrt(w.wide_d / w.d) if part == "attn_q" else 1.0)
        if kind == "bias":
            return Weight((w.wide,), False, lambda: _heads(read() * factor, w, 0))
        return Weight((w.wide, w.wide), True, lambda: _padded(_heads(read() * factor, w, 0), w.wide, 1))
    if part == "attn_out" and kind == "weight":
        return Weight((w.wide, w.wide), True, lambda: _writing(_heads(read(), w, 1), w))
    if part in ("attn_out", "ffn_down"):
        return Weight((w.wide, *weight.shape[1:]), weight.matrix, lambda: _writing(read(), w))
    if kind == "bias":  # of ffn_up
        return weight
    return Weight((weight.shape[0], w.wide), True, lambda: _padded(read(), w.wide, 1))


def _first_projection(weight: Weight, w: _Widths) -> Weight:
    """mm.0 on stacked feature layers: the mean's channel stands for all channels."""
    rows, layers = weight.shape[0], weight.shape[1] // w.n

    def read() -> Floats:
        given = weight.read().reshape(rows, layers, w.n)
        out = _padded(given, w.wide, 2)
        out[:, :, w.mean] = given.sum(-1) / _MEAN
        return out.reshape(rows, -1)

    return Weight((rows, layers * w.wide), True, read)


def _writing(values: Floats, w: _Widths) -> Floats:
    """Rows (n, …) that write to the tower's channels: centred, and the mean into its own."""
    out = _padded(_centred(values, 0), w.wide, 0)
    out[w.mean] = values.mean(0) * _MEAN
    return out


def _heads(values: Floats, w: _Widths, axis: int) -> Floats:
    """Give each head its new channels along `axis`."""
    shape = values.shape
    split = values.reshape(*shape[:axis], w.heads, w.d, *shape[axis + 1 :])
    return _padded(split, w.wide_d, axis + 1).reshape(*shape[:axis], w.wide, *shape[axis + 1 :])


def _padded(values: Floats, size: int, axis: int) -> Floats:
    width = [(0, size - values.shape[axis] if i == axis else 0) for i in range(values.ndim)]
    return np.pad(values, width)


def _centred(values: Floats, axis: int) -> Floats:
    out: Floats = (values - values.mean(axis, keepdims=True, dtype=np.float64)).astype(np.float32)
    return out


def _code(places: NDArray[np.int64], bits: int) -> Floats:
    """(n,) places → (n, bits) of 1 and -1."""
    return (places[:, None] >> np.arange(bits) & 1).astype(np.float32) * 2 - 1
