"""LLM: what a Python user touches.

    from pdjax import LLM, SamplingParams
    llm = LLM("configs/smollm2_cpu.py")
    print(llm.generate("The capital of France is", SamplingParams(temperature=0.0))[0].text)

Everything is driven by one loop, `step`. `generate` and `stream` drive it until their own requests
are done; an experiment calls it itself, between `submit` and `take_output`; after `session.start` a
thread of its own does. All of it may be called from any thread; see `pdjax/session.py`. Programs
that use asyncio have `AsyncLLM`.
"""

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from types import TracebackType
from typing import Any, Unpack

from pdjax.config import Config
from pdjax.config.load import load_config
from pdjax.core.clock import Clock
from pdjax.core.ids import EngineId
from pdjax.core.outputs import RequestOutput
from pdjax.core.progress import Progress
from pdjax.core.request import SamplingParams
from pdjax.core.roles import Role
from pdjax.core.slo import SLO
from pdjax.deploy import deploy
from pdjax.entry import Listener
from pdjax.host.metrics.summary import report
from pdjax.host.metrics.trace import write_trace
from pdjax.host.sequences.sequence import Sequence
from pdjax.request_maker import Asked, ChatOptions, RequestOptions
from pdjax.stream import Stream
from pdjax.text.prompts import Prompt
from pdjax.text.tokenizer import Message


class LLM:
    """A model, served with prefill and decode on meshes of their own, in this process.

    Any thread may use it. Ctrl-C takes effect between two turns of the loop; the call that it
    breaks off aborts its own requests, and the LLM goes on.

    Args:
      config: a config file, a preset's name, or a Config.
      overrides: fields to replace, by dotted names, such as `{"decode.rows": 16}`.
      backend, policies, clock, progress: as for `deploy`.

    Attributes:
      deployment: what it stands on; `engines`, `coordinator`, ... are those of it.

    Raises:
      ValueError: a config, model or layout that cannot work, with the field, its value and what is
        allowed.
    """

    def __init__(
        self,
        config: str | Path | Config = "smollm2",
        overrides: Mapping[str, Any] | None = None,
        *,
        backend: str = "device",
        policies: Mapping[str, Any] | None = None,
        clock: Clock | None = None,
        progress: bool = True,
    ) -> None:
        loaded = load_config(config, overrides)
        self.deployment = made = deploy(loaded, backend, policies, clock=clock, progress=progress)
        self._progress = progress
        self.config, self.spec, self.tokenizer = made.config, made.spec, made.tokenizer
        self.max_model_len = made.max_model_len
        self.engines, self.transport = made.engines, made.transport
        self.coordinator, self.clock, self.recorder = made.coordinator, made.clock, made.recorder
        self.session, self.requests = made.session, made.requests

    def __repr__(self) -> str:
        model, length = self.config.model, self.max_model_len
        engines = ", ".join(str(engine.id) for engine in self.engines)
        return f"LLM({model.source!r}, {model.dtype}, {length} tokens: {engines})"

    # Whole answers.

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
        **options: Unpack[RequestOptions],
    ) -> list[RequestOutput]:
        """Complete prompts.

        Args:
          prompts: one prompt or several, each text or token ids; an iterator of token ids is one
            prompt, of anything else several.
          params: for all of them, or one for each; None takes the defaults.
          progress: tell on stderr how far it is, by a bar or by lines; None does so unless the LLM
            was made with `progress=False`.
          options: `priority`, `deadline`, `labels`, `slo`, `cache_salt` and `cache_pin` of every
            request; see Request.

        Returns:
          An answer a prompt, in order. A choice that failed on the way says why in its `error`, and
          its `finish_reason` is "error"; an answer's own `error` is that of its first choice.

        Raises:
          ValueError: a prompt, params or options that can never be served. None of the prompts has
            been answered then.
          Closed: the LLM has been closed.
        """
        return self._answers(self.requests.of_prompts(prompts, params, options), progress)

    def chat(
        self,
        messages: Iterable[Message] | Iterable[Iterable[Message]],
        params: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
        **options: Unpack[ChatOptions],
    ) -> list[RequestOutput]:
        """Answer a conversation, or several; each is a list of {"role": ..., "content": ...}.

        Args:
          messages: the conversation or conversations.
          params, progress: as for `generate`.
          options: as for `generate`; and, of all conversations, `tools`, `documents`,
            `chat_template` and `chat_template_kwargs`; see `Tokenizer.apply_chat_template`.

        Raises:
          ValueError: also where the model has no chat template, or refuses the messages.
        """
        return self._answers(self.requests.of_conversations(messages, params, options), progress)

    def _answers(self, asked: list[Asked], progress: bool | None) -> list[RequestOutput]:
        for request, _ in asked:
            self.coordinator.check_request(request)
        told = Progress(self._progress if progress is None else progress)
        listener, submit = Listener(), self.session.submit
        try:
            with told.phase("generating", len(asked), "requests") as advance:
                entries = [
                    submit(request, text, listener=listener, patient=True)
                    for request, text in asked
                ]
                self.session.wait_for(entries, listener, advance)
        except BaseException:
            self.session.abort(*(request.id for request, _ in asked))
            raise
        return [entry.answer for entry in entries if entry.answer is not None]

    # An answer as it comes.

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        **options: Unpack[RequestOptions],
    ) -> Stream:
        """Complete one prompt, piece by piece. To close the stream, or drop it, aborts the request.

        Each chunk is of one choice, `chunk.choice`; of several choices, chunks come as they are
        made. The last chunk of the stream has the whole answer.

        Args:
          prompt, params, options: as for `generate`.

        Raises:
          ValueError: at once, for what can never be served.
          QueueFull: at once, if the waiting queue is at its bound.
          Closed: the LLM has been closed.
        """
        return self._stream(self.requests.of_prompt(prompt, params, options))

    def stream_chat(
        self,
        messages: Iterable[Message],
        params: SamplingParams | None = None,
        **options: Unpack[ChatOptions],
    ) -> Stream:
        """Answer one conversation, piece by piece.

        Args:
          messages, params, options: as for `chat`.

        Raises:
          ValueError, QueueFull, Closed: as for `stream`.
        """
        return self._stream(self.requests.of_conversation(messages, params, options))

    def _stream(self, asked: Asked) -> Stream:
        entry = self.session.submit(asked.request, asked.text, listener=Listener(), streams=True)
        return Stream(self.session, entry)

    # One's own loop.

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        on_text: Callable[[str], None] | None = None,
        **options: Unpack[RequestOptions],
    ) -> str:
        """Queue a request and return its id; `step` until `take_output` has its answer.

        Args:
          prompt, params, options: as for `generate`.
          on_text: called with each further piece of the first choice's text, from within a turn,
            by the thread that drives it. What it raises ends its own request, whose answer says
            "abort" and why; the next `step` raises it, too. Of what is no Exception, such as
            SystemExit, the turn itself ends with it, where the thread that submitted drives.

        Raises:
          ValueError: it can never be served.
          QueueFull: the waiting queue is at its bound.
          Closed: the LLM has been closed.
        """
        request, text = self.requests.of_prompt(prompt, params, options)
        return self.session.submit(request, text, on_text=on_text).request.id

    def step(self) -> None:
        """One turn of the coordinator's loop, or the rest of one that another thread drives.

        Raises:
          BaseException: what an `on_text` has raised, once; its own request is aborted, and no
            other is hurt.
          Closed: the LLM has been closed.
        """
        self.session.step()

    @property
    def has_work(self) -> bool:
        """Whether a `step` may still bring something."""
        return self.session.has_work

    def sequences(self, request_id: str) -> list[Sequence]:
        """The choices of a submitted request that has not ended, as they are now: for experiments
        that watch them. Nobody but the coordinator changes them.

        Raises:
          ValueError: no such request.
        """
        entry = self.session.book.get(request_id)
        if entry is None:
            raise ValueError(f"request_id={request_id!r}: must be of a request that has not ended")
        return entry.sequences

    def take_output(self, request_id: str) -> RequestOutput | None:
        """The finished answer to a submitted request, handed out once; None while it is not
        finished."""
        return self.session.book.take(request_id)

    def abort(self, request_id: str) -> None:
        """End a request wherever it is; its answer, as far as it came, says "abort". Within a turn,
        as in a callback or beside another thread that drives one, this is done when it has ended.
        """
        self.session.abort(request_id)

    def close(self) -> None:
        """Abort every request that has not ended, let the devices come to rest, and free their
        memory. The LLM serves nothing from then on. A second call does nothing.

        Raises:
          RuntimeError: called by an `on_text`; nothing has been closed then.
        """
        self.deployment.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # Engines.

    def set_role(self, engine: str, role: Role | str | None) -> None:
        """Let an engine prefill, decode, or do both, from when it has drained; nothing is lost, and
        every token is the one that it would have been. See docs/scheduling.md. Within a turn that
        another thread drives, it begins when that has ended.

        Args:
          engine: its id, as "prefill/0".
          role: None puts the engine out of service, until it has a role again.

        Raises:
          ValueError: no such engine or role; the engine does not accept the role's steps; or no
            other engine in service would do what it leaves out.
          RuntimeError: called by an `on_text`.
          Closed: the LLM has been closed.
        """
        wanted = Role.named(role)
        self.session.call(lambda: self.coordinator.set_role(EngineId(engine), wanted))

    # What happened.

    def report(self, slo: SLO | None = None) -> dict[str, Any]:
        """The run so far as plain values, which `json` can write: latencies and throughput under
        the keys of vLLM's serving benchmark, requests, engines, transfers, links, and what the
        words mean. It is about the requests that have ended, the newest `max_recorded` of them.

        Args:
          slo: what makes a request good: `request_goodput` and `slo_attainment` need it.
        """
        return report(self.recorder, slo)

    def write_trace(self, path: str | Path) -> None:
        """Write the run so far as Chrome trace events, for ui.perfetto.dev. Folders on the way to
        `path` are made.

        Raises:
          OSError: the file cannot be written.
        """
        write_trace(path, self.recorder)
