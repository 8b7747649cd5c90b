"""What a program does: one engine for all who ask.

Asking walks a program that was traced as a whole:

- `program`: the graph of its operations, and what its outputs depend on.
- `primitives`: what operations do with axes.
- `reads`: who reads a leaf, and how.
- `flow`: what every value is made of, with attentions, and norms (`norms`).
- `roles`: query, key, value, feed-forward, head as paths; `patterns`: paths as short patterns.

Changing needs a trace that is on top while the code runs, `through`:

- `watch`: the trace that finds the attention that a module computes in line, as it runs.

Both follow activations from projections through a softmax:

- `activations`: what is known of activations; `parts`: of their axes.
- `moving`: what operations that move numbers do to that; `following`: those that compute.
- `heads`: what a prompt needs of an attention that was found.
- `registry`: attention modules whose attention function is called, flax's and registered ones.

Beside them are `inputs`, example inputs on shapes alone; `calls`, the input and the output of a
module's call; and `masks`, which keys a query sees.
"""
