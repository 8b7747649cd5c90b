"""Where attention happens in a module, for methods that act in it.

- `watch`: the trace that finds the attention that a module computes in line, as it runs.
- `activations`: what the trace knows of activations; `parts`: of their axes.
- `moving`: what operations that move numbers do to that; `following`: those that compute.
- `heads`: what a prompt needs of an attention that was found.
- `masks`: which keys a query sees.
- `registry`: attention modules whose attention function is called, flax's and registered ones.
"""

# Both fill the table of `watch`.
from adapters_jax.attention import following as following
from adapters_jax.attention import moving as moving
