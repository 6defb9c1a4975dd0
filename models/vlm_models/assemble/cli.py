"""`vlm-assemble --vision CLIP --language LLM -o OUT`: the start of a LLaVA of one's own."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Annotated

import typer

from vlm_models.command import run
from vlm_models.errors import DependencyError

app = typer.Typer(add_completion=False, rich_markup_mode="markdown")

_HELP = """Assemble a LLaVA from a vision tower and a language model, to be trained from there.

OUT becomes a Hugging Face folder of `LlavaForConditionalGeneration`: both models' weights as they are, a new projector
between them, the image token in tokenizer and embedding table, image processor and chat template. It answers nonsense
about pictures until its projector is trained; about text it answers as the language model does.

**Example**

* `vlm-assemble --vision openai/clip-vit-large-patch14-336 --language Qwen/Qwen2-1.5B-Instruct -o my-llava`
* then train it, and: `vlm-export my-llava --target onnx -o bundle`

**Exit codes:** 0 done; 2 bad input, nothing written; 3 a needed package is missing.
"""


@app.command(help=_HELP, no_args_is_help=True)
def command(
    vision: Annotated[str, typer.Option(help="A CLIP or SigLIP model: a folder or hub id.")],
    language: Annotated[str, typer.Option(help="A language model: a folder or hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="A new or empty folder.")],
    feature_layer: Annotated[
        int, typer.Option(help="The tower's hidden state that is projected; -2 is the last but one, as in LLaVA.")
    ] = -2,
    image_token: Annotated[str, typer.Option(help="The token that stands for a picture.")] = "<image>",
    seed: Annotated[int, typer.Option(help="Draws the projector.")] = 0,
) -> None:
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            raise DependencyError(f"vlm-assemble needs {name}: pip install 'vlm-export[export]'")
    from vlm_models.assemble.assemble import assemble

    made = assemble(vision, language, output, feature_layer=feature_layer, image_token=image_token, seed=seed)
    grown = f"{made.new_rows} rows added to the embedding table" if made.new_rows else "in a spare row of the table"
    typer.echo(
        f"wrote {output}: {made.parameters / 1e6:,.0f}M parameters, {made.image_tokens} tokens a picture, "
        f"{image_token} is {made.image_token_id} ({grown})"
    )


def main() -> None:
    """Entry point of the command."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    run(app)


if __name__ == "__main__":
    main()
