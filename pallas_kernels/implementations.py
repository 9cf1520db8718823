"""Which implementation of an operation runs: the one that is named, or the one that is proven.

An operation is a folder. Each of its implementations is a module there with a function of the
operation's name and, but for the reference, which takes all, with `refusal`: of the operands that
the operation's api shows it, why it does not take them, or None.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from types import ModuleType
from typing import Any

import jax
from jax import lax

_LOG = logging.getLogger("pallas_kernels")


@cache
def _warn(operation: str, reason: str) -> None:
    """Once for each reason."""
    _LOG.warning("%s: no kernel runs on this GPU, only the slow reference: %s", operation, reason)


def _foreign(name: str) -> bool:
    """Whether a kernel of this platform does not run on the devices at hand. Only the choice that
    None leaves to us asks: what is named runs, or raises."""
    return name == "mosaic_gpu" and _other_gpus()


@cache
def _other_gpus() -> bool:
    """Whether this process has GPUs, and none of them is a Hopper. Where it has none it may still
    lower for one."""
    if jax.default_backend() != "gpu":
        return False
    capabilities = [str(getattr(gpu, "compute_capability", "")) for gpu in jax.devices()]
    return not any(capability.startswith("9.") for capability in capabilities)


@dataclass(frozen=True)
class Operation:
    """An operation's implementations."""

    name: str
    folder: str
    """Dotted name of the package."""
    implementations: tuple[str, ...]
    proven: Mapping[str, str]
    """Platform -> implementation that `None` lowers to there, where it takes the arguments."""
    warns: bool = False
    """Whether the reference is so slow on GPUs that to run it there is worth a warning."""

    def run(
        self,
        implementation: str | None,
        operands: tuple[Any, ...],
        options: dict[str, Any],
        *,
        shown: tuple[Any, ...],
    ) -> Any:
        """`choose` among the modules' functions of the operation's name.

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
        """The result of the named implementation, or of the one proven on the platform that the
        program is lowered for, which is the reference where no kernel takes these arguments.

        Args:
          implementation: a name, or None.
          operands: arrays.
          bound: from a name to a function of the operands.
          refusal: why a kernel does not take them, or None; the reference takes all.

        Raises:
          ValueError: there is no such implementation.
          NotImplementedError: the named implementation does not take these arguments.
        """

        def why_not(name: str) -> str | None:
            return None if name == "reference" else refusal(name)

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
        if self.warns and reason is not None and jax.default_backend() == "gpu":
            _warn(self.name, reason)
        if not kernels:
            return bound("reference")(*operands)
        return lax.platform_dependent(*operands, default=bound("reference"), **kernels)

    def module(self, name: str) -> ModuleType:
        """An implementation's, imported at first use: a kernel's imports may cost seconds where it
        never runs."""
        return import_module(f"{self.folder}.{name}")
