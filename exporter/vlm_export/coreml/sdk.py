"""coremltools, opened and used without its noise: it greets, warns of versions and draws bars on stderr."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

from vlm_export.target import not_installed


def coremltools(module: str = "") -> Any:
    """The package coremltools, or its `module` ("optimize.coreml"). Raises DependencyError naming the extra."""
    try:
        with quiet():
            return importlib.import_module(f"coremltools.{module}".rstrip("."))
    except ModuleNotFoundError as error:
        raise not_installed(error, "target 'coreml'", "coreml") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing that coremltools or torch's tracer logs, warns of or prints in here reaches the user; errors do.

    torch 2.13 warns that jit.trace is old, tracing that shapes become constants (they are), coremltools that newer
    versions of torch and scikit-learn are untested.
    """
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
