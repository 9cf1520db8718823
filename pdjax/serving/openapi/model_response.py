"""The answers of `/v1/responses`, for the document; see answers.py."""

from typing import Any, Literal

from pydantic import Field

from pdjax.serving.openapi.answers import Answer


class OutputText(Answer):
    """A part of a message that is text."""

    type: Literal["output_text"]
    text: str
    annotations: list[dict[str, Any]] = Field(max_length=0)
    logprobs: list[dict[str, Any]] = Field(max_length=0)


ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputMessage(Answer):
    """A message of a response."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: ItemStatus
    content: list[OutputText]


class ReasoningText(Answer):
    """A part of reasoning that is text."""

    type: Literal["reasoning_text"]
    text: str


class OutputReasoning(Answer):
    """Reasoning before a message."""

    id: str
    type: Literal["reasoning"]
    status: ItemStatus
    summary: list[dict[str, Any]] = Field(max_length=0)
    content: list[ReasoningText]


class OutputCall(Answer):
    """A call of a tool."""

    id: str
    type: Literal["function_call"]
    status: ItemStatus
    call_id: str
    name: str
    arguments: str
    """A JSON object, as text."""


class InputDetails(Answer):
    """Of the tokens of the input."""

    cached_tokens: int
    """Tokens whose KV was found in the prefix cache."""
    cache_write_tokens: int


class OutputDetails(Answer):
    """Of the tokens of the output."""

    reasoning_tokens: int


class ResponseUsage(Answer):
    """Tokens of a response."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class IncompleteDetails(Answer):
    """Why a response was cut."""

    reason: Literal["max_output_tokens"]


class ModelResponse(Answer):
    """What `/v1/responses` answers; a stream tells of it in events that name it `response`."""

    id: str
    """Ends with the request's `x-request-id`."""
    object: Literal["response"]
    created_at: int
    """Seconds since 1970."""
    model: str
    status: ItemStatus
    output: list[OutputMessage | OutputReasoning | OutputCall]
    usage: ResponseUsage | None
    """Null until the response has ended."""
    error: None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    temperature: float
    top_p: float
    user: str | None
    text: dict[str, Any]
    background: Literal[False]
    store: Literal[False]
    previous_response_id: None
    truncation: Literal["disabled"]
    parallel_tool_calls: bool
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
