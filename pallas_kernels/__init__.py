"""Attention over paged KV, and writing it: one folder an operation, usable without pdjax.

`api.py` says what an operation computes and what it refuses, `reference.py` is its specification
and its implementation on the CPU, `mosaic_*.py` are kernels, `cases.py` the shapes that are both
tested and timed. `python -m pallas_kernels.check` runs every case on the hardware at hand.

Dimension key: B rows or sequences, T packed tokens, Z listed pages, P pages of the pool, W pages a
row, S page size, N query heads, K KV heads, G = N/K, J = G + 2 rows of a KV head (its queries, K,
V), H head dim, I = H/2, C tokens of a block of pages.
"""
