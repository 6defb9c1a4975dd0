"""Runs in the peer's environment: OpenVINO GenAI's VLMPipeline, with the times that it tells of itself."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai
from PIL import Image

_PICTURE = "<ov_genai_image_0>"  # stands for the image token and a line feed


def serve(
    folder: str, precision: str, threads: int, prompts: Mapping[str, Any], versions: Mapping[str, str]
) -> tuple[Mapping[str, Any], Callable[[str, str | None, int], Mapping[str, Any]]]:
    """Open what optimum-intel wrote and say what it is."""
    scheduler = genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False  # no answer may use what another computed
    pipeline = genai.VLMPipeline(folder, "CPU", scheduler_config=scheduler, INFERENCE_NUM_THREADS=threads)
    facts = {
        "engines": {"vision_encoder": "openvino", "projector": "openvino", "language_model": "openvino"},
        "precision": precision,
        "packages": dict(versions),
        "notes": [
            f"{precision} are the weights; OpenVINO chooses what it computes in and its KV cache; vision includes the "
            "projector and the picture's preparation, splice is what it calls prepare_embeddings beyond that; it "
            "writes a line feed after the picture whether the template does or not"
        ],
    }
    return facts, Asking(pipeline, prompts).answer


class Asking:
    """An opened pipeline."""

    def __init__(self, pipeline: Any, prompts: Mapping[str, Any]) -> None:
        self._pipeline, self._prompts = pipeline, prompts

    def answer(self, prompt: str, image: str | None, max_new_tokens: int) -> dict[str, Any]:
        """One greedy answer of exactly `max_new_tokens` tokens about the picture file `image`, if there is one."""
        start = time.perf_counter()
        text = self._prompts["plain" if image is None else "picture"].replace(self._prompts["marker"], prompt)
        pictures, token = [], self._prompts["image_token"]
        if image is not None:
            with Image.open(image) as opened:
                pictures.append(ov.Tensor(np.asarray(opened.convert("RGB"), np.uint8)[None]))
            text = text.replace(f"{token}\n", _PICTURE).replace(token, _PICTURE)
        opened_at = time.perf_counter()
        ticks = Ticks()
        said = self._pipeline.generate(
            text, images=pictures, generation_config=self._config(max_new_tokens), streamer=ticks
        )
        wall = time.perf_counter() - start
        metrics = said.perf_metrics
        count = int(metrics.get_num_generated_tokens())
        if count != max_new_tokens or len(ticks.times) != count:
            raise RuntimeError(f"openvino-genai gave {count} of {max_new_tokens} tokens, {len(ticks.times)} streamed")
        stages = {"decode": (ticks.times[-1] - ticks.times[0]) * 1e3}
        if image is not None:
            vision = metrics.get_vision_encoding_duration().mean
            stages["preprocess"] = (opened_at - start) * 1e3
            stages["vision"] = vision
            stages["splice"] = max(metrics.get_prepare_embeddings_duration().mean - vision, 0.0)
            if len(inferred := metrics.raw_metrics.token_infer_durations):
                stages["prefill"] = inferred[0] / 1e3
        return {
            "text": said.texts[0],
            "wall_ms": wall * 1e3,
            "ttft_ms": (ticks.times[0] - start) * 1e3,
            "token_ms": [(b - a) * 1e3 for a, b in itertools.pairwise(ticks.times)],
            "stages_ms": stages,
            "prompt_tokens": int(metrics.get_num_input_tokens()),
            "new_tokens": count,
        }

    def _config(self, max_new_tokens: int) -> Any:
        config = genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = max_new_tokens, True, False
        config.apply_chat_template = False  # the prompt is rendered by the checkpoint's own already
        return config


class Ticks(genai.StreamerBase):  # type: ignore[misc, unused-ignore]
    """When each token was there."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def write(self, token: Any) -> Any:
        """A token, or several at once."""
        now = time.perf_counter()
        self.times += [now] * (1 if isinstance(token, int) else len(token))
        return genai.StreamingStatus.RUNNING

    def end(self) -> None:
        """Nothing is kept back."""
