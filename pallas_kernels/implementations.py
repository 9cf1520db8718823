"""Chooses the implementation of an operation: the named one, or the one proven on the platform.

An operation is a folder. Each of its implementations is a module there with a function of the
operation's name. A kernel's module also has `refusal`, which says why it does not take the operands
that the api shows it, or None. The reference takes all operands.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from types import ModuleType
from typing import Any

import jax
from jax import lax

_LOG = logging.getLogger("pallas_kernels")

_HOPPER_JAX = (0, 11)
"""JAX 0.10 cannot lower loads without an index, nor references that are updated in place."""


_due = threading.local()


@cache
def warn(operation: str, reason: str) -> None:
    """Warn that the reference runs on a GPU; the cache lets each reason through once."""
    _LOG.warning("%s: no kernel runs on this GPU, only the slow reference: %s", operation, reason)


@contextmanager
def noting_warnings() -> Iterator[list[tuple[str, str]]]:
    """The arguments of `warn` in what this thread traces within the block, also of those that have
    been let through before: for whoever keeps a program, which nobody traces again."""
    before, _due.noted = getattr(_due, "noted", []), list[tuple[str, str]]()
    try:
        yield _due.noted
    finally:
        _due.noted = before


def tell_of_reference(operation: str, reason: str) -> None:
    """Warn, where the program may be traced for a GPU, that no kernel of the operation runs there;
    `noting_warnings` notes it."""
    if jax.default_backend() == "gpu":
        getattr(_due, "noted", []).append((operation, reason))
        warn(operation, reason)


def _too_old(name: str) -> str | None:
    """Say which JAX a kernel needs, if this one is older."""
    if name == "mosaic_gpu" and jax.__version_info__ < _HOPPER_JAX:
        needed = ".".join(map(str, _HOPPER_JAX))
        return f"kernels for Hopper GPUs need JAX {needed} or newer, and this is {jax.__version__}"
    return None


def _foreign(name: str) -> bool:
    """Whether a kernel of this name cannot run on the devices at hand.

    Only the choice for None asks this: a named implementation runs or raises.
    """
    return _for_cpus() or (name == "mosaic_gpu" and _other_gpus())


def _for_cpus() -> bool:
    """Whether a program is traced for CPUs alone: the process has nothing else, and the mesh in
    scope names no other platform, as one does that a program is only lowered for. To import the
    kernels takes two seconds, and to trace them a third of all tracing.
    """
    if jax.default_backend() != "cpu":
        return False
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is None or device.device_kind == "cpu"


@cache
def _other_gpus() -> bool:
    """Whether this process has GPUs, but no Hopper."""
    if jax.default_backend() != "gpu":
        return False
    capabilities = [str(getattr(gpu, "compute_capability", "")) for gpu in jax.devices()]
    return not any(capability.startswith("9.") for capability in capabilities)


@dataclass(frozen=True)
class Operation:
    """An operation's implementations."""

    name: str
    folder: str
    """Dotted name of the operation's package."""
    implementations: tuple[str, ...]
    proven: Mapping[str, str]
    """Platform -> the implementation that `None` lowers to there, if it takes the arguments."""
    warns: bool = False
    """Whether the reference is so slow on GPUs that its use there logs a warning."""

    def run(
        self,
        implementation: str | None,
        operands: tuple[Any, ...],
        options: dict[str, Any],
        *,
        shown: tuple[Any, ...],
    ) -> Any:
        """Run an implementation, chosen by `choose` from the operation's modules.

        Args:
          implementation: a name, or None.
          operands, options: positional and keyword arguments.
          shown: the operands that decide whether a kernel takes them.
        """
        return self.choose(
            implementation,
            operands,
            bound=lambda name: partial(getattr(self.module(name), self.name), **options),
            refusal=lambda name: self.module(name).refusal(*shown),
        )

    def choose(
        self,
        implementation: str | None,
        operands: tuple[Any, ...],
        *,
        bound: Callable[[str], Callable[..., Any]],
        refusal: Callable[[str], str | None],
    ) -> Any:
        """Run the named implementation, or, for None, the one proven on the platform that the
        program is lowered for. Where no kernel takes these arguments, the reference runs.

        Args:
          implementation: a name, or None.
          operands: arrays.
          bound: returns the function of the operands for a name.
          refusal: says why a kernel, by name, does not take the operands, or None; not called for
            the reference, which takes all.

        Raises:
          ValueError: there is no such implementation.
          NotImplementedError: the named implementation does not take these arguments, or needs a
            newer JAX.
        """

        def why_not(name: str) -> str | None:
            return None if name == "reference" else _too_old(name) or refusal(name)

        if implementation is not None:
            if implementation not in self.implementations:
                raise ValueError(
                    f"implementation must be None or one of {', '.join(self.implementations)}, "
                    f"not {implementation!r}"
                )
            if reason := why_not(implementation):
                raise NotImplementedError(f"{self.name} by {implementation}: {reason}")
            return bound(implementation)(*operands)
        reasons = {name: why_not(name) for name in set(self.proven.values()) if not _foreign(name)}
        kernels = {
            platform: bound(name)
            for platform, name in self.proven.items()
            if name in reasons and reasons[name] is None
        }
        reason = reasons.get(self.proven.get("cuda", ""))
        if self.warns and reason is not None:
            tell_of_reference(self.name, reason)
        if not kernels:
            return bound("reference")(*operands)
        return lax.platform_dependent(*operands, default=bound("reference"), **kernels)

    def may_run(self, name: str) -> bool:
        """Whether None may lower to a kernel on some platform that the program is traced for. What
        else the kernel demands, its module says."""
        return name in self.proven.values() and not _foreign(name)

    def module(self, name: str) -> ModuleType:
        """Import an implementation's module at first use: a kernel's imports may take seconds even
        where it never runs."""
        return import_module(f"{self.folder}.{name}")
