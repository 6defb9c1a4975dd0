"""All that calls coreai-core and coreai-torch, Apple's authoring packages: beta, three releases in four months."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlm_export.target import not_installed
from vlm_models.errors import CheckpointError

Packages = Any  # they have no types that hold from one beta to the next


@dataclass(frozen=True)
class Form:
    """What goes in and out of an asset's function "main".

    `dynamic` says which dimension of an input is open (input → its index); `states` are written in place.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    states: tuple[str, ...] = ()
    dynamic: Mapping[str, int] | None = None


def packages() -> tuple[Packages, Packages]:
    """The modules coreai_torch and coreai.runtime. Raises DependencyError naming the extra."""
    try:
        with quiet():
            return importlib.import_module("coreai_torch"), importlib.import_module("coreai.runtime")
    except ModuleNotFoundError as error:
        raise not_installed(error, "target 'coreai'", "coreai") from error


def write_asset(module: nn.Module, example: Sequence[Tensor], form: Form, path: Path, marks: Mapping[str, str]) -> None:
    """Export `module` and save it as the asset `path`, a folder; `example` are its inputs, then its states.

    No open dimension of the example may be 1, which torch.export would take for fixed. Raises CheckpointError where
    torch.export or the converter has no form for the module.
    """
    converter, runtime = packages()
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(module, tuple(example), dynamic_shapes=_shapes(form), strict=False)
            program = program.run_decompositions(converter.get_decomp_table())
            release = converter.TorchConverter.Mode.RELEASE  # without stack traces, which name folders of this machine
            staged = converter.TorchConverter(mode=release).add_exported_program(
                program, input_names=form.inputs, output_names=form.outputs, state_names=form.states
            )
            asset = staged.to_coreai()
    except Exception as error:  # neither package has errors of its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(f"{path.stem} cannot be converted for Core AI ({reason}): use --target coreml") from error
    metadata = runtime.AIModelAssetMetadata()
    for key, value in marks.items():
        metadata.set_custom(key, value)
    with quiet():
        asset.save_asset(path, metadata=metadata)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing that is printed, logged or warned of in here reaches the user; errors do.

    The converter draws bars on stdout and warns of torch 2.13.0+cpu, since it is not the same text as 2.13.0; torch
    warns of its own deprecated names.
    """
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _shapes(form: Form) -> tuple[dict[int, Any] | None, ...] | None:
    if form.dynamic is None:
        return None
    opened = {name: {dim: torch.export.Dim.AUTO} for name, dim in form.dynamic.items()}
    return tuple(opened.get(name) for name in (*form.inputs, *form.states))
