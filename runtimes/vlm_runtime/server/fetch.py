"""A file from a listed host by HTTP/1.1, from nowhere else: no private network, no proxy, no cookie, no surprise.

The name is resolved once, every address it has must be public, and the connection goes to the address that was
checked, so that a name cannot lead elsewhere a moment later. A redirect is a new address and is checked as one.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import re
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

import h11

from vlm_models.errors import ImageError
from vlm_runtime.server.images import TYPES, URL_CHARACTERS, Address, Host, ImagePolicy

_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_HOPS = 3
_PRINTABLE = re.compile(r"[!-~]+")  # no space, no line break, nothing outside ASCII
_UNSAID = ("application/octet-stream", "binary/octet-stream")  # what stores say of files they know nothing of
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # RFC 6052: an IPv4 address in its last 32 bits


@dataclass(frozen=True)
class Place:
    """Where a URL leads: `target` is path and query; `host` the listed one it belongs to."""

    scheme: str
    host: Host
    port: int
    target: str

    @property
    def authority(self) -> str:
        """For the Host header."""
        name = f"[{self.host.name}]" if ":" in self.host.name else self.host.name
        return name if self.port == _PORTS[self.scheme] else f"{name}:{self.port}"


async def get(url: str, policy: ImagePolicy) -> bytes:
    """The file at `url`. Raises ImageError for an address that is not allowed, and for whatever goes wrong there."""
    place = locate(url, policy)
    try:
        async with asyncio.timeout(policy.seconds):
            for _ in range(1 + _HOPS):
                answer = await _ask(place, policy)
                if isinstance(answer, bytes):
                    return answer
                here = f"{place.scheme}://{place.authority}{place.target}"
                after = locate(urljoin(here, answer), policy)
                if (place.scheme, after.scheme) == ("https", "http"):
                    raise ImageError(f"the picture's host {place.host.name} redirects from https to http")
                place = after
    except TimeoutError:
        raise _failed(place, f"it took more than {policy.seconds:g} seconds") from None
    except (OSError, h11.ProtocolError) as error:
        raise _failed(place, _reason(error)) from None
    raise _failed(place, f"it redirects more than {_HOPS} times")


def locate(url: str, policy: ImagePolicy) -> Place:
    """Where `url` leads, if that is allowed. No name is resolved for one that is not."""
    names = sorted({host.name for host in policy.hosts})
    allowed = f"data URLs and pictures of {', '.join(names)}" if names else "data URLs"
    if len(url) > URL_CHARACTERS:
        raise ImageError(f"the address of a picture has {len(url)} characters: at most {URL_CHARACTERS} are allowed")
    try:
        if not _PRINTABLE.fullmatch(url) or "\\" in url:
            raise ValueError
        parts = urlsplit(url)
        name, port = (parts.hostname or "").removesuffix("."), parts.port
    except ValueError:
        raise ImageError(f"{_short(url)} is no address of a picture: allowed are {allowed}") from None
    if parts.scheme not in _PORTS:
        raise ImageError(f"{_short(url)} is no address of a picture: allowed are {allowed}")
    if "@" in parts.netloc:
        raise ImageError("the address of a picture must hold no user name or password")
    port = _PORTS[parts.scheme] if port is None else port
    for host in policy.hosts:
        if host.name == name and port == (host.port or _PORTS[parts.scheme]):
            return Place(parts.scheme, host, port, (parts.path or "/") + (f"?{parts.query}" if parts.query else ""))
    raise ImageError(f"pictures of {_short(parts.netloc)} are not taken: allowed are {allowed}")


def is_public(address: Address) -> bool:
    """Whether an address is of the open internet, also the IPv4 address that an IPv6 one may carry."""
    if isinstance(address, ipaddress.IPv6Address):
        carried = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]
        if address in _NAT64:
            carried = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if carried is not None:
            return is_public(carried)
        if address.is_site_local:
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


async def addresses(place: Place) -> Sequence[Address]:
    """The addresses to try. Raises ImageError where one of them is not public and was not listed."""
    if place.host.address is not None:
        return [place.host.address]
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(place.host.name, place.port, type=socket.SOCK_STREAM)
    given = list(dict.fromkeys(ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found))
    if not given or not all(map(is_public, given)):
        raise ImageError(f"the picture's host {place.host.name} is not on the open internet, which is not allowed")
    return given


async def _ask(place: Place, policy: ImagePolicy) -> bytes | str:
    """The file, or where it is said to be."""
    reader, writer = await _connect(place)
    try:
        connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=16 << 10)
        head = [("Host", place.authority), ("Accept", "image/*"), ("Accept-Encoding", "identity")]
        head += [("User-Agent", "vlm-serve"), ("Connection", "close")]
        request = h11.Request(method="GET", target=place.target, headers=head)
        writer.write(connection.send(request) or b"")
        writer.write(connection.send(h11.EndOfMessage()) or b"")
        await writer.drain()
        content = bytearray()
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(1 << 16))
            elif isinstance(event, h11.Response):
                if event.status_code in _REDIRECTS:
                    return _header(event, "location")
                _check_head(event, place, policy)
            elif isinstance(event, h11.Data):
                content += event.data
                if len(content) > policy.file_bytes:
                    raise _failed(place, f"it has more than {policy.file_bytes} bytes")
            elif isinstance(event, h11.EndOfMessage):
                return bytes(content)
            elif not isinstance(event, h11.InformationalResponse):
                raise _failed(place, "it was cut off")
    finally:
        writer.transport.abort()  # nothing is owed to the host, and TLS would wait for its goodbye


async def _connect(place: Place) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to the first address that takes one; TLS is for the name."""
    secure = {"ssl": _tls(), "server_hostname": place.host.name} if place.scheme == "https" else {}
    failed: OSError = OSError("it has no address")
    for address in await addresses(place):
        try:
            return await asyncio.open_connection(str(address), place.port, limit=1 << 16, **secure)  # type: ignore[arg-type]
        except OSError as error:
            failed = error
    raise failed


def _check_head(response: h11.Response, place: Place, policy: ImagePolicy) -> None:
    if response.status_code != 200:
        raise _failed(place, f"it answered with status {response.status_code}")
    kind = _header(response, "content-type").partition(";")[0].strip().lower()
    if kind and kind not in (*TYPES, *_UNSAID):
        raise _failed(place, f"it is {_short(kind)} and no picture")
    if _header(response, "content-encoding").lower() not in ("", "identity"):
        raise _failed(place, "it came compressed")
    length = _header(response, "content-length")
    if length and int(length) > policy.file_bytes:
        raise _failed(place, f"it has {length} bytes, more than {policy.file_bytes}")


@functools.cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _header(response: h11.Response, name: str) -> str:
    return next((value.decode("latin-1") for key, value in response.headers if key == name.encode()), "")


def _failed(place: Place, why: str) -> ImageError:
    return ImageError(f"the picture of {place.authority} could not be fetched: {why}")


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return "its certificate is not valid for that name"
    if isinstance(error, ssl.SSLError):
        return "TLS failed"
    if isinstance(error, socket.gaierror):
        return "its name has no address"
    return "its answer is broken or cut off" if isinstance(error, h11.ProtocolError) else "no connection"


def _short(text: str) -> str:
    """The beginning of what a client wrote, as one line of ASCII."""
    return ascii(text[:60]) + ("…" if len(text) > 60 else "")
