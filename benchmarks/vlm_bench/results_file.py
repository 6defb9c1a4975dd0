"""Results as a JSON file: written whole or not at all, read with every field checked."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path

from vlm_bench.results import Results, readable
from vlm_models.errors import InputError
from vlm_models.plain import from_plain, to_plain

FORMAT, VERSION = "vlm-bench", 1
_MAX_BYTES = 256 << 20


def write_results(path: str | Path, results: Results) -> Path:
    """Write JSON atomically: a reader, or a crash, finds the old file or the new one. Raises InputError."""
    text = json.dumps(to_plain(results), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    return write_whole(path, text.encode("utf-8", "replace"))


def read_results(path: str | Path) -> Results:
    """The results in a JSON file. Raises InputError, one line, whatever is wrong with it."""
    path = Path(path)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InputError(f"{readable(path)} is larger than {_MAX_BYTES >> 20} MiB: not results of vlm-bench")
        data = json.loads(path.read_bytes(), parse_constant=_refuse, parse_float=_float)
    except OSError as error:
        raise InputError(f"cannot read {readable(path)}: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise InputError(f"{readable(path)} is not valid JSON: give a file that vlm-bench --json wrote") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise InputError(f'{readable(path)} has no "format": "{FORMAT}": give a file that this vlm-bench --json wrote')
    if type(data.get("version")) is not int or data["version"] != VERSION:
        raise InputError(
            f"{readable(path)} has version {str(data.get('version'))[:20]!r}, this vlm-bench reads version {VERSION}: "
            "update it or measure again"
        )
    try:
        return from_plain(Results, data, "results")
    except (InputError, OverflowError, RecursionError) as error:
        line = " ".join(str(error).split())
        raise InputError(f"{readable(path)}: {line[:300]}") from None


def write_whole(path: str | Path, content: bytes) -> Path:
    """Write a file all at once, through a temporary one beside it. Raises InputError where that cannot be."""
    path = Path(path)
    try:
        handle, name = tempfile.mkstemp(prefix=".vlm-bench-", suffix=".partial", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            mask = os.umask(0)
            os.umask(mask)
            Path(name).chmod(0o666 & ~mask)  # mkstemp's own is for the owner alone
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(f"cannot write {readable(path)}: {error.strerror or error}") from None
    return path


def _refuse(text: str) -> float:
    raise ValueError(text)


def _float(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text)
