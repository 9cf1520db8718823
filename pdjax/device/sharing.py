"""Programs that all LLMs of a process share.

What builds a jitted function is itself a function of hashable facts: shapes, shardings, a mesh, the
names of implementations; never of weights or pools. JAX's settings are facts, too. `shared`
remembers its results, so that a second LLM of the same shapes gets the functions of the first, and
with them what JAX has compiled. They hold no arrays: an LLM that is closed frees its memory.

What such programs have rehearsed in this process is compiled, so a rehearsal of the same shapes is
left out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar

import jax
from jax.sharding import PartitionSpec

from pdjax.device.compat import jax_settings

P = ParamSpec("P")
T = TypeVar("T")

_MOST_KEPT = 64
"""Results of each builder that are kept, the latest used ones: a process may try any number of
shapes, and each has its machine code."""


_builders: list[Any] = []


def shared(build: Callable[P, T]) -> Callable[P, T]:
    """Decorate a pure function whose arguments are hashable: equal arguments give the same result
    again, while JAX's settings are the same."""

    @lru_cache(_MOST_KEPT)
    def remembers(settings: Any, *args: P.args, **kwargs: P.kwargs) -> T:
        del settings
        return build(*args, **kwargs)

    @wraps(build)
    def found(*args: P.args, **kwargs: P.kwargs) -> T:
        return remembers(tuple(jax_settings()), *args, **kwargs)  # type: ignore[arg-type]

    _builders.append(remembers)
    return found


def forget() -> None:
    """Let all builders forget their results, and with them what is compiled: the next ones are as
    in a new process, if JAX's caches are cleared, too."""
    for builder in _builders:
        builder.cache_clear()


@shared
def rehearsals(*programs: Any) -> set[Any]:
    """The `shapes_of` the arguments of all rehearsals that these programs together have run. They
    come from builders that are `shared`; a program that is built again has run none."""
    return set()


def shapes_of(*arguments: Any) -> Any:
    """What a program is compiled for, hashable: the tree of its arguments, and the shape and type
    of each leaf."""
    leaves, tree = jax.tree.flatten(arguments)
    return tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


@dataclass(frozen=True)
class Specs:
    """The PartitionSpecs of a tree of arrays, hashable.

    Attributes:
      leaves, structure: of the tree.
    """

    leaves: tuple[PartitionSpec, ...]
    structure: Any

    @classmethod
    def of(cls, arrays: Any) -> "Specs":
        """Those that a tree of `jax.Array`s over a mesh has."""
        leaves, structure = jax.tree.flatten(arrays)
        return cls(tuple(leaf.sharding.spec for leaf in leaves), structure)

    @property
    def tree(self) -> Any:
        """The tree, with a PartitionSpec as each leaf."""
        return jax.tree.unflatten(self.structure, self.leaves)
