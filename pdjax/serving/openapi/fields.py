"""What the document says of the fields of requests: their meaning, their bounds, an example.

The bounds are checked elsewhere (`SamplingParams`, `Limits`); a test sends values at the edges of
what is written here.
"""

from dataclasses import dataclass, field
from typing import Any

from pdjax.core.request import MAX_CACHE_PIN, MAX_CACHE_SALT, MAX_PRIORITY


@dataclass(frozen=True)
class FieldNote:
    """What is said of a field.

    Attributes:
      text: its meaning; "without it" says what null and a missing field mean.
      bounds: keywords of JSON Schema, for the field's numbers, texts or items; under `items` those
        for the objects of a list.
      example: a value, where the type alone does not show one.
    """

    text: str
    bounds: dict[str, Any] = field(default_factory=dict)
    example: Any = None


_CHOICES = "Choices for each prompt; more than one need a temperature above 0. Without it 1."
_TEMPLATE = "Variables for the chat template, as `enable_thinking`."
_CONTENT = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["type", "text"],
                "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
            },
        },
        {"type": "null"},
    ]
}
_MESSAGE = {
    "required": ["role"],
    "properties": {"role": {"type": "string", "minLength": 1}, "content": _CONTENT},
}
_TOKENS = "Most tokens of a choice. Without it "

FIELDS: dict[str, FieldNote] = {
    "model": FieldNote("The served model's name. Without it the only one."),
    "temperature": FieldNote(
        "0 is greedy; otherwise logits are divided by it. Without it 1.", {"minimum": 0}, 0.7
    ),
    "top_p": FieldNote(
        "Keep the smallest set of likeliest tokens whose probability reaches it. Without it 1.",
        {"exclusiveMinimum": 0, "maximum": 1},
    ),
    "top_k": FieldNote(
        "Keep so many of the likeliest tokens; 0 and -1 keep all. Without it 0.", {"minimum": -1}
    ),
    "min_p": FieldNote(
        "Drop tokens less likely than so many times the likeliest. Without it 0.",
        {"minimum": 0, "exclusiveMaximum": 1},
    ),
    "seed": FieldNote("Makes the tokens reproducible. Without it one is drawn.", {}, 7),
    "stop": FieldNote(
        "Texts that end a choice; they are not part of it. At most 1,024, of at most 16,384 "
        "characters together.",
        {"minLength": 1},
        ["\n\n"],
    ),
    "stop_token_ids": FieldNote(
        "Tokens that end a choice besides the model's own; at most 4,096.", {"minimum": 0}
    ),
    "ignore_eos": FieldNote("Go on past the model's end tokens. Without it false."),
    "min_tokens": FieldNote(
        "Tokens before which nothing ends a choice but its bound. Without it 0.", {"minimum": 0}
    ),
    "logit_bias": FieldNote(
        "Added to logits, -100 to 100, by token ids as text; at most 1,024.", {}, {"5": -100}
    ),
    "allowed_token_ids": FieldNote("The only tokens that are chosen.", {"minimum": 0}),
    "response_format": FieldNote(
        "The form of the text: `text`, `json_object`, or `json_schema` with a schema.",
        {},
        {"type": "json_object"},
    ),
    "structured_outputs": FieldNote(
        "The form of the text: one of `json`, `json_object`, `regex`, `choice` and `grammar`.",
        {},
        {"regex": "[0-9]+"},
    ),
    "guided_json": FieldNote("A JSON schema that the text is valid under.", {}, {"type": "object"}),
    "guided_regex": FieldNote("A regular expression that matches the whole text.", {}, "[0-9]+"),
    "guided_choice": FieldNote("The texts of which it is one.", {}, ["yes", "no"]),
    "guided_grammar": FieldNote(
        "A context-free grammar that derives it, in Lark's syntax or GBNF.", {}, 'start: "a"+'
    ),
    "presence_penalty": FieldNote(
        "Subtracted once from the logit of a token generated before. Without it 0."
    ),
    "frequency_penalty": FieldNote(
        "Subtracted for each time that a token was generated before. Without it 0."
    ),
    "repetition_penalty": FieldNote(
        "Divides positive and multiplies negative logits of tokens of prompt and answer. Without "
        "it 1.",
        {"exclusiveMinimum": 0},
    ),
    "stream": FieldNote("Answer with server-sent events. Without it false."),
    "user": FieldNote("Who asks, for policies and observers; its first 512 characters count."),
    "priority": FieldNote(
        "The lower, the earlier, where the server goes by it (`policies.prefill` and "
        "`policies.decode` of its config). Without it 0.",
        {"minimum": -MAX_PRIORITY, "maximum": MAX_PRIORITY},
    ),
    "deadline": FieldNote(
        "Seconds within which the answer is wanted. Where the server sheds (`policies.admission`) "
        "a request of which no choice has begun then is a 503; otherwise it is for the order of "
        "the queue.",
        {"exclusiveMinimum": 0},
        30.0,
    ),
    "slo": FieldNote(
        "Latencies that are wanted. Where the server sheds, a request that would miss them is a "
        "503, and one that no empty server could serve so a 400."
    ),
    "ttft": FieldNote("Seconds to the first token.", {"exclusiveMinimum": 0}, 0.5),
    "tpot": FieldNote("Mean seconds from token to token after it.", {"exclusiveMinimum": 0}, 0.05),
    "cache_salt": FieldNote(
        "Cached prefixes are shared only with requests of the same salt, so that nobody else "
        "learns from the time to a first token what a prompt begins with.",
        {"minLength": 1, "maxLength": MAX_CACHE_SALT},
        "a secret of the tenant's",
    ),
    "cache_pin": FieldNote(
        "Seconds for which the prompt's KV is not evicted, from when it is computed; a later "
        "request with the same prompt says it anew, and 0 lets go of it. Where too much is pinned "
        "already, the prompt is not; a prompt that may never be pinned is a 400.",
        {"minimum": 0, "maximum": MAX_CACHE_PIN},
        600.0,
    ),
    "n": FieldNote(_CHOICES, {"minimum": 1}),
    "max_tokens": FieldNote(
        _TOKENS + "16. 0 is only for `echo`: the prompt alone.", {"minimum": 0}, 64
    ),
    "stream_options": FieldNote("Only with `stream`."),
    "include_usage": FieldNote("A last chunk without choices has the usage."),
    "continuous_usage_stats": FieldNote("With `include_usage`: every chunk has it."),
    "return_token_ids": FieldNote("The answer has the token ids of prompt and choices, too."),
    "return_tokens_as_token_ids": FieldNote(
        "Log-probabilities name tokens `token_id:N` instead of by their texts."
    ),
    "prompt_logprobs": FieldNote(
        "Log-probabilities of the prompt's tokens, each with so many of the likeliest ones; only "
        "without `stream`.",
        {"minimum": 0},
    ),
    "prompt": FieldNote(
        "A text, a list of texts, token ids, or a list of those.", {}, "The capital of France is"
    ),
    "echo": FieldNote("The prompt goes before each choice; with `logprobs`, theirs, too."),
    "best_of": FieldNote("Only the value of `n` is taken.", {"minimum": 1}),
    "messages": FieldNote(
        "The conversation: `role` and `content`, a text or parts of type `text`; earlier "
        "`tool_calls`, and any field that the model's chat template reads.",
        {"minItems": 1, "items": _MESSAGE},
        [{"role": "user", "content": "What is the capital of France?"}],
    ),
    "max_completion_tokens": FieldNote(
        "Goes before `max_tokens`, and means the same.", {"minimum": 1}
    ),
    "tools": FieldNote("Functions that the model may call, given to the chat template."),
    "tool_choice": FieldNote(
        "`auto`; `none`: the template is given no tools; `required` or a function by its name: the "
        "answer is held to a call.",
        {},
        "auto",
    ),
    "parallel_tool_calls": FieldNote("False tells the first call alone."),
    "include_reasoning": FieldNote("False leaves the reasoning out of the answer."),
    "documents": FieldNote("Documents for the chat template."),
    "chat_template_kwargs": FieldNote(_TEMPLATE),
    "add_generation_prompt": FieldNote(
        "The prompt ends with the beginning of the model's turn. Without it true."
    ),
    "add_special_tokens": FieldNote("The text gets the tokens that begin a sequence."),
    "return_token_strs": FieldNote("The answer has the text of each token, too."),
    "tokens": FieldNote("Token ids of the model's vocabulary.", {"minimum": 0}, [1, 2, 3]),
    "top_logprobs": FieldNote("With `logprobs`: so many of the likeliest tokens.", {"minimum": 0}),
    "input": FieldNote(
        "A text, or the messages of a conversation.", {}, "What is the capital of France?"
    ),
    "instructions": FieldNote("A system message before the rest."),
    "max_output_tokens": FieldNote(_TOKENS + "to the end of the context.", {"minimum": 1}, 64),
    "metadata": FieldNote("Given back in the response."),
    "text": FieldNote(
        "Its `format` is the form of the text: `text`, `json_object`, or `json_schema` with a "
        "schema."
    ),
    "CompletionRequest.logprobs": FieldNote(
        "Log-probabilities of the tokens, each with so many of the likeliest ones.", {"minimum": 0}
    ),
    "ChatRequest.logprobs": FieldNote("Log-probabilities of the tokens."),
    "ChatRequest.max_tokens": FieldNote(_TOKENS + "to the end of the context.", {"minimum": 1}),
    "TokenizeRequest.prompt": FieldNote("A text; or give `messages`."),
}
"""What is said of a field, by its name, or by its body and name where that says otherwise."""
