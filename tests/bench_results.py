"""Results of vlm-bench made by hand, and contestants that are a few lines of Python."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from vlm_bench.contestant import Contestant, python_argv
from vlm_bench.measure import Stat
from vlm_bench.results import (
    STAGES,
    Accuracy,
    Asked,
    Deviation,
    Drift,
    Energy,
    Environment,
    LoadTimes,
    Percentiles,
    Results,
    Row,
    Settings,
    Skipped,
    Words,
)

STAGE_MS = (10.0, 200.0, 5.0, 0.2, 250.0, 0.1, 400.0, 1.0)

# Answers with made-up times; notes who was asked what in a file; breaks down when told to.
SCRIPT = """
import hashlib, os, time
def make(name, log, dies_at=None, raises_at=None, cannot_load="", slow_s=0.0):
    if cannot_load:
        raise ImportError(cannot_load)
    print("a banner of a library")
    asked = 0
    def answer(prompt, image, max_new_tokens):
        nonlocal asked
        digest = hashlib.sha256(open(image, "rb").read()).hexdigest() if image else None
        with open(log, "a") as file:
            file.write(f"{name} {prompt} {digest}\\n")
        asked += 1
        if asked == dies_at:
            os.write(2, b"Killed by the test\\n")
            os._exit(7)
        if asked == raises_at:
            raise ValueError("no more")
        time.sleep(slow_s)
        stages = {"preprocess": 1.0, "vision": 2.0, "prefill": 3.0 + asked, "decode": 4.0}
        return {"wall_ms": 20.0 + asked, "text": "x", "new_tokens": max_new_tokens, "ttft_ms": 8.0, "tiles": 1,
                "token_ms": [float(n) for n in range(1, max_new_tokens)], "stages_ms": stages, "prompt_tokens": 30,
                "image_tokens": 16}
    return {"engines": {"language_model": "made-up"}, "precision": "fp8", "packages": {"made-up": "1.0"}}, answer
"""


def stat(value: float, *, best: float | None = None, quiet: int = 5) -> Stat:
    """A Stat around `value`."""
    return Stat(value, value if best is None else best, value, quiet, 5)


def made_row(name: str = "bundle-int4", **changes: Any) -> Row:
    """A row with everything measured; `changes` replaces fields."""
    row = Row(
        name=name,
        kind="bundle",
        engines={"vision_encoder": "onnx", "projector": "onnx", "language_model": "onnx"},
        precision="int4:g32",
        bytes_on_disk=160 << 20,
        stages_ms=dict(zip(STAGES, map(stat, STAGE_MS), strict=True)),
        ttft_ms=stat(466.0),
        token_ms=Percentiles(6.0, 7.0, 9.0),
        tokens_per_s=stat(160.0),
        wall_ms=stat(sum(STAGE_MS)),
        load_ms=LoadTimes(cold=900.0, warm=400.0),
        peak_rss_mb=240.0,
        gpu_mb=None,
        bytes_read=120 << 20,
        energy=Energy(12.0, 0.2, "rapl:package-0"),
        noisy=False,
        quiet=5,
        of=5,
        image_tokens=36.0,
        prompt_tokens=52.0,
        new_tokens=64.0,
        tiles=1.0,
    )
    return dataclasses.replace(row, **changes)


def made_results(*rows: Row, **changes: Any) -> Results:
    """A complete run of `rows`, or of one usual one; `changes` replaces fields."""
    asked = Asked("1", None, "How many?", "two", "three", "count", False, 0.0)
    words = (Words("equal", "it is", "it is"), Words("replace", "red", "blue"))
    results = Results(
        created="2026-01-01T00:00:00+00:00",
        command="vlm-bench bundle-int4",
        environment=Environment("A processor", 2, 23.5, "Linux", "3.11.7", {"numpy": "2.3.5"}),
        settings=Settings(2, 5, 64, ("noise",), ("What is this?",)),
        complete=True,
        rows=rows or (made_row(),),
        skipped=(Skipped("a-peer", "not installed"),),
        accuracy=(Accuracy("bundle-int4", "demo:1", 1, 0.9, 0.9, 0.95, interval=(0.8, 0.95), per_question=(asked,)),),
        drift=(
            Drift(
                "a", "b", None, "What?", {"vision": Deviation(1.0, None, 0.0)}, None, "it is blue", "it is red", words
            ),
        ),
    )
    return dataclasses.replace(results, **changes)


def made_up(folder: Path, name: str, **arguments: Any) -> Contestant:
    """A contestant of SCRIPT that notes in folder/log what it is asked."""
    script = folder / "made_up.py"
    script.write_text(SCRIPT)
    argv = python_argv(f"{script}:make", {"name": name, "log": str(folder / "log"), **arguments})
    return Contestant(name, "peer", argv, bytes_on_disk=7)
