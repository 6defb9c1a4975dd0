"""Contestants: what is measured, each in a process of its own, spoken to in JSON lines on its stdin and stdout.

    → {"do": "load"}
    ← {"ok": true, "load_ms": 812.4, "facts": {"engines": {"language_model": "onnx", …}, "precision": "int4", …}}
    → {"do": "answer", "prompt": "What is this?", "image": "/a.png" or null, "max_new_tokens": 64}
    ← {"ok": true, "wall_ms": 950.1, "text": "…", "new_tokens": 64, "ttft_ms": 480.0, "token_ms": [7.1, …],
       "stages_ms": {"preprocess": 9.0, "vision": 210.0, …}, "prompt_tokens": 601, "image_tokens": 576, "tiles": 1.0}
    ← {"ok": false, "error": "one line", "kind": "DependencyError", "trace": ""}        instead of either

`load` comes once and first. `wall_ms` and `new_tokens` must be there, all else may be missing or null: it was not
measured then. An answer has exactly `max_new_tokens` tokens, end tokens being passed over, with the best token always;
`ttft_ms` is from the call to the first token, `token_ms` from each token to the next (one fewer than tokens).
`stages_ms` has keys of `results.STAGES` but "other", which is the rest of the wall time. A text may end in half a
character. A picture is opened anew for each answer, and no contestant may keep what it computed for one. Facts:
engines, precision, bytes_on_disk, packages (name → version), max_context, notes (sentences). Lines on stdout that are
no JSON object are passed over. At the end of stdin the process ends. `serving` speaks all this for a Python function.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vlm_bench import serving
from vlm_models import errors
from vlm_models.errors import DependencyError, VLMError
from vlm_runtime.engine import physical_cpus


@dataclass(frozen=True)
class Contestant:
    """How to start one: `argv` speaks the protocol above; `env` is added to the environment.

    `files` are dropped from the page cache before the cold load; without any there is no cold load. `notes` are
    sentences for people on what is not the same as with the others.
    """

    name: str
    kind: Literal["bundle", "peer"]
    argv: tuple[str, ...]
    files: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    bytes_on_disk: int | None = None
    notes: tuple[str, ...] = ()


def python_argv(maker: str, arguments: Mapping[str, Any], python: str | None = None) -> tuple[str, ...]:
    """The `argv` that serves the function `maker`: "module:function" here, or "/path/file.py:function" anywhere.

    `python` is another environment's interpreter, which need not know this package: its maker must be a file.
    """
    text = json.dumps(dict(arguments))
    if python is None:
        return (sys.executable, "-P", "-m", serving.__name__, maker, text)
    return (python, "-I", str(Path(serving.__file__).resolve()), maker, text)


class Running:
    """A started contestant on `threads` cores. Use as a context; its end is the process's end.

    `pid` is the process. Requests raise VLMError as the process did, or DependencyError where it broke down.
    """

    def __init__(self, contestant: Contestant, threads: int) -> None:
        self.contestant = contestant
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        counts = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        environment = {**os.environ, **counts, **contestant.env}
        if contestant.argv[0] == sys.executable:  # the same packages; another environment has its own
            environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        try:
            # A session of its own: Ctrl-C reaches the command, which writes what it has and ends the contestants.
            self._process = subprocess.Popen(
                contestant.argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            self._errors.close()
            reason = f"cannot start {contestant.argv[0]}: {error.strerror or error}"
            raise DependencyError(reason) from None
        self.pid = self._process.pid
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(self.pid, cores(threads))

    def __enter__(self) -> Running:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After Ctrl-C nobody waits for an answer to end.
        self.close(5.0 if kind is None or issubclass(kind, Exception) else 0.2)

    def load(self) -> dict[str, Any]:
        """Open it: the reply to "load"."""
        return self.request({"do": "load"})

    def answer(self, prompt: str, image: str | None, max_new_tokens: int) -> dict[str, Any]:
        """One answer: the reply to "answer"."""
        return self.request({"do": "answer", "prompt": prompt, "image": image, "max_new_tokens": max_new_tokens})

    def request(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send one request and wait for its reply."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._broken() from None
        for line in self._process.stdout:
            try:
                reply = json.loads(line)
            except ValueError:
                continue
            if isinstance(reply, dict) and "ok" in reply:
                if reply["ok"] is True:
                    return reply
                raise _raised(reply)
        raise self._broken()

    def close(self, wait_s: float = 5.0) -> None:
        """End the process, kindly first; more than once does no harm."""
        if self._errors.closed:
            return
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what was not sent need not be
                    pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(wait_s)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)  # and whatever it started
        self._process.wait()
        self._errors.close()

    def _broken(self) -> VLMError:
        code = self._process.wait()
        self._errors.seek(0)
        lines = [line for line in self._errors.read().decode("utf-8", "replace").splitlines() if line.strip()]
        what = f"signal {-code}{' (out of memory?)' if code == -9 else ''}" if code < 0 else f"exit code {code}"
        return DependencyError(f"its process ended with {what}{': ' + lines[-1].strip()[:300] if lines else ''}")


def cores(threads: int) -> list[int]:
    """The CPUs that `threads` threads are kept on: one per physical core first."""
    first = physical_cpus()
    return [*first, *sorted(os.sched_getaffinity(0) - set(first))][:threads]


def _raised(reply: Mapping[str, Any]) -> VLMError:
    """The error of the other side, of the same class where it is one of ours."""
    kind = getattr(errors, str(reply.get("kind")), None)
    text = str(reply.get("error"))
    if isinstance(kind, type) and issubclass(kind, VLMError):
        return kind(text)
    place = str(reply.get("trace") or "").strip().splitlines()
    where = next((line.strip() for line in reversed(place) if line.strip().startswith("File ")), "")
    return DependencyError(f"{reply.get('kind')}: {text[:300]}{f' ({where})' if where else ''}")
