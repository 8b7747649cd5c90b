"""What a program does, seen as it is traced.

- `inputs`: example inputs, with which a model runs on shapes alone.
- `calls`: the input and the output of a module's call.
- `reach`: what the outputs of a traced function depend on, and the operands of its scans.
- `watch`: the trace that finds the attention that a module computes in line, as it runs.
- `activations`: what that trace knows of activations; `parts`: of their axes.
- `moving`: what operations that move numbers do to that; `following`: those that compute.
- `heads`: what a prompt needs of an attention that was found.
- `masks`: which keys a query sees.
- `registry`: attention modules whose attention function is called, flax's and registered ones.
"""

# Both fill the table of `watch`.
from adapters_jax.trace import following as following
from adapters_jax.trace import moving as moving
