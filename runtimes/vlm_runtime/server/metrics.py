"""What Prometheus sees at /metrics: waiting, times to the first token, speed, and what the caches saved."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from collections.abc import Callable

    from vlm_runtime.answer import Answer, Request

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_SPEEDS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)


class Metrics:
    """The numbers of one server, in a registry of their own. All methods may be called from any thread."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self._requests = Counter(
            "vlm_requests", "Requests to /v1/chat/completions by how they ended.", ["outcome"], registry=registry
        )
        self._ttft = Histogram(
            "vlm_ttft_seconds", "From the request to the first token.", buckets=_SECONDS, registry=registry
        )
        self._wait = Histogram(
            "vlm_queue_wait_seconds", "In the queue, of the answers that began.", buckets=_SECONDS, registry=registry
        )
        self._speed = Histogram(
            "vlm_decode_tokens_per_second", "Of answers of two or more tokens.", buckets=_SPEEDS, registry=registry
        )
        self._stages = Counter("vlm_stage_seconds", "Spent in each stage of answers.", ["stage"], registry=registry)
        self._prompt = Counter("vlm_prompt_tokens", "Tokens of prompts, those of pictures included.", registry=registry)
        self._cached = Counter(
            "vlm_prompt_tokens_cached", "Of these, those that lay in a KV cache already.", registry=registry
        )
        self._generated = Counter("vlm_generated_tokens", "Tokens of answers.", registry=registry)
        self._prefix = Counter(
            "vlm_prefix_cache",
            "Answers by whether a KV cache held a beginning of their prompt.",
            ["result"],
            registry=registry,
        )
        self._images = Counter(
            "vlm_image_cache", "Pictures by whether the vision encoder was spared.", ["result"], registry=registry
        )
        self._waiting = Gauge("vlm_queue_length", "Requests that wait.", registry=registry)
        self._running = Gauge("vlm_running", "Answers that are made now: 0 or 1.", registry=registry)
        for outcome in ("answered", "refused", "queue_full", "left", "failed"):
            self._requests.labels(outcome)
        for cache in (self._prefix, self._images):
            for result in ("hit", "miss"):
                cache.labels(result)

    def show(self, waiting: Callable[[], float], running: Callable[[], float]) -> None:
        """Where the gauges are read."""
        self._waiting.set_function(waiting)
        self._running.set_function(running)

    def ended(self, outcome: str) -> None:
        """A request ended: "answered", "refused" (4xx), "queue_full" (429), "left" (the client), "failed" (5xx)."""
        self._requests.labels(outcome).inc()

    def answered(self, request: Request, answer: Answer, encoded: int) -> None:
        """An answer was made, for which `encoded` of its pictures went through the vision encoder."""
        times = answer.timings_ms
        self._ttft.observe(times["ttft"] / 1e3)
        self._wait.observe(times["queue"] / 1e3)
        made = len(answer.token_ids)
        if made > 1 and times["decode"] > 0:
            self._speed.observe((made - 1) / times["decode"] * 1e3)
        for stage in ("preprocess", "vision", "projector", "prefill", "decode"):
            self._stages.labels(stage).inc(times[stage] / 1e3)
        self._prompt.inc(answer.prompt_tokens)
        self._cached.inc(answer.cached_tokens)
        self._generated.inc(made)
        self._prefix.labels("hit" if answer.cached_tokens else "miss").inc()
        self._images.labels("miss").inc(encoded)
        self._images.labels("hit").inc(max(len(request.pictures) - encoded, 0))

    def text(self) -> bytes:
        """All of it in Prometheus' text format 0.0.4."""
        return generate_latest(self._registry)
