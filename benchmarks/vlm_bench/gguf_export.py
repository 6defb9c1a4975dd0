"""`python -m vlm_bench.gguf_export CHECKPOINT --llama-cpp DIR`: our GGUF language model beside llama.cpp's converter.

DIR is llama.cpp's source, as it lies in the source distribution of llama-cpp-python (vendor/llama.cpp). The converter's
table of known tokenizers is bypassed, since it does not know the random checkpoint's; the weights are all that counts.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from vlm_bench import report
from vlm_bench.export_speed import Peak, import_parts, read_once
from vlm_bench.measure import Rep, interleave, ratio
from vlm_bench.worker import workers
from vlm_models.command import run
from vlm_models.errors import InputError

OURS, THEIRS = "vlm-export", "llama.cpp convert_hf_to_gguf"


def make_ours(checkpoint: str, type_name: str, threads: int) -> Rep:
    """Write the GGUF language model alone, without its tokenizer's check; imports are not counted."""
    import_parts(threads)
    from vlm_export.gguf.architecture import architecture
    from vlm_export.gguf.file import write_gguf
    from vlm_export.gguf.tensors import tensors
    from vlm_export.target import silent
    from vlm_models.model import load_model
    from vlm_quant.gguf_types import GGUF_TYPES

    def rep(number: int) -> Mapping[str, float]:
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder, Peak() as peak:
            start = time.perf_counter()
            model = load_model(checkpoint)
            spec = model.spec
            context = min(4096, spec.language.max_positions)
            arch = architecture(spec.language, context)
            no_words = {"tokenizer.ggml.model": "none"}
            path, weights = Path(folder) / "model.gguf", tensors(model.checkpoint, spec)
            write_gguf(path, arch, {}, weights, GGUF_TYPES[type_name], no_words, progress=silent)
            return {
                "seconds": time.perf_counter() - start,
                "peak_anon_mb": peak.mb,
                "written_mb": path.stat().st_size / 1e6,
            }

    return rep


def make_theirs(checkpoint: str, type_name: str, source: str) -> Rep:
    """Run the converter's own `main` in this process; imports are not counted."""
    sys.path.insert(0, source)
    convert: Any = importlib.import_module("convert_hf_to_gguf")
    base: Any = importlib.import_module("conversion.base")
    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"

    def rep(number: int) -> Mapping[str, float]:
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder, Peak() as peak:
            path = Path(folder) / "model.gguf"
            sys.argv = ["convert", checkpoint, "--outfile", str(path), "--outtype", type_name]
            start = time.perf_counter()
            convert.main()
            return {
                "seconds": time.perf_counter() - start,
                "peak_anon_mb": peak.mb,
                "written_mb": path.stat().st_size / 1e6,
            }

    return rep


def _numbers(start: float, peak: Peak, path: Path) -> Mapping[str, float]:
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_anon_mb": peak.mb, "written_mb": path.stat().st_size / 1e6}


def command(
    checkpoint: Annotated[Path, typer.Argument(help="As vlm_bench.reference_shape --shape 7b writes it.")],
    llama_cpp: Annotated[Path, typer.Option(help="llama.cpp's source folder, with convert_hf_to_gguf.py.")],
    kind: Annotated[str, typer.Option("--type", help="f16, bf16 or q8_0: what the converter writes too.")] = "q8_0",
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    idle: Annotated[float, typer.Option(help="Seconds to wait for an idle machine before each repeat.")] = 30.0,
    save: Annotated[bool, typer.Option("--save", help=f"Write the numbers into {report.RESULTS}.")] = False,
) -> None:
    """Seconds and peak memory beyond mapped files of both, interleaved, after the weights were read once."""
    if not (llama_cpp / "convert_hf_to_gguf.py").is_file():
        raise InputError(f"{llama_cpp} has no convert_hf_to_gguf.py: give llama.cpp's source folder")
    console, path = Console(), str(checkpoint.absolute())
    makers = {
        OURS: ("vlm_bench.gguf_export:make_ours", (path, kind, threads)),
        THEIRS: ("vlm_bench.gguf_export:make_theirs", (path, kind, str(llama_cpp.absolute()))),
    }
    read_once(checkpoint)
    with workers(makers, threads) as reps:
        results = interleave(reps, repeats, idle_s=idle, watch=report.status(console))
    columns = {"seconds": "seconds", "peak_anon_mb": "peak MB beyond mapped", "written_mb": "MB written"}
    console.print(report.table(f"{kind} language model", results, columns))
    report.warn_if_loud(console, results)
    times = ratio(results, OURS, THEIRS, "seconds")
    console.print(f"time, ours over theirs: {times:.2f}")
    if save:
        record = report.record("gguf-export", results, type=kind, threads=threads, ratio=times)
        console.print(str(report.save(record)))


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command(no_args_is_help=True)(command)
    run(app)
