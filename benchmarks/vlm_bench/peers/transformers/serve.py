"""Runs in the peer's environment: transformers' own `generate`, with the times of its parts.

Greedy, end tokens passed over, the attention that transformers takes by itself; nothing compiled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig
from transformers.generation.streamers import BaseStreamer

_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Stage → module of the model, and of what is within it.
_PARTS = {"vision": "vision_tower", "projector": "multi_modal_projector", "prefill": "language_model"}


def serve(
    checkpoint: str, precision: str, threads: int, prompts: Mapping[str, Any], versions: Mapping[str, str]
) -> tuple[Mapping[str, Any], Callable[[str, str | None, int], Mapping[str, Any]]]:
    """Load the checkpoint and say what it is."""
    torch.set_num_threads(threads)
    load: Any = AutoModelForImageTextToText
    model, loaded = load.from_pretrained(checkpoint, dtype=_TYPES[precision], output_loading_info=True)
    if names := sorted(loaded["missing_keys"]):  # transformers would make random weights for them
        raise RuntimeError(f"transformers finds no {names[0]} and {len(names) - 1} other tensors: take another version")
    model.eval()
    prepare: Any = AutoProcessor
    processor = prepare.from_pretrained(checkpoint)
    attention = getattr(model.config, "_attn_implementation", None) or "eager"
    facts = {
        "engines": {"vision_encoder": "torch", "projector": "torch", "language_model": "torch"},
        "precision": precision,
        "packages": dict(versions),
        "notes": [f"PyTorch without compilation, attention {attention}, KV cache in {precision}"],
    }
    return facts, Asking(model, processor, prompts).answer


class Asking:
    """A loaded model and the moments at which its parts began and ended."""

    def __init__(self, model: Any, processor: Any, prompts: Mapping[str, Any]) -> None:
        self._model, self._processor, self._prompts = model, processor, prompts
        self._moments: dict[str, float] = {}
        inner = getattr(model, "model", model)
        for stage, name in _PARTS.items():
            if (part := getattr(inner, name, None)) is not None:
                part.register_forward_pre_hook(self._mark(f"{stage} began"))
                part.register_forward_hook(self._mark(f"{stage} ended"))
        if (head := model.get_output_embeddings()) is not None:
            head.register_forward_hook(self._mark("prefill ended", last=True))
        # What no generation_config.json may change: the best token, always, whatever it is.
        tokenizer = processor.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        config: Any = GenerationConfig
        model.generation_config = config(do_sample=False, num_beams=1, pad_token_id=pad)

    @torch.inference_mode()
    def answer(self, prompt: str, image: str | None, max_new_tokens: int) -> dict[str, Any]:
        """One greedy answer of exactly `max_new_tokens` tokens about the picture file `image`, if there is one."""
        self._moments.clear()
        start = time.perf_counter()
        inputs = self._inputs(prompt, image)
        ticks = Ticks()
        out = self._model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=ticks)
        given = inputs["input_ids"].shape[1]
        ids = out[0, given:].tolist()
        text = self._processor.tokenizer.decode(ids, skip_special_tokens=True)
        wall = time.perf_counter() - start
        if len(ids) != max_new_tokens:
            raise RuntimeError(f"transformers stopped after {len(ids)} of {max_new_tokens} tokens")
        image_id = self._processor.tokenizer.convert_tokens_to_ids(self._prompts["image_token"])
        return {
            "text": text,
            "wall_ms": wall * 1e3,
            "ttft_ms": (ticks.times[0] - start) * 1e3,
            "token_ms": [(b - a) * 1e3 for a, b in zip(ticks.times, ticks.times[1:], strict=False)],
            "stages_ms": self._stages(ticks, image is not None),
            "prompt_tokens": given,
            "image_tokens": int((inputs["input_ids"] == image_id).sum()),
            "new_tokens": len(ids),
            "tiles": 1 if image is not None else None,
        }

    def _inputs(self, prompt: str, image: str | None) -> Any:
        """Token ids and pixels; the time of the picture's part is noted."""
        text = self._prompts["plain" if image is None else "picture"].replace(self._prompts["marker"], prompt)
        bos = self._prompts["bos"]
        special = {"add_special_tokens": not (bos and text.startswith(bos)), "return_tensors": "pt"}
        if image is None:
            return self._processor.tokenizer(text, **special)
        begun = time.perf_counter()
        with Image.open(image) as opened:
            picture = opened.convert("RGB")
        spent = time.perf_counter() - begun
        prepare = self._processor.image_processor
        timed = Timed(prepare)
        self._processor.image_processor = timed
        try:
            inputs = self._processor(text=text, images=picture, **special)
        finally:
            self._processor.image_processor = prepare
        self._moments["preprocess"] = spent + timed.seconds
        kind = self._model.dtype
        return {k: v.to(kind) if torch.is_floating_point(v) else v for k, v in inputs.items() if k != "token_type_ids"}

    def _stages(self, ticks: Ticks, pictured: bool) -> dict[str, float]:
        at, stages = self._moments, {}
        if pictured:
            stages["preprocess"] = at["preprocess"]
            for name in ("vision", "projector"):
                if f"{name} ended" in at:
                    stages[name] = at[f"{name} ended"] - at[f"{name} began"]
            if "projector ended" in at and "prefill began" in at:
                stages["splice"] = at["prefill began"] - at["projector ended"]
        if "prefill began" in at:
            stages["prefill"] = at["prefill ended"] - at["prefill began"]
            stages["first_token"] = ticks.times[0] - at["prefill ended"]
        stages["decode"] = ticks.times[-1] - ticks.times[0]
        return {name: seconds * 1e3 for name, seconds in stages.items()}

    def _mark(self, name: str, *, last: bool = False) -> Callable[..., None]:
        """A hook that notes the first time of `name` in an answer; where `last` the head's, after the model's own."""
        seen = f"{name} by the head" if last else name

        def mark(*_: Any) -> None:
            if seen not in self._moments:
                self._moments[seen] = self._moments[name] = time.perf_counter()

        return mark


class Timed:
    """A picture processor that adds up the seconds of its calls."""

    def __init__(self, inner: Any) -> None:
        self._inner, self.seconds = inner, 0.0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        made = self._inner(*arguments, **options)
        self.seconds += time.perf_counter() - start
        return made

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class Ticks(BaseStreamer):
    """When each token was there; what is put first is the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._prompt = True

    def put(self, value: Any) -> None:
        """A token, or the prompt."""
        if self._prompt:
            self._prompt = False
        else:
            self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is kept back."""
