"""The floors of a step: bytes that it must read, operations that it must compute."""

from experiments.bench_steps.cases import DecodeCase, MixedCase, PrefillCase
from pdjax.core.model_spec import ModelSpec
from pdjax.device.models.registry import kv_layout, matrix_params, touched_params


def token_kv_bytes(spec: ModelSpec, dtype: str) -> int:
    """Return the bytes of K and V that one layer stores of a token, with their scales, if any."""
    return kv_layout(spec, 1, dtype).page_bytes // spec.num_layers


def decode_bytes(spec: ModelSpec, case: DecodeCase, itemsize: int, kv_dtype: str) -> int:
    """Return the bytes that a decode step reads: every matrix but the embedding, of experts those
    that its rows touch on average, and all KV, once.

    Args:
      itemsize: bytes of a weight.
      kv_dtype: type of the pool.
    """
    weights = touched_params(spec, case.rows) + spec.model_dim * spec.vocab_size
    return itemsize * weights + rows_kv_bytes(spec, case, kv_dtype)


def mixed_floor_s(
    spec: ModelSpec, case: MixedCase, kv_dtype: str, flops: float, read: float
) -> float:
    """Return the seconds of a mixed step at so many operations and bytes a second: the arithmetic
    of its tokens, and then the KV of its rows. The weights are read while the former runs."""
    rows = case.rows.rows
    computed = prefill_flops(spec, case.chunks) + 2 * rows * (
        matrix_params(spec) + spec.model_dim * spec.vocab_size
    )
    return computed / flops + rows_kv_bytes(spec, case.rows, kv_dtype) / read


def rows_kv_bytes(spec: ModelSpec, case: DecodeCase, kv_dtype: str) -> int:
    """Return the bytes of KV that the rows of a step read."""
    return spec.num_layers * token_kv_bytes(spec, kv_dtype) * case.tokens


def attention_flops(spec: ModelSpec, case: PrefillCase) -> int:
    """Count the operations of one layer's causal attention: two products over visible pairs."""
    return 4 * spec.query_heads * spec.head_dim * case.pairs


def prefill_flops(spec: ModelSpec, case: PrefillCase) -> int:
    """Count the operations of a prefill step: layers for every token, the vocabulary for one token
    a prompt."""
    layers = 2 * matrix_params(spec) * case.tokens + spec.num_layers * attention_flops(spec, case)
    return layers + 2 * spec.model_dim * spec.vocab_size * len(case.chunks)
