"""The pictures of the second reader, written from runtimes/BUNDLE.md alone: levels to tiles of pixel values."""

from __future__ import annotations

import math

import numpy as np

RADIUS = {4: 0.5, 2: 1.0, 5: 1.0, 3: 2.0, 1: 3.0}


def weight(resample, x):
    a = abs(x)
    if resample == 4:
        return float(-0.5 < x <= 0.5)
    if resample == 2:
        return max(1 - a, 0.0)
    if resample == 5:
        if a >= 1:
            return 0.0
        return 1.0 if a == 0 else math.sin(math.pi * a) / (math.pi * a) * (0.54 + 0.46 * math.cos(math.pi * a))
    if resample == 3:
        if a < 1:
            return (1.5 * a - 2.5) * a * a + 1
        return (((a - 5) * a + 8) * a - 4) * -0.5 if a < 2 else 0.0
    return sinc(x) * sinc(x / 3) if -3 <= x < 3 else 0.0


def sinc(x):
    return 1.0 if x == 0 else math.sin(math.pi * x) / (math.pi * x)


def resize_axis(pixels, m, resample):
    """Along axis 1: (h, n, 3) to (h, m, 3)."""
    n = pixels.shape[1]
    scale = n / m
    f = max(scale, 1.0)
    support = RADIUS[resample] * f
    out = np.empty((pixels.shape[0], m, 3), np.uint8)
    for i in range(m):
        center = (i + 0.5) * scale
        first, last = max(int(center - support + 0.5), 0), min(int(center + support + 0.5), n)
        w = [weight(resample, (j + first - center + 0.5) * (1 / f)) for j in range(last - first)]
        total = 0.0
        for one in w:
            total += one
        k = np.array([int(one / total * 2**22 + (0.5 if one >= 0 else -0.5)) for one in w], np.int64)
        acc = 2**21 + np.einsum("hjc,j->hc", pixels[:, first:last].astype(np.int64), k)
        out[:, i] = np.clip(acc >> 22, 0, 255)
    return out


def resize(pixels, width, height, resample):
    h, w = pixels.shape[:2]
    if (w, h) == (width, height):
        return pixels
    if resample == 0:
        return pixels[nearest(h, height)][:, nearest(w, width)]
    columns_first = h > height and h - height > 2 * (w - width)
    for columns in (columns_first, not columns_first):
        if columns and h != height:
            pixels = resize_axis(pixels.transpose(1, 0, 2), height, resample).transpose(1, 0, 2)
        if not columns and w != width:
            pixels = resize_axis(pixels, width, resample)
    return pixels


def nearest(n, m):
    at, out = n / m * 0.5, []
    for _ in range(m):
        out.append(int(at))
        at += n / m
    return out


def pad_square(pixels, color):
    h, w = pixels.shape[:2]
    if w == h:
        return pixels
    e = max(w, h)
    out = np.empty((e, e, 3), np.uint8)
    out[:] = color
    top, left = (e - h) // 2, (e - w) // 2
    out[top : top + h, left : left + w] = pixels
    return out


def crop(pixels, c):
    h, w = pixels.shape[:2]
    out = np.zeros((c, c, 3), np.uint8)
    ys, xs = (h - c) // 2 + np.arange(c), (w - c) // 2 + np.arange(c)
    y, x = (ys >= 0) & (ys < h), (xs >= 0) & (xs < w)
    out[np.ix_(y, x)] = pixels[np.ix_(ys[y], xs[x])]
    return out


def preprocess(pixels, p, **changed):
    """(h, w, 3) levels to (3, s, s) values."""
    p = {"pad": "none", "pad_color": [0, 0, 0], "least": 1, **p, **changed}
    if p["pad"] == "square":
        pixels = pad_square(pixels, p["pad_color"])
    h, w = pixels.shape[:2]
    size = p["size"]
    if p["resize"] == "exact":
        pixels = resize(pixels, size, size, p["resample"])
    elif p["resize"] == "shortest_edge":
        longer = int(size * max(w, h) / min(w, h))
        pixels = resize(pixels, *((size, longer) if w <= h else (longer, size)), p["resample"])
    elif p["resize"] == "longest_edge":
        k = size / max(w, h)
        fitted = max(round(w * k), p["least"]), max(round(h * k), p["least"])
        pixels = pad_square(resize(pixels, *fitted, p["resample"]), p["pad_color"])
    if p["crop"]:
        pixels = crop(pixels, p["crop"])
    levels = (np.arange(256, dtype=np.float64) * p["rescale"]).astype(np.float32)
    table = [(levels - np.float32(m)) / np.float32(s) for m, s in zip(p["mean"], p["std"], strict=True)]
    return np.stack([table[i][pixels[:, :, i]] for i in range(3)])


# --- tiles: each rule gives (tiles (N, 3, s, s), text in the prompt, rows of each run, how to pack)


def cut(pixels, spec, pictures=1, newline=None):
    t = spec.get("tiling")
    if t is None:
        prompt = spec["prompt"]
        text = prompt.get("before", "") + prompt["image_token"] + prompt.get("after", "")
        return preprocess(pixels, spec["preprocess"])[None], text, [prompt["image_tokens"]], lambda rows: rows[0]
    return {"anyres": anyres, "ratio": ratio, "split": split}[t["rule"]](pixels, spec, t, pictures, newline)


def tile_rows(spec):
    return spec["projector"].get("out_tokens") or spec["vision"]["image_tokens"]


def squares(pixels, s, p, **changed):
    h, w = pixels.shape[:2]
    cuts = [pixels[y : y + s, x : x + s] for y in range(0, h, s) for x in range(0, w, s)]
    return [preprocess(one, p, **changed) for one in cuts]


def anyres(pixels, spec, t, pictures, newline):
    p, s, rows = spec["preprocess"], spec["vision"]["image_size"], tile_rows(spec)
    h, w = pixels.shape[:2]
    token, more = spec["prompt"]["image_token"], int(t.get("newline", False))
    if t.get("single") and pictures > 1:
        one = preprocess(pixels, p, pad="square")[None]
        return one, token, [rows + more], lambda r: np.concatenate([r[0], newline[None]]) if more else r[0]

    def worth(resolution):
        rh, rw = resolution
        k = min(rw / w, rh / h)
        kept = min(int(w * k) * int(h * k), w * h)
        return kept, kept - rh * rw

    rh, rw = max(t["resolutions"], key=worth)
    down, across = rh // s, rw // s
    tiles = [preprocess(resize(pixels, p["size"], p["size"], p["resample"]), p)]
    fh, fw = (min(math.ceil(h * (rw / w)), rh), rw) if rw / w < rh / h else (rh, min(math.ceil(w * (rh / h)), rw))
    canvas = np.zeros((rh, rw, 3), np.uint8)
    top, left = (rh - fh) // 2, (rw - fw) // 2
    canvas[top : top + fh, left : left + fw] = resize(pixels, fw, fh, p["resample"])
    tiles += squares(canvas, s, p)
    side = math.isqrt(rows)
    full = lines, columns = side * down, side * across
    if w / h > columns / lines:
        lines -= (lines - int(round(h * (columns / w), 7))) // 2 * 2
    else:
        columns -= (columns - int(round(w * (lines / h), 7))) // 2 * 2
    shrunk = lines, columns
    if t.get("max_grid") and (r := math.sqrt(lines * columns / (t["max_grid"] * rows))) > 1.1:
        shrunk = int(lines // r), int(columns // r)

    def pack(r):
        grid = r[1:].reshape(down, across, side, side, -1).swapaxes(1, 2).reshape(*full, -1)
        y, x = (full[0] - lines) // 2, (full[1] - columns) // 2
        grid = grid[y : y + lines, x : x + columns]
        if shrunk != (lines, columns):
            for axis, m in enumerate(shrunk):
                grid = np.moveaxis(shrink(np.moveaxis(grid, axis, 0), m), 0, axis)
        if more:
            grid = np.concatenate([grid, np.tile(newline, (len(grid), 1, 1))], axis=1)
        return np.concatenate([r[0], grid.reshape(-1, grid.shape[-1])])

    return np.stack(tiles), token, [rows + shrunk[0] * (shrunk[1] + more)], pack


def shrink(rows, m):
    n = len(rows)
    at = np.maximum((np.arange(m, dtype=np.float32) + 0.5) * np.float32(n / m) - 0.5, 0)
    low = at.astype(int)
    part = (at - low).astype(np.float32)[:, None, None]
    return rows[low] * (1 - part) + rows[np.minimum(low + 1, n - 1)] * part


def ratio(pixels, spec, t, pictures, newline):
    p, s = spec["preprocess"], spec["vision"]["image_size"]
    h, w = pixels.shape[:2]
    least, most = t.get("min_tiles", 1), t.get("max_tiles", 1)
    grids = [(c, r) for c in range(1, most + 1) for r in range(1, most + 1) if least <= c * r <= most]
    best, nearest = (1, 1), math.inf
    for c, r in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        d = abs(w / h - c / r)
        if d < nearest or (d == nearest and w * h > 0.5 * s * s * c * r):
            best, nearest = (c, r), d
    c, r = best
    tiles = squares(resize(pixels, c * s, r * s, p["resample"]), s, p, resize="none")
    if c * r > 1 and t.get("overview", "first") == "last":
        tiles.append(preprocess(pixels, p))
    text = t.get("before", "") + spec["prompt"]["image_token"] + t.get("after", "")
    return np.stack(tiles), text, [len(tiles) * tile_rows(spec)], lambda rows: rows.reshape(-1, rows.shape[-1])


def split(pixels, spec, t, pictures, newline):
    p, s, token = spec["preprocess"], spec["vision"]["image_size"], spec["prompt"]["image_token"]
    h, w = pixels.shape[:2]
    if g := t.get("longest_edge", 0):
        q = w / h
        if w >= h:
            w, h = g, int(g / q)
            h += h % 2
        else:
            h, w = g, int(g * q)
            w += w % 2
        w, h = max(w, 1), max(h, 1)
        if max(w, h) > 4096:
            q = w / h
            w, h = (4096, max(int(4096 / q), 1)) if w >= h else (max(int(4096 * q), 1), 4096)
        pixels = resize(pixels, w, h, p["resample"])
    q = w / h
    if w >= h:
        w = math.ceil(w / s) * s
        h = math.ceil(int(w / q) / s) * s
    else:
        h = math.ceil(h / s) * s
        w = math.ceil(int(h * q) / s) * s
    down, across, tiles = h // s, w // s, []
    if t.get("max_tiles", 1) != 1:
        pixels = resize(pixels, w, h, p["resample"])
    if t.get("max_tiles", 1) == 1 or down * across == 1:
        down = across = 0
    else:
        tiles = squares(pixels, s, p, resize="none")
    tiles.append(preprocess(pixels, p))
    before, text = t.get("before", ""), ""
    for i in range(1, down + 1):
        text += "".join(f"{before}<row_{i}_col_{j}>{token}" for j in range(1, across + 1)) + "\n"
    text += ("\n" if down else "") + before + t.get("tag", "") + token + t.get("after", "")
    return np.stack(tiles), text, [tile_rows(spec)] * len(tiles), lambda rows: rows.reshape(-1, rows.shape[-1])
