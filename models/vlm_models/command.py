"""What all commands share: a mistake of the user is one line on stderr and an exit code."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from vlm_models.errors import VLMError


def run(app: typer.Typer) -> None:
    """Run `app` and exit: 0 done, 1 a check failed, 2 bad input or usage, 3 something is missing, 130 Ctrl-C.

    Errors other than VLMError are bugs and keep their traceback; Typer itself is quiet when a pipe is closed.
    """
    name = Path(sys.argv[0]).name  # "vlm-run"; of a module run by python -m it is a file, which click names better
    try:
        app(prog_name=None if name.endswith(".py") else name)
    except VLMError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
