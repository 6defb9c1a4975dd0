"""ONNX Runtime GenAI: its builder's language model and its generator, with the vision graph in plain ONNX Runtime.

GenAI has no LLaVA of its own. Its pipeline for pictures is given rows that ONNX Runtime made, as its users do it.
"""

from __future__ import annotations

from pathlib import Path

from vlm_bench.contestant import Contestant, python_argv
from vlm_bench.peer import OFFLINE, Job

PRECISIONS = ("int4", "fp32")
PACKAGES = {
    "onnxruntime_genai": "onnxruntime-genai",
    "onnxruntime": "onnxruntime",
    "onnx": "onnx",
    "onnx_ir": "onnx-ir",
    "onnxscript": "onnxscript",
    "torch": "torch",
    "transformers": "transformers",
    "PIL": "pillow",
    "numpy": "numpy",
}
INSTALL = (
    "pip install onnxruntime-genai onnxscript torch transformers pillow, or give --peer onnxruntime-genai=PYTHON of an "
    "environment that has them"
)


def contestant(job: Job) -> Contestant:
    """The folder that its builder and torch.onnx write, converted here or before."""

    def convert(folder: Path) -> list[str]:
        arguments = {"checkpoint": str(job.checkpoint.resolve()), "folder": str(folder), "precision": job.precision}
        job.script(Path(__file__).with_name("convert.py"), arguments)
        return []

    converted = job.converted(convert)
    weights = sorted(path for path in converted.folder.iterdir() if ".onnx" in path.name)
    arguments = {
        "folder": str(converted.folder),
        "checkpoint": str(job.checkpoint.resolve()),
        "precision": f"language={job.precision},vision=fp32",
        "threads": job.threads,
        "prompts": job.prompts,
        "versions": dict(job.versions),
    }
    return Contestant(
        name=job.title,
        kind="peer",
        argv=python_argv(f"{Path(__file__).with_name('serve.py')}:serve", arguments, job.python),
        files=tuple(map(str, weights)),
        env=OFFLINE,
        bytes_on_disk=sum(path.stat().st_size for path in weights),
        notes=(converted.told,),
    )
