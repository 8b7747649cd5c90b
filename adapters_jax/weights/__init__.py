"""Weights that change, and how a model's code reads them.

- `changes`: the arithmetic of a changed weight, `W' = scale * (W + A B)`; `factors`: of A and B.
- `lazy`: the trace where operations read changed weights without forming them; `rules`: how each
  operation does; `products`: products and convolutions of an input and a changed weight;
  `joining`: several weights as one.
- `axes`: which axes of a weight each factor has; it follows from the reads.
- `fingerprints`: whether frozen weights moved since they got adapters.
- `quantized`: a frozen weight in few bits, and how it is read.
- `meshes`: how what is traced lies over devices.
"""

from adapters_jax.weights import rules as rules  # fills the table of `lazy`
