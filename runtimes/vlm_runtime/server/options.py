"""How `vlm-serve` was started, as `make_app` takes it."""

from __future__ import annotations

from dataclasses import dataclass, field

from vlm_models.errors import InputError
from vlm_runtime.server.limits import Limits


@dataclass(frozen=True)
class ServerOptions:
    """`queue`: how many requests may wait for the one that is answered; `image_hosts`: where pictures may lie.

    `model_name` is the one of /v1/models (None: the bundle's); `api_key`, `origins` and `loopback` are those of Access.
    Raises InputError for a value out of range.
    """

    api_key: str | None = None
    origins: tuple[str, ...] = ()
    loopback: bool = True
    queue: int = 64
    image_hosts: tuple[str, ...] = ()
    model_name: str | None = None
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.queue < 1:
            raise InputError(f"--queue {self.queue}: it must be 1 or more")
        if self.model_name == "":
            raise InputError("--model-name is empty: give a name, or leave it out")
