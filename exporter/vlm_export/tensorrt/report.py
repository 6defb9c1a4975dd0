"""What the console shows of a bundle's engines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from vlm_export.table import size
from vlm_runtime.manifest import Manifest

ENGINE = "tensorrt"


def engines(manifest: Manifest) -> dict[str, list[dict[str, Any]]]:
    """Part → the engines that the manifest lists of it."""
    parts = {name: by_engine[ENGINE] for name, by_engine in manifest.parts.items() if ENGINE in by_engine}
    return {name: [dict(one) for one in part.details.get("engines", ())] for name, part in parts.items()}


def engine_table(found: Mapping[str, list[dict[str, Any]]]) -> Table:
    """Engines down: what they are of, whom for, what they took."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold underline", caption_justify="left")
    for column in ("part", "devices"):
        table.add_column(column, no_wrap=True)
    for column in ("engine", "of fp16", "seconds", "memory"):
        table.add_column(column, justify="right", no_wrap=True)
    for part, some in found.items():
        for one in some:
            share = f"{one['of_fp16']:.0%}" if "of_fp16" in one else ""
            peak = size(one["peak_rss"]) if one.get("peak_rss") else ""
            table.add_row(part, one["profile"], size(one["bytes"]), share, f"{one['seconds']:.1f}", peak)
    sdks = sorted({f"{one['sdk']} {one['version']}" for some in found.values() for one in some})
    table.caption = f"built by {', '.join(sdks)}" if sdks else "no engines"
    return table
