"""Pictures as small data URLs, so that a report is one file."""

from __future__ import annotations

import base64
import binascii
import io
import re
import warnings
from pathlib import Path

from PIL import Image

SIDE = 160  # CSS pixels; twice as many are kept for sharp screens
_DATA = re.compile(r"data:image/[\w.+-]+;base64,(?P<bytes>[A-Za-z0-9+/=\s]+)\Z")
_MAX_PIXELS = 64 << 20


def thumbnail(source: str | None) -> str | None:
    """A data URL of the picture at a path or in a data URL, drawn anew; None where there is no such picture here.

    A report may come from another machine, with paths that mean nothing or something else here.
    """
    if source is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, about size and metadata of what it reads
            return _drawn(source)
    except (OSError, ValueError, SyntaxError, binascii.Error, Image.DecompressionBombError):
        return None


def _drawn(source: str) -> str | None:
    file: Path | io.BytesIO = Path(source)
    if source.startswith("data:"):
        found = _DATA.match(source)
        if found is None:
            return None
        file = io.BytesIO(base64.b64decode(found["bytes"]))
    elif not Path(source).is_file():  # nor a pipe, which would never end
        return None
    with Image.open(file) as image:
        if image.width * image.height > _MAX_PIXELS:
            return None
        image.draft("RGB", (2 * SIDE, 2 * SIDE))
        small = _opaque(image)
        small.thumbnail((2 * SIDE, 2 * SIDE))
    out = io.BytesIO()
    small.save(out, "WEBP", quality=70, method=4)
    return f"data:image/webp;base64,{base64.b64encode(out.getvalue()).decode()}"


def _opaque(image: Image.Image) -> Image.Image:
    """RGB, transparent parts white."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    white = Image.new("RGBA", layer.size, "white")
    white.alpha_composite(layer)
    return white.convert("RGB")
