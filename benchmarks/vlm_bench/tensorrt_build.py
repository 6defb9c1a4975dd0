"""`python -m vlm_bench.tensorrt_build CHECKPOINT`: engines of each precision: how long, how much memory, how large.

Engines are built by the SDK that is installed, as `vlm-export --target tensorrt` does, in a process of their own whose
peak memory is measured. Where parity is asked for, the ONNX graphs are compared with the checkpoint too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vlm_bench import report
from vlm_export import export
from vlm_models.errors import CheckError, InputError
from vlm_runtime.manifest import PARTS, Manifest, read_manifest

KV = ("concat", "scatter")
PRECISIONS = "fp16 bf16 int8 int4 int4:g128"


def rows(checkpoint: Path, precision: str, kv: str, profiles: tuple[str, ...], check: bool) -> Iterator[dict[str, Any]]:
    """One for each engine of a bundle that is exported and thrown away."""
    recipe = ",".join(f"{part}={precision}" for part in ("vision", "projector", "language"))
    with tempfile.TemporaryDirectory(prefix="tensorrt-build-") as folder:
        out = Path(folder) / "bundle"
        try:
            manifest = export(
                checkpoint, "tensorrt", out, precision=recipe, check=check, tensorrt_kv=kv, device_profiles=profiles  # type: ignore[arg-type]
            )  # fmt: skip
        except CheckError:
            manifest = read_manifest(out)
        for part in PARTS:
            details = manifest.parts[part]["tensorrt"].details
            for engine in details["engines"]:
                named = {key: engine[key] for key in ("bytes", "seconds", "peak_rss", "of_fp16", "layers", "weights")}
                about = {"precision": precision, "kv": kv, "part": part, "devices": engine["profile"]}
                sdk = {"sdk": f"{engine['sdk']} {engine['version']}", "onnx_bytes": details["data_bytes"]}
                yield {**about, **named, **sdk, **_parity(manifest, part)}


def _parity(manifest: Manifest, part: str) -> dict[str, Any]:
    """What parity says after the part; nothing where it was not measured."""
    stage = {"vision_encoder": "image_features", "projector": "image_embeds", "language_model": "logits"}[part]
    stages: Mapping[str, Any] = manifest.parity.get("tensorrt", {}).get("stages", {})
    return {key: stages[stage][key] for key in ("cosine", "relative_l2", "kl") if key in stages.get(stage, {})}


def shown(table: list[dict[str, Any]], title: str) -> Table:
    out = Table(title=title)
    headings = ("precision", "KV cache", "part", "engine, MB", "of fp16", "build, s", "peak RSS, GB", "cosine", "KL")
    for i, heading in enumerate(headings):
        out.add_column(heading, justify="left" if i < 3 else "right")
    for row in table:
        numbers = [f"{row['bytes'] / 1e6:.1f}", f"{row['of_fp16']:.2f}", f"{row['seconds']:.1f}"]
        parity = [f"{row['cosine']:.5f}" if "cosine" in row else "", f"{row['kl']:.4f}" if "kl" in row else ""]
        out.add_row(
            row["precision"], row["kv"], row["part"], *numbers, f"{row['peak_rss'] / 1e9:.2f}", *parity
        )  # fmt: skip
    return out


def command(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, such as vlm-demo writes.")],
    precisions: Annotated[str, typer.Option(help="Of all three parts, separated by spaces.")] = PRECISIONS,
    kv: Annotated[str, typer.Option(help="concat or scatter, or both with a space.")] = " ".join(KV),
    device_profile: Annotated[list[str] | None, typer.Option(help="As for vlm-export; repeat for several.")] = None,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Compare with the checkpoint too.")] = True,
    save: Annotated[bool, typer.Option("--save", help=f"Write the numbers into {report.RESULTS}.")] = False,
) -> None:
    """Build time, peak memory and size of TensorRT engines, and parity of the graphs they are built from."""
    console = Console()
    if unknown := [one for one in kv.split() if one not in KV]:
        raise InputError(f"unknown KV cache {unknown[0]!r}: choose of {', '.join(KV)}")
    table: list[dict[str, Any]] = []
    for precision in precisions.split():
        for one in kv.split():
            table += rows(checkpoint, precision, one, tuple(device_profile or ()), check)
            console.print(f"[dim]{precision}, {one}: done[/dim]")
            if save:  # what there is so far
                report.save(report.record(f"tensorrt-build-{checkpoint.absolute().name}", table=table))
    console.print(shown(table, f"TensorRT engines of {checkpoint.absolute().name}"))


if __name__ == "__main__":
    from vlm_models.command import run

    app = typer.Typer(add_completion=False)
    app.command(no_args_is_help=True)(command)
    run(app)
