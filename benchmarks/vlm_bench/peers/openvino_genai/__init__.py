"""OpenVINO GenAI's VLMPipeline on the CPU, on what optimum-intel exports of the checkpoint."""

from __future__ import annotations

from pathlib import Path

from vlm_bench.contestant import Contestant, python_argv
from vlm_bench.peer import OFFLINE, Job

PRECISIONS = ("int8", "int4", "fp16", "fp32")
PACKAGES = {
    "openvino_genai": "openvino-genai",
    "openvino": "openvino",
    "openvino_tokenizers": "openvino-tokenizers",
    "optimum.intel": "optimum-intel",
    "torch": "torch",
    "transformers": "transformers",
    "PIL": "pillow",
    "numpy": "numpy",
}
INSTALL = (
    "it needs transformers before 5.6, so an environment of its own: pip install openvino-genai "
    "'optimum-intel[openvino]==2.2.0' pillow there, then --peer openvino-genai=PYTHON"
)


def contestant(job: Job) -> Contestant:
    """The folder that optimum-intel writes, converted here or before."""

    def convert(folder: Path) -> list[str]:
        arguments = {"checkpoint": str(job.checkpoint.resolve()), "folder": str(folder), "precision": job.precision}
        job.script(Path(__file__).with_name("convert.py"), arguments)
        return []

    converted = job.converted(convert)
    weights = sorted([*converted.folder.glob("*.bin"), *converted.folder.glob("*.xml")])
    arguments = {
        "folder": str(converted.folder),
        "precision": job.precision,
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
