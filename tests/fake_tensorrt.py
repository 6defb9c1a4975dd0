"""Stands in for full TensorRT, whose libraries are on no registry: writes down what the builder asks of it.

Copied as tensorrt.py into a folder of its own. Its engines are the requests that made them, as JSON.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace as Bag
from typing import Any

__version__ = "10.13.3.9"
INPUTS = {
    "vision_encoder": {"pixel_values": (-1, 3, 32, 32)},
    "projector": {"image_features": (-1, 4, 8)},
    "language_model": {"inputs_embeds": (1, -1, 32), "position": (1,), "past_key.0": (1, 2, -1, 16)},
}
NetworkDefinitionCreationFlag = Bag(EXPLICIT_BATCH=0, STRONGLY_TYPED=1)


class ILogger:
    ERROR = 1


class Network:
    num_layers = 0

    def __init__(self, flags: int) -> None:
        self.flags, self.inputs = flags, {}

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    def get_input(self, index: int) -> Any:
        name, shape = list(self.inputs.items())[index]
        return Bag(name=name, shape=shape, is_shape_tensor=name == "position")


class OnnxParser:
    def __init__(self, network: Network, logger: ILogger) -> None:
        self.network = network

    def parse_from_file(self, path: str) -> bool:
        self.network.inputs = INPUTS[Path(path).stem]
        return Path(path).is_file()


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, Any] = {}

    def set_shape(self, name: str, *three: Any) -> None:
        self.shapes[name] = three

    set_shape_input = set_shape


class Config:
    def __init__(self) -> None:
        self.profiles: list[Profile] = []
        self.cache: Any = None

    def add_optimization_profile(self, profile: Profile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, data: bytes) -> Any:
        return Bag(serialize=lambda: data + b"t")

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> None:
        self.cache = cache

    def get_timing_cache(self) -> Any:
        return self.cache


class Builder:
    def __init__(self, logger: ILogger) -> None:
        os.write(1, b"[TRT] greeting on stdout\n")

    def create_network(self, flags: int) -> Network:
        return Network(flags)

    def create_builder_config(self) -> Config:
        return Config()

    def create_optimization_profile(self) -> Profile:
        return Profile()

    def build_serialized_network(self, network: Network, config: Config) -> bytes:
        (profile,) = config.profiles
        return json.dumps({"flags": network.flags, "shapes": profile.shapes}).encode()
