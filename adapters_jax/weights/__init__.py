"""How a weight meets its input.

- `contraction`: which axes of a weight each low-rank factor has, from an einsum's equation.
- `linear`: which contraction a module computes: flax's own layers, and registered ones.
- `attention`: how an attention module passes query, key and value to its attention function.
- `quantized`: a frozen weight in few bits, and how a layer reads it.
"""
