"""The answers of completions and chats, for the document alone: no answer is made of these classes,
or checked by them. Fields that OpenAI's and vLLM's APIs have, too, mean what they mean there."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

FinishReason = Literal["stop", "length", "tool_calls"]


class Answer(BaseModel):
    """A part of an answer; the text of a class is its description."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class PromptDetails(Answer):
    """Of the tokens of the prompt."""

    cached_tokens: int
    """Tokens whose KV was found in the prefix cache."""


class CompletionDetails(Answer):
    """Of the tokens of the answer."""

    reasoning_tokens: int
    """Tokens of the reasoning."""


class Usage(Answer):
    """Tokens of all prompts and all choices of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails | None = None


class Head(Answer):
    """What every answer and every chunk of completions and chats begins with."""

    id: str
    """Ends with the request's `x-request-id`."""
    created: int
    """Seconds since 1970."""
    model: str


class PromptLogprob(Answer):
    """A token that may stand at a place of a prompt."""

    logprob: float
    rank: int
    """Its place among all tokens; the likeliest has 1."""
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""For each token of a prompt, the tokens that may stand there, by id; null for the first."""


class EndOfChoice(Answer):
    """How a choice ended, and its token ids."""

    finish_reason: FinishReason | None
    """Null in every chunk but the last of a choice."""
    stop_reason: str | int | None
    """The stop string or the stop token that ended it; null where it was none of the request's."""
    token_ids: list[int] | None = None
    """With `return_token_ids`."""


class TokenLogprobs(Answer):
    """Log-probabilities of `/v1/completions`, a list entry for each token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(EndOfChoice):
    """A choice of a prompt, or what is new of it."""

    index: int
    """Choice c of prompt p has index p * n + c."""
    text: str
    logprobs: TokenLogprobs | None
    prompt_token_ids: list[int] | None = None
    """With `return_token_ids`, once for each choice."""
    prompt_logprobs: PromptLogprobs | None = None
    """With `prompt_logprobs`."""


class Completion(Head):
    """Texts that continue the prompts."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunk(Head):
    """An event of a stream of `/v1/completions`."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    """One choice; none in the chunk that has the usage alone."""
    usage: Usage | None = None
    """With `stream_options`."""


class CalledFunction(Answer):
    """A function that is to be called."""

    name: str
    arguments: str
    """A JSON object, as text."""


class ToolCall(Answer):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(Answer):
    """The model's turn."""

    role: Literal["assistant"]
    content: str | None
    """Null where there is nothing but reasoning or calls."""
    reasoning: str | None = None
    tool_calls: list[ToolCall] | None = None


class NamedLogprob(Answer):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int]
    """The token's text in UTF-8."""


class ChatTokenLogprob(NamedLogprob):
    """A token of the answer, and the likeliest ones in its place."""

    top_logprobs: list[NamedLogprob]


class ChatLogprobs(Answer):
    """Log-probabilities of `/v1/chat/completions`."""

    content: list[ChatTokenLogprob]


class ChatChoice(EndOfChoice):
    """A whole answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None


class ChatCompletion(Head):
    """Answers to a conversation."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None
    """With `return_token_ids`."""
    prompt_logprobs: PromptLogprobs | None = None
    """With `prompt_logprobs`."""


class FunctionDelta(Answer):
    """What is new of a called function."""

    name: str | None = None
    arguments: str


class ToolCallDelta(Answer):
    """What is new of a call; its id and name come once."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class ChatDelta(Answer):
    """What is new of a message."""

    role: Literal["assistant"] | None = None
    """In the first chunk of a choice."""
    content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(EndOfChoice):
    """What is new of a choice."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None


class ChatCompletionChunk(Head):
    """An event of a stream of `/v1/chat/completions`."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    """One choice; none in the chunk that has the usage alone."""
    usage: Usage | None = None
    """With `stream_options`."""
    prompt_token_ids: list[int] | None = None
    """With `return_token_ids`, in the first chunk."""
