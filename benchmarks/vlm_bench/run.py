"""One run: every contestant opened cold and warm, then asked the same in turns, repetition after repetition."""

from __future__ import annotations

import datetime
import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from vlm_bench import environment, memory
from vlm_bench.contestant import Contestant, Running
from vlm_bench.energy import Meter
from vlm_bench.measure import Watch, take, wait_idle
from vlm_bench.nvml import Nvml
from vlm_bench.pictures import Pictures
from vlm_bench.results import Condition, LoadTimes, Results, Settings, Skipped, readable
from vlm_bench.row import Facts, Repetition, make_row, means
from vlm_models.errors import DependencyError, InputError, VLMError

Save = Callable[[Results], None]
_HEAT_SHARE = 0.8  # of the free memory, for contestants that are open together


@dataclass(frozen=True)
class Case:
    """One question about one picture: its place in `Pictures`, None for a question alone."""

    prompt: str
    picture: int | None


@dataclass
class _Entry:
    """A contestant while it is measured."""

    contestant: Contestant
    running: Running | None = None
    facts: Facts = field(default_factory=lambda: Facts({}, None, None, LoadTimes()))
    packages: Mapping[str, str] = field(default_factory=dict)
    repetitions: list[Repetition] = field(default_factory=list)
    failed: VLMError | None = None


@dataclass(frozen=True)
class _Hall:
    """What a run goes on in."""

    settings: Settings
    cases: Sequence[Case]
    pictures: Pictures
    meter: Meter
    gpus: Nvml | None
    watch: Watch


def measure(
    contestants: Sequence[Contestant],
    images: Sequence[Path],
    prompts: Sequence[str],
    settings: Settings,
    *,
    command: str = "",
    skipped: Sequence[Skipped] = (),
    save: Save = lambda results: None,
    watch: Watch = lambda who, done, of: None,
    root: Path = Path("/"),
) -> Results:
    """Measure `contestants` on every prompt about every picture (no `images`: one of noise).

    `save` gets the results so far, not complete, at the start and after each repetition. So is what is returned: the
    caller sets `complete`. Contestants take turns; where they do not fit the memory together, in several heats. A
    contestant that breaks down is skipped with its reason; what is wrong with a bundle or a question is raised before
    anything is measured, and when nothing could be measured the first reason is.
    """
    _check(contestants, prompts, settings)
    entries = [_Entry(contestant) for contestant in contestants]
    before, events = environment.condition(root), environment.throttle_events(root)
    place = replace(environment.describe(root=root), before=before)
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="vlm-bench-"))
        meter = Meter(root)
        stack.callback(meter.close)
        pictures = Pictures(images, Path(folder))
        cases = [Case(prompt, number) for number in range(len(pictures)) for prompt in prompts]
        hall = _Hall(settings, cases, pictures, meter, _gpus(), watch)

        def so_far() -> Results:
            rows = (make_row(e.contestant, e.facts, e.repetitions, meter.source) for e in entries if e.repetitions)
            failed = (Skipped(e.contestant.name, readable(str(e.failed))) for e in entries if e.failed)
            after = _after(environment.condition(root), events, environment.throttle_events(root))
            packages = {**place.packages, **{k: v for e in entries for k, v in e.packages.items()}}
            where = replace(place, after=after, packages=packages)
            return Results(created, command, where, settings, rows=tuple(rows), skipped=(*skipped, *failed))

        save(so_far())
        for entry in entries:
            watch(f"{entry.contestant.name}: cold start", 0, settings.runs)
            _attempt(entry, functools.partial(_open_cold, entry, hall))
        for heat in _heats([entry for entry in entries if not entry.failed]):
            _run_heat(heat, hall, lambda: save(so_far()))
        results = so_far()
    if not results.rows:
        raise next(e.failed for e in entries if e.failed)
    return results


def _run_heat(heat: Sequence[_Entry], hall: _Hall, save: Callable[[], None]) -> None:
    with ExitStack() as stack:
        for entry in heat:
            _attempt(entry, functools.partial(_open_warm, entry, hall, stack))
        for number in range(hall.settings.runs + 1):
            for entry in heat:
                if entry.running is None or entry.failed:
                    continue
                hall.watch(entry.contestant.name, number, hall.settings.runs)
                _attempt(entry, functools.partial(_repeat, entry, entry.running, hall, number), opened=number > 0)
            if number:
                save()


def _repeat(entry: _Entry, running: Running, hall: _Hall, number: int) -> None:
    """One answer for each case; the first repetition only warms up."""
    files = hall.pictures.files(number)
    replies: list[Mapping[str, object]] = []
    joules: list[float | None] = []

    def ask(_: int) -> Mapping[str, float]:
        for case in hall.cases:
            image = None if case.picture is None else str(files[case.picture])
            start = hall.meter.joules()
            replies.append(running.answer(case.prompt, image, hall.settings.max_new_tokens))
            end = hall.meter.joules()
            joules.append(end - start if start is not None and end is not None else None)
        return means(replies, joules)

    if number:
        wait_idle(hall.settings.idle_s)
    taken = take(ask, number)
    pids = memory.family(running.pid)
    gpu = hall.gpus.used_mb(pids) if hall.gpus else None
    known = [size for size in (entry.facts.gpu_mb, gpu) if size is not None]
    entry.facts = replace(entry.facts, peak_rss_mb=memory.peak_mb(pids), gpu_mb=max(known, default=None))
    if number:
        times = [time for reply in replies for time in reply.get("token_ms") or ()]  # type: ignore[attr-defined]
        entry.repetitions.append(Repetition(taken.values, taken.quiet, tuple(times)))


def _open_cold(entry: _Entry, hall: _Hall) -> None:
    """Load with nothing in the page cache, and answer once, in a process that ends with it."""
    if not memory.drop_from_cache(entry.contestant.files):
        return
    with Running(entry.contestant, hall.settings.threads) as running:
        reply = running.load()
        case = hall.cases[0]
        image = None if case.picture is None else str(hall.pictures.files(0)[case.picture])
        running.answer(case.prompt, image, min(2, hall.settings.max_new_tokens))
        pids = memory.family(running.pid)
        entry.facts = replace(
            entry.facts,
            load_ms=LoadTimes(cold=reply["load_ms"]),
            bytes_read=memory.bytes_read(pids),
            peak_rss_mb=memory.peak_mb(pids),
        )


def _open_warm(entry: _Entry, hall: _Hall, stack: ExitStack) -> None:
    running = stack.enter_context(Running(entry.contestant, hall.settings.threads))
    hall.watch(f"{entry.contestant.name}: load", 0, hall.settings.runs)
    reply = running.load()
    facts, known = reply["facts"], entry.contestant.bytes_on_disk
    entry.facts = replace(
        entry.facts,
        engines=facts.get("engines") or {},
        precision=facts.get("precision"),
        bytes_on_disk=known if known is not None else facts.get("bytes_on_disk"),
        load_ms=replace(entry.facts.load_ms, warm=reply["load_ms"]),
        notes=tuple(facts.get("notes") or ()),
    )
    entry.packages = facts.get("packages") or {}
    entry.running = running


def _attempt(entry: _Entry, action: Callable[[], None], *, opened: bool = False) -> None:
    """Do it; a contestant that breaks down is out. Raises what is the user's mistake, as long as none is `opened`."""
    try:
        action()
    except VLMError as error:
        if isinstance(error, InputError) and entry.contestant.kind == "bundle" and not opened:
            raise
        entry.failed = error
        if entry.running is not None:
            entry.running.close()


def _heats(entries: Sequence[_Entry]) -> Iterator[list[_Entry]]:
    """Those that fit the free memory together, in order. Needs are what each took when it was opened cold."""
    room, taken, heat = memory.available_mb(), 0.0, list[_Entry]()
    for entry in entries:
        need = entry.facts.peak_rss_mb or (entry.contestant.bytes_on_disk or 0) / 2**20
        if heat and room is not None and taken + need > room * _HEAT_SHARE:
            yield heat
            taken, heat = 0.0, []
        taken += need
        heat.append(entry)
    if heat:
        yield heat


def _check(contestants: Sequence[Contestant], prompts: Sequence[str], settings: Settings) -> None:
    for name in ("runs", "threads", "max_new_tokens"):
        if getattr(settings, name) < 1:
            raise InputError(f"{name.replace('_', ' ')}: {getattr(settings, name)}: it must be 1 or more")
    if not prompts:
        raise InputError("there are no questions: give at least one line in the file of --prompts")
    if not contestants:
        raise DependencyError("nothing can be measured")
    names = [contestant.name for contestant in contestants]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"two contestants are named {twice!r}: give them different folder names")


def _after(now: Condition, events: int | None, events_now: int | None) -> Condition:
    rose = events_now > events if events is not None and events_now is not None else now.throttled
    return replace(now, throttled=rose)


def _gpus() -> Nvml | None:
    try:
        return Nvml()
    except OSError:
        return None
