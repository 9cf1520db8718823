"""Programs that all LLMs of a process share.

What builds a jitted function is itself a function of hashable facts: shapes, shardings, a mesh, the
names of implementations; never of weights or pools. `shared` remembers its results, so that a
second LLM of the same shapes gets the functions of the first, and with them what JAX has compiled.
They hold no arrays: an LLM that is closed frees its memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ParamSpec, TypeVar

import jax
from jax.sharding import PartitionSpec

P = ParamSpec("P")
T = TypeVar("T")

_MOST_KEPT = 64
"""Results of each builder that are kept, the latest used ones: a process may try any number of
shapes, and each has its machine code."""


def shared(build: Callable[P, T]) -> Callable[P, T]:
    """Decorate a pure function whose arguments are hashable: equal arguments give the same result
    again."""
    return lru_cache(_MOST_KEPT)(build)  # type: ignore[return-value]


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
