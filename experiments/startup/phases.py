"""One start, in a process of its own, of whatever build PYTHONPATH names: see the package.

  PYTHONPATH=FOLDER python phases.py CONFIG FIELD=VALUE ...

Prints JSON: of each phase its seconds of wall time, the processor's seconds, and where they went.
"""

import json
import sys
import time
from typing import Any

EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "tracing",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lowering",
    "/jax/core/compile/backend_compile_duration": "compiling",
}
LOADING = ("load_params", "random_params", "copied_params")


class Phases:
    """Times phases, and within them what JAX says of compiling, and loading."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, float]] = {}
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        self._parts: dict[str, float] = {}

    def add(self, part: str, seconds: float) -> None:
        """Add seconds to a part of the phase that runs."""
        self._parts[part] = self._parts.get(part, 0.0) + seconds

    def end(self, phase: str) -> None:
        """End a phase; the next one begins."""
        wall, cpu = time.perf_counter(), time.process_time()
        whole = {"wall": wall - self._wall, "cpu": cpu - self._cpu}
        self.found[phase] = whole | self._parts
        self._wall, self._cpu, self._parts = wall, cpu, {}

    def watch_loading(self) -> None:
        """Time the functions that put weights on devices, by whatever module they are called."""
        for module in [module for name, module in sys.modules.items() if name.startswith("pdjax")]:
            for name in LOADING:
                if callable(function := getattr(module, name, None)):
                    setattr(module, name, self._timed(function))

    def _timed(self, function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            import jax

            began = time.perf_counter()
            made = jax.block_until_ready(function(*args, **options))
            self.add("weights", time.perf_counter() - began)
            return made

        return call


def main(config: str, *fields: str) -> None:
    """Start twice, and answer in between."""
    phases = Phases()
    import jax

    from pdjax import LLM, SamplingParams

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event in EVENTS:
            phases.add(EVENTS[event], duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    overrides = dict(field.split("=", 1) for field in fields)
    phases.end("import")
    import pdjax.llm  # noqa: F401

    phases.watch_loading()
    first = LLM(config, overrides)
    phases.end("first LLM")
    first.generate([[1, 2, 3]], SamplingParams(temperature=0.0, max_tokens=1))
    phases.end("first token")
    first.close()
    phases.end("close")
    LLM(config, overrides).close()
    phases.end("second LLM")
    print(json.dumps(phases.found))


if __name__ == "__main__":
    main(*sys.argv[1:])
