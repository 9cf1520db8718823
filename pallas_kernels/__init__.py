"""Kernels for attention over paged KV, its writes, and a layer's products; usable without pdjax.

An operation is a folder. `api.py` defines what it computes and refuses, `reference.py` is its
specification and its implementation on the CPU, `mosaic_*.py` are kernels, `cases.py` lists the
shapes that are both tested and timed. `python -m pallas_kernels.check` runs every case on the
hardware at hand.

Dimension key: B rows or sequences, T packed tokens, Z listed pages, P pages of the pool, W pages a
row, S page size, N query heads, K KV heads, G = N/K, J = G + 2 rows of a KV head (its queries, K,
V), H head dim, I = H/2, C tokens of a block of pages.
"""
