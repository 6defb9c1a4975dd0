"""`python -m vlm_bench.export_speed CHECKPOINT`: seconds and memory of an int4 export, each step in a fresh process."""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from vlm_bench import report
from vlm_bench.measure import Rep, Stat, wait_idle
from vlm_bench.worker import Worker, status_mb
from vlm_models.command import run
from vlm_models.errors import CheckError


class Peak:
    """Largest anonymous memory (RssAnon: all but mapped files) of this process while the block runs, in MB."""

    def __enter__(self) -> Peak:
        self.mb, self._done = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(0.02):
            self.mb = max(self.mb, status_mb(os.getpid(), "RssAnon"))


def make_language_model(checkpoint: str, precision: str, threads: int) -> Rep:
    """Write the ONNX language model alone, streamed from the checkpoint; imports are not counted."""
    import_parts(threads)
    from vlm_export.target import silent
    from vlm_export.targets import onnx
    from vlm_models.model import load_model
    from vlm_quant.recipe import parse_recipe

    def rep(number: int) -> Mapping[str, float]:
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder, Peak() as peak:
            start = time.perf_counter()
            model = load_model(checkpoint)
            context = min(4096, model.spec.language.max_positions)
            recipe = parse_recipe(precision).language
            onnx.language_model(model.checkpoint, model.spec, recipe, Path(folder), context, silent)
            seconds = time.perf_counter() - start
        return {"seconds": seconds, "peak_anon_mb": peak.mb}

    return rep


def make_export(checkpoint: str, precision: str, check: bool, threads: int) -> Rep:
    """The whole export; a missed threshold is reported as parity 0, since random weights promise nothing at int4.

    Imports are counted, as in a command.
    """

    def rep(number: int) -> Mapping[str, float]:
        folder = Path(tempfile.mkdtemp(dir=Path.cwd()))
        passed = 1.0
        try:
            with Peak() as peak:
                start = time.perf_counter()
                import_parts(threads)
                from vlm_export import export

                try:
                    export(checkpoint, ["onnx"], folder / "bundle", precision=precision, check=check)
                except CheckError:
                    passed = 0.0
                seconds = time.perf_counter() - start
        finally:
            shutil.rmtree(folder)
        return {"seconds": seconds, "peak_anon_mb": peak.mb} | ({"parity_passed": passed} if check else {})

    return rep


def read_once(checkpoint: Path) -> None:
    """Bring the weights into the page cache, so that not the first step alone waits for the disk."""
    for file in sorted(checkpoint.glob("*.safetensors")):
        with file.open("rb", buffering=0) as stream:
            while stream.read(1 << 24):
                pass


def import_parts(threads: int) -> None:
    """What an export imports, with torch on `threads` threads."""
    import torch

    for module in ("transformers.models.llava", "vlm_export", "vlm_export.targets.onnx"):
        importlib.import_module(module)
    torch.set_num_threads(threads)


def command(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, such as vlm_bench.reference_shape writes.")],
    precision: Annotated[str, typer.Option(help="As for vlm-export.")] = "int4",
    threads: Annotated[int, typer.Option(min=1)] = 2,
    check: Annotated[bool, typer.Option(help="Measure the export with its check too.")] = True,
    idle: Annotated[float, typer.Option(help="Seconds to wait for an idle machine before each step.")] = 30.0,
    save: Annotated[bool, typer.Option("--save", help=f"Write the numbers into {report.RESULTS}.")] = False,
) -> None:
    """Seconds and peak memory beyond mapped files: the language model alone, the export, the export with its check.

    The weights are read once before, so that the disk's speed is not part of it. Bundles are written into the current
    folder and removed again.
    """
    console, path = Console(), str(checkpoint.absolute())
    steps = {
        "language model": ("vlm_bench.export_speed:make_language_model", (path, precision, threads)),
        "export, no check": ("vlm_bench.export_speed:make_export", (path, precision, False, threads)),
    }
    if check:
        steps["export, checked"] = ("vlm_bench.export_speed:make_export", (path, precision, True, threads))
    read_once(checkpoint)
    table = Table("step", "seconds", "peak MB beyond mapped", "idle before", "parity", title=f"{precision} export")
    results: dict[str, dict[str, Stat]] = {}
    for name, (maker, arguments) in steps.items():
        worker = Worker(maker, arguments, threads)
        try:
            idle_before = wait_idle(idle)
            values = {**worker(0), "import_s": worker.load_s}
        finally:
            worker.close()
        results[name] = {number: Stat(v, v, v, int(idle_before), 1) for number, v in values.items()}
        parity = {1.0: "passed", 0.0: "missed"}.get(values.get("parity_passed", -1.0), "not measured")
        table.add_row(
            name, f"{values['seconds']:.1f}", f"{values['peak_anon_mb']:.0f}", "yes" if idle_before else "no", parity
        )
    console.print(table)
    if save:
        console.print(str(report.save(report.record("export-speed", results, precision=precision, threads=threads))))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command(no_args_is_help=True)(command)
    run(app)
