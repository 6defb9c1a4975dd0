"""One run of vlm-bench as frozen values, which every output reads (`results_file` keeps it as JSON).

`results.schema.json` says the same as JSON Schema.

None is "not measured", in every field that may be None; nothing that was not measured is ever 0. Times are milliseconds
of wall clock, sizes MB of 2**20 bytes where the name says mb, else bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vlm_bench.measure import Stat

SCHEMA = Path(__file__).with_name("results.schema.json")
STAGES = ("preprocess", "vision", "projector", "splice", "prefill", "first_token", "decode", "other")
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Condition:
    """The machine at one moment: hottest sensor, mean clock of the cores, whether it holds itself back.

    `throttled` of `Environment.after` says whether it did so since `before`.
    """

    temperature_c: float | None = None
    frequency_mhz: float | None = None
    throttled: bool | None = None


@dataclass(frozen=True)
class Environment:
    """Where the run was made. `device` is "this machine" or an address such as "ssh://host".

    `governor` is that of the cores' clocks, `power_mode` the board's or laptop's; `packages` name → version.
    """

    processor: str
    cores: int
    memory_gb: float | None
    system: str
    python: str
    packages: Mapping[str, str] = field(default_factory=dict)
    device: str = "this machine"
    governor: str | None = None
    power_mode: str | None = None
    before: Condition = Condition()
    after: Condition = Condition()


@dataclass(frozen=True)
class Settings:
    """What was asked for: each of `runs` repetitions asks every prompt about every picture, `max_new_tokens` long.

    `images` and `prompts` as given ("noise" for a made picture); `engines` empty: each bundle's own choice.
    """

    threads: int
    runs: int
    max_new_tokens: int
    images: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    engines: tuple[str, ...] = ()
    idle_s: float = 0.0


@dataclass(frozen=True)
class Percentiles:
    """Of the milliseconds between one token and the next, over all tokens of the counted repetitions."""

    p50: float
    p95: float
    p99: float


@dataclass(frozen=True)
class LoadTimes:
    """Milliseconds to open all parts in a fresh process: files dropped from the page cache before, or still in it."""

    cold: float | None = None
    warm: float | None = None


@dataclass(frozen=True)
class Energy:
    """Joules of one answer (median), of the whole device that `source` measures, and per new token."""

    joules: float
    per_token: float
    source: str


@dataclass(frozen=True)
class Row:
    """One contestant. Every Stat is over its repetitions; a repetition is the mean of one answer for each case.

    The medians are all of the same repetition, the one whose `wall_ms` is the median, so that stages add up to it.

    `engines` is part → engine, `precision` as in the bundle's manifest, or the peer's own word. `stages_ms` has the
    keys STAGES, as far as they were measured: "splice" is from the last picture row to the prefill, "first_token" the
    choice of the first token, "other" what belongs to none of them (chat template, tokenizing, text); their sum is
    `wall_ms`, that of all but decode and other is about `ttft_ms`. `bytes_read` is from storage until the first answer
    after a cold start. `noisy`: fewer than three (or all, of fewer) repetitions were quiet; `quiet` says how many of
    `of`. Token counts are means over the cases, `image_tokens` part of `prompt_tokens`; `tiles` per picture.
    `notes` are for people: what is not as with the others.
    """

    name: str
    kind: Literal["bundle", "peer"]
    engines: Mapping[str, str]
    precision: str | None
    bytes_on_disk: int | None
    stages_ms: Mapping[str, Stat]
    ttft_ms: Stat | None
    token_ms: Percentiles | None
    tokens_per_s: Stat | None
    wall_ms: Stat
    load_ms: LoadTimes
    peak_rss_mb: float | None
    gpu_mb: float | None
    bytes_read: int | None
    energy: Energy | None
    noisy: bool
    quiet: int
    of: int
    image_tokens: float | None
    prompt_tokens: float | None
    new_tokens: float
    tiles: float | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Skipped:
    """A contestant that could not be measured, and why, in one line."""

    name: str
    reason: str


@dataclass(frozen=True)
class Asked:
    """One question of an accuracy set. `image` is a path or a data URL, None where there is no picture."""

    id: str
    image: str | None
    question: str
    reference: str
    answer: str
    kind: str = ""
    exact: bool | None = None
    anls: float | None = None


@dataclass(frozen=True)
class Accuracy:
    """One contestant on one set: shares 0 to 1 over `questions`; KL in nats to `kl_reference`.

    `interval` are the ends of the 95 % confidence interval of `exact`; `kinds` is kind → share of exact answers.
    """

    name: str
    set: str
    questions: int
    exact: float | None
    contains: float | None
    anls: float | None
    kl: float | None = None
    kl_reference: str | None = None
    interval: tuple[float, ...] | None = None
    kinds: Mapping[str, float] = field(default_factory=dict)
    per_question: tuple[Asked, ...] = ()


@dataclass(frozen=True)
class Deviation:
    """Two tensors of one stage: cosine, largest absolute difference, L2 of the difference over L2 of the reference."""

    cosine: float | None
    max_abs: float | None
    relative_l2: float | None


@dataclass(frozen=True)
class Words:
    """One step of a word-by-word diff: words of the reference's answer and of this one, joined by spaces."""

    op: Literal["equal", "delete", "insert", "replace"]
    reference: str
    answer: str


@dataclass(frozen=True)
class Drift:
    """One contestant beside `reference` on one case: deviations by stage in order; `first` stage that drifts, or None.

    `image` is a path or a data URL, None where there is no picture.
    """

    reference: str
    name: str
    image: str | None
    prompt: str
    stages: Mapping[str, Deviation]
    first: str | None
    answer: str
    reference_answer: str
    words: tuple[Words, ...] = ()


@dataclass(frozen=True)
class Results:
    """One run. `complete` is False while it goes on, and stays so where it was cut; such a file is valid all the same.

    `created` is ISO 8601 with zone; `command` the line that was typed.
    """

    created: str
    command: str
    environment: Environment
    settings: Settings
    complete: bool = False
    rows: tuple[Row, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    accuracy: tuple[Accuracy, ...] = ()
    drift: tuple[Drift, ...] = ()
    format: Literal["vlm-bench"] = "vlm-bench"
    version: Literal[1] = 1


def readable(name: str | Path) -> str:
    """A file's name for people and for JSON: what is no UTF-8, or no printable character, becomes U+FFFD."""
    return "".join(c if c.isprintable() else "\ufffd" for c in str(name))
