"""llama.cpp with its own image path: an mmproj file and a GGUF, both written by this project's target gguf."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlm_bench.contestant import Contestant, python_argv
from vlm_bench.peer import Job
from vlm_models.errors import DependencyError

PRECISIONS = ("fp16", "fp32", "int8", "int4")
PACKAGES = {"llama_cpp": "llama-cpp-python", "PIL": "pillow", "numpy": "numpy"}
INSTALL = (
    "pip install llama-cpp-python pillow (builds llama.cpp, minutes), or give --peer llamacpp=PYTHON of an "
    "environment that has it"
)
_MODEL, _MMPROJ = "gguf/language_model.gguf", "gguf/mmproj.gguf"


def contestant(job: Job) -> Contestant:
    """The two files, converted here or before. Raises DependencyError where llama.cpp has no graph for the model."""
    converted = job.converted(lambda folder: _convert(job, folder))
    files = [converted.folder / _MODEL, converted.folder / _MMPROJ]
    arguments = {
        "language": str(files[0]),
        "mmproj": str(files[1]),
        "precision": f"language={job.precision},vision={'fp32' if job.precision == 'fp32' else 'fp16'}",
        "threads": job.threads,
        "context": job.max_context,
        "prompts": job.prompts,
        "versions": dict(job.versions),
    }
    return Contestant(
        name=job.title,
        kind="peer",
        argv=python_argv(f"{Path(__file__).with_name('serve.py')}:serve", arguments, job.python),
        files=tuple(map(str, files)),
        bytes_on_disk=sum(path.stat().st_size for path in files),
        notes=(converted.told, *converted.notes),
    )


def _convert(job: Job, folder: Path) -> Sequence[str]:
    """Write both files by this project's own target; the notes say how far llama.cpp's rows are from the checkpoint."""
    try:
        from vlm_export import golden
        from vlm_export.pairs import calibration_pairs
        from vlm_export.reference import compute_reference
        from vlm_export.target import Job as Build
        from vlm_export.target import find_target
        from vlm_models.model import load_model
        from vlm_quant.recipe import parse_recipe
    except ImportError as error:
        raise DependencyError(
            f"GGUF files are written by vlm-export ({error}): pip install 'vlm-export[gguf]'"
        ) from None
    model, target, recipe = load_model(job.checkpoint), find_target("gguf"), parse_recipe(job.precision)
    parts, pairs = ("language_model",), calibration_pairs(model.checkpoint, None)
    target.requires(recipe, model.spec, parts, job.max_context)
    build = Build(model, recipe, folder, job.max_context, parts, calibration=pairs)
    written = target.build(build)
    if not (folder / _MMPROJ).is_file():
        raise DependencyError(f"llama.cpp cannot see with it: {written['language_model'].details['no_mmproj']}")
    picture = golden.write_picture(folder)
    reference = compute_reference(model, picture, golden.prompt(model.spec.prompt), tokens=1)
    return [str(target.checks(build, written, reference)["mmproj"]["note"])]
