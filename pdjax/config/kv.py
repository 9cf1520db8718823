"""How KV is kept: the fields of `config.kv`."""

from dataclasses import dataclass

from pdjax.config.checks import MOST_PAGE_SIZE, between, check_types, one_of, share
from pdjax.core.kv_layout import QUANTISED_DTYPES

DTYPES = ("float32", "bfloat16")
"""Types of weights, activations and pools that have no scales."""

USUAL_FRACTION = 0.9
"""Of the free memory, for pools, where it is not known what programs need beside them."""


@dataclass(frozen=True)
class KVConfig:
    """The KV pages of every pool; decode.page_size and decode.kv_dtype override them there.

    Attributes:
      page_size: tokens a page.
      dtype: type of the pools, "float32" or "bfloat16"; None takes the model's. Decode pools may
        have another, see decode.kv_dtype.
      prefix_cache: keep the pages of computed tokens until their memory is needed, and reuse the
        pages of a prompt's longest cached prefix. False computes every prompt whole.
      pinned_fraction: most of a pool's pages that requests may pin (`cache_pin`), in (0, 1]; the
        longest request has room beside them in any case.
      memory_fraction: where a pool's `pages` is None, the pools take at most this share, in (0, 1],
        of the memory that the weights leave free on a device; on a CPU, of half of the host's free
        memory. The rest holds activations, logits and hand-offs in flight. None asks XLA what the
        largest step of each kind takes, and leaves that, KV in flight, and 2%; on a CPU it is 0.9.
        A platform that does not report its memory has no such bound.
    """

    page_size: int = 16
    dtype: str | None = None
    prefix_cache: bool = True
    pinned_fraction: float = 0.25
    memory_fraction: float | None = None

    def __post_init__(self) -> None:
        check_types("kv", self)
        between("kv", self, 1, MOST_PAGE_SIZE, "page_size")
        if self.dtype in QUANTISED_DTYPES:
            raise ValueError(
                f"kv.dtype={self.dtype!r}: prefill attention reads no quantised pages; allowed are "
                f"{', '.join(DTYPES)}, and decode.kv_dtype={self.dtype!r} for the decode side"
            )
        if self.dtype is not None:
            one_of("kv.dtype", self.dtype, DTYPES)
        share("kv", self, "pinned_fraction")
        share("kv", self, "memory_fraction")
