"""Adapted models and adapters turned into others, all of them in memory.

- `merge`: low-rank adapters folded into the base, and taken out again.
- `combine`: weighted sums of low-rank adapters.
- `quantize`: a frozen base in few bits.
- `stacking`: unrolled layers as scanned ones, and back, with the recipes of their adapters.
"""
