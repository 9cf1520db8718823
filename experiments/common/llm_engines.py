"""The engines of an LLM by the steps that they accept, and the transport between them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pdjax import LLM
from pdjax.interfaces.steps import StepKind

PREFILL, DECODE = StepKind.PREFILL, StepKind.DECODE


def engines_of(llm: LLM, kind: StepKind) -> list[Any]:
    """Return the engines that accept steps of a kind, in order."""
    engines: list[Any] = llm.deployment.backing.engines
    return [each for each in engines if kind in each.accepts]


def program_of(llm: LLM, kind: StepKind) -> Any:
    """Return the program of the first engine that accepts steps of a kind."""
    return engines_of(llm, kind)[0].programs[kind]


def device_transport(llm: LLM) -> Any:
    """Return the transport between pools on devices; see `pdjax.device.kv.transport`."""
    return llm.deployment.backing.transport.transports[0]


@contextmanager
def decode_held_back(llm: LLM) -> Iterator[None]:
    """Dispatch no tick inside the block, so that sequences gather in the rows."""
    coordinator, names = llm.coordinator, [each.id for each in engines_of(llm, DECODE)]
    for name in names:
        coordinator.pause(name)
    try:
        yield
    finally:
        for name in names:
            coordinator.resume(name)
