"""Hugging Face transformers on PyTorch, eager, on the CPU: what most people run a checkpoint with."""

from __future__ import annotations

from pathlib import Path

from vlm_bench.contestant import Contestant, python_argv
from vlm_bench.peer import OFFLINE, Job

PRECISIONS = ("fp32", "bf16", "fp16")
PACKAGES = {"torch": "torch", "transformers": "transformers", "PIL": "pillow"}
INSTALL = "pip install torch transformers pillow, or give --peer transformers=PYTHON of an environment that has them"


def contestant(job: Job) -> Contestant:
    """The checkpoint as it is; nothing is converted."""
    weights = sorted(path for kind in ("*.safetensors", "*.bin") for path in job.checkpoint.glob(kind))
    arguments = {
        "checkpoint": str(job.checkpoint.resolve()),
        "precision": job.precision,
        "threads": job.threads,
        "prompts": job.prompts,
        "versions": dict(job.versions),
    }
    return Contestant(
        name=job.title,
        kind="peer",
        argv=python_argv(f"{Path(__file__).with_name('serve.py')}:serve", arguments, job.python),
        files=tuple(str(path.resolve()) for path in weights),
        env=OFFLINE,
        bytes_on_disk=sum(path.stat().st_size for path in weights),
    )
