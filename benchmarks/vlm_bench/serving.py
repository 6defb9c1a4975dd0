"""The contestant's side of the pipe: standard library only, and nothing of ours, so that any environment can run it.

`python -I serving.py MAKER ARGUMENTS` where MAKER is "module:function" or "/path/file.py:function" and ARGUMENTS a JSON
object; the requests and replies are told in `contestant`. The function is called with the arguments as keywords when
"load" comes; it returns (facts, answer), and `answer(prompt, image, max_new_tokens)` is called for each "answer".
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, TextIO

Facts = Mapping[str, Any]
Answer = Callable[[str, "str | None", int], Mapping[str, Any]]
Maker = Callable[..., "tuple[Facts, Answer]"]


def serve(maker: Maker, arguments: Mapping[str, Any]) -> None:
    """Answer requests from stdin until it ends. What `maker` and its libraries print goes to stderr."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    answer: Answer | None = None
    for line in sys.stdin:
        try:
            request = json.loads(line)
            if request["do"] == "load":
                start = time.perf_counter()
                facts, answer = maker(**arguments)
                reply = {"load_ms": (time.perf_counter() - start) * 1e3, "facts": facts}
            elif request["do"] == "answer" and answer is not None:
                start = time.perf_counter()
                said = answer(request["prompt"], request["image"], request["max_new_tokens"])
                reply = {"wall_ms": (time.perf_counter() - start) * 1e3, **said}
            else:
                raise ValueError(f"cannot {request['do']!r}: load, then answer")
            _write(replies, {"ok": True, **reply})
        except Exception as error:
            # Names of our errors, which keep their exit code on the other side; anything else is shown with its trace.
            trace = "" if hasattr(error, "exit_code") else traceback.format_exc()
            text = " ".join(str(error).split()) or type(error).__name__
            _write(replies, {"ok": False, "error": text, "kind": type(error).__name__, "trace": trace})


def find(maker: str) -> Maker:
    """The function that "module:function" or "file.py:function" names."""
    where, _, function = maker.rpartition(":")
    if where.endswith(".py"):
        spec = importlib.util.spec_from_file_location("contestant", where)
        if spec is None or spec.loader is None:
            raise ImportError(f"cannot import {where}")
        module = importlib.util.module_from_spec(spec)
        sys.modules["contestant"] = module
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(where)
    found: Maker = getattr(module, function)
    return found


def _write(replies: TextIO, reply: Mapping[str, Any]) -> None:
    # ASCII: half characters of an unfinished text pass as escapes.
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


if __name__ == "__main__":
    serve(find(sys.argv[1]), json.loads(sys.argv[2]))
