"""Errors as OpenAI's API writes them: {"error": {message, type, param, code}} with the status that fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import ValidationError
from pydantic_core import from_json

from vlm_models.errors import ImageError, InputError, PromptError, VLMError

_CODES = {ImageError: "invalid_image", PromptError: "invalid_prompt"}
_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class RefusedError(Exception):
    """A request that is not answered: its HTTP status, one line why, and which field it was."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """As JSON has it."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """As HTTP has it."""
        return JSONResponse(self.body, self.status, self.headers)


def refused(error: BaseException) -> RefusedError:
    """What an error means to a client: mistakes are named, of bugs nothing is told."""
    if isinstance(error, RefusedError):
        return error
    if isinstance(error, InputError):
        return RefusedError(400, str(error), code=_CODES.get(type(error)), param="messages")
    if isinstance(error, VLMError):
        return RefusedError(500, str(error))
    return RefusedError(500, "the server made a mistake: its log says which")


def invalid(error: ValidationError, body: bytes) -> RefusedError:
    """What is wrong with a body that is no JSON, or none of the schema: the nearest miss, where a value has forms."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    first = max(found, key=lambda one: len(one["loc"]))
    message = " ".join(first["msg"].removeprefix("Value error, ").split())[:300]
    if first["type"] == "json_invalid":
        return RefusedError(400, f"the body is not JSON: {message.removeprefix('Invalid JSON: ')}")
    param = _place(first["loc"], from_json(body), absent=first["type"] == "missing")
    if first["type"] == "extra_forbidden":
        return RefusedError(400, f"unknown field {param!r}: leave it out", param=param, code="unknown_parameter")
    return RefusedError(400, f"{param}: {message}" if param else message, param=param)


def _place(steps: Sequence[int | str], value: Any, *, absent: bool) -> str | None:
    """Where in the body: pydantic's path without the names of the forms that it tried."""
    place = []
    for step in steps:
        if (isinstance(value, dict) and step in value) or (isinstance(value, list) and isinstance(step, int)):
            value = value[step]  # type: ignore[index]
            place.append(str(step))
    if absent:
        place.append(str(steps[-1]))
    return ".".join(place)[:200] or None
