"""The browser runtime's npm package, installed and compiled once for all tests."""

from __future__ import annotations

import fcntl
import functools
import subprocess
from pathlib import Path

WEB = Path(__file__).parent.parent / "runtimes" / "web"


@functools.cache
def built() -> Path:
    """The package's folder, with dist/ made of its sources; its packages are fetched where they are missing."""
    with (WEB / "package.json").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # two files of tests may ask at once
        _build()
    return WEB


def _build() -> None:
    installed, lock = WEB / "node_modules" / ".package-lock.json", WEB / "package-lock.json"
    if not installed.is_file() or installed.stat().st_mtime < lock.stat().st_mtime:
        _run("npm", "ci")
    made = WEB / "node_modules" / ".dist-made"  # others may be reading dist/: it is written only where it must be
    newest = max(file.stat().st_mtime for file in [lock, WEB / "tsconfig.json", *(WEB / "src").rglob("*.ts")])
    if not ((WEB / "dist").is_dir() and made.is_file()) or made.stat().st_mtime < newest:
        _run("npm", "run", "--silent", "build")
        made.touch()


def _run(*line: str) -> None:
    ran = subprocess.run(line, cwd=WEB, capture_output=True, text=True, timeout=600, check=False)
    assert ran.returncode == 0, f"{' '.join(line)}:\n{ran.stdout[-3000:]}{ran.stderr[-3000:]}"
