"""Who may ask: the API key, pages of other sites, and names that a resolver pointed at this machine.

The key is needed for everything but the chat page and /health, so that a new route is closed until it is opened here.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from vlm_models.errors import InputError
from vlm_runtime.server.limits import refuse

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

_KEY = re.compile(r"[!-~]+")
_ORIGIN = re.compile(r"https?://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?")


@dataclass(frozen=True)
class Access:
    """Who may ask: `api_key` (None: everybody who reaches the port), `origins` of pages of other sites ("*": all).

    `loopback`: the server listens on this machine alone. Raises InputError for a key or an origin of another form.
    """

    api_key: str | None = None
    origins: tuple[str, ...] = ()
    loopback: bool = True

    def __post_init__(self) -> None:
        if self.api_key is not None and not _KEY.fullmatch(self.api_key):
            raise InputError("the API key must be one or more printable ASCII characters without spaces")
        for origin in self.origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise InputError(f"--allow-origin {origin!r} is no origin: write https://chat.example.com, or *")


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def guarded(app: ASGIApp, access: Access) -> ASGIApp:
    """`app` for those who may ask: 421 wrong host, 403 other site's page, 401 wrong key; CORS for listed origins."""
    from starlette.middleware.cors import CORSMiddleware

    secret = None if access.api_key is None else _digest(access.api_key.encode("ascii"))

    async def keyed(scope: Scope, receive: Receive, send: Send) -> None:
        if secret is None or scope["type"] != "http" or _open(scope) or _right(_given(scope, b"authorization"), secret):
            return await app(scope, receive, send)
        wrong = "missing or wrong API key: send the header Authorization: Bearer KEY"
        return await refuse(send, 401, wrong, "invalid_api_key", {"www-authenticate": "Bearer"})

    shared: ASGIApp = keyed
    if access.origins:
        shared = CORSMiddleware(
            keyed,
            allow_origins=access.origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=("Retry-After",),
        )

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            host, origin = _given(scope, b"host"), _given(scope, b"origin")
            if access.loopback and access.api_key is None and not _known_host(host, access.origins):
                wrong = "the Host header names another machine: use 127.0.0.1 or localhost, or start with --api-key"
                return await refuse(send, 421, wrong, "wrong_host")
            if origin and not _allowed(origin[0], host, access.origins):
                wrong = "pages of this origin may not ask: start the server with --allow-origin for it"
                return await refuse(send, 403, wrong, "origin_not_allowed")
        return await shared(scope, receive, send)

    return serve


def _given(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _right(given: Sequence[str], secret: bytes) -> bool:
    """One header, `Bearer KEY`; digests are compared, so that time tells nothing of the key or its length."""
    scheme, _, key = given[0].partition(" ") if len(given) == 1 else ("", "", "")
    return hmac.compare_digest(_digest(key.strip().encode("latin-1")), secret) and scheme.lower() == "bearer"


def _open(scope: Scope) -> bool:
    path = scope["path"]
    return scope["method"] in ("GET", "HEAD") and (path in ("/", "/health") or path.startswith("/page/"))


def _known_host(given: Sequence[str], origins: Sequence[str]) -> bool:
    """Whether the Host header is one of this machine's own names, or of an allowed origin; HTTP/1.0 may have none."""
    if not given:
        return True
    try:
        name = urlsplit(f"//{given[0]}").hostname or ""
    except ValueError:
        return False
    return len(given) == 1 and (is_loopback(name) or any(name == urlsplit(origin).hostname for origin in origins))


def _allowed(origin: str, host: Sequence[str], origins: Sequence[str]) -> bool:
    """The page's own origin, or a listed one. Behind a proxy the scheme may differ, so hosts and ports are compared."""
    own = len(host) == 1 and origin.partition("://")[2] == host[0]
    return own or origin in origins or "*" in origins
