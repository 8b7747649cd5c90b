"""How a weight meets its input.

- `contraction`: the axes of a weight that go to each low-rank factor, from an einsum's equation.
- `linear`: which contraction a module computes: flax's own layers, and registered ones.
- `attention`: how an attention module hands query, key and value to its attention function.
- `quantized`: a frozen weight in few bits, and how a layer reads it.
"""
