"""The OpenAPI page: what FastAPI writes of the routes, made true where the body and the refusals are our own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlm_runtime.server.limits import REFUSALS
from vlm_runtime.server.schema import ChatRequest, Chunk, ErrorBody

if TYPE_CHECKING:
    from fastapi import FastAPI

_BY_HEAD = (403, 421)  # whatever was asked, who asks may be refused
_OURS = {
    404: "There is no model of this name.",
    500: "The server or the model failed; nothing is wrong with the request.",
    503: "The server is shutting down.",
}
_CHAT = "/v1/chat/completions"
_REFERENCE = "#/components/schemas/{model}"


def responses(*, open_to_all: bool = False, chat: bool = False, text: str | None = None) -> dict[int | str, Any]:
    """The `responses` of a route: one `open_to_all` needs no key; `text` is the type of one that gives no JSON."""
    statuses = [*REFUSALS, *_OURS] if chat else [*_BY_HEAD, *([] if open_to_all else [401])]
    said: dict[int | str, Any] = {
        status: {"model": ErrorBody, "description": {**REFUSALS, **_OURS}[status]} for status in sorted(statuses)
    }
    if chat:
        events = "With `stream`: `data:` lines, each a Chunk or an ErrorBody, then `data: [DONE]`."
        said[200] = {"description": f"The answer. {events}", "content": {"text/event-stream": {}}}
        said[429]["headers"] = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
    if text:
        said[200] = {"content": {text: {"schema": {"type": "string"}}}}
    return said


def describe(app: FastAPI, name: str, *, key: bool) -> None:
    """Make `app.openapi()` say what the chat takes (model `name` alone) and whether a `key` is needed."""
    made = app.openapi()  # kept by FastAPI, which serves it
    made["paths"][_CHAT]["post"]["requestBody"] = {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": _REFERENCE.format(model=ChatRequest.__name__)}}},
    }
    schemas = made["components"]["schemas"]
    for model in (ChatRequest, Chunk):
        schema = model.model_json_schema(ref_template=_REFERENCE)
        schemas |= schema.pop("$defs", {})
        schemas[model.__name__] = schema
    schemas[ChatRequest.__name__]["properties"]["model"] |= {"enum": [name, None]}
    if key:
        made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, item in made["paths"].items():
            for operation in item.values():
                operation["security"] = [] if path == "/health" else [{"key": []}]
