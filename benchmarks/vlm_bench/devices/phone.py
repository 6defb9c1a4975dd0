"""llama.cpp's own programs on a phone: pushed by adb, run detached there, their times as rows like any other's."""

from __future__ import annotations

import datetime
import hashlib
import re
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

from vlm_bench.contestant import Contestant
from vlm_bench.devices import llamacpp, transfer
from vlm_bench.devices.adb import Adb
from vlm_bench.devices.job import Job
from vlm_bench.devices.ssh import LinkError
from vlm_bench.devices.transfer import File, Keep, Say, local_file
from vlm_bench.entries import short_names
from vlm_bench.pictures import find_pictures
from vlm_bench.plan import NOISE, read_prompts
from vlm_bench.results import Condition, Environment, LoadTimes, Results, Settings, Skipped, readable
from vlm_bench.row import Facts, Repetition, make_row, means
from vlm_bench.stages import noise
from vlm_models.errors import BundleError, CheckError, DependencyError, InputError
from vlm_runtime.bundle import open_bundle
from vlm_runtime.image import open_image

FOLDER = "/data/local/tmp/vlm-bench"  # the one place where adb's shell may both write and execute
_POLL_S = 0.2


@dataclass
class _Entry:
    """A bundle on the phone, and what was measured of it."""

    name: str
    models: llamacpp.Models
    language: File
    vision: File
    repetitions: list[Repetition]


def measure_with_llamacpp(adb: Adb, job: Job, binaries: Path, *, say: Say, keep: Keep) -> Results:
    """Every prompt about every picture, `job.runs` times in turns; complete results of the phone.

    Raises InputError for a job that llama.cpp's programs cannot do, BundleError where no bundle holds GGUF files.
    """
    if job.questions is not None or job.engines:
        raise InputError("with --device-binaries llama.cpp's program answers alone: leave --questions and --engine out")
    prompts, pictures = read_prompts(job.prompts), find_pictures(job.images)
    abis = tuple(adb.insist(lambda: adb.shell("getprop ro.product.cpu.abilist"), say).strip().split(","))
    tools = [local_file(file) for file in llamacpp.programs(binaries, abis).values()]
    entries, skipped = _entries(job.bundles)
    with TemporaryDirectory(prefix="vlm-bench-") as folder:
        files = [local_file(file) for file in _as_png(pictures, Path(folder))]
        models = [file for entry in entries for file in (entry.language, entry.vision)]
        _push({file.sha256: file for file in (*tools, *files, *models)}, adb, say)
        program = _lay_out(tools, adb, say)
        place = replace(_describe(adb, say), before=_condition(adb, say))
        settings = Settings(
            threads=job.threads or place.cores,
            runs=job.runs,
            max_new_tokens=job.max_new_tokens,
            images=tuple(map(readable, pictures)) or (NOISE,),
            prompts=prompts,
        )
        created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        results = Results(created, job.typed, place, settings, skipped=tuple(skipped))
        for number in range(job.runs + 1):  # the first one only warms up
            for entry in entries:
                say(f"adb://{adb.serial}: {entry.name}, repetition {number} of {job.runs}")
                replies = [
                    _answer(adb, program, entry, file, prompt, settings, job.threads, say)
                    for file in files
                    for prompt in prompts
                ]
                if number:
                    entry.repetitions.append(Repetition(_values(replies), True, ()))
            if number:
                rows = tuple(_row(entry) for entry in entries)
                results = replace(results, rows=rows, environment=replace(place, after=_condition(adb, say)))
                keep(results)
    return replace(results, complete=True)


def _entries(bundles: Sequence[Path]) -> tuple[list[_Entry], list[Skipped]]:
    found: list[_Entry] = []
    skipped: list[Skipped] = []
    error: BundleError | None = None
    for folder, name in zip(bundles, short_names(bundles), strict=True):
        bundle = open_bundle(folder, verify=False)
        try:
            models = llamacpp.models(bundle)
        except BundleError as none:
            error = none
            skipped.append(Skipped(name, readable(str(none))))
        else:
            found.append(_Entry(name, models, local_file(models.language), local_file(models.vision), []))
    if not found and error is not None:
        raise error
    return found, skipped


def _as_png(pictures: Sequence[Path], folder: Path) -> Iterator[Path]:
    """llama.cpp reads few kinds of pictures, PNG among them."""
    for number, picture in enumerate(pictures or [None]):
        file = folder / f"{number}.png"
        (open_image(picture) if picture is not None else noise(0)).save(file)
        yield file


def _push(wanted: Mapping[str, File], adb: Adb, say: Say) -> None:
    """Copy what the phone lacks, each file whole and checked there. Raises InputError where it has no room."""

    def lacking() -> dict[str, File]:
        adb.shell(f"mkdir -p {FOLDER}/files {FOLDER}/runs")
        there = set(adb.shell(f"ls {FOLDER}/files").split())
        return {sha256: file for sha256, file in wanted.items() if sha256 not in there}

    todo = adb.insist(lacking, say)
    need = sum(file.size for file in todo.values())
    free = int(adb.insist(lambda: adb.shell(f"df -k {FOLDER}"), say).strip().splitlines()[-1].split()[3]) * 1024
    if todo and free < need + transfer.MARGIN:
        raise InputError(
            f"adb://{adb.serial} has {transfer.megabytes(free)} free in {FOLDER}, the copy takes "
            f"{transfer.megabytes(need)} and {transfer.megabytes(transfer.MARGIN)} must stay: free some space there"
        )
    for file in todo.values():
        say(f"copying {transfer.megabytes(file.size)} to adb://{adb.serial}")
        adb.insist(lambda file=file: _push_one(file, adb), say)  # type: ignore[misc]


def _push_one(file: File, adb: Adb) -> None:
    there = f"{FOLDER}/files/{file.sha256}"
    assert file.local is not None
    try:
        adb.push(file.local, f"{there}.partial")
    except (DependencyError, InputError):  # a full disk above all: what cannot become whole is in the way
        adb.shell(f"rm -f {there}.partial")
        raise
    sha256 = adb.shell(f"sha256sum {there}.partial", timeout_s=None).split()[0]
    if sha256 != file.sha256:
        adb.shell(f"rm {there}.partial")
        raise CheckError(f"{file.local} arrived damaged on adb://{adb.serial}: check its storage and the cable")
    adb.shell(f"mv {there}.partial {there}")


def _lay_out(tools: Sequence[File], adb: Adb, say: Say) -> str:
    """The programs with their names in a folder of their own; the path of the one that answers."""
    names = [(file.local.name, file.sha256) for file in tools if file.local is not None]
    place = f"{FOLDER}/bin-{hashlib.sha256(repr(names).encode()).hexdigest()[:16]}"
    copies = [f"cp {FOLDER}/files/{sha256} {place}/{shlex.quote(name)}" for name, sha256 in names]
    command = " && ".join([f"mkdir -p {place}", *copies, f"chmod 755 {place}/*"])
    adb.insist(lambda: adb.shell(command), say)
    return f"{place}/{llamacpp.PROGRAM}"


def _answer(
    adb: Adb,
    program: str,
    entry: _Entry,
    picture: File,
    prompt: str,
    settings: Settings,
    threads: int | None,
    say: Say,
) -> dict[str, Any]:
    """One answer, by a process that no lost link ends. Raises CheckError where the program fails."""
    place = f"{FOLDER}/runs/{time.time_ns()}"
    files = {"-m": entry.language, "--mmproj": entry.vision, "--image": picture}
    words = [word for option, file in files.items() for word in (option, f"{FOLDER}/files/{file.sha256}")]
    words += llamacpp.arguments(prompt, threads, entry.models.context, settings.max_new_tokens)
    libraries = shlex.quote(program.rpartition("/")[0])
    run = f"LD_LIBRARY_PATH={libraries} {shlex.join([program, *words])} >out 2>err; echo $? >rc.new; mv rc.new rc"
    # mkdir makes it start once, though the request may be sent twice.
    detached = f"(setsid sh -c {shlex.quote(run)} </dev/null >/dev/null 2>&1 &)"
    start = f"mkdir {place} && cd {place} && {detached} || [ -d {place} ]"
    wait = f"cd {place} && while [ ! -f rc ]; do sleep {_POLL_S}; done; cat rc"
    adb.insist(lambda: adb.shell(start), say)
    code = int(adb.insist(lambda: adb.shell(wait, timeout_s=None), say))
    out = adb.insist(lambda: adb.shell(f"cat {place}/out"), say)
    said = adb.insist(lambda: adb.shell(f"cat {place}/err"), say)
    with suppress(LinkError):
        adb.shell(f"rm -r {place}")
    if code:
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        last = lines[-1][:300] if lines else "nothing was said"
        raise CheckError(f"{llamacpp.PROGRAM} on adb://{adb.serial} ended with exit code {code} ({last})")
    return llamacpp.reply(out, said, settings.max_new_tokens)


def _values(replies: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    found = means(replies, [None])
    found.pop("stage other")  # nothing is left of a wall time that is the sum of what was told
    rates = [reply["tokens_per_s"] for reply in replies if reply["tokens_per_s"]]
    return found | ({"tokens_per_s": fmean(rates)} if rates else {})


def _row(entry: _Entry) -> Any:
    size = entry.language.size + entry.vision.size
    facts = Facts(llamacpp.engines(), entry.models.precision, size, LoadTimes())
    return make_row(Contestant(entry.name, "bundle", ()), facts, entry.repetitions, None)


def _describe(adb: Adb, say: Say) -> Environment:
    """What Android tells of itself."""

    def prop(name: str) -> str:
        return adb.insist(lambda: adb.shell(f"getprop {name}"), say).strip()

    memory = re.search(r"MemTotal:\s*(\d+)", adb.insist(lambda: adb.shell("cat /proc/meminfo"), say))
    cpus = "/sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor"
    governors = set(adb.insist(lambda: adb.shell(f"cat {cpus} 2>/dev/null; true"), say).split())
    name = " ".join(word for word in (prop("ro.product.manufacturer"), prop("ro.product.model")) if word)
    chip = prop("ro.soc.model") or prop("ro.board.platform")
    return Environment(
        processor=f"{name} ({chip})" if chip else name,
        cores=int(adb.insist(lambda: adb.shell("nproc"), say)),
        memory_gb=round(int(memory[1]) / 1024**2, 1) if memory else None,
        system=f"Android {prop('ro.build.version.release')}",
        python="not used",
        device=f"adb://{adb.serial}",
        governor=", ".join(sorted(governors)) or None,
    )


def _condition(adb: Adb, say: Say) -> Condition:
    """Battery temperature, mean clock, and whether Android's thermal service holds the phone back."""
    battery = re.search(r"temperature:\s*(\d+)", adb.insist(lambda: adb.shell("dumpsys battery; true"), say))
    thermal = re.search(r"Thermal Status:\s*(\d+)", adb.insist(lambda: adb.shell("dumpsys thermalservice; true"), say))
    cpus = "/sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq"
    clocks = [int(word) / 1000 for word in adb.insist(lambda: adb.shell(f"cat {cpus} 2>/dev/null; true"), say).split()]
    return Condition(
        temperature_c=int(battery[1]) / 10 if battery else None,
        frequency_mhz=round(fmean(clocks), 1) if clocks else None,
        throttled=int(thermal[1]) > 0 if thermal else None,
    )
