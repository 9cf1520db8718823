"""LLM: the roof. It joins the host column and the device column, and is what a Python user touches.

    from pdjax import LLM, SamplingParams
    llm = LLM("configs/smollm2_cpu.py")
    print(llm.generate("The capital of France is", SamplingParams(temperature=0.0))[0].text)

Everything is driven by one loop, `step`. `generate` and `stream` call it until their own requests
are done; a server or an experiment calls it itself, between `submit` and `take_output`.
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from pdjax.clock import Clock, WallClock
from pdjax.config import Config
from pdjax.config_load import load_config
from pdjax.device.build import build_engines, deal_devices
from pdjax.device.model.checkpoints.open import open_checkpoint
from pdjax.device.model.checkpoints.orbax import convert as convert_checkpoint
from pdjax.host.batch import Buckets
from pdjax.host.coordinator import Coordinator
from pdjax.host.metrics import Recorder
from pdjax.host.roster import Progress
from pdjax.host.text import TextStream
from pdjax.model_spec import ModelSpec
from pdjax.request import Completion, Request, RequestOutput, SamplingParams, Sequence
from pdjax.stream import Stream
from pdjax.tokenizer import Tokenizer

Prompt = str | Iterable[int]
Message = Mapping[str, str]


@dataclass
class _Asked:
    """A request that this front end still owes an answer to."""

    request: Request
    prompt: str | None
    sequences: list[Sequence]
    on_text: Callable[[str], None] | None


class LLM:
    """A model, served with prefill and decode on meshes of their own, in this process.

    Args:
      config: a config file, a preset's name, or a Config.
      overrides: fields to replace, by dotted names, such as `{"decode.rows": 16}`.
      clock: tells the time; wall time unless given.

    Raises:
      ValueError: a config, model or layout that cannot work, with the field, its value and what is
        allowed.
    """

    def __init__(
        self,
        config: str | Path | Config = "smollm2",
        overrides: Mapping[str, Any] | None = None,
        *,
        clock: Clock | None = None,
    ) -> None:
        self.config = config = load_config(config, overrides)
        deal_devices(config)  # too few are no reason to fetch and open a model first
        self.tokenizer: Tokenizer | None = None
        if config.model.spec is not None:  # random weights
            self.spec, checkpoint = config.model.spec, None
        else:
            checkpoint = open_checkpoint(config.model.source)
            self.spec, self.tokenizer = checkpoint.spec, checkpoint.tokenizer()
        self.max_model_len = _context(config, self.spec)
        self._engines = engines = build_engines(config, self.spec, self.max_model_len, checkpoint)
        self.prefill_engines, self.decode_engines = engines.prefill, engines.decode
        self.clock = clock or (WallClock(patience=0) if engines.on_host_cores else WallClock())
        self.recorder = Recorder(self.clock)
        self.coordinator = Coordinator(
            config,
            vocab_size=self.spec.vocab_size,
            max_model_len=self.max_model_len,
            end_token_ids=self.spec.eos_token_ids,
            prefill_engines=engines.prefill,
            decode_engines=engines.decode,
            transfer=engines.transfer,
            clock=self.clock,
            recorder=self.recorder,
            make_text=self._make_text if self.tokenizer else None,
        )
        self.coordinator.on_news = self._pass_on
        self._asked: dict[str, _Asked] = {}
        self._answers: dict[str, RequestOutput] = {}
        self._count = 0
        if config.warm_up:
            self.coordinator.warm_up(
                partial(tqdm, desc="compiling", unit="shape", delay=2, leave=False, disable=None)
            )
            self.recorder.clear()

    # Whole answers.

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts.

        Args:
          prompts: one prompt or several, each text or token ids.
          params: for all of them, or one for each; None takes the defaults.
          progress: show a bar; None shows one after two seconds where a person watches.

        Returns:
          An answer a prompt, in order. One that failed on the way says so in its `error`.

        Raises:
          ValueError: a prompt or params that can never be served. None of the prompts has been
            answered then.
        """
        several: list[Any] = [prompts] if _is_one(prompts) else list(prompts)
        if params is None or isinstance(params, SamplingParams):
            each = [params or SamplingParams()] * len(several)
        else:
            each = list(params)
        if len(each) != len(several):
            raise ValueError(
                f"params: {len(each)} given for {len(several)} prompts; must be one, or one each"
            )
        requests = [self._request(prompt, its) for prompt, its in zip(several, each, strict=True)]
        for request, _ in requests:
            self.coordinator.check_request(request)
        bar = tqdm(
            total=len(requests),
            desc="generating",
            unit="request",
            delay=2,
            leave=False,
            disable=not (sys.stderr.isatty() if progress is None else progress),
        )
        try:
            with bar:
                self._run(requests, bar)
        except BaseException:
            for request, _ in requests:
                self.abort(request.id)
                self.take_output(request.id)
            raise
        return [self._answers.pop(request.id) for request, _ in requests]

    def chat(
        self,
        messages: Seq[Message] | Seq[Seq[Message]],
        params: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
    ) -> list[RequestOutput]:
        """Answer a conversation, or several; each is a list of {"role": ..., "content": ...}.

        Otherwise as `generate`.

        Raises:
          ValueError: also where the model has no chat template, or refuses the messages.
        """
        one = bool(messages) and isinstance(messages[0], Mapping)
        conversations: list[Any] = [messages] if one else list(messages)
        template = self._need_tokenizer("chat").apply_chat_template
        prompts = [template(list(conversation)) for conversation in conversations]
        return self.generate(prompts, params, progress=progress)

    # An answer as it comes.

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Stream:
        """Complete one prompt, piece by piece. Whoever stops listening aborts the request.

        Raises:
          ValueError: at once, for what can never be served, or n > 1.
          QueueFull: at once, if the waiting queue is at its bound.
        """
        params = params or SamplingParams()
        if params.n > 1:
            raise ValueError(f"n={params.n}: a stream shows one choice; ask for n=1")
        request_id = self.submit(prompt, params)
        return Stream(self, request_id, self._asked[request_id].sequences[0])

    # One's own loop.

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        on_text: Callable[[str], None] | None = None,
    ) -> str:
        """Queue a request and return its id; `step` until `take_output` has its answer.

        Args:
          prompt, params: as for `generate`.
          on_text: called with each further piece of the first choice's text, from within `step`.

        Raises:
          ValueError: it can never be served.
          QueueFull: the waiting queue is at its bound.
        """
        request, text = self._request(prompt, params or SamplingParams())
        return self._submit(request, text, on_text)

    def step(self) -> None:
        """One turn of the coordinator's loop.

        Raises:
          Exception: whatever an `on_text` raised, once everybody's news has been taken; its own
            request is aborted, and nobody else is hurt.
        """
        self._pass_on(self.coordinator.step())

    def _pass_on(self, news: list[Progress]) -> None:
        """Tell everybody what is new of his request."""
        told = []
        for progress in news:
            asked = self._asked.get(progress.sequence.request.id)
            if asked is None:
                continue
            if asked.on_text is not None:
                told.append(asked)
            if progress.finished and all(sequence.done for sequence in asked.sequences):
                self._finish(asked)
        errors = [error for asked in told if (error := self._tell(asked)) is not None]
        if errors:
            raise errors[0]

    @property
    def has_work(self) -> bool:
        """Whether a `step` may still bring something."""
        return self.coordinator.has_work

    def take_output(self, request_id: str) -> RequestOutput | None:
        """The finished answer to a request, handed out once; None while it is not finished."""
        return self._answers.pop(request_id, None)

    def abort(self, request_id: str) -> None:
        """End a request wherever it is; its answer, as far as it came, says "abort"."""
        self.coordinator.abort(request_id)
        asked = self._asked.get(request_id)
        if asked is not None:
            self._finish(asked)

    def close(self) -> None:
        """Abort whatever is left and let the devices come to rest."""
        for request_id in list(self._asked):
            self.abort(request_id)
        self._answers.clear()
        while self.coordinator.has_work:
            self.coordinator.step()
        self._engines.rest()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # Inside.

    def _request(self, prompt: Prompt, params: SamplingParams) -> tuple[Request, str | None]:
        """A Request and, where the prompt was text, that text."""
        if not isinstance(params, SamplingParams):
            raise ValueError(f"params={params!r}: must be a SamplingParams")
        if params.stop and self.tokenizer is None:
            raise ValueError(f"stop={params.stop}: the model has no tokenizer, so there is no text")
        text = prompt if isinstance(prompt, str) else None
        if text == "":
            raise ValueError("prompt='': must not be empty")
        ids = (
            self._need_tokenizer("prompt").encode(text) if text is not None else _token_ids(prompt)
        )
        self._count += 1
        return Request(f"r{self._count}", tuple(ids), params, self.clock.now()), text

    def _submit(
        self, request: Request, text: str | None, on_text: Callable[[str], None] | None = None
    ) -> str:
        sequences = self.coordinator.submit(request)
        self._asked[request.id] = _Asked(request, text, sequences, on_text)
        return request.id

    def _run(self, requests: list[tuple[Request, str | None]], bar: tqdm) -> None:
        """Submit as the queue has room, and step until all are answered."""
        todo = requests[::-1]
        running: set[str] = set()
        while todo or running:
            while todo and self.coordinator.has_room(todo[-1][0].params.n):
                running.add(self._submit(*todo.pop()))
            self.step()
            done = self._answers.keys() & running
            running -= done
            bar.update(len(done))

    def _tell(self, asked: _Asked) -> Exception | None:
        """Pass on the further text of a request; returns what went wrong in passing it on."""
        if asked.on_text is None:
            return None
        text = asked.sequences[0].text.take() if asked.sequences[0].text is not None else ""
        try:
            if text:
                asked.on_text(text)
        except Exception as error:
            asked.on_text = None
            self.abort(asked.request.id)
            return error
        return None

    def _finish(self, asked: _Asked) -> None:
        self._asked.pop(asked.request.id, None)
        self._answers[asked.request.id] = RequestOutput(
            request_id=asked.request.id,
            prompt=asked.prompt,
            prompt_token_ids=list(asked.request.prompt_token_ids),
            choices=[self._completion(sequence) for sequence in asked.sequences],
        )

    def _completion(self, sequence: Sequence) -> Completion:
        return Completion(
            token_ids=list(sequence.output),
            text=sequence.text.text if sequence.text is not None else "",
            finish_reason=sequence.finish_reason,
            stop_reason=sequence.stop_reason,
            logprobs=(
                None if sequence.request.params.logprobs is None else list(sequence.logprobs)
            ),
            error=sequence.error,
            metrics=self.recorder.request(sequence),
        )

    def _make_text(self, request: Request) -> TextStream:
        assert self.tokenizer is not None
        decoder = self.tokenizer.incremental_decoder(after=request.prompt_token_ids)
        return TextStream(decoder, request.params.stop_strings)

    def _need_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            source = self.config.model.source
            raise ValueError(f"{what}: model.source={source!r} has no tokenizer; give token ids")
        return self.tokenizer


def convert(source: str, output: str | Path, dtype: str = "float32") -> None:
    """Write the model `source`, anything that a config may name, as an Orbax checkpoint.

    Raises:
      ValueError: no such model, or `output` exists already.
    """
    convert_checkpoint(open_checkpoint(source), Path(output), dtype)


def _context(config: Config, spec: ModelSpec) -> int:
    """Longest sequence served, tokens; whether it can be is known before any weights are read."""
    asked = config.model.max_model_len
    if asked is not None and asked > spec.context:
        raise ValueError(
            f"model.max_model_len={asked}: the model's context is {spec.context}; "
            "must be at most that"
        )
    context = asked or spec.context
    Buckets.of(config.prefill, config.decode, config.kv.page_size, context, config.decode_page_size)
    return context


def _is_one(prompts: Any) -> bool:
    """Whether it is a single prompt: text, or token ids."""
    if isinstance(prompts, str):
        return True
    if not isinstance(prompts, Iterable):
        raise ValueError(f"prompts={prompts!r}: must be text or token ids, or a list of those")
    return any(isinstance(each, Integral) for each in prompts)


def _token_ids(prompt: Any) -> list[int]:
    """The ids of a prompt that is not text; any integers, those of numpy too."""
    ids = list(prompt) if isinstance(prompt, Iterable) else None
    if ids is not None and set(map(type, ids)) <= {int}:
        return ids  # to look at each takes a microsecond, for which everybody who decodes waits
    if ids is None or not all(isinstance(token, Integral) for token in ids):
        raise ValueError(f"prompt={prompt!r}: must be text or a list of token ids")
    return [int(token) for token in ids]
