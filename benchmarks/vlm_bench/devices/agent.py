"""The device's side: standard library only, sent through each connection, so that nothing need be installed for it.

One request is one line of JSON on stdin (then the bytes of files, for "receive"), each reply a line that begins with
MARK: whatever a login shell prints beside is ignored. Under `folder` on the device:

    files/SHA256         everything ever received, by content, checked on arrival; files/SHA256.partial until then
    runtimes/SHA256/     the unpacked runtime
    runs/ID/             one run: its files as hard links, results.json, log, rc (once it has ended), lock

The run is a process of its own session, which no lost link ends. The kernel gives up its lock however it dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import select
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

MARK = "@vlm-bench "
_BLOCK = 1 << 20
_SILENT_S = 60  # a sender that is silent for so long is gone
_POLL_S = 0.5
_COMMAND = "import sys; sys.argv[0] = 'vlm-bench'; from vlm_bench.cli import main; main()"


def main() -> None:
    """Carry out the request on stdin; an OSError, such as a full disk, is a reply too."""
    if sys.argv[1:2] == ["supervise"]:
        supervise(Path(sys.argv[2]))
        return
    stdin = sys.stdin.buffer
    request = json.loads(stdin.readline())
    folder = Path(request["folder"]).expanduser()
    try:
        _OPERATIONS[request["do"]](request, folder, stdin)
    except BrokenPipeError:  # the asker is gone
        os._exit(0)
    except OSError as error:
        _reply(error=error.strerror or str(error), errno=error.errno, file=str(error.filename or ""))


def probe(request: dict[str, Any], folder: Path, stdin: BinaryIO) -> None:
    """Make the folder; Python's version, which of `modules` it lacks, free bytes."""
    (folder / "files").mkdir(parents=True, exist_ok=True)
    (folder / "runs").mkdir(exist_ok=True)
    (folder / "runtimes").mkdir(exist_ok=True)
    _reply(
        folder=str(folder.resolve()),
        python=platform.python_version(),
        executable=sys.executable,
        missing=[name for name in request["modules"] if find_spec(name) is None],
        free=shutil.disk_usage(folder).free,
    )


def have(request: dict[str, Any], folder: Path, stdin: BinaryIO) -> None:
    """Of `files` (SHA-256 → bytes): the ones not here yet, with the bytes of each that are."""
    lacking = {}
    for sha256, size in request["files"].items():
        file = folder / "files" / sha256
        if not file.is_file() or file.stat().st_size != size:
            partial = _partial(file)
            lacking[sha256] = partial.stat().st_size if partial.is_file() else 0
    _reply(lacking=lacking, free=shutil.disk_usage(folder).free)


def receive(request: dict[str, Any], folder: Path, stdin: BinaryIO) -> None:
    """Append what follows on stdin to `files` ([SHA-256, bytes, offset] …); a file is kept when its SHA-256 fits."""
    for sha256, size, offset in request["files"]:
        file = folder / "files" / sha256
        try:
            outcome = _received(file, size, offset, stdin)
        except OSError:  # a full disk above all: what cannot become whole is in the way
            _partial(file).unlink()
            raise
        if outcome is not None:
            _reply(**{outcome: sha256})
        if outcome != "received":  # where the link is lost, the next one goes on here
            return
    _reply(done=True)


def start(request: dict[str, Any], folder: Path, stdin: BinaryIO) -> None:
    """Lay out run `run` from `files` (path → SHA-256) and start it, unless it runs or has ended; says which."""
    place = folder / "runs" / request["run"]
    if place.is_dir() and ((place / "rc").is_file() or not _lockable(place)):
        _reply(started=False)
        return
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    for name, sha256 in request["files"].items():
        target = place / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(folder / "files" / sha256, target)
        except OSError:  # a file system without hard links
            shutil.copyfile(folder / "files" / sha256, target)
    environment = {**os.environ, "PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1"}
    if request["runtime"]:
        runtime = _unpacked(folder, request["runtime"])
        environment["PYTHONPATH"] = str(runtime)
    (place / "command.json").write_text(json.dumps(request["command"]), "utf-8")
    with (place / "lock").open("w") as lock, (place / "log").open("wb") as log:
        fcntl.flock(lock, fcntl.LOCK_EX)
        subprocess.Popen(
            [sys.executable, "-m", "vlm_bench.devices.agent", "supervise", str(place)],
            cwd=str(folder),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=(lock.fileno(),),  # the lock is held until the supervisor ends
            start_new_session=True,
        )
    _reply(started=True)


def supervise(place: Path) -> None:
    """Run the command of a run in a session of its own and leave its exit code in `rc`."""
    command = json.loads((place / "command.json").read_text("utf-8"))
    run = [sys.executable, "-c", _COMMAND, *command]
    with subprocess.Popen(run, cwd=str(place), start_new_session=True) as process:
        (place / "pid").write_text(str(process.pid))
        code = process.wait()
    (place / "rc.partial").write_text(str(code))
    (place / "rc.partial").replace(place / "rc")


def watch(request: dict[str, Any], folder: Path, stdin: BinaryIO) -> None:
    """Until run `run` has ended or the asker is gone: new text of its log, results.json whenever it is another."""
    place, said, seen = folder / "runs" / request["run"], 0, None
    _reply(watching=True)
    while True:
        ended, alive = (place / "rc").is_file(), not _lockable(place)
        with contextlib.suppress(OSError):
            with (place / "log").open("rb") as log:
                log.seek(said)
                text = log.read()
            said += len(text)
            if text:
                _reply(log=text.decode("utf-8", "replace"))
            status = (place / "results.json").stat()
            if (status.st_mtime_ns, status.st_size) != seen:
                seen = (status.st_mtime_ns, status.st_size)
                _reply(results=(place / "results.json").read_text("utf-8"))
        if ended or not alive:
            _reply(rc=int((place / "rc").read_text()) if (place / "rc").is_file() else None)
            return
        if select.select([stdin], [], [], _POLL_S)[0]:  # nothing is ever sent: this is the end of the link
            return


def stop(request: dict[str, Any], folder: Path, stdin: BinaryIO) -> None:
    """Interrupt run `run` as Ctrl-C would, and end it after `patience` seconds."""
    place = folder / "runs" / request["run"]
    end = time.monotonic() + request["patience"]
    with contextlib.suppress(OSError, ValueError):
        group = int((place / "pid").read_text())
        if not _lockable(place):
            os.killpg(group, signal.SIGINT)
        while not _lockable(place) and time.monotonic() < end:
            time.sleep(0.1)
        if not _lockable(place):
            os.killpg(group, signal.SIGKILL)
    _reply(stopped=True)


def forget(request: dict[str, Any], folder: Path, stdin: BinaryIO) -> None:
    """Remove run `run`; the received files stay, for the next one."""
    shutil.rmtree(folder / "runs" / request["run"], ignore_errors=True)
    _reply(forgotten=True)


_OPERATIONS = {f.__name__: f for f in (probe, have, receive, start, watch, stop, forget)}


def _reply(**values: Any) -> None:
    sys.stdout.write(MARK + json.dumps(values) + "\n")
    sys.stdout.flush()


def _partial(file: Path) -> Path:
    return file.with_name(file.name + ".partial")


def _received(file: Path, size: int, offset: int, stdin: BinaryIO) -> str | None:
    """One file from stdin: "received", "damaged", "busy" (another one sends it), None where stdin ended before."""
    with _partial(file).open("ab") as out:
        try:
            fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return "busy"
        out.truncate(offset)
        if not _append(out, size - offset, stdin):
            return None
        if _sha256(_partial(file)) != file.name:
            _partial(file).unlink()
            return "damaged"
        os.fsync(out.fileno())
        _partial(file).replace(file)
    return "received"


def _append(out: BinaryIO, count: int, stdin: BinaryIO) -> bool:
    """Copy `count` bytes; False when stdin ended before. What came is kept in either case."""
    while count:
        signal.alarm(_SILENT_S)  # ends this process, and so its lock, when the sender has gone without a word
        block = stdin.read1(min(_BLOCK, count))  # type: ignore[attr-defined]  # a BufferedReader has it
        signal.alarm(0)
        if not block:
            return False
        out.write(block)
        out.flush()
        count -= len(block)
    return True


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as source:
        while block := source.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _lockable(place: Path) -> bool:
    """Whether nobody holds the lock of a run, so that it does not run."""
    try:
        with (place / "lock").open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _unpacked(folder: Path, sha256: str) -> Path:
    """The runtime of this archive, unpacked once."""
    runtime = folder / "runtimes" / sha256
    if not runtime.is_dir():
        new = runtime.with_name(f"{sha256}.{os.getpid()}")
        with zipfile.ZipFile(folder / "files" / sha256) as archive:
            archive.extractall(new)
        try:
            new.replace(runtime)
        except OSError:  # another run was first
            shutil.rmtree(new, ignore_errors=True)
    return runtime


if __name__ == "__main__":
    main()
