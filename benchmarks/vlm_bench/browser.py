"""The browser runtime in Chromium: a server of its files and of bundles, and a page on which it can be imported."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from vlm_models.errors import DependencyError, InputError

if TYPE_CHECKING:
    from playwright.sync_api import Browser

PACKAGE = Path(__file__).parents[2] / "runtimes" / "web"
PAGE = "web/example/index.html"
_TYPES = {".mjs": "text/javascript", ".js": "text/javascript", ".wasm": "application/wasm"}
_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


class _Files(SimpleHTTPRequestHandler):
    """Files below the folders of `roots`, by the first piece of the path, isolated so that threads are allowed."""

    roots: ClassVar[Mapping[str, Path]] = {}
    protocol_version = "HTTP/1.1"

    def guess_type(self, path: str | os.PathLike[str]) -> str:
        return _TYPES.get(Path(path).suffix) or super().guess_type(path)

    def translate_path(self, path: str) -> str:
        pieces = [p for p in path.partition("?")[0].split("/") if p]
        root = self.roots.get(pieces[0]) if pieces else None
        if root is None or ".." in pieces:
            return "/nowhere"
        return str(root.joinpath(*pieces[1:]))

    def end_headers(self) -> None:
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-store")
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the browser tells what it misses."""


@contextlib.contextmanager
def serving(folders: Mapping[str, Path], package: Path = PACKAGE) -> Iterator[str]:
    """Serve the browser runtime as /web/ and each of `folders` by its name, on a free port; yields the address.

    Raises InputError where the runtime is not built.
    """
    for needed in ("dist/index.js", "node_modules/onnxruntime-web/package.json"):
        if not (package / needed).is_file():
            raise InputError(f"{package} has no {needed}: run npm ci and npm run build there")
    handler = type("Files", (_Files,), {"roots": {"web": package, **folders}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def installed() -> str:
    """The path of this machine's browser. Raises DependencyError where there is none."""
    path = next(filter(None, map(shutil.which, _NAMES)), None)
    if path is None:
        raise DependencyError(f"no browser is installed: install one of {', '.join(_NAMES)}")
    return path


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """The browser of this machine, without a window. Raises DependencyError where it or playwright is missing."""
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        raise DependencyError("measuring a browser needs playwright: pip install playwright") from None
    path = installed()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()
