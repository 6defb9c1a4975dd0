"""Layouts of checkpoint folders, found by looking: each is a module of `layouts`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

from vlm_models import layouts
from vlm_models.checkpoint import Checkpoint, Sources

_DEFAULT = "huggingface"
_ADAPTERS = "lora"


class Layout(Protocol):
    """What a module of `layouts` offers."""

    def matches(self, folder: Path, config: Mapping[str, Any]) -> bool:
        """Whether the folder is laid out so; no other layout but the default may say so too."""

    def open_folder(self, folder: Path, config: Mapping[str, Any], sources: Sources) -> Checkpoint:
        """The checkpoint, canonically named. Raises CheckpointError."""


def find_layout(folder: Path, config: Mapping[str, Any]) -> Layout:
    """The layout of a folder: an adapter's whatever its config says, and Hugging Face's where no other is its own."""
    names = sorted(module.name for module in pkgutil.iter_modules(layouts.__path__))
    found = [_module(name) for name in (_ADAPTERS, *names) if name != _DEFAULT]
    return next((layout for layout in found if layout.matches(folder, config)), _module(_DEFAULT))


def _module(name: str) -> Layout:
    return cast(Layout, importlib.import_module(f"{layouts.__name__}.{name}"))
