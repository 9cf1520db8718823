"""`pdjax serve`: a server that OpenAI's clients can talk to."""

import asyncio
import os
import signal
import sys
from contextlib import ExitStack, closing
from types import FrameType
from typing import Any

from absl import flags

from pdjax.cli.command import Command
from pdjax.flags import config_of, new_flags
from pdjax.serving.parsers.registry import AUTO, NONE, REASONING_PARSERS, TOOL_PARSERS

USAGE = """
pdjax serve: an OpenAI-compatible server over HTTP; see docs/serving.md.

  pdjax serve
  pdjax serve --config=configs/smollm2_cpu.py --port=8000
  pdjax serve --config=configs/gpu_1p1d.py --host=0.0.0.0 --api_keys_file=keys.txt \\
      --tls_cert_file=cert.pem --tls_key_file=key.pem

While the model loads, every path but /health answers 503. SIGTERM or Ctrl-C lets answers under way
finish; a second one ends it at once. Logs are lines of JSON on stderr.
"""

CORES_EACH, MOST_FRONTS = 4, 4
"""Without `--front_processes`: cores for each front, and the most fronts."""

_FLAGS = new_flags(config="smollm2")
_OF: dict[str, Any] = {"flag_values": _FLAGS}
_HOST = flags.DEFINE_string("host", "127.0.0.1", "address to listen at", **_OF)
_PORT = flags.DEFINE_integer("port", 8000, "port to listen at; 0 takes a free one", **_OF)
_NAME = flags.DEFINE_string("served_model_name", None, "what clients call the model", **_OF)
_KEYS = flags.DEFINE_string(
    "api_keys_file", None, "file, name:key a line; else the variable PDJAX_API_KEYS", **_OF
)
_CERT = flags.DEFINE_string("tls_cert_file", None, "PEM file: certificate, and its chain", **_OF)
_KEY = flags.DEFINE_string("tls_key_file", None, "PEM file: its key; else in tls_cert_file", **_OF)
_CORS = flags.DEFINE_list(
    "cors_origins", [], "origins whose pages may read answers, as https://host; * is all", **_OF
)
_DRAIN = flags.DEFINE_float("drain_s", 30.0, "seconds for answers under way at the end", **_OF)
_STALL = flags.DEFINE_float("stall_s", 60.0, "seconds until a client that reads nothing", **_OF)
_BODY = flags.DEFINE_integer("max_body_mb", 16, "largest body of a request, MiB", **_OF)
_FRONTS = flags.DEFINE_integer(
    "front_processes",
    None,
    "processes for HTTP and text; 0 has both in the process of the engines; by default one for "
    f"each {CORES_EACH} cores, at most {MOST_FRONTS}",
    lower_bound=0,
    **_OF,
)
_VLLM = flags.DEFINE_bool(
    "vllm_metric_names", False, "write metrics that vLLM has, too, under its names", **_OF
)
_TOOLS = flags.DEFINE_enum(
    "tool_call_parser", AUTO, [AUTO, NONE, *TOOL_PARSERS], "how the model writes calls", **_OF
)
_REASONING = flags.DEFINE_enum(
    "reasoning_parser", AUTO, [AUTO, NONE, *REASONING_PARSERS], "and its reasoning", **_OF
)
_OTLP = flags.DEFINE_string(
    "otlp_endpoint",
    None,
    "OpenTelemetry's collector, for traces, as http://host:4318; else OTEL_EXPORTER_OTLP_ENDPOINT",
    **_OF,
)
_LEVEL = flags.DEFINE_enum("log_level", "info", ["debug", "info", "warning"], "of the log", **_OF)


def serve() -> int:
    """`pdjax serve`."""
    config = config_of(_FLAGS)
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{error.name}: is not installed; pip install 'pdjax[serve]'") from error

    from pdjax.serving import logs
    from pdjax.serving.front import Front, Settings, syntax_of
    from pdjax.serving.keys import read_keys
    from pdjax.serving.loading import answering
    from pdjax.serving.processes.fronts import Fronts
    from pdjax.serving.server import Server, listening_socket, url_of
    from pdjax.serving.tls import tls_context
    from pdjax.serving.traces import traces_url

    settings = Settings(
        api_keys=read_keys(_KEYS.value),
        max_body=_BODY.value << 20,
        drain_s=_DRAIN.value,
        stall_s=_STALL.value,
        cors_origins=tuple(_CORS.value),
        vllm_metric_names=_VLLM.value,
        tool_call_parser=_TOOLS.value,
        reasoning_parser=_REASONING.value,
        traces_url=traces_url(_OTLP.value),
    )
    tls = tls_context(_CERT.value, _KEY.value)
    found = listening_socket(_HOST.value, _PORT.value)
    count = _front_processes()
    with ExitStack() as held:
        held.callback(found.close)
        # Until a server has its own handler: what fronts have on disk and in processes must go.
        held.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, _end))
        fronts = held.enter_context(closing(Fronts(count))) if count else None
        logs.set_up(_LEVEL.value, shared=fronts is not None)
        print(f"pdjax serve: loading {config.model.source}", file=sys.stderr)

        from pdjax.async_llm import AsyncLLM
        from pdjax.serving.async_backend import AsyncBackend

        loading = held.enter_context(ExitStack())
        loading.enter_context(answering(found, tls))
        llm = AsyncLLM(config)  # before the event loop runs, which would hold Ctrl-C up

        async def run() -> None:
            backend = AsyncBackend(llm, _NAME.value)
            syntax = syntax_of(backend, settings)
            if fronts is not None:
                files = _CERT.value, _KEY.value
                await fronts.start(llm.llm, backend, settings, *files, log_level=_LEVEL.value)
            await asyncio.to_thread(loading.close)
            url = url_of(found, tls is not None)
            logs.event(
                "ready",
                url=url,
                model=backend.model.name,
                api_keys=[key.name for key in settings.api_keys] or None,
                tool_call_parser=syntax.tool_parser,
                reasoning_parser=syntax.reasoning_parser,
                front_processes=count,
            )
            print(f"pdjax serve: {backend.model.name} at {url}/v1", flush=True)
            if fronts is None:
                await Server(Front(backend, settings), tls).serve([found])
            else:
                await fronts.serve(found)
                await backend.close()

        asyncio.run(run())
    return 0


def _end(number: int, frame: FrameType | None) -> None:
    """End the command by a signal."""
    raise SystemExit(128 + number)


def _front_processes() -> int:
    """How many processes HTTP has; 0 where it has none of its own."""
    if _FRONTS.value is not None:
        return _FRONTS.value
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return min(cores // CORES_EACH, MOST_FRONTS)


COMMAND = Command(serve, _FLAGS, USAGE)
