"""Which implementation of an operation runs: the one that is named, or the one that is proven.

An operation is a folder. Each of its implementations is a module there with a function of the
operation's name and, but for the reference, which takes all, with `refusal`: of the operands that
the operation's api shows it, why it does not take them, or None.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

from jax import lax


@dataclass(frozen=True)
class Operation:
    """An operation's implementations."""

    name: str
    folder: str
    """Dotted name of the package."""
    implementations: tuple[str, ...]
    proven: Mapping[str, str]
    """Platform -> implementation that `None` lowers to there, where it takes the arguments."""

    def run(
        self,
        implementation: str | None,
        operands: tuple[Any, ...],
        options: dict[str, Any],
        *,
        shown: tuple[Any, ...],
    ) -> Any:
        """The result of the named implementation, or of the one proven on the platform that the
        program is lowered for, which is the reference where no kernel takes these arguments.

        Args:
          implementation: a name, or None.
          operands, options: positional and keyword arguments.
          shown: the operands that decide whether a kernel takes them.

        Raises:
          ValueError: there is no such implementation.
          NotImplementedError: the named implementation does not take these arguments.
        """

        def bound(name: str) -> Callable[..., Any]:
            return partial(getattr(self._module(name), self.name), **options)

        if implementation is not None:
            if implementation not in self.implementations:
                raise ValueError(
                    f"implementation must be None or one of {', '.join(self.implementations)}, "
                    f"not {implementation!r}"
                )
            if reason := self._refusal(implementation, shown):
                raise NotImplementedError(f"{self.name} by {implementation}: {reason}")
            return bound(implementation)(*operands)
        kernels = {
            platform: bound(name)
            for platform, name in self.proven.items()
            if self._refusal(name, shown) is None
        }
        if not kernels:
            return bound("reference")(*operands)
        return lax.platform_dependent(*operands, default=bound("reference"), **kernels)

    def _module(self, name: str) -> ModuleType:
        """Imported at first use: a kernel's imports may cost seconds where it never runs."""
        return import_module(f"{self.folder}.{name}")

    def _refusal(self, name: str, shown: tuple[Any, ...]) -> str | None:
        return None if name == "reference" else self._module(name).refusal(*shown)
