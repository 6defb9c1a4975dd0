"""The chat page: `routes()` serves the files of `page/` at `/` and `/page/…`, with a policy that lets no text run.

It needs no key itself: the page asks for one when `/v1/models` answers 401, and sends it with each request.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

FOLDER = Path(__file__).parent / "page"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Nothing but these files may run or style the page, and no answer becomes markup. Pictures: blob: previews.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
    "trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class _File:
    """A file of the page, read once: its content, its type, and the tag by which a browser asks for it again."""

    content: bytes
    type: str
    tag: str


def routes() -> list[BaseRoute]:
    """Routes of the page: GET and HEAD for `/` (index.html) and for `/page/NAME`, one for each file there is.

    No path is made from what a client sends: a name that is not there is the application's 404.
    """
    files = {path.name: _read(path) for path in sorted(FOLDER.iterdir()) if path.suffix in TYPES}
    return [_route("/", files["index.html"]), *(_route(f"/page/{name}", file) for name, file in files.items())]


def _read(path: Path) -> _File:
    content = path.read_bytes()
    return _File(content, TYPES[path.suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')


def _route(path: str, file: _File) -> Route:
    async def serve(request: Request) -> Response:
        headers = {**HEADERS, "ETag": file.tag}
        if file.tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(file.content, headers={**headers, "Content-Type": file.type})

    return Route(path, serve, methods=["GET"], include_in_schema=False)
