"""What a client may ask and what it gets, as OpenAI's chat API has it; the OpenAPI page is made from these.

As in OpenAI's API a field that is not known is refused. Known ones that this server has no use for are taken where they
change nothing (`user`, `n` = 1, `tools` = []) and refused where they would. `top_k`, `min_p` and
`repetition_penalty` are ours. Source: platform.openai.com/docs/api-reference/chat.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema, model_validator

_Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
_StopText = Annotated[str, Field(min_length=1, max_length=1000)]


def _refused_if_true(value: bool) -> bool:
    if value:
        raise ValueError("must be false, or left out")
    return value


# Literal[False] would take 0 as well.
_No = Annotated[bool, AfterValidator(_refused_if_true), WithJsonSchema({"type": "boolean", "const": False})]


class _Asked(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class TextPart(_Asked):
    """A text within a message."""

    type: Literal["text"]
    text: str


class ImageAddress(_Asked):
    """Where a picture is: a data URL, or an address on a host that the server was started for."""

    url: str
    detail: Literal["auto", "low", "high"] | None = Field(None, description="Taken, and without effect.")


class ImagePart(_Asked):
    """A picture within a user's message, at its place between the texts."""

    type: Literal["image_url"]
    image_url: ImageAddress


class SystemMessage(_Asked):
    """What the model is told before the conversation."""

    role: Literal["system", "developer"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: str | None = None


class UserMessage(_Asked):
    """A question, with pictures or without."""

    role: Literal["user"]
    content: str | Annotated[list[Annotated[TextPart | ImagePart, Field(discriminator="type")]], Field(min_length=1)]
    name: str | None = None


class AssistantMessage(_Asked):
    """An earlier answer."""

    role: Literal["assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: str | None = None
    refusal: None = None
    audio: None = None
    annotations: Annotated[list[str], Field(max_length=0)] | None = None
    tool_calls: Annotated[list[str], Field(max_length=0)] | None = None
    function_call: None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(_Asked):
    """`include_usage` adds a last chunk with the usage; `include_obfuscation` is taken, and without effect."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ResponseFormat(_Asked):
    """Only text."""

    type: Literal["text"]


class ChatRequest(_Asked):
    """The body of a request to /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    model: str | None = Field(None, description="The one of /v1/models, which is taken too where this is left out.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="The longest answer; less where the context or the server's limit ends before."
    )
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = Field(None, description="The same, and goes first.")
    stop: _StopText | Annotated[list[_StopText], Field(max_length=16)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        None, description="0, the best token always, unless given."
    )
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = Field(None, description="Draw from the k best; 0: all.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    seed: _Int64 | None = Field(None, description="Same seed, same answer.")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(None, description="Needs logprobs = true.")
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[str], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: _No | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="after")
    def _logprobs_are_asked(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs = true")
        return self


class TopLogprob(BaseModel):
    """A token that could have come, with the natural logarithm of its probability before temperature."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token that came."""

    top_logprobs: list[TopLogprob]


class Logprobs(BaseModel):
    """Of each token of the answer, or of this chunk."""

    content: list[TokenLogprob]


class PromptDetails(BaseModel):
    """`cached_tokens` lay in a KV cache already; `image_tokens` are rows of pictures."""

    cached_tokens: int
    image_tokens: int


class Usage(BaseModel):
    """Tokens in and out; those that pictures take are counted."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Reply(BaseModel):
    """The answer."""

    role: Literal["assistant"]
    content: str


class Choice(BaseModel):
    """`finish_reason`: "stop" is an end token or a stop text, "length" that there was no more room."""

    index: Literal[0]
    message: Reply
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    """A whole answer; `engines` and `timings_ms` are ours: queue, preprocess, vision, projector, prefill, ttft, decode.

    In milliseconds; `ttft` is from the request to the first token, `decode` all further ones.
    """

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: Annotated[list[Choice], Field(min_length=1, max_length=1)]
    usage: Usage
    timings_ms: dict[str, float]
    engines: dict[str, str]


class Delta(BaseModel):
    """What is new."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    """`finish_reason` is there in the last one."""

    index: Literal[0]
    delta: Delta
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"] | None


class Chunk(BaseModel):
    """A `data:` line of a streamed answer; the one with a `finish_reason` has `timings_ms` and `engines`."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: Annotated[list[ChunkChoice], Field(max_length=1)]
    usage: Usage | None = None
    timings_ms: dict[str, float] | None = None
    engines: dict[str, str] | None = None


class Served(BaseModel):
    """The model; what follows `owned_by` is ours: what runs each part, at which precision, and what fits."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    engines: dict[str, str]
    precisions: dict[str, str]
    max_context: int


class Models(BaseModel):
    """The one model there is."""

    object: Literal["list"]
    data: list[Served]


class Health(BaseModel):
    """The server is up; `api_key`: whether it wants one."""

    status: Literal["ok"]
    api_key: bool


class Problem(BaseModel):
    """What was wrong, in one line."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: Problem
