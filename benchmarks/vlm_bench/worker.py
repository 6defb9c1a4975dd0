"""One contestant in a process of its own, pinned to few cores, so that memory and load time are its alone."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from vlm_bench.measure import Rep
from vlm_models.errors import VLMError


class Worker:
    """A process that holds the result of `maker(*arguments)`, a `Rep`, and runs one repeat whenever called.

    `maker` is "module:function". `load_s` is how long it took; `memory()` is (peak RSS, peak beyond mapped files) in
    MB. Raises VLMError, as the process did, or RuntimeError with its traceback.
    """

    def __init__(self, maker: str, arguments: tuple[Any, ...], threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, maker, arguments, threads), daemon=True)
        self._process.start()
        theirs.close()
        self.load_s = float(self._answer())

    def __call__(self, number: int) -> Mapping[str, float]:
        self._pipe.send(number)
        values: Mapping[str, float] = self._answer()
        return values

    def peak_mb(self) -> float:
        """Peak RSS of the process so far."""
        return status_mb(self._process.pid or 0, "VmHWM")

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()

    def _answer(self) -> Any:
        try:
            value = self._pipe.recv()
        except EOFError:
            self._process.join(10)
            raise RuntimeError(f"the measured process ended with exit code {self._process.exitcode}") from None
        if isinstance(value, VLMError):
            raise value
        if isinstance(value, _Failed):
            raise RuntimeError(value.trace)
        return value


class _Failed:
    def __init__(self, trace: str) -> None:
        self.trace = trace


@contextmanager
def workers(makers: Mapping[str, tuple[str, tuple[Any, ...]]], threads: int) -> Iterator[dict[str, Worker]]:
    """Start one worker per name and end them all."""
    started: dict[str, Worker] = {}
    try:
        for name, (maker, arguments) in makers.items():
            started[name] = Worker(maker, arguments, threads)
        yield started
    finally:
        for worker in started.values():
            worker.close()


def status_mb(pid: int, field: str) -> float:
    """A size of /proc/PID/status, such as VmHWM, RssAnon or RssFile, in MB; 0 where there is none."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:")), 0.0)


def pin(threads: int) -> None:
    """Keep this process on its first `threads` cores, where the system can, and its libraries on as many threads."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)


def _serve(pipe: Connection, maker: str, arguments: tuple[Any, ...], threads: int) -> None:
    pin(threads)
    try:
        module, function = maker.split(":")
        make = getattr(importlib.import_module(module), function)
        start = time.perf_counter()
        rep: Rep = make(*arguments)
        pipe.send(time.perf_counter() - start)
        while True:
            pipe.send(rep(pipe.recv()))
    except EOFError:
        return
    except VLMError as error:
        pipe.send(error)
    except Exception:  # whatever a peer raises is shown to the person who measures
        pipe.send(_Failed(traceback.format_exc()))
