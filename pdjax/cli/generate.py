"""`pdjax generate`: complete prompts, or answer them as a chat."""

import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from pdjax.cli.command import Command
from pdjax.config import Config
from pdjax.core.logprobs import TokenLogprobs
from pdjax.core.outputs import Completion, RequestOutput
from pdjax.core.progress import Progress
from pdjax.core.request import SamplingParams
from pdjax.flags import config_of, new_flags
from pdjax.formats.strict_json import dumps

if TYPE_CHECKING:
    from pdjax.llm import LLM

USAGE = """
pdjax generate: complete prompts, or answer them as a chat.

  pdjax generate --prompt="The capital of France is" --max_tokens=16
  pdjax generate --chat --stream --prompt="What is the capital of France?"
  pdjax generate --prompts_file=questions.txt --json > answers.jsonl
  pdjax generate --config=configs/smollm2_cpu.py --config.decode.rows=20 --prompt="Hello"

With --json a number that is not finite, such as a log-probability of minus infinity, is null.
"""

_FLAGS = new_flags(config="smollm2")
_OF: dict[str, Any] = {"flag_values": _FLAGS}
_PROMPT = flags.DEFINE_multi_string("prompt", [], "text to go on from; may be repeated", **_OF)
_PROMPTS_FILE = flags.DEFINE_string("prompts_file", None, "file, a prompt a line", **_OF)
_CHAT = flags.DEFINE_bool("chat", False, "each prompt is a user's message", **_OF)
_STREAM = flags.DEFINE_bool("stream", False, "show the text as it comes", **_OF)
_JSON = flags.DEFINE_bool("json", False, "write a JSON object a prompt", **_OF)
_PROGRESS = flags.DEFINE_bool("progress", True, "tell on stderr what takes long", **_OF)
flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token", **_OF)
flags.DEFINE_integer("top_k", 0, "choose among the k likeliest; 0: among all", **_OF)
flags.DEFINE_float("top_p", 1.0, "choose among the likeliest that add up to p", **_OF)
flags.DEFINE_float("min_p", 0.0, "drop what is below this share of the likeliest", **_OF)
flags.DEFINE_integer("seed", None, "the same seed, the same choices", **_OF)
flags.DEFINE_integer("max_tokens", 128, "most tokens to generate", **_OF)
flags.DEFINE_multi_string("stop", [], "text to end before; may be repeated", **_OF)
flags.DEFINE_multi_integer("stop_token_ids", [], "token to end at; may be repeated", **_OF)
flags.DEFINE_bool("ignore_eos", False, "go on past the model's end tokens", **_OF)
flags.DEFINE_integer("logprobs", None, "with --json: of so many likeliest tokens", **_OF)
flags.DEFINE_integer("prompt_logprobs", None, "the same, of the prompt's tokens", **_OF)
flags.DEFINE_float("presence_penalty", 0.0, "for a token already generated", **_OF)
flags.DEFINE_float("frequency_penalty", 0.0, "for each time it was generated", **_OF)
flags.DEFINE_float("repetition_penalty", 1.0, "factor, prompt included", **_OF)
flags.DEFINE_integer("n", 1, "choices to generate a prompt", **_OF)


def generate() -> int:
    """`pdjax generate`; status 1 where a request failed on the way, or was shed."""
    prompts = _prompts()
    for text in _FLAGS["stop"].value or ():
        _check_text("stop", text)
    if sys.stdout is None:
        raise ValueError("stdout: is closed, so no answer could be shown")
    asked: dict[str, Any] = {
        field.name: _FLAGS[field.name].value
        for field in dataclasses.fields(SamplingParams)
        if field.name in _FLAGS
    }
    params = SamplingParams(**asked)
    if _STREAM.value and (_JSON.value or len(prompts) > 1 or params.n > 1):
        raise ValueError("stream: shows one choice of one prompt, and not as json")
    progress = Progress(bool(_PROGRESS.value))
    with progress.phase("importing JAX"):
        from pdjax.llm import LLM

    config = _for_one_run(config_of(_FLAGS))
    with LLM(config, progress=progress.shown) as llm:
        if not config.warm_up:
            with progress.phase("compiling"):
                _rehearse(llm, prompts, params)
        if _STREAM.value:
            return _stream(llm, prompts[0], params)
        outputs = _answers(llm, prompts, params)
    show = _show_json if _JSON.value else _show_text
    for prompt, output in zip(prompts, outputs, strict=True):
        show(prompt, output, several=len(prompts) > 1)
    return int(any(choice.error for output in outputs for choice in output.choices))


def _for_one_run(config: Config) -> Config:
    """A command answers once and ends. So it compiles what a rehearsal meets, not every bucket, and
    one width of decode's page table, so that nothing is left to compile between two tokens.
    """
    decode, longest = config.decode, config.model.max_model_len
    if not config.warm_up:
        return config
    if decode.page_buckets is None and longest is not None:
        pages = -(-longest // config.decode_page_size)
        decode = dataclasses.replace(decode, page_buckets=(pages,))
    return dataclasses.replace(config, warm_up=False, decode=decode)


_REHEARSED = 3
"""Tokens of a rehearsal: one of prefill, and two ticks of decode."""

_APART = "rehearsal"
"""The `cache_salt` of a rehearsal: no answer finds what it leaves in the prefix cache."""


def _rehearse(llm: "LLM", prompts: list[str], params: SamplingParams) -> None:
    """Answer the first few tokens and forget them, so that compiling counts as nobody's latency."""
    few = min(params.max_tokens or _REHEARSED, _REHEARSED)
    rehearsed = dataclasses.replace(params, max_tokens=few)
    _answers(llm, prompts, rehearsed, progress=False, salt=_APART)
    llm.recorder.clear()


def _answers(
    llm: "LLM",
    prompts: list[str],
    params: SamplingParams,
    progress: bool | None = None,
    salt: str | None = None,
) -> list[RequestOutput]:
    if _CHAT.value:
        chats = [_as_chat(prompt) for prompt in prompts]
        return llm.chat(chats, params, progress=progress, cache_salt=salt)
    return llm.generate([*prompts], params, progress=progress, cache_salt=salt)


def _prompts() -> list[str]:
    if bool(_PROMPT.value) == bool(_PROMPTS_FILE.value):
        raise ValueError("prompt: give either --prompt=TEXT, once or more, or --prompts_file=FILE")
    if _PROMPTS_FILE.value is None:
        for prompt in _PROMPT.value:
            if not prompt:
                raise ValueError("prompt='': must not be empty")
            _check_text("prompt", prompt)
        return _PROMPT.value
    path = Path(_PROMPTS_FILE.value)
    try:
        found = path.is_file()
    except ValueError:  # a name that no file can have
        found = False
    if not found:
        raise ValueError(f"prompts_file={_PROMPTS_FILE.value!r}: no such file")
    try:
        # A mark at the front says only that it is UTF-8. Lines end where editors end them: other
        # separators that Unicode has may stand within a prompt.
        lines = path.read_text("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"prompts_file={_PROMPTS_FILE.value!r}: must be UTF-8, but the byte at {error.start} "
            "is not"
        ) from error
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"prompts_file={_PROMPTS_FILE.value!r}: must hold a prompt a line")
    return prompts


def _check_text(name: str, text: str) -> None:
    """What a shell has passed on is text, not bytes that are no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name}={text!r}: must be UTF-8, but the character at {error.start} is not"
        ) from error


def _as_chat(prompt: str) -> list[dict]:
    return [{"role": "user", "content": prompt}]


def _stream(llm: "LLM", prompt: str, params: SamplingParams) -> int:
    output = None
    chat = _CHAT.value
    for chunk in llm.stream_chat(_as_chat(prompt), params) if chat else llm.stream(prompt, params):
        print(chunk.text, end="", flush=True)
        output = chunk.output or output
    print()
    if output is None or not output.choices[0].error:
        return 0
    _tell_failure(prompt, output.choices[0])
    return 1


def _show_text(prompt: str, output: RequestOutput, several: bool) -> None:
    """A choice's text, under a heading where there are several prompts or choices."""
    for number, choice in enumerate(output.choices, start=1):
        if several or len(output.choices) > 1:
            which = f", choice {number}" if len(output.choices) > 1 else ""
            print(f"--- {prompt!r}{which}")
        print(choice.text)
        if choice.error:
            _tell_failure(prompt, choice)


def _tell_failure(prompt: str, choice: Completion) -> None:
    print(f"pdjax generate: {prompt!r} failed: {choice.error}", file=sys.stderr)


def _show_json(prompt: str, output: RequestOutput, several: bool) -> None:
    """An object a line, whether there are several or not."""
    answer = {
        "request_id": output.request_id,
        "prompt": prompt,
        "prompt_token_ids": output.prompt_token_ids,
        "prompt_logprobs": _logprobs_json(output.prompt_logprobs),
        "choices": [_choice_json(choice) for choice in output.choices],
    }
    print(dumps(answer))


def _choice_json(choice: Completion) -> dict[str, Any]:
    return {
        "text": choice.text,
        "token_ids": choice.token_ids,
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
        "error": choice.error,
        "logprobs": _logprobs_json(choice.logprobs),
        "metrics": choice.metrics.to_json() if choice.metrics is not None else None,
    }


def _logprobs_json(entries: Iterable[TokenLogprobs | None] | None) -> list[Any] | None:
    if entries is None:
        return None
    return [None if entry is None else dataclasses.asdict(entry) for entry in entries]


COMMAND = Command(generate, _FLAGS, USAGE)
