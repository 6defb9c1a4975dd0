"""The light runtime that is copied to a device: the sources of four packages as one zip file, the same every time."""

from __future__ import annotations

import importlib.util
import io
import zipfile
from pathlib import Path

PACKAGES = ("vlm_models", "vlm_quant", "vlm_runtime", "vlm_bench")
_SUFFIXES = {".py", ".json", ".typed", ".j2", ".html", ".css", ".js"}


def archive() -> bytes:
    """A zip file of the packages that measure; no weights. No torch is needed to import what runs there."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as out:
        for package in PACKAGES:
            folder = _folder(package)
            for file in sorted(folder.rglob("*")):
                if file.suffix in _SUFFIXES and file.is_file():
                    name = f"{package}/{file.relative_to(folder).as_posix()}"
                    info = zipfile.ZipInfo(name, (2026, 1, 1, 0, 0, 0))  # the same bytes whenever it is made
                    info.external_attr = 0o644 << 16
                    info.compress_type = zipfile.ZIP_DEFLATED
                    out.writestr(info, file.read_bytes())
    return content.getvalue()


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None  # a package of this project, which has an __init__
    return Path(spec.origin).parent
