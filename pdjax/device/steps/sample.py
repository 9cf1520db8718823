"""sample_step: the next token of each row, on every device of a mesh.

It is a step of its own for both phases, so that its few variants do not multiply with the many
sizes of a prefill or of a page table.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pdjax.device.kept.program import KeptProgram
from pdjax.device.mesh import HOST, shardings
from pdjax.device.models.family import Leaf
from pdjax.device.models.sampling import Asked, Choice, choose
from pdjax.device.sharing import shared


@struct.dataclass
class Undecided:
    """Entries whose next token is to be chosen."""

    logits: Leaf  # f32[n, V]
    positions: Leaf  # i32[n]: which the tokens will take; 0 where an entry is idle
    rows: Leaf  # i32[n]: theirs in the history; their places, modulo b, in what is asked

    @classmethod
    def shapes(cls, n: int, vocab_size: int) -> "Undecided":
        """Of so many entries, as shapes alone."""
        ids = jax.ShapeDtypeStruct((n,), jnp.int32)
        return cls(jax.ShapeDtypeStruct((n, vocab_size), jnp.float32), ids, ids)


@shared
def make_sample_step(mesh: Mesh, max_logprobs: int) -> KeptProgram:
    """(undecided [n], fed_back i32[b] DONATED or None, history i32[rows, C] DONATED or None, asked
    of b rows) -> (fed_back, history, Choice [n]).

    The chosen tokens are returned twice: in the choice, and on the devices. There they are i32[n],
    or where `fed_back` is given, written to the places of their rows in its memory, which the next
    tick reads at an address that does not change. A row without a token has id 0 in `fed_back` and
    in the history. The choice is written to pinned memory of the host by the step itself:
    `copy_to_host_async` would start the copy only once a thread of the runtime has seen the step
    end. Penalties read the history. Every variant appends the chosen tokens to it, so that it is
    complete when a later batch asks for penalties.

    Args:
      mesh: where the logits are.
      max_logprobs: how many of the likeliest tokens are reported.
    """

    def step(
        undecided: Undecided, fed_back: jax.Array | None, history: jax.Array | None, asked: Asked
    ) -> tuple[jax.Array, jax.Array | None, Choice]:
        positions, rows = undecided.positions, undecided.rows
        theirs = None if history is None else history[rows]
        choice = choose(
            undecided.logits, positions, asked, theirs, rows=rows, max_logprobs=max_logprobs
        )
        chosen = tokens = jnp.maximum(choice.tokens, 0)  # ids, also where none was chosen
        if history is not None:
            at = jnp.where(positions > 0, positions, history.shape[1])  # past the end: dropped
            history = history.at[rows, at].set(chosen, mode="drop")
        if fed_back is not None:
            b = len(fed_back)
            places = jnp.where(positions > 0, rows % b, b)
            tokens = fed_back.at[places].set(chosen, mode="drop")
        # Before the choice: what is donated goes to the first result of its shape.
        return tokens, history, choice

    mapped = jax.shard_map(step, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    everywhere, host = shardings(mesh, P()), shardings(mesh, P(), HOST)
    jitted = jax.jit(
        mapped,
        donate_argnums=(1, 2),
        keep_unused=True,
        in_shardings=everywhere,
        out_shardings=(everywhere, everywhere, host),
    )
    return KeptProgram("sample", jitted, mesh, max_logprobs)
