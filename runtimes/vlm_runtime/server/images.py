"""Pictures that a client names, as data URLs or on hosts that the server was started for: fetched, and their head read.

What is in the bytes decides, not what they are said to be; but what is said to be no picture is refused. TIFF is left
to `vlm-run`: its decoder is the largest and the oldest, and no browser sends it.
"""

from __future__ import annotations

import asyncio
import base64
import io
import ipaddress
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

from vlm_models.errors import ImageError, InputError
from vlm_runtime.server.limits import Limits

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
TYPES = ("image/png", "image/jpeg", "image/jpg", "image/webp", "image/gif", "image/bmp", "image/x-ms-bmp")
URL_CHARACTERS = 2048
_NAME = re.compile(r"(?=.{1,253}\Z)[a-z0-9]([a-z0-9-]{0,62})(\.[a-z0-9]([a-z0-9-]{0,62}))*")
_HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[^:=\[\]]+)(:(?P<port>[0-9]{1,5}))?(=(?P<address>[0-9a-f:.\[\]]+))?")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class Host:
    """A host of pictures: its name or address, the port (None: 80 for http, 443 for https), and where it is.

    With an `address` nobody is asked where the name is, and the address may be a private one.
    """

    name: str
    port: int | None = None
    address: Address | None = None


@dataclass(frozen=True)
class ImagePolicy:
    """Where pictures may come from, and how much: `file_bytes` each and `seconds` to fetch one, redirects included."""

    hosts: tuple[Host, ...] = ()
    limits: Limits = field(default_factory=Limits)
    file_bytes: int = 20 << 20
    seconds: float = 15.0


def image_policy(hosts: Sequence[str], limits: Limits) -> ImagePolicy:
    """The policy of `--image-host NAME[:PORT][=ADDRESS]`, repeated. Raises InputError for what is no host."""
    return ImagePolicy(tuple(map(parse_host, hosts)), limits)


def parse_host(text: str) -> Host:
    """`cdn.example.com`, `cdn.example.com:8443`, `10.0.0.5:9000`, `[::1]`, `pictures.lan=10.0.0.5`."""
    found = _HOST.fullmatch(text.lower())
    try:
        if found is None:
            raise ValueError
        name, port = found["name"].strip("[]").removesuffix("."), int(found["port"] or 0) or None
        given, itself = found["address"], _is_address(name)
        address = ipaddress.ip_address((given or name).strip("[]")) if given or itself else None
        if (given if itself else not _NAME.fullmatch(name)) or (port or 0) > 65535:
            raise ValueError
    except ValueError:
        example = "cdn.example.com, cdn.example.com:8443, 10.0.0.5 or pictures.lan=10.0.0.5"
        raise InputError(f"--image-host {text!r} is no host: write {example}") from None
    return Host(name, port, address)


async def fetch_images(urls: Sequence[str], policy: ImagePolicy) -> list[bytes]:
    """The pictures of one conversation, which together have no more bytes than a body may. Raises ImageError."""
    files, limit = list[bytes](), policy.limits.body_bytes
    for url in urls:
        files.append(await fetch_image(url, policy))
        if sum(map(len, files)) > limit:
            raise ImageError(f"the pictures have more than {limit} bytes together: send fewer or smaller ones")
    return files


async def fetch_image(url: str, policy: ImagePolicy) -> bytes:
    """The bytes of a picture that may be decoded: its format, pixels and edges are those that the policy allows.

    Raises ImageError for an address that is not allowed, what cannot be fetched, and what is no such picture.
    """
    if url[:5].lower() == "data:":
        content = _from_data_url(url)
    else:
        from vlm_runtime.server.fetch import get  # TLS is loaded where pictures are fetched

        content = await get(url, policy)
    if not content:
        raise ImageError("the picture is empty: it has 0 bytes")
    await asyncio.to_thread(check_picture, content, policy.limits)
    return content


def check_picture(content: bytes, limits: Limits) -> None:
    """Raise ImageError for what is no picture or has too many pixels; only its head is read."""
    from PIL import Image

    _check_webp(content, limits)  # Pillow makes two canvases of its size before it can be asked for that
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                width, height = image.size
        except Image.DecompressionBombError:
            raise ImageError(f"the picture has more than {limits.pixels} pixels: scale it down first") from None
        except Exception:  # decoders raise whatever a damaged head leads them to
            allowed = ", ".join(FORMATS)
            raise ImageError(f"the {len(content)} bytes are no picture: allowed are {allowed}") from None
    _check_size(width, height, limits)


def _check_size(width: int, height: int, limits: Limits) -> None:
    if width * height > limits.pixels or max(width, height) > limits.edge:
        raise ImageError(
            f"the picture has {width} × {height} pixels, at most {limits.pixels} and {limits.edge} an edge are "
            "allowed: scale it down first"
        )


def _check_webp(content: bytes, limits: Limits) -> None:
    """The size that the first chunk of a WebP file names. Source: RFC 9649, "VP8X", "VP8L"; RFC 6386, 9.1."""
    kind, at = content[12:16], 20
    if content[:4] != b"RIFF" or content[8:12] != b"WEBP" or len(content) < 30:
        return
    if kind == b"VP8X":  # both less one, 24 bits each
        _check_size(_little(content, at + 4, 3) + 1, _little(content, at + 7, 3) + 1, limits)
    if kind == b"VP8L":  # both less one, 14 bits each, after a byte of signature
        both = _little(content, at + 1, 4)
        _check_size((both & 0x3FFF) + 1, (both >> 14 & 0x3FFF) + 1, limits)
    if kind == b"VP8 ":  # 14 bits and two of scale each, after the frame's tag and start code
        _check_size(_little(content, at + 6, 2) & 0x3FFF, _little(content, at + 8, 2) & 0x3FFF, limits)


def _little(content: bytes, at: int, length: int) -> int:
    return int.from_bytes(content[at : at + length], "little")


def _from_data_url(url: str) -> bytes:
    """Source: RFC 2397; base64 alone, as OpenAI's API takes it."""
    head, comma, data = url[5:].partition(",")
    kind, *parameters = head.lower().split(";")
    if not comma or "base64" not in parameters:
        raise ImageError("a picture as a data URL must be data:image/png;base64,…")
    if kind.strip() and kind.strip() not in TYPES:
        raise ImageError(f"a data URL of type {kind[:40]!r} is no picture: allowed are {', '.join(FORMATS)}")
    try:
        return base64.b64decode(data, validate=True)
    except ValueError:
        raise ImageError("the data URL of a picture is not base64: is it complete?") from None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
