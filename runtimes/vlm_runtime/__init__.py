"""Run exported vision-language models: `vlm_runtime.load(bundle).generate(prompt, images=[…])` yields text.

Importing this package loads neither an engine nor NumPy; the names below come when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vlm_models import errors
from vlm_models.errors import VLMError

if TYPE_CHECKING:
    from vlm_runtime.answer import Answer
    from vlm_runtime.chat import Chat
    from vlm_runtime.vlm import VLM, load

__all__ = ["VLM", "Answer", "Chat", "VLMError", "errors", "load"]

_HOMES = {"load": "vlm", "VLM": "vlm", "Chat": "chat", "Answer": "answer"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
