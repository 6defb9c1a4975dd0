"""The options of `vlm-run` and `vlm-serve` that say how a bundle runs, as `vlm_runtime.load` means them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from vlm_models.errors import InputError

if TYPE_CHECKING:
    from vlm_runtime.engine import KVCache

PANEL = "How it runs"

Engine = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="One for all parts (onnx), or one each (vision=onnx,language=gguf); else what the bundle holds.",
        rich_help_panel=PANEL,
    ),
]
Device = Annotated[str, typer.Option(metavar="NAME", help="cpu or cuda.", rich_help_panel=PANEL)]
Threads = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="CPU threads; one per core if not given.", rich_help_panel=PANEL),
]
MaxContext = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Fewer tokens of context than the bundle has: less memory.", rich_help_panel=PANEL
    ),
]
KVCacheType = Annotated[
    str | None,
    typer.Option(
        metavar="TYPE",
        help="Keys and values as f32, f16 or q8_0 (engine gguf); else what fits the weights.",
        rich_help_panel=PANEL,
    ),
]
FlashAttention = Annotated[
    bool | None,
    typer.Option(
        "--flash-attention/--no-flash-attention",
        help="Fused attention or not (engine gguf); else where the KV cache is not f32.",
        rich_help_panel=PANEL,
    ),
]
Verify = Annotated[
    bool, typer.Option("--verify/--no-verify", help="Check the SHA-256 of every file.", rich_help_panel=PANEL)
]


def known_device(device: str) -> Literal["cpu", "cuda"]:
    """The device asked for. Raises InputError for another word."""
    if device not in ("cpu", "cuda"):
        raise InputError(f"unknown device {device!r}: choose one of cpu, cuda")
    return cast(Literal["cpu", "cuda"], device)


def known_kv_cache(name: str | None) -> KVCache | None:
    """The KV cache type asked for. Raises InputError for another word."""
    from vlm_runtime.engine import KV_CACHES  # numpy is loaded where it is needed, not for --help

    if name is not None and name not in KV_CACHES:
        raise InputError(f"unknown KV cache type {name!r}: choose one of {', '.join(KV_CACHES)}")
    return name
