"""Pictures: any file a user may give to RGB, and RGB to the pixel values the checkpoint's own processor makes.

Files are untrusted. What the processor leaves open is decided so: EXIF orientation is applied; transparency is laid
over white, as transformers does with an image; 16-bit grey is scaled to 8 bits (Pillow alone would clip it); of an
animation the first frame is taken; colour profiles are not applied.
"""

from __future__ import annotations

import functools
import io
import math
import os
import warnings
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vlm_models.errors import ImageError
from vlm_models.spec import PreprocessSpec

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 178_956_970  # Pillow's own limit for decompression bombs
MAX_RESIZED_PIXELS = 64_000_000  # what a very long picture may become on its way to the centre crop


def open_image(source: str | os.PathLike[str] | bytes | Image.Image) -> Image.Image:
    """The picture as upright 8-bit RGB, from a path, the bytes of a file, or a Pillow image.

    Raises ImageError, one line, for whatever is not a picture that can be decoded, or holds more than MAX_PIXELS.
    """
    from PIL import Image

    if isinstance(source, Image.Image):
        return _decode(source, "the image")
    if isinstance(source, bytes | bytearray | memoryview):
        return _read(io.BytesIO(source), f"the image of {len(source)} bytes")
    if not isinstance(source, str | os.PathLike):
        raise ImageError(f"an image is a path, bytes or a Pillow image, not {type(source).__name__}")
    path = Path(source)
    try:
        if not path.exists():
            raise ImageError(f"no such image: {path}")
        if not path.is_file():
            raise ImageError(f"{path} is not a file: give the path of one picture ({', '.join(FORMATS)})")
        with path.open("rb") as file:
            return _read(file, str(path))
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise ImageError(f"cannot read image {path}: {_line(error)}") from None


def preprocess(image: Image.Image, spec: PreprocessSpec) -> NDArray[np.float32]:
    """Pixel values (3, s, s) of an RGB picture: pad, resize, centre crop, rescale, normalise, as transformers does.

    s is `spec.crop`, or `spec.size` where nothing is cropped. Raises ImageError for a picture so long and thin that
    it cannot be resized, or one that does not come out square.
    """
    if image.mode != "RGB":
        image = _decode(image, "the image")
    if spec.pad == "square":
        image = _pad(image, spec.pad_color)
    if spec.resize != "none":
        image = _resize(image, spec)
    pixels = np.asarray(image)  # (h, w, 3) uint8
    if spec.crop:
        pixels = _centre_crop(pixels, spec.crop)
    edge = spec.crop or spec.size
    if pixels.shape != (edge, edge, 3):
        raise ImageError(
            f"the picture came out as {pixels.shape[1]} × {pixels.shape[0]} pixels, the vision encoder takes "
            f"{edge} × {edge}: crop it to a square first"
        )
    table = _values(spec.rescale, spec.mean, spec.std)
    out = np.empty((3, edge, edge), np.float32)
    for channel in range(3):
        np.take(table[channel], pixels[:, :, channel], out=out[channel])
    return out


@functools.lru_cache(maxsize=8)
def _values(rescale: float, mean: tuple[float, ...], std: tuple[float, ...]) -> NDArray[np.float32]:
    """The value of each of the 256 levels of each channel (3, 256), rounded where transformers rounds."""
    scaled = (np.arange(256, dtype=np.float64) * rescale).astype(np.float32)
    return (scaled[None] - np.array(mean, np.float32)[:, None]) / np.array(std, np.float32)[:, None]


def _read(file: IO[bytes], name: str) -> Image.Image:
    from PIL import Image, UnidentifiedImageError

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of large pictures and odd metadata; errors are what counts
        try:
            with Image.open(file, formats=FORMATS) as image:
                return _decode(image, name)
        except ImageError:
            raise
        except UnidentifiedImageError:
            raise ImageError(f"{name} is not a picture: allowed are {', '.join(FORMATS)}") from None
        except Image.DecompressionBombError:
            raise ImageError(f"{name} has more than {MAX_PIXELS} pixels: scale it down first") from None
        except Exception as error:  # decoders raise whatever a damaged file leads them to
            raise ImageError(f"{name} cannot be decoded ({_line(error)}): is the file complete?") from None


def _decode(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"{name} has {width} × {height} pixels, at most {MAX_PIXELS} are allowed: scale it down first")
    if not width or not height:
        raise ImageError(f"{name} has no pixels: {width} × {height}")
    try:
        image.load()
        return _rgb(_upright(image), name)
    except ImageError:
        raise
    except Exception as error:  # as above: decoding happens here
        raise ImageError(f"{name} cannot be decoded ({_line(error)}): is the file complete?") from None


def _upright(image: Image.Image) -> Image.Image:
    from PIL import ImageOps

    try:
        return image if image.getexif().get(0x0112, 1) == 1 else ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data does not damage the picture
        return image


def _rgb(image: Image.Image, name: str) -> Image.Image:
    from PIL import Image

    if image.mode.startswith("I;16"):
        return _rgb(_eight_bits(image), name)
    if image.mode in ("I", "F"):
        values = np.asarray(image)
        low, high = float(values.min()), float(values.max())  # NaN where there is one
        if not (0 <= low <= high <= 255) or (image.mode == "F" and 0 < high <= 1):
            raise ImageError(
                f"{name} holds 32-bit numbers from {low:.6g} to {high:.6g}, whose black and white are not known: "
                "save it with 8 or 16 bits"
            )
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey by its upper byte, as Pillow does itself for 16-bit colour; a transparent level becomes alpha."""
    from PIL import Image

    levels = np.asarray(image).astype(np.uint16, copy=False)
    grey = Image.fromarray((levels >> 8).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(levels == transparent, 0, 255).astype(np.uint8)))
    return grey


def _resize(image: Image.Image, spec: PreprocessSpec) -> Image.Image:
    from PIL import Image

    width, height = image.size
    if spec.resize == "exact":
        return image.resize((spec.size, spec.size), Image.Resampling(spec.resample))
    if spec.resize == "longest_edge":
        scale = spec.size / max(width, height)
        fitted = max(round(width * scale), spec.least), max(round(height * scale), spec.least)
        return _pad(image.resize(fitted, Image.Resampling(spec.resample)), spec.pad_color)
    longer = int(spec.size * max(width, height) / min(width, height))
    if longer * spec.size > MAX_RESIZED_PIXELS:
        raise ImageError(
            f"a picture of {width} × {height} pixels is too long and thin: with its shorter edge at {spec.size} it "
            f"would be {longer} long; crop it first"
        )
    size = (spec.size, longer) if width <= height else (longer, spec.size)
    return image.resize(size, Image.Resampling(spec.resample))


def _pad(image: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    from PIL import Image

    width, height = image.size
    if width == height:
        return image
    edge = max(width, height)
    if edge * edge > MAX_PIXELS:
        raise ImageError(
            f"a picture of {width} × {height} pixels padded to a square would have {edge} × {edge} pixels, at most "
            f"{math.isqrt(MAX_PIXELS)} × {math.isqrt(MAX_PIXELS)} are allowed: scale it down or crop it first"
        )
    square = Image.new("RGB", (edge, edge), color)
    square.paste(image, ((edge - width) // 2, (edge - height) // 2))
    return square


def _centre_crop(pixels: NDArray[np.uint8], edge: int) -> NDArray[np.uint8]:
    """The middle edge × edge pixels; a smaller picture stands in the middle of black, where transformers puts it."""
    height, width = pixels.shape[:2]
    top, left = (height - edge) // 2, (width - edge) // 2
    if top >= 0 and left >= 0:
        return pixels[top : top + edge, left : left + edge]
    out = np.zeros((max(edge, height), max(edge, width), 3), np.uint8)
    above, before = -((height - len(out)) // 2), -((width - out.shape[1]) // 2)
    out[above : above + height, before : before + width] = pixels
    top, left = top + above, left + before
    return out[max(0, top) : top + edge, max(0, left) : left + edge]


def _line(error: BaseException) -> str:
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    return text[:200] or type(error).__name__
